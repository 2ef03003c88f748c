"""A reranker in mteb: `mteb.evaluate(MTEBCrossEncoder(cross_encoder), tasks)`."""

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
    Follows mteb's `CrossEncoderProtocol` (mteb 2), so that `mteb.evaluate` accepts a reranker.

    Args:
        cross_encoder: the reranker. Its prompt template and maximum length apply; mteb's prompts do not.
        name: `"organization/name"` of the model in mteb's results; that of the checkpoint when not given.
        revision: of the model in mteb's results.
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
        """mteb's `ModelMeta` of the reranker; raises ModuleNotFoundError where mteb is not installed."""
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
        Scores pairs.

        Args:
            inputs1, inputs2: batches whose `text` holds the queries and the passages.
            task_metadata, hf_split, hf_subset, prompt_type: not needed.
            kwargs: mteb's `encode_kwargs`. `show_progress_bar` is followed; `batch_size` is not: batches go by tokens.

        Returns:
            float32 scores of shape `(num_pairs,)`, in the order of the input.

        Raises:
            ValueError: the two inputs differ in length, or a batch has no text.
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
