"""Codecs of `transformers` and `diffusers`, from folders on this machine. Nothing is downloaded.

codec.json: {"kind": "transformers-encodec", "model": FOLDER, "bandwidth": 6.0}, {"kind": "transformers-dac", "model":
FOLDER} or {"kind": "diffusers-vq", "model": FOLDER, "height": 256, "width": 256}. FOLDER is what the library's
`save_pretrained` wrote; it may be relative to the folder of codec.json. Datasets refer to it by its full path.

K codebooks, T frames or places.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_pipelines.codecs.base import FILE, read_config
from data_pipelines.errors import DataError


class _Pretrained:
    """What the adapters share: the model, its options and its identity."""

    kind = ""
    library, model_class = "", ""

    def __init__(self, folder: Path, options: dict[str, Any]) -> None:
        self.folder, self.options = folder.resolve(), options
        self.model = _load(self.library, self.model_class, self.folder)
        self.fingerprint = _fingerprint(self.kind, self.folder, options)

    @classmethod
    def load(cls, folder: Path) -> Any:
        """The codec of a folder with a codec.json.

        Raises:
            DataError: the library or the model's folder is missing, or the model is not the one that was used before.
        """
        config = read_config(folder)
        written = config.pop("fingerprint", None)
        config.pop("kind")
        if "model" not in config:
            raise DataError(f'{folder / FILE}: no "model" in it, the model\'s folder.')
        codec = cls(folder / str(config.pop("model")), config)
        if written not in (None, codec.fingerprint):
            raise DataError(
                f"{folder / FILE}: {codec.folder} holds another model than the one it was written for."
            )
        return codec

    def save(self, folder: Path) -> None:
        """Write codec.json, which refers to the model's folder."""
        content = {
            "kind": self.kind,
            "model": str(self.folder),
            **self.options,
            "fingerprint": self.fingerprint,
        }
        (folder / FILE).write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")

    def describe(self) -> str:
        return f"{self.model_class} of {self.folder}"


class DacCodec(_Pretrained):
    """Descript's audio codec."""

    kind, library, model_class = "transformers-dac", "transformers", "DacModel"
    modality = "audio"

    def __init__(self, folder: Path, options: dict[str, Any]) -> None:
        super().__init__(folder, options)
        config = self.model.config
        self.codebooks, self.codebook_size = int(config.n_codebooks), int(config.codebook_size)
        self.sample_rate, self.grid = int(config.sampling_rate), None

    @torch.no_grad()
    def encode(self, samples: Sequence[np.ndarray]) -> list[np.ndarray]:
        """(K, T) int64 for each sound; its end is filled with silence to a whole frame."""
        hop = int(self.model.config.hop_length)
        found = []
        for sound in samples:
            filled = np.pad(sound, (0, -len(sound) % hop))
            found.append(self.model.encode(torch.from_numpy(filled)[None, None]).audio_codes[0].numpy())
        return [_one_or_many(codes) for codes in found]

    @torch.no_grad()
    def decode(self, codes: Sequence[np.ndarray]) -> list[np.ndarray]:
        """float32 sounds."""
        batches = [torch.from_numpy(np.atleast_2d(one))[None] for one in codes]
        return [_sound(self.model.decode(audio_codes=batch).audio_values) for batch in batches]


class EncodecCodec(_Pretrained):
    """Meta's audio codec; the one channel, unnormalised form (24 kHz)."""

    kind, library, model_class = "transformers-encodec", "transformers", "EncodecModel"
    modality = "audio"

    def __init__(self, folder: Path, options: dict[str, Any]) -> None:
        super().__init__(folder, options)
        config, bandwidth = self.model.config, options.get("bandwidth")
        if config.audio_channels != 1 or config.normalize or config.chunk_length_s is not None:
            raise DataError(
                f"{folder}: only EnCodec models of one channel without normalisation and chunks are read."
            )
        if bandwidth not in config.target_bandwidths:
            raise DataError(
                f"{folder}: bandwidth {bandwidth!r} in codec.json is none of {config.target_bandwidths}."
            )
        self.codebook_size, self.sample_rate = int(config.codebook_size), int(config.sampling_rate)
        self.codebooks = int(self.model.quantizer.get_num_quantizers_for_bandwidth(bandwidth))
        self.grid = None

    @torch.no_grad()
    def encode(self, samples: Sequence[np.ndarray]) -> list[np.ndarray]:
        """(K, T) int64 for each sound."""
        batches = [torch.from_numpy(sound)[None, None] for sound in samples]
        found = [
            self.model.encode(batch, bandwidth=self.options["bandwidth"]).audio_codes for batch in batches
        ]
        return [_one_or_many(codes[0, 0].numpy()) for codes in found]

    @torch.no_grad()
    def decode(self, codes: Sequence[np.ndarray]) -> list[np.ndarray]:
        """float32 sounds."""
        batches = [torch.from_numpy(np.atleast_2d(one))[None, None] for one in codes]
        return [_sound(self.model.decode(batch, [None]).audio_values) for batch in batches]


class VqCodec(_Pretrained):
    """A VQ-GAN for RGB images of one size."""

    kind, library, model_class = "diffusers-vq", "diffusers", "VQModel"
    modality, codebooks, colours = "image", 1, 3

    def __init__(self, folder: Path, options: dict[str, Any]) -> None:
        super().__init__(folder, options)
        config = self.model.config
        try:
            self.height, self.width = int(options["height"]), int(options["width"])
        except KeyError as error:
            raise DataError(f"{folder}: its codec.json has no {error}, the size of the images.") from None
        shrink = 2 ** (len(config.block_out_channels) - 1)
        if self.height % shrink or self.width % shrink:
            raise DataError(f"{folder}: images of {self.height} x {self.width} do not divide by {shrink}.")
        self.grid = (self.height // shrink, self.width // shrink)
        self.codebook_size = int(config.num_vq_embeddings)
        self._channels = int(config.vq_embed_dim or config.latent_channels)

    @torch.no_grad()
    def encode(self, samples: Sequence[np.ndarray]) -> list[np.ndarray]:
        """(T,) int64 for each image, row by row."""
        found = []
        for image in samples:
            pixels = torch.from_numpy(image.astype(np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
            _, _, (_, _, codes) = self.model.quantize(self.model.encode(pixels).latents)
            found.append(codes.reshape(-1).numpy().astype(np.int64))
        return found

    @torch.no_grad()
    def decode(self, codes: Sequence[np.ndarray]) -> list[np.ndarray]:
        """uint8 images (height, width, 3)."""
        found = []
        for one in codes:
            shape = (1, *self.grid, self._channels)
            latents = self.model.quantize.get_codebook_entry(torch.from_numpy(np.asarray(one)), shape)
            # Straight to the decoder: `VQModel.decode` takes codes or latents as the model's config says.
            made = self.model.decoder(
                self.model.post_quant_conv(latents),
                latents if self.model.config.norm_type == "spatial" else None,
            )
            pixels = ((made[0].permute(1, 2, 0) + 1) * 127.5).round().clamp(0, 255)
            found.append(pixels.to(torch.uint8).numpy())
        return found


def _load(library: str, name: str, folder: Path) -> Any:
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; codec.json names it as the folder of the {name}.")
    try:
        found = getattr(importlib.import_module(library), name)
    except (ImportError, AttributeError) as error:
        raise DataError(
            f"{folder}: reading a {name} needs {library} ({error}): pip install 'triptych[codecs]'."
        ) from None
    try:
        # Never weights in pickles: the folder is another's choice, as codec.json is.
        return found.from_pretrained(str(folder), local_files_only=True, use_safetensors=True).eval()
    except Exception as error:  # whatever damaged files make of the library
        reason = str(error).strip().split("\n", 1)[0]
        raise DataError(
            f"{folder}: the {name} there cannot be loaded ({type(error).__name__}: {reason}). Its weights must be in "
            "safetensors, as `save_pretrained` of the library writes them; save or copy it again."
        ) from None


def _fingerprint(kind: str, folder: Path, options: dict[str, Any]) -> str:
    """sha256 of the model's config and weights, and of the options."""
    digest = hashlib.sha256(json.dumps([kind, options], sort_keys=True).encode())
    files = [folder / "config.json", *sorted(folder.glob("*.safetensors")), *sorted(folder.glob("*.bin"))]
    for path in files:
        digest.update(path.name.encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _one_or_many(codes_KT: np.ndarray) -> np.ndarray:
    return (codes_KT if len(codes_KT) > 1 else codes_KT[0]).astype(np.int64)


def _sound(values: torch.Tensor) -> np.ndarray:
    return values.reshape(-1).clamp(-1, 1).numpy().astype(np.float32)
