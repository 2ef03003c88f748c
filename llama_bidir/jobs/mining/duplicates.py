"""Passages that say the same: equal words, or nearly the same sequence of words."""

import unicodedata
from collections.abc import Sequence

SHINGLE_WORDS = 3
NEAR_PERCENT = 90
# Unicode names of the scripts that write no spaces between words. Each of their characters counts as a word.
SPACELESS = ("CJK ", "HIRAGANA ", "KATAKANA ", "THAI ", "LAO ", "KHMER ", "MYANMAR ")

Shingles = frozenset[tuple[str, ...]]


class _WordCharacters(dict[int, str]):
    """Maps a code point to itself if it is part of a word, else to a space. Filled as characters occur."""

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
    """Returns the words of a text, without case, punctuation or variants of characters (Unicode's NFKC)."""
    return tuple(unicodedata.normalize("NFKC", text).casefold().translate(_WORD_CHARACTERS).split())


def make_shingles(words: Sequence[str]) -> Shingles:
    """Returns each three consecutive words of a text as a tuple. A shorter text gives one tuple."""
    return frozenset(zip(*(words[start:] for start in range(SHINGLE_WORDS)), strict=False)) or frozenset([tuple(words)])


def are_near_duplicates(first: Shingles, second: Shingles) -> bool:
    """
    Returns whether the Jaccard similarity of two sets of shingles is at least 0.9: the size of their intersection over
    that of their union (Broder, On the resemblance and containment of documents, 1997).
    """
    if 100 * min(len(first), len(second)) < NEAR_PERCENT * max(len(first), len(second)):
        return False
    num_shared = len(first & second)
    return 100 * num_shared >= NEAR_PERCENT * (len(first) + len(second) - num_shared)
