"""What a tokenizer.json says of itself: its ids, its end-of-text token, whether it has a token for every byte."""

from __future__ import annotations

import json
import re
from typing import Any

from data_pipelines.errors import DataError

EOT = "<|endoftext|>"
EOT_NAMES = (EOT, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>")
"""Looked for first, in this order."""
EOT_WORDS = ("endoftext", "endofsentence", "endofdocument", "endofdoc", "eos", "eot", "eod", "eostoken")
"""The same names with other brackets, blanks and case: `<｜end▁of▁sentence｜>`, `[EOS]`, `<EOD>`."""
SPARSE_IDS = 1_000_000
"""Ids that may be without a token; more is damage, and would be rows of an embedding."""


def read_spec(content: str, name: str) -> tuple[Any, dict[str, Any]]:
    """The library's tokenizer and the file's content.

    Raises:
        DataError: not a tokenizer file.
    """
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_str(content), json.loads(content)
    except BaseException as error:
        refuse_interruption(error)
        raise DataError(f"{name}: not a Hugging Face tokenizer file ({error}).") from None


def refuse_interruption(error: BaseException) -> None:
    """Raise `error` again if it is no failure of a library. `tokenizers` raises bare Exceptions, and its panics, like
    those of `tiktoken`, are no Exception at all."""
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        raise error


def checked_ids(reference: Any, name: str) -> dict[str, int]:
    """Ids by token.

    Raises:
        DataError: none at all, two tokens with one id, or an id far above their number.
    """
    ids: dict[str, int] = reference.get_vocab(with_added_tokens=True)
    if not ids:
        raise DataError(f"{name}: a tokenizer without tokens.")
    by_id = {number: token for token, number in ids.items()}
    if len(by_id) < len(ids):
        twice = next((token, by_id[number]) for token, number in ids.items() if by_id[number] != token)
        raise DataError(f"{name}: the tokens {twice[0]!r} and {twice[1]!r} have one id, {ids[twice[0]]}.")
    if max(by_id) >= len(ids) + SPARSE_IDS:
        raise DataError(
            f"{name}: the token {by_id[max(by_id)]!r} has id {max(by_id):,}, and there are {len(ids):,} tokens."
        )
    return ids


def end_of_text_name(
    spec: dict[str, Any], ids: dict[str, int], name: str, wanted: str | int | None
) -> tuple[str, bool]:
    """The end-of-text token, one that text cannot turn into; and whether it is another than would be found by itself.

    Raises:
        DataError: there is none, several could be it, or the wanted one is not there or not special.
    """
    special = [token["content"] for token in spec.get("added_tokens", []) if token.get("special")]
    special = [token for token in dict.fromkeys(special) if token in ids]
    usual = _usual(special)
    if isinstance(wanted, int):
        recorded = [token for token in special if ids[token] == wanted]
        if not recorded:
            raise DataError(
                f"{name}: its token {wanted}, recorded as end-of-text, is no special one. Put the original file back."
            )
        return recorded[0], recorded != usual
    if wanted is not None:
        if wanted in special:
            return wanted, [wanted] != usual
        why = (
            "an ordinary token, so the same characters in a document would end it"
            if wanted in ids
            else "not in it"
        )
        raise DataError(f"{name}: --end-of-text {wanted}: {why}. {_listed(special)}")
    if len(usual) == 1:
        return usual[0], False
    if usual:
        raise DataError(f"{name}: {' and '.join(usual)} could end a text. Say which with --end-of-text.")
    ordinary = next((token for token in EOT_NAMES if token in ids), "")
    if ordinary:
        raise DataError(
            f"{name}: its end-of-text token {ordinary} is an ordinary token, so the same characters in a "
            'document would end it. Give it "special": true in "added_tokens".'
        )
    raise DataError(
        f"{name}: no end-of-text token; name one of its special tokens with --end-of-text, or add one called {EOT}. "
        f"{_listed(special)}"
    )


def _usual(special: list[str]) -> list[str]:
    """The special tokens that could end a text: one, where a name is well known."""
    for token in EOT_NAMES:
        if token in special:
            return [token]
    return [token for token in special if _plain(token) in EOT_WORDS]


def _plain(token: str) -> str:
    """Letters alone, in lower case."""
    return re.sub(r"[^a-z]", "", token.lower())


def _listed(special: list[str]) -> str:
    if not special:
        return "It has no special tokens."
    more = f" and {len(special) - 20} more" if len(special) > 20 else ""
    return f"Its special tokens are {', '.join(special[:20])}{more}."


def is_byte_level(spec: dict[str, Any]) -> bool:
    """Whether its tokens are made of GPT-2's characters for bytes."""
    pre_tokenizer = spec.get("pre_tokenizer") or {}
    steps = [pre_tokenizer, *pre_tokenizer.get("pretokenizers", [])]
    return any(step.get("type") == "ByteLevel" for step in steps)


def has_all_bytes(spec: dict[str, Any], ids: dict[str, int]) -> bool:
    """Whether every text has tokens: all bytes do, as characters of a byte-level vocabulary or as fallback."""
    model = spec.get("model") or {}
    if model.get("byte_fallback"):
        return all(f"<0x{byte:02X}>" in ids for byte in range(256))
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    characters = [*map(chr, printable), *(chr(256 + number) for number in range(256 - len(printable)))]
    return (
        is_byte_level(spec)
        and model.get("type") in ("BPE", "Unigram")
        and all(character in ids for character in characters)
    )


def unknown_id(spec: dict[str, Any], ids: dict[str, int]) -> int:
    """The id that stands for what the tokenizer has no token for; -1 for none."""
    model = spec.get("model") or {}
    if model.get("type") == "Unigram":
        number = model.get("unk_id")
        return -1 if number is None else int(number)
    return ids.get(str(model.get("unk_token")), -1)
