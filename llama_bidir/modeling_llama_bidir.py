# Copyright 2026 The llama-bidir authors. Licensed under the Apache License, Version 2.0.
"""Llama with bidirectional attention, and a linear score head on its pooled hidden states."""

import logging
from typing import Any

import torch
from torch import nn
from transformers import LlamaModel
from transformers.masking_utils import create_bidirectional_mask, packed_sequence_mask_function
from transformers.modeling_outputs import BaseModelOutputWithPast, SequenceClassifierOutput
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.utils.generic import can_return_tuple

from .configuration_llama_bidir import LlamaBidirectionalConfig
from .fields_llama_bidir import ROPE_OF_A_BATCH, check_length, check_pooling
from .pretrained_llama_bidir import LlamaBidirectionalPreTrainedModel

logger = logging.getLogger(__name__)


def pool(hidden_states: torch.Tensor, attention_mask: torch.Tensor, pooling: str) -> torch.Tensor:
    """
    Pools each sequence into one vector: the mean of its tokens (`"avg"`), its first token (`"cls"`) or its last token
    (`"last"`).

    Args:
        hidden_states (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`): any floating dtype.
        attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`): nonzero for tokens, 0 for padding.
        pooling (`str`): `"avg"`, `"cls"` or `"last"`.

    Returns:
        `torch.FloatTensor` of shape `(batch_size, hidden_size)`, computed in float32. A row without tokens is NaN.
    """
    selected = attention_mask.bool()
    if check_pooling(pooling) == "cls":
        selected = selected & (selected.cumsum(dim=1) == 1)
    elif pooling == "last":
        selected = selected & (selected.flip(1).cumsum(dim=1).flip(1) == 1)
    selected = selected.unsqueeze(-1)
    return hidden_states.float().masked_fill(~selected, 0.0).sum(dim=1) / selected.sum(dim=1)


def pool_packed(hidden_states: torch.Tensor, cu_seq_lens: torch.Tensor, pooling: str) -> torch.Tensor:
    """
    Pools like [`pool`], for sequences that lie end to end in one stream of tokens.

    Args:
        hidden_states (`torch.Tensor` of shape `(total_tokens, hidden_size)`): any floating dtype.
        cu_seq_lens (`torch.Tensor` of shape `(num_sequences + 1,)`): the start of each sequence, then `total_tokens`.
        pooling (`str`): `"avg"`, `"cls"` or `"last"`.

    Returns:
        `torch.FloatTensor` of shape `(num_sequences, hidden_size)`, computed in float32.
    """
    if check_pooling(pooling) == "cls":
        return hidden_states[cu_seq_lens[:-1]].float()
    if pooling == "last":
        return hidden_states[cu_seq_lens[1:] - 1].float()
    # `check_packing` has checked the lengths. Another check here would wait for the GPU.
    return torch.segment_reduce(hidden_states.float(), "mean", lengths=cu_seq_lens.diff(), axis=0, unsafe=True)


def check_token_ids(input_ids: torch.Tensor, vocab_size: int) -> None:
    """Raises ValueError unless every id has an embedding. Does not check ids on a GPU, which would wait for it."""
    if input_ids.device.type != "cpu" or torch.compiler.is_compiling() or not input_ids.numel():
        return
    smallest, largest = (int(index) for index in input_ids.aminmax())
    if smallest < 0 or largest >= vocab_size:
        raise ValueError(
            f"input_ids must be from 0 to {vocab_size - 1}, because the model has {vocab_size} embeddings, got "
            f"{smallest if smallest < 0 else largest}: use the tokenizer that belongs to the model, or add "
            "embeddings with resize_token_embeddings"
        )


def check_packing(cu_seq_lens: torch.Tensor, max_length: int | None, total_tokens: int) -> None:
    """Raises ValueError unless the lengths add up to the stream. Does not read lengths on a GPU, which would wait."""
    if cu_seq_lens.device.type != "cpu" or torch.compiler.is_compiling():
        return
    shortest, longest = (int(length) for length in cu_seq_lens.diff().aminmax())
    if shortest < 0 or cu_seq_lens[0] != 0 or cu_seq_lens[-1] != total_tokens or longest > (max_length or longest):
        raise ValueError(
            f"cu_seq_lens_q must go from 0 to the {total_tokens} tokens of the input in steps of at most max_length_q "
            f"({max_length}), got {cu_seq_lens.tolist()}"
        )


def packed_positions(cu_seq_lens: torch.Tensor, total_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The number of each token's sequence, and its position in it: two tensors of shape `(1, total_tokens)`."""
    offsets = torch.arange(total_tokens, device=cu_seq_lens.device)[None]
    sequence_ids = torch.bucketize(offsets, cu_seq_lens[1:], right=True)
    return sequence_ids, offsets - cu_seq_lens[sequence_ids]


def sequence_classification_loss(
    logits: torch.Tensor, labels: torch.Tensor, problem_type: str | None = None
) -> torch.Tensor:
    """
    Computes the loss that transformers' `problem_type` names.

    Args:
        logits (`torch.FloatTensor` of shape `(batch_size, num_labels)`): the outputs of the score head.
        labels (`torch.Tensor` of shape `(batch_size,)` or `(batch_size, num_labels)`): class ids or targets.
        problem_type (`str`, *optional*): `"regression"` (mean squared error), `"single_label_classification"` (cross
            entropy) or `"multi_label_classification"` (binary cross entropy). `None` chooses regression for one label.
            For several labels it chooses the single-label loss if `labels` are integers, else the multi-label loss.

    Returns:
        `torch.FloatTensor`, a scalar: the mean over the batch.

    Raises:
        ValueError: `problem_type` has another value.
    """
    labels = labels.to(logits.device)
    num_labels = logits.shape[-1]
    if problem_type is None and num_labels == 1:
        problem_type = "regression"
    elif problem_type is None:
        problem_type = "multi_label_classification" if labels.is_floating_point() else "single_label_classification"
    if problem_type == "single_label_classification":
        return nn.functional.cross_entropy(logits, labels.view(-1))
    labels = labels.view_as(logits).to(logits.dtype)
    if problem_type == "multi_label_classification":
        return nn.functional.binary_cross_entropy_with_logits(logits, labels)
    if problem_type == "regression":
        return nn.functional.mse_loss(logits, labels)
    raise ValueError(
        "problem_type must be None, 'regression', 'single_label_classification' or 'multi_label_classification', got "
        f"{problem_type!r}"
    )


class Float32Linear(nn.Linear):
    """A linear layer that computes in float32, whatever the dtype of its weight and its input."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        # Not a matrix product: autocast would change its dtype, and its rounding depends on the size of the batch.
        return (input.float().unsqueeze(-2) * self.weight.float()).sum(dim=-1)


class LlamaBidirectionalModel(LlamaBidirectionalPreTrainedModel, LlamaModel):
    """
    Llama without the causal mask: each token attends to every token of its sequence.

    With `config.is_causal=False`, transformers builds a bidirectional mask; with `True` it keeps the causal one.
    """

    _keys_to_ignore_on_load_unexpected = [r"^lm_head\.", r"^score\."]

    def __init__(self, config: LlamaBidirectionalConfig):
        try:
            LlamaRotaryEmbedding(config)  # built before the layers, so that an error names the field
        except Exception as error:
            raise ValueError(
                f"rope_parameters {config.rope_parameters} cannot be used: {type(error).__name__}: {error}"
            ) from None
        super().__init__(config)
        for layer in self.layers:
            layer.self_attn.is_causal = config.is_causal  # type: ignore[union-attr]

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        **kwargs: Any,
    ) -> tuple[Any, ...] | BaseModelOutputWithPast:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Token ids. Give either these or `inputs_embeds`.
            attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
                Nonzero for tokens, 0 for padding, which may be on either side. `None` means no padding.
            position_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                By default they count from the first token of each sequence.
            inputs_embeds (`torch.FloatTensor` of shape `(batch_size, sequence_length, hidden_size)`, *optional*):
                Embeddings in place of `input_ids`.
            cu_seq_lens_q, cu_seq_lens_k (`torch.IntTensor` of shape `(num_sequences + 1,)`, *optional*):
                Packed input: `input_ids` is one row of sequences that lie end to end. These are the start of each
                sequence, then the total number of tokens.
            max_length_q, max_length_k (`int`, *optional*):
                The length of the longest packed sequence, in tokens.

        Returns:
            [`BaseModelOutputWithPast`] with `last_hidden_state` of shape `(batch_size, sequence_length, hidden_size)`.

        Raises:
            ValueError: both or none of `input_ids` and `inputs_embeds`, or an inconsistent packed input.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds must be given")
        if inputs_embeds is None:
            check_token_ids(input_ids, self.config.vocab_size)  # type: ignore[arg-type]
            inputs_embeds = self.embed_tokens(input_ids)
        cu_seq_lens = kwargs.get("cu_seq_lens_q")
        if cu_seq_lens is not None:
            if attention_mask is not None or inputs_embeds.shape[0] != 1:
                raise ValueError(
                    "packed input (cu_seq_lens_q) is one row of tokens without an attention_mask, got "
                    f"{inputs_embeds.shape[0]} rows and "
                    f"attention_mask={'given' if attention_mask is not None else None}"
                )
            check_packing(cu_seq_lens, kwargs.get("max_length_q"), inputs_embeds.shape[1])
            sequence_ids, positions = packed_positions(cu_seq_lens, inputs_embeds.shape[1])
            position_ids = positions if position_ids is None else position_ids
            if not self.config.is_causal:
                attention_mask = create_bidirectional_mask(
                    config=self.config,
                    inputs_embeds=inputs_embeds,
                    attention_mask=None,
                    and_mask_function=packed_sequence_mask_function(sequence_ids),
                )
        elif position_ids is None:
            if attention_mask is not None:
                position_ids = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
        elif attention_mask is None and not torch.compiler.is_compiling() and (position_ids.diff() < 0).any():
            raise ValueError(
                "position_ids restart, so the input is packed: pass cu_seq_lens_q and cu_seq_lens_k too, as "
                "DataCollatorWithFlattening(return_flash_attn_kwargs=True) does"
            )
        if self.rotary_emb.rope_type in ROPE_OF_A_BATCH and not torch.compiler.is_compiling():
            last = inputs_embeds.shape[1] - 1 if position_ids is None else position_ids.max()
            check_length(self.config, int(last) + 1)
        # Only generation needs a key-value cache.
        kwargs["use_cache"] = False
        return super().forward(
            attention_mask=attention_mask, position_ids=position_ids, inputs_embeds=inputs_embeds, **kwargs
        )


class LlamaBidirectionalForSequenceClassification(LlamaBidirectionalPreTrainedModel):
    """A bidirectional Llama with a linear head on its pooled hidden states: logits = score(pooled) / temperature."""

    # The loss is a mean over the batch, so the Trainer must divide it by the number of accumulation steps.
    accepts_loss_kwargs = False
    _keys_to_ignore_on_load_missing = [r"^score\.weight$"]
    _has_score_head = True

    def __init__(self, config: LlamaBidirectionalConfig):
        super().__init__(config)
        self.model = LlamaBidirectionalModel(config)
        self.score = Float32Linear(config.hidden_size, config.num_labels, bias=False)  # type: ignore[arg-type]
        self.post_init()

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        r"""
        Takes the arguments of [`LlamaBidirectionalModel.forward`] and `labels`.

        Args:
            labels (`torch.Tensor` of shape `(batch_size,)` or `(batch_size, num_labels)`, *optional*):
                Targets for [`sequence_classification_loss`], whose `problem_type` is that of the config.

        Returns:
            [`SequenceClassifierOutput`] with float32 `logits` of shape `(batch_size, num_labels)`, or
            `(num_sequences, num_labels)` for packed input.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        if (cu_seq_lens := kwargs.get("cu_seq_lens_q")) is not None:
            pooled = pool_packed(hidden_states[0], cu_seq_lens.to(hidden_states.device), self.config.pooling)
        else:
            if attention_mask is None:
                attention_mask = hidden_states.new_ones(hidden_states.shape[:2], dtype=torch.bool)
            pooled = pool(hidden_states, attention_mask.to(hidden_states.device), self.config.pooling)
        logits = self.score(pooled) / self.config.temperature
        loss = None if labels is None else sequence_classification_loss(logits, labels, self.config.problem_type)
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )

    @classmethod
    def from_pretrained(
        cls, *args: Any, head_follows: bool = False, output_loading_info: bool = False, **kwargs: Any
    ) -> Any:
        r"""
        Loads a checkpoint, as [`LlamaBidirectionalPreTrainedModel.from_pretrained`] does. Warns if the checkpoint has
        no head.

        Args:
            head_follows (`bool`, *optional*, defaults to `False`):
                The caller loads the weights of the head next, so there is no warning about a new head.
        """
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        if model._score_is_new and not head_follows:
            others = ", ".join(sorted(info["unexpected_keys"])[:3])
            logger.warning(
                f"score.weight is new: {model.config.name_or_path or 'the checkpoint'} has no score head"
                f"{f' that this model could use ({others} was left out)' if others else ''}, so one was "
                "initialized at random. It needs training before its scores mean anything"
            )
        return (model, info) if output_loading_info else model

    def _init_weights(self, module: nn.Module) -> None:
        # transformers marks the parameters that it has loaded, then initializes the others.
        if module is self.score and not getattr(module.weight, "_is_hf_initialized", False):
            self._score_is_new = True
        super()._init_weights(module)


__all__ = [
    "LlamaBidirectionalForSequenceClassification",
    "LlamaBidirectionalModel",
    "LlamaBidirectionalPreTrainedModel",
]
