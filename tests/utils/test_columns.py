"""Tables and columns of other libraries, as pairs and as documents."""

from collections import OrderedDict, UserDict, namedtuple
from types import MappingProxyType

import numpy as np
import pytest

from llama_bidir import CrossEncoder
from llama_bidir.utils.validation import check_groups, check_texts, read_pairs

ROWS = [
    ("where do bees go?", "Honey bees navigate by the sun."),
    ("capital of France", "Paris."),
    ("", "The hive was painted white."),
]
QUERIES, PASSAGES = map(list, zip(*ROWS, strict=True))


@pytest.fixture
def reranker(model, tokenizer):
    return CrossEncoder(model, tokenizer)


def make_pandas(columns):
    return pytest.importorskip("pandas").DataFrame(columns)


def make_polars(columns):
    return pytest.importorskip("polars").DataFrame(columns)


def make_arrow(columns):
    return pytest.importorskip("pyarrow").table(columns)


def make_batch(columns):
    return pytest.importorskip("pyarrow").RecordBatch.from_pydict(columns)


def make_dataset(columns):
    return pytest.importorskip("datasets").Dataset.from_dict(columns)


def make_tensor_dataset(columns):
    return make_dataset(columns).with_format("torch")


def make_stream(columns):
    return make_dataset(columns).to_iterable_dataset()


def make_mapped_stream(columns):
    return make_stream(columns).map(dict)  # no longer knows its columns


def make_array(columns):
    dtype = [(name, "U200") for name in columns]
    return np.array(list(zip(*columns.values(), strict=True)), dtype=dtype)


TABLES = [make_pandas, make_polars, make_arrow, make_batch, make_dataset, make_tensor_dataset, make_array]
STREAMS = [make_stream, make_mapped_stream]


@pytest.mark.parametrize("make", [*TABLES, *STREAMS])
def test_a_table_is_scored_by_rows(reranker, make):
    table = make({"passage": PASSAGES, "query": QUERIES})
    np.testing.assert_array_equal(reranker.predict(table), reranker.predict(ROWS))
    for num_rows in (1, 2, 3):
        queries, passages = QUERIES[:num_rows], PASSAGES[:num_rows]
        for columns in (
            {"query": queries, "passage": passages},
            {"Document": passages, "Question": queries},
            {"a": queries, "b": passages},
            {"text": queries, "text_pair": passages},
            {"query": queries, "a": passages},
            {"a": queries, "doc": passages},
        ):
            pairs, _, is_single = read_pairs(make(columns))
            assert (list(pairs), is_single) == (ROWS[:num_rows], False)


@pytest.mark.parametrize("make", [*TABLES, *STREAMS])
def test_other_tables_are_refused(reranker, make):
    for columns in (
        {"passage": PASSAGES},
        {"query": QUERIES, "passage": PASSAGES, "text": PASSAGES},
    ):
        with pytest.raises(ValueError, match=f"pairs must be a table of two columns .* with {len(columns)} columns"):
            reranker.predict(make(columns))
    for names in (("passage", "a"), ("a", "query")):
        message = rf"it is unclear which of \['{names[0]}', '{names[1]}'\] is the query: name the two"
        with pytest.raises(ValueError, match=message):
            reranker.predict(make(dict(zip(names, (PASSAGES, QUERIES), strict=True))))


@pytest.mark.parametrize("make", [make_pandas, make_polars, make_arrow, make_batch, make_dataset, *STREAMS])
def test_a_cell_that_is_not_a_string_is_named(reranker, make):
    with pytest.raises(TypeError, match=r"the passage of row 1 must be a string, got (float nan|NoneType None)"):
        reranker.predict(make({"query": QUERIES, "passage": ["a", None, "b"]}))
    with pytest.raises(TypeError, match=r"the query of row 0 must be a string, got int(64)? "):
        reranker.predict(make({"query": [1, 2, 3], "passage": PASSAGES}))


@pytest.mark.parametrize("make", [make_pandas, make_polars, make_dataset, make_array])
def test_an_empty_table_has_no_scores(reranker, make):
    scores = reranker.predict(make({"query": [], "passage": []}))
    assert (scores.shape, scores.dtype) == ((0,), np.float32)
    stream = pytest.importorskip("datasets").IterableDataset.from_generator(lambda: iter(()))
    assert reranker.predict(stream).shape == (0,)


def test_an_empty_filter(reranker):
    table = make_pandas({"passage": PASSAGES, "query": QUERIES, "label": [0, 1, 2]})
    assert reranker.predict(table[table["label"] > 9][["query", "passage"]]).shape == (0,)
    np.testing.assert_array_equal(
        reranker.predict(table[table["label"] > 0][["passage", "query"]]), reranker.predict(ROWS[1:])
    )
    with pytest.raises(ValueError, match="with 3 columns"):
        reranker.predict(table[table["label"] > 9])
    with pytest.raises(ValueError, match="with 0 columns"):
        reranker.predict(make_pandas({}))


def test_missing_values_of_pandas(reranker):
    pandas = pytest.importorskip("pandas")
    for missing, dtype in ((float("nan"), object), (pandas.NA, "string"), (None, "string"), (pandas.NaT, object)):
        column = pandas.Series(["a", missing], dtype=dtype)
        with pytest.raises(TypeError, match="the passage of row 1 must be a string, got"):
            reranker.predict(pandas.DataFrame({"query": ["q", "q"], "passage": column}))
        with pytest.raises(TypeError, match=r"documents\[1\] must be a string, got"):
            reranker.rank("q", column)


def test_rows_of_a_table_keep_their_names(reranker):
    table = make_pandas({"passage": PASSAGES, "query": QUERIES})
    expected = reranker.predict(ROWS)
    np.testing.assert_array_equal(reranker.predict(table.itertuples(index=False)), expected)
    np.testing.assert_array_equal(reranker.predict(list(table.itertuples(index=False))), expected)
    np.testing.assert_array_equal(reranker.predict([row for _, row in table.iterrows()]), expected)
    assert reranker.predict(table.iloc[0]) == expected[0]
    assert reranker.predict(namedtuple("Row", ["document", "question"])(*ROWS[0][::-1])) == expected[0]
    assert reranker.predict(namedtuple("Row", ["a", "b"])(*ROWS[0])) == expected[0]


def columns_of(texts):
    """A list of texts as a column of each library."""
    pandas, arrow = pytest.importorskip("pandas"), pytest.importorskip("pyarrow")
    columns = [
        pandas.Series(texts),
        pandas.Series(texts, index=[f"d{number}" for number in range(len(texts))]),
        pandas.Series(texts, dtype="category"),
        pandas.Index(texts),
        pandas.Series(texts).array,
        arrow.chunked_array([texts[:1], texts[1:]]),
        arrow.array(texts),
        make_dataset({"text": texts})["text"],
        make_stream({"text": texts})["text"],
        np.array(texts),
        np.array(texts, object),
        tuple(texts),
        dict.fromkeys(texts).keys(),
        dict(enumerate(texts)).values(),
    ]
    try:
        import polars
    except ImportError:
        return columns
    return [*columns, polars.Series(texts)]


def test_a_column_of_texts_is_documents_and_not_a_pair(reranker):
    texts = PASSAGES[:2]
    assert reranker.rank("bees", columns_of(texts)[0]) == reranker.rank("bees", texts)
    for column in columns_of(texts):
        assert check_texts("documents", column) == texts
        assert check_groups(column, [column, column]) == (texts, [texts, texts])
        if not isinstance(column, (tuple, np.ndarray)):
            with pytest.raises(TypeError, match=r"pair 0 must be two strings|a pair must be two strings"):
                reranker.predict(column)
            with pytest.raises(TypeError, match="pair 0 must be two strings"):
                reranker.predict([column, column])


@pytest.mark.parametrize("make", [make_pandas, make_polars, make_arrow, make_dataset])
def test_columns_of_lists(reranker, make):
    columns = {"pair": [list(row) for row in ROWS], "query": QUERIES, "documents": [PASSAGES[:2], [], PASSAGES]}
    table = make(columns)
    np.testing.assert_array_equal(reranker.predict(table["pair"]), reranker.predict(ROWS))
    expected = reranker.rank_batch(QUERIES, columns["documents"])
    assert reranker.rank_batch(table["query"], table["documents"]) == expected


@pytest.mark.parametrize("make", [*TABLES, make_stream])
def test_tables_are_not_documents(reranker, make):
    for columns, column in (({"body": PASSAGES}, "body"), ({"query": QUERIES, "passage": PASSAGES}, "passage")):
        table = make(columns)
        with pytest.raises(TypeError, match=rf"^documents must .*columns \[.*pass one .* documents\['{column}'\]"):
            reranker.rank("q", table)
        with pytest.raises(TypeError, match=r"^queries must be an iterable of strings, got .* with columns"):
            reranker.rank_batch(table, [PASSAGES])
        with pytest.raises(TypeError, match=r"^documents_per_query must be an iterable of lists, got .* with columns"):
            reranker.rank_batch(QUERIES, table)
        with pytest.raises(TypeError, match=r"^documents_per_query\[0\] must be an iterable of strings, got"):
            reranker.rank_batch(["q"], [table])
        with pytest.raises(TypeError, match=r"^pair 0 must be two strings"):
            reranker.predict([table])
        with pytest.raises(TypeError, match=r"^chunks must be an iterable of lists of pairs, got .* with columns"):
            reranker.predict_chunks(table)


@pytest.mark.parametrize("make", [*TABLES, make_stream])
def test_chunks_may_be_tables(reranker, make):
    tables = [make({"passage": PASSAGES[start : start + 2], "query": QUERIES[start : start + 2]}) for start in (0, 2)]
    np.testing.assert_allclose(
        np.concatenate(list(reranker.predict_chunks(tables))), reranker.predict(ROWS), rtol=1e-5, atol=1e-6
    )
    with pytest.raises(ValueError, match="chunk 1: pairs must be a table of two columns"):
        list(reranker.predict_chunks([ROWS, make({"passage": PASSAGES})]))


PAIR = {"query": "a", "passage": "b"}


@pytest.mark.parametrize(
    "value",
    [
        PAIR,
        OrderedDict(PAIR),
        UserDict(PAIR),
        MappingProxyType(PAIR),
        set(PAIR),
        frozenset(PAIR),
        PAIR.keys(),
        PAIR.values(),
        PAIR.items(),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_dict_a_set_and_their_views_are_not_pairs(reranker, value):
    with pytest.raises(TypeError, match="pair"):
        reranker.predict(value if value != PAIR.items() else [value])
    with pytest.raises(TypeError, match=r"^pair 1 must be two strings"):
        reranker.predict([("a", "b"), value])
    with pytest.raises(TypeError, match=r"^pair 0 must be two strings"):
        reranker.predict(iter([value, ("a", "b")]))
    with pytest.raises(TypeError, match=r"^chunk 0: pair 0 must be two strings"):
        list(reranker.predict_chunks([[value]]))
    if isinstance(value, (type({}.keys()), type({}.values()), type({}.items()))):
        return  # in the order of their dict
    for call, name in (
        (lambda: reranker.rank("q", value), "documents"),
        (lambda: reranker.rank_batch(value, [["a"]]), "queries"),
        (lambda: reranker.rank_batch(["a"], value), "documents_per_query"),
        (lambda: reranker.rank_batch(["a"], [value]), r"documents_per_query\[0\]"),
        (lambda: reranker.predict_chunks(value), "chunks"),
    ):
        with pytest.raises(TypeError, match=f"^{name} must be an iterable of"):
            call()


def test_numpy_arrays(reranker):
    expected = reranker.predict(ROWS)
    assert reranker.predict(np.array(ROWS[0])) == expected[0]
    assert reranker.predict([np.str_(text) for text in ROWS[0]]) == expected[0]
    np.testing.assert_array_equal(reranker.predict(np.array(ROWS)), expected)
    np.testing.assert_array_equal(reranker.predict(list(np.array(ROWS, object))), expected)
    with pytest.raises(TypeError, match=r"pairs must be a .* got ndarray"):
        reranker.predict(np.array("text"))
    with pytest.raises(TypeError, match=r"pairs must be a .* got memoryview"):
        reranker.predict(memoryview(b"ab"))
