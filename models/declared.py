"""What a module says of itself, for whoever draws its weights, divides it, or trains it.

A mixer knows no ranks. Beside its code it declares, as class attributes and one method:

    splits: child -> Split             how its layers' weights are divided over tensor-parallel ranks; "" is itself
    crossing: Crossing | (..., ...)    where its positions meet: a method, children by name, or several of these
    returns: (child, ...)              its projections back to the residual stream
    group: str                         which part of a model its parameters count as; a child's own word goes first
    vectors: {parameter, ...}          parameters stored in rows that are vectors all the same: not decayed
    initial_rules(): parameter -> Rule its own parameters' first values; those of its layers follow the model's recipe
    bounds(): parameter -> float       parameters that stay within [-bound, bound]

`declared` collects this once, from the whole model, before anything divides it. A mixer that does not say how it is
divided, or where its positions meet, is refused by name wherever that would be needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from models.initialise import Rule
from models.sharding import Split

Way = Literal["gather", "swap", "swap_channels", "swap_state", "summaries", "halo"]
"""How ranks that share rows work together where positions meet; `pretrain.parallel.context` has what each does.

swap: a method of tensors (B, T, heads, ...) and of tensors (heads, ...): all positions of some heads, and back.
That one is for any module, the others for the class they were written for:
gather: `attend` of sigmoid attention, whose outputs over ranges of keys add up: everybody's keys and values.
swap_channels, summaries: `solve` of a nonlinear recurrence. swap_state: `scan` of a state space.
halo: `forward` of a convolution: the last inputs of the rank before.
"""


@dataclass(frozen=True)
class Crossing:
    """The one method of a module in which positions meet, and the ways in which ranks can share it.

    axes: for "swap", of each positional argument: "BTH" is (B, T, heads, ...), "H" is (heads, ...), "" stays as it is.
        The result, or the first of several, is (B, T, heads, ...).
    """

    method: str
    ways: tuple[Way, ...]
    axes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Matrix:
    """A weight that the recipe of the model draws.

    name: in the model. group: as declared. layer: of its block, 0 the first; None outside of blocks.
    returns: whether its outputs go back to the residual stream.
    """

    name: str
    group: str
    fan_in: int
    layer: int | None
    returns: bool


@dataclass(frozen=True)
class Declared:
    """One parameter: how it starts, which part of the model it counts as, and whether the optimizer takes it for a
    vector."""

    rule: Rule
    group: str
    is_vector: bool


class DeclarationError(ValueError):
    """A module does not say what must be known of it; the message names its class and the attribute."""


def declared(model: nn.Module, recipe: Callable[[Matrix], Rule]) -> dict[str, Declared]:
    """Of every parameter of a whole model, by name. Raises DeclarationError for one of which nothing is said."""
    returning = {
        f"{name}.{child}"
        for name, module in model.named_modules()
        for child in getattr(module, "returns", ())
    }
    found: dict[str, Declared] = {}
    for name, parameter in model.named_parameters():
        owner_name, _, own_name = name.rpartition(".")
        owner = model.get_submodule(owner_name)
        group = _group(model, owner_name)
        if group is None:
            raise DeclarationError(f"{type(owner).__name__}: no module around {name} declares `group`")
        own_rules = owner.initial_rules() if hasattr(owner, "initial_rules") else {}  # type: ignore[operator]
        if own_name in own_rules:
            rule = own_rules[own_name]
        elif parameter.ndim == 2 and own_name == "weight":
            rule = recipe(
                Matrix(name, group, parameter.shape[1], _layer(name), returns=owner_name in returning)
            )
        else:
            raise DeclarationError(f"{type(owner).__name__}: `initial_rules` does not say how {name} starts")
        is_vector = parameter.ndim < 2 or own_name in getattr(owner, "vectors", ())
        found[name] = Declared(rule, group, is_vector)
    return found


def splits_of(model: nn.Module) -> dict[str, Split]:
    """How the modules of a model are divided, by name; what one says of a child goes before the child's own word."""
    found: dict[str, Split] = {}
    for name, module in model.named_modules():
        table: Mapping[str, Split] = getattr(module, "splits", {})
        for child, split in table.items():
            full = ".".join(part for part in (name, child) if part)
            layer = getattr(module, child, None) if child else module
            if layer is not None and next(layer.parameters(), None) is not None:  # else it is built without
                found.setdefault(full, split)
    return found


def undivided_mixers(model: Any) -> list[str]:
    """The mixers of a model that do not say how they are divided, by class."""
    return list(dict.fromkeys(type(one).__name__ for one in mixers(model) if not hasattr(one, "splits")))


def crossings_of(model: Any) -> Iterator[tuple[nn.Module, Crossing]]:
    """Every module of a model's blocks in which positions meet. Raises DeclarationError for a mixer that says nothing,
    or names a child that says nothing."""
    for mixer in mixers(model):
        yield from _crossings(mixer)


def _crossings(module: nn.Module) -> Iterator[tuple[nn.Module, Crossing]]:
    found = getattr(module, "crossing", ())
    places = (found,) if isinstance(found, Crossing) else tuple(found)
    if not places:
        raise DeclarationError(
            f"{type(module).__name__} does not declare `crossing`: its positions would meet on one rank alone"
        )
    for place in places:
        if isinstance(place, Crossing):
            yield module, place
        else:
            yield from _crossings(module.get_submodule(place))


def mixers(model: Any) -> Iterator[nn.Module]:
    """The mixer of each block: `block.mixer`, or the layer that the block names as such."""
    for block in model.blocks.children():
        yield block.get_submodule(getattr(block, "mixer_name", "mixer"))


def bounds_of(model: nn.Module) -> dict[str, float]:
    """The bounds that modules declare, by parameter."""
    return {
        f"{name}.{own}": bound
        for name, module in model.named_modules()
        if name and hasattr(module, "bounds")
        for own, bound in module.bounds().items()
    }


def _group(model: nn.Module, name: str) -> str | None:
    """The word of the innermost module around a parameter."""
    while True:
        group: str | None = getattr(model.get_submodule(name), "group", None)
        if group is not None or not name:
            return group
        name = name.rpartition(".")[0]


def _layer(name: str) -> int | None:
    first, _, rest = name.partition(".")
    return int(rest.partition(".")[0]) if first == "blocks" else None
