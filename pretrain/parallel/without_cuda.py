"""What Megatron-core asks of CUDA on a machine that has none, so that any layout runs on CPUs over gloo."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


def stand_in_for_cuda() -> None:
    """Answer Megatron's questions to torch.cuda for the CPU. Nothing happens where CUDA is there.

    Call it after megatron.core is imported. Nobody else depends on the functions that are replaced: without CUDA
    they raise.
    """
    if not torch.cuda.is_available():
        torch.cuda.current_device = _cpu  # type: ignore[assignment]


def replace_cuda_literals(*modules: ModuleType) -> None:
    """Make these modules of Megatron's allocate on the CPU where they say device="cuda". Nothing where CUDA is there.

    They see torch through `_TorchOnCpu`; nobody else does.
    """
    if not torch.cuda.is_available():
        for module in modules:
            module.torch = _TorchOnCpu()  # type: ignore[attr-defined]


@contextlib.contextmanager
def tensor_types_of_cuda() -> Iterator[None]:
    """Within it `Tensor.type()` says "torch.cuda.FloatTensor" of a CPU's tensor: DistributedOptimizer sorts the
    parameters by these names as it is built. Nothing changes where CUDA is there."""
    if torch.cuda.is_available():
        yield
        return
    with _TypesOfCuda():
        yield


def _cpu() -> torch.device:
    return torch.device("cpu")


class _TorchOnCpu:
    """The torch module, but for the two functions that are told device="cuda"."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def zeros(*size: Any, device: Any = None, **options: Any) -> Tensor:
        return torch.zeros(*size, device="cpu" if device == "cuda" else device, **options)

    @staticmethod
    def tensor(data: Any, device: Any = None, **options: Any) -> Tensor:
        return torch.tensor(data, device="cpu" if device == "cuda" else device, **options)


class _TypesOfCuda(TorchFunctionMode):
    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found = function(*args, **(kwargs or {}))
        if function is Tensor.type and isinstance(found, str):
            return found.replace("torch.", "torch.cuda.", 1)
        return found
