"""Linear recurrences y_t = a_t y_{t-1} + b_t, diagonal or of 2x2 blocks."""

from kernels.linear_recurrence.chunked import chunked_linear_recurrence
from kernels.linear_recurrence.reference import linear_recurrence_reference

__all__ = ["chunked_linear_recurrence", "linear_recurrence_reference"]
