"""The text: ten number words, and sums and differences within 0 to 9."""

from __future__ import annotations

from data_pipelines.permutation import permutation

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SIGNS = ("plus", "minus")
EQUALS = "equals"
VOCABULARY = (*WORDS, *SIGNS, EQUALS)
SENTENCE_WORDS = 5
HELD_OUT = 6
"""Facts that are kept for validation, and as many for test."""


def facts() -> list[str]:
    """All 110 sentences: a + b <= 9 and a - b >= 0."""
    pairs = [(a, b) for a in range(10) for b in range(10)]
    sums = [_sentence(a, "plus", b, a + b) for a, b in pairs if a + b <= 9]
    return sums + [_sentence(a, "minus", b, a - b) for a, b in pairs if a >= b]


def split_facts() -> dict[str, list[str]]:
    """The facts by split; validation and test have HELD_OUT each, which training never sees."""
    every = facts()
    order = permutation(len(every), "facts").tolist()
    cuts = {
        "validation": order[:HELD_OUT],
        "test": order[HELD_OUT : 2 * HELD_OUT],
        "train": order[2 * HELD_OUT :],
    }
    return {split: [every[number] for number in numbers] for split, numbers in cuts.items()}


def is_sentence(text: str) -> bool:
    """Whether a text has the form of the sentences, true or not."""
    words = text.split()
    if len(words) != SENTENCE_WORDS or words[1] not in SIGNS or words[3] != EQUALS:
        return False
    return set(words[::2]).issubset(WORDS)


def is_true_sentence(text: str) -> bool:
    """Whether a text is one of the sentences: well formed, and what it says is so."""
    if not is_sentence(text):
        return False
    words = text.split()
    a, b, result = (WORDS.index(word) for word in words[::2])
    return result == (a + b if words[1] == "plus" else a - b)


def is_number_word(text: str) -> bool:
    """Whether a text is one number word alone."""
    return text.strip() in WORDS


def _sentence(a: int, sign: str, b: int, result: int) -> str:
    return f"{WORDS[a]} {sign} {WORDS[b]} {EQUALS} {WORDS[result]}"
