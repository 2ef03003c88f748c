"""CrossEncoder: scores and ranks passages with a bidirectional Llama reranker."""

import logging
import os
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Self

import numpy as np
import torch
from huggingface_hub import HfApi
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .checkpoints.chat_template import find_prompt_template, save_tokenizer
from .checkpoints.hub import add_code
from .checkpoints.loading import (
    HUB_ARGUMENTS,
    cast_parameters,
    check_reranker,
    load_onnx,
    load_reranker,
)
from .checkpoints.model_card import read_measures, write_model_card
from .configuration_llama_bidir import LlamaBidirectionalConfig, check_rerank_max_length
from .prompts import PromptEncoder, check_long_document, ensure_pad_token
from .scoring.device import cpu_dtype, default_device, limit_onednn_caches
from .scoring.distributed import is_shared, score_shared
from .scoring.engine import Engine, LocalEngine
from .scoring.pipeline import Scorer
from .scoring.workers import WorkerPool, check_devices
from .utils.validation import check_positive_int, check_text, check_texts, describe, read_pairs

logger = logging.getLogger(__name__)

Activation = Callable[[torch.Tensor], torch.Tensor]
Devices = str | torch.device | Sequence[str | torch.device]


class CrossEncoder:
    """
    Scores (query, passage) pairs and ranks passages.

    The score is the raw logit of the model, unless an activation is given. The prompt template and the maximum length
    are taken from the arguments, else from the checkpoint, else from their defaults, and are saved with the checkpoint.

    Args:
        model_name_or_path_or_model: a folder, the id of a Hub repository, or a loaded
            [`LlamaBidirectionalForSequenceClassification`]. A plain Llama checkpoint gets a new, untrained head; an
            adapter (LoRA) is put on the base model that it names.
        tokenizer: the model's fast tokenizer; loaded from the same place when not given. A tokenizer without a pad
            token is given one (see [`~prompts.ensure_pad_token`]).
        device: such as `"cuda:1"` or `"cpu"`; the first accelerator when there is one, else the CPU. A list, such as
            `["cuda:0", "cuda:1"]`, scores in one worker process a device (see [`~workers.WorkerPool`]).
        dtype: `torch.dtype` or its name. When not given, the checkpoint's on an accelerator; on a CPU bfloat16 where
            the checkpoint is stored in it and the CPU has instructions for it, else float32.
        max_length: most tokens of a rendered pair, special tokens included; saved as `rerank_max_length`.
        prompt_template: text with one `{query}` and one `{passage}`.
        activation_fn: applied to the logits of shape `(num_pairs,)` or `(num_pairs, num_labels)`; not saved.
        num_labels: outputs of the head.
        revision, token, cache_folder, local_files_only: where and how files are fetched from the Hub.
        model_kwargs, tokenizer_kwargs: passed on to `from_pretrained` of the model and of the tokenizer.
        backend: `"torch"`, or `"onnx"` for a folder that `llama-bidir export --format onnx` wrote, in onnxruntime on a
            CPU; `model_kwargs={"file_name": "model_int8.onnx"}` chooses another graph of it.
        long_document: what becomes of a passage that does not fit into `max_length`: `"truncate"` cuts its end, `"max"`
            and `"first_max"` score it in windows, of which the best counts (see [`~prompts.PromptEncoder.encode`]).
        max_tokens_per_batch: most tokens of a forward pass; chosen for the device and the model when not given.
        distributed: under torchrun or accelerate, each process scores its share and all get all scores; every process
            must then make the same calls. If False, each process scores for itself.

    Raises:
        ValueError: a value breaks its rule, or the checkpoint is no Llama.
        OSError: there is no checkpoint at that place.
    """

    def __init__(
        self,
        model_name_or_path_or_model: str | os.PathLike[str] | PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        device: Devices | None = None,
        dtype: str | torch.dtype | None = None,
        max_length: int | None = None,
        prompt_template: str | None = None,
        activation_fn: Activation | None = None,
        num_labels: int | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_folder: str | None = None,
        local_files_only: bool = False,
        model_kwargs: dict[str, Any] | None = None,
        tokenizer_kwargs: dict[str, Any] | None = None,
        backend: str = "torch",
        long_document: str = "truncate",
        max_tokens_per_batch: int | None = None,
        distributed: bool = True,
    ):
        if backend not in ("torch", "onnx"):
            raise ValueError(f"backend must be 'torch' or 'onnx', got {backend!r}")
        check_positive_int("max_tokens_per_batch", max_tokens_per_batch)
        self.long_document = check_long_document(long_document)
        self.max_tokens_per_batch = max_tokens_per_batch
        self.distributed = distributed
        self._devices, model_device = _split_devices(device)
        single = model_device or getattr(model_name_or_path_or_model, "device", None) or default_device()
        if any(torch.device(name).type == "cpu" for name in self._devices or [single]):
            limit_onednn_caches()
        model_kwargs = dict(model_kwargs or {})
        if isinstance(model_name_or_path_or_model, (str, os.PathLike)):
            given = {
                "revision": revision,
                "token": token,
                "cache_dir": cache_folder,
                "local_files_only": local_files_only or None,
                "num_labels": num_labels,
            }
            given = {name: value for name, value in given.items() if value is not None}
            model_kwargs = {**given, **model_kwargs}
            name_or_path = os.fspath(model_name_or_path_or_model)
            # A GGUF file holds its tokenizer, and a subfolder has one of its own.
            source = {name: model_kwargs[name] for name in (*HUB_ARGUMENTS, "gguf_file") if name in model_kwargs}
        self._stored_dtype: torch.dtype | None = None  # where it is not the model's
        if backend == "onnx":
            self.model: Any = load_onnx(model_name_or_path_or_model, model_kwargs, device=device, dtype=dtype)
        elif isinstance(model_name_or_path_or_model, (str, os.PathLike)):
            if device is not None and "device_map" in model_kwargs:
                raise ValueError(f"device {str(device)!r} and a device_map in model_kwargs exclude each other")
            if "device_map" not in model_kwargs:
                model_device = model_device or torch.device(default_device())
            dtype = dtype or model_kwargs.pop("dtype", None) or model_kwargs.pop("torch_dtype", None)
            self.model = load_reranker(name_or_path, {**model_kwargs, "dtype": dtype or "auto"})
            if dtype is None and getattr(self.model, "hf_quantizer", None) is None:
                devices = self._devices or [model_device or self.model.device]
                if all(torch.device(name).type == "cpu" for name in devices):
                    if cpu_dtype(self.model.dtype) != self.model.dtype:
                        self._stored_dtype = self.model.dtype
                        cast_parameters(self.model, cpu_dtype(self.model.dtype))
                    logger.info(f"scoring in {self.model.dtype} on this CPU")
        else:
            self.model = check_reranker(model_name_or_path_or_model, num_labels)
            if tokenizer is None:
                raise TypeError("a loaded model needs its tokenizer: CrossEncoder(model, tokenizer)")
            if dtype is not None and dtype != "auto":
                cast_parameters(self.model, getattr(torch, dtype) if isinstance(dtype, str) else dtype)
        if tokenizer is None:
            tokenizer = AutoTokenizer.from_pretrained(name_or_path, **{**source, **(tokenizer_kwargs or {})})
        if backend == "torch" and model_device is not None:
            self.model.to(model_device)
        self._local_engine = LocalEngine(self.model)
        self._pool: WorkerPool | None = None
        self._lock = threading.Lock()

        self.tokenizer = tokenizer
        self.activation_fn = activation_fn
        # Checked together before the configuration, which may be the caller's, is changed.
        template = find_prompt_template(tokenizer, self.config) if prompt_template is None else prompt_template
        length = self.config.rerank_max_length if max_length is None else max_length
        PromptEncoder(
            tokenizer,
            prompt_template=template,
            max_length=check_rerank_max_length(length, self.config.max_position_embeddings),
        )
        ensure_pad_token(tokenizer, self.config.vocab_size)
        self.config.prompt_template, self.config.rerank_max_length = template, length

    @classmethod
    def from_pretrained(cls, model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Self:
        """Same as `CrossEncoder(model_name_or_path, ...)`."""
        return cls(model_name_or_path, **kwargs)

    @property
    def config(self) -> LlamaBidirectionalConfig:
        """The model's configuration."""
        return self.model.config

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device

    @property
    def devices(self) -> list[torch.device]:
        """Where pairs are scored: the device of the model, or those of its worker processes."""
        return [torch.device(device) for device in self._devices] or [self.device]

    def __repr__(self) -> str:
        name = self.config.name_or_path or type(self.model).__name__
        fields = f"device={str(self.device)!r}, dtype={self.model.dtype}, max_length={self.config.rerank_max_length}"
        return f"{type(self).__name__}({name!r}, {fields})"

    def predict(
        self,
        pairs: Any,
        batch_size: int | None = None,
        *,
        show_progress_bar: bool | None = None,
        activation_fn: Activation | None = None,
        apply_softmax: bool = False,
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        device: Devices | None = None,
        long_document: str | None = None,
        max_tokens_per_batch: int | None = None,
    ) -> Any:
        """
        Scores pairs.

        Args:
            pairs: one (query, passage) pair, or an iterable of them. Either text may be empty. A generator is read and
                checked chunk by chunk, so that memory stays bounded; anything else is checked before any compute.
            batch_size: at most so many pairs a forward pass.
            show_progress_bar: shown when not given and this module logs at INFO.
            activation_fn: for this call instead of the one given at construction.
            apply_softmax: softmax over the labels, where there are several.
            convert_to_numpy: return a numpy array; if False, a list of tensors.
            convert_to_tensor: return one tensor instead.
            device: move the model there first; a list of devices as at construction.
            long_document, max_tokens_per_batch: for this call instead of those given at construction.

        Returns:
            float32 scores in input order: of shape `(num_pairs,)`, or `(num_pairs, num_labels)` for several labels. A
            single pair gives a scalar, or `(num_labels,)`.

        Raises:
            TypeError, ValueError: the pairs are not pairs of strings, with the position.
            torch.OutOfMemoryError: a single pair does not fit in memory.
            RuntimeError: a worker process failed, with its traceback.
        """
        checked_pairs, num_pairs, is_single = read_pairs(pairs)
        check_positive_int("batch_size", batch_size)
        check_positive_int("max_tokens_per_batch", max_tokens_per_batch)
        if long_document is not None:
            check_long_document(long_document)
        if device is not None:
            self._move(device)
        if show_progress_bar is None:
            show_progress_bar = logger.isEnabledFor(logging.INFO)
        with tqdm(total=num_pairs, desc="Scoring", unit="pair", disable=not show_progress_bar) as progress:
            scorer = self._scorer(batch_size, max_tokens_per_batch, long_document, progress)
            if self.distributed and is_shared(self.device):
                logits = score_shared(checked_pairs, scorer)
            else:
                logits = scorer.score(checked_pairs)
        scorer.tally.log(self.config.rerank_max_length)

        scores = self._activate(logits, activation_fn)
        if apply_softmax and scores.ndim == 2:
            scores = scores.softmax(dim=-1)
        if is_single:
            scores = scores[0]
        if convert_to_tensor:
            return scores
        if convert_to_numpy:
            array = scores.float().cpu().numpy()
            return array if array.ndim else np.float32(array)
        return scores if is_single else list(scores)

    def predict_chunks(
        self,
        chunks: Iterable[Sequence[tuple[str, str]]],
        batch_size: int | None = None,
        *,
        activation_fn: Activation | None = None,
        long_document: str | None = None,
        max_tokens_per_batch: int | None = None,
        progress: "tqdm[Any] | None" = None,
    ) -> Iterator[np.ndarray]:
        """
        Scores chunks of pairs one after the other, for work that does not fit in memory or must resume.

        A chunk is scored on its own, so its scores do not depend on the chunks before it. On an accelerator, the next
        chunk is tokenized while one is computed. Pairs that were cut are counted over all chunks and reported once,
        after the last.

        Args:
            chunks: lists of (query, passage) pairs, read one at a time.
            batch_size, activation_fn, long_document, max_tokens_per_batch: as in [`predict`].
            progress: a bar to advance by the pairs that are scored.

        Yields:
            the float32 scores of each chunk, of shape `(num_pairs,)`, or `(num_pairs, num_labels)` for several labels.
        """
        bar = tqdm(disable=True) if progress is None else progress
        scorer = self._scorer(batch_size, max_tokens_per_batch, long_document, bar)
        for logits in scorer.stream(chunks):
            yield self._activate(logits, activation_fn).float().cpu().numpy()
        scorer.tally.log(self.config.rerank_max_length)

    def _scorer(
        self, batch_size: int | None, max_tokens_per_batch: int | None, long_document: str | None, progress: "tqdm[Any]"
    ) -> Scorer:
        check_positive_int("batch_size", batch_size)
        check_positive_int("max_tokens_per_batch", max_tokens_per_batch)
        return Scorer(
            PromptEncoder.from_config(self.tokenizer, self.config),
            self.engine(),
            progress,
            num_labels=self.model.config.num_labels,
            max_tokens=max_tokens_per_batch or self.max_tokens_per_batch,
            max_sequences=batch_size,
            long_document=check_long_document(long_document or self.long_document),
        )

    def _activate(self, logits: torch.Tensor, activation_fn: Activation | None) -> torch.Tensor:
        scores = logits.squeeze(-1) if self.config.num_labels == 1 else logits
        activation_fn = activation_fn or self.activation_fn
        return scores if activation_fn is None else activation_fn(scores)

    def rank(
        self,
        query: str,
        documents: Sequence[str],
        top_k: int | None = None,
        return_documents: bool = False,
        batch_size: int | None = None,
        *,
        show_progress_bar: bool | None = None,
        activation_fn: Activation | None = None,
        device: Devices | None = None,
        long_document: str | None = None,
        max_tokens_per_batch: int | None = None,
    ) -> list[dict[str, Any]]:
        """
        Ranks documents for a query.

        Args:
            query: the query.
            documents: an iterable of passages.
            top_k: how many of the best to return; all when not given.
            return_documents: add the passage to each result as `text`.
            batch_size, show_progress_bar, activation_fn, device, long_document, max_tokens_per_batch: as in
                [`predict`].

        Returns:
            `{"corpus_id": int, "score": float}` dicts by falling score; equal scores keep the order of `documents`.
            `corpus_id` is the position in `documents`.

        Raises:
            TypeError: the query or a document is not a string.
            ValueError: the model has several labels, or a score is NaN.
        """
        return self.rank_batch(
            [check_text("query", query)],
            [check_texts("documents", documents)],
            top_k,
            return_documents,
            batch_size,
            show_progress_bar=show_progress_bar,
            activation_fn=activation_fn,
            device=device,
            long_document=long_document,
            max_tokens_per_batch=max_tokens_per_batch,
        )[0]

    def rank_batch(
        self,
        queries: Sequence[str],
        documents_per_query: Sequence[Sequence[str]],
        top_k: int | None = None,
        return_documents: bool = False,
        batch_size: int | None = None,
        *,
        show_progress_bar: bool | None = None,
        activation_fn: Activation | None = None,
        device: Devices | None = None,
        long_document: str | None = None,
        max_tokens_per_batch: int | None = None,
    ) -> list[list[dict[str, Any]]]:
        """
        Ranks documents for each of several queries, scored together.

        Args:
            queries: the queries.
            documents_per_query: one iterable of passages a query.
            top_k, return_documents: as in [`rank`].
            batch_size, show_progress_bar, activation_fn, device, long_document, max_tokens_per_batch: as in
                [`predict`].

        Returns:
            one list of results a query, each as [`rank`] returns it.

        Raises:
            TypeError, ValueError: as in [`rank`], and when the two lists differ in length.
        """
        queries = check_texts("queries", queries)
        if not isinstance(documents_per_query, Iterable):
            raise TypeError(f"documents_per_query must be an iterable of lists, got {describe(documents_per_query)}")
        groups = [
            check_texts(f"documents_per_query[{index}]", documents)
            for index, documents in enumerate(documents_per_query)
        ]
        check_positive_int("top_k", top_k)
        if len(queries) != len(groups):
            raise ValueError(f"each query needs its documents: got {len(queries)} queries and {len(groups)} lists")
        if self.config.num_labels != 1:
            raise ValueError(
                f"ranking needs one score a pair, but the model has {self.config.num_labels} labels: use predict"
            )
        pairs = [(query, document) for query, documents in zip(queries, groups, strict=True) for document in documents]
        scores = iter(
            self.predict(
                pairs,
                batch_size,
                show_progress_bar=show_progress_bar,
                activation_fn=activation_fn,
                device=device,
                long_document=long_document,
                max_tokens_per_batch=max_tokens_per_batch,
            ).tolist()
        )
        rankings = []
        for query, documents in zip(queries, groups, strict=True):
            results = []
            for corpus_id, document in enumerate(documents):
                score = next(scores)
                if score != score:
                    raise ValueError(
                        f"the score of document {corpus_id} for query {query!r} is NaN and has no rank: check the "
                        "weights of the model, or use a dtype with more range"
                    )
                text = {"text": document} if return_documents else {}
                results.append({"corpus_id": corpus_id, "score": score, **text})
            rankings.append(sorted(results, key=lambda result: -result["score"])[:top_k])
        return rankings

    def save_pretrained(
        self,
        directory: str | os.PathLike[str],
        *,
        model_id: str | None = None,
        with_code: bool = False,
        evaluation: str | os.PathLike[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """
        Saves model, configuration, tokenizer and, where there is none yet, a model card.

        Args:
            directory: made when missing.
            model_id: the name that the card's code loads; `directory` when not given.
            with_code: put the two model files beside the weights, for people without this package, who load them with
                `trust_remote_code=True`.
            evaluation: what `llama-bidir evaluate --json` wrote, for the measures of the card, which is then written
                anew.
            kwargs: for the model's `save_pretrained`, such as `max_shard_size`.
        """
        is_exported = not isinstance(self.model, torch.nn.Module)
        if is_exported:
            raise TypeError("an exported reranker (backend='onnx') is not saved again: copy its folder")
        if evaluation is not None:
            read_measures(evaluation)  # raises before anything is written
        if self._stored_dtype not in (None, self.model.dtype):
            logger.warning(
                f"saved in {self.model.dtype}, as this CPU computes, and was stored in {self._stored_dtype}: load with "
                "dtype='auto' to save it as it was"
            )
        self.model.save_pretrained(directory, **kwargs)
        self.config.save_pretrained(directory)  # an adapter does not save it
        save_tokenizer(self.tokenizer, directory, self.config)
        if with_code:
            add_code(directory)
        if evaluation is not None or not os.path.exists(os.path.join(directory, "README.md")):
            write_model_card(directory, self.config, model_id or os.fspath(directory), evaluation=evaluation)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "Upload reranker",
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        **kwargs: Any,
    ) -> str:
        """
        Uploads model, configuration, tokenizer and model card in one commit; the repository is created when missing.

        Args:
            repo_id: `"name"` or `"organization/name"`.
            commit_message, private, token, revision, create_pr: as in huggingface_hub.
            kwargs: for [`save_pretrained`]: `with_code`, `evaluation`, and those of the model's, such as
                `max_shard_size`.

        Returns:
            the address of the commit.
        """
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, model_id=repo_id, **kwargs)
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=commit_message,
                revision=revision,
                create_pr=create_pr,
            )
        return commit.commit_url

    def close(self) -> None:
        """Stops the worker processes, if there are any; the next call starts them again."""
        if self._pool is not None:
            self._pool.close()

    def engine(self) -> Engine:
        """Returns what computes the logits, with its worker processes started."""
        with self._lock:
            if self._local_engine.model is not self.model:  # set by the user, to a merged one for example
                self.close()
                self._local_engine = LocalEngine(self.model)
            if not self._devices:
                return self._local_engine
            if self._pool is None or not self._pool.is_open:
                self._pool = WorkerPool(self.model, self._devices)
            return self._pool

    def _move(self, device: Devices) -> None:
        devices, single = _split_devices(device)
        if devices != self._devices:
            self.close()
            self._pool, self._devices = None, devices
        self.model.to(single)


def _split_devices(device: Any) -> tuple[list[str], Any]:
    """The devices of worker processes, if there are several, and the device of the model in this process."""
    if device is None or isinstance(device, (str, int, torch.device)):
        return [], None if device is None else torch.device(device)
    return check_devices(device), torch.device("cpu")
