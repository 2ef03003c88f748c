"""Tokenizers that read text as text: no text spells a control token, and no id is drawn at random."""

import json
import re
import secrets
import string
from collections.abc import Iterable
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerBase

# Parameters of a tokenizer's model that draw its tokens at random: of BPE, then of Unigram.
SAMPLING = ("dropout", "alpha", "nbest_size")


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> list[AddedToken]:
    """Returns the tokens that `tokenizer` finds in a text before it splits the text, and that are not text."""
    named = tokenizer.all_special_tokens
    return [token for token in tokenizer.added_tokens_decoder.values() if token.special or token.content in named]


_largest_ids: "WeakKeyDictionary[PreTrainedTokenizerBase, tuple[int, int]]" = WeakKeyDictionary()


def largest_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Returns the largest id that the tokenizer can give; it is found again when the tokenizer has grown."""
    size, largest = _largest_ids.get(tokenizer, (-1, -1))
    if size != len(tokenizer):
        largest = max(tokenizer.get_vocab().values(), default=-1)
        _largest_ids[tokenizer] = (len(tokenizer), largest)
    return largest


def is_sampling(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer draws ids at random (BPE dropout, Unigram sampling), so that no two calls agree."""
    model = tokenizer.backend_tokenizer.model
    return any(getattr(model, name, None) for name in SAMPLING)


def stop_sampling(tokenizer: PreTrainedTokenizerBase) -> None:
    """Makes the tokenizer give the same ids at each call. It is changed in place."""
    model = tokenizer.backend_tokenizer.model
    for name in SAMPLING:
        if getattr(model, name, None):
            setattr(model, name, None)


@lru_cache(maxsize=16)
def find_any(*texts: str) -> re.Pattern[str]:
    """Returns a pattern that finds any of the texts: of those that start at the same character, the longest."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=lambda text: -len(text)))) or r"(?!)")


class PrivateTokenizer:
    """
    A copy of a tokenizer that never changes, draws nothing at random, and knows its control tokens by names that no
    text can spell. A text is thus split as if it spelled none, while ids, flags and offsets stay those of the original.

    Args:
        tokenizer: a fast tokenizer.
        renamed: the control tokens that get such a name.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, renamed: Iterable[str]):
        key = secrets.token_hex(16)
        self._names = {content: f"<{key}:{number}>" for number, content in enumerate(renamed)}
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        state["padding"] = state["truncation"] = None
        for token in state["added_tokens"]:
            if token["content"] in self._names:
                token.update(content=self._names[token["content"]], single_word=False)
        self._rename(state["model"])
        self._tokenizer: Any = Tokenizer.from_str(json.dumps(state))

    def _rename(self, model: dict[str, Any]) -> None:
        """Renames control tokens in the model's own vocabulary, which would find them in a text too."""
        names, vocabulary = self._names, model["vocab"]
        for name in SAMPLING:
            if model.get(name):
                model[name] = None
        if model.get("unk_token") in names:
            model["unk_token"] = names[model["unk_token"]]
        if isinstance(vocabulary, list):  # of Unigram, with scores
            model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocabulary]
        else:
            model["vocab"] = {names.get(piece, piece): index for piece, index in vocabulary.items()}
        if "merges" in model:
            prefix = model.get("continuing_subword_prefix") or ""
            model["merges"] = [
                (left, right)
                for left, right in model["merges"]
                if not {left, right, left + right.removeprefix(prefix)} & names.keys()
            ]

    def encode(self, texts: list[str]) -> list[Any]:
        """Returns a `tokenizers.Encoding` of each text, with what the tokenizer adds to a text."""
        encodings: list[Any] = self._tokenizer.encode_batch(texts)
        return encodings

    def rename(self, template: str) -> str:
        """Returns a format string in which the control tokens of the literal text have the names of this copy."""
        pattern = find_any(*self._names)
        renamed = ""
        for literal, field, _, _ in string.Formatter().parse(template):
            literal = pattern.sub(lambda found: self._names[found[0]], literal)
            renamed += literal.replace("{", "{{").replace("}", "}}")
            renamed += "" if field is None else "{" + field + "}"
        return renamed


_copies: "WeakKeyDictionary[PreTrainedTokenizerBase, dict[bool, tuple[Any, PrivateTokenizer]]]" = WeakKeyDictionary()


def private_tokenizer(tokenizer: PreTrainedTokenizerBase, *, parse_special_tokens: bool) -> PrivateTokenizer:
    """
    Returns a copy of a tokenizer as it is now. A copy takes up to a second, so it is kept until the tokenizer changes.

    Args:
        tokenizer: a fast tokenizer.
        parse_special_tokens: keep the names of the control tokens.
    """
    copies = _copies.setdefault(tokenizer, {})
    backend = tokenizer.backend_tokenizer
    renamed = [] if parse_special_tokens else [token.content for token in control_tokens(tokenizer)]
    parts = (backend.normalizer, backend.pre_tokenizer, backend.post_processor)
    state = (backend, len(tokenizer), renamed, [part and part.__getstate__() for part in parts])
    if parse_special_tokens not in copies or copies[parse_special_tokens][0] != state:
        copies[parse_special_tokens] = (state, PrivateTokenizer(tokenizer, renamed))
    return copies[parse_special_tokens][1]
