"""CrossEncoder: scores and ranks passages with a bidirectional Llama reranker."""

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Any, Self, Unpack

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .checkpoints.loading import open_reranker
from .checkpoints.saving import SavedReranker
from .fields_llama_bidir import check_num_labels
from .prompts import Pair, PromptEncoder, check_long_document
from .scoring.device import Devices, split_devices
from .scoring.distributed import is_shared, score_shared
from .scoring.engine import Engine
from .scoring.finite import RankedActivation
from .scoring.forks import leave_threads_of_parent
from .scoring.int8 import is_int8
from .scoring.pipeline import (
    Scorer,
    ScoringOptions,
    check_limits,
    check_ranking,
    convert_scores,
    rank_documents,
    score_chunks,
)
from .scoring.placement import Placement
from .scoring.probability import Activation, Probability, resolve_activation
from .utils.validation import check_chunks, check_groups, check_positive_int, check_text, check_texts, read_pairs

logger = logging.getLogger(__name__)


class CrossEncoder(SavedReranker):
    """
    Scores (query, passage) pairs and ranks passages.

    The score is the raw logit of the model, unless an activation is given. The prompt template and the maximum length
    come from the arguments, else from the checkpoint, else from their defaults, and are saved with the checkpoint.

    Args:
        model_name_or_path_or_model: a folder, the id of a Hub repository, or a loaded
            [`LlamaBidirectionalForSequenceClassification`], which keeps its attention, layers, mode and dtype. A plain
            Llama language model gets a new, untrained head. A plain Llama with a trained head needs `is_causal` or
            `pooling` in `model_kwargs`. An adapter (LoRA) is loaded onto the base model that it names.
        tokenizer: the model's fast tokenizer. By default, it is loaded from the same place as the model. A tokenizer
            without a pad token gets one (see [`~prompts.ensure_pad_token`]).
        device: such as `"cuda:1"`. Defaults to the first accelerator, or to the CPU if there is none. A list, such as
            `["cuda:0", "cuda:1"]`, scores in one worker process per device (see [`~scoring.workers.WorkerPool`]).
        dtype: `torch.dtype` or its name, or `"int8"` (see [`~scoring.int8.Int8Linear`]). On an accelerator, the default
            is the dtype of the checkpoint. On a CPU, it is bfloat16 if the checkpoint is stored in bfloat16 and the CPU
            multiplies bfloat16 faster, else float32.
        max_length: maximum tokens of a rendered pair, special tokens included; saved as `rerank_max_length`.
        prompt_template: text with one `{query}`, one `{passage}` and at most one `{instruction}`.
        instruction: the text for `{instruction}` in calls that give none. It is saved with the checkpoint.
        activation_fn: applied to the logits of shape `(num_pairs,)` or `(num_pairs, num_labels)`; not saved.
            `"probability"` gives the calibrated probability of relevance (see [`~scoring.probability.Probability`]).
        num_labels: outputs of the head.
        revision, token, cache_folder, local_files_only: where and how files are fetched from the Hub.
        model_kwargs, tokenizer_kwargs: for `from_pretrained` of the model and of the tokenizer. Pickled weights are
            refused unless `model_kwargs={"use_safetensors": False}` asks for torch's safe loader.
        backend: `"torch"`, or `"onnx"` for an exported folder, in onnxruntime on a CPU. With `"onnx"`,
            `model_kwargs={"file_name": "model_int8.onnx"}` chooses another graph of the folder.
        long_document: `"truncate"` cuts the end of a passage that does not fit into `max_length`. `"max"` and
            `"first_max"` score it in windows and keep the best score (see [`~prompts.PromptEncoder.encode`]).
        parse_special_tokens: read control tokens that a query or a passage spells, such as `<|eot_id|>`. By default,
            they are tokenized as ordinary text.
        max_tokens_per_batch: maximum tokens of a forward pass; chosen for the device and the model when not given.
        distributed: under torchrun or accelerate, share the pairs of each call among the processes. Every process must
            then make the same calls, and gets all scores. By default each process scores for itself.

    Raises:
        OSError, ValueError: there is no such checkpoint, it is not a Llama, or a value breaks its rule.
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
        instruction: str | None = None,
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
        parse_special_tokens: bool = False,
        max_tokens_per_batch: int | None = None,
        distributed: bool = False,
    ):
        self.max_tokens_per_batch = check_positive_int("max_tokens_per_batch", max_tokens_per_batch)
        check_num_labels(num_labels)
        self.long_document = check_long_document(long_document)
        self.distributed, self.activation_fn = distributed, activation_fn
        self.parse_special_tokens = parse_special_tokens
        devices = split_devices(device)
        leave_threads_of_parent()
        hub = {"revision": revision, "token": token, "cache_dir": cache_folder, "local_files_only": local_files_only}
        opened = open_reranker(
            model_name_or_path_or_model,
            tokenizer,
            backend=backend,
            devices=devices,
            dtype=dtype,
            num_labels=num_labels,
            prompt_template=prompt_template,
            instruction=None if instruction is None else check_text("instruction", instruction),
            max_length=max_length,
            hub=hub,
            model_kwargs=model_kwargs or {},
            tokenizer_kwargs=tokenizer_kwargs or {},
        )
        self.model, self.tokenizer, self._stored_dtype = opened.model, opened.tokenizer, opened.stored_dtype
        self._placement = Placement(self.model, devices.workers)
        resolve_activation(activation_fn, self.config)

    @classmethod
    def from_pretrained(cls, model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Self:
        """Same as `CrossEncoder(model_name_or_path, ...)`."""
        return cls(model_name_or_path, **kwargs)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device

    @property
    def devices(self) -> list[torch.device]:
        """Where pairs are scored: the device of the model, or those of its worker processes."""
        return [*map(torch.device, self._placement.worker_devices)] or [self.device]

    def __repr__(self) -> str:
        dtype = "'int8'" if is_int8(self.model) else self.model.dtype
        fields = f"device={str(self.device)!r}, dtype={dtype}, max_length={self.config.rerank_max_length}"
        return f"{type(self).__name__}({self.config.name_or_path or type(self.model).__name__!r}, {fields})"

    def __getstate__(self) -> dict[str, Any]:
        # The copy in another process gets the model, but not the locks, the worker processes and the device limits.
        return {**vars(self), "_placement": self._placement.worker_devices}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _placement=Placement(state["model"], state["_placement"]))

    def predict(
        self,
        pairs: Any,
        batch_size: int | None = None,
        *,
        instruction: str | None = None,
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
            pairs: one (query, passage) pair, an iterable of them, or a table of two columns, the query first unless
                their names say otherwise. A generator is read and checked chunk by chunk, so memory stays bounded.
                Anything else is checked before any compute.
            batch_size: maximum pairs of a forward pass.
            instruction: the text for the `{instruction}` of the template, instead of that of the checkpoint.
            show_progress_bar: whether to show a progress bar. The default shows it if this module logs at INFO.
            activation_fn: for this call instead of the one given at construction.
            apply_softmax: softmax over the labels, where there are several.
            convert_to_numpy, convert_to_tensor: return a numpy array, one tensor, or for neither a list of tensors.
            device: move the model there first; a list of devices as at construction.
            long_document, max_tokens_per_batch: for this call instead of those given at construction.

        Returns:
            float32 scores in input order: of shape `(num_pairs,)`, or `(num_pairs, num_labels)` for several labels. A
            single pair gives a scalar, or `(num_labels,)`. If logits are NaN or infinite, a warning names the first
            position and the likely cause.

        Raises:
            TypeError, ValueError: the pairs are not pairs of strings, with the position, or the template has no
                `{instruction}`.
            torch.OutOfMemoryError: a single pair does not fit in memory.
            RuntimeError: a worker process failed, with its traceback.
        """
        checked_pairs, num_pairs, is_single = read_pairs(pairs)
        batch_size, max_tokens_per_batch = check_limits(batch_size, max_tokens_per_batch, long_document)
        self._placement.move(self.model, device)
        is_shown = logger.isEnabledFor(logging.INFO) if show_progress_bar is None else show_progress_bar
        with tqdm(total=num_pairs, desc="Scoring", unit="pair", disable=not is_shown) as progress:
            scorer = self._scorer(progress, batch_size, max_tokens_per_batch, long_document, activation_fn, instruction)
            is_distributed = self.distributed and is_shared(self.device)
            scores = score_shared(checked_pairs, scorer) if is_distributed else scorer.score(checked_pairs)
        scorer.log()
        scores = scores.softmax(dim=-1) if apply_softmax and scores.ndim == 2 else scores
        return convert_scores(scores, is_single=is_single, to_numpy=convert_to_numpy, to_tensor=convert_to_tensor)

    def predict_chunks(
        self,
        chunks: Iterable[Sequence[Pair]],
        batch_size: int | None = None,
        *,
        instruction: str | None = None,
        activation_fn: Activation | None = None,
        long_document: str | None = None,
        max_tokens_per_batch: int | None = None,
        progress: "tqdm[Any] | None" = None,
    ) -> Iterator[np.ndarray]:
        """
        Scores chunks of pairs one after the other, for work that does not fit in memory or must resume. A chunk is
        scored on its own, so its scores do not depend on the chunks before it. What [`predict`] reports in warnings is
        counted over all chunks and reported once, after the last.

        Args:
            chunks: lists of (query, passage) pairs, or of (query, passage, instruction), read one at a time.
            batch_size, instruction, activation_fn, long_document, max_tokens_per_batch: as in [`predict`].
            progress: a bar to advance by the pairs that are scored.

        Yields:
            the float32 scores of each chunk, of the shapes that [`predict`] returns.
        """
        batch_size, max_tokens_per_batch = check_limits(batch_size, max_tokens_per_batch, long_document)
        bar = tqdm(disable=True) if progress is None else progress
        scorer = self._scorer(bar, batch_size, max_tokens_per_batch, long_document, activation_fn, instruction)
        return score_chunks(scorer, check_chunks(chunks))

    def rank(
        self,
        query: str,
        documents: Sequence[str],
        top_k: int | None = None,
        return_documents: bool = False,
        batch_size: int | None = None,
        **options: Unpack[ScoringOptions],
    ) -> list[dict[str, Any]]:
        """
        Ranks documents for a query.

        Args:
            query, documents: the query and an iterable of passages.
            top_k: how many of the best results to return; all when not given.
            return_documents: add the passage to each result as `text`.
            batch_size, options: see [`predict`].

        Returns:
            `{"corpus_id": int, "score": float}` dicts by falling score; equal scores keep the order of `documents`.
            `corpus_id` is the position in `documents`.

        Raises:
            TypeError, ValueError: something is not a string, the model has several labels, or a logit is NaN or
                infinite.
        """
        query, documents = check_text("query", query), check_texts("documents", documents)
        return self.rank_batch([query], [documents], top_k, return_documents, batch_size, **options)[0]

    def rank_batch(
        self,
        queries: Sequence[str],
        documents_per_query: Sequence[Sequence[str]],
        top_k: int | None = None,
        return_documents: bool = False,
        batch_size: int | None = None,
        **options: Unpack[ScoringOptions],
    ) -> list[list[dict[str, Any]]]:
        """
        Ranks documents for each of several queries, scored together.

        Args:
            queries, documents_per_query: the queries and, for each, an iterable of passages.
            top_k, return_documents, batch_size, options: as in [`rank`].

        Returns:
            one list of results per query, each as [`rank`] returns it.

        Raises:
            TypeError, ValueError: as in [`rank`], and when the two lists differ in length.
        """
        queries, groups = check_groups(queries, documents_per_query)
        top_k = check_ranking(self.config, top_k, options)
        pairs = [(query, document) for query, documents in zip(queries, groups, strict=True) for document in documents]
        activation = resolve_activation(options.get("activation_fn") or self.activation_fn, self.config)
        probability = activation if isinstance(activation, Probability) else None
        ranked = None if probability else activation
        options["activation_fn"] = RankedActivation(ranked, queries, groups, self.model)
        scores = iter(self.predict(pairs, batch_size, **options).tolist())
        rankings = [
            rank_documents(query, documents, list(islice(scores, len(documents))), top_k, return_documents)
            for query, documents in zip(queries, groups, strict=True)
        ]
        if probability is not None:  # only now, because rounding makes those of high scores equal
            for result in chain.from_iterable(rankings):
                result["score"] = probability(torch.tensor(result["score"])).item()
        return rankings

    def close(self) -> None:
        """Stops the worker processes, if there are any; the next call starts them again."""
        self._placement.close()

    def engine(self) -> Engine:
        """Returns what computes the logits, with its worker processes started."""
        return self._placement.engine(self.model)

    def _scorer(
        self,
        progress: "tqdm[Any]",
        batch_size: int | None,
        max_tokens_per_batch: int | None,
        long_document: str | None,
        activation_fn: Activation | None,
        instruction: str | None,
    ) -> Scorer:
        encoder = PromptEncoder.from_config(
            self.tokenizer,
            self.config,
            instruction=None if instruction is None else check_text("instruction", instruction),
            parse_special_tokens=self.parse_special_tokens,
        )
        return Scorer(
            encoder,
            self.engine(),
            progress,
            num_labels=self.model.config.num_labels,
            max_tokens=max_tokens_per_batch or self.max_tokens_per_batch,
            max_sequences=batch_size,
            long_document=long_document or self.long_document,
            activation_fn=resolve_activation(activation_fn or self.activation_fn, self.config),
            model=self.model,
        )
