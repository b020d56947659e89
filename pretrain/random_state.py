"""The state of a rank's random generators, as bytes of a checkpoint."""

from __future__ import annotations

import io
import pickle
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pretrain.errors import CheckpointError

if TYPE_CHECKING:
    pass


def random_state() -> bytes:
    """This rank's generators.

    What a run draws is seeded by (seed, purpose, row), never from these; they are kept for code of the user's
    that does draw from them, and belong to one rank of one world size.
    """
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    buffer = io.BytesIO()
    torch.save(states, buffer)
    return buffer.getvalue()


def set_random_state(saved: bytes, path: Path) -> None:
    """Raises CheckpointError for bytes that `random_state` did not write; they are read as tensors alone."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own of a foreign pickle say how to run it
            states = torch.load(io.BytesIO(saved), weights_only=True)
        torch.set_rng_state(states["cpu"])
        if "cuda" in states and torch.cuda.is_available():
            torch.cuda.set_rng_state(states["cuda"])
    except Exception as error:  # what a pickle of foreign bytes raises is anything
        foreign = isinstance(error, pickle.UnpicklingError)
        reason = "it holds something other than tensors; nothing of it was run" if foreign else str(error)
        reason = reason.split("\n", 1)[0]
        raise CheckpointError(
            f"{path}: a rank's random state cannot be read ({type(error).__name__}: {reason}); put the file back from "
            "a copy, or remove it and its line in MANIFEST.json to go on without"
        ) from None
