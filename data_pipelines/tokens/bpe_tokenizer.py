"""Any Hugging Face tokenizer.json, above all byte-level BPE.

Encoding goes through tiktoken with the same ranks, which is four to five times as fast, wherever both were found to
give the same ids.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.errors import DataError
from data_pipelines.raw.json_text import repaired
from data_pipelines.tokens.tiktoken_encoder import byte_of_character, tiktoken_encoder
from data_pipelines.tokens.tokenizer import recorded_entry
from data_pipelines.tokens.tokenizer_files import (
    checked_ids,
    end_of_text_name,
    has_all_bytes,
    is_byte_level,
    read_spec,
    refuse_interruption,
    unknown_id,
)

# tiktoken's regular expression engine panics on a run of about a million spaces. This is far below.
WHITESPACE_BLOCK = 50_000


class BpeTokenizer:
    """A byte-level BPE from a Hugging Face tokenizer.json.

    Args:
        content: the text of the file.
        name: where it came from, for messages.
        end_of_text: that token's name, or its id as it was recorded; None: the usual names are looked for.

    Raises:
        DataError: not a tokenizer file, or it has no end-of-text token that is marked special.
    """

    def __init__(self, content: str, name: str, end_of_text: str | int | None = None) -> None:
        self._reference, spec = read_spec(content, name)
        # Both belong to other uses of the file; here they would cut documents or fill them up.
        self._reference.no_truncation()
        self._reference.no_padding()
        # A document that contains the text of a special token must not turn into that token.
        self._reference.encode_special_tokens = True
        self._content = json.dumps(spec, sort_keys=True, ensure_ascii=False)
        ids = checked_ids(self._reference, name)
        self.vocabulary = max(ids.values()) + 1
        self.eot_name, named = end_of_text_name(spec, ids, name, end_of_text)
        self.eot = ids[self.eot_name]
        # Other ids of the same file end documents where another token was named.
        told = self._content + (f"\nend of text: {self.eot_name}" if named else "")
        self.fingerprint = hashlib.sha256(told.encode()).hexdigest()
        model = spec.get("model") or {}
        kind = str(model.get("type"))
        self._byte_level = is_byte_level(spec)
        bpe = "byte-level BPE" if self._byte_level else "BPE"
        self._model = {"BPE": bpe, "WordLevel": "whole words"}.get(kind, kind)
        self._kind = np.uint16 if self.vocabulary <= 65_536 else np.uint32
        self._complete = has_all_bytes(spec, ids)
        self._unknown = unknown_id(spec, ids)
        self._fast = tiktoken_encoder(spec, self._reference, name)

    @property
    def engine(self) -> str:
        """Which library encodes: "tiktoken", or "tokenizers" where tiktoken would not give the same ids."""
        return "tiktoken" if self._fast else "tokenizers"

    def encode(self, text: str) -> np.ndarray:
        """Token ids of one text; half a surrogate pair is U+FFFD."""
        text = repaired(text)
        if self._fast and not _has_long_whitespace(text):
            return np.asarray(self._fast.encode_to_numpy(text, disallowed_special=()), self._kind)
        return self.encode_reference(text)

    def encode_reference(self, text: str) -> np.ndarray:
        """Token ids by the `tokenizers` library: what `encode` must agree with."""
        return self._encode_reference([text])[0]

    def _encode_reference(self, texts: list[str]) -> list[np.ndarray]:
        try:
            batch = self._reference.encode_batch_fast(texts, add_special_tokens=False)
        except BaseException as error:  # a word-level vocabulary is closed
            refuse_interruption(error)
            if len(texts) > 1:
                return [self._encode_reference([text])[0] for text in texts]  # which of them?
            shown = repr(texts[0][:200])
            raise DataError(f"{shown}: the tokenizer has no token for a word of it ({error}).") from None
        return [np.asarray(item.ids, self._kind) for item in batch]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """As `encode`, for each text, on several threads."""
        texts = [repaired(text) for text in texts]
        if self._fast and not any(map(_has_long_whitespace, texts)):
            encoded = self._fast.encode_ordinary_batch(list(texts), num_threads=4)
            return [np.asarray(ids, self._kind) for ids in encoded]
        return self._encode_reference(list(texts))

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of some ids."""
        return str(self._reference.decode([int(i) for i in ids], skip_special_tokens=False))

    def lost(self, text: str, ids: np.ndarray) -> Counter[str]:
        """The characters of a text that its ids do not hold: none for a tokenizer that has all bytes.

        What the tokenizer's normalizer makes of the text counts, not the text; and where the tokens are not those of
        bytes, white space does not count, for tokenizers of words keep none.
        """
        if self._complete:
            return Counter()
        wanted = self.normalized(text)
        held = self._held_text(ids)
        if not self._byte_level:
            wanted, held = _without_blanks(wanted), _without_blanks(held)
        return Counter(wanted) - Counter(held)

    def rewrites(self, text: str) -> bool:
        """Whether its normalizer makes another text of this one; white space and marks for it do not count."""
        if self._reference.normalizer is None:
            return False
        return _without_blanks(repaired(text)) != _without_blanks(self.normalized(text))

    def normalized(self, text: str) -> str:
        """What its normalizer makes of the text."""
        normalizer = self._reference.normalizer
        return repaired(text) if normalizer is None else str(normalizer.normalize_str(repaired(text)))

    def byte_lengths(self) -> np.ndarray | None:
        """Of a byte-level tokenizer."""
        if not self._byte_level:
            return None
        bytes_of = byte_of_character()
        names = [self._reference.id_to_token(number) or "" for number in range(self.vocabulary)]
        found = np.asarray([sum(one in bytes_of for one in name) for name in names], np.int64)
        found[[self.eot, *([self._unknown] if self._unknown >= 0 else [])]] = 0
        return found

    def _held_text(self, ids: np.ndarray) -> str:
        """The text that ids hold, those of the unknown token left out."""
        known = [int(one) for one in ids if one != self._unknown]
        if not self._byte_level:
            return str(self._reference.decode(known, skip_special_tokens=False))
        names = "".join(self._reference.id_to_token(one) or "" for one in known)
        bytes_of = byte_of_character()
        return bytes(bytes_of[name] for name in names if name in bytes_of).decode(errors="ignore")

    def describe(self) -> str:
        """One line for people."""
        return f"{self._model} ({self.vocabulary:,} ids, encoded by {self.engine})"

    def save(self, folder: Path) -> dict[str, Any]:
        """Write tokenizer.json."""
        (folder / "tokenizer.json").write_text(self._content, encoding="utf-8")
        return recorded_entry(self, "bpe", "tokenizer.json")


def _without_blanks(text: str) -> str:
    """A text without white space, and without the mark that stands for it in vocabularies of SentencePiece."""
    return "".join(text.replace("\u2581", " ").split())


def _has_long_whitespace(text: str) -> bool:
    """Whether a text holds a run of whitespace that tiktoken cannot be trusted with.

    A run of twice WHITESPACE_BLOCK fills at least one aligned block; `isspace` leaves the other blocks at
    their first other character.
    """
    starts = range(0, len(text) - WHITESPACE_BLOCK + 1, WHITESPACE_BLOCK)
    return any(text[start : start + WHITESPACE_BLOCK].isspace() for start in starts)
