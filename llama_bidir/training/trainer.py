"""The Hugging Face Trainer for groups of passages."""

import copy
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.utils.data import SequentialSampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer
from transformers.trainer_utils import EvalLoopOutput

from ..checkpoints.adapters import complete_adapter
from ..checkpoints.chat_template import find_prompt_template, save_tokenizer
from ..checkpoints.files import replaced_by_checkpoint
from ..checkpoints.model_card import write_model_card
from ..data import FixedGroups, Group, GroupCollator, GroupDataset, Grouping, GroupStream
from ..fields_llama_bidir import check_prompt_template
from ..losses import IGNORED, Loss, check_group_size, get_loss, needs_teacher
from ..modeling_llama_bidir import LlamaBidirectionalForSequenceClassification
from ..prompts import PromptEncoder, ensure_pad_token
from ..scoring.packing import PACKED_ATTENTION
from ..utils.outputs import whole_folder
from .arguments import CrossEncoderTrainingArguments, check_temperatures, check_trainer_arguments, use_packing
from .groups import check_instructions, evaluation_groups, train_groups
from .history import HistoryCallback
from .liger import register_with_liger
from .lora import add_adapter, check_head
from .metrics import concatenate, group_metrics
from .pieces import Pieces, count_pairs
from .reranking import RerankSet, check_names
from .sampling import EpochCallback, EpochSampler
from .steps import StepCollator, StepGroups, Steps, StepSampler, StepStream, without_groups

logger = logging.getLogger(__name__)

# The fields that the collator reads. The Trainer drops all fields that it does not know.
GROUP_KEYS = list(Group.__annotations__)
# What a batch holds beside the model's inputs.
TARGETS = ("labels", "teacher_scores")


class CrossEncoderTrainer(Trainer):
    """
    Trains a bidirectional Llama reranker on groups: a query, and some of its positives and negatives.

    Batches are packed (laid end to end, without padding) unless that is impossible or `args.packing` is False.
    Evaluation reports `loss`, `accuracy@1`, `mrr@10` and `ndcg@10` over whole groups. Their values do not depend on the
    number of processes. Each log is appended to `history.jsonl` in the output folder, and `training.png` is drawn when
    training ends.

    Args:
        model: a [`LlamaBidirectionalForSequenceClassification`] with one label. Its configuration says how pairs are
            rendered and truncated.
        args: [`CrossEncoderTrainingArguments`], whose batch sizes count groups.
        train_dataset, eval_dataset: rows with `query`, `pos_doc` and `neg_doc` (see [`~data.parse_row`]) as a sequence
            or a stream, or ready groups (see [`~data.GroupDataset`]). A stream for evaluation is read into memory once.
            `eval_dataset` may also be a mapping of names to datasets.
        processing_class: the model's fast tokenizer, saved with every checkpoint.
        loss: a name in [`~losses.LOSSES`], a mapping from such names to weights, or a function with the arguments of
            these losses. The default is `args.loss`.
        group_size: passages per query in training.
        eval_group_size: the same in evaluation, at least 2. None takes all passages of a row. Every row for evaluation
            needs a negative.
        positives, negatives, short_groups: see [`~data.Grouping`].
        prompt_template: replaces the model's, as in [`CrossEncoder`]. By default, a model with the default template
            gets the template that NeMo AutoModel has saved with the tokenizer, if there is one.
        rerank_sets: collections to rerank at each evaluation of `eval_dataset`, or alone if that is None (see
            [`~training.reranking`]). Each adds `eval_NAME_ndcg@10` and `eval_NAME_mrr@10`, and the same of the
            first-stage run as `eval_NAME_run_ndcg@10` and `eval_NAME_run_mrr@10`.
        peft_config: a `peft.LoraConfig`, to train an adapter and the head instead of all weights.
        kwargs: further arguments of the Trainer.

    Attributes:
        save_dtype: the dtype of the saved weights. None saves them as they are trained.
        saved_files: the names in the folder that this process saved last.

    Raises:
        ValueError: an argument breaks its rule.
        TypeError: an argument has the wrong type, or is not supported.
    """

    # `loss` is a mean over the groups of a batch, so the Trainer must divide it by the accumulation steps.
    loss_is_scaled_for_ga = False
    save_dtype: torch.dtype | None = None
    saved_files: list[str] = []
    args: CrossEncoderTrainingArguments

    def __init__(
        self,
        model: PreTrainedModel,
        args: CrossEncoderTrainingArguments,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
        loss: str | Mapping[str, float] | Loss | None = None,
        group_size: int = 5,
        eval_group_size: int | None = None,
        positives: str = "cycle",
        negatives: str = "sample",
        short_groups: str = "mask",
        prompt_template: str | None = None,
        rerank_sets: Sequence[RerankSet] = (),
        peft_config: Any = None,
        data_collator: Any = None,
        **kwargs: Any,
    ):
        if not isinstance(args, CrossEncoderTrainingArguments):
            raise TypeError(f"args must be CrossEncoderTrainingArguments, got {type(args).__name__}")
        if processing_class is None:
            raise TypeError("processing_class must be the tokenizer of the model, got None")
        check_trainer_arguments(args, kwargs)
        if model.config.num_labels != 1:
            raise ValueError(f"a group has one score per passage, but the model has {model.config.num_labels} labels")
        self.loss = get_loss(args.loss if loss is None else loss)
        grouping = Grouping(
            group_size=group_size,
            positives=positives,
            negatives=negatives,
            short_groups=short_groups,
            seed=args.draw_seed,
        )
        if isinstance(train_dataset, (GroupDataset, GroupStream)):
            grouping = train_dataset.grouping
        check_group_size(self.loss, grouping.group_size)
        check_temperatures(args.loss_temperature, model.config.temperature)
        eval_grouping = Grouping.for_evaluation(eval_group_size)
        check_names(rerank_sets, eval_dataset)
        ensure_pad_token(processing_class, model.config.vocab_size)
        if prompt_template is None:
            prompt_template = find_prompt_template(processing_class, model.config)  # type: ignore[arg-type]
        model.config.prompt_template = check_prompt_template(prompt_template)
        if model.config.calibration is not None:
            logger.warning("training changes the scores, so the reranker loses its calibration: calibrate it again")
            model.config.calibration = None
        if args.use_liger_kernel:
            register_with_liger(args.device.type)
        self.packing = use_packing(model, args)
        if self.packing and model.config._attn_implementation == "sdpa":
            model.set_attn_implementation(PACKED_ATTENTION)
        if peft_config is not None:
            model = add_adapter(model, peft_config)
        elif hasattr(model, "peft_config"):
            check_head(model)
        if data_collator is None:
            prompt_encoder = PromptEncoder.from_config(processing_class, model.config)  # type: ignore[arg-type]
            data_collator = GroupCollator(prompt_encoder, packed=self.packing, needs_teacher=needs_teacher(self.loss))
        groups = train_groups(train_dataset, grouping)
        eval_groups = evaluation_groups({} if eval_dataset is None and rerank_sets else eval_dataset, eval_grouping)
        check_instructions(groups, model.config.prompt_template)
        check_instructions(eval_groups, model.config.prompt_template)
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=groups,
            eval_dataset=eval_groups,
            processing_class=processing_class,
            **kwargs,
        )
        self._eval_grouping = eval_grouping
        self._evaluated: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self._pieces: Pieces | None = None
        self._rerank_sets = list(rerank_sets)
        self._rerank_loaders: dict[str, Any] = {}
        self._has_to_rerank = False
        self._scores_only = False
        self.model_accepts_loss_kwargs = False
        if isinstance(self.train_dataset, GroupDataset):
            self.add_callback(EpochCallback(self.train_dataset))
        self.add_callback(HistoryCallback())

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        # DeepSpeed and FSDP pass them in half precision.
        labels, teacher_scores = inputs["labels"].float(), inputs["teacher_scores"].float()
        scores = self._scores(model, inputs)
        if len(labels) == 0:  # a process without a group takes part in the step
            return 0.0 * scores.sum()
        mask = labels != IGNORED
        temperature = self.args.loss_temperature or 1.0
        compared = (scores / temperature, labels, mask, teacher_scores / temperature)
        loss = self.loss(*compared)
        if num_items_in_batch is not None:
            # The Trainer averages over processes and batches, but these differ in size at the end of an epoch.
            batches = self.accelerator.num_processes * self.current_gradient_accumulation_steps
            loss = loss * (len(labels) * batches / num_items_in_batch)
        if not return_outputs:
            return loss
        groups = zip(*(tensor.split(1) for tensor in compared), strict=True)
        return loss, {"loss": loss, "logits": scores, "group_losses": torch.stack([self.loss(*one) for one in groups])}

    def _scores(self, model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        """
        Returns the scores of a batch, of the shape of its labels, and -100 where there is no passage. A batch without
        groups gives the scores of its inputs, which do not count.
        """
        labels = inputs["labels"].float()
        logits = self._logits(model, {name: inputs[name] for name in inputs if name not in TARGETS})
        if len(labels) == 0:
            return logits
        scores = torch.full_like(labels, IGNORED)
        scores[labels != IGNORED] = logits
        return scores

    def _logits(self, model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        """Returns the logits of all pairs, of shape `(num_pairs,)`, in pieces if one forward pass may not take all."""
        num_pieces = self._num_pieces(inputs)
        if num_pieces == 1:
            return model(**inputs).logits.squeeze(-1).float()
        pieces = Pieces(model, inputs, num_pieces, self.compute_loss_context_manager)
        scores = pieces.scores()
        if torch.is_grad_enabled():
            self._pieces = pieces
        return scores

    def _num_pieces(self, inputs: dict[str, Any]) -> int:
        """The same number on all processes, because sharded weights are gathered in each forward pass."""
        if self.args.max_pairs_per_forward is None:
            return 1
        num_pieces = -(-count_pairs(inputs) // self.args.max_pairs_per_forward)
        if self.accelerator.num_processes == 1:
            return num_pieces
        return int(self.accelerator.gather(torch.tensor(num_pieces, device=self.args.device)).max())

    def training_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        self._pieces = None
        loss = super().training_step(model, inputs, num_items_in_batch)  # in pieces, it stops at the scores
        if self._pieces is not None:
            # FSDP would hold unsharded gradients until it may reduce them.
            no_sync = nullcontext if self.is_fsdp_enabled else partial(self.accelerator.no_sync, model)
            self._pieces.backward(no_sync)
            self._pieces = None
        return loss

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor | int | None]:
        """Returns the batches of one process for a step, and the number of groups in the step over all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        num_groups: torch.Tensor | int = sum(len(batch["labels"]) for batch in batches)
        if self.accelerator.num_processes > 1:
            num_groups = self.accelerator.gather(torch.tensor(num_groups, device=device)).sum()
        # A stream may end within a step. The Trainer would then take no step, and add its gradients to the next step.
        batches += [without_groups(batches[-1])] * (num_batches - len(batches))
        return batches, num_groups

    def prediction_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        inputs = self._prepare_inputs(inputs)
        labels = inputs["labels"].float()
        with torch.no_grad(), self.compute_loss_context_manager():
            if self._scores_only:
                scores = self._scores(model, inputs)
                loss, group_losses = scores.new_zeros(()), scores.new_zeros(len(labels))
            else:
                loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
                scores, group_losses = outputs["logits"], outputs["group_losses"]
        self._evaluated.append(
            tuple(
                self.accelerator.gather_for_metrics(
                    self.accelerator.pad_across_processes(tensor, dim=1, pad_index=int(IGNORED))
                ).cpu()
                for tensor in (group_losses[:, None], scores, labels)
            )
        )
        return (loss, None, None) if prediction_loss_only else (loss, scores, labels)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        self._evaluated = []
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        losses, scores, labels = (concatenate(tensors) for tensors in zip(*self._evaluated, strict=True))
        # The Trainer's own loss is a mean over batches, which depends on the size of a batch.
        metrics = {"loss": float(losses.mean()), **group_metrics(scores, labels)}
        prefixed = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        # Among the others, so that callbacks see them in the same evaluation.
        return output._replace(metrics={**(output.metrics or {}), **prefixed, **self._rerank()})

    def _rerank(self) -> dict[str, float]:
        """Returns the measures of the sets to rerank, once per evaluation."""
        metrics: dict[str, float] = {}
        sets, self._has_to_rerank = self._rerank_sets if self._has_to_rerank else [], False
        for each in sets:
            if each.name not in self._rerank_loaders:
                with self._whole_evaluation():  # one query at a time, because it has many candidates
                    self._rerank_loaders[each.name] = self._get_dataloader(
                        FixedGroups(each.groups), "Evaluation", 1, self._get_eval_sampler
                    )
            dataloader = self._rerank_loaders[each.name]
            self._evaluated, self._scores_only = [], True
            try:
                super().evaluation_loop(dataloader, f"Reranking of {each.name}", prediction_loss_only=True)
            finally:
                self._scores_only = False
            _, scores, labels = (concatenate(tensors) for tensors in zip(*self._evaluated, strict=True))
            after = each.measure([row[mask] for row, mask in zip(scores, labels != IGNORED, strict=True)])
            for stage, measures in (("", after), ("run_", each.first_stage)):
                metrics |= {f"eval_{each.name}_{stage}{name}": value for name, value in measures.items()}
        return metrics

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        with self._whole_evaluation():
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        with self._whole_evaluation():
            return super().get_test_dataloader(test_dataset)

    @contextmanager
    def _whole_evaluation(self) -> Iterator[None]:
        """Keeps the last batch in evaluation, where `dataloader_drop_last` would drop it too."""
        drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            yield
        finally:
            self.args.dataloader_drop_last = drop_last

    def _run_epoch(self, *args: Any, **kwargs: Any) -> Any:
        # Resumed within an epoch after its last step, the Trainer takes one step more, because it looks for the end of
        # training only after a step. This holds from transformers 5.6 (the floor) to 5.24 (the newest tried), and no
        # issue upstream names it. test_the_stock_trainer_takes_one_step_more fails when this method can go.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return None
        return super()._run_epoch(*args, **kwargs)

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        if not isinstance(eval_dataset, str):  # the name of one of the datasets
            eval_dataset = evaluation_groups(eval_dataset, self._eval_grouping)
        self._has_to_rerank = self._has_to_rerank or eval_dataset is None
        metrics: dict[str, float] = super().evaluate(eval_dataset, *args, **kwargs)
        if self._has_to_rerank and (reranked := self._rerank()):  # there are no groups to evaluate
            self.log(reranked)
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, reranked)
            metrics |= reranked
        return metrics

    def predict(self, test_dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return super().predict(evaluation_groups(test_dataset, self._eval_grouping), *args, **kwargs)

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """
        Writes the reranker's model card in place of the Trainer's, with the language, the licence, the tags, the base
        model and the training data (`dataset_tags`) that are given. The other arguments of the Trainer are not used.
        """
        given = {
            "language": language,
            "license": license,
            "tags": [tags] if isinstance(tags, str) else tags,
            "base_model": finetuned_from,
            "datasets": dataset_tags,
        }
        if self.is_world_process_zero() and self.args.output_dir is not None:
            write_model_card(
                self.args.output_dir,
                self.accelerator.unwrap_model(self.model).config,
                self.hub_model_id or model_name or self.args.output_dir,
                metadata={name: value for name, value in given.items() if value is not None},
            )

    def write_card(self, directory: str | os.PathLike[str], model_id: str) -> None:
        """Writes the model card of a saved reranker, which shows how to load `model_id`."""
        write_model_card(directory, self.accelerator.unwrap_model(self.model).config, model_id)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves one plain checkpoint, even if FSDP shards the weights and keeps them sharded in checkpoints."""
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
        model = self.accelerator.unwrap_model(self.model)
        config = copy.deepcopy(model.config)
        config.architectures = [LlamaBidirectionalForSequenceClassification.__name__]  # an adapter keeps its base's
        if self.save_dtype is not None:
            state_dict = self.model.state_dict() if state_dict is None else state_dict  # type: ignore[union-attr]
            state_dict = {name: weight.to(self.save_dtype) for name, weight in state_dict.items()}
            config.dtype = self.save_dtype
        directory = output_dir or self.args.output_dir
        if directory is None or not self.args.should_save:
            super()._save(output_dir, state_dict)
            return
        has_card = os.path.exists(os.path.join(directory, "README.md"))
        replaces = replaced_by_checkpoint(directory)
        # The other processes of a run write their own files into a checkpoint.
        with whole_folder(directory, overwrite=True, replaces=replaces, is_shared=self.args.world_size > 1) as folder:
            super()._save(os.fspath(folder), state_dict)
            complete_adapter(model, folder)
            config.save_pretrained(folder)  # PEFT saves no configuration of the model with an adapter
            save_tokenizer(self.processing_class, folder, config)  # type: ignore[arg-type]
            if not has_card:
                self.write_card(folder, directory)
            self.saved_files = sorted(path.name for path in folder.iterdir())

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # The first process now writes trainer_state.json, which says that the checkpoint is complete.
        self.accelerator.wait_for_everyone()

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is None and self.args.fsdp and self.args.world_size > 1:
            logger.warning("fsdp shards weights on accelerators only: here each process holds all of them")
        if plugin is not None and plugin.fsdp_version == 2 and plugin.mixed_precision_policy is not None:
            # The policy's own output_dtype rounds logits, which are float32 whatever dtype the body computes in.
            plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, output_dtype=torch.float32)

    def _get_dataloader(
        self,
        dataset: Any,
        description: str,
        batch_size: int,
        sampler_fn: Any = None,
        is_training: bool = False,
        dataloader_key: str | None = None,
    ) -> Any:
        if not is_training:
            return super()._get_dataloader(dataset, description, batch_size, sampler_fn, dataloader_key=dataloader_key)
        steps = Steps(
            batch_size=batch_size,
            processes=self.args.world_size,
            accumulation=self.args.gradient_accumulation_steps,
            drop_last=self.args.dataloader_drop_last,
        )
        collator, self.data_collator = self.data_collator, StepCollator(self.data_collator)
        try:
            return super()._get_dataloader(
                StepStream(dataset, steps) if isinstance(dataset, GroupStream) else StepGroups(dataset),
                description,
                batch_size,
                lambda _: StepSampler(sampler_fn(dataset), steps),
                is_training,
                dataloader_key,
            )
        finally:
            self.data_collator = collator

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = train_dataset if train_dataset is not None else self.train_dataset
        strategy = self.args.train_sampling_strategy
        if not isinstance(dataset, GroupDataset) or strategy == "sequential":
            return super()._get_train_sampler(train_dataset)
        groups_per_step = self._train_batch_size * self.args.world_size * self.args.gradient_accumulation_steps
        batch_size = None if strategy == "random" else groups_per_step
        return EpochSampler(dataset, seed=self.args.draw_seed, batch_size=batch_size)

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        # The Trainer's own sampler reorders the groups when training is grouped by length.
        return SequentialSampler(eval_dataset)

    def _set_signature_columns_if_needed(self) -> None:
        # The Trainer keeps the arguments of the model's forward, but the collator reads text.
        self._signature_columns = GROUP_KEYS  # type: ignore[assignment]
