"""CrossEncoder: scores and ranks passages with a bidirectional Llama reranker."""

import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Self

import numpy as np
import torch
from huggingface_hub import HfApi
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .configuration_llama_bidir import LlamaBidirectionalConfig, check_rerank_max_length
from .loading import HUB_ARGUMENTS, check_reranker, default_device, load_reranker
from .model_card import write_model_card
from .packing import PACKED_SDPA, batches_by_tokens, pack
from .prompts import PromptEncoder, ensure_pad_token
from .validation import check_pairs, check_positive_int, check_text, check_texts, describe

logger = logging.getLogger(__name__)

# Small batches stay in the caches of a CPU.
PACKED_TOKENS = 2048
PADDED_PAIRS = 32
Activation = Callable[[torch.Tensor], torch.Tensor]


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
        device: such as `"cuda:1"` or `"cpu"`; the first accelerator when there is one, else the CPU.
        dtype: `torch.dtype` or its name; the checkpoint's on an accelerator, float32 on the CPU.
        max_length: most tokens of a rendered pair, special tokens included; saved as `rerank_max_length`.
        prompt_template: text with one `{query}` and one `{passage}`.
        activation_fn: applied to the logits of shape `(num_pairs,)` or `(num_pairs, num_labels)`; not saved.
        num_labels: outputs of the head.
        revision, token, cache_folder, local_files_only: where and how files are fetched from the Hub.
        model_kwargs, tokenizer_kwargs: passed on to `from_pretrained` of the model and of the tokenizer.
        backend: `"torch"`.

    Raises:
        ValueError: a value breaks its rule, or the checkpoint is no Llama.
        OSError: there is no checkpoint at that place.
    """

    def __init__(
        self,
        model_name_or_path_or_model: str | os.PathLike[str] | PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        device: str | torch.device | None = None,
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
    ):
        if backend != "torch":
            raise ValueError(f"backend must be 'torch', got {backend!r}")
        if isinstance(model_name_or_path_or_model, (str, os.PathLike)):
            given = {
                "revision": revision,
                "token": token,
                "cache_dir": cache_folder,
                "local_files_only": local_files_only or None,
                "num_labels": num_labels,
            }
            given = {name: value for name, value in given.items() if value is not None}
            model_kwargs = {**given, **(model_kwargs or {})}
            if device is not None and "device_map" in model_kwargs:
                raise ValueError(f"device {str(device)!r} and a device_map in model_kwargs exclude each other")
            if "device_map" not in model_kwargs:
                device = torch.device(device or default_device())
            dtype = dtype or model_kwargs.pop("dtype", None) or model_kwargs.pop("torch_dtype", None)
            if dtype is None:
                on_cpu = device is not None and torch.device(device).type == "cpu"
                dtype = torch.float32 if on_cpu else "auto"
            name_or_path = os.fspath(model_name_or_path_or_model)
            self.model = load_reranker(name_or_path, {**model_kwargs, "dtype": dtype})
            if tokenizer is None:
                # A GGUF file holds its tokenizer, and a subfolder has one of its own.
                source = {name: model_kwargs[name] for name in (*HUB_ARGUMENTS, "gguf_file") if name in model_kwargs}
                tokenizer = AutoTokenizer.from_pretrained(name_or_path, **{**source, **(tokenizer_kwargs or {})})
        else:
            self.model = check_reranker(model_name_or_path_or_model, num_labels)
            if tokenizer is None:
                raise TypeError("a loaded model needs its tokenizer: CrossEncoder(model, tokenizer)")
            if dtype is not None and dtype != "auto":
                # Not `model.to(dtype)`, which would round the frequencies of the rotary embedding as well.
                for parameter in self.model.parameters():
                    parameter.data = parameter.data.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)
        if device is not None:
            self.model.to(device)
        if self.device.type == "cpu" and self.config._attn_implementation == "sdpa":
            self.model.set_attn_implementation(PACKED_SDPA)
        self.model.eval()

        self.tokenizer = tokenizer
        self.activation_fn = activation_fn
        # Checked together before the configuration, which may be the caller's, is changed.
        template = self.config.prompt_template if prompt_template is None else prompt_template
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
        device: str | torch.device | None = None,
    ) -> Any:
        """
        Scores pairs.

        Args:
            pairs: one (query, passage) pair, or an iterable of them. Either text may be empty.
            batch_size: at most so many pairs a forward pass. When not given, a CPU takes 2,048 tokens without padding,
                and another device 32 padded pairs.
            show_progress_bar: shown when not given and this module logs at INFO.
            activation_fn: for this call instead of the one given at construction.
            apply_softmax: softmax over the labels, where there are several.
            convert_to_numpy: return a numpy array; if False, a list of tensors.
            convert_to_tensor: return one tensor instead.
            device: move the model there first.

        Returns:
            float32 scores in input order: of shape `(num_pairs,)`, or `(num_pairs, num_labels)` for several labels. A
            single pair gives a scalar, or `(num_labels,)`.

        Raises:
            TypeError, ValueError: the pairs are not pairs of strings, with the position.
        """
        checked_pairs, is_single = check_pairs(pairs)
        check_positive_int("batch_size", batch_size)
        if device is not None:
            self.model.to(device)
        logits = self._compute_logits(checked_pairs, batch_size, show_progress_bar)
        scores = logits.squeeze(-1) if self.config.num_labels == 1 else logits
        activation_fn = activation_fn or self.activation_fn
        if activation_fn is not None:
            scores = activation_fn(scores)
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
        device: str | torch.device | None = None,
    ) -> list[dict[str, Any]]:
        """
        Ranks documents for a query.

        Args:
            query: the query.
            documents: an iterable of passages.
            top_k: how many of the best to return; all when not given.
            return_documents: add the passage to each result as `text`.
            batch_size, show_progress_bar, activation_fn, device: as in [`predict`].

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
        device: str | torch.device | None = None,
    ) -> list[list[dict[str, Any]]]:
        """
        Ranks documents for each of several queries, scored together.

        Args:
            queries: the queries.
            documents_per_query: one iterable of passages a query.
            top_k, return_documents, batch_size, show_progress_bar, activation_fn, device: as in [`rank`].

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

    def save_pretrained(self, directory: str | os.PathLike[str], *, model_id: str | None = None, **kwargs: Any) -> None:
        """
        Saves model, configuration, tokenizer and, where there is none yet, a model card.

        Args:
            directory: made when missing.
            model_id: the name that the card's code loads; `directory` when not given.
            kwargs: for the model's `save_pretrained`, such as `max_shard_size`.
        """
        self.model.save_pretrained(directory, **kwargs)
        self.config.save_pretrained(directory)  # an adapter does not save it
        self.tokenizer.save_pretrained(directory)
        if not os.path.exists(os.path.join(directory, "README.md")):
            write_model_card(directory, self.config, model_id or os.fspath(directory))

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
            kwargs: for the model's `save_pretrained`, such as `max_shard_size`.

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

    def _compute_logits(
        self, pairs: Sequence[tuple[str, str]], batch_size: int | None, show_progress_bar: bool | None
    ) -> torch.Tensor:
        """Float32 logits of shape `(num_pairs, num_labels)` on the CPU, in input order."""
        prompt_encoder = PromptEncoder(
            self.tokenizer,
            prompt_template=self.config.prompt_template,
            max_length=self.config.rerank_max_length,
        )
        input_ids, num_truncated = prompt_encoder.encode(pairs)
        if num_truncated:
            logger.warning(
                f"{num_truncated} of {len(pairs)} pairs were longer than {self.config.rerank_max_length} tokens and "
                "were cut to fit: raise max_length to keep more"
            )
        if show_progress_bar is None:
            show_progress_bar = logger.isEnabledFor(logging.INFO)
        max_tokens = PACKED_TOKENS if self._is_packed else sys.maxsize
        if not self._is_packed:
            batch_size = batch_size or PADDED_PAIRS
        logits = torch.empty(len(input_ids), self.model.config.num_labels)
        with tqdm(total=len(input_ids), desc="Scoring", unit="pair", disable=not show_progress_bar) as progress:
            lengths = [len(ids) for ids in input_ids]
            for indices in batches_by_tokens(lengths, max_tokens=max_tokens, max_sequences=batch_size):
                logits[indices] = self._forward([input_ids[index] for index in indices]).cpu()
                progress.update(len(indices))
        return logits

    @property
    def _is_packed(self) -> bool:
        return self.config._attn_implementation == PACKED_SDPA

    @torch.inference_mode()
    def _forward(self, input_ids: list[list[int]]) -> torch.Tensor:
        if self._is_packed:
            return self.model(**pack(input_ids, self.device)).logits
        batch = self.tokenizer.pad({"input_ids": input_ids}, return_tensors="pt").to(self.device)
        return self.model(**batch).logits
