"""What the pipelines need of a codec, and codecs in folders: codec.json and weights.safetensors.

A codec of one's own is a class with these members and a `load(folder)` that returns one; `save` writes a codec.json
with {"kind": "my_package.my_module:MyCodec"} and more. A dataset or a run may come from anyone, so the
module is imported only where the user says so: `export TRIPTYCH_CODECS=my_package.my_module` (several with commas)
wherever the dataset is built, a run trains (it keeps the codec, and shows samples) or samples are made. Otherwise
loading the codec is refused with a message that names it.

K codebooks, T frames.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from data_pipelines.errors import DataError
from data_pipelines.raw.json_text import parse_json

FILE = "codec.json"
WEIGHTS = "weights.safetensors"
KINDS = {
    "patch": "data_pipelines.codecs.patch:PatchCodec",
    "spectral": "data_pipelines.codecs.spectral:SpectralCodec",
    "transformers-dac": "data_pipelines.codecs.pretrained:DacCodec",
    "transformers-encodec": "data_pipelines.codecs.pretrained:EncodecCodec",
    "diffusers-vq": "data_pipelines.codecs.pretrained:VqCodec",
}


TRUSTED = "TRIPTYCH_CODECS"
"""Environment variable: modules that a codec.json may name."""
OWN_KIND = re.compile(r"([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):([A-Za-z_]\w*)", re.ASCII)


class Codec(Protocol):
    """Samples to codes and back. Codes count from 0 to codebook_size - 1 in every codebook."""

    modality: str  # image or audio
    codebooks: int
    codebook_size: int
    grid: tuple[int, int] | None  # rows and columns of an image's codes

    @property
    def fingerprint(self) -> str:
        """sha256 of config and weights: equal for codecs that give equal codes."""
        ...

    def encode(self, samples: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Codes of each sample, int64: (T,) from one codebook, (K, T) from several."""
        ...

    def decode(self, codes: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Samples from codes."""
        ...

    def describe(self) -> str:
        """One line for people."""
        ...

    def save(self, folder: Path) -> None:
        """Write what `load_codec` needs into an existing folder."""
        ...


class ImageCodec(Codec, Protocol):
    """Samples are uint8, (height, width) for one colour and (height, width, 3) for three."""

    height: int
    width: int
    colours: int  # 1 or 3


class AudioCodec(Codec, Protocol):
    """Samples are float32 in [-1, 1], (samples,), at `sample_rate`."""

    sample_rate: int


def load_codec(folder: Path | str) -> Codec:
    """The codec of a folder.

    Raises:
        DataError: no codec there, damaged files, or a codec whose module is not installed.
    """
    folder = Path(folder)
    content = read_config(folder)
    kind = content.get("kind")
    own = OWN_KIND.fullmatch(kind) if isinstance(kind, str) else None
    if isinstance(kind, str) and kind in KINDS:
        module, _, name = KINDS[kind].partition(":")
    elif own is not None:
        module, name = own.groups()
        _refuse_untrusted(kind, module, folder)
    else:
        raise DataError(
            f"{folder / FILE}: codec kind {kind!r} is not one of {', '.join(KINDS)} and no `module:Class`."
        )
    try:
        codec: Codec = _class(module, name, folder).load(folder)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError, MemoryError) as error:
        reason = f"{type(error).__name__}: {error}".split("\n", 1)[0]
        raise DataError(f"{folder / FILE}: damaged ({reason}). Copy the codec again.") from None
    return codec


def _refuse_untrusted(kind: Any, module: str, folder: Path) -> None:
    """To import a module is to run it, and the folder's author chose which."""
    trusted = [name.strip() for name in os.environ.get(TRUSTED, "").split(",")]
    if module not in trusted:
        raise DataError(
            f"{folder / FILE}: its codec is {kind}, code that is no part of this program, and this file alone is no "
            f"reason to run it. If you trust that module: export {TRUSTED}={','.join([*filter(None, trusted), module])}"
        )


def _class(module: str, name: str, folder: Path) -> Any:
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise DataError(
            f"{folder / FILE}: its codec is {module}:{name}, which cannot be imported ({error}). Install the package "
            "that has it, or put it on PYTHONPATH."
        ) from None
    if not isinstance(found, type) or not callable(getattr(found, "load", None)):
        raise DataError(f"{folder / FILE}: {module}:{name} is no codec: it is no class with a method `load`.")
    return found


def read_config(folder: Path) -> dict[str, Any]:
    """codec.json of a folder. Raises DataError if it is missing or damaged."""
    path = folder / FILE
    if not path.is_file():
        raise DataError(f"{path}: missing, so {folder} holds no codec.")
    content = parse_json(path.read_bytes(), str(path), "damaged: ")
    if not isinstance(content, dict):
        raise DataError(f"{path}: damaged (not an object). Copy the codec again.")
    return content


def fingerprint(config: dict[str, Any], weights: dict[str, np.ndarray]) -> str:
    """sha256 of a config and the names, shapes and bytes of weights."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name in sorted(weights):
        digest.update(f"{name}/{weights[name].dtype}/{weights[name].shape}".encode())
        digest.update(np.ascontiguousarray(weights[name]).tobytes())
    return digest.hexdigest()


def write_codec(folder: Path, config: dict[str, Any], weights: dict[str, np.ndarray]) -> None:
    """Write codec.json and weights.safetensors."""
    from safetensors.numpy import save_file

    save_file(weights, folder / WEIGHTS)
    content = config | {"fingerprint": fingerprint(config, weights)}
    (folder / FILE).write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def read_codec(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What `write_codec` wrote.

    Raises:
        DataError: a file is missing or damaged, or the weights are not those that the codec was saved with.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    config, path = read_config(folder), folder / WEIGHTS
    if not path.is_file():
        raise DataError(f"{path}: missing. Copy the codec again.")
    try:
        weights = load_file(path)
    except SafetensorError as error:
        raise DataError(f"{path}: damaged ({error}). Copy the codec again.") from None
    written = config.pop("fingerprint", None)
    if written != fingerprint(config, weights):
        raise DataError(f"{folder}: codec.json and {WEIGHTS} do not belong together. Copy the codec again.")
    return config, weights
