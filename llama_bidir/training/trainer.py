"""The Hugging Face Trainer for groups of passages."""

import os
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

from ..data import GroupCollator
from ..losses import IGNORED, Loss, get_loss, listwise_cross_entropy
from ..model_card import write_model_card
from ..prompts import PromptEncoder, ensure_pad_token
from .arguments import CrossEncoderTrainingArguments

ROW_COLUMNS = ["query", "question", "pos_doc", "neg_doc"]


class CrossEncoderTrainer(Trainer):
    """
    Trains a bidirectional Llama reranker on groups: a query, its positive and its negatives.

    Args:
        model: a [`LlamaBidirectionalForSequenceClassification`] with one label; its configuration says how pairs are
            rendered and truncated.
        args: [`CrossEncoderTrainingArguments`]; batch sizes count groups.
        train_dataset, eval_dataset: rows with `query`, `pos_doc` and `neg_doc` (see [`parse_row`]).
        processing_class: the model's fast tokenizer, saved with every checkpoint.
        loss: a name of [`losses.LOSSES`], or a function of scores and labels of shape `(groups, group_size)`.
        group_size: passages a query.
        kwargs: the Trainer's other arguments.
    """

    # `loss` is a mean over the groups of a batch, so the Trainer divides it by the accumulation steps.
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: PreTrainedModel,
        args: CrossEncoderTrainingArguments,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
        loss: str | Loss = "listwise_cross_entropy",
        group_size: int = 5,
        data_collator: Any = None,
        **kwargs: Any,
    ):
        if processing_class is None:
            raise TypeError("processing_class must be the tokenizer of the model, got None")
        if model.config.num_labels != 1:
            raise ValueError(f"a group has one score a passage, but the model has {model.config.num_labels} labels")
        if group_size < 1:
            raise ValueError(f"group_size must be at least 1 (passages a query), got {group_size!r}")
        self.loss = get_loss(loss)
        if self.loss is listwise_cross_entropy and group_size == 1:
            raise ValueError("listwise_cross_entropy compares the passages of a group: group_size must be at least 2")
        ensure_pad_token(processing_class, model.config.vocab_size)
        if data_collator is None:
            prompt_encoder = PromptEncoder(
                processing_class,
                prompt_template=model.config.prompt_template,
                max_length=model.config.rerank_max_length,
            )
            data_collator = GroupCollator(prompt_encoder, group_size=group_size)
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        self.model_accepts_loss_kwargs = False

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        labels = inputs["labels"]
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        scores = torch.full_like(labels, IGNORED)
        scores[labels != IGNORED] = logits.squeeze(-1)
        loss = self.loss(scores, labels)
        return (loss, {"loss": loss, "logits": scores}) if return_outputs else loss

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Writes the reranker's model card, in place of the Trainer's."""
        if self.is_world_process_zero() and self.args.output_dir is not None:
            model_id = self.hub_model_id or self.args.output_dir
            self._write_card(self.args.output_dir, model_id)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        directory = output_dir or self.args.output_dir
        if directory is None:
            return
        # An adapter (PEFT) does not save the pooling, the temperature, the template and the length.
        self.accelerator.unwrap_model(self.model).config.save_pretrained(directory)
        if not os.path.exists(os.path.join(directory, "README.md")):
            self._write_card(directory, directory)

    def _write_card(self, directory: str, model_id: str) -> None:
        write_model_card(directory, self.accelerator.unwrap_model(self.model).config, model_id)

    def _set_signature_columns_if_needed(self) -> None:
        # The collator reads text, which no argument of the model's forward is named after.
        self._signature_columns = ROW_COLUMNS  # type: ignore[assignment]
