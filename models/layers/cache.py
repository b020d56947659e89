"""The state of attention while decoding: the keys and values seen so far.

Shape suffixes: B batch, T new time, S seen time, K key heads, D head width.
"""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Keys and values of up to `capacity` positions, allocated once and filled in place."""

    def __init__(
        self,
        batch: int,
        capacity: int,
        key_heads: int,
        head_width: int,
        *,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        shape = (batch, capacity, key_heads, head_width)
        self.k_BSKD = torch.zeros(shape, device=device, dtype=dtype)
        self.v_BSKD = torch.zeros(shape, device=device, dtype=dtype)
        self.length = 0

    @property
    def capacity(self) -> int:
        return self.k_BSKD.shape[1]

    def append(self, k_BTKD: Tensor, v_BTKD: Tensor) -> tuple[Tensor, Tensor]:
        """Add T positions; return views of all keys and values so far, (B, S, K, D).

        Raises ValueError if they do not fit.
        """
        end = self.length + k_BTKD.shape[1]
        if end > self.capacity:
            raise ValueError(
                f"the cache holds {self.capacity} positions and {end} are needed: "
                "make it with a greater length, or generate fewer tokens"
            )
        self.k_BSKD[:, self.length : end] = k_BTKD
        self.v_BSKD[:, self.length : end] = v_BTKD
        self.length = end
        return self.k_BSKD[:, :end], self.v_BSKD[:, :end]
