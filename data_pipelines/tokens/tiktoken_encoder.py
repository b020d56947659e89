"""The tiktoken encoder that gives the ids of a tokenizer.json, wherever there is one."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from data_pipelines.tokens.tokenizer_files import (
    EOT,
    refuse_interruption,
)

# The pattern of the ByteLevel pre-tokenizer, from GPT-2's encoder.py.
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def byte_of_character() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes, reversed (encoder.py, bytes_to_unicode)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def _pattern(pre_tokenizer: dict[str, Any] | None) -> str | None:
    """The splitting pattern of a byte-level pre-tokenizer, or None if tiktoken has no equal."""
    if not pre_tokenizer:
        return None
    if pre_tokenizer["type"] == "ByteLevel":
        plain = not pre_tokenizer.get("add_prefix_space") and pre_tokenizer.get("use_regex", True)
        return GPT2_PATTERN if plain else None
    steps = pre_tokenizer.get("pretokenizers", [])
    if pre_tokenizer["type"] != "Sequence" or [step["type"] for step in steps] != ["Split", "ByteLevel"]:
        return None
    split, byte_level = steps
    fits = split["behavior"] == "Isolated" and not split.get("invert") and "Regex" in split["pattern"]
    fits = fits and not byte_level.get("use_regex", True) and not byte_level.get("add_prefix_space")
    return str(split["pattern"]["Regex"]) if fits else None


def tiktoken_encoder(spec: dict[str, Any], reference: Any, name: str) -> Any | None:
    """The tiktoken encoder of a tokenizer.json, or None where it would give other ids."""
    import tiktoken

    model, pattern = spec.get("model") or {}, _pattern(spec.get("pre_tokenizer"))
    added = [token for token in spec.get("added_tokens", []) if not token.get("special")]
    plain = model.get("type") == "BPE" and not model.get("byte_fallback") and not model.get("dropout")
    if not plain or pattern is None or added or spec.get("normalizer"):
        return None
    special = {token["content"]: token["id"] for token in spec.get("added_tokens", [])}
    bytes_of = byte_of_character()
    vocabulary = {token: number for token, number in model["vocab"].items() if token not in special}
    if any(character not in bytes_of for token in vocabulary for character in token):
        return None
    ranks = {bytes(bytes_of[c] for c in token): number for token, number in vocabulary.items()}
    merges = [pair if isinstance(pair, list) else pair.split(" ") for pair in model["merges"]]
    merged = [vocabulary.get("".join(pair), -1) for pair in merges]
    if len(ranks) != len(vocabulary) or any(a >= b for a, b in pairwise(merged)):
        return None  # tiktoken merges in the order of ids
    if any(bytes([byte]) not in ranks for byte in range(256)):
        return None  # it would panic at such a byte
    try:
        fast = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
        return fast if _same_ids(fast, reference, ranks) else None
    except BaseException as error:  # a pattern or ids that it does not take
        refuse_interruption(error)
        return None


def _same_ids(fast: Any, reference: Any, ranks: dict[bytes, int]) -> bool:
    """Compare both encoders on every token that is text and on joined tokens and hard cases."""
    texts = [token.decode() for token in ranks if _is_text(token)]
    probes = [*texts, "".join(texts), "".join(reversed(texts)), *HARD_TEXTS]
    wanted = [item.ids for item in reference.encode_batch_fast(probes, add_special_tokens=False)]
    return bool(fast.encode_ordinary_batch(probes) == wanted)


def _is_text(token: bytes) -> bool:
    try:
        token.decode()
    except UnicodeDecodeError:
        return False
    return True


HARD_TEXTS = (
    "",
    " ",
    "  \n\n\t \r\n x   y\u00a0z  ",
    "I'll we're it's DON'T 'tis 'S",
    "Größe, naïveté, ångström, Ψυχή, Привет, 你好世界, こんにちは, مرحبا, שלום, हिन्दी, ไทย",
    "e\u0301 \u200d\U0001f469\u200d\U0001f680 \U0001f1eb\U0001f1f7 \ufeff \u2028 \x00\x1f",
    "0123456789 ٣٤٥ Ⅷ ½ x²  1_000.5e-3",
    "if x:\n        return (a+b)**2  # ok\n\n\n\tdef f(): ...",
    EOT,
    "a" * 300 + " " * 300 + "ab" * 200,
)
