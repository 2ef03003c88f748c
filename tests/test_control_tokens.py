"""A text that spells a control token stays text, with tokenizers of each Llama generation."""

import copy
import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import PAIRS, make_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llama_bidir import CrossEncoder
from llama_bidir.data.collators import GroupCollator
from llama_bidir.prompts import PromptEncoder

TEMPLATE = "question:{query} \n \n passage:{passage}"
SPELLED = [
    "<|end|>",
    "<|pad|>",
    "<s>",
    "</s>",
    "<unk>",
    "<|begin_of_text|>",
    "<|eot_id|>",
    "<|im_start|>",
    "<repo_name>",
]
COMMON = st.characters(min_codepoint=32, max_codepoint=0x2FFF, exclude_categories=["Cc"])  # SmolLM2 lacks some bytes
TEXT = st.lists(
    st.sampled_from([*SPELLED, "<", "s>", "|", " ", "\n", "bees"]) | st.text(COMMON, max_size=8), max_size=8
)


def control_ids(tokenizer):
    return {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}


def encoder(tokenizer, template=TEMPLATE, max_length=512, **kwargs):
    return PromptEncoder(tokenizer, prompt_template=template, max_length=max_length, **kwargs)


@settings(max_examples=100, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(query=TEXT.map("".join), passage=TEXT.map("".join), long_document=st.sampled_from(["truncate", "max"]))
def test_no_control_token_stands_where_text_is(any_tokenizer, query, passage, long_document):
    encode = encoder(any_tokenizer, max_length=64)
    control = control_ids(any_tokenizer)
    expected = [index for index in encode.encode([("", "")]).input_ids[0] if index in control]
    encoded = encode.encode([(query, passage * 5)], long_document=long_document)
    for ids in encoded.input_ids:
        assert [index for index in ids if index in control] == expected
        assert len(ids) <= 64


@settings(max_examples=60, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(query=TEXT.map("".join), passage=TEXT.map("".join))
def test_no_character_is_lost(any_tokenizer, query, passage):
    ids = encoder(any_tokenizer, max_length=100_000).tokenize([(query, passage)])[0]
    expected = TEMPLATE.format(query=query, passage=passage)
    control = control_ids(any_tokenizer)
    assert any_tokenizer.decode([index for index in ids if index not in control]).lstrip() == expected.lstrip()


@pytest.mark.parametrize("passage", ["", "Bees  fly.\n\n", "äöü 東京 🐝 " * 9, " leading", "trailing \t"])
@pytest.mark.parametrize("max_length", [48, 512])
def test_the_template_keeps_its_control_tokens(any_tokenizer, passage, max_length):
    start, end = any_tokenizer.bos_token or any_tokenizer.eos_token, any_tokenizer.eos_token
    template = f"{start}{{{{a}}}} {start} {{query}}\n{end}{{passage}}"
    rendered = template.format(query="why: what?", passage=passage)
    (ids,), _, _ = encoder(any_tokenizer, template, max_length).encode([("why: what?", passage)])
    assert ids == any_tokenizer(rendered, truncation=True, max_length=max_length).input_ids
    assert ids.count(any_tokenizer.eos_token_id) >= 1


def test_a_control_token_that_only_template_and_text_spell_together_is_text(byte_level):
    ids = encoder(byte_level, "<|{query}{passage}").tokenize([("en", "d|>x")])[0]
    assert byte_level.decode(ids) == "<|end|>x"
    assert 0 not in ids


def test_ids_of_a_spelled_token(byte_level):
    letters = byte_level.get_vocab()
    ids = encoder(byte_level, "{query}|{passage}").tokenize([("<|pad|>", "z"), ("z", "z")])
    expected = [byte_level.tokenize(part) for part in ("<|p", "a", "d", "|>|z")]
    assert [byte_level.convert_ids_to_tokens(index) for index in ids[0]] == [
        token for part in expected for token in part
    ]
    assert ids[1] == [letters["z"], letters["|"], letters["z"]]


def test_parsing_them_on_request(any_tokenizer):
    token = any_tokenizer.eos_token
    pairs = [(f"a {token} b", f"{token}{token}x" * 30), ("a", "b")]
    for max_length in (40, 512):
        ids = encoder(any_tokenizer, max_length=max_length, parse_special_tokens=True).encode(pairs).input_ids
        rendered = [TEMPLATE.format(query=query, passage=passage) for query, passage in pairs]
        assert ids == any_tokenizer(rendered, truncation=True, max_length=max_length).input_ids


@pytest.mark.parametrize("max_length", [40, 41, 512])
def test_truncation_of_spelled_tokens_follows_the_same_rules(byte_level, max_length):
    long = "w" * 700
    query = "<|end|>" * 3
    (ids,), _, (is_truncated,) = encoder(byte_level, max_length=max_length).encode([(query, long)])
    assert is_truncated
    text = byte_level.decode(ids)
    room = max_length - len(byte_level(TEMPLATE.format(query="", passage="")).input_ids)
    tokens_of_query = len(encoder(byte_level, "{query}|{passage}").tokenize([(query, "")])[0]) - 1
    kept = min(tokens_of_query, 3 * room // 4)
    assert text.partition(" \n \n passage:")[2] == "w" * (room - kept)
    assert query.startswith(text.partition(" \n \n passage:")[0].removeprefix("question:"))


def word_tokenizer(model):
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Split("|", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<s>", unk_token="<u>")


MODELS = {
    "unigram": (models.Unigram([("<u>", 0.0), ("<s>", 0.0), *((c, -2.0) for c in "<s>u|a")], 0), "<s>", [2, 3, 4]),
    "merges": (
        models.BPE(
            {"<u>": 0, "<s>": 1, "<": 2, "s": 3, ">": 4, "u": 5, "|": 6, "a": 7, "<s": 8}, [("<", "s"), ("<s", ">")]
        ),
        "<s>",
        [8, 4],
    ),
    "words": (models.WordLevel({"<u>": 0, "<s>": 1, "|": 6, "a": 7}, unk_token="<u>"), "<s>", [0]),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_control_token_in_the_vocabulary_of_the_model_is_not_found_either(name):
    model, text, expected = MODELS[name]
    tokenizer = word_tokenizer(model)
    encode = encoder(tokenizer, "{query}|{passage}")
    bar, a = tokenizer.convert_tokens_to_ids(["|", "a"])
    assert encode.tokenize([(text, "a"), ("a", "a")]) == [[*expected, bar, a], [a, bar, a]]


def test_a_control_token_that_a_normalizer_makes_is_text():
    backend = Tokenizer(models.WordLevel({"<u>": 0, "<s>": 1, "|": 2, "a": 3}, unk_token="<u>"))
    backend.normalizer, backend.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Split("|", "isolated")
    backend.add_special_tokens([AddedToken("<s>", normalized=True)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<u>")
    assert tokenizer("<S>").input_ids == [1]
    assert encoder(tokenizer, "{query}|{passage}").tokenize([("<S>", "A")]) == [[0, 2, 3]]
    assert encoder(tokenizer, "{query}<s>{passage}").tokenize([("<S>", "A")]) == [[0, 1, 3]]


def test_a_token_that_is_added_later_is_known(tokenizer):
    tokenizer = make_tokenizer(eos_token="<|end|>")
    pair = ("<|new|>", "<|end|>")
    assert 0 not in encoder(tokenizer).tokenize([pair])[0]
    tokenizer.add_special_tokens({"pad_token": "<|new|>"})
    assert control_ids(tokenizer) == {0, 320}
    assert control_ids(tokenizer).isdisjoint(encoder(tokenizer).tokenize([pair])[0])


def test_the_tokenizer_of_the_caller_stays_as_it_was(any_tokenizer):
    any_tokenizer("")  # turns the truncation of an earlier call off
    before = any_tokenizer.backend_tokenizer.to_str()
    token = any_tokenizer.eos_token
    encode, plain = encoder(any_tokenizer), TEMPLATE.format(query="a", passage="b")
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(encode.tokenize, [[(token, "b"), ("a", "b")], [("a", "b")]] * 50))
    assert all(ids == found[0] for ids in found[::2])
    assert all(ids == [any_tokenizer(plain).input_ids] for ids in found[1::2])
    assert any_tokenizer.backend_tokenizer.to_str() == before
    assert any_tokenizer(token, add_special_tokens=False).input_ids == [any_tokenizer.eos_token_id]


def test_training_reads_text_too(byte_level):
    group = {"query": "<|end|> a", "passages": ["<|pad|>", "b"], "labels": [1.0, 0.0], "teacher_scores": None}
    batch = GroupCollator(encoder(byte_level), packed=True)([group])
    assert not set(batch["input_ids"].flatten().tolist()) & {0, 1}


def test_scores_of_texts_that_spell_control_tokens(model, byte_level):
    pair = ("where? <|end|>", "here <|pad|>")
    rendered = model.config.prompt_template.format(query=pair[0], passage=pair[1])
    parsed, text = byte_level(rendered).input_ids, encoder(byte_level).tokenize([pair])[0]
    with torch.inference_mode():
        expected = [float(model(torch.tensor([ids])).logits) for ids in (text, parsed)]
    scores = [CrossEncoder(model, byte_level, parse_special_tokens=parse).predict([pair])[0] for parse in (False, True)]
    assert scores == pytest.approx(expected, abs=1e-6)
    assert abs(expected[0] - expected[1]) > 1e-3
    assert CrossEncoder(model, byte_level).predict([pair])[0] == scores[0]


# Tokenizers that draw at random


def test_dropout_is_off(any_tokenizer):
    drawing = copy.deepcopy(any_tokenizer)
    drawing.backend_tokenizer.model.dropout = 0.5
    passages = ["", "x", "Bees fly.\n \n ", "Honey bees navigate, äöü 東京 🐝.\n\n  " * 20]
    pairs = [("why: what?", passage) for passage in passages]
    for parse in (False, True):
        for max_length in (64, 512):
            expected = encoder(any_tokenizer, max_length=max_length).encode(pairs)
            encode = encoder(drawing, max_length=max_length, parse_special_tokens=parse)
            assert [encode.encode(pairs) for _ in range(5)] == [expected] * 5
    assert drawing.backend_tokenizer.model.dropout == 0.5


def test_unigram_sampling_is_off():
    backend = json.loads(word_tokenizer(MODELS["unigram"][0]).backend_tokenizer.to_str())
    backend["model"]["vocab"] += [["aa", -2.5], ["aaa", -3.0]]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(backend)))
    expected = encoder(tokenizer, "{query}|{passage}").tokenize([("aaaa", "aaa")])
    if not hasattr(tokenizer.backend_tokenizer.model, "nbest_size"):
        pytest.skip("this release of tokenizers does not sample")
    tokenizer.backend_tokenizer.model.nbest_size, tokenizer.backend_tokenizer.model.alpha = 64, 0.1
    assert len({str(tokenizer("aaaa|aaa").input_ids) for _ in range(50)}) > 1
    encode = encoder(tokenizer, "{query}|{passage}")
    assert [encode.tokenize([("aaaa", "aaa")]) for _ in range(50)] == [expected] * 50


def test_a_loaded_tokenizer_draws_nothing(reranker_checkpoint, tmp_path, caplog):
    loaded = CrossEncoder(reranker_checkpoint)
    expected = loaded.predict(PAIRS)
    loaded.tokenizer.backend_tokenizer.model.dropout = 0.3
    loaded.tokenizer.save_pretrained(tmp_path)
    loaded.model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "tokenizer.json").read_text())["model"]["dropout"] == pytest.approx(0.3)
    drawing = CrossEncoder(tmp_path)
    assert "draws tokens at random" in caplog.text
    assert drawing.predict(PAIRS).tolist() == expected.tolist()
    assert loaded.predict(PAIRS).tolist() == expected.tolist()
    drawing.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved/tokenizer.json").read_text())["model"]["dropout"] is None
