"""Mining as a job: from a source of rows to a file of rows with negatives, which goes on after a kill."""

import gzip
import json
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from tqdm.auto import tqdm

from ...configuration_llama_bidir import check_checkpoint_path
from ...cross_encoder import CrossEncoder
from ...data.corpus import open_corpus
from ...utils.outputs import check_apart, check_free
from ...utils.validation import check_positive_int
from .candidates import CandidateFinder
from .journal import Journal, open_journal, remove_finished
from .selection import DEFAULT_SELECTION, REASONS, Selection
from .sources import describe_state, open_source
from .windows import WINDOW_PAIRS, MinedRow, check_teacher, mine_windows

MODEL_FILES = ("*.safetensors", "*.bin", "*.json", "*.gguf")
SHOWN_ROWS = 10
# What `MiningResult.format` calls the reasons.
SAID = {
    "empty": "empty",
    "positive": "positives of their row",
    "skipped": "skipped at the top",
    "margin": "not below the margin",
    "max_score": "above the maximum score",
    "duplicate": "near-duplicates",
    "surplus": "more than needed",
}


class MiningResult(NamedTuple):
    """
    What became of a source of rows.

    Args:
        num_rows: of the source.
        num_written: of the output.
        num_candidates: of all rows.
        num_negatives: that were taken of them.
        removed: how many were not, by reason (see [`select_negatives`]).
        without_negatives: what errors call the rows for which no candidate passed.
    """

    num_rows: int
    num_written: int
    num_candidates: int
    num_negatives: int
    removed: dict[str, int]
    without_negatives: list[str]

    def format(self) -> str:
        """The result as text."""
        removed = [f"{self.removed[reason]:,} {SAID[reason]}" for reason in REASONS if self.removed[reason]]
        lines = [
            f"{self.num_rows:,} rows, {self.num_written:,} written; {self.num_candidates:,} candidates, "
            f"{self.num_negatives:,} negatives",
            f"not taken: {', '.join(removed) or 'none'}",
        ]
        if num_without := len(self.without_negatives):
            is_kept = self.num_written == self.num_rows
            fate = "written with an empty neg_doc" if is_kept else "left out (--keep-empty writes them)"
            more = f" and {num_without - SHOWN_ROWS:,} more" if num_without > SHOWN_ROWS else ""
            shown = ", ".join(self.without_negatives[:SHOWN_ROWS])
            lines.append(f"{num_without:,} rows without a negative, {fate}: {shown}{more}")
        return "\n".join(lines)


def mine_file(
    model: str,
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    corpus: str | os.PathLike[str] | None = None,
    run: str | os.PathLike[str] | None = None,
    qrels: str | None = None,
    candidates: str = "auto",
    depth: int = 100,
    selection: Selection = DEFAULT_SELECTION,
    keep_empty: bool = False,
    batch_size: int | None = None,
    device: str | Sequence[str] | None = None,
    dtype: str | None = None,
    max_length: int | None = None,
    overwrite: bool = False,
    window_pairs: int = WINDOW_PAIRS,
) -> MiningResult:
    """
    Mines hard negatives for the rows of a source and writes rows that `llama-bidir train` reads.

    A job that was stopped goes on when it is started again with the same arguments; device and batch size may differ.
    The output appears when all rows are done, byte for byte as from a job that was never stopped; on a GPU, where the
    tokens of a batch follow the memory that is free, last digits of scores may differ.

    Args:
        model: the teacher, a checkpoint or the id of a Hub repository.
        source: rows, a `*.jsonl` file or what else [`open_source`] reads.
        output: a `*.jsonl` or `*.jsonl.gz` file; its folder is made when missing.
        corpus: BEIR's JSON Lines, for candidates of BM25 or of a run. A BEIR folder has its own.
        run: TREC's six columns. Rows then need `query_id`, `question_id` or `_id`.
        qrels: of a BEIR folder, a path in it.
        candidates, depth: see [`CandidateFinder`].
        selection: which candidates become negatives.
        keep_empty: write the rows without a negative as well, with an empty `neg_doc`.
        batch_size, device, dtype, max_length: see [`CrossEncoder`].
        overwrite: replace `output`, and begin anew where a stopped job had other arguments.
        window_pairs: how many pairs are scored between two notes of what is done.

    Raises:
        FileExistsError: there is an output already, and `overwrite` is not set.
        FileNotFoundError, OSError: an input is not there or cannot be read.
        ValueError: an argument or an input breaks its rule, with file and line; a stopped job had other arguments, with
            what has changed; or no row has a negative.
    """
    source, output = os.fspath(source), Path(output)
    check_positive_int("window_pairs", window_pairs)
    check_positive_int("batch_size", batch_size)
    _check_arguments(model, source, output, depth, overwrite)
    if run is not None and candidates not in ("auto", "run"):
        raise ValueError(f"a run is given, so candidates must be 'run' (or 'auto'), got {candidates!r}")
    opened = open_source(
        source, qrels=qrels, run=None if run is None else os.fspath(run), takes_run=candidates in ("auto", "run")
    )
    if corpus is not None and opened.corpus is not None:
        raise ValueError(f"{source}: corpus must not be given for a BEIR folder, which has its own")
    documents = open_corpus(Path(corpus)) if corpus is not None else opened.corpus
    run_path = Path(run) if run is not None else opened.run
    if corpus is not None and candidates == "neg_doc":
        raise ValueError("candidates are the neg_doc of the rows, so that no corpus is searched: leave corpus out")
    inputs = {f"the source's {path.name}": path for path in opened.files}
    check_apart(
        {**inputs, "corpus": None if documents is None else documents.path, "run": run_path}, {"output": output}
    )
    finder = CandidateFinder(opened, candidates, documents, run_path, depth)
    num_rows = finder.check(source)
    cross_encoder = CrossEncoder(model, device=device, dtype=dtype, max_length=max_length)
    check_teacher(cross_encoder)
    arguments = {
        "model": _describe_model(model, cross_encoder),
        "source": opened.stamps,
        "corpus": None if documents is None else describe_state(documents.path),
        "run": None if run_path is None else describe_state(run_path),
        "candidates": candidates,
        "depth": depth,
        **asdict(selection),
        "keep_empty": keep_empty,
        "dtype": str(cross_encoder.model.dtype),
        "max_length": cross_encoder.config.rerank_max_length,
        "window_pairs": window_pairs,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    with closing(cross_encoder), open_journal(output, arguments, overwrite=overwrite) as journal:
        rows = map(finder.find, islice(opened.read(), journal.num_rows, None))
        windows = mine_windows(cross_encoder, rows, selection, batch_size=batch_size, window_pairs=window_pairs)
        with _said_once(), _progress(num_rows, journal.num_rows) as advance:
            for window in windows:
                _append(journal, window, keep_empty=keep_empty)
                advance(window)
        result = _summarize(journal)
        if not result.num_written:
            journal.remove()
            raise ValueError(
                f"{source}: no candidate of any row passed, and nothing was written: {result.format()}. Lower the "
                "margins, or give other candidates"
            )
        journal.finish()
    return result


def _check_arguments(model: str, source: str, output: Path, depth: int, overwrite: bool) -> None:
    check_checkpoint_path(model)
    if not isinstance(depth, int) or depth < 1:
        raise ValueError(f"depth must be an int above 0, got {depth!r}")
    if not output.name.lower().endswith((".jsonl", ".jsonl.gz")):
        raise ValueError(
            f"output must end in .jsonl or .jsonl.gz, by which train knows its kind, got {os.fspath(output)!r}"
        )
    if output.is_dir():
        raise ValueError(f"output must be a file, but {os.fspath(output)!r} is a folder")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError(
            "mining runs in one process, not under torchrun or accelerate: start it without them, and name several "
            "devices to use them all, such as --device cuda:0,cuda:1"
        )
    remove_finished(output)
    check_free(output, overwrite=overwrite)


def _append(journal: Journal, window: list[MinedRow], *, keep_empty: bool) -> None:
    kept = [row for row in window if row.fields["neg_doc"] or keep_empty]
    content = b"".join(map(_format_row, kept))
    if content and journal.output.suffix.lower() == ".gz":
        content = gzip.compress(content, mtime=0)  # a member of its own: a gzip file may have several
    counts = Counter(written=len(kept))
    for row in window:
        counts.update(row.removed)
        counts.update(candidates=row.num_candidates, negatives=len(row.fields["neg_doc"]))
    journal.append(content, len(window), counts, [row.where for row in window if not row.fields["neg_doc"]])


def _format_row(row: MinedRow) -> bytes:
    try:
        return json.dumps(row.fields, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # a lone surrogate in a field that nobody reads
        return json.dumps(row.fields).encode() + b"\n"


def _summarize(journal: Journal) -> MiningResult:
    counts: Counter[str] = Counter()
    for window in journal.windows:
        counts.update(window.counts)
    without_negatives = [where for window in journal.windows for where in window.without_negatives]
    return MiningResult(
        journal.num_rows,
        counts["written"],
        counts["candidates"],
        counts["negatives"],
        {reason: counts[reason] for reason in REASONS},
        without_negatives,
    )


def _describe_model(model: str, cross_encoder: CrossEncoder) -> list[str]:
    """What tells two states of a checkpoint apart: the files of a folder, or the commit of a repository."""
    folder = Path(model)
    if folder.is_dir():
        return [describe_state(path) for pattern in MODEL_FILES for path in sorted(folder.glob(pattern))]
    return [f"{model} ({getattr(cross_encoder.config, '_commit_hash', None)})"]


@contextmanager
def _progress(num_rows: int, num_done: int) -> Iterator[Callable[[list[MinedRow]], None]]:
    """Shows a bar of rows on a terminal; what it gives is called with each window."""
    started, num_pairs = time.perf_counter(), 0
    with tqdm(total=num_rows, initial=num_done, desc="Mining", unit="row", disable=None) as bar:

        def advance(window: list[MinedRow]) -> None:
            nonlocal num_pairs
            num_pairs += sum(row.num_candidates + len(row.fields["pos_score"]) for row in window)
            bar.set_postfix_str(f"{num_pairs / (time.perf_counter() - started):.0f} pairs/s", refresh=False)
            bar.update(len(window))

        yield advance


@contextmanager
def _said_once() -> Iterator[None]:
    """Lets the scorer say once that pairs are cut, and not for every window."""
    seen: set[int] = set()

    def is_new(record: logging.LogRecord) -> bool:
        is_first = record.lineno not in seen
        seen.add(record.lineno)
        return is_first

    scoring = logging.getLogger("llama_bidir.scoring.pipeline")
    scoring.addFilter(is_new)
    try:
        yield
    finally:
        scoring.removeFilter(is_new)
