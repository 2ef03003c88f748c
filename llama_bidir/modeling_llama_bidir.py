# Copyright 2026 The llama-bidir authors. Licensed under the Apache License, Version 2.0.
"""Llama with bidirectional attention, and a linear score head on its pooled hidden states."""

import logging
import os
import zipfile
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import LlamaModel
from transformers.masking_utils import create_bidirectional_mask, packed_sequence_mask_function
from transformers.modeling_outputs import BaseModelOutputWithPast, SequenceClassifierOutput
from transformers.models.llama.modeling_llama import LlamaPreTrainedModel, LlamaRotaryEmbedding
from transformers.utils.generic import can_return_tuple

from .configuration_llama_bidir import (
    HUB_ARGUMENTS,
    ROPE_OF_A_BATCH,
    LlamaBidirectionalConfig,
    check_checkpoint_path,
    check_is_downloaded,
    check_length,
    check_pooling,
    find_file,
    is_inside,
    read_json,
)

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


def check_weight_files(
    name_or_path: str, source: Mapping[str, Any], *, use_safetensors: bool | None = None, variant: str | None = None
) -> None:
    """
    Checks the files of a checkpoint's weights before transformers reads them.

    Args:
        name_or_path (`str`): a folder or the id of a Hub repository.
        source (`dict`): arguments of the Hub, such as `revision`.
        use_safetensors (`bool`, *optional*): `False` allows pickled weights, for torch's safe loader.
        variant (`str`, *optional*): as in [`PreTrainedModel.from_pretrained`].

    Raises:
        ValueError: the weights are a pickle and `use_safetensors` is not `False`, an index names a file outside of the
            folder, or a file is not whole. The message names the file.
    """

    def find(stem: str, suffix: str) -> tuple[str | None, bool]:
        """Returns the file of the weights, or of the index of their shards, and whether it is an index."""
        name = stem if variant is None else f"{stem}.{variant}"
        if (file := find_file(name_or_path, f"{name}{suffix}", source)) is not None:
            return file, False
        name = f"{stem}{suffix}.index" if variant is None else f"{stem}{suffix}.index.{variant}"
        return find_file(name_or_path, f"{name}.json", source), True

    suffix = ".bin" if use_safetensors is False else ".safetensors"
    file, is_index = find("pytorch_model" if use_safetensors is False else "model", suffix)
    if file is None and use_safetensors is not False:
        pickled, _ = find("pytorch_model", ".bin")
        if pickled is not None:
            raise ValueError(
                f"{name_or_path!r} holds its weights as a pickle ({os.path.basename(pickled)}), a format that can run "
                "code: pass use_safetensors=False (model_kwargs={'use_safetensors': False} to a CrossEncoder) to read "
                "it with torch's safe loader, and save it as safetensors"
            )
    if file is None:
        return  # transformers says so
    if not is_index:
        check_weight_file(file)
        return
    for shard in read_shards(file, suffix):
        if os.path.isdir(name_or_path):  # the shards of a repository are not fetched yet
            check_weight_file(os.path.join(os.path.dirname(file), shard))


def read_shards(index: str, suffix: str) -> list[str]:
    """Returns the file names in the index of a sharded checkpoint. Raises ValueError for one outside of its folder."""
    content = read_json(index)
    weight_map = content.get("weight_map")
    if not isinstance(content.get("metadata"), dict) or not isinstance(weight_map, dict):
        raise ValueError(f"{index!r} must hold the objects weight_map and metadata: get the file again")
    for shard in weight_map.values():
        if not isinstance(shard, str) or not shard.endswith(suffix):
            raise ValueError(f"{index!r} must name {suffix} files, got {shard!r}")
        if not is_inside(shard):
            raise ValueError(f"{index!r} names a file outside of its folder, which is refused: {shard!r}")
    return sorted(set(weight_map.values()))


def check_weight_file(path: str) -> None:
    """Raises ValueError, naming the file, for weights that are not whole, or that torch's safe loader refuses."""
    check_is_downloaded(path)
    try:
        if path.endswith(".safetensors"):
            with safe_open(path, framework="pt"):
                return
        torch.load(path, map_location="meta", weights_only=True, mmap=zipfile.is_zipfile(path))
    except SafetensorError as error:
        raise ValueError(f"{path!r} is not a whole safetensors file: {error}. Get the file again") from None
    except Exception as error:
        raise ValueError(
            f"{path!r} is refused by torch's safe loader, because it is damaged or holds more than tensors "
            f"({type(error).__name__}): get the weights as safetensors"
        ) from None


class Float32Linear(nn.Linear):
    """A linear layer that computes in float32, whatever the dtype of its weight and its input."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        # Not a matrix product: autocast would change its dtype, and its rounding depends on the size of the batch.
        return (input.float().unsqueeze(-2) * self.weight.float()).sum(dim=-1)


class LlamaBidirectionalPreTrainedModel(LlamaPreTrainedModel):
    """Loads `llama` and `llama_bidirec` checkpoints, including GGUF files, under a [`LlamaBidirectionalConfig`]."""

    config: LlamaBidirectionalConfig
    config_class = LlamaBidirectionalConfig
    _keys_to_ignore_on_load_unexpected = [r"^lm_head\."]

    def __init__(self, config: LlamaBidirectionalConfig):
        if not hasattr(config, "pooling"):
            raise TypeError(
                f"{type(self).__name__} needs a LlamaBidirectionalConfig, got {type(config).__name__}: build one with "
                "LlamaBidirectionalConfig.from_pretrained(checkpoint)"
            )
        super().__init__(config)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *model_args: Any, gguf_file: str | None = None, **kwargs: Any
    ) -> Any:
        if pretrained_model_name_or_path is not None:
            check_checkpoint_path(pretrained_model_name_or_path)
        if gguf_file is not None:
            return cls._from_gguf(pretrained_model_name_or_path, *model_args, gguf_file=gguf_file, **kwargs)
        if kwargs.get("weights_only") is False:
            raise ValueError("weights_only=False would run code from the file of the weights: leave it out")
        if pretrained_model_name_or_path is not None:
            name = os.fspath(pretrained_model_name_or_path)
            source = {key: kwargs[key] for key in HUB_ARGUMENTS if kwargs.get(key) is not None}
            safety = {key: kwargs[key] for key in ("use_safetensors", "variant") if key in kwargs}
            if kwargs.get("config") is None and find_file(name, "config.json", source) is not None:
                LlamaBidirectionalConfig.get_config_dict(name, **source)  # refuses other models before their weights
            check_weight_files(name, source, **safety)
            kwargs["use_safetensors"] = kwargs.get("use_safetensors") is not False
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        except SafetensorError as error:
            raise ValueError(f"{pretrained_model_name_or_path}: the weights are not whole: {error}") from error

    @classmethod
    def _from_gguf(cls, pretrained_model_name_or_path: Any, *model_args: Any, gguf_file: str, **kwargs: Any) -> Any:
        # transformers maps the names of GGUF tensors by `config.model_type`, and GGUF only knows "llama". So a plain
        # Llama reads the file and passes its weights on.
        source = {name: kwargs.pop(name) for name in HUB_ARGUMENTS if name in kwargs}
        llama = LlamaModel.from_pretrained(
            pretrained_model_name_or_path, gguf_file=gguf_file, dtype=kwargs.get("dtype", "auto"), **source
        )
        if kwargs.get("dtype") == "auto":
            kwargs["dtype"] = llama.dtype
        if not isinstance(config := kwargs.pop("config", None), LlamaBidirectionalConfig):
            config, kwargs = LlamaBidirectionalConfig.from_pretrained(
                pretrained_model_name_or_path, gguf_file=gguf_file, return_unused_kwargs=True, **source, **kwargs
            )
            kwargs.pop("gguf_file", None)
        loaded = super().from_pretrained(None, *model_args, config=config, state_dict=llama.state_dict(), **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.config.name_or_path = model.name_or_path = str(pretrained_model_name_or_path)
        return loaded


class LlamaBidirectionalModel(LlamaBidirectionalPreTrainedModel, LlamaModel):
    """
    Llama without the causal mask: each token attends to every token of its sequence.

    With `config.is_causal=False`, transformers builds a bidirectional mask; with `True` it keeps the causal one.
    """

    _keys_to_ignore_on_load_unexpected = [r"^lm_head\.", r"^score\."]

    def __init__(self, config: LlamaBidirectionalConfig):
        try:
            LlamaRotaryEmbedding(config)  # before the layers, for an error that names the field
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
    def from_pretrained(cls, *args: Any, head_follows: bool = False, **kwargs: Any) -> Any:
        r"""
        Loads a checkpoint, as [`PreTrainedModel.from_pretrained`] does, and warns of a head that it does not hold.

        Args:
            head_follows (`bool`, *optional*, defaults to `False`):
                The caller loads the weights of the head next, so a new one is not reported.
        """
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if model._score_is_new and not head_follows:
            logger.warning(
                f"score.weight is new: {model.config.name_or_path or 'the checkpoint'} has no score head, so one was "
                "initialized at random. It needs training before its scores mean anything"
            )
        return loaded

    _score_is_new = False

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
