"""An adapter for mteb: `mteb.evaluate(MTEBCrossEncoder(cross_encoder), tasks)`."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from ..cross_encoder import CrossEncoder

Batches = Iterable[Mapping[str, Sequence[Any]]]


class MTEBCrossEncoder:
    """
    A reranker for `mteb.evaluate`, which implements the `CrossEncoderProtocol` of mteb 2.

    Args:
        cross_encoder: the reranker. Its prompt template and maximum length apply, and mteb's prompts are ignored.
        name: `"organization/name"` of the model in mteb's results. By default, the name of the checkpoint.
        revision: revision of the model in mteb's results.

    Raises:
        ValueError: `name` is not `"organization/name"`.
    """

    def __init__(self, cross_encoder: "CrossEncoder", *, name: str | None = None, revision: str | None = None):
        self.cross_encoder = cross_encoder
        checkpoint = cross_encoder.config.name_or_path
        if name is None and checkpoint:
            name = checkpoint if _is_hub_id(checkpoint) else f"local/{Path(checkpoint).name}"
        if name is not None and not _is_hub_id(name):
            raise ValueError(f"name must be 'organization/name', got {name!r}")
        self.name, self.revision = name, revision

    @property
    def mteb_model_meta(self) -> Any:
        """mteb's `ModelMeta` of the reranker. Raises ModuleNotFoundError if mteb is not installed."""
        fields = {
            "name": self.name,
            "revision": self.revision,
            "n_parameters": self.cross_encoder.model.num_parameters(),
            "max_tokens": self.cross_encoder.config.rerank_max_length,
            "framework": ["PyTorch"],
            "model_type": ["cross-encoder"],
        }
        given = {name: value for name, value in fields.items() if value is not None}
        return import_module("mteb.models").ModelMeta.create_empty(given)

    def predict(
        self,
        inputs1: Batches,
        inputs2: Batches,
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: Any = None,
        **kwargs: Any,
    ) -> NDArray[np.float32]:
        """
        Scores pairs of queries and passages.

        Args:
            inputs1, inputs2: batches with the queries and with the passages, each under the key `text`.
            task_metadata, hf_split, hf_subset, prompt_type: part of the protocol, ignored.
            kwargs: mteb's `encode_kwargs`. Only `show_progress_bar` applies: batches are formed by tokens, so
                `batch_size` is ignored.

        Returns:
            float32 scores of shape `(num_pairs,)`, in the order of the input.

        Raises:
            ValueError: the inputs have different lengths, or a batch has no `text`.
        """
        pairs = list(zip(_texts(inputs1), _texts(inputs2), strict=True))
        scores: NDArray[np.float32] = self.cross_encoder.predict(
            pairs, show_progress_bar=kwargs.get("show_progress_bar")
        )
        return scores


def _texts(batches: Batches) -> Iterator[str]:
    for batch in batches:
        if "text" not in batch:
            raise ValueError(f"a batch must have text, got {', '.join(batch)}: the reranker reads no other input")
        yield from batch["text"]


def _is_hub_id(name: str) -> bool:
    return name.count("/") == 1 and all(name.split("/")) and not name.startswith((".", "~"))
