"""Tokenizers by name, by file, by fingerprint, and of a dataset."""

from __future__ import annotations

from pathlib import Path

from data_pipelines.errors import DataError
from data_pipelines.raw.json_text import parse_json
from data_pipelines.storage.dataset import read_dataset
from data_pipelines.tokens.bpe_tokenizer import BpeTokenizer
from data_pipelines.tokens.bytes_tokenizer import BytesTokenizer
from data_pipelines.tokens.tokenizer import Tokenizer


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
