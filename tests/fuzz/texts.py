"""Strategies for texts and identifiers."""

from hypothesis import strategies as st

CONTROL_TOKENS = ["<|end|>", "<|pad|>", "<s>", "</s>", "<|eot_id|>", "<|begin_of_text|>", "<unk>"]
PIECES = [
    *CONTROL_TOKENS,
    "{query}",
    "{passage}",
    "{{",
    "}",
    "{0}",
    "%s",
    "\x00",
    "\u0301",
    "\u202eabc\u202c",
    "שלום",
    "مرحبا",
    "東京",
    "👩‍👩‍👧",
    "🐝",
    "\ufeff",
    "\u2028",
    "\x85",
    "\u00a0",
    " ",
    "\n\n",
    "\t",
    "\r\n",
    "question:",
    " passage:",
    "bees find their way ",
    "Honey bees navigate by the position of the sun. ",
    "ﬁ",
    "Ǆ",
    "\U0010ffff",
]

characters = st.characters(codec="utf-8")
# Any text that UTF-8 can encode, mostly of pieces that have gone wrong in some program.
texts = st.one_of(
    st.lists(st.sampled_from(PIECES), max_size=8).map("".join),
    st.text(characters, max_size=30),
    st.builds(lambda piece, times: piece * times, st.sampled_from(PIECES), st.integers(1, 60)),
)
# Also lone surrogates, which no file in UTF-8 holds.
any_texts = texts | st.text(st.characters(), max_size=5) | st.sampled_from(["\ud800", "bees \udfff"])
# What a column of a run or of qrels can hold.
words = st.text(st.characters(codec="utf-8", exclude_categories=["Z", "C"]), min_size=1, max_size=8)
identifiers = st.sampled_from(["q1", "q2", "d1", "d2", "d10", "D1", "é", "10", "9"]) | words
