"""Training rows: the rules of the schema, rows through Arrow, groups, and whole sources of rows."""

import math
import pickle
from collections import Counter
from functools import cache, partial
from typing import Any

import datasets
from hypothesis import strategies as st

from llama_bidir.data import GroupDataset, Grouping, GroupStream, load_rows, parse_row, parse_source
from llama_bidir.data.arrow import are_valid, row_features, row_record
from llama_bidir.data.corpus import Corpus
from llama_bidir.data.corpus_id import corpus_rows
from llama_bidir.data.rows import COLUMNS, OPTIONAL_COLUMNS
from llama_bidir.data.sources import BEIR_OPTIONS
from tests.helpers import lines, write

from .damage import altered, damaged, odd_values, to_json
from .readers import BEIR_QRELS, DOCUMENTS, RUN
from .target import Target, attempt, check_message, new_folder
from .texts import any_texts, texts

ROW = {
    "query": "q",
    "pos_doc": ["a", {"text": "b"}],
    "neg_doc": ["c"],
    "pos_score": [1.5, 2],
    "neg_score": [0.25],
    "pos_relevance": [3, 0.5],
    "instruction": "an instruction",
}
ID_ROW = {"question": "q", "corpus_id": "c1", "pos_doc": [{"id": "d1"}, "d2"], "neg_doc": [{"id": "d3", "score": 1}]}
CORPUS_IDS = {"corpus": [{"path": "documents"}], "data": [ID_ROW, {**ID_ROW, "neg_doc": []}]}
QUERIES = [{"_id": "q1", "text": "a query"}, {"_id": "q 2", "text": "b"}, {"_id": "q2", "text": ""}]


def is_text(value: Any) -> bool:
    return isinstance(value, str) and attempt(value.encode)[1] is None


def row_of(row: Any) -> tuple[Any, ...] | None:
    """A row by the rules of the schema: query, passages, scores, relevance, instruction; None if it breaks one."""
    if not isinstance(row, dict):
        return None
    query = row.get("question") if row.get("query") is None else row.get("query")
    passages, scores = [], []
    for side in ("pos", "neg"):
        value = row.get(f"{side}_doc")
        items = [] if value is None else value if isinstance(value, list) else [value]
        found = [item.get("text") if isinstance(item, dict) else item for item in items]
        if not all(map(is_text, found)):
            return None
        numbers = numbers_of(row, f"{side}_score", f"{side}_doc", len(found))
        if numbers == "wrong" or (numbers is not None and not all(map(is_number, numbers))):
            return None
        passages.append(found)
        scores.append(numbers)
    if not is_text(query) or not passages[0] or (passages[1] and (scores[0] is None) != (scores[1] is None)):
        return None
    relevance = numbers_of(row, "pos_relevance", "pos_doc", len(passages[0]))
    if relevance is not None:
        if relevance == "wrong" or not all(x is None or (is_number(x) and x > 0) for x in relevance):
            return None
        relevance = [1.0 if x is None else float(x) for x in relevance]
    instruction = row.get("instruction")
    if instruction is not None and not is_text(instruction):
        return None
    if scores[0] is None:
        return (query, *passages, None, None, relevance, instruction)
    numbers = [[float(x) for x in each or []] for each in scores]
    return (query, *passages, *numbers, relevance, instruction)


def numbers_of(row: dict[str, Any], field: str, passages: str, count: int) -> Any:
    """The numbers of a field, one per passage; None if there are none, "wrong" if their shape is."""
    numbers = row.get(field)
    if numbers is None:
        return None
    if not isinstance(numbers, list):
        numbers = [] if isinstance(row.get(passages), list) else [numbers]
    return numbers if len(numbers) == count else "wrong"


def is_number(value: Any) -> bool:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    return abs(value) <= 1e308 and math.isfinite(value)


def check_row(row: Any) -> None:
    """A row is read by the rules of the schema, or the error names it."""
    parsed, error = attempt(parse_row, row, "rows.jsonl:3")
    expected = row_of(row)
    if error is not None:
        assert expected is None, f"refused although it is right: {error}"
        return check_message(error, "rows.jsonl:3")
    assert tuple(parsed) == expected
    return None


def in_arrow(rows: list[dict[str, Any]]) -> Any:
    """Rows as `load_rows` returns them."""
    features = row_features("string")
    records = [{name: row_record(parse_row(row, "row"))[name] for name in features} for row in rows]
    return datasets.Dataset.from_list(records, features=features).select_columns(list(COLUMNS))


def check_arrow(rows: list[dict[str, Any]]) -> None:
    """Rows that pass through Arrow are the same, and are known to be valid without being parsed."""
    table = in_arrow(rows)
    assert are_valid(table)
    for row, read in zip(rows, table, strict=True):
        assert parse_row(read, "row") == parse_row(row, "row")
        assert tuple(read.values()) == tuple(parse_row(row, "row"))


def check_groups(
    sources: list[tuple[list[dict[str, Any]], float]], grouping: dict[str, Any], epoch: int, num_processes: int
) -> None:
    """
    The groups of an epoch are the same for any number of processes and any form of the rows, over the epochs each row
    comes as often as the weight says, and a group holds passages of its row, the positives first.
    """
    how = Grouping(**grouping)
    dataset, error = attempt(GroupDataset, sources, how)
    sizes = [
        round(weight * (sum(len(row["pos_doc"]) for row in rows) if how.expands else len(rows)))
        for rows, weight in sources
    ]
    if error is not None:
        assert sum(sizes) == 0
        return check_message(error, "there is no row")
    assert len(dataset) == sum(sizes)
    dataset.set_epoch(epoch)
    groups = [dataset[index] for index in range(len(dataset))]
    as_arrow = [(in_arrow(rows), weight) for rows, weight in sources]
    others = [GroupDataset(as_arrow, how), *(pickle.loads(pickle.dumps(dataset)) for _ in range(num_processes - 1))]
    for rank, other in enumerate(others):
        other.set_epoch(epoch)
        for index in range(rank, len(groups), num_processes):
            assert other[index] == groups[index] == dataset.group(index, epoch)
    start = 0
    for (rows, _), size in zip(sources, sizes, strict=True):
        _check_groups(rows, groups[start : start + size], how)
        entries = {row["query"]: len(row["pos_doc"]) if how.expands else 1 for row in rows}
        all_epochs = (dataset.group(index, each) for each in range(epoch + 1) for index in range(start, start + size))
        seen = Counter(group["query"] for group in all_epochs)
        times = size * (epoch + 1) / sum(entries.values())
        for query, number in entries.items():
            assert math.floor(times) * number <= seen[query] <= math.ceil(times) * number
        start += size
    return None


def _check_groups(rows: list[dict[str, Any]], groups: list[Any], how: Grouping) -> None:
    by_query = {row["query"]: row for row in rows}
    for group in groups:
        row = by_query[group["query"]]
        positives = [text for text, label in zip(group["passages"], group["labels"], strict=True) if label > 0]
        negatives = group["passages"][len(positives) :]
        usable = [text for text in row["neg_doc"] if text not in row["pos_doc"]]
        assert group["labels"][len(positives) :] == [0.0] * len(negatives)
        graded = Counter(zip(row["pos_doc"], row.get("pos_relevance") or [1.0] * len(row["pos_doc"]), strict=True))
        assert not Counter(zip(positives, group["labels"][: len(positives)], strict=True)) - graded
        assert set(negatives) <= set(usable)
        if how.group_size is None:
            assert (positives, negatives) == (row["pos_doc"], usable)
            continue
        most = max(1, how.group_size - 1) if how.positives == "all" else 1
        assert len(positives) == min(most, len(row["pos_doc"]))
        room = how.group_size - len(positives)
        if len(usable) >= room or how.short_groups == "mask":
            assert len(negatives) == min(room, len(usable))
            assert not Counter(negatives) - Counter(usable)
        else:
            assert len(negatives) == room
        if how.negatives == "first" and len(usable) >= room:
            assert negatives == usable[:room]


def check_stream(rows: list[dict[str, Any]], grouping: dict[str, Any], epoch: int) -> None:
    """A stream gives the groups of its rows in their order, the same each time."""
    how = Grouping(**grouping)
    stream = GroupStream(rows, how)
    stream.set_epoch(epoch)
    groups = list(stream)
    assert groups == list(stream)
    expected = [row["query"] for row in rows for _ in (row["pos_doc"] if how.expands else [None])]
    assert [group["query"] for group in groups] == expected


def check_source_entry(entry: Any) -> None:
    """An entry of `data.train` is a path with a weight and options, or the error names it."""
    source, error = attempt(parse_source, entry, "data.train[0]")
    if error is not None:
        return check_message(error, "data.train[0]")
    assert isinstance(source.path, str)
    assert source.path
    assert 0 < source.weight < math.inf
    assert set(source.options) <= {*BEIR_OPTIONS, "ignore_identical_ids"}
    return None


@cache
def corpus() -> Corpus:
    return Corpus(datasets.Dataset.from_dict({"id": ["d1", "d2", "d3"], "text": ["one", "two", "three"]}), "documents")


def check_corpus_rows(row: Any) -> None:
    """A row that names documents of a corpus becomes a record of their numbers, or one with an error that names it."""
    (record,) = corpus_rows([("rows.json: data[0]", row)], {"c1": corpus()})
    if record["error"] is not None:
        return check_message(ValueError(record["error"]), "rows.json: data[0]")
    numbers = {"d1": 0, "d2": 1, "d3": 2}
    for field in ("pos_doc", "neg_doc"):
        items = row.get(field)
        items = [] if items is None else items if isinstance(items, list) else [items]
        assert record[field] == [numbers[item["id"] if isinstance(item, dict) else item] for item in items]
    return None


def check_load_rows(source: tuple[str, bytes]) -> None:
    """A source with one damaged file gives rows that are valid, or an error that names a file of it."""
    kind, content = source
    folder = new_folder("source")
    beir = {
        "corpus.jsonl": lines(*DOCUMENTS).encode(),
        "queries.jsonl": lines(*QUERIES).encode(),
        "qrels.tsv": BEIR_QRELS.replace("q 2\td 3\t2\n", "").encode(),
        "run.bm25.trec": RUN.encode(),
    }
    if kind in beir:
        for name, whole in beir.items():
            write(folder / name, content if name == kind else whole)
        path = folder
    else:
        path = write(folder / kind, content)
        write(folder / "documents" / "a.jsonl", lines(*({"id": f"d{n}", "text": f"text {n}"} for n in range(1, 4))))
        write(folder / "documents" / "merlin_metadata.json", to_json({"class": "TextQADataset", "corpus_id": "c1"}))
    dataset, error = attempt(partial(load_rows, cache_dir=new_folder("cache")), str(path))
    if error is not None:
        return check_message(error, folder)
    for row in dataset:
        parsed = dict(zip(COLUMNS, parse_row(row, "row"), strict=True))
        assert parsed == {**dict.fromkeys(OPTIONAL_COLUMNS), **row}
    return None


@st.composite
def valid_rows(draw: st.DrawFn, least: int = 1) -> list[dict[str, Any]]:
    queries = draw(st.lists(texts, min_size=least, max_size=5, unique=True))
    passages = st.lists(st.sampled_from("abcdefg") | texts, min_size=1, max_size=4)
    rows = []
    for query in queries:
        row = {"query": query, "pos_doc": draw(passages), "neg_doc": [*draw(passages), "the one that no positive is"]}
        if draw(st.booleans()):
            number = st.floats(allow_nan=False, allow_infinity=False)
            for side in ("pos", "neg"):
                row[f"{side}_score"] = [draw(number) for _ in row[f"{side}_doc"]]
        if draw(st.booleans()):
            row["pos_relevance"] = [draw(st.floats(1e-3, 100)) for _ in row["pos_doc"]]
        rows.append(row)
    return rows


groupings = st.fixed_dictionaries(
    {
        "group_size": st.none() | st.integers(1, 5),
        "positives": st.sampled_from(["cycle", "expand", "all"]),
        "negatives": st.sampled_from(["sample", "first"]),
        "short_groups": st.sampled_from(["mask", "repeat"]),
        "seed": st.integers(0, 2**32),
    }
)
weights = st.sampled_from([1.0, 2.0, 0.5, 0.1, 1.5, 2.75])
entries = st.dictionaries(
    st.sampled_from(["path", "weight", "qrels", "run", "depth", "paths", ""]), odd_values, max_size=4
)
damaged_sources = st.one_of(
    *(
        st.tuples(st.just(name), damaged(content, most=2))
        for name, content in {
            "rows.jsonl": lines(ROW, ROW).encode(),
            "rows.json": to_json(CORPUS_IDS),
            "corpus.jsonl": lines(*DOCUMENTS).encode(),
            "queries.jsonl": lines(*QUERIES).encode(),
            "qrels.tsv": BEIR_QRELS.encode(),
            "run.bm25.trec": RUN.encode(),
        }.items()
    ),
    st.tuples(st.just("rows.json"), altered(CORPUS_IDS).map(to_json)),
)
TARGETS = [
    Target("rows", check_row, {"row": altered(ROW, values=odd_values | any_texts)}, weight=1.5),
    Target("rows in Arrow", check_arrow, {"rows": valid_rows()}, weight=0.3, test_cases=40),
    Target(
        "groups",
        check_groups,
        {
            "sources": st.lists(st.tuples(valid_rows(), weights), min_size=1, max_size=2),
            "grouping": groupings,
            "epoch": st.integers(0, 7),
            "num_processes": st.integers(1, 3),
        },
        weight=0.3,
        test_cases=40,
    ),
    Target(
        "groups of a stream",
        check_stream,
        {"rows": valid_rows(), "grouping": groupings, "epoch": st.integers(0, 7)},
        weight=0.3,
        test_cases=40,
    ),
    Target("entries of sources", check_source_entry, {"entry": entries | odd_values}),
    Target("rows of a corpus", check_corpus_rows, {"row": altered(ID_ROW)}),
    Target(
        "sources of rows",
        check_load_rows,
        {"source": damaged_sources},
        weight=0.05,
        test_cases=15,
    ),
]
