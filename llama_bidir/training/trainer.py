"""The Hugging Face Trainer for groups of passages."""

import copy
import os
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.utils.data import IterableDataset, SequentialSampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer
from transformers.trainer_utils import EvalLoopOutput, EvalPrediction

from ..data import GroupCollator, GroupDataset, Grouping, GroupStream
from ..losses import IGNORED, Loss, get_loss, listwise_cross_entropy
from ..model_card import write_model_card
from ..packing import PACKED_ATTENTION, PACKED_IMPLEMENTATIONS
from ..prompts import PromptEncoder, ensure_pad_token
from .arguments import CrossEncoderTrainingArguments
from .history import HistoryCallback
from .liger import register_with_liger
from .lora import add_adapter
from .metrics import group_metrics
from .sampling import EpochCallback, EpochSampler

# What the collator reads, so that the Trainer leaves it in the items.
GROUP_KEYS = ["query", "passages", "labels", "teacher_scores"]


class CrossEncoderTrainer(Trainer):
    """
    Trains a bidirectional Llama reranker on groups: a query, one of its positives and some of its negatives.

    Batches are packed (laid end to end, without padding) where that is possible and `args.packing` does not say
    otherwise. Evaluation reports `loss`, `accuracy@1`, `mrr@10` and `ndcg@10` over whole groups, the same on any number
    of processes. Each log is appended to `history.jsonl` in the output folder, and the end draws `training.png`.

    Args:
        model: a [`LlamaBidirectionalForSequenceClassification`] with one label; its configuration says how pairs are
            rendered and truncated.
        args: [`CrossEncoderTrainingArguments`]; batch sizes count groups.
        train_dataset, eval_dataset: rows with `query`, `pos_doc` and `neg_doc` (see [`~data.parse_row`]), as a
            sequence or a stream, or groups that are made already (see [`~data.GroupDataset`]). A stream for evaluation
            is read into memory once. `eval_dataset` may be a mapping of names to such.
        processing_class: the model's fast tokenizer, saved with every checkpoint.
        loss: a name of [`~losses.LOSSES`], or a function with their arguments; `args.loss` when not given.
        group_size: passages a query in training.
        eval_group_size: the same in evaluation; all passages of a row when not given.
        positives, negatives, short_groups: see [`~data.Grouping`].
        peft_config: a `peft.LoraConfig`, to train an adapter and the head instead of all weights.
        kwargs: the Trainer's other arguments.

    Attributes:
        save_dtype: of the weights that are saved; as they are trained when None.

    Raises:
        ValueError, TypeError: an argument breaks its rule.
    """

    # `loss` is a mean over the groups of a batch, so the Trainer divides it by the accumulation steps.
    loss_is_scaled_for_ga = False
    save_dtype: torch.dtype | None = None

    def __init__(
        self,
        model: PreTrainedModel,
        args: CrossEncoderTrainingArguments,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
        loss: str | Loss | None = None,
        group_size: int = 5,
        eval_group_size: int | None = None,
        positives: str = "cycle",
        negatives: str = "sample",
        short_groups: str = "mask",
        peft_config: Any = None,
        data_collator: Any = None,
        compute_metrics: Any = None,
        **kwargs: Any,
    ):
        if processing_class is None:
            raise TypeError("processing_class must be the tokenizer of the model, got None")
        if model.config.num_labels != 1:
            raise ValueError(f"a group has one score a passage, but the model has {model.config.num_labels} labels")
        self.loss = get_loss(args.loss if loss is None else loss)
        grouping = Grouping(
            group_size=group_size, positives=positives, negatives=negatives, short_groups=short_groups, seed=args.seed
        )
        if self.loss is listwise_cross_entropy and group_size == 1:
            raise ValueError("listwise_cross_entropy compares the passages of a group: group_size must be at least 2")
        eval_grouping = Grouping(group_size=eval_group_size, negatives="first", seed=args.seed)
        ensure_pad_token(processing_class, model.config.vocab_size)
        if args.use_liger_kernel:
            register_with_liger(args.device.type)
        self.packing = _use_packing(model, args)
        if self.packing and model.config._attn_implementation == "sdpa":
            model.set_attn_implementation(PACKED_ATTENTION)
        if peft_config is not None:
            model = add_adapter(model, peft_config)
        if data_collator is None:
            prompt_encoder = PromptEncoder(
                processing_class,
                prompt_template=model.config.prompt_template,
                max_length=model.config.rerank_max_length,
            )
            data_collator = GroupCollator(prompt_encoder, packed=self.packing)
        if isinstance(eval_dataset, dict):
            eval_dataset = {name: _eval_groups(rows, eval_grouping) for name, rows in eval_dataset.items()}
        else:
            eval_dataset = _eval_groups(eval_dataset, eval_grouping)
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=_train_groups(train_dataset, grouping),
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=None if compute_metrics is None else _of_scores(compute_metrics),
            **kwargs,
        )
        self._eval_grouping = eval_grouping
        self.model_accepts_loss_kwargs = False
        self.add_callback(EpochCallback(self.train_dataset))
        self.add_callback(HistoryCallback())

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        inputs = dict(inputs)
        labels, teacher_scores = inputs.pop("labels"), inputs.pop("teacher_scores", None)
        mask = labels != IGNORED
        scores = torch.full_like(labels, IGNORED)
        scores[mask] = model(**inputs).logits.squeeze(-1)
        loss = self.loss(scores, labels, mask, teacher_scores)
        if not return_outputs:
            return loss
        # A mean over batches would depend on how groups fall into them; see `evaluation_loop`.
        teachers = [None] * len(labels) if teacher_scores is None else teacher_scores.split(1)
        losses = [
            self.loss(*group) for group in zip(scores.split(1), labels.split(1), mask.split(1), teachers, strict=True)
        ]
        return loss, {"loss": loss, "logits": scores, "group_losses": torch.stack(losses)}

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        output = super().evaluation_loop(dataloader, description, False, ignore_keys, metric_key_prefix)
        scores, losses = output.predictions  # type: ignore[misc]
        metrics = {"loss": float(np.mean(losses)), **group_metrics(scores, output.label_ids)}  # type: ignore[arg-type]
        for name, value in metrics.items():
            output.metrics[f"{metric_key_prefix}_{name}"] = value  # type: ignore[index]
        return output._replace(predictions=scores)

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        if not isinstance(eval_dataset, (str, dict)):
            eval_dataset = _eval_groups(eval_dataset, self._eval_grouping)
        return super().evaluate(eval_dataset, *args, **kwargs)

    def predict(self, test_dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return super().predict(_eval_groups(test_dataset, self._eval_grouping), *args, **kwargs)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Writes the reranker's model card, in place of the Trainer's."""
        if self.is_world_process_zero() and self.args.output_dir is not None:
            self.write_card(self.args.output_dir, self.hub_model_id or self.args.output_dir)

    def write_card(self, directory: str | os.PathLike[str], model_id: str) -> None:
        """Writes the model card of a saved reranker that will be found as `model_id`."""
        write_model_card(directory, self.accelerator.unwrap_model(self.model).config, model_id)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves one ordinary checkpoint, also where the weights are sharded and checkpoints keep them so (FSDP)."""
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is None or "FULL_STATE_DICT" in str(plugin.state_dict_type):
            super().save_model(output_dir, _internal_call)
            return
        sharded = plugin.state_dict_type
        plugin.set_state_dict_type("FULL_STATE_DICT")
        try:
            super().save_model(output_dir, _internal_call)
        finally:
            plugin.set_state_dict_type(sharded)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        config = self.accelerator.unwrap_model(self.model).config
        if self.save_dtype is not None:
            state_dict = self.model.state_dict() if state_dict is None else state_dict  # type: ignore[union-attr]
            state_dict = {name: weight.to(self.save_dtype) for name, weight in state_dict.items()}
            config = copy.deepcopy(config)
            config.dtype = self.save_dtype
        super()._save(output_dir, state_dict)
        directory = output_dir or self.args.output_dir
        if directory is None or not self.args.should_save:
            return
        # An adapter (PEFT) does not save the pooling, the temperature, the template and the length.
        config.save_pretrained(directory)
        if not os.path.exists(os.path.join(directory, "README.md")):
            self.write_card(directory, directory)

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        if self.args.fsdp_plugin_args is not None and state.distributed_type == DistributedType.MULTI_CPU:
            # accelerate knows FSDP on accelerators only; torch's runs on CPUs too, where training is tried out.
            state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
            self.is_fsdp_enabled = True

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = train_dataset if train_dataset is not None else self.train_dataset
        strategy = self.args.train_sampling_strategy
        if not isinstance(dataset, GroupDataset) or strategy == "sequential":
            return super()._get_train_sampler(train_dataset)
        seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
        if strategy == "random":
            return EpochSampler(dataset, seed=seed)
        return EpochSampler(dataset, seed=seed, batch_size=self.args.train_batch_size * self.args.world_size)

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        # The Trainer's own would reorder the groups when training is grouped by length.
        return None if isinstance(eval_dataset, IterableDataset) else SequentialSampler(eval_dataset)

    def _set_signature_columns_if_needed(self) -> None:
        # The collator reads text, which no argument of the model's forward is named after.
        self._signature_columns = GROUP_KEYS  # type: ignore[assignment]


def _use_packing(model: PreTrainedModel, args: CrossEncoderTrainingArguments) -> bool:
    """Whether to pack; what cannot be packed is trained padded, unless packing was asked for."""
    attention = model.config._attn_implementation
    reasons = {
        f"attn_implementation={attention!r} reads no packed input": attention not in ("sdpa", *PACKED_IMPLEMENTATIONS),
        "neftune_noise_alpha scales its noise by the length of a padded batch": args.neftune_noise_alpha is not None,
        "torch_compile would compile anew for each batch": args.torch_compile,
        "several GPUs in one process split padded batches only; start one process a GPU": args.n_gpu > 1,
    }
    hindrances = [reason for reason, holds in reasons.items() if holds]
    if args.packing and hindrances:
        raise ValueError(f"packing=True is not possible: {'; '.join(hindrances)}")
    return not hindrances if args.packing is None else args.packing


def _train_groups(dataset: Any, grouping: Grouping) -> Any:
    if dataset is None or isinstance(dataset, (GroupDataset, GroupStream)):
        return dataset
    return GroupDataset([(dataset, 1.0)], grouping) if hasattr(dataset, "__len__") else GroupStream(dataset, grouping)


def _eval_groups(dataset: Any, grouping: Grouping) -> Any:
    if dataset is None or isinstance(dataset, GroupDataset):
        return dataset
    if isinstance(dataset, GroupStream):
        return list(dataset)
    return GroupDataset([(dataset if hasattr(dataset, "__len__") else list(dataset), 1.0)], grouping)


def _of_scores(compute_metrics: Any) -> Any:
    """The caller's function sees scores, without the losses beside them."""

    def compute(prediction: EvalPrediction, **kwargs: Any) -> dict[str, float]:
        return compute_metrics(EvalPrediction(prediction.predictions[0], prediction.label_ids), **kwargs)

    return compute
