"""A small collection to rerank, and what its run must look like."""

import random
from pathlib import Path
from typing import NamedTuple

from row_files import lines, write

WORDS = ["bees", "hive", "garden", "clover", "sun", "river", "white", "capital", "nobody", "flowers", "Paris"]


class Collection(NamedTuple):
    corpus: Path
    queries: Path
    run: Path

    def arguments(self) -> dict[str, Path]:
        return self._asdict()


def write_collection(folder: Path, *, num_queries: int = 12, num_documents: int = 30, depth: int = 10) -> Collection:
    """Queries q0 to qN, all but q3 with `depth` candidates, which are in the run by rank but not by query number."""
    draw = random.Random(7)
    documents = [
        {"_id": f"d{n}", "title": f"Hive {n}" if n % 2 else "", "text": " ".join(draw.choices(WORDS, k=n % 9))}
        for n in range(num_documents)
    ]
    queries = [{"_id": f"q{n}", "text": " ".join(draw.choices(WORDS, k=3)) + f" {n}?"} for n in range(num_queries)]
    rows = []
    for query in reversed(queries):
        if query["_id"] != "q3":
            found = draw.sample(documents, depth)
            rows += [f"{query['_id']} Q0 {d['_id']} {rank} {50 - rank} x" for rank, d in enumerate(found, 1)]
    return Collection(
        write(folder / "corpus.jsonl", lines(*documents)),
        write(folder / "queries.jsonl", lines(*queries)),
        write(folder / "run.trec", "\n".join(rows) + "\n"),
    )


def read_lines_of(path: Path) -> dict[str, list[tuple[str, int, float, str]]]:
    """(doc_id, rank, score, tag) of each line, by query."""
    found: dict[str, list[tuple[str, int, float, str]]] = {}
    for line in path.read_text().splitlines():
        query_id, q0, doc_id, rank, score, tag = line.split(" ")
        assert q0 == "Q0"
        found.setdefault(query_id, []).append((doc_id, int(rank), float(score), tag))
    return found
