"""First weights of a model that may be divided: each drawn whole, by name, and cut to this rank's part."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn

from models.initialise import Initialisable, initial_parameter
from pretrain.checkpoint.fragments import Placement


@torch.no_grad()
def fill(
    model: nn.Module,
    placements: Mapping[str, Placement],
    device: torch.device,
    seed: int,
    aliases: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Move a model from the meta device to `device`, in place, with the values it has in any layout.

    One parameter at a time is whole, on the CPU. Tied parameters stay one.

    aliases: names in the plain model of those parameters that are called otherwise there.
    """
    _allocate(model, device)
    rules: Initialisable = model  # type: ignore[assignment]  # every family's model has the method
    for name, parameter in model.named_parameters():
        placement = placements[name]
        plain = aliases.get(name, name)
        whole = initial_parameter(plain, placement.shape, rules.initial_rule(plain), seed)
        parameter.copy_(local_part(whole, placement, tuple(parameter.shape)))


def local_part(whole: Tensor, placement: Placement, shape: tuple[int, ...]) -> Tensor:
    """The local tensor, of this shape, of a plain one: zeros where it stands for nothing in the plain one."""
    if placement.dim is None:
        return whole
    local = whole.new_zeros(shape)
    for here, there, length in placement.segments:
        local.narrow(placement.dim, here, length).copy_(whole.narrow(placement.dim, there, length))
    return local


def _allocate(model: nn.Module, device: torch.device) -> None:
    # Not `Module.to_empty`: that gives a tied head a weight of its own.
    assert next(model.buffers(), None) is None, "a model keeps nothing but parameters"
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter not in made:
                # Not `empty_like`: of a meta tensor it runs Python's own forms of torch, which import sympy.
                assert parameter.is_contiguous(), name
                made[parameter] = nn.Parameter(
                    torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                )
            setattr(module, name, made[parameter])
