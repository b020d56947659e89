"""What engines share: the optimizer's groups, its hooks, and bounds that hold after every update."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from models.declared import Declared
from pretrain.checkpoint.fragments import Fragment
from pretrain.optim import parameter_groups

if TYPE_CHECKING:
    from pretrain.config import Config
    from pretrain.optim.scaling import Scaled


def optimizer_groups(
    named: Iterable[tuple[str, nn.Parameter]],
    declared: Mapping[str, Declared],
    scaled: Scaled,
    config: Config,
) -> list[dict[str, Any]]:
    """The config's AdamW groups for these parameters, by their names in the plain model."""
    return parameter_groups(
        named,
        declared,
        scaled.optim,
        config.model.width,
        layers=config.model.layers,
        transfer=getattr(config.model, "transfer", None),
    )


def before_step(adam: torch.optim.Optimizer, callback: Callable[[], object]) -> None:
    """Call `callback` before each step of a torch optimizer."""

    def hook(_optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
        callback()

    adam.register_step_pre_hook(hook)


def after_step(adam: torch.optim.Optimizer, callback: Callable[[], object]) -> None:
    """Call `callback` after each step of a torch optimizer."""

    def hook(_optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
        callback()

    adam.register_step_post_hook(hook)


def skip_if_not_finite(adam: torch.optim.Optimizer, norm: Tensor) -> None:
    """Have the next step of a fused torch Adam change nothing, its counters included, if `norm` is not finite.

    The kernels look at the device's own flag: the host does not wait. DeepSpeed's ZeRO 1 to 3 leave the step out by
    themselves.
    """
    assert all(group["fused"] for group in adam.param_groups), "only the fused kernels read the flag"
    adam.found_inf = (~torch.isfinite(norm)).float()  # type: ignore[attr-defined]


class Bounds:
    """Masters that must stay within [-bound, bound]: each rank's own part of them, so that no rank needs the whole of
    a parameter, and no ZeRO stage differs from another.

    fragments: what this rank owns. bounds: by parameter.
    """

    def __init__(self, fragments: Iterable[Fragment], bounds: Mapping[str, float]) -> None:
        self._bounded: list[tuple[Tensor, float]] = [
            (one.tensors["master"], bounds[one.name]) for one in fragments if one.name in bounds
        ]

    @torch.no_grad()
    def keep(self) -> None:
        """Set what went beyond its bound back to it."""
        if self._bounded:
            masters, bounds = zip(*self._bounded, strict=True)
            torch._foreach_clamp_max_(masters, bounds)
            torch._foreach_clamp_min_(masters, [-bound for bound in bounds])
