"""What Megatron-core asks of CUDA on a machine that has none, so that any layout runs on CPUs over gloo."""

from __future__ import annotations

import torch

_stood_in = False


def stand_in_for_cuda() -> None:
    """Answer Megatron's questions to torch.cuda for the CPU. Nothing happens where CUDA is there.

    Call it after megatron.core is imported. Nobody else depends on the functions that are replaced: without CUDA
    they raise.
    """
    global _stood_in
    if _stood_in or torch.cuda.is_available():
        return
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
    _stood_in = True
