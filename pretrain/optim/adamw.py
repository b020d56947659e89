"""AdamW with a learning rate per parameter type, weight decay independent of it, and the schedules."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from models.declared import Declared
from models.layers.transfer import Transfer, multipliers

if TYPE_CHECKING:
    from pretrain.config.optim import OptimSection

REFERENCE_WIDTH = 768
"""The width at which learning rates are tuned; wider models' matrices get proportionally less."""


def matrix_lr_multiplier(optim: OptimSection, width: int) -> float:
    if optim.matrix_lr_multiplier == "auto":
        return min(REFERENCE_WIDTH / width, 1.0)
    return optim.matrix_lr_multiplier


def parameter_type(declared: Declared) -> str:
    """matrix, embedding or vector (norms, scales, biases, the recurrent weights of a cell).

    The recipe scales the matrices of attention and MLP with the width, and leaves the vocabulary's alone, so an
    untied head counts as an embedding. Vectors are not decayed: a norm's scale has no reason to shrink to zero.
    """
    if declared.is_vector:
        return "vector"
    return "embedding" if declared.group in ("embedding", "head") else "matrix"


def parameter_groups(
    named: Iterable[tuple[str, nn.Parameter]],
    declared: Mapping[str, Declared],
    optim: OptimSection,
    width: int,
    *,
    layers: int = 1,
    transfer: Transfer | None = None,
) -> list[dict[str, Any]]:
    """One AdamW group per parameter type, and per layer where `optim.depth_multipliers` tells layers apart.

    Each group carries `peak_lr`, which `set_learning_rate` multiplies by the schedule. torch's AdamW shrinks a
    weight by lr x weight_decay; dividing by the group's peak leaves schedule x `optim.weight_decay`, the same
    share for every type and learning rate.

    declared: what the model says of each parameter, by its name in the plain model.
    width, layers: of the model. transfer: its base model, where there is one: the width then has its part through
        Complete(d)P, and `matrix_lr_multiplier` is that of the base's width.
    """
    split_head = transfer is not None or optim.multipliers.head != optim.multipliers.embedding
    by_size = None if transfer is None else multipliers(transfer, width, layers)
    members: dict[tuple[str, str, float], list[nn.Parameter]] = {}
    for name, parameter in named:
        kind = parameter_type(declared[name])
        if split_head and declared[name].group == "head":
            kind = "head"
        scaled_as = kind if by_size is None else transfer_type(name, kind)
        depth = depth_multiplier(optim.depth_multipliers, name, layers)
        members.setdefault((kind, scaled_as, depth), []).append(parameter)
    groups = []
    for (kind, scaled_as, depth), parameters in members.items():
        peak, epsilon = optim.lr * depth * getattr(optim.multipliers, kind), optim.epsilon
        if kind == "matrix":
            peak *= matrix_lr_multiplier(optim, width if transfer is None else transfer.width)
        if by_size is not None:
            peak, epsilon = peak * by_size[scaled_as].lr, epsilon * by_size[scaled_as].epsilon
        decay = 0.0 if kind == "vector" else optim.weight_decay / peak
        groups.append(
            {
                "params": parameters,
                "lr": peak,
                "peak_lr": peak,
                "eps": epsilon,
                "weight_decay": decay,
                "type": scaled_as,
            }
        )
    return groups


def transfer_type(name: str, kind: str) -> str:
    """The row of Complete(d)P's table that a parameter of this type belongs to."""
    if kind != "vector":
        return kind
    if name.endswith((".q_norm.weight", ".k_norm.weight")):
        return "qk_norm"
    return "vector" if name.startswith("blocks.") else "final_norm"


def depth_multiplier(points: Sequence[float], name: str, layers: int) -> float:
    """The factor of a block's parameter: `points` lie evenly from the first block to the last, with straight lines
    between them. 1 outside of the blocks, and without points."""
    found = re.match(r"blocks\.(\d+)\.", name)
    if not points or found is None:
        return 1.0
    place = int(found[1]) / max(1, layers - 1) * (len(points) - 1)
    before = min(int(place), len(points) - 1)
    after = min(before + 1, len(points) - 1)
    return points[before] + (place - before) * (points[after] - points[before])


class UncompiledAdamW(torch.optim.AdamW):
    """torch's AdamW without the wrappers that keep torch.compile out of its methods. The first call of any of them
    imports torch._dynamo, with sympy and DTensor: a second of every rank's start, for an update that is never
    compiled. What the wrapper of `step` does besides, is here done by `no_grad`."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))
    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)
    state_dict = inspect.unwrap(torch.optim.Optimizer.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.Optimizer.load_state_dict)


def build_optimizer(groups: list[dict[str, Any]], optim: OptimSection) -> torch.optim.AdamW:
    return UncompiledAdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.epsilon, fused=True)


def schedule_factor(optim: OptimSection, step: int, steps: int) -> float:
    """Share of the peak learning rate in step `step` (the first is 0) of a run of `steps`."""
    if step < optim.warmup_steps:
        return (step + 1) / optim.warmup_steps
    if optim.schedule == "constant":
        return 1.0
    final = optim.final_lr_fraction
    if optim.schedule == "cosine":
        progress = (step - optim.warmup_steps) / max(1, steps - 1 - optim.warmup_steps)
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    decay = optim.wsd_decay_steps(steps)
    into_decay = step - (steps - decay)
    return 1.0 if into_decay < 0 else 1 - (1 - final) * (into_decay + 1) / decay


def set_learning_rate(groups: Iterable[dict[str, Any]], factor: float) -> None:
    for group in groups:
        group["lr"] = group["peak_lr"] * factor
