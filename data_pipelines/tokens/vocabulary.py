"""One vocabulary for text, image and audio tokens: a contiguous range of ids for each, then the specials.

Text comes first, so a tokenised text dataset is valid as it is under every vocabulary with the same tokenizer.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.errors import DataError

FORMAT = "triptych-vocabulary"
VERSION = 1
FILE = "vocabulary.json"

MODALITIES = ("text", "image", "audio")
TASKS = {
    "text-to-image": ("text", "image"),
    "image-to-text": ("image", "text"),
    "text-to-audio": ("text", "audio"),
    "audio-to-text": ("audio", "text"),
}
"""What each task token says: (the modality that is given, the modality to be made)."""
SPECIALS = (
    "[MASK]",
    "[PAD]",
    *(f"<{side} {modality}>" for modality in MODALITIES for side in ("begin", "end")),
    *(f"<{task}>" for task in TASKS),
)


@dataclass(frozen=True)
class Modality:
    """The ids [first, first + size) and what made them.

    codec: fingerprint of the tokenizer or codec.
    codebooks: several levels share the range, level l at first + l size / codebooks.
    grid: rows and columns of an image's tokens; None where there are none.
    delay: whether level l of a frame stands l frames later (the delay pattern) in the flattened order.
    """

    name: str
    first: int
    size: int
    codec: str
    codebooks: int = 1
    grid: tuple[int, int] | None = None
    delay: bool = False

    @property
    def end(self) -> int:
        """The id after the last."""
        return self.first + self.size


@dataclass(frozen=True)
class Vocabulary:
    """Ranges and specials. A modality that a dataset does not have is None; text is always there.

    Args:
        text: must begin at 0.
        eot: the text tokenizer's end-of-text id.
    """

    text: Modality
    eot: int
    image: Modality | None = None
    audio: Modality | None = None

    def __post_init__(self) -> None:
        expected = 0
        for modality in self.modalities:
            assert modality.first == expected and modality.size > 0, (
                f"{modality} does not begin at {expected}"
            )
            assert modality.size % modality.codebooks == 0, f"{modality}: codebooks of different sizes"
            expected = modality.end
        assert 0 <= self.eot < self.text.size, f"end-of-text id {self.eot} is no text"

    @property
    def modalities(self) -> tuple[Modality, ...]:
        """Those there are, in the order of their ids."""
        return tuple(m for m in (self.text, self.image, self.audio) if m is not None)

    @property
    def first_special(self) -> int:
        """Where the specials begin."""
        return self.modalities[-1].end

    @property
    def size(self) -> int:
        """Number of ids, specials included."""
        return self.first_special + len(SPECIALS)

    def special(self, name: str) -> int:
        """The id of a name in SPECIALS."""
        return self.first_special + SPECIALS.index(name)

    @property
    def mask(self) -> int:
        """[MASK], one for all modalities."""
        return self.special("[MASK]")

    @property
    def pad(self) -> int:
        """[PAD], which fills rows; it is never predicted and sees only itself."""
        return self.special("[PAD]")

    def begin(self, modality: str) -> int:
        return self.special(f"<begin {modality}>")

    def end(self, modality: str) -> int:
        return self.special(f"<end {modality}>")

    def task(self, name: str) -> int:
        return self.special(f"<{name}>")

    def modality(self, name: str) -> Modality:
        """Raises DataError where this vocabulary has no such modality."""
        found = {m.name: m for m in self.modalities}.get(name)
        if found is None:
            have = ", ".join(m.name for m in self.modalities)
            raise DataError(f"this vocabulary has no {name} tokens (it has {have}).")
        return found

    def tasks(self) -> list[str]:
        """The tasks whose two modalities are there."""
        have = {m.name for m in self.modalities}
        return [task for task, pair in TASKS.items() if have.issuperset(pair)]

    def to_ids(self, name: str, local: np.ndarray, what: str) -> np.ndarray:
        """Codes of a codec, counted from 0, as ids of this vocabulary, int64.

        Args:
            what: names file and sample in an error.

        Raises:
            DataError: a code is outside of the modality's range.
        """
        modality = self.modality(name)
        codes = np.asarray(local).astype(np.int64)
        wrong = codes[(codes < 0) | (codes >= modality.size)]
        if len(wrong):
            raise DataError(
                f"{what}: {name} code {int(wrong[0])} is outside of 0 to {modality.size - 1}; encode it with the "
                "codec of this vocabulary."
            )
        return codes + modality.first

    def to_codes(self, name: str, ids: np.ndarray, what: str) -> np.ndarray:
        """The opposite of `to_ids`.

        Raises:
            DataError: an id belongs to another modality.
        """
        modality = self.modality(name)
        ids = np.asarray(ids).astype(np.int64)
        wrong = ids[(ids < modality.first) | (ids >= modality.end)]
        if len(wrong):
            raise DataError(
                f"{what}: id {int(wrong[0])} is no {name} token (those are {modality.first} to {modality.end - 1})."
            )
        return ids - modality.first

    def to_dict(self) -> dict[str, Any]:
        """As stored in vocabulary.json and in checkpoints."""
        content: dict[str, Any] = {"format": FORMAT, "version": VERSION, "eot": self.eot}
        return content | {modality.name: asdict(modality) for modality in self.modalities}

    @classmethod
    def from_dict(cls, content: dict[str, Any], origin: str) -> Vocabulary:
        """Read back what `to_dict` gave. `origin` names the file in the error."""
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise DataError(f"{origin}: not a vocabulary of this project. Build the dataset again.")
        if content.get("version") != VERSION:
            raise DataError(
                f"{origin}: vocabulary version {content.get('version')}; this program reads version {VERSION}. "
                "Build the dataset again."
            )
        try:
            parts = {name: _modality(name, content[name]) for name in MODALITIES if name in content}
            return cls(eot=_typed(content, "eot", int), **parts)
        except (KeyError, TypeError, ValueError, AssertionError) as error:
            raise DataError(f"{origin}: damaged vocabulary ({error}). Build the dataset again.") from None

    @property
    def fingerprint(self) -> str:
        """Equal for vocabularies in which every id means the same."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()

    def describe(self) -> dict[str, Any]:
        """The entry for dataset.json: what ties a dataset's ids to its vocabulary.json."""
        return {"fingerprint": self.fingerprint, "vocabulary": self.size}

    def save(self, folder: Path) -> None:
        """Write vocabulary.json."""
        (folder / FILE).write_text(json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n")


def load_vocabulary(folder: Path) -> Vocabulary | None:
    """The vocabulary of a dataset or run folder; None for a folder of plain text, which has none.

    Raises:
        DataError: it is damaged or of another version.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: damaged vocabulary ({error}). Build the dataset again.") from None
    return Vocabulary.from_dict(content, str(path))


FIELDS = {"name": str, "first": int, "size": int, "codec": str, "codebooks": int, "delay": bool}


def _modality(name: str, content: Any) -> Modality:
    """Raises TypeError, KeyError or ValueError for what `asdict` of a Modality does not give."""
    if not isinstance(content, dict) or content.keys() - FIELDS.keys() != {"grid"}:
        raise ValueError(f"{name} is {str(content)[:100]}")
    grid = content["grid"]
    if grid is not None and not (isinstance(grid, list) and [type(one) for one in grid] == [int, int]):
        raise ValueError(f"the grid of {name} is {str(grid)[:100]}")
    values = {key: _typed(content, key, kind) for key, kind in FIELDS.items()}
    if values["name"] != name or values["codebooks"] < 1:
        raise ValueError(f"{name} is called {values['name'][:100]}, of {values['codebooks']} codebooks")
    return Modality(**values, grid=None if grid is None else (grid[0], grid[1]))


def _typed(content: dict[str, Any], key: str, kind: type) -> Any:
    if type(content[key]) is not kind:
        raise TypeError(f"{key} is {str(content[key])[:100]}")
    return content[key]
