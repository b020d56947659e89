"""JSON as it comes in: a byte order mark, deep nesting, surrogates and keys written twice are met here, for all."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from data_pipelines.errors import DataError

READ_KEYS = frozenset(("text", "caption", "task", "condition", "prompt", "choices", "answer"))
"""Keys that somebody reads: one that stands twice says two things."""
UTF8_MARK = b"\xef\xbb\xbf"


def parse_json(data: bytes, where: str, what: str = "") -> Any:
    """The value of a JSON text in UTF-8, with or without a byte order mark.

    Args:
        where: names file and line in the error.
        what: names the thing there, `its json `, or nothing.

    Raises:
        DataError: not UTF-8, not JSON, nested too deep, or a key that is read stands in it twice.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: {what}not UTF-8 ({error}). Convert it.") from None
    try:
        return json.loads(text, object_pairs_hook=_once)
    except RecursionError:
        raise DataError(f"{where}: {what}JSON nested too deep. Mend or remove it.") from None
    except _TwiceError as error:
        raise DataError(f'{where}: {what}the key "{error}" stands in it twice. Remove one.') from None
    except ValueError as error:  # not JSON, or a number of thousands of digits
        raise DataError(f"{where}: {what}not JSON ({error}). Mend or remove it.") from None


class _TwiceError(Exception):
    pass


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen and key in READ_KEYS:
                raise _TwiceError(key)
            seen.add(key)
    return found


def json_lines(lines: Iterable[bytes], where: Callable[[int], str]) -> Iterator[tuple[str, Any]]:
    """(where, value) of each line that is not blank. Lines end with a line feed alone: U+2028 and its like are text.

    Args:
        lines: as a binary file gives them.
        where: names file and line from the line's number, from 1.

    Raises:
        DataError: as `parse_json`.
    """
    for number, line in enumerate(lines, 1):
        line = line.removeprefix(UTF8_MARK) if number == 1 else line
        if line.strip():
            yield where(number), parse_json(line, where(number))


def has_surrogate(text: str) -> bool:
    """Whether a text holds half a surrogate pair, which is legal JSON (and how Python shows bytes that are not
    UTF-8 in names and arguments), but is not text."""
    if text.isascii():
        return False
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def repaired(text: str) -> str:
    """The text with U+FFFD for unpaired surrogates; pairs become the character that they mean."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") if has_surrogate(text) else text
