"""Makes tokenizers read text as ordinary text: it cannot spell control tokens, and no id is drawn at random."""

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

# Parameters that make a tokenizer draw tokens at random: those of BPE, then those of Unigram.
SAMPLING = ("dropout", "alpha", "nbest_size")


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> list[AddedToken]:
    """Returns the control tokens: those that `tokenizer` finds in a text before it splits the text into tokens."""
    named = tokenizer.all_special_tokens
    return [token for token in tokenizer.added_tokens_decoder.values() if token.special or token.content in named]


_largest_ids: "WeakKeyDictionary[PreTrainedTokenizerBase, tuple[int, int]]" = WeakKeyDictionary()


def largest_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Returns the largest id that the tokenizer can give. The result is cached until the tokenizer grows."""
    size, largest = _largest_ids.get(tokenizer, (-1, -1))
    if size != len(tokenizer):
        largest = max(tokenizer.get_vocab().values(), default=-1)
        _largest_ids[tokenizer] = (len(tokenizer), largest)
    return largest


def is_sampling(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Returns whether the tokenizer draws ids at random (BPE dropout, Unigram sampling), so calls can differ."""
    model = tokenizer.backend_tokenizer.model
    return any(getattr(model, name, None) for name in SAMPLING)


def stop_sampling(tokenizer: PreTrainedTokenizerBase) -> None:
    """Makes the tokenizer give the same ids at each call. Changes the tokenizer in place."""
    model = tokenizer.backend_tokenizer.model
    for name in SAMPLING:
        if getattr(model, name, None):
            setattr(model, name, None)


@lru_cache(maxsize=16)
def find_any(*texts: str) -> re.Pattern[str]:
    """Returns a pattern that matches any of the texts. If several match at a position, it matches the longest."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=lambda text: -len(text)))) or r"(?!)")


class PrivateTokenizer:
    """
    A copy of a tokenizer that never changes and draws nothing at random. Its control tokens have new names that no text
    can spell, so a text that spells an old name is split as ordinary text. Ids, flags and offsets stay the same.

    Args:
        tokenizer: a fast tokenizer.
        renamed: the control tokens that get a new name.
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
        """Renames control tokens in the model's own vocabulary. Otherwise the model would find them in a text too."""
        names, vocabulary = self._names, model["vocab"]
        for name in SAMPLING:
            if model.get(name):
                model[name] = None
        if model.get("unk_token") in names:
            model["unk_token"] = names[model["unk_token"]]
        if isinstance(vocabulary, list):  # the vocabulary of Unigram has scores
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
        """Returns a `tokenizers.Encoding` of each text, with the special tokens that the tokenizer adds."""
        encodings: list[Any] = self._tokenizer.encode_batch(texts)
        return encodings

    def rename(self, template: str) -> str:
        """Returns a format string whose literal text spells the control tokens with their new names."""
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
    Returns a copy of a tokenizer as it is now. Copying takes up to a second, so the copy is kept until it is outdated.

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
