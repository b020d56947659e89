"""Linear recurrences y_t = a_t y_{t-1} + b_t, diagonal or of 2x2 blocks, forward or backward in time."""

from kernels.linear_recurrence.op import linear_recurrence
from kernels.linear_recurrence.reference import linear_recurrence_reference

__all__ = ["linear_recurrence", "linear_recurrence_reference"]
