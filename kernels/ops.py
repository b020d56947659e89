"""Operators of one's own, registered with torch's dispatcher.

As `torch.library.custom_op` does it, one step below: that one wraps every implementation in a function whose first
call imports torch._dynamo, with sympy and DTensor, and which compares the storages of arguments and results at every
call. The import costs a second of CPU time in each rank's start, also where nothing is compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Backward = Callable[..., Any]


class Operator:
    """The operator `name` ("namespace::name") that a function of tensors is. It changes none of its arguments, and
    none of its results is a view of one.

    `register_fake` says what its results look like without computing them. Without `register_autograd` a gradient
    through it is a RuntimeError.
    """

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.name = name
        self._backward: Backward | None = None
        self._setup_context: Callable[..., None] | None = None
        schema = torch.library.infer_schema(function, mutates_args=())
        torch.library.define(name, schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.impl(name, "default", function)
        torch.library.register_autograd(name, self._differentiate, setup_context=self._keep)
        namespace, short = name.split("::")
        self._call = getattr(getattr(torch.ops, namespace), short).default

    def __call__(self, *arguments: Any) -> Any:
        return self._call(*arguments)

    def register_fake(self, function: Callable[..., Any]) -> Callable[..., Any]:
        torch.library.register_fake(self.name, function)
        return function

    def register_autograd(self, backward: Backward, *, setup_context: Callable[..., None]) -> None:
        """As `torch.library.register_autograd`."""
        self._backward, self._setup_context = backward, setup_context

    def _keep(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        if self._setup_context is not None:
            self._setup_context(ctx, inputs, output)

    def _differentiate(self, ctx: Any, *gradients: Any) -> Any:
        if self._backward is None:
            raise RuntimeError(f"{self.name} has no gradient: it is one itself")
        return self._backward(ctx, *gradients)


def operator(name: str) -> Callable[[Callable[..., Any]], Operator]:
    """The decorator that makes a function an `Operator`."""
    return lambda function: Operator(name, function)
