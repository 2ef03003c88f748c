"""A reranker from disk, from the Hub or from the caller: a checkpoint, or an adapter on its base model."""

import copy
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase
from transformers.quantizers.auto import AutoQuantizationConfig
from transformers.utils.hub import cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from ..configuration_llama_bidir import LlamaBidirectionalConfig
from ..fields_llama_bidir import as_dtype, check_rerank_max_length
from ..files_llama_bidir import HUB_ARGUMENTS, find_file, read_json
from ..modeling_llama_bidir import LlamaBidirectionalForSequenceClassification
from ..pretrained_llama_bidir import missing_weights
from ..prompts import PromptEncoder, ensure_pad_token
from ..scoring.device import SplitDevices, cpu_dtype, default_device, limit_onednn_caches
from ..scoring.int8 import check_int8_devices, is_int8, quantize_linears
from ..utils.extras import require
from .adapters import absolute_base, check_adapter, check_weights, named_errors, read_names
from .chat_template import find_prompt_template
from .onnx import MODEL_FILE, OnnxReranker
from .sentence_transformers import read_head
from .source import check_source, naming_the_repository
from .tokenizer import load_tokenizer

logger = logging.getLogger(__name__)

BACKENDS = ("torch", "onnx")
INT8 = "int8"


class OpenedReranker(NamedTuple):
    """
    A reranker that is ready to score.

    Args:
        model: a [`LlamaBidirectionalForSequenceClassification`], an adapter on one, or an exported graph. Its
            configuration holds the prompt template and the maximum length.
        tokenizer: with a pad token.
        stored_dtype: of the checkpoint, where the model computes in another dtype; else None.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    stored_dtype: torch.dtype | None = None


def open_reranker(
    model: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    backend: str,
    devices: SplitDevices,
    dtype: str | torch.dtype | None,
    num_labels: int | None,
    prompt_template: str | None,
    instruction: str | None,
    max_length: int | None,
    hub: Mapping[str, Any],
    model_kwargs: Mapping[str, Any],
    tokenizer_kwargs: Mapping[str, Any],
) -> OpenedReranker:
    """
    Loads a reranker, or takes the caller's, for [`~cross_encoder.CrossEncoder`], which documents the arguments.

    Args:
        devices: of the model and of worker processes.
        hub: arguments of the Hub; those that are None are left out.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be 'torch' or 'onnx', got {backend!r}")
    dtype = check_dtype(dtype)
    is_callers = backend == "torch" and not isinstance(model, (str, os.PathLike))
    if any(torch.device(each).type == "cpu" for each in devices.workers or [_place(model, devices.model)]):
        limit_onednn_caches()
    stored_dtype = None
    if is_callers:
        model = _adopt(check_reranker(model, num_labels), devices.model, dtype)
        if tokenizer is None:
            raise TypeError("a loaded model needs its tokenizer: CrossEncoder(model, tokenizer)")
    else:
        name, given = model, {**hub, "num_labels": num_labels}
        fields = {**{key: value for key, value in given.items() if value is not None}, **model_kwargs}
        # A GGUF file holds its tokenizer, and a subfolder has one of its own.
        source = {key: fields[key] for key in (*HUB_ARGUMENTS, "gguf_file") if key in fields}
        if backend == "onnx":
            model = load_onnx(name, fields, device=devices.model, dtype=dtype)
        else:
            model, stored_dtype = _load_on(os.fspath(name), fields, devices, dtype)
        if tokenizer is None:
            tokenizer = load_tokenizer(name, **{**source, **tokenizer_kwargs})
    _configure(model.config, tokenizer, prompt_template, instruction, max_length)
    return OpenedReranker(model, tokenizer, stored_dtype)


def check_dtype(dtype: Any) -> str | torch.dtype | None:
    """Returns a dtype for scoring, None, `"auto"` or `"int8"`; raises ValueError for anything else."""
    if dtype in (None, "auto", INT8, torch.int8):
        return INT8 if dtype == torch.int8 else dtype
    if (named := as_dtype(dtype)) is None:
        raise ValueError(
            f"dtype must be 'auto', 'float32', 'bfloat16', 'float16', 'int8' or the torch.dtype, got {dtype!r}"
        )
    return named


def _place(model: Any, device: torch.device | None) -> Any:
    return device or getattr(model, "device", default_device())


def _adopt(model: Any, device: torch.device | None, dtype: str | torch.dtype | None) -> Any:
    """The caller's model on a device, or a copy of it in another dtype."""
    if dtype == INT8 and not is_int8(model):
        places = [device or model.device]
        check_int8_devices(places)
        model = _as_int8(copy.deepcopy(model), places)
    elif isinstance(dtype, torch.dtype) and is_int8(model):
        raise ValueError(f"the model is in int8 and cannot be changed to {dtype}: load its checkpoint again")
    elif isinstance(dtype, torch.dtype) and any(parameter.dtype != dtype for parameter in model.parameters()):
        model = copy.deepcopy(model)
        cast_parameters(model, dtype)
    return model if device is None else model.to(device)


def _load_on(
    name: str,
    fields: dict[str, Any],
    devices: SplitDevices,
    dtype: str | torch.dtype | None,
) -> tuple[Any, torch.dtype | None]:
    """Returns a model on its device, and the dtype that its checkpoint is stored in where that is another one."""
    device = devices.model
    if "device_map" in fields:
        if device is not None:
            raise ValueError(f"device {str(device)!r} and a device_map in model_kwargs exclude each other")
    elif device is None:
        device = torch.device(default_device())
    given = fields.pop("dtype", None) or fields.pop("torch_dtype", None)
    dtype = dtype or (INT8 if given == torch.int8 else given)
    if dtype == INT8 and "device_map" in fields:
        raise ValueError("dtype 'int8' and a device_map in model_kwargs exclude each other: pass device")
    places = [*map(torch.device, devices.workers)] or ([] if device is None else [device])
    if dtype == INT8:
        check_int8_devices(places)  # before the weights are read
    model = load_reranker(name, {**fields, "dtype": "float32" if dtype == INT8 else dtype or "auto"})
    stored = model.dtype
    if dtype == INT8:
        model = _as_int8(model, places)
    on_cpu = all(place.type == "cpu" for place in places or [model.device])
    if dtype is None and getattr(model, "hf_quantizer", None) is None and on_cpu:
        cast_parameters(model, cpu_dtype(stored))
        logger.info(f"scoring in {model.dtype} on this CPU")
    return model if device is None else model.to(device), stored if stored != model.dtype else None


def _as_int8(model: Any, places: Sequence[torch.device]) -> Any:
    """
    A model with its linear layers in int8, in place. The rest is in bfloat16 for GPUs and in float32 for a CPU. An
    adapter is merged first.
    """
    if getattr(model, "is_quantized", False) or getattr(model, "hf_quantizer", None) is not None:
        raise ValueError(
            f"dtype 'int8' cannot be used for {model.config.name_or_path!r}, whose weights are quantized already: pass "
            "the checkpoint that they were made from"
        )
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload(safe_merge=True)
    cast_parameters(model, torch.float32)
    if model.config.int8_skip_modules is None:
        logger.warning(
            f"{model.config.name_or_path or 'the model'} was not made for int8, which may change its ranking: "
            "`llama-bidir quantize` writes a checkpoint with equal scores that int8 rounds less"
        )
    quantize_linears(model, model.config.int8_skip_modules or ())
    if all(place.type == "cuda" for place in places):
        cast_parameters(model, torch.bfloat16)
    return model


def _configure(
    config: LlamaBidirectionalConfig,
    tokenizer: PreTrainedTokenizerBase,
    prompt_template: str | None,
    instruction: str | None,
    max_length: int | None,
) -> None:
    """Sets template, instruction and length in a configuration, after all were checked."""
    template = find_prompt_template(tokenizer, config) if prompt_template is None else prompt_template
    length = config.rerank_max_length if max_length is None else max_length
    length = check_rerank_max_length(length, config)
    chosen = config.instruction if instruction is None else instruction
    PromptEncoder(tokenizer, prompt_template=template, max_length=length, instruction=chosen)
    ensure_pad_token(tokenizer, config.vocab_size)
    config.instruction = None  # the old one may have no place in the new template
    config.prompt_template, config.instruction, config.rerank_max_length = template, chosen, length


def check_reranker(model: Any, num_labels: int | None) -> Any:
    """Returns a loaded reranker; raises TypeError for any other model, ValueError for a different number of labels."""
    if not isinstance(getattr(model, "config", None), LlamaBidirectionalConfig) or not hasattr(model, "score"):
        raise TypeError(
            "model_name_or_path_or_model must be a path, a Hub id or a LlamaBidirectionalForSequenceClassification, "
            f"got {type(model).__name__}"
        )
    if num_labels is not None and num_labels != model.config.num_labels:
        raise ValueError(f"num_labels is {num_labels}, but the loaded model has {model.config.num_labels}")
    return model


@contextmanager
def _cpu_by_default() -> Iterator[None]:
    """Loads on the CPU even if `torch.set_default_device` names another device. The caller moves the model later."""
    with torch.device("cpu"):
        yield


@_cpu_by_default()
def load_reranker(name_or_path: str, model_kwargs: dict[str, Any], *, dequantize: bool = False) -> Any:
    """
    Loads a checkpoint, or an adapter (PEFT) on its base model with the configuration that was saved beside the adapter.

    Args:
        name_or_path: a folder or the id of a Hub repository.
        model_kwargs: for `from_pretrained`, those of the Hub included.
        dequantize: load the base of an adapter that was trained on quantized weights (QLoRA) in full precision.
    """
    source = check_source(name_or_path, {name: model_kwargs[name] for name in HUB_ARGUMENTS if name in model_kwargs})
    with naming_the_repository(name_or_path):
        return _load_reranker(name_or_path, {**model_kwargs, **source}, source, dequantize=dequantize)


def _load_reranker(name_or_path: str, model_kwargs: dict[str, Any], source: dict[str, Any], *, dequantize: bool) -> Any:
    if find_adapter_config_file(name_or_path, **source) is None:
        head = read_head(name_or_path, source)
        if head is None:
            return LlamaBidirectionalForSequenceClassification.from_pretrained(name_or_path, **model_kwargs)
        pooling, weight = head
        if model_kwargs.get("num_labels") not in (None, len(weight)):
            raise ValueError(
                f"num_labels is {model_kwargs['num_labels']}, but the head of {name_or_path!r} has {len(weight)}: "
                "leave num_labels out"
            )
        model = LlamaBidirectionalForSequenceClassification.from_pretrained(
            name_or_path, **{"pooling": pooling, "num_labels": len(weight), **model_kwargs}, head_follows=True
        )
        if weight.shape != model.score.weight.shape:
            raise ValueError(
                f"hidden_size is {model.config.hidden_size}, but the head of {name_or_path!r} has shape "
                f"{list(weight.shape)}"
            )
        model.score.weight.data = weight.to(model.score.weight.device)
        return model
    peft = require("peft", "train")
    base = check_adapter(name_or_path, source, use_safetensors=model_kwargs.get("use_safetensors"))
    with named_errors(name_or_path):
        adapter = peft.PeftConfig.from_pretrained(name_or_path, **source)
    base_source = {name: value for name, value in source.items() if name not in ("revision", "subfolder")}
    if adapter.revision is not None:
        base_source["revision"] = adapter.revision
    names = read_names(name_or_path, source)
    # PEFT ignores the weights of a head that the configuration of the adapter does not mention.
    brings_head = adapter.task_type == "SEQ_CLS" or "score" in (getattr(adapter, "modules_to_save", None) or ())
    fields = {name: value for name, value in model_kwargs.items() if name not in source}
    dtype = fields.pop("dtype", "auto")
    try:
        base_source = check_source(base, base_source)
        config_file = find_file(base, "config.json", base_source)
        stored = {} if config_file is None else read_json(config_file)
    except OSError as error:
        raise type(error)(
            f"{name_or_path!r} is an adapter, and its base model {base!r} cannot be loaded: {error}"
        ) from error
    if cached_file(name_or_path, "config.json", _raise_exceptions_for_missing_entries=False, **source):
        config, fields = LlamaBidirectionalConfig.from_pretrained(
            name_or_path, return_unused_kwargs=True, **source, **fields
        )
        fields["config"] = config
        quantization = config.to_dict().get("quantization_config")
        if quantization is not None and "quantization_config" not in stored:
            # It says how training loaded the base, not how the files of the base are stored.
            del config.quantization_config
            fields.setdefault("quantization_config", AutoQuantizationConfig.from_dict(quantization))
    model = LlamaBidirectionalForSequenceClassification.load_base(
        base,
        adapter=name_or_path,
        dtype=dtype,
        **base_source,
        **fields,
        head_follows=brings_head and any(name.endswith("score.weight") for name in names),
    )
    if getattr(model, "is_quantized", False):
        # As in training, which holds weights that are not quantized in float32.
        model = model.dequantize() if dequantize else peft.prepare_model_for_kbit_training(model, False)
    model.score.float()  # a base in half precision would round the saved head
    adapter.base_model_name_or_path = absolute_base(base)
    # The adapter can be trained further. Scoring does not compute gradients.
    is_trainable = not adapter.is_prompt_learning  # PEFT cannot train prompt learning further
    try:
        with named_errors(name_or_path):
            adapted = peft.PeftModel.from_pretrained(
                model, name_or_path, is_trainable=is_trainable, config=adapter, **source
            )
    except KeyError as error:  # raised by PEFT for a module in modules_to_save
        raise missing_weights(name_or_path, [str(error.args[0])]) from None
    check_weights(name_or_path, adapted, names, base_vocab_size=stored.get("vocab_size", adapted.config.vocab_size))
    return adapted.eval()


def load_onnx(name_or_path: Any, model_kwargs: dict[str, Any], *, device: Any, dtype: Any) -> OnnxReranker:
    """
    Loads an exported reranker.

    Args:
        name_or_path: a folder or the id of a Hub repository.
        model_kwargs: `file_name`, and arguments of the Hub.
        device, dtype: None or the only possible values, `"cpu"` and float32.

    Raises:
        TypeError, ValueError: an argument is for another backend.
    """
    if not isinstance(name_or_path, (str, os.PathLike)):
        raise TypeError(f"backend 'onnx' loads an exported folder, got {type(name_or_path).__name__}")
    if device is not None and str(device) != "cpu":
        raise ValueError(f"backend 'onnx' computes on the CPU: leave device out, got {device!r}")
    if dtype not in (None, "auto", "float32", torch.float32):
        raise ValueError(f"backend 'onnx' has the dtype of its graph: leave dtype out, got {dtype!r}")
    source = {name: value for name, value in model_kwargs.items() if name in HUB_ARGUMENTS}
    if unknown := model_kwargs.keys() - source.keys() - {"file_name"}:
        raise ValueError(f"backend 'onnx' takes no {', '.join(sorted(unknown))}: it is for backend 'torch'")
    source = check_source(name_or_path, source)
    return OnnxReranker(name_or_path, model_kwargs.get("file_name", MODEL_FILE), source)


def load_merged(
    name_or_path: str, dtype: str = "auto", *, revision: str | None = None
) -> tuple[Any, PreTrainedTokenizerBase]:
    """
    Loads a checkpoint, or an adapter merged into its base model in float32, with its prompt.

    Args:
        name_or_path: a folder or the id of a Hub repository.
        dtype: of a checkpoint's weights; `"auto"` keeps the stored one.
        revision: branch, tag or commit of the repository.

    Returns:
        the model and its tokenizer.

    Raises:
        ValueError: the weights of the checkpoint are quantized.
    """
    source = check_source(name_or_path, {"revision": revision})
    if find_adapter_config_file(name_or_path, **source) is None:
        model = load_reranker(name_or_path, {"dtype": dtype, **source})
        if getattr(model, "is_quantized", False):
            raise ValueError(f"{name_or_path!r} holds quantized weights: pass the checkpoint that they were made from")
    else:
        adapted = load_reranker(name_or_path, {"dtype": "float32", **source}, dequantize=True)
        model = adapted.merge_and_unload(safe_merge=True)
    tokenizer = load_tokenizer(name_or_path, **source)
    model.config.prompt_template = find_prompt_template(tokenizer, model.config)
    ensure_pad_token(tokenizer, model.config.vocab_size)
    return model.eval(), tokenizer


def cast_parameters(model: torch.nn.Module, dtype: torch.dtype, *, only_trained: bool = False) -> None:
    """Casts the parameters alone: `model.to(dtype)` would also round the frequencies of the rotary embedding."""
    for parameter in model.parameters():
        if parameter.requires_grad or not only_trained:
            parameter.data = parameter.data.to(dtype)
