"""The tokenizer and the codecs behind a vocabulary: text, images and sounds to ids and back.

A folder holds vocabulary.json, the tokenizer's file, and `codecs/image/` and `codecs/audio/` where there are such.
Datasets of already encoded codes have no codec in their folder; their ids can be trained on, and decoded once a codec
with as many codes is put there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.codecs.base import FILE, Codec, load_codec
from data_pipelines.codecs.codebooks import flatten, level_size, unflatten
from data_pipelines.errors import DataError
from data_pipelines.tokens.tokenizer import Tokenizer
from data_pipelines.tokens.tokenizer_loading import tokenizer_of
from data_pipelines.tokens.vocabulary import MODALITIES, Modality, Vocabulary, load_vocabulary

CODECS = "codecs"
GIVEN_CODES = "codes:"
"""What the `codec` of a modality begins with whose codes were given: how many there are, and no fingerprint."""


@dataclass(frozen=True)
class Modalities:
    """A vocabulary with what makes and reads its ids.

    image, audio: None where the vocabulary has none, or where only codes were given.
    """

    vocabulary: Vocabulary
    tokenizer: Tokenizer
    image: Codec | None = None
    audio: Codec | None = None

    def __post_init__(self) -> None:
        _check(self.vocabulary.text.codec, self.tokenizer.fingerprint, "text")
        for name, codec in (("image", self.image), ("audio", self.audio)):
            if codec is not None:
                _check_codec(self.vocabulary.modality(name), codec)

    def codec(self, name: str) -> Codec:
        """Raises DataError where there is none."""
        self.vocabulary.modality(name)
        codec = self.image if name == "image" else self.audio
        if codec is None:
            raise DataError(
                f"there is no codec for {name} tokens here (the dataset was made from codes). Put the one that made "
                f"them into {CODECS}/{name}/ of the dataset's folder, or of the tokenizer/ folder of a run."
            )
        return codec

    def text_ids(self, text: str) -> np.ndarray:
        """int64, without end-of-text."""
        return self.tokenizer.encode(text).astype(np.int64)

    def code_ids(self, name: str, codes: np.ndarray, what: str) -> np.ndarray:
        """Ids of the codes of one image or sound, (T,) or (K, T), int64 (T K,).

        Args:
            what: names file and sample in the error.

        Raises:
            DataError: another number of codebooks, or a code outside of the vocabulary's range.
        """
        modality = self.vocabulary.modality(name)
        books = len(codes) if codes.ndim == 2 else 1
        if books != modality.codebooks:
            raise DataError(f"{what}: codes of {books} codebooks, the vocabulary has {modality.codebooks}.")
        try:
            line = flatten(codes, codebook_size(modality), modality.delay)
        except DataError as error:
            raise DataError(f"{what}: {name} {error}") from None
        return self.vocabulary.to_ids(name, line, what)

    def ids(self, name: str, samples: Sequence[Any], what: str) -> list[np.ndarray]:
        """Ids of texts, images or sounds, int64, one array each.

        Raises:
            DataError: a sample that tokenizer or codec refuses.
        """
        if name == "text":
            return [array.astype(np.int64) for array in self.tokenizer.encode_batch(samples)]
        return [self.code_ids(name, codes, what) for codes in self.codec(name).encode(samples)]

    def sample(self, name: str, ids: np.ndarray, what: str = "a sample") -> Any:
        """What ids of one modality say: text up to the first end-of-text, a uint8 image, a float32 sound.

        Raises:
            DataError: ids of another modality, or of no whole image or frames.
        """
        line = self.vocabulary.to_codes(name, ids, what)
        if name == "text":
            ends = np.flatnonzero(line == self.vocabulary.eot)
            return self.tokenizer.decode(line[: ends[0]] if len(ends) else line)
        modality = self.vocabulary.modality(name)
        codes = unflatten(line, modality.codebooks, codebook_size(modality), modality.delay)
        (found,) = self.codec(name).decode([codes if modality.codebooks > 1 else codes[0]])
        return found

    def save(self, folder: Path) -> dict[str, Any]:
        """Write all of it; returns the tokenizer's entry for dataset.json."""
        self.vocabulary.save(folder)
        for name, codec in (("image", self.image), ("audio", self.audio)):
            if codec is not None:
                place = folder / CODECS / name
                place.mkdir(parents=True, exist_ok=True)
                codec.save(place)
        return self.tokenizer.save(folder)

    def describe(self) -> str:
        """One line for people."""
        parts = [f"text: {self.tokenizer.describe()}"]
        for modality, codec in ((self.vocabulary.image, self.image), (self.vocabulary.audio, self.audio)):
            if modality is not None:
                said = codec.describe() if codec else f"codes ({modality.size:,})"
                parts.append(f"{modality.name}: {said}")
        return "; ".join(parts)


def codebook_size(modality: Modality) -> int:
    """Codes of one codebook, the fill code of the delay pattern left out."""
    return modality.size // modality.codebooks - int(modality.delay)


def _check_codec(modality: Modality, codec: Codec) -> None:
    if not modality.codec.startswith(GIVEN_CODES):
        _check(modality.codec, codec.fingerprint, modality.name)
        return
    wanted = (modality.codebooks, codebook_size(modality), modality.grid)
    found = (codec.codebooks, codec.codebook_size, codec.grid)
    if wanted != found:
        form = "{} codebook(s) of {} codes, grid {}".format
        raise DataError(
            f"the {modality.name} codec has {form(*found)}; the codes of this dataset have {form(*wanted)}. Use the "
            "codec that made them."
        )


def _check(wanted: str, found: str, name: str) -> None:
    if wanted != found:
        raise DataError(
            f"the {name} {'tokenizer' if name == 'text' else 'codec'} has fingerprint {found[:12]}, the vocabulary was "
            f"made with {wanted[:12]}. Use the dataset's own."
        )


def codec_modality(name: str, first: int, codec: Codec, delay: bool = False) -> Modality:
    """The range of a codec's ids that begins at `first`."""
    return code_modality(
        name, first, (codec.codebooks, codec.codebook_size), codec.fingerprint, codec.grid, delay
    )


def code_modality(
    name: str,
    first: int,
    books: tuple[int, int],
    fingerprint: str,
    grid: tuple[int, int] | None = None,
    delay: bool = False,
) -> Modality:
    """The same from figures alone, for codes whose codec is not here. `books`: codebooks and codes of each.

    Raises:
        DataError: several codebooks in the cells of a grid, which would share one position.
    """
    count, size = books
    if count > 1 and grid is not None:
        raise DataError(
            f"an {name} codec of {count} codebooks with a grid: each cell of a grid is one token. Give it the grid "
            "None, so that its tokens are in one line."
        )
    delay = delay and count > 1
    return Modality(name, first, count * level_size(size, delay), fingerprint, count, grid, delay)


def combine(
    tokenizer: Tokenizer, image: Codec | None = None, audio: Codec | None = None, delay: bool = False
) -> Modalities:
    """The vocabulary of a tokenizer and codecs.

    Args:
        delay: the delay pattern for audio of several codebooks.
    """
    text = Modality("text", 0, tokenizer.vocabulary, tokenizer.fingerprint)
    images = None if image is None else codec_modality("image", text.end, image)
    first = (images or text).end
    sounds = None if audio is None else codec_modality("audio", first, audio, delay)
    return Modalities(Vocabulary(text, tokenizer.eot, images, sounds), tokenizer, image, audio)


def codec_folders(folder: Path) -> dict[str, Path]:
    """The codecs that a dataset's or a run's folder holds, by modality."""
    places = {name: folder / CODECS / name for name in MODALITIES}
    return {name: place for name, place in places.items() if (place / FILE).is_file()}


def load_modalities(folder: Path | str) -> Modalities:
    """Vocabulary, tokenizer and codecs of a dataset's or a run's folder.

    Raises:
        DataError: no vocabulary.json; a file is missing or is not the one that the vocabulary was made with.
    """
    folder = Path(folder)
    vocabulary = load_vocabulary(folder)
    if vocabulary is None:
        raise DataError(f"{folder / 'vocabulary.json'}: missing, so {folder} has text alone.")
    codecs = {name: load_codec(place) for name, place in codec_folders(folder).items()}
    try:
        tokenizer = tokenizer_of(folder, vocabulary.text.codec, vocabulary.eot)
        return Modalities(vocabulary, tokenizer, codecs.get("image"), codecs.get("audio"))
    except DataError as error:
        raise DataError(str(error) if str(folder) in str(error) else f"{folder}: {error}") from None
