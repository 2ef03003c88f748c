"""Training rows of a dataset on the Hugging Face Hub, in NeMo AutoModel's corpus-id layout."""

import os
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from huggingface_hub import HfApi, hf_hub_download

from ..utils.extras import require
from .arrow import ArrowFiles, load_train_split, record_features, write_dataset
from .corpus import Corpus, join_texts
from .corpus_id import corpus_rows
from .files import read_id, read_json

if TYPE_CHECKING:
    from datasets import Dataset

PREFIX = "hf://"
METADATA = "dataset_metadata.json"
T = TypeVar("T")


class Subset(NamedTuple):
    """One subset of a dataset: its name in errors, its corpus, the `corpus_id` of the corpus, and its rows."""

    name: str
    corpus_id: str
    corpus: Corpus
    rows: ArrowFiles


def load_hub(
    source: str, cache_dir: str | os.PathLike[str] | None, *, ignore_identical_ids: bool = True
) -> tuple["Dataset", "Dataset"]:
    """
    Reads `hf://org/repo/subset`, or all subsets of `hf://org/repo`.

    A subset has a file `{subset}/dataset_metadata.json` with `corpus_id`, and two configurations with a split `train`:
    `{subset}_corpus` with the columns `id` and `text`, and `{subset}` with `question`, `pos_doc` and, optionally,
    `neg_doc`. A subset that has been downloaded once needs no network the next time.

    Args:
        source: the name, as above.
        cache_dir, ignore_identical_ids: see [`load_rows`].

    Returns:
        the records of the rows, whose passages are row numbers, and the documents (column `text`) that these refer to.

    Raises:
        OSError: the Hub cannot be reached or lacks a file, and the cache does not hold it.
        ValueError: the name or the content breaks its rule. A row that breaks its rule becomes a record with `error`.
    """
    repo_id, subset_name = parse_hub_source(source)
    names = [subset_name] if subset_name else _list_subsets(repo_id, source)
    subsets = tuple(_load_subset(repo_id, name, cache_dir) for name in names)
    arguments = {"subsets": subsets, "ignore_identical_ids": ignore_identical_ids}
    rows = write_dataset(_generate_rows, record_features("int64"), arguments, cache_dir)
    return rows, join_texts(subset.corpus for subset in subsets)


def parse_hub_source(source: str) -> tuple[str, str]:
    """
    Returns the repository and the subset of `hf://org/repo/subset`; the subset is empty for `hf://org/repo`.

    Raises:
        ValueError: the name has another form.
    """
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


def _load_subset(repo_id: str, name: str, cache_dir: str | os.PathLike[str] | None) -> Subset:
    source = f"{PREFIX}{repo_id}/{name}"
    file = _ask_hub(source, lambda: hf_hub_download(repo_id, f"{name}/{METADATA}", repo_type="dataset"))
    metadata = read_json(Path(file))
    if metadata.get("ids_only"):
        raise ValueError(
            f"{source}: {METADATA} says ids_only: the dataset holds identifiers without texts. Add the texts as NeMo "
            "AutoModel's data preparation does, and train on the .json file that it writes"
        )
    corpus_id = read_id(metadata, "corpus_id", f"{source}: {METADATA}")

    documents, rows = _ask_hub(
        source, lambda: [load_train_split(repo_id, each, cache_dir=cache_dir) for each in (f"{name}_corpus", name)]
    )
    if not {"question", "pos_doc"} <= set(rows.column_names):
        raise ValueError(
            f"{source}: the rows must have the columns question and pos_doc, got {', '.join(rows.column_names)}"
        )
    return Subset(source, corpus_id, Corpus(documents, f"{source}_corpus"), ArrowFiles.of(rows))


def _ask_hub(source: str, ask: Callable[[], T]) -> T:
    """Returns what `ask` returns. Whatever the clients of the Hub raise becomes an OSError of one line."""
    try:
        return ask()
    except Exception as error:
        # These errors have no common class: huggingface_hub passes on those of its HTTP library, which depends on its
        # version.
        is_wrapped = isinstance(error, require("datasets", "train").exceptions.DatasetGenerationError)
        reason = textwrap.shorten(str(error.__cause__ if is_wrapped else error), 300, placeholder=" ...").rstrip(".")
        raise OSError(
            f"{source}: cannot be read from the Hub: {reason}. Check the name, the network and, for a private "
            "dataset, HF_TOKEN"
        ) from error


def _generate_rows(subsets: tuple[Subset, ...], ignore_identical_ids: bool, version: int) -> Iterator[dict[str, Any]]:
    first = 0
    for name, corpus_id, corpus, files in subsets:
        rows = ((f"{name}: train[{number}]", row) for number, row in enumerate(files.open()))
        yield from corpus_rows(
            rows, {corpus_id: corpus}, corpus_id=corpus_id, first=first, ignore_identical_ids=ignore_identical_ids
        )
        first += len(corpus)
