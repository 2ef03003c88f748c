import json
import logging
import shutil

import numpy as np
import pytest
import torch
from helpers import make_model, make_tokenizer
from tqdm.auto import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from llama_bidir import CrossEncoder, LlamaBidirectionalForSequenceClassification
from llama_bidir.scoring.engine import LocalEngine

PAIRS = [
    ("where do bees go?", "Honey bees navigate by the sun."),
    ("capital of France", "Paris."),
    ("where do bees go?", ""),
    ("", "The hive was painted white, and the garden was full of clover; nobody counted the flowers."),
]


@pytest.fixture
def reranker(model, tokenizer):
    return CrossEncoder(model, tokenizer)


def reference_scores(cross_encoder, pairs):
    """One pair at a time, through the tokenizer and the model alone."""
    scores = []
    for query, passage in pairs:
        text = cross_encoder.config.prompt_template.format(query=query, passage=passage)
        with torch.no_grad():
            scores.append(cross_encoder.model(**cross_encoder.tokenizer(text, return_tensors="pt")).logits.item())
    return np.array(scores, dtype=np.float32)


@pytest.mark.parametrize("batch_size", [None, 1, 2, 3])
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_scores_do_not_depend_on_batches_order_or_padding_side(reranker, batch_size, padding_side):
    reranker.tokenizer.padding_side = padding_side
    expected = reference_scores(reranker, PAIRS)
    np.testing.assert_allclose(reranker.predict(PAIRS, batch_size), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(reranker.predict(PAIRS[::-1], batch_size)[::-1], expected, rtol=1e-5, atol=1e-6)


def test_every_kind_of_input_gives_the_same_scores(reranker):
    expected = reranker.predict(PAIRS)
    assert expected.dtype == np.float32
    assert expected.shape == (4,)
    for pairs in (tuple(PAIRS), iter(PAIRS), (list(pair) for pair in PAIRS), np.array(PAIRS), np.array(PAIRS, object)):
        assert np.array_equal(reranker.predict(pairs), expected)


def test_a_bar_around_a_generator_is_read_once(reranker):
    scores = reranker.predict(tqdm(iter(PAIRS), total=len(PAIRS), disable=True))
    assert np.array_equal(scores, reranker.predict(PAIRS))


def test_column_of_a_dataset(reranker):
    datasets = pytest.importorskip("datasets")
    column = datasets.Dataset.from_dict({"pair": [list(pair) for pair in PAIRS]})["pair"]
    assert np.array_equal(reranker.predict(column), reranker.predict(PAIRS))


def test_shapes_and_types_of_results(reranker):
    single = reranker.predict(PAIRS[0])
    assert type(single) is np.float32
    assert reranker.predict(list(PAIRS[0])) == single
    assert reranker.predict([PAIRS[0]]).shape == (1,)
    assert reranker.predict([]).shape == (0,)
    assert reranker.predict([]).dtype == np.float32
    tensor = reranker.predict(PAIRS, convert_to_tensor=True)
    assert tensor.dtype == torch.float32
    assert tensor.tolist() == reranker.predict(PAIRS).tolist()
    listed = reranker.predict(PAIRS, convert_to_numpy=False)
    assert [score.item() for score in listed] == tensor.tolist()


def test_activation(model, tokenizer):
    raw = CrossEncoder(model, tokenizer).predict(PAIRS)
    squashed = CrossEncoder(model, tokenizer, activation_fn=torch.sigmoid)
    np.testing.assert_allclose(squashed.predict(PAIRS), 1 / (1 + np.exp(-raw)), rtol=1e-6)
    np.testing.assert_allclose(squashed.predict(PAIRS, activation_fn=torch.nn.Identity()), raw)


def test_several_labels(tokenizer):
    reranker = CrossEncoder(make_model(num_labels=3), tokenizer)
    logits = reranker.predict(PAIRS)
    assert logits.shape == (4, 3)
    assert reranker.predict(PAIRS[0]).shape == (3,)
    np.testing.assert_allclose(reranker.predict(PAIRS, apply_softmax=True).sum(axis=1), np.ones(4), rtol=1e-6)
    with pytest.raises(ValueError, match="ranking needs one score per pair, but the model has 3 labels"):
        reranker.rank("q", ["a"])


@pytest.mark.parametrize(
    ("pairs", "error", "message"),
    [
        (None, TypeError, "pairs must be a .* got NoneType None"),
        (7, TypeError, "pairs must be a .* got int 7"),
        ("text", TypeError, "pairs must be a .* got str 'text'"),
        (b"text", TypeError, "pairs must be a .* got bytes"),
        ({"q": "p"}, TypeError, "pairs must be a .* got dict"),
        ([{"q", "p"}], TypeError, "pair 0 must be two strings .* got set"),
        ([("a", "b\ud800")], ValueError, "the passage of pair 0 must be Unicode text without lone surrogates"),
        ([("a", "b"), None], TypeError, r"pair 1 must be two strings \(query, passage\), got NoneType None"),
        ([("a", "b"), "cd"], TypeError, r"pair 1 must be two strings"),
        (["a", "b", "c"], TypeError, r"pair 0 must be two strings"),
        ([("a",)], ValueError, r"pair 0 must have two members \(query, passage\), got 1"),
        ([("a", "b", "c")], ValueError, r"pair 0 must have two members \(query, passage\), got 3"),
        ([("a", "b"), ("a", 3)], TypeError, "the passage of pair 1 must be a string, got int 3"),
        ([(None, "b")], TypeError, "the query of pair 0 must be a string, got NoneType None"),
        ([(b"a", "b")], TypeError, "the query of pair 0 must be a string, got bytes"),
    ],
)
def test_wrong_pairs_are_named(reranker, pairs, error, message):
    with pytest.raises(error, match=message):
        reranker.predict(pairs)


def test_rank_sorts_and_keeps_ties_in_input_order(reranker):
    documents = ["Paris.", "Honey bees navigate by the sun.", "Paris.", ""]
    ranking = reranker.rank("where do bees go?", documents, return_documents=True, batch_size=1)
    scores = reranker.predict([("where do bees go?", document) for document in documents], batch_size=1)
    assert [result["score"] for result in ranking] == sorted(scores.tolist(), reverse=True)
    for result in ranking:
        assert result["score"] == scores[result["corpus_id"]]
        assert result["text"] == documents[result["corpus_id"]]
    twins = [result["corpus_id"] for result in ranking if result["text"] == "Paris."]
    assert twins == [0, 2]
    assert "text" not in reranker.rank("q", documents)[0]
    assert len(reranker.rank("q", documents, top_k=2)) == 2
    assert reranker.rank("q", iter(documents)) == reranker.rank("q", documents)
    assert reranker.rank("q", []) == []


def test_rank_batch_equals_rank(reranker):
    queries = ["where do bees go?", "capital of France", "nothing"]
    documents = [["Paris.", "Honey bees navigate by the sun."], ["Paris.", "Berlin.", "Clover."], []]
    together = reranker.rank_batch(queries, documents, top_k=2, return_documents=True)
    for query, texts, ranking in zip(queries, documents, together, strict=True):
        alone = reranker.rank(query, texts, top_k=2, return_documents=True)
        assert [result["corpus_id"] for result in ranking] == [result["corpus_id"] for result in alone]
        assert [result["score"] for result in ranking] == pytest.approx([result["score"] for result in alone], rel=1e-5)


def test_wrong_arguments_of_rank(reranker):
    with pytest.raises(TypeError, match="documents must be an iterable of strings, got str 'abc'"):
        reranker.rank("q", "abc")
    with pytest.raises(TypeError, match=r"documents\[1\] must be a string, got NoneType None"):
        reranker.rank("q", ["a", None])
    with pytest.raises(TypeError, match="query must be a string"):
        reranker.rank(None, ["a"])
    with pytest.raises(ValueError, match="got 2 queries and 1 lists"):
        reranker.rank_batch(["a", "b"], [["c"]])
    with pytest.raises(ValueError, match="top_k must be None or an int above 0, got 0"):
        reranker.rank("q", ["a"], top_k=0)
    with pytest.raises(ValueError, match="batch_size must be None or an int above 0, got -1"):
        reranker.predict(PAIRS, -1)


def test_nan_has_no_rank(reranker):
    with torch.no_grad():
        reranker.model.score.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="the score of document 0 for query 'q' is NaN and has no rank"):
        reranker.rank("q", ["a", "b"])


@pytest.mark.parametrize("ahead", [False, True])
def test_predict_reports_nan(reranker, ahead, caplog, monkeypatch):
    monkeypatch.setattr(LocalEngine, "chunk_pairs", 2)
    monkeypatch.setattr(LocalEngine, "tokenizes_ahead", ahead)
    honey = reranker.tokenizer("Paris").input_ids
    with torch.no_grad():
        reranker.model.model.embed_tokens.weight[honey[0]] = torch.nan
    is_nan = np.isnan(reranker.predict(PAIRS[::-1]))
    first = is_nan.tolist().index(True)
    assert 0 < is_nan.sum() < 4
    assert f"{is_nan.sum()} of 4 pairs have NaN logits, first pair {first}: the weights hold NaN or inf" in caplog.text
    caplog.clear()
    chunks = list(reranker.predict_chunks([PAIRS[:1], PAIRS[1:]]))
    np.testing.assert_allclose(np.concatenate(chunks), reranker.predict(PAIRS), rtol=1e-5, atol=1e-6)
    assert len(caplog.records) == 2


def test_chunks_are_scored_as_they_come(reranker):
    read = []
    scores = reranker.predict_chunks(
        (read.append(len(chunk)) or chunk for chunk in (PAIRS[:3], PAIRS[3:])), batch_size=2
    )
    first = next(scores)
    assert read == [3]
    assert first.dtype == np.float32
    np.testing.assert_allclose(np.concatenate([first, *scores]), reranker.predict(PAIRS), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="batch_size must be None or an int above 0, got 0"):
        reranker.predict_chunks([PAIRS], batch_size=0)


@pytest.mark.parametrize("kind", [set, frozenset])
def test_what_has_no_order_is_refused(reranker, kind):
    for call, name in (
        (lambda: reranker.predict(kind(PAIRS)), "pairs"),
        (lambda: reranker.rank("q", kind(PAIRS)), "documents"),
        (lambda: reranker.rank_batch(kind(PAIRS), [["a"]]), "queries"),
        (lambda: reranker.rank_batch(["a"], kind(PAIRS)), "documents_per_query"),
    ):
        with pytest.raises(TypeError, match=f"^{name} must be "):
            call()
    with pytest.raises(TypeError, match="pair 0 must be two strings"):
        reranker.predict([kind(PAIRS)])


def test_views_of_a_dict_have_an_order(reranker):
    passages = {passage: query for query, passage in PAIRS}
    np.testing.assert_array_equal(
        reranker.predict({q: p for p, q in passages.items()}.items()),
        reranker.predict(list({q: p for p, q in passages.items()}.items())),
    )
    assert len(reranker.rank("bees", passages.keys())) == 4


@pytest.mark.parametrize(
    ("chunks", "error", "message"),
    [
        ([PAIRS, [("a", None)]], TypeError, "chunk 1: the passage of pair 0 must be a string, got NoneType None"),
        ([("ab", "cd")], TypeError, r"chunk 0 must be a list of pairs, got a single pair: tuple \('ab', 'cd'\)"),
        (["ab"], TypeError, "chunk 0: pairs must be a .* got str 'ab'"),
    ],
)
def test_wrong_chunks_are_named(reranker, chunks, error, message):
    with pytest.raises(error, match=message):
        list(reranker.predict_chunks(chunks))
    with pytest.raises(ValueError, match="batch_size must be None or an int above 0, got 0"):
        reranker.predict_chunks(chunks, batch_size=0)


def test_wrong_arguments_change_nothing(reranker):
    with pytest.raises(ValueError, match="batch_size must be None or an int above 0, got 0"):
        reranker.predict(PAIRS, batch_size=0, device=["cpu", "cpu"])
    assert reranker.devices == [torch.device("cpu")]
    with pytest.raises(TypeError, match="rank and rank_batch take no argument 'apply_softmax', only show_progress_bar"):
        reranker.rank("q", ["a"], apply_softmax=True)


@pytest.mark.parametrize("dtype", ["int4", "float8", "float8_e4m3fn", "cuda", torch.int32, 16])
def test_a_wrong_dtype_is_named(model, tokenizer, reranker_checkpoint, dtype):
    for arguments in ((model, tokenizer), (reranker_checkpoint,)):
        with pytest.raises(ValueError, match=rf"dtype must be 'auto', 'float32', 'bfloat16', .* got {dtype!r}"):
            CrossEncoder(*arguments, device="cpu", dtype=dtype)


def test_processes_score_for_themselves_unless_told_otherwise(reranker, monkeypatch):
    monkeypatch.setattr("llama_bidir.cross_encoder.is_shared", lambda device: 1 / 0)
    reranker.predict(PAIRS)
    reranker.distributed = True
    with pytest.raises(ZeroDivisionError):
        reranker.predict(PAIRS)


def test_truncation_is_said_once_a_call(reranker, caplog):
    long = "bees " * 300
    reranker.predict([("q", long), ("q", long), ("q", "p")])
    assert [record.message for record in caplog.records] == [
        "2 of 3 pairs were longer than 256 tokens and were cut to fit: raise max_length to keep more"
    ]
    caplog.clear()
    reranker.predict([("q", "p")])
    assert caplog.text == ""


def test_base_checkpoint_gets_a_head_and_a_pad_token(base_checkpoint, tmp_path, caplog):
    torch.manual_seed(0)
    reranker = CrossEncoder(base_checkpoint)
    assert "score.weight is new" in caplog.text
    assert reranker.tokenizer.pad_token == "<|end|>"
    assert reranker.model.dtype == torch.float32
    assert reranker.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    scores = reranker.predict(PAIRS)
    reranker.save_pretrained(tmp_path / "saved")
    caplog.clear()
    reloaded = CrossEncoder.from_pretrained(str(tmp_path / "saved"))
    assert caplog.text == ""
    assert reloaded.tokenizer.pad_token == "<|end|>"
    assert np.array_equal(reloaded.predict(PAIRS), scores)


def test_template_and_length_argument_then_checkpoint_then_default(base_checkpoint, tmp_path):
    first = CrossEncoder(base_checkpoint, prompt_template="{passage} || {query}", max_length=64)
    first.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["prompt_template"], config["rerank_max_length"]) == ("{passage} || {query}", 64)
    assert config["sentence_transformers"] == {"activation_fn": "torch.nn.modules.linear.Identity"}
    second = CrossEncoder(tmp_path)
    assert np.array_equal(second.predict(PAIRS), first.predict(PAIRS))
    third = CrossEncoder(tmp_path, prompt_template="{query}: {passage}", max_length=32)
    assert (third.config.prompt_template, third.config.rerank_max_length) == ("{query}: {passage}", 32)
    default = CrossEncoder(base_checkpoint)
    assert default.config.prompt_template == "question:{query} \n \n passage:{passage}"
    assert default.config.rerank_max_length == 256


def test_saved_checkpoint_loads_through_the_auto_classes(reranker, tmp_path):
    reranker.save_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert np.array_equal(CrossEncoder(model, tokenizer).predict(PAIRS), reranker.predict(PAIRS))


def test_an_existing_model_card_is_left_alone(reranker, tmp_path):
    reranker.save_pretrained(tmp_path)
    card = tmp_path / "README.md"
    assert "pipeline_tag: text-ranking" in card.read_text()
    card.write_text("mine")
    reranker.save_pretrained(tmp_path)
    assert card.read_text() == "mine"


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"prompt_template": "{query}"}, ValueError, "prompt_template must be a string with exactly one"),
        (
            {"prompt_template": "{query.__class__}{passage}"},
            ValueError,
            "prompt_template must be a string with exactly",
        ),
        ({"max_length": 7}, ValueError, "rerank_max_length is the maximum number of tokens .* got 7"),
        ({"max_length": 8, "prompt_template": "long template text {query} {passage}"}, ValueError, "leaves no room"),
        ({"max_length": 257}, ValueError, r"max_position_embeddings \(256\), got 257"),
        ({"num_labels": 2}, ValueError, "num_labels is 2, but the loaded model has 1"),
        ({"backend": "jax"}, ValueError, "backend must be 'torch' or 'onnx', got 'jax'"),
    ],
)
def test_wrong_arguments_of_the_constructor(model, tokenizer, kwargs, error, message):
    with pytest.raises(error, match=message):
        CrossEncoder(model, tokenizer, **kwargs)


def test_wrong_models(model, tmp_path):
    with pytest.raises(TypeError, match="a loaded model needs its tokenizer"):
        CrossEncoder(model)
    with pytest.raises(TypeError, match=r"must be a path, a Hub id or a .*, got int"):
        CrossEncoder(3)
    with pytest.raises(TypeError, match="LlamaBidirectionalForSequenceClassification, got LlamaBidirectionalModel"):
        CrossEncoder(model.model, make_tokenizer(eos_token="<|end|>"))
    with pytest.raises(OSError, match="is not a checkpoint: there is no such folder"):
        CrossEncoder(tmp_path / "missing")
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="is not a checkpoint: it is a file"):
        CrossEncoder(tmp_path / "file")


def test_model_kwargs_reach_what_they_are_for(reranker_checkpoint, tmp_path):
    assert CrossEncoder(reranker_checkpoint, model_kwargs={"torch_dtype": torch.bfloat16}).model.dtype == torch.bfloat16
    shutil.copytree(reranker_checkpoint, tmp_path / "sub")
    nested = CrossEncoder(tmp_path, model_kwargs={"subfolder": "sub"})
    np.testing.assert_array_equal(nested.predict(PAIRS), CrossEncoder(reranker_checkpoint).predict(PAIRS))
    with pytest.raises(ValueError, match="device 'cpu' and a device_map in model_kwargs exclude each other"):
        CrossEncoder(reranker_checkpoint, device="cpu", model_kwargs={"device_map": "cpu"})


def test_a_refused_template_changes_nothing(model, tokenizer):
    before = model.config.to_dict()
    with pytest.raises(ValueError, match="leaves no room"):
        CrossEncoder(model, tokenizer, prompt_template="a long text before {query} {passage}", max_length=9)
    assert model.config.to_dict() == before


def test_template_and_length_follow_the_configuration(reranker, tmp_path):
    reranker.config.prompt_template, reranker.config.rerank_max_length = "{passage} {query}", 16
    reranker.save_pretrained(tmp_path)
    np.testing.assert_array_equal(CrossEncoder(tmp_path, device="cpu").predict(PAIRS), reranker.predict(PAIRS))


def test_slow_tokenizers_are_refused(model):
    tokenizer = make_tokenizer(eos_token="<|end|>")
    slow = type("SlowTokenizer", (type(tokenizer),), {"is_fast": False})(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|end|>"
    )
    with pytest.raises(TypeError, match="SlowTokenizer has no token offsets"):
        CrossEncoder(model, slow)


def test_dtype_of_a_loaded_model_leaves_the_rotary_frequencies_alone(model, tokenizer):
    frequencies = model.model.rotary_emb.inv_freq.clone()
    reranker = CrossEncoder(model, tokenizer, dtype="bfloat16")
    assert reranker.model.dtype == torch.bfloat16
    assert torch.equal(reranker.model.model.rotary_emb.inv_freq, frequencies)
    assert reranker.predict(PAIRS).dtype == np.float32


def test_packed_and_padded_scores_are_one(tokenizer):
    padded = CrossEncoder(make_model(attn_implementation="eager"), tokenizer)
    packed = CrossEncoder(make_model(), tokenizer, device="cpu")
    assert (padded.engine().is_packed, packed.engine().is_packed) == (False, True)
    np.testing.assert_allclose(packed.predict(PAIRS), padded.predict(PAIRS), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_batches_keep_to_the_budget(tokenizer, monkeypatch, implementation):
    reranker = CrossEncoder(make_model(attn_implementation=implementation), tokenizer)
    sizes = []
    engine = reranker.engine()
    forward = engine._forward
    monkeypatch.setattr(
        engine, "_forward", lambda ids, *args: sizes.append([len(i) for i in ids]) or forward(ids, *args)
    )
    pairs = [(f"{number}", passage) for number in range(3) for _, passage in PAIRS]
    expected = reranker.predict(pairs)
    sizes.clear()
    np.testing.assert_allclose(reranker.predict(pairs, max_tokens_per_batch=60), expected, rtol=1e-5, atol=1e-6)
    assert max(len(batch) for batch in sizes) > 1
    used = [sum(batch) if implementation == "sdpa" else len(batch) * max(batch) for batch in sizes]
    assert all(tokens <= 60 or len(batch) == 1 for tokens, batch in zip(used, sizes, strict=True))
    sizes.clear()
    reranker.predict(pairs, batch_size=1)
    assert [len(batch) for batch in sizes] == [1] * 12


@pytest.mark.parametrize("with_config", [True, False])
def test_adapter_folder_reloads_to_equal_scores(base_checkpoint, tmp_path, with_config, caplog):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    fields = {"pooling": "last", "temperature": 0.5} if with_config else {}
    base = LlamaBidirectionalForSequenceClassification.from_pretrained(base_checkpoint, **fields)
    lora = peft.LoraConfig(task_type="SEQ_CLS", r=2, init_lora_weights=False, target_modules=["q_proj", "v_proj"])
    adapted = CrossEncoder(peft.get_peft_model(base, lora), AutoTokenizer.from_pretrained(base_checkpoint))
    adapted.save_pretrained(tmp_path)
    if not with_config:
        (tmp_path / "config.json").unlink()
    assert not (tmp_path / "model.safetensors").exists()
    caplog.clear()
    reloaded = CrossEncoder.from_pretrained(tmp_path)
    assert "score.weight" not in caplog.text
    assert (reloaded.config.pooling, reloaded.config.temperature) == (("last", 0.5) if with_config else ("avg", 1.0))
    np.testing.assert_array_equal(reloaded.predict(PAIRS), adapted.predict(PAIRS))
    with adapted.model.disable_adapter():
        assert abs(reloaded.predict(PAIRS) - adapted.predict(PAIRS)).max() > 1e-3


def test_progress_bar(reranker, capsys, caplog):
    reranker.predict(PAIRS)
    assert capsys.readouterr().err == ""
    reranker.predict(PAIRS, show_progress_bar=True)
    assert "4/4" in capsys.readouterr().err
    with caplog.at_level(logging.INFO, logger="llama_bidir.cross_encoder"):
        reranker.predict(PAIRS)
    assert "4/4" in capsys.readouterr().err


def test_the_code_of_a_tokenizer_is_never_offered_to_run(reranker_checkpoint, tmp_path):
    folder = tmp_path / "reranker"
    shutil.copytree(reranker_checkpoint, folder)
    path = folder / "tokenizer_config.json"
    fields = {
        **json.loads(path.read_text()),
        "tokenizer_class": "Own",
        "auto_map": {"AutoTokenizer": [None, "own.Own"]},
    }
    path.write_text(json.dumps(fields))
    (folder / "own.py").write_text("raise RuntimeError('code from a checkpoint was executed')")
    reranker = CrossEncoder(folder, device="cpu")  # reads tokenizer.json as it is
    expected = CrossEncoder(reranker_checkpoint, device="cpu").predict(PAIRS)
    np.testing.assert_array_equal(reranker.predict(PAIRS), expected)
