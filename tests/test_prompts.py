"""Rendering and truncation, with tokenizers of each Llama generation."""

import shutil

import pytest
import torch
from helpers import PAIRS, make_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from llama_bidir import CrossEncoder
from llama_bidir.data.collators import GroupCollator
from llama_bidir.prompts import PromptEncoder, ensure_pad_token

TEMPLATE = "question:{query} \n \n passage:{passage}"
LONG = "Honey bees navigate by the sun, äöü 東京 🐝, and by scent.\n\n  " * 40


def encode(tokenizer, query, passage, *, template=TEMPLATE, max_length=512):
    return PromptEncoder(tokenizer, prompt_template=template, max_length=max_length).encode([(query, passage)])


@pytest.mark.parametrize("max_length", [40, 64, 65, 66, 67, 200, 512])
@pytest.mark.parametrize("passage", ["", "x", "Bees fly.\n \n ", LONG, LONG.replace(" ", "")])
def test_ids_are_those_of_the_tokenizer(any_tokenizer, passage, max_length):
    query = "why: what?"
    rendered = TEMPLATE.format(query=query, passage=passage)
    (ids,), _, (is_truncated,) = encode(any_tokenizer, query, passage, max_length=max_length)
    whole = any_tokenizer(rendered, verbose=False).input_ids
    assert ids == any_tokenizer(rendered, truncation=True, max_length=max_length).input_ids
    assert is_truncated == (len(whole) > max_length)


def test_text_after_the_passage_and_the_query_stay_whole(any_tokenizer):
    template = "Passage: {passage}\n\nQuery: {query}\nRelevant ({{yes}}/no):"
    (ids,), _, (is_truncated,) = encode(
        any_tokenizer, "where do bees go?", LONG + "end", template=template, max_length=80
    )
    text = any_tokenizer.decode(ids, skip_special_tokens=True)
    assert len(ids) == 80
    assert is_truncated
    assert text.endswith("\n\nQuery: where do bees go?\nRelevant ({yes}/no):")
    kept = text.removeprefix("Passage: ").removesuffix("\n\nQuery: where do bees go?\nRelevant ({yes}/no):")
    assert len(kept) > 10
    assert LONG.startswith(kept.rstrip("�"))


def test_a_query_that_leaves_no_room_is_cut_to_three_quarters(byte_level):
    template_length = len(byte_level(TEMPLATE.format(query="", passage="")).input_ids)
    max_length = template_length + 40
    query, passage = "z" * 31, "w" * 100  # one token per letter in this vocabulary
    (ids,), _, _ = encode(byte_level, query, passage, max_length=max_length)
    assert byte_level.decode(ids) == TEMPLATE.format(query="z" * 30, passage="w" * 10)
    (ids,), _, _ = encode(byte_level, "z" * 30, passage, max_length=max_length)
    assert byte_level.decode(ids) == TEMPLATE.format(query="z" * 30, passage="w" * 10)
    (ids,), _, _ = encode(byte_level, "z" * 500, "ww", max_length=max_length)
    assert byte_level.decode(ids) == TEMPLATE.format(query="z" * 30, passage="ww")


def test_a_long_query_that_fits_with_its_passage_is_left_alone(byte_level):
    max_length = len(byte_level(TEMPLATE.format(query="", passage="")).input_ids) + 40
    (ids,), _, (is_truncated,) = encode(byte_level, "z" * 38, "ww", max_length=max_length)
    assert byte_level.decode(ids) == TEMPLATE.format(query="z" * 38, passage="ww")
    assert not is_truncated


def test_a_query_of_any_length_never_pushes_the_passage_out(any_tokenizer):
    (ids,), _, (is_truncated,) = encode(any_tokenizer, LONG + "end", "Bees", max_length=64)
    text = any_tokenizer.decode(ids, skip_special_tokens=True)
    query, _, passage = text.removeprefix("question:").partition(" \n \n passage:")
    assert passage == "Bees"
    assert LONG.startswith(query.rstrip("\ufffd"))
    assert is_truncated
    assert len(ids) <= 64


def test_braces_and_markers_in_texts_are_text(byte_level):
    encoder = PromptEncoder(byte_level, prompt_template=TEMPLATE, max_length=512)
    assert encoder.render("{passage}", "{query} {{x}}") == "question:{passage} \n \n passage:{query} {{x}}"


def test_no_pairs_are_no_ids(byte_level):
    assert PromptEncoder(byte_level, prompt_template=TEMPLATE, max_length=512).encode([]) == ([], [], [])


def test_a_length_below_the_template_is_refused(byte_level):
    length = len(byte_level(TEMPLATE.format(query="", passage="")).input_ids)
    with pytest.raises(ValueError, match=rf"max_length {length} leaves no room .* alone takes {length} tokens"):
        PromptEncoder(byte_level, prompt_template=TEMPLATE, max_length=length)
    assert len(encode(byte_level, "z" * 9, "w" * 9, max_length=length + 1).input_ids[0]) == length + 1


def test_pad_token_choice(llama2, llama3, smollm2):
    assert (llama2.pad_token, llama3.pad_token) == (None, None)
    ensure_pad_token(llama2, 400)
    ensure_pad_token(llama3, 128256)
    assert (llama2.pad_token, llama3.pad_token) == ("<unk>", "<|finetune_right_pad_id|>")
    expected = smollm2.pad_token or smollm2.unk_token  # older transformers read no pad token from a GGUF file
    ensure_pad_token(smollm2, 49152)
    assert smollm2.pad_token == expected
    eos_only = make_tokenizer(eos_token="<|end|>")
    ensure_pad_token(eos_only, 320)
    assert eos_only.pad_token == "<|end|>"


def test_pad_token_without_an_embedding_is_replaced(caplog):
    tokenizer = make_tokenizer(eos_token="<|end|>")
    tokenizer.add_special_tokens({"pad_token": "<|new|>"})
    vocab_size = len(tokenizer) - 1
    ensure_pad_token(tokenizer, vocab_size)
    assert tokenizer.pad_token == "<|end|>"
    assert "'<|new|>' has id" in caplog.text


def test_no_candidate_for_the_pad_token_is_an_error():
    with pytest.raises(ValueError, match="no pad, unk or eos token among the model's 320 embeddings"):
        ensure_pad_token(make_tokenizer(), 320)


def test_tokenizers_survive_saving_with_their_pad_token(llama2_checkpoint, tmp_path):
    shutil.copytree(llama2_checkpoint, tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    ensure_pad_token(tokenizer, 400)
    tokenizer.save_pretrained(tmp_path / "saved")
    reloaded = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert reloaded.pad_token == "<unk>"
    assert reloaded(LONG).input_ids == tokenizer(LONG).input_ids


def test_a_token_beyond_the_embeddings_is_named(model, caplog):
    tokenizer = make_tokenizer(eos_token="<|end|>", pad_token="<|pad|>")
    expected = CrossEncoder(model, tokenizer).predict(PAIRS)
    tokenizer.add_tokens(["garden", "beehive"])
    reranker = CrossEncoder(model, tokenizer)
    rule = r"token 'beehive' has id 321, but the model has 320 embeddings: pass the tokenizer that belongs to the model"
    with pytest.raises(ValueError, match=rule):
        reranker.predict([("a", "the garden and the beehive")])
    with pytest.raises(ValueError, match=rule):
        reranker.rank("beehive", ["a", "b"])
    assert reranker.predict(PAIRS[:2]).tolist() == pytest.approx(expected[:2].tolist(), abs=1e-6)


@pytest.mark.parametrize("packed", [False, True])
def test_a_token_beyond_the_embeddings_is_named_in_training(model, packed):
    tokenizer = make_tokenizer(eos_token="<|end|>", pad_token="<|pad|>")
    tokenizer.add_tokens(["beehive"])
    collator = GroupCollator(PromptEncoder.from_config(tokenizer, model.config), packed=packed)
    group = {"query": "a", "passages": ["beehive", "b"], "labels": [1.0, 0.0], "teacher_scores": None}
    with pytest.raises(ValueError, match="token 'beehive' has id 320, but the model has 320 embeddings"):
        collator([group])


@pytest.mark.parametrize(("index", "named"), [(320, 320), (-1, -1), (5000, 5000)])
def test_the_model_names_an_id_without_an_embedding(model, index, named):
    with pytest.raises(
        ValueError, match=f"from 0 to 319, because the model has 320 embeddings, got {named}: use the tokenizer"
    ):
        model(input_ids=torch.tensor([[1, index]]), labels=torch.tensor([1.0]))
    model.resize_token_embeddings(5001)
    assert index < 0 or model(input_ids=torch.tensor([[1, index]])).logits.isfinite().all()


def test_a_vocabulary_with_gaps_is_checked_too(model):
    backend = Tokenizer(models.WordLevel({"a": 0, "b": 1, "z": 999, "<u>": 2}, unk_token="<u>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<u>")
    encoder = PromptEncoder(tokenizer, prompt_template="{query} {passage}", max_length=9, vocab_size=320)
    assert encoder.encode([("a", "b")]).input_ids == [[0, 1]]
    with pytest.raises(ValueError, match="token 'z' has id 999, but the model has 320 embeddings"):
        encoder.encode([("a", "b"), ("a", "z")])
