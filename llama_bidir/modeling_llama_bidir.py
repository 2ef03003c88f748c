# Copyright 2026 The llama-bidir authors. Licensed under the Apache License, Version 2.0.
"""Llama with bidirectional attention, and a linear score head on its pooled hidden states."""

import copy
import json
import logging
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaModel
from transformers.masking_utils import create_bidirectional_mask, packed_sequence_mask_function
from transformers.modeling_outputs import BaseModelOutputWithPast, SequenceClassifierOutput
from transformers.models.llama.modeling_llama import LlamaPreTrainedModel
from transformers.utils.generic import can_return_tuple
from transformers.utils.import_utils import is_peft_available

from .configuration_llama_bidir import INTERRUPTED_SAVE, LlamaBidirectionalConfig, check_checkpoint_path, check_pooling

logger = logging.getLogger(__name__)

_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


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


class Float32Linear(nn.Linear):
    """A linear layer that computes in float32, whatever the dtype of its weight and its input."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        # Not a matrix product: autocast would change its dtype, and its rounding depends on the size of the batch.
        return (input.float().unsqueeze(-2) * self.weight.float()).sum(dim=-1)


# Everything that a loader may take for the weights of a model, or for a head that replaces its own.
_WEIGHTS = re.compile(
    r"(adapter_model|model|pytorch_model)([.-][\w.-]+)?\.(safetensors|bin)(\.index(\.\w+)?\.json)?"
    r"|adapter_config\.json|modules\.json|model(_\w+)?\.onnx([._]data)?"
)


def _replace_weights(folder: Path, staged: Path) -> None:
    """Moves saved files into a folder, in place of the weights in it. The configuration goes first and comes last."""
    names = os.listdir(staged)
    if not names:  # another process saves
        return
    last = [name for name in ("config.json", "adapter_config.json") if name in names]
    mode = (staged / last[0]).stat().st_mode
    moving = folder / INTERRUPTED_SAVE
    shutil.rmtree(moving, ignore_errors=True)
    staged.rename(moving)
    for name in [*last, *(name for name in os.listdir(folder) if _WEIGHTS.fullmatch(name))]:
        (folder / name).unlink(missing_ok=True)
    for name in [*(name for name in names if name not in last), *last]:
        (moving / name).chmod(mode)  # safetensors writes private files
        (moving / name).replace(folder / name)
    moving.rmdir()


def is_adapter_folder(path: Any) -> bool:
    """Whether a path is a folder that holds an adapter (PEFT) and no weights of a whole model."""
    if not isinstance(path, (str, os.PathLike)) or not Path(path, "adapter_config.json").is_file():
        return False
    return not any(Path(path, name).exists() for name in ("model.safetensors", "model.safetensors.index.json"))


def find_base(adapter: str | os.PathLike[str], base: Any) -> str:
    """
    Returns the path or the Hub id of an adapter's base model.

    A relative path that does not exist here is looked for from the folder of the adapter and from those above it, since
    it may be relative to where training ran.

    Args:
        adapter (`str` or `os.PathLike`): The folder or the Hub id of the adapter.
        base (`str`): What `base_model_name_or_path` says in its `adapter_config.json`.

    Raises:
        FileNotFoundError: The adapter names no base model, or a folder that does not exist.
    """
    where, fix = os.fspath(adapter), "write its path or Hub id into base_model_name_or_path in adapter_config.json"
    if not isinstance(base, str) or not base:
        raise FileNotFoundError(f"{where!r} is an adapter that does not name its base model: {fix}")
    if os.path.exists(base):
        return base
    if os.path.isdir(where) and not os.path.isabs(base):
        for folder in (Path(where).resolve(), *Path(where).resolve().parents):
            if (folder / base / "config.json").is_file():
                logger.warning(f"{where}: its base model {base!r} is taken from {folder / base}")
                return os.fspath(folder / base)
    try:
        check_checkpoint_path(base)
    except OSError:
        raise FileNotFoundError(
            f"{where!r} is an adapter, and the folder {base!r} of its base model does not exist here: {fix}"
        ) from None
    return base


class LlamaBidirectionalPreTrainedModel(LlamaPreTrainedModel):
    """Loads `llama` and `llama_bidirec` checkpoints, including GGUF files, under a [`LlamaBidirectionalConfig`]."""

    config: LlamaBidirectionalConfig
    config_class = LlamaBidirectionalConfig
    _score_is_new = False
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
        if is_adapter_folder(pretrained_model_name_or_path):
            return cls._from_adapter(pretrained_model_name_or_path, *model_args, **kwargs)
        return super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)

    @classmethod
    def _from_gguf(cls, pretrained_model_name_or_path: Any, *model_args: Any, gguf_file: str, **kwargs: Any) -> Any:
        # transformers maps the names of GGUF tensors by `config.model_type`, and GGUF only knows "llama". So a plain
        # Llama reads the file and passes its weights on.
        source = {name: kwargs.pop(name) for name in _HUB_ARGUMENTS if name in kwargs}
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

    @classmethod
    def _from_adapter(cls, folder: str | os.PathLike[str], *model_args: Any, **kwargs: Any) -> Any:
        # transformers takes the config.json beside an adapter for that of a complete model.
        if not is_peft_available():
            raise ImportError(f'{os.fspath(folder)!r} is an adapter: pip install "llama-bidir[train]"')
        for name in ("adapter_kwargs", "revision", "subfolder"):  # of the adapter, whose folder this is
            kwargs.pop(name, None)
        adapter = json.loads(Path(folder, "adapter_config.json").read_text(encoding="utf-8"))
        if Path(folder, "config.json").is_file() and not isinstance(kwargs.get("config"), LlamaBidirectionalConfig):
            config, kwargs = LlamaBidirectionalConfig.from_pretrained(folder, return_unused_kwargs=True, **kwargs)
            kwargs["config"] = config
        base = find_base(folder, adapter.get("base_model_name_or_path"))
        if adapter.get("revision") is not None:
            kwargs["revision"] = adapter["revision"]
        follows = {"head_follows": True} if issubclass(cls, LlamaBidirectionalForSequenceClassification) else {}
        model = cls.load_base(base, *model_args, adapter=folder, **follows, **kwargs)
        if follows:
            model.score.float()  # a base in half precision would round the saved head
        loaded = model.load_adapter(os.fspath(folder))
        if missing := sorted(getattr(loaded, "missing_keys", None) or ()):
            raise ValueError(
                f"{os.fspath(folder)!r} is an adapter without {missing[0]!r}, which its adapter_config.json calls for: "
                "save it again"
            )
        model._score_is_new &= not any("score.modules_to_save" in name for name, _ in model.named_parameters())
        return model.eval()

    @classmethod
    def load_base(cls, base: str, *args: Any, adapter: str | os.PathLike[str], **kwargs: Any) -> Any:
        """
        Loads the base model of an adapter, with the vocabulary that the adapter's configuration gives it.

        Args:
            base (`str`): The folder or the Hub id of the base model.
            adapter (`str` or `os.PathLike`): The folder or the Hub id of the adapter, for messages.
            kwargs: For `from_pretrained`. `config` is the adapter's, where it has one.

        Raises:
            OSError: The base model cannot be loaded. The message names it and the adapter.
        """
        config = kwargs.get("config")
        source = {name: kwargs[name] for name in _HUB_ARGUMENTS if name in kwargs}
        try:
            if config is None:
                return cls.from_pretrained(base, *args, **kwargs)
            stored = LlamaBidirectionalConfig.get_config_dict(base, **source)[0].get("vocab_size", config.vocab_size)
            if stored == config.vocab_size:
                return cls.from_pretrained(base, *args, **kwargs)
            first = copy.deepcopy(config)
            first.vocab_size, first.pad_token_id = stored, None  # which may be one of the added tokens
            model = cls.from_pretrained(base, *args, **{**kwargs, "config": first})
        except OSError as error:
            raise type(error)(
                f"{os.fspath(adapter)!r} is an adapter, and its base model {base!r} cannot be loaded: {error}"
            ) from error
        model.resize_token_embeddings(config.vocab_size, mean_resizing=False)
        model.config.pad_token_id = config.pad_token_id
        return model

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """
        Saves as [`PreTrainedModel.save_pretrained`] does, in place of the weights of any kind that the folder holds.

        The files are written into a subfolder first, and `config.json` moves last. All have the mode of the umask.
        """
        if kwargs.get("distributed_checkpoint") or os.path.isfile(save_directory):
            super().save_pretrained(save_directory, *args, **kwargs)
            return
        os.makedirs(save_directory, exist_ok=True)
        if kwargs.get("push_to_hub"):
            kwargs.setdefault("repo_id", Path(save_directory).name)
        with tempfile.TemporaryDirectory(prefix=".saving-", dir=save_directory) as workspace:
            staged = Path(workspace, "new")
            super().save_pretrained(staged, *args, **kwargs)
            _replace_weights(Path(save_directory), staged)


class LlamaBidirectionalModel(LlamaBidirectionalPreTrainedModel, LlamaModel):
    """
    Llama without the causal mask: each token attends to every token of its sequence.

    With `config.is_causal=False`, transformers builds a bidirectional mask; with `True` it keeps the causal one.
    """

    _keys_to_ignore_on_load_unexpected = [r"^lm_head\.", r"^score\."]

    def __init__(self, config: LlamaBidirectionalConfig):
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
