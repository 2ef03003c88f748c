"""Mining of hard negatives for the rows of a source: from files to a file of rows with negatives."""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import IO, Any, Self

from ...cross_encoder import CrossEncoder
from ...data import parse_row
from ...data.corpus import Corpus, open_corpus
from ...data.identical import tell_identical
from ...files_llama_bidir import check_checkpoint_path
from ...utils.validation import check_int
from ..job import Job, run_job
from ..task import NothingToWriteError, TextPath, Window
from .candidates import CandidateFinder
from .result import MiningResult
from .selection import DEFAULT_SELECTION, REASONS, Selection
from .sources import MiningSource, SourceRow, describe_state, open_source
from .windows import LOGITS, MinedRow, ParsedRow, choose_negatives


@dataclass(kw_only=True)
class MiningTask:
    """
    Describes mining to a [`Job`]: windows of rows. For each window, the journal keeps the output lines and counts.

    Args:
        source, corpus, run, qrels, candidates, depth, selection, keep_empty, ignore_identical_ids: see [`mine_file`].

    Raises:
        ValueError: an argument breaks its rule.
    """

    source: TextPath
    corpus: TextPath | None = None
    run: TextPath | None = None
    qrels: str | None = None
    candidates: str = "auto"
    depth: int = 100
    selection: Selection = DEFAULT_SELECTION
    keep_empty: bool = False
    ignore_identical_ids: bool = True

    verb = "mine"
    label = "Mining"
    activation_fn = LOGITS

    def __post_init__(self) -> None:
        self.depth = check_int("depth", self.depth)
        if self.run is not None and self.candidates not in ("auto", "run"):
            raise ValueError(f"a run is given, so candidates must be 'run' (or 'auto'), got {self.candidates!r}")
        if self.corpus is not None and self.candidates == "neg_doc":
            raise ValueError("candidates are the neg_doc of the rows, so no corpus is searched: leave corpus out")

    def open(self, beside: Callable[[str], Path]) -> None:
        """
        Reads and checks the input.

        Raises:
            FileNotFoundError, OSError: an input is missing or cannot be read.
            ValueError: an input breaks its rule, with file and line.
        """
        source = os.fspath(self.source)
        run = None if self.run is None else os.fspath(self.run)
        takes_run = self.candidates in ("auto", "run")
        self._rows: MiningSource = open_source(
            source,
            qrels=self.qrels,
            run=run,
            takes_run=takes_run,
            ignore_identical_ids=self.ignore_identical_ids,
        )
        if self.corpus is not None and self._rows.corpus is not None:
            raise ValueError(f"{source}: corpus must not be given for a BEIR folder, which has its own")
        self._corpus: Corpus | None = self._rows.corpus if self.corpus is None else open_corpus(Path(self.corpus))
        self._run = self._rows.run if run is None else Path(run)
        self._finder = CandidateFinder(
            self._rows,
            self.candidates,
            self._corpus,
            self._run,
            self.depth,
            ignore_identical_ids=self.ignore_identical_ids,
        )
        self._num_rows = self._finder.check(source)
        self._unread: Iterator[SourceRow] = iter(())
        self._next_row = self._num_rows

    def files(self) -> dict[str, Path | None]:
        inputs = {f"the source's {path.name}": path for path in self._rows.files}
        return {**inputs, "corpus": None if self._corpus is None else self._corpus.path, "run": self._run}

    def moves(self, beside: Callable[[str], Path]) -> dict[str, tuple[Path, Path]]:
        return {}

    def describe(self) -> dict[str, Any]:
        return {
            "source": self._rows.stamps,
            "corpus": None if self._corpus is None else describe_state(self._corpus.path),
            "run": None if self._run is None else describe_state(self._run),
            "candidates": self.candidates,
            "depth": self.depth,
            **asdict(self.selection),
            "keep_empty": self.keep_empty,
            "ignore_identical_ids": self.ignore_identical_ids,
        }

    def working_files(self) -> list[Path]:
        return []

    def prepare(self) -> None:
        """Nothing is needed."""

    def cut(self, window_pairs: int) -> list[range]:
        """Windows of rows. A row counts as the most pairs that it can have, which is known before a search."""
        windows: list[range] = []
        self._pairs_of: dict[range, int] = {}
        start = num_pairs = 0
        for stop, row in enumerate(self._rows.read(), start=1):
            num_pairs += self._most_pairs(row)
            if num_pairs >= window_pairs or stop == self._num_rows:
                windows.append(range(start, stop))
                self._pairs_of[windows[-1]] = num_pairs
                start, num_pairs = stop, 0
        return windows

    def num_pairs(self, window: range) -> int:
        return self._pairs_of[window]

    def costs(self, windows: Sequence[range], max_length: int) -> list[int]:
        """Pairs."""
        return [self.num_pairs(window) for window in windows]

    def read(self, windows: Iterable[range]) -> Iterator[Window]:
        for window in windows:
            rows = [ParsedRow.parse(self._finder.find(row)) for row in self._take(window)]
            yield Window([pair for row in rows for pair in row.pairs()], rows)

    def record(self, window: Window, scores: list[float]) -> bytes:
        """A line of counts, then the lines of the output."""
        rows = list(choose_negatives(window.source, scores, self.selection))
        kept = [row for row in rows if row.fields["neg_doc"] or self.keep_empty]
        counts = Counter(num_written=len(kept))
        for row in rows:
            counts.update(row.removed)
            counts.update(num_candidates=row.num_candidates, num_negatives=len(row.fields["neg_doc"]))
            counts.update(num_identical=row.num_identical)
        without = [row.where for row in rows if not row.fields["neg_doc"]]
        return json.dumps([counts, without]).encode() + b"\n" + b"".join(map(_format_row, kept))

    def write(self, windows: Sequence[range], records: Iterator[bytes], file: IO[bytes]) -> dict[str, Any]:
        """The rows in the order of the source. The summary has the fields of [`MiningResult`]."""
        counts, without_negatives = Counter[str](), list[str]()
        for record in records:
            head, _, rows = record.partition(b"\n")
            window_counts, without = json.loads(head)
            counts.update(window_counts)
            without_negatives += without
            file.write(rows)
        result = MiningResult(
            self._num_rows,
            counts["num_written"],
            counts["num_candidates"],
            counts["num_negatives"],
            {reason: counts[reason] for reason in REASONS},
            without_negatives,
            counts["num_identical"],
        )
        tell_identical(self.source, result.num_identical)
        if not result.num_written:
            raise NothingToWriteError(
                f"{os.fspath(self.source)}: no candidate of any row passed, and nothing was written: "
                f"{result.format()}. Lower the margins, or give other candidates"
            )
        return result._asdict()

    def for_actors(self) -> Self:
        source = os.path.abspath(self.source) if os.path.exists(self.source) else self.source  # or one of the Hub
        corpus, run = (None if path is None else os.path.abspath(path) for path in (self.corpus, self.run))
        return replace(self, source=source, corpus=corpus, run=run)

    def _most_pairs(self, row: SourceRow) -> int:
        parsed, kind = parse_row(row.fields, row.where), self._finder.kind
        is_searched = kind in ("bm25", "run") or (kind == "auto" and self._corpus is not None and not parsed.negatives)
        return len(parsed.positives) + (self.depth if is_searched else min(len(parsed.negatives), self.depth))

    def _take(self, window: range) -> list[SourceRow]:
        """Reads the rows of a window. The source is read from the start again only for a window before the last one."""
        if window.start < self._next_row:
            self._unread, self._next_row = self._rows.read(), 0
        rows = list(islice(self._unread, window.start - self._next_row, window.stop - self._next_row))
        self._next_row = window.stop
        return rows


def mine_file(
    model: str,
    source: TextPath,
    output: TextPath,
    *,
    corpus: TextPath | None = None,
    run: TextPath | None = None,
    qrels: str | None = None,
    candidates: str = "auto",
    depth: int = 100,
    selection: Selection = DEFAULT_SELECTION,
    keep_empty: bool = False,
    ignore_identical_ids: bool = True,
    batch_size: int | None = None,
    device: str | Sequence[str] | None = None,
    dtype: str | None = None,
    max_length: int | None = None,
    overwrite: bool = False,
    window_pairs: int | None = None,
    show_progress_bar: bool | None = None,
) -> MiningResult:
    """
    Mines hard negatives for the rows of a source and writes rows that `llama-bidir train` reads.

    A job that was stopped resumes when it is started again with the same arguments. The output appears when all rows
    are done, byte for byte as from a job that was never stopped. Under torchrun, every process calls this with the same
    arguments. They share the rows, and the first one writes the output, so all machines must share its folder.

    Args:
        model: the teacher: a checkpoint or the id of a Hub repository.
        source: rows: a `*.jsonl` file or anything else that [`open_source`] reads.
        output: a `*.jsonl` or `*.jsonl.gz` file. Its folder is created if it is missing.
        corpus: BEIR's JSON Lines, for candidates from BM25 or from a run. A BEIR folder has its own.
        run: a run in TREC's six columns. Rows then need `query_id`, `question_id` or `_id`.
        qrels: a path in a BEIR folder.
        candidates, depth: see [`CandidateFinder`].
        selection: which candidates become negatives.
        keep_empty: also write the rows without a negative, with an empty `neg_doc`.
        ignore_identical_ids: leave out candidates that are the query itself, as in ArguAna and Quora (see
            [`~data.identical`]), with a warning that counts them.
        batch_size, device, dtype, max_length: see [`CrossEncoder`].
        overwrite: replace `output`, and drop a stopped job with different arguments.
        window_pairs: a window of rows ends as soon as it has this many pairs. A kill may lose the current window. The
            default depends on the device.
        show_progress_bar: whether to show a progress bar. The default shows it if `llama_bidir.jobs.job` logs at INFO.

    Returns:
        the result, in every process.

    Raises:
        FileExistsError: `output` exists, and `overwrite` is not set.
        FileNotFoundError, OSError: an input is missing or cannot be read.
        ValueError: an argument or an input breaks its rule (with file and line), a stopped job had different arguments
            (with what changed), or no row has a negative.
        ScoreError: a score is NaN or infinite.
        RuntimeError: another process failed, or is writing to the same output.
    """
    task = MiningTask(
        source=source,
        corpus=corpus,
        run=run,
        qrels=qrels,
        candidates=candidates,
        depth=depth,
        selection=selection,
        keep_empty=keep_empty,
        ignore_identical_ids=ignore_identical_ids,
    )
    limits = {"batch_size": batch_size, "window_pairs": window_pairs}
    job = open_mining_job(task, model, output, overwrite=overwrite, **limits)
    cross_encoder = CrossEncoder(model, device=device, dtype=dtype, max_length=max_length)
    try:
        run_job(job, cross_encoder, show_progress_bar=show_progress_bar)
    finally:
        cross_encoder.close()
    return MiningResult(**job.summary)


def open_mining_job(
    task: MiningTask, model: str, output: TextPath, *, overwrite: bool = False, **limits: int | None
) -> Job:
    """
    Returns the job of a task after its input was checked, so that errors in it come before a model is loaded.

    Raises:
        FileExistsError, FileNotFoundError, OSError, ValueError: see [`mine_file`].
    """
    check_checkpoint_path(model)
    if not os.fspath(output).lower().endswith((".jsonl", ".jsonl.gz")):
        raise ValueError(
            f"output must end in .jsonl or .jsonl.gz, by which train knows its kind, got {os.fspath(output)!r}"
        )
    return Job(task, output, overwrite=overwrite, **limits)


def _format_row(row: MinedRow) -> bytes:
    try:
        return json.dumps(row.fields, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # a lone surrogate in a field that nobody reads
        return json.dumps(row.fields).encode() + b"\n"
