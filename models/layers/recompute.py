"""Selective activation checkpointing: what is large, and cheap to compute again, is not kept for the backward pass.

A module with a `recompute` attribute has such a stretch, and says which; whoever trains sets the attribute.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint


def recomputed(active: bool, function: Callable[..., Any], *inputs: Any) -> Any:
    """`function(*inputs)`. If active, only the inputs are kept, and the function runs again in the backward pass.

    It may end in a matrix product without that being computed twice: the second run stops when it has all that the
    backward pass needs, which of a product are the factors.
    """
    if not active or not torch.is_grad_enabled():
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
