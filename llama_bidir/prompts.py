"""Turns a query and a passage into token ids. Rendering and truncation happen only here."""

import logging
import string
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple, Self

from transformers import PreTrainedTokenizerBase

from .configuration_llama_bidir import LlamaBidirectionalConfig
from .fields_llama_bidir import check_instruction, check_prompt_template
from .utils.errors import InputTypeError
from .utils.tokenization import PrivateTokenizer, control_tokens, find_any, is_sampling, largest_id, private_tokenizer

logger = logging.getLogger(__name__)

PAD_TOKEN_OF_LLAMA_3 = "<|finetune_right_pad_id|>"
LONG_DOCUMENT = ("truncate", "max", "first_max")

# A query, a passage and, optionally, the instruction of this pair.
Pair = tuple[str, str] | tuple[str, str, str | None]


def check_long_document(long_document: Any) -> str:
    """Returns `long_document`. Raises ValueError unless it is `truncate`, `max` or `first_max`."""
    if long_document not in LONG_DOCUMENT:
        raise ValueError(f"long_document must be one of 'truncate', 'max' or 'first_max', got {long_document!r}")
    return str(long_document)


class EncodedPairs(NamedTuple):
    """
    The token ids of rendered pairs, in input order.

    Args:
        input_ids: one sequence per window. The windows of a pair follow each other.
        num_windows: the number of sequences of each pair: 1 unless its passage was split.
        is_truncated: whether the length limit removed tokens, for each pair.
    """

    input_ids: list[list[int]]
    num_windows: list[int]
    is_truncated: list[bool]

    @property
    def num_truncated(self) -> int:
        """The number of pairs that lost tokens."""
        return sum(self.is_truncated)


class PromptEncoder:
    """
    Renders pairs with a template and tokenizes them to at most `max_length` tokens.

    A pair that is too long loses the end of its passage, or its passage is split into windows. The template, the
    instruction and the query stay whole, with one exception: in such a pair, a query that takes more than three
    quarters of the tokens that template and instruction leave free is cut to three quarters, from its end.

    Queries, passages and instructions are text: if one spells a control token, such as `<|eot_id|>` or `</s>`, the
    characters are tokenized as ordinary text. The template keeps its control tokens. The same pair always gets the same
    ids, even if the tokenizer draws ids at random (BPE dropout).

    Args:
        tokenizer (`PreTrainedTokenizerBase`): a fast tokenizer, which is not changed. Its offsets show which tokens
            belong to the passage.
        prompt_template (`str`): text with one `{query}`, one `{passage}` and at most one `{instruction}`.
        max_length (`int`): the maximum number of tokens of a rendered pair, including special tokens.
        instruction (`str`, *optional*): the text for `{instruction}` in pairs without an instruction of their own; by
            default, it is empty.
        parse_special_tokens (`bool`): also read control tokens in queries, passages and instructions, as the tokenizer
            itself does.
        vocab_size (`int`, *optional*): the number of embeddings of the model, to check every id.

    Raises:
        TypeError: the tokenizer is not a fast tokenizer.
        ValueError: the template is malformed, takes at least `max_length` tokens with the instruction, or has no field
            for the instruction.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        prompt_template: str,
        max_length: int,
        instruction: str | None = None,
        parse_special_tokens: bool = False,
        vocab_size: int | None = None,
    ):
        if not tokenizer.is_fast:
            raise InputTypeError(
                f"{type(tokenizer).__name__} has no token offsets, which truncation needs: pass a fast tokenizer, as "
                "AutoTokenizer.from_pretrained(checkpoint) returns"
            )
        self.tokenizer = tokenizer
        self.prompt_template = check_prompt_template(prompt_template)
        self.instruction = check_instruction(instruction, prompt_template)
        self.max_length = max_length
        self.parse_special_tokens = parse_special_tokens
        # If the tokenizer has no id beyond the embeddings, as usual, no batch needs a check.
        self._limit = None if vocab_size is None or largest_id(tokenizer) < vocab_size else vocab_size
        control = [] if parse_special_tokens else control_tokens(tokenizer)
        self._control_token = find_any(*(token.content for token in control))
        # A normalizer may turn other characters into the text of a control token.
        has_normalizer = tokenizer.backend_tokenizer.normalizer is not None
        is_normalized = has_normalizer and any(token.normalized for token in control)
        has_control = self._control_token.search(self.render("", "")) is not None
        self._always_private = is_sampling(tokenizer) or is_normalized or has_control
        template_length = len(self.tokenize([("", "")])[0])
        if template_length >= max_length:
            raise ValueError(
                f"max_length {max_length} leaves no room for a query and a passage: {self._name_template()} alone "
                f"takes {template_length} tokens. Raise max_length (rerank_max_length) or shorten it"
            )

    @classmethod
    def from_config(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        config: LlamaBidirectionalConfig,
        *,
        instruction: str | None = None,
        parse_special_tokens: bool = False,
    ) -> Self:
        """Returns an encoder with the prompt template, the maximum length and, unless given, the instruction of
        `config`."""
        return cls(
            tokenizer,
            prompt_template=config.prompt_template,
            max_length=config.rerank_max_length,
            instruction=config.instruction if instruction is None else instruction,
            parse_special_tokens=parse_special_tokens,
            vocab_size=config.vocab_size,
        )

    def render(self, query: str, passage: str, instruction: str | None = None) -> str:
        """Returns the text that is tokenized. Braces in the texts have no meaning."""
        return self.prompt_template.format(**self._values(query, passage, instruction))

    def encode(self, pairs: Sequence[Pair], *, long_document: str = "truncate") -> EncodedPairs:
        """
        Renders pairs and returns their token ids.

        Args:
            pairs: (query, passage) strings, which may be empty, or (query, passage, instruction).
            long_document: the treatment of a passage that does not fit. `"truncate"` cuts its end. `"max"` splits it
                into windows that overlap by a quarter. `"first_max"` also splits it, and starts every later window with
                the first eighth of the first one, where titles and summaries usually are.

        Returns:
            [`EncodedPairs`]. None of its sequences is longer than `max_length`.

        Raises:
            ValueError: in some pair, the template with the instruction and the tokens that it shares with a text exceed
                `max_length`, a pair has an instruction without a field, or a token has an id for which the model has
                no embedding.
        """
        if not pairs:
            return EncodedPairs([], [], [])
        encoded = EncodedPairs([], [], [])
        for pair, ids in zip(pairs, self.tokenize(pairs), strict=True):
            is_short = len(ids) <= self.max_length
            sequences, is_truncated = ([ids], False) if is_short else self._windows(pair, long_document)
            encoded.input_ids.extend(sequences)
            encoded.num_windows.append(len(sequences))
            encoded.is_truncated.append(is_truncated)
        if self._limit is not None:
            self._check_ids(encoded.input_ids, self._limit)
        return encoded

    def _check_ids(self, sequences: list[list[int]], vocab_size: int) -> None:
        largest = max(map(max, sequences))
        if largest >= vocab_size:
            raise ValueError(
                f"token {self.tokenizer.convert_ids_to_tokens(largest)!r} has id {largest}, but the model has "
                f"{vocab_size} embeddings: pass the tokenizer that belongs to the model, or add embeddings with "
                "model.resize_token_embeddings(len(tokenizer)) and train them"
            )

    def tokenize(self, pairs: Sequence[Pair]) -> list[list[int]]:
        """Returns the token ids of whole rendered pairs, however long they are."""
        rendered = [self.render(*pair) for pair in pairs]
        is_private = [self._needs_private(text) for text in rendered]
        plain = [text for text, private in zip(rendered, is_private, strict=True) if not private]
        plain_ids = iter(self._tokenize(plain)["input_ids"] if plain else [])
        if len(plain) == len(pairs):
            return list(plain_ids)
        template = self._private_template
        texts = [
            template.format(**self._values(*pair)) for pair, private in zip(pairs, is_private, strict=True) if private
        ]
        private_ids = (encoding.ids for encoding in self._private.encode(texts))
        return [next(private_ids if private else plain_ids) for private in is_private]

    def _values(self, query: str, passage: str, instruction: str | None = None) -> dict[str, str]:
        """Returns what the fields of the template stand for in a pair."""
        if instruction is not None and instruction != self.instruction:
            check_instruction(instruction, self.prompt_template)
        chosen = self.instruction if instruction is None else instruction
        return {"query": query, "passage": passage, "instruction": chosen or ""}

    def _name_template(self) -> str:
        given = f" with the instruction {self.instruction!r}" if self.instruction else ""
        return f"the template {self.prompt_template!r}{given}"

    def _tokenize(self, texts: list[str]) -> Any:
        return self.tokenizer(texts, return_attention_mask=False, verbose=False)

    def _needs_private(self, rendered: str) -> bool:
        return self._always_private or self._control_token.search(rendered) is not None

    @cached_property
    def _private(self) -> PrivateTokenizer:
        return private_tokenizer(self.tokenizer, parse_special_tokens=self.parse_special_tokens)

    @cached_property
    def _private_template(self) -> str:
        return self._private.rename(self.prompt_template)

    def _windows(self, pair: Pair, long_document: str) -> tuple[list[list[int]], bool]:
        """Returns the sequences of a pair that is too long, and whether any of its tokens is in none of them."""
        template, rendered, values = self.prompt_template, self.render(*pair), self._values(*pair)
        if self._needs_private(rendered):
            template = self._private_template
            encoding = self._private.encode([template.format(**values)])[0]
        else:
            encoding = self._tokenize([rendered]).encodings[0]
        ids: list[int] = encoding.ids
        offsets = [
            None if special else offset
            for offset, special in zip(encoding.offsets, encoding.special_tokens_mask, strict=True)
        ]
        spans = _character_spans(template, **values)
        query_tokens, passage_tokens = (_tokens_within(offsets, *spans[field]) for field in ("query", "passage"))
        room = self.max_length - (len(ids) - len(query_tokens) - len(passage_tokens))
        query_room = len(query_tokens) if 4 * len(query_tokens) <= 3 * room else 3 * max(room, 0) // 4
        passage_room = room - query_room
        if passage_room < 0:
            raise ValueError(
                f"max_length {self.max_length} leaves no room beside the template in "
                f"{self.render(**{**values, 'passage': ''})[:80]!r}: raise max_length (rerank_max_length) or shorten "
                "the template or the instruction"
            )
        lead = passage_room // 8 if long_document == "first_max" else 0
        starts = [] if long_document == "truncate" else _window_starts(len(passage_tokens), passage_room, lead)
        query_ids = ids[query_tokens.start : query_tokens.start + query_room]
        passage_ids = ids[passage_tokens.start : passage_tokens.stop]
        windows = [passage_ids[:passage_room]]
        windows += [passage_ids[:lead] + passage_ids[start : start + passage_room - lead] for start in starts]
        sequences = [_replace(ids, {query_tokens: query_ids, passage_tokens: window}) for window in windows]
        return sequences, query_room < len(query_tokens) or len(sequences) == 1


def _character_spans(template: str, **values: str) -> dict[str, tuple[int, int]]:
    """Returns the start and end of each value in the rendered text, in characters."""
    spans, position = {}, 0
    for literal, field, _, _ in string.Formatter().parse(template):
        position += len(literal)
        if field is not None:
            spans[field] = (position, position + len(values[field]))
            position += len(values[field])
    return spans


def _tokens_within(offsets: Sequence[tuple[int, int] | None], start: int, end: int) -> range:
    """Returns the indices of the tokens that lie wholly between two character positions."""
    inside = [index for index, span in enumerate(offsets) if span is not None and start <= span[0] and span[1] <= end]
    return range(inside[0], inside[-1] + 1) if inside else range(0)


def _replace(ids: list[int], replacements: Mapping[range, list[int]]) -> list[int]:
    """Returns `ids` with the tokens of each range replaced. The ranges do not overlap."""
    result, position = [], 0
    for span in sorted(filter(None, replacements), key=lambda span: span.start):
        result += ids[position : span.start] + replacements[span]
        position = span.stop
    return result + ids[position:]


def _window_starts(length: int, room: int, lead: int) -> list[int]:
    """
    Returns the starts of all windows but the first, in tokens of the passage.

    Each window overlaps the one before by a quarter of `room`. The last one ends with the passage. After the first, a
    window has `lead` tokens less room, because it repeats that many from the start of the passage.
    """
    size, overlap = room - lead, room // 4
    if length <= room or size <= overlap:
        return []
    last = length - size
    return [*range(room - overlap, last, size - overlap), last]


def ensure_pad_token(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """
    Makes one of the tokenizer's own tokens its pad token if it has no usable one. The embeddings need no new row.

    The choice is `<|finetune_right_pad_id|>` (Llama 3.1 and later), else the unk token, else the eos token. Attention
    and pooling mask the padding, so the choice never changes a score.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): changed in place.
        vocab_size (`int`): the number of rows of the model's embeddings. A usable id is below it.

    Raises:
        ValueError: the tokenizer has none of the three tokens with an id below `vocab_size`.
    """
    if tokenizer.pad_token is not None and tokenizer.pad_token_id < vocab_size:
        return
    vocabulary = tokenizer.get_vocab()
    for candidate in (PAD_TOKEN_OF_LLAMA_3, tokenizer.unk_token, tokenizer.eos_token):
        if candidate is not None and vocabulary.get(candidate, vocab_size) < vocab_size:
            if tokenizer.pad_token is not None:
                logger.warning(
                    f"pad token {tokenizer.pad_token!r} has id {tokenizer.pad_token_id}, but the model has "
                    f"{vocab_size} embeddings: padding with {candidate!r} instead"
                )
            tokenizer.pad_token = candidate
            return
    raise ValueError(
        f"the tokenizer has no pad, unk or eos token among the model's {vocab_size} embeddings: set "
        "tokenizer.pad_token to a token of its vocabulary before passing it"
    )
