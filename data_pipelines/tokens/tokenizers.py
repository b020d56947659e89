"""Text to token ids and back: bytes, or byte-level BPE.

BPE vocabularies are trained and stored in the Hugging Face `tokenizer.json` form. Encoding goes through
tiktoken with the same ranks, which is four to five times as fast, wherever both were found to give the same
ids.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from data_pipelines.errors import DataError
from data_pipelines.raw.json_text import parse_json, repaired
from data_pipelines.tokens.tokenizer_files import (
    EOT,
    checked_ids,
    end_of_text_name,
    has_all_bytes,
    is_byte_level,
    read_spec,
    refuse_interruption,
    unknown_id,
)

UNBROKEN = 256
"""Characters without a blank (or blanks alone) that a BPE is trained on in one piece. The trainer's time grows with the
square of a piece's length; words of people are far below."""
_RUN = re.compile(rf"\S{{{UNBROKEN + 1},}}|\s{{{UNBROKEN + 1},}}")
# tiktoken's regular expression engine panics on a run of about a million spaces. This is far below.
WHITESPACE_BLOCK = 50_000
# The pattern of the ByteLevel pre-tokenizer, from GPT-2's encoder.py.
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


class Tokenizer(Protocol):
    """What the pipelines need of a tokenizer. Ids do not include the end-of-text token `eot`."""

    vocabulary: int
    eot: int
    fingerprint: str

    def encode(self, text: str) -> np.ndarray:
        """Token ids of one text: uint16, or uint32 for vocabularies above 65,536."""

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of several texts, on several threads where that is faster."""

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of some ids; broken UTF-8 becomes U+FFFD, the end-of-text token its name."""

    def lost(self, text: str, ids: np.ndarray) -> Counter[str]:
        """The characters of a text that its ids do not hold, because the tokenizer has no token for them."""

    def rewrites(self, text: str) -> bool:
        """Whether it makes another text of this one before it looks for tokens (small letters, composed accents)."""

    def normalized(self, text: str) -> str:
        """The text in which it looks for tokens."""

    def byte_lengths(self) -> np.ndarray | None:
        """(V,) int64: UTF-8 bytes that each id stands for, 0 for end-of-text; None where tokens are not made of
        bytes."""

    def describe(self) -> str:
        """One line for people."""

    def save(self, folder: Path) -> dict[str, Any]:
        """Store what `load_tokenizer` needs in a dataset folder; returns its entry for dataset.json."""


class BytesTokenizer:
    """Ids 0 to 255 are the bytes of UTF-8; 256 ends a document."""

    vocabulary = 257
    eot = 256
    fingerprint = hashlib.sha256(b"triptych bytes tokenizer, 257 ids").hexdigest()

    def encode(self, text: str) -> np.ndarray:
        """The UTF-8 bytes of `text`, uint16; half a surrogate pair is U+FFFD."""
        return np.frombuffer(repaired(text).encode(), np.uint8).astype(np.uint16)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """As `encode`, for each text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of some ids."""
        mark = EOT.encode()
        return b"".join(mark if i == 256 else bytes((i,)) for i in map(int, ids)).decode(errors="replace")

    def lost(self, text: str, ids: np.ndarray) -> Counter[str]:
        """None."""
        return Counter()

    def rewrites(self, text: str) -> bool:
        """Never."""
        return False

    def normalized(self, text: str) -> str:
        """The text itself."""
        return text

    def byte_lengths(self) -> np.ndarray:
        """One each."""
        return np.append(np.ones(256, np.int64), 0)

    def describe(self) -> str:
        """One line for people."""
        return "bytes (257 ids)"

    def save(self, folder: Path) -> dict[str, Any]:
        """Nothing to store but the kind."""
        return _entry(self, "bytes", None)


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
        self._fast = _tiktoken(spec, self._reference, name)

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
        bytes_of = _byte_of_character()
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
        bytes_of = _byte_of_character()
        return bytes(bytes_of[name] for name in names if name in bytes_of).decode(errors="ignore")

    def describe(self) -> str:
        """One line for people."""
        return f"{self._model} ({self.vocabulary:,} ids, encoded by {self.engine})"

    def save(self, folder: Path) -> dict[str, Any]:
        """Write tokenizer.json."""
        (folder / "tokenizer.json").write_text(self._content, encoding="utf-8")
        return _entry(self, "bpe", "tokenizer.json")


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


def _entry(tokenizer: Tokenizer, kind: str, file: str | None) -> dict[str, Any]:
    return {
        "kind": kind,
        "file": file,
        "fingerprint": tokenizer.fingerprint,
        "vocabulary": tokenizer.vocabulary,
        "eot": tokenizer.eot,
    }


def train_bpe(texts: Iterable[str], vocabulary: int) -> BpeTokenizer:
    """Train a byte-level BPE of `vocabulary` ids, the end-of-text token and the 256 bytes among them.

    A corpus too small for that many merges gives a smaller vocabulary.
    """
    from tokenizers import Tokenizer as HuggingFaceTokenizer
    from tokenizers import decoders, models, pre_tokenizers, trainers

    trained = HuggingFaceTokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[EOT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator((piece for text in texts for piece in unbroken_pieces(text)), trainer)
    return BpeTokenizer(trained.to_str(), "the trained tokenizer")


def unbroken_pieces(text: str) -> Iterator[str]:
    """A text in pieces, in which nothing longer than UNBROKEN characters stands without a blank, or is all blank."""
    start = 0
    for run in _RUN.finditer(text):
        for place in range(run.start() + UNBROKEN, run.end(), UNBROKEN):
            yield text[start:place]
            start = place
    yield text[start:]


def word_tokenizer(words: Sequence[str]) -> BpeTokenizer:
    """A closed vocabulary of whole words, split at spaces; text with any other word is an error."""
    from tokenizers import Tokenizer as HuggingFaceTokenizer
    from tokenizers import models, pre_tokenizers

    made = HuggingFaceTokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=""))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens([EOT])
    return BpeTokenizer(made.to_str(), "the word tokenizer")


def bpe_size(spec: str) -> int | None:
    """N of `bpe:N`, or None if `spec` is something else.

    Raises:
        DataError: N is not a number, or too small to hold the bytes.
    """
    kind, colon, size = spec.partition(":")
    if kind != "bpe":
        return None
    if not colon or not size.isdigit() or int(size) < 257:
        raise DataError(f"tokenizer {spec!r}: write bpe:N with N at least 257 (256 bytes and end of text).")
    return int(size)


def tokenizer_from_spec(spec: str, end_of_text: str | int | None = None) -> Tokenizer:
    """`bytes`, or the path of a tokenizer.json, of a folder that holds one, or of a dataset folder.

    Args:
        end_of_text: the name of that token in a tokenizer.json, or its id as it was recorded.

    Raises:
        DataError: none of these; or an end-of-text token is named for what has its own.
    """
    path = Path(spec)
    from_dataset = path.is_dir() and (path / "dataset.json").exists()
    if isinstance(end_of_text, str) and (spec == "bytes" or from_dataset):
        raise DataError(f"--end-of-text {end_of_text}: the tokenizer {spec} has its own; leave it out.")
    if spec == "bytes":
        return BytesTokenizer()
    if from_dataset:
        return load_tokenizer(path)
    if path.is_dir():
        path = path / "tokenizer.json"
    if path.is_file():
        return BpeTokenizer(
            _read_text(path), str(path), _recorded(path) if end_of_text is None else end_of_text
        )
    raise DataError(
        f"tokenizer {spec!r}: {'no tokenizer.json in it' if Path(spec).is_dir() else 'no such file'}; "
        "use bytes, bpe:8192 or the path of a tokenizer.json."
    )


def _recorded(path: Path) -> int | None:
    """The end-of-text id that a run's folder keeps beside its tokenizer.json."""
    entry = path.with_name("entry.json")
    if not entry.is_file():
        return None
    content = parse_json(entry.read_bytes(), str(entry))
    eot = content.get("eot") if isinstance(content, dict) else None
    if not isinstance(eot, int):
        raise DataError(f"{entry}: no end-of-text id in it. Put the original file back, or remove it.")
    return eot


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError) as error:
        raise DataError(
            f"{path}: not a Hugging Face tokenizer file ({error}). Give a tokenizer.json."
        ) from None


def tokenizer_of(folder: Path, fingerprint: str, eot: int | None = None) -> Tokenizer:
    """The tokenizer with this fingerprint: of bytes, or the tokenizer.json of a folder, with its end-of-text id.

    Raises:
        DataError: the folder has no tokenizer.json, or another one.
    """
    if fingerprint == BytesTokenizer.fingerprint:
        return BytesTokenizer()
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise DataError(f"{path}: missing; copy the tokenizer that the vocabulary was made with there.")
    tokenizer = BpeTokenizer(_read_text(path), str(path), eot)
    if tokenizer.fingerprint != fingerprint:
        raise DataError(
            f"{path}: fingerprint {tokenizer.fingerprint[:12]}, the vocabulary was made with {fingerprint[:12]}. "
            "Put the original file back."
        )
    return tokenizer


def load_tokenizer(folder: Path | str) -> Tokenizer:
    """The tokenizer of a dataset folder.

    Raises:
        DataError: its file is missing, or is not the one the dataset was built with.
    """
    from data_pipelines.storage.dataset import read_dataset

    folder = Path(folder)
    entry = read_dataset(folder).tokenizer
    if entry["kind"] == "bytes":
        tokenizer: Tokenizer = BytesTokenizer()
    else:
        path = folder / str(entry["file"])
        if not path.is_file():
            raise DataError(f"{path}: missing; copy the tokenizer that the dataset was built with there.")
        tokenizer = BpeTokenizer(_read_text(path), str(path), int(entry["eot"]))
    if tokenizer.fingerprint != entry["fingerprint"]:
        raise DataError(
            f"{folder}: its tokenizer has fingerprint {tokenizer.fingerprint[:12]}, dataset.json was written "
            f"with {entry['fingerprint'][:12]}: tokenizer.json was changed. Put the original file back."
        )
    return tokenizer


def _byte_of_character() -> dict[str, int]:
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


def _tiktoken(spec: dict[str, Any], reference: Any, name: str) -> Any | None:
    """The tiktoken encoder of a tokenizer.json, or None where it would give other ids."""
    import tiktoken

    model, pattern = spec.get("model") or {}, _pattern(spec.get("pre_tokenizer"))
    added = [token for token in spec.get("added_tokens", []) if not token.get("special")]
    plain = model.get("type") == "BPE" and not model.get("byte_fallback") and not model.get("dropout")
    if not plain or pattern is None or added or spec.get("normalizer"):
        return None
    special = {token["content"]: token["id"] for token in spec.get("added_tokens", [])}
    bytes_of = _byte_of_character()
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
