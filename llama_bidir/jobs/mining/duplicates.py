"""Passages that say the same: equal words, or nearly the same sequence of words."""

import unicodedata
from collections.abc import Sequence

SHINGLE_WORDS = 3
NEAR_PERCENT = 90
# Their words stand without spaces, so that each character counts as a word.
SPACELESS = ("CJK ", "HIRAGANA ", "KATAKANA ", "THAI ", "LAO ", "KHMER ", "MYANMAR ")

Shingles = frozenset[tuple[str, ...]]


class _WordCharacters(dict[int, str]):
    """What each code point becomes: itself in a word, a space between words. Filled as characters are met."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        if not character.isalnum() and not unicodedata.category(character).startswith("M"):  # nor a combining mark
            self[code] = " "
        elif unicodedata.name(character, "").startswith(SPACELESS):
            self[code] = f" {character} "
        else:
            self[code] = character
        return self[code]


_WORD_CHARACTERS = _WordCharacters()


def split_words(text: str) -> tuple[str, ...]:
    """Returns the words of a text, without case, punctuation and Unicode's variants of a character (NFKC)."""
    return tuple(unicodedata.normalize("NFKC", text).casefold().translate(_WORD_CHARACTERS).split())


def make_shingles(words: Sequence[str]) -> Shingles:
    """Returns the runs of three words of a text; a shorter text is one run."""
    return frozenset(zip(*(words[start:] for start in range(SHINGLE_WORDS)), strict=False)) or frozenset([tuple(words)])


def are_near_duplicates(first: Shingles, second: Shingles) -> bool:
    """
    Whether two texts share at least nine tenths of their shingles: their Jaccard similarity, the size of the
    intersection over that of the union, is 0.9 or more (Broder, On the resemblance and containment of documents, 1997).
    """
    if 100 * min(len(first), len(second)) < NEAR_PERCENT * max(len(first), len(second)):
        return False
    num_shared = len(first & second)
    return 100 * num_shared >= NEAR_PERCENT * (len(first) + len(second) - num_shared)
