"""Images as a grid of patches, each the nearest of K centroids.

H height, W width, N patches, D values of a patch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.codecs.base import fingerprint, read_codec, write_codec
from data_pipelines.codecs.kmeans import kmeans, nearest
from data_pipelines.errors import DataError


class PatchCodec:
    """k-means on patches of `patch` x `patch` pixels of images of one size; codes run row by row.

    Args:
        height, width: of the images in pixels, multiples of `patch`.
        colours: 1 (grey) or 3 (RGB).
        centroids: (codebook_size, patch x patch x colours) float32, in units of 0 to 255.
    """

    modality = "image"
    codebooks = 1

    def __init__(self, height: int, width: int, patch: int, colours: int, centroids: np.ndarray) -> None:
        self.height, self.width, self.patch, self.colours = height, width, patch, colours
        self.centroids = centroids
        self.codebook_size = len(centroids)
        self.grid: tuple[int, int] | None = (height // patch, width // patch)

    @classmethod
    def train(cls, images: Sequence[np.ndarray], codes: int, patch: int, seed: int = 0) -> PatchCodec:
        """Learn the codebook from images of one size.

        Raises:
            DataError: no images, images of different sizes, a size that the patch does not divide, or too few
                different patches.
        """
        if not images:
            raise DataError("no images to train a patch codec on.")
        height, width = images[0].shape[:2]
        if patch < 1 or height % patch or width % patch:
            raise DataError(
                f"patches of {patch} x {patch}: images of {height} x {width} do not divide into them."
            )
        colours = 1 if images[0].ndim == 2 else images[0].shape[2]
        untrained = cls(height, width, patch, colours, np.zeros((0, patch * patch * colours), np.float32))
        # Enough patches for any codebook, from all over the images.
        step = max(1, len(images) // 4096)
        patches_ND = untrained._patches(images[::step])
        centroids = kmeans(patches_ND, codes, seed, f"image patches of {patch} x {patch}")
        return cls(height, width, patch, colours, centroids)

    @classmethod
    def load(cls, folder: Path) -> PatchCodec:
        """Raises DataError for missing or damaged files."""
        config, weights = read_codec(folder)
        return cls(
            config["height"], config["width"], config["patch"], config["colours"], weights["centroids"]
        )

    @property
    def fingerprint(self) -> str:
        return fingerprint(self._config(), {"centroids": self.centroids})

    def encode(self, samples: Sequence[np.ndarray]) -> list[np.ndarray]:
        """(T,) int64 for each image, T = rows x columns.

        Raises:
            DataError: an image of another size or type.
        """
        if not samples:
            return []
        number_N, _ = nearest(self._patches(samples), self.centroids.astype(np.float64))
        return list(number_N.reshape(len(samples), -1))

    def decode(self, codes: Sequence[np.ndarray]) -> list[np.ndarray]:
        """uint8 images (height, width) or (height, width, 3).

        Raises:
            DataError: another number of codes than the grid has, or a code outside of the codebook.
        """
        return [self._image(np.asarray(one)) for one in codes]

    def describe(self) -> str:
        colours = "grey" if self.colours == 1 else "RGB"
        size = f"{self.height} x {self.width}, {self.patch} x {self.patch} a token"
        return f"patches ({self.codebook_size:,} codes, {colours} {size})"

    def save(self, folder: Path) -> None:
        write_codec(folder, self._config(), {"centroids": self.centroids})

    def _config(self) -> dict[str, Any]:
        names = ("height", "width", "patch", "colours")
        return {"kind": "patch"} | {name: int(getattr(self, name)) for name in names}

    def _patches(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """(images x rows x columns, D) float64."""
        assert self.grid is not None
        rows, columns, p = *self.grid, self.patch
        wanted = (self.height, self.width) if self.colours == 1 else (self.height, self.width, self.colours)
        for number, image in enumerate(images):
            if image.shape != wanted or image.dtype != np.uint8:
                raise DataError(
                    f"image {number} is {image.dtype} {image.shape}, this codec takes uint8 {wanted}. Resize the "
                    "images, or train a codec for theirs."
                )
        pixels = np.stack(images).reshape(len(images), rows, p, columns, p, self.colours)
        return pixels.transpose(0, 1, 3, 2, 4, 5).reshape(len(images) * rows * columns, -1).astype(np.float64)

    def _image(self, codes_T: np.ndarray) -> np.ndarray:
        assert self.grid is not None
        rows, columns, p = *self.grid, self.patch
        if codes_T.shape != (rows * columns,) or codes_T.min() < 0 or codes_T.max() >= self.codebook_size:
            raise DataError(
                f"image codes of shape {codes_T.shape}, {codes_T.min()} to {codes_T.max()}: {rows * columns} codes "
                f"below {self.codebook_size} make an image."
            )
        patches = self.centroids[codes_T].reshape(rows, columns, p, p, self.colours)
        pixels = patches.transpose(0, 2, 1, 3, 4).reshape(self.height, self.width, self.colours)
        image = np.clip(np.rint(pixels), 0, 255).astype(np.uint8)
        return image[..., 0] if self.colours == 1 else image
