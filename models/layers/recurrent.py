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

    def check_rows(self, batch: int) -> None:
        """Raise ValueError if this is the state of another number of rows."""
        if self.hidden.shape[0] != batch:
            raise ValueError(
                f"the state is of {self.hidden.shape[0]} rows and there are {batch}: make one with "
                f"new_state({batch}, ...)"
            )

    @property
    def bytes(self) -> int:
        """What it holds on the device."""
        return sum(x.numel() * x.element_size() for x in (self.inputs_BWC, self.hidden))
