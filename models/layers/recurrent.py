"""What recurrent mixers remember while decoding. Shape suffixes: B batch, C channels, W taps."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class RecurrentState:
    """One layer's state, of a size that does not depend on how many positions were read.

    inputs_BWC: the convolution's last inputs, (B, taps - 1, channels).
    hidden: the recurrence's state, (B, ...), in fp32 or wider. A new one of zeros stands before the first
        position. The mixer replaces both when it reads on.
    """

    inputs_BWC: Tensor
    hidden: Tensor

    @property
    def bytes(self) -> int:
        """What it holds on the device."""
        return sum(x.numel() * x.element_size() for x in (self.inputs_BWC, self.hidden))
