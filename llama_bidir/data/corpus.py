"""The corpus that documents are read from, memory-mapped and cached once."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ..utils.extras import require
from .arrow import FileStamp, stamp, write_dataset
from .trec import read_documents

if TYPE_CHECKING:
    from datasets import Dataset

Numbers = npt.NDArray[np.int64]


class Corpus:
    """
    Documents by row number.

    Args:
        dataset: memory-mapped, with the columns `id` and `text`.
        path: of the file that it was read from.
    """

    def __init__(self, dataset: "Dataset", path: Path):
        self.dataset, self.path = dataset, path
        self._ids = dataset.select_columns("id").with_format("arrow")
        self._texts = dataset.select_columns("text").with_format("arrow")

    def ids(self, rows: Sequence[int]) -> list[str]:
        return self._ids[list(rows)]["id"].to_pylist()

    def texts(self, rows: Sequence[int]) -> list[str]:
        return self._texts[list(rows)]["text"].to_pylist()

    def all_ids(self) -> Iterator[str]:
        for batch in self._ids.iter(1000):
            yield from batch["id"].to_pylist()

    def all_texts(self) -> Iterator[str]:
        for batch in self._texts.iter(1000):
            yield from batch["text"].to_pylist()

    def text_bytes(self) -> Numbers:
        """UTF-8 bytes of each document's text."""
        pc = require("pyarrow.compute", "train")
        return pc.binary_length(self.dataset.data.column("text")).to_numpy().astype(np.int64)


def open_corpus(path: Path, cache_dir: str | os.PathLike[str] | None = None) -> Corpus:
    """
    Opens a corpus in BEIR's JSON Lines; the first time it is read and checked, and written as an Arrow file.

    Args:
        path: of the file.
        cache_dir: where the Arrow file is kept (see [`~data.arrow.write_dataset`]).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line breaks its rule, with file and line.
    """
    datasets = require("datasets", "train")
    text = datasets.Value("string")
    arguments = {"path": os.fspath(path), "state": stamp(path)}
    return Corpus(write_dataset(_generate_documents, datasets.Features(id=text, text=text), arguments, cache_dir), path)


def _generate_documents(path: str, state: FileStamp, version: int) -> Iterator[dict[str, str]]:
    for doc_id, text in read_documents(Path(path)):
        yield {"id": doc_id, "text": text}
