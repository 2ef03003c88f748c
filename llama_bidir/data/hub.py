"""Training rows of a dataset on the Hugging Face Hub, in NeMo AutoModel's corpus-id layout."""

import os
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from huggingface_hub import HfApi, hf_hub_download

from ..utils.extras import require
from .arrow import DocumentFiles, check_documents, iterate_files, no_progress_bars, row_features, write_dataset
from .corpus_id import Corpus, corpus_rows
from .files import read_id, read_json

if TYPE_CHECKING:
    from datasets import Dataset

PREFIX = "hf://"
METADATA = "dataset_metadata.json"
T = TypeVar("T")


class Subset(NamedTuple):
    """One subset of a dataset: what errors call it, its corpus, and the Arrow files of its rows."""

    name: str
    corpus: Corpus
    rows: DocumentFiles


def load_hub(source: str, cache_dir: str | os.PathLike[str] | None) -> tuple["Dataset", "Dataset"]:
    """
    Reads `hf://org/repo/subset`, or all subsets of `hf://org/repo`.

    A subset has a file `{subset}/dataset_metadata.json` with `corpus_id`, and two configurations with a split `train`:
    `{subset}_corpus` with the columns `id` and `text`, and `{subset}` with `question`, `pos_doc` and, optionally,
    `neg_doc`. What has been downloaded once is found again without a network.

    Returns:
        the records of the rows, whose passages are row numbers, and the documents (column `text`) that these count in.

    Raises:
        OSError: the Hub or something on it cannot be reached, and it is not in the cache.
        ValueError: the name or the content breaks its rule. Rows that do become records with `error`.
    """
    datasets = require("datasets", "train")
    repo_id, subset_name = parse_hub_source(source)
    names = [subset_name] if subset_name else _list_subsets(repo_id, source)
    texts: list[Dataset] = []
    subsets: list[Subset] = []
    for name in names:
        subset, documents = _load_subset(repo_id, name, sum(dataset.num_rows for dataset in texts), cache_dir)
        subsets.append(subset)
        texts.append(documents)
    rows = write_dataset(_generate_rows, row_features("int64"), {"subsets": tuple(subsets)}, cache_dir)
    return rows, datasets.concatenate_datasets(texts)


def parse_hub_source(source: str) -> tuple[str, str]:
    """Returns repository and subset (empty for all) of `hf://org/repo/subset`; raises ValueError for other names."""
    organization, _, rest = source.removeprefix(PREFIX).strip("/").partition("/")
    repository, _, subset = rest.partition("/")
    if not source.startswith(PREFIX) or not organization or not repository:
        raise ValueError(f"a dataset on the Hub is named hf://org/repo/subset or hf://org/repo, got {source!r}")
    return f"{organization}/{repository}", subset


def _list_subsets(repo_id: str, source: str) -> list[str]:
    files = _ask_hub(source, lambda: HfApi().list_repo_files(repo_id, repo_type="dataset"))
    names = sorted(os.path.dirname(file) for file in files if file.endswith(f"/{METADATA}"))
    if not names:
        raise ValueError(f"{source}: no folder of the dataset holds a {METADATA}, which would make it a subset")
    return names


def _load_subset(
    repo_id: str, name: str, first_row: int, cache_dir: str | os.PathLike[str] | None
) -> tuple[Subset, "Dataset"]:
    datasets = require("datasets", "train")
    source = f"{PREFIX}{repo_id}/{name}"
    cache = None if cache_dir is None else os.fspath(cache_dir)
    file = _ask_hub(source, lambda: hf_hub_download(repo_id, f"{name}/{METADATA}", repo_type="dataset"))
    metadata = read_json(Path(file))
    if metadata.get("ids_only"):
        raise ValueError(
            f"{source}: {METADATA} says ids_only: the dataset holds identifiers without texts. Add the texts as NeMo "
            "AutoModel's data preparation does, and train on the .json file that comes out"
        )
    corpus_id = read_id(metadata, "corpus_id", f"{source}: {METADATA}")

    def load(config: str) -> "Dataset":
        with no_progress_bars():
            return datasets.load_dataset(repo_id, config, split="train", cache_dir=cache, keep_in_memory=False)

    documents = _ask_hub(source, lambda: load(f"{name}_corpus"))
    rows = _ask_hub(source, lambda: load(name))
    missing = [column for column in ("question", "pos_doc") if column not in rows.column_names]
    if missing:
        raise ValueError(
            f"{source}: the rows must have the columns question and pos_doc, got {', '.join(rows.column_names)}"
        )
    corpus = Corpus(corpus_id, check_documents(documents, f"{source}_corpus", first_row=first_row))
    paths = tuple(item["filename"] for item in rows.cache_files)
    subset = Subset(source, corpus, DocumentFiles(source, paths, rows._fingerprint))
    return subset, documents.select_columns("text")


def _ask_hub(source: str, ask: Callable[[], T]) -> T:
    """Returns what `ask` returns; whatever the clients of the Hub raise becomes one OSError of one line."""
    try:
        return ask()
    except Exception as error:
        # They have no common class: huggingface_hub lets the errors of its HTTP library through, which its versions
        # differ in.
        is_wrapped = isinstance(error, require("datasets", "train").exceptions.DatasetGenerationError)
        reason = textwrap.shorten(str(error.__cause__ if is_wrapped else error), 300, placeholder=" ...").rstrip(".")
        raise OSError(
            f"{source}: cannot be read from the Hub: {reason}. Check the name, the network and, for a private "
            "dataset, HF_TOKEN"
        ) from error


def _generate_rows(subsets: tuple[Subset, ...], version: int) -> Iterator[dict[str, Any]]:
    for subset in subsets:
        rows = ((f"{subset.name}: train[{number}]", row) for number, row in enumerate(_iterate_rows(subset.rows.paths)))
        yield from corpus_rows(rows, [subset.corpus], corpus_id=subset.corpus.corpus_id)


def _iterate_rows(paths: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    for columns in iterate_files(paths):
        for values in zip(*columns.values(), strict=True):
            yield dict(zip(columns, values, strict=True))
