"""Counting what a computation holds and sends, on real tensors and on fake ones alike."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Traffic = Counter[tuple[str, str]]
"""Bytes by (group's name, collective's name)."""

LARGER_SIDE = {
    "_allgather_base_": 0,
    "allgather_": 0,
    "allgather_into_tensor_coalesced_": 0,
    "_reduce_scatter_base_": 1,
    "reduce_scatter_": 1,
    "reduce_scatter_tensor_coalesced_": 1,
}
"""Of a collective whose two tensors differ in size: the place among its arguments of the larger one."""


class TensorTracker(TorchDispatchMode):
    """Follows every tensor that is made while it is on, and every collective.

    Tensors that were there before are not counted, nor are views of them. Memory is that of storages, each counted
    once however many views it has. A collective counts the bytes of the larger of what goes in and what comes out on
    this rank, whatever the algorithm then sends over which link.

    live: bytes held now. peak: the most so far. calls: how many collectives of each kind.
    smallest_call: collectives of fewer bytes are not counted.
    """

    def __init__(
        self, name_of: Callable[[dist.ProcessGroup], str] | None = None, *, smallest_call: int = 0
    ) -> None:
        super().__init__()
        self._smallest_call = smallest_call
        self.live = 0
        self.peak = 0
        self.traffic: Traffic = Counter()
        self.calls: Traffic = Counter()
        self._name_of = name_of or (lambda group: str(group.group_name))
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for tensor in _tensors((args, kwargs)):
            self._meet(tensor, count=False)
        out = func(*args, **kwargs)
        if func.namespace == "c10d":
            self._count_collective(func, args)
        for tensor in _tensors(out):
            self._meet(tensor, count=True)
        return out

    def _meet(self, tensor: Tensor, *, count: bool) -> None:
        """Follow the tensor's storage from here, if it is met for the first time."""
        storage = tensor.untyped_storage()
        key = id(storage)
        known = self._known.get(key)
        if known is not None and known() is storage:
            return
        size = storage.nbytes() if count else 0
        self.live += size
        self.peak = max(self.peak, self.live)

        def freed(_: object, key: int = key, size: int = size) -> None:
            self.live -= size
            self._known.pop(key, None)

        self._known[key] = weakref.ref(storage, freed)

    def _count_collective(self, func: Any, args: tuple[Any, ...]) -> None:
        name = func.name().split("::")[1].split(".")[0]
        group = next((_group_of(arg) for arg in args if isinstance(arg, torch.ScriptObject)), None)
        if group is None:
            return
        tensors = _tensors(args[LARGER_SIDE.get(name, 0)])
        size = sum(tensor.nbytes for tensor in tensors)
        if size >= self._smallest_call:
            key = (self._name_of(group), name.strip("_"))
            self.traffic[key] += size
            self.calls[key] += 1


def _tensors(tree: Any) -> Iterable[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _group_of(boxed: torch.ScriptObject) -> dist.ProcessGroup | None:
    try:
        return dist.ProcessGroup.unbox(boxed)
    except RuntimeError:  # another kind of object: a reduction's name
        return None
