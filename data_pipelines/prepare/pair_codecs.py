"""The codecs of a dataset of pairs: given, of unknown codes, or trained on the samples.

What a trained codec is like (size, colours, sample rate) is taken from all samples, never from the first.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data_pipelines.codecs import Codec, PatchCodec, SpectralCodec, load_codec
from data_pipelines.codecs.kmeans import TooFewError
from data_pipelines.codecs.spectral import Frames
from data_pipelines.errors import DataError
from data_pipelines.raw.pictures import PictureFacts
from data_pipelines.raw.samples import Sample
from data_pipelines.tokens.modalities import GIVEN_CODES, code_modality
from data_pipelines.tokens.vocabulary import Modality

TRAINED_ON = 2048
"""Images or sounds that a codec is trained on."""
WINDOW_SECONDS, HOP_SECONDS = 0.032, 0.025
"""Of the frames of a spectral codec that is trained here."""
DEFAULTS = {"image": "patch:256:2", "audio": "spectral:256:2"}
"""Speech stays recognisable with two codebooks: a classifier reads 98.7 % of real clips, 85 % after these, 71 % after
one codebook."""
WANTED = {
    "image": "patch:CODES:SIZE",
    "audio": "spectral:CODES[:CODEBOOKS[:SAMPLE_RATE]]",
}


@dataclass
class Settings:
    """What the samples of one modality are like, all of them.

    training: those that a codec is trained on, from all of the source.
    some_codes: whether codes are given of any.
    """

    name: str
    samples: int = 0
    training: list[Sample] = field(default_factory=list)
    some_codes: bool = False
    size: PictureFacts | None = None
    sized: str = ""  # the file that `size` is of
    colours: int = 1
    rates: Counter[int] = field(default_factory=Counter)

    def add(self, sample: Sample, look: bool) -> None:
        """Take note of one.

        Args:
            look: into its file, because a codec is to be trained.

        Raises:
            DataError: it cannot be read, or an image has another size than the one before, naming both.
        """
        self.samples += 1
        if sample.codes_only(self.name):
            self.some_codes = True
            return
        if look and self.name == "image":
            self._add_picture(sample.picture_facts(), sample.file("image").where)
        elif look:
            self.rates[sample.sound_rate()] += 1
        self._thin(sample)

    def _add_picture(self, facts: PictureFacts, where: str) -> None:
        self.colours = max(self.colours, facts.colours)
        if self.size is None:
            self.size, self.sized = facts, where
        if (facts.height, facts.width) != (self.size.height, self.size.width):
            raise DataError(
                f"{where}: an image of {facts.height} x {facts.width} pixels, {self.sized} has {self.size.height} x "
                f"{self.size.width}. Resize the images to one size."
            )

    def _thin(self, sample: Sample) -> None:
        """Keep every n-th sample, with n doubled whenever TRAINED_ON are held: they come from all of the source."""
        stride = 1 << max(0, (self.samples - 1) // TRAINED_ON).bit_length()
        if (self.samples - 1) % stride == 0:
            if len(self.training) >= TRAINED_ON:
                self.training[:] = self.training[::2]
            self.training.append(sample.held())

    @property
    def sample_rate(self) -> int:
        """The most common one; of equally common ones the highest."""
        return max(self.rates, key=lambda rate: (self.rates[rate], rate))


def given_codec(name: str, spec: str | None) -> Codec | None:
    """The codec of a folder; None where `spec` says how to train one or what codes there are."""
    if spec is None or is_made_here(spec):
        return None
    codec = load_codec(spec)
    if codec.modality != name:
        raise DataError(f"--{name}-codec {spec}: a codec for {codec.modality}.")
    return codec


def is_made_here(spec: str) -> bool:
    """Whether a spec says how to train a codec, or what codes there are; else it is a codec's folder."""
    return spec.split(":")[0] in ("patch", "spectral", "codes")


def is_trained(spec: str | None) -> bool:
    """Whether a spec says how to train a codec."""
    return spec is None or (is_made_here(spec) and not spec.startswith(GIVEN_CODES))


def codes_spec(name: str, spec: str | None, first: int, delay: bool) -> Modality | None:
    """The range of `codes:...`, whose codec is not here."""
    if spec is None or not spec.startswith(GIVEN_CODES):
        return None
    _, size, *rest = spec.split(":")
    wanted = "codes:CODES:ROWSxCOLUMNS" if name == "image" else "codes:CODES[:CODEBOOKS]"
    try:
        grid, books = None, 1
        if name == "image":
            (shape,) = rest
            rows, columns = (int(number) for number in shape.split("x"))
            grid = (rows, columns)
        elif rest:
            (number,) = rest
            books = int(number)
        if min(int(size), books, *(grid or (1,))) < 1:
            raise ValueError
        return code_modality(name, first, (books, int(size)), spec, grid, delay)
    except ValueError:
        raise DataError(f"--{name}-codec {spec}: write {wanted}.") from None


def train_codec(spec: str | None, settings: Settings, seed: int) -> Codec:
    """A codec of the samples as `spec` says, or the default one.

    Raises:
        DataError: some samples have codes of their own, the spec is none, the samples are too few or too uniform.
    """
    name = settings.name
    if settings.some_codes:
        raise DataError(
            f"{'some' if settings.training else 'all'} of the samples have {name} codes: say with --{name}-codec which "
            f"codec made them (its folder), or "
            f"{'codes:CODES:ROWSxCOLUMNS' if name == 'image' else 'codes:CODES:CODEBOOKS'}."
        )
    kind, *numbers = (spec or DEFAULTS[name]).split(":")
    good = all(number.isdigit() and 0 < int(number) < 10**9 for number in numbers)
    values = [int(number) for number in numbers] if good else []
    if name == "image" and kind == "patch" and len(values) == 2:
        return _train_patches(settings, values[0], values[1], seed)
    if name == "audio" and kind == "spectral" and len(values) in (1, 2, 3):
        return _train_frames(settings, values, seed, shrink=spec is None)
    raise DataError(f"--{name}-codec {spec}: a codec's folder, or {WANTED[name]}.")


def _train_patches(settings: Settings, codes: int, patch: int, seed: int) -> Codec:
    images = [sample.image(settings.colours) for sample in settings.training]
    return PatchCodec.train(images, codes, patch, seed)


def _train_frames(settings: Settings, values: list[int], seed: int, shrink: bool) -> Codec:
    """values: codes, codebooks, sample rate. shrink: half the codes for so long as the frames are too few."""
    codes, codebooks = values[0], values[1] if len(values) > 1 else 1
    rate = values[2] if len(values) > 2 else settings.sample_rate
    window, hop = round(rate * WINDOW_SECONDS / 2) * 2, round(rate * HOP_SECONDS)
    frames = Frames(rate, window, hop, 0.0, rate / 2)
    sounds = [sample.sound(rate)[0] for sample in settings.training]
    while True:
        try:
            return SpectralCodec.train(sounds, codes, frames, codebooks, seed)
        except TooFewError:
            if not shrink or codes <= 2:
                raise
            codes //= 2


def decoded(codec: Any, name: str, sample: Sample, note: Any = None) -> np.ndarray:
    """The image or sound of a sample as the codec takes it. Raises DataError, naming the file."""
    if name == "audio":
        return sample.sound(codec.sample_rate, note)[0]
    image = sample.image(codec.colours, note)
    if image.shape[:2] != (codec.height, codec.width):
        raise DataError(
            f"{sample.file('image').where}: an image of {image.shape[0]} x {image.shape[1]} pixels, the codec takes "
            f"{codec.height} x {codec.width}. Resize the images to one size."
        )
    return image
