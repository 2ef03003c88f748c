"""Texts of any kind through templates, the encoder, scoring and ranking."""

import re
from functools import cache
from typing import Any

import numpy as np
from hypothesis import strategies as st

from llama_bidir import CrossEncoder
from llama_bidir.checkpoints.chat_template import make_chat_template
from llama_bidir.fields_llama_bidir import DEFAULT_PROMPT_TEMPLATE, check_prompt_template
from llama_bidir.prompts import LONG_DOCUMENT, PromptEncoder
from tests.helpers import make_model, make_tokenizer

from .target import Target, attempt, check_message
from .texts import any_texts, texts

MAX_LENGTH = 48
LITERALS = ["", " ", "\n", "{{", "}}", "query: ", "<|end|>", "é", " \n passage:", "\u202e", "%", "東"]
BROKEN = [
    "{",
    "}",
    "{query}",
    "{passage}",
    "{instruction}",
    "{instruction!s}",
    "{x}",
    "{0}",
    "{}",
    "{query!r}",
    "{query:>9}",
    "{query.x}",
    "{passage[0]}",
]
# A template in the words of its rule: literal text, doubled braces, and each field once, {instruction} at most once.
PART = re.compile(r"[^{}]|\{\{|\}\}|\{(query|passage|instruction):?\}", re.DOTALL)

templates = st.builds(
    lambda literals, fields: "".join(
        literal + field for literal, field in zip(literals, [*fields, *[""] * (4 - len(fields))], strict=True)
    ),
    st.lists(st.lists(st.sampled_from(LITERALS), max_size=3).map("".join), min_size=4, max_size=4),
    st.permutations(["{query}", "{passage}"]) | st.permutations(["{query}", "{passage}", "{instruction}"]),
)
any_templates = templates | st.lists(st.sampled_from(LITERALS + BROKEN), max_size=6).map("".join) | any_texts


@cache
def tokenizer() -> Any:
    return make_tokenizer(eos_token="<|end|>", pad_token="<|pad|>")


@cache
def cross_encoder() -> CrossEncoder:
    return CrossEncoder(make_model(), tokenizer(), max_length=MAX_LENGTH, device="cpu")


def check_template(template: str, query: str, passage: str, instruction: str) -> None:
    """A template is accepted if it has each field once and nothing else in braces, and renders like `str.format`."""
    fields, position = [], 0
    while (part := PART.match(template, position)) is not None:
        fields += [part[1]] if part[1] else []
        position = part.end()
    is_valid = position == len(template) and sorted(fields) in (
        ["passage", "query"],
        ["instruction", "passage", "query"],
    )
    accepted, error = attempt(check_prompt_template, template)
    if not is_valid:
        assert accepted is None, "a malformed template is accepted"
        return check_message(error, "prompt_template")
    assert accepted == template
    values = {"query": query, "passage": passage, "instruction": instruction}
    expected = PART.sub(lambda part: values[part[1]] if part[1] else part[0][0], template)
    assert template.format(**values) == expected
    return None


def check_encoder(template: str, pairs: list[tuple[str, str]], instruction: str, long_document: str) -> None:
    """No sequence is too long; a pair that fits is the tokenized prompt; else only the passage and the query give."""
    options = {"instruction": instruction} if "{instruction}" in template else {}
    encoder, error = attempt(PromptEncoder, tokenizer(), prompt_template=template, max_length=MAX_LENGTH, **options)
    if error is not None:
        return check_message(error, "max_length", "leaves no room")
    encoded, error = attempt(encoder.encode, pairs, long_document=long_document)
    if error is not None:
        return check_message(error, "max_length", "leaves no room")
    assert len(encoded.num_windows) == len(encoded.is_truncated) == len(pairs)
    special = [
        id_
        for id_ in tokenizer()(template.format(query="", passage="", instruction=""))["input_ids"]
        if _is_special(id_)
    ]
    sequences = iter(encoded.input_ids)
    for pair, count, is_truncated in zip(pairs, encoded.num_windows, encoded.is_truncated, strict=True):
        windows = [next(sequences) for _ in range(count)]
        for window in windows:
            assert len(window) <= MAX_LENGTH
            assert [id_ for id_ in window if _is_special(id_)] == special, "a text holds a control token"
        if any(token in "".join(pair) for token in ("<|end|>", "<|pad|>")) or "<|" in instruction:
            continue  # ordinary text, which the tokenizer alone would not leave as text
        rendered = encoder.render(*pair)
        ids = tokenizer()(rendered)["input_ids"]
        if len(ids) <= MAX_LENGTH:
            assert (windows, is_truncated) == ([ids], False)
        else:
            _check_windows(encoder, pair, ids, windows, is_truncated, long_document)
    assert next(sequences, None) is None
    return None


def _is_special(id_: int) -> bool:
    return id_ in tokenizer().all_special_ids


def _check_windows(
    encoder: PromptEncoder,
    pair: tuple[str, str],
    ids: list[int],
    windows: list[list[int]],
    is_truncated: bool,
    long_document: str,
) -> None:
    """The windows against the rules of truncation, from the spans of the two texts in the prompt."""
    query, passage = pair
    before = encoder.render("\ue000", "\ue001")
    start = before.index("\ue000") + (len(passage) - 1 if before.index("\ue000") > before.index("\ue001") else 0)
    end = before.index("\ue001") + (len(query) - 1 if before.index("\ue001") > before.index("\ue000") else 0)
    offsets = tokenizer()(encoder.render(*pair), return_offsets_mapping=True)["offset_mapping"]
    in_query = [start <= left and right <= start + len(query) for left, right in offsets]
    in_passage = [
        end <= left and right <= end + len(passage) and not inside
        for (left, right), inside in zip(offsets, in_query, strict=True)
    ]
    fixed = [not (one or other) for one, other in zip(in_query, in_passage, strict=True)]
    room = MAX_LENGTH - sum(fixed)
    query_room = sum(in_query) if 4 * sum(in_query) <= 3 * room else 3 * max(room, 0) // 4
    passage_room = room - query_room
    kept, num_query, num_passage = [], 0, 0
    for id_, one, other in zip(ids, in_query, in_passage, strict=True):
        num_query += one
        num_passage += other
        if not (one and num_query > query_room) and not (other and num_passage > passage_room):
            kept.append(id_)
    assert windows[0] == kept
    assert is_truncated == (query_room < sum(in_query) or len(windows) == 1)
    if long_document == "truncate":
        assert len(windows) == 1
    if encoder.prompt_template.endswith("{passage}") and query_room == sum(in_query) and long_document == "truncate":
        assert windows[0] == ids[:MAX_LENGTH]
    if len(windows) > 1:  # each token of the passage is in a window
        all_of_passage = [id_ for id_, inside in zip(ids, in_passage, strict=True) if inside]
        assert set(all_of_passage) <= {id_ for window in windows for id_ in window}


def check_scores(query: str, documents: list[str]) -> None:
    """A pair scores as it does alone, `rank` sorts by score with ties in order, and surrogates are refused by name."""
    pairs = [(query, document) for document in documents]
    scores, error = attempt(cross_encoder().predict, pairs)
    is_bad = [any("\ud800" <= character <= "\udfff" for character in query + document) for document in documents]
    if any(is_bad):
        assert error is not None, "a lone surrogate is scored"
        return check_message(error, f"of pair {is_bad.index(True)}", "without lone surrogates")
    if error is not None:
        return check_message(error, "max_length", "leaves no room")
    assert scores.dtype == np.float32
    assert scores.shape == (len(documents),)
    assert np.isfinite(scores).all()
    for pair, score in zip(pairs, scores, strict=True):
        assert abs(cross_encoder().predict(pair) - score) <= 1e-5 * max(1, abs(score))
    ranking = cross_encoder().rank(query, documents, return_documents=True)
    order = sorted(range(len(documents)), key=lambda index: -scores[index])
    assert [result["corpus_id"] for result in ranking] == order
    assert [result["text"] for result in ranking] == [documents[index] for index in order]
    assert [result["score"] for result in ranking] == [float(scores[index]) for index in order]
    return None


def check_chat_template(template: str, query: str, passage: str, instruction: str) -> None:
    """The prompt as a chat template renders to the same text and ids as the prompt itself."""
    written, error = attempt(make_chat_template, tokenizer(), template, instruction)
    if error is not None:
        return check_message(error, "cannot be written as a chat template")
    messages = [{"role": "query", "content": query}, {"role": "document", "content": passage}]
    rendered = tokenizer().apply_chat_template(messages, chat_template=written, tokenize=False)
    assert rendered == template.format(query=query, passage=passage, instruction=instruction)
    system = [{"role": "system", "content": query}]
    rendered = tokenizer().apply_chat_template(system + messages, chat_template=written, tokenize=False)
    assert rendered == template.format(query=query, passage=passage, instruction=query)
    return None


pairs = st.lists(st.tuples(texts, texts), max_size=4)
TARGETS = [
    Target(
        "prompt template",
        check_template,
        {"template": any_templates, **dict.fromkeys(("query", "passage", "instruction"), any_texts)},
    ),
    Target(
        "prompt encoder",
        check_encoder,
        {
            "template": st.just(DEFAULT_PROMPT_TEMPLATE) | templates,
            "pairs": pairs,
            "instruction": st.just("") | texts,
            "long_document": st.sampled_from(LONG_DOCUMENT),
        },
    ),
    Target(
        "scores and ranking",
        check_scores,
        {"query": any_texts, "documents": st.lists(any_texts, min_size=1, max_size=5)},
        weight=0.3,
        test_cases=40,
    ),
    Target(
        "chat template",
        check_chat_template,
        {"template": templates, **dict.fromkeys(("query", "passage", "instruction"), texts)},
        weight=0.5,
    ),
]
