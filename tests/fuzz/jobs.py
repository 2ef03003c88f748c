"""Jobs: damaged journals, shares, batches, selections of negatives, and outputs that appear whole or not at all."""

import os
import zlib
from collections.abc import Sequence
from contextlib import closing
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from llama_bidir.jobs.journal import Journal
from llama_bidir.jobs.mining import Selection, select_negatives
from llama_bidir.jobs.mining.duplicates import are_near_duplicates, make_shingles, split_words
from llama_bidir.jobs.mining.selection import REASONS
from llama_bidir.scoring.packing import balanced_batches, batches_by_tokens
from llama_bidir.training import read_history
from llama_bidir.utils.outputs import whole_folder, write_whole
from llama_bidir.utils.sharing import deal
from tests.helpers import lines

from .damage import BOM, damaged, files
from .readers import BadLineError, UnclearError, objects_of, write_file
from .target import Target, attempt, check_message, new_folder
from .texts import any_texts, texts

ARGUMENTS, SETTINGS = {"depth": 3, "model": "m"}, {"window_pairs": 2}
RECORDS = [b"first record", b"second", b"\x00\x01\x02\x03"]
HISTORY = [{"loss": 0.5, "step": 1}, {"eval_loss": 0.25, "eval_ndcg@10": 1.0, "step": 2}]


@cache
def journal_bytes() -> bytes:
    """A journal with three windows."""
    output = new_folder("journal") / "out"
    journal = Journal(output, "rerank")
    journal.start(ARGUMENTS, SETTINGS, overwrite=False)
    for number, record in enumerate(RECORDS):
        journal.own.append(number, record)
    journal.close()
    return journal.path.read_bytes()


class Content(bytes):
    """Bytes that a report of a failure shows in short."""

    def __repr__(self) -> str:
        return f"{len(self)} bytes of {zlib.crc32(self):08x}"


@st.composite
def journals(draw: st.DrawFn) -> bytes:
    content = journal_bytes()
    if draw(st.booleans()):
        return Content(draw(damaged(content)))
    # The few places that hold something: SQLite's header, its pages' headers and the records at their ends.
    for _ in range(draw(st.integers(1, 4))):
        page = 4096 * draw(st.integers(0, len(content) // 4096 - 1))
        place = page + draw(st.integers(0, 120) | st.integers(3700, 4095))
        content = content[:place] + bytes([draw(st.integers(0, 255))]) + content[place + 1 :]
    return Content(content)


def check_journal(content: bytes) -> None:
    """A damaged journal resumes, starts over or is refused by name; it never ends in an error of SQLite."""
    folder = new_folder("journal")
    journal = Journal(folder / "out", "rerank")
    journal.path.write_bytes(content)
    try:
        with closing(journal):
            settings = journal.start(ARGUMENTS, SETTINGS, overwrite=False)
            assert settings == SETTINGS or content != journal_bytes()
            done = journal.done()
            assert all(isinstance(number, int) for number in done)
            records = list(journal.records(len(RECORDS)))
            assert all(isinstance(record, bytes) for record in records)
            assert records == RECORDS or content != journal_bytes()
    except (ValueError, RuntimeError, OSError) as error:
        check_message(error, journal.path)


def check_deal(costs: list[float], num_shares: int) -> None:
    """Each item is in one share, shares have equal numbers of items but one, and their costs differ by one item's."""
    shares = deal(costs, num_shares)
    assert len(shares) == num_shares
    assert all(share == sorted(share) for share in shares)
    assert sorted(index for share in shares for index in share) == list(range(len(costs)))
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1
    sums = [sum((Fraction(costs[index]) for index in share), Fraction()) for share in shares]
    assert max(sums) - min(sums) <= Fraction(max(costs, default=0))


def check_batches(lengths: list[int], max_tokens: int, max_sequences: int | None, padded: bool, workers: int) -> None:
    """Each sequence is in one batch, the longest first, and no batch but that of one sequence is above the budget."""
    batches = list(
        batches_by_tokens(
            lengths, max_tokens=max_tokens, max_sequences=max_sequences, padded=padded, num_workers=workers
        )
    )
    order = [index for batch in batches for index in batch]
    assert order == sorted(range(len(lengths)), key=lambda index: -lengths[index])
    for batch in [*batches, *balanced_batches(lengths, max_tokens=max_tokens, max_sequences=max_sequences)]:
        sizes = [lengths[index] for index in batch]
        assert len(batch) == 1 or sum(sizes) <= max_tokens
        assert max_sequences is None or len(batch) <= max_sequences
    for batch in batches if padded else []:
        assert len(batch) == 1 or len(batch) * lengths[batch[0]] <= max_tokens
    balanced = balanced_batches(
        lengths, max_tokens=max_tokens, max_sequences=max_sequences, num_workers=workers, min_tokens=8
    )
    assert sorted(index for batch in balanced for index in batch) == list(range(len(lengths)))
    sums = [sum(lengths[index] for index in batch) for batch in balanced]
    assert sums == sorted(sums, reverse=True)


def check_selection(
    positives: list[tuple[str, float]], candidates: list[tuple[str, float]], fields: dict[str, Any]
) -> None:
    """Every candidate is taken or counted under one reason, and those taken keep the documented rules."""
    selection = Selection(**fields)
    texts_of, scores = [text for text, _ in candidates], [score for _, score in candidates]
    positive_texts = [text for text, _ in positives]
    selected = select_negatives(
        positive_texts, [score for _, score in positives], texts_of, scores, selection, draw="q"
    )
    taken = selected.indices
    assert len(taken) <= selection.num_negatives
    assert len(taken) + sum(selected.removed[reason] for reason in REASONS) == len(candidates)
    assert taken == sorted(taken, key=lambda index: (-scores[index], index))
    lowest = min(score for _, score in positives)
    for index in taken:
        assert scores[index] < lowest - selection.absolute_margin
        assert selection.max_score is None or scores[index] <= selection.max_score
        assert split_words(texts_of[index])
        assert split_words(texts_of[index]) not in map(split_words, positive_texts)
    words = [split_words(text) for text in (*positive_texts, *(texts_of[index] for index in taken))]
    for place, index in enumerate(taken):
        others = words[: len(positive_texts)] + [split_words(texts_of[other]) for other in taken[:place]]
        assert not any(_jaccard(split_words(texts_of[index]), other) >= Fraction(9, 10) for other in others)
    again = select_negatives(positive_texts, [score for _, score in positives], texts_of, scores, selection, draw="q")
    assert again == selected


def _jaccard(first: Sequence[str], second: Sequence[str]) -> Fraction:
    one, other = ({tuple(words[at : at + 3]) for at in range(max(1, len(words) - 2))} for words in (first, second))
    return Fraction(len(one & other), len(one | other))


def check_duplicates(first: str, second: str) -> None:
    """Words do not change when they are split again, and near-duplicates are those of the Jaccard similarity."""
    words = split_words(first), split_words(second)
    for each in words:
        assert split_words(" ".join(each)) == each
        assert are_near_duplicates(make_shingles(each), make_shingles(each))
    expected = _jaccard(*words) >= Fraction(9, 10)
    assert are_near_duplicates(*map(make_shingles, words)) == expected
    assert are_near_duplicates(*map(make_shingles, reversed(words))) == expected


def check_history(file: tuple[str, bytes]) -> None:
    """The history gives the entries of its whole lines in order and leaves out the others."""
    path = write_file("history.jsonl", ("", file[1]))
    entries, error = attempt(read_history, path)
    if error is not None:
        return check_message(error, path)
    assert all(isinstance(entry, dict) for entry in entries)
    try:
        found = [entry for _, entry in objects_of(("", file[1]))]
    except (BadLineError, UnclearError):
        return None
    if not file[1].startswith(BOM):
        assert repr(entries) == repr([entry for entry in found if isinstance(entry.get("step"), (int, float))])
    return None


def check_write_whole(former: str | None, text: str) -> None:
    """A file holds the new text, or it could not be written and holds the former one; nothing is left beside it."""
    path = new_folder("whole") / "file.txt"
    if former is not None:
        write_whole(path, former)
    _, error = attempt(write_whole, path, text)
    expected = text.encode() if error is None else None if former is None else former.encode()
    assert (path.read_bytes() if path.exists() else None) == expected
    assert os.listdir(path.parent) == ([] if expected is None else [path.name])


class BlockError(Exception):
    """Fails a block on purpose."""


def check_whole_folder(former: dict[str, str] | None, new: dict[str, str], overwrite: bool, fails: bool) -> None:
    """A folder holds the new files, or the former ones if the block failed or may not replace them."""
    path = new_folder("whole") / "folder"
    if former is not None:
        _fill(path, former)
    try:
        with whole_folder(path, overwrite=overwrite) as folder:
            _fill(folder, new)
            if fails:
                raise BlockError
        is_new = True
    except BlockError:
        is_new = False
    except FileExistsError as error:
        check_message(error, path)
        assert former is not None
        assert not overwrite
        is_new = False
    expected = new if is_new else former
    assert os.listdir(path.parent) == ([] if expected is None else [path.name])
    if expected is not None:
        assert {file.name: file.read_text() for file in path.iterdir()} == expected


def _fill(folder: Path, content: dict[str, str]) -> None:
    folder.mkdir(exist_ok=True)
    for name, text in content.items():
        (folder / name).write_text(text)


numbers = st.floats(-30, 30) | st.sampled_from([0.0, -1e4, 1e4, 709.0, -745.0])
sentences = st.lists(st.sampled_from(["a", "b", "c", "d", "bee", "É", "東", "!"]), max_size=12).map(" ".join) | texts
scored = st.tuples(sentences, numbers)
selections = st.fixed_dictionaries(
    {
        "num_negatives": st.integers(1, 5),
        "absolute_margin": st.sampled_from([0.0, 0.5, 3.0]),
        "relative_margin": st.sampled_from([1.0, 0.95, 0.5, 1e-6, 1 - 2**-53]),
        "skip_top": st.integers(0, 3),
        "max_score": st.none() | numbers,
        "sampling": st.sampled_from(["top", "random"]),
    }
)
contents = st.dictionaries(st.sampled_from(["a", "b", "config.json"]), st.sampled_from(["", "x", "yy"]), max_size=3)
TARGETS = [
    Target("journals", check_journal, {"content": journals()}, weight=1.5),
    Target(
        "shares",
        check_deal,
        {"costs": st.lists(st.integers(0, 50) | st.floats(0, 1e6)), "num_shares": st.integers(1, 9)},
    ),
    Target(
        "batches",
        check_batches,
        {
            "lengths": st.lists(st.integers(1, 90)),
            "max_tokens": st.integers(1, 300),
            "max_sequences": st.none() | st.integers(1, 9),
            "padded": st.booleans(),
            "workers": st.integers(1, 4),
        },
    ),
    Target(
        "selections of negatives",
        check_selection,
        {
            "positives": st.lists(scored, min_size=1, max_size=2),
            "candidates": st.lists(scored, max_size=8),
            "fields": selections,
        },
    ),
    Target("near-duplicates", check_duplicates, {"first": sentences, "second": sentences}),
    Target("histories", check_history, {"file": files(lines(*HISTORY).encode())}),
    Target("whole files", check_write_whole, {"former": st.none() | texts, "text": any_texts}, weight=0.5),
    Target(
        "whole folders",
        check_whole_folder,
        {
            "former": st.none() | contents,
            "new": contents,
            "overwrite": st.booleans(),
            "fails": st.booleans(),
        },
        weight=0.5,
    ),
]
