"""Rules that carry an optimizer's settings from where they were tuned to another batch size and horizon.

B is the batch in rows, D the horizon in tokens, L a row's length; base values have the index 0.

sde       kappa = (D0 / D)^gamma B / B0. lr sqrt(kappa), betas^kappa, epsilon / sqrt(kappa), and per step kappa times
          the weight decay. gamma is a fit (0.44 with a cosine schedule), and belongs to the schedule, the data and the
          model.
          Source: the SDE reparameterisation of "The Design Space of Tri-Modal Masked Diffusion Models"
          (arXiv:2602.21472), after Malladi et al. (arXiv:2205.10287).
complete  the same with gamma = 1: equal time of the SDE at every horizon. Source: Complete(d)P, arXiv:2512.22382.
marin     lr sqrt(B / B0) (D0 / D)^0.3, epsilon sqrt((B0 / D0) / (B / D)), beta2^(B / B0) within 0.9 and 0.9999; beta1
          and the weight decay stay. Source: Marin's `completed_adamh`.
step_law  lr = 1.79 N^-0.713 D^0.307, N without embeddings; optim.lr is not looked at. Its batch is 0.58 D^0.571 tokens.
          Source: "Predictable Scale: Part I" (arXiv:2503.04715), fitted on autoregressive models.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from models.layers.transfer import Transfer
from pretrain.optim.adamw import matrix_lr_multiplier

if TYPE_CHECKING:
    from torch import nn

    from pretrain.config import Config
    from pretrain.config.optim import OptimSection, ScalingSection

VALIDATED_BATCH = (1 / 8, 4.0)
"""Ratios to the base batch at which Complete(d)P was validated."""
VALIDATED_WIDTH, VALIDATED_DEPTH = 16, 32
"""Ratios to the base model: widths 128 to 2048, depths 4 to 128."""
STEP_LAW_BATCH_SLACK = 2.0
LOWEST_USUAL_BETA = 0.5


@dataclass(frozen=True)
class Shape:
    """What a run trains on."""

    rows: int
    sequence_length: int
    steps: int
    parameters: int
    """Without embeddings and head."""

    @property
    def tokens(self) -> int:
        return self.rows * self.sequence_length * self.steps


def resolve(config: Config, model: nn.Module) -> Scaled:
    """The settings that a run uses, and all that there is to say about them. The model may be on meta."""
    scaled = scale(config.optim, run_shape(config, model))
    transfer, width = getattr(config.model, "transfer", None), config.model.width
    found = [*scaled.warnings, *transfer_warnings(transfer, width, config.model.layers)]
    if config.optim.scaling is not None and config.optim.scaling.rule == "step_law":
        found += step_law_conflicts(config.optim, transfer, width)
    return replace(scaled, warnings=tuple(found))


def run_shape(config: Config, model: nn.Module) -> Shape:
    """Of a run, whose model may be on meta."""
    counted = [p.numel() for n, p in model.named_parameters() if not n.startswith(("embedding.", "head."))]
    data = config.data
    return Shape(data.global_batch_rows, data.sequence_length, config.run.steps, sum(counted))


@dataclass(frozen=True)
class Scaled:
    """The settings of a run, resolved."""

    optim: OptimSection
    kappa: float | None
    """The factor that the rule of the SDE derives all others from."""
    warnings: tuple[str, ...]
    """Where a rule is used outside of the range in which it was found."""


def scale(optim: OptimSection, shape: Shape) -> Scaled:
    """The settings that `optim.scaling` gives a run of this shape; without a rule those that are there."""
    if optim.scaling is None:
        return Scaled(optim, None, ())
    rule = optim.scaling
    batch = shape.rows / (rule.base_rows or shape.rows)
    horizon = shape.tokens / (rule.base_tokens or shape.tokens)
    kappa = None
    if rule.rule == "step_law":
        optim = optim.model_copy(update={"lr": step_law_lr(shape.parameters, shape.tokens)})
    elif rule.rule == "marin":
        optim = _marin(optim, batch, horizon)
    else:
        kappa = batch * horizon ** -(rule.gamma if rule.rule == "sde" else 1.0)
        optim = sde(optim, kappa)
    return Scaled(optim, kappa, tuple(_warnings(rule, optim, shape, batch)))


def sde(optim: OptimSection, kappa: float) -> OptimSection:
    """The same stochastic differential equation of Adam at kappa times the noise scale's batch.

    The rule for a decay that is multiplied by the learning rate is sqrt(kappa); ours is a share per step at the peak,
    so both factors meet in it.
    """
    first, second = optim.betas
    return optim.model_copy(
        update={
            "lr": optim.lr * math.sqrt(kappa),
            "betas": (first**kappa, second**kappa),
            "epsilon": optim.epsilon / math.sqrt(kappa),
            "weight_decay": optim.weight_decay * kappa,
        }
    )


def _marin(optim: OptimSection, batch: float, horizon: float) -> OptimSection:
    first, second = optim.betas
    return optim.model_copy(
        update={
            "lr": optim.lr * math.sqrt(batch) * horizon**-0.3,
            "betas": (first, min(max(second**batch, 0.9), 0.9999)),
            "epsilon": optim.epsilon * math.sqrt(horizon / batch),
        }
    )


def step_law_lr(parameters: int, tokens: float) -> float:
    """Peak learning rate; parameters without embeddings."""
    return float(1.79 * parameters**-0.713 * tokens**0.307)


def step_law_batch_tokens(tokens: float) -> float:
    """Tokens per step."""
    return float(0.58 * tokens**0.571)


def critical_rows(shape: Shape, critical_steps: int) -> int:
    """B_crit = D / (L S_crit): the largest batch that leaves so many steps."""
    return max(1, shape.tokens // (shape.sequence_length * critical_steps))


def _warnings(rule: ScalingSection, optim: OptimSection, shape: Shape, batch: float) -> Iterator[str]:
    if rule.rule == "step_law":
        wanted = step_law_batch_tokens(shape.tokens)
        got = shape.rows * shape.sequence_length
        if not 1 / STEP_LAW_BATCH_SLACK <= got / wanted <= STEP_LAW_BATCH_SLACK:
            yield (
                f"step_law's rate belongs to a batch of {wanted:,.0f} tokens; this run has {got:,}: set "
                f"data.global_batch_rows near {max(1, round(wanted / shape.sequence_length))}"
            )
        return
    low, high = VALIDATED_BATCH
    if not low <= batch <= high:
        yield f"the batch is {batch:.3g} times the base's; the rule was validated from {low:.3g} to {high:.0f} times"
    if rule.critical_steps is not None and shape.steps < rule.critical_steps:
        yield (
            f"{shape.steps:,} steps are fewer than optim.scaling.critical_steps = {rule.critical_steps:,}: the batch "
            f"is above the critical one, {critical_rows(shape, rule.critical_steps)} rows, and the loss will be worse"
        )
    if rule.rule == "sde" and optim.schedule != "cosine" and rule.base_tokens is not None:
        yield f"gamma was fitted with a cosine schedule, and this is {optim.schedule}: fit it again"
    if rule.rule != "marin" and min(optim.betas) < LOWEST_USUAL_BETA:
        yield f"betas {optim.betas[0]:.3g}, {optim.betas[1]:.3g} are far from usual: use a smaller batch"


def transfer_warnings(transfer: Transfer | None, width: int, layers: int) -> list[str]:
    """Where a model is further from its base than the parametrisation was validated."""
    if transfer is None:
        return []
    found = []
    for name, ratio, limit in (
        ("width", width / transfer.width, VALIDATED_WIDTH),
        ("layers", layers / transfer.layers, VALIDATED_DEPTH),
    ):
        if not 1 <= ratio <= limit:
            found.append(
                f"model.{name} is {ratio:.3g} times model.transfer.{name}; this was validated from 1 to {limit} times"
            )
    return found


def step_law_conflicts(optim: OptimSection, transfer: Transfer | None, width: int) -> list[str]:
    """What else changes a learning rate that step_law gives for this size, and for all tensors alike."""
    if transfer is not None:
        return [
            "step_law's rate is of this model's size already, and model.transfer scales it again: leave one out"
        ]
    factor = matrix_lr_multiplier(optim, width)
    if factor == 1:
        return []
    return [
        f"step_law's rate is one for all tensors, and optim.matrix_lr_multiplier gives matrices {factor:.3g} of it: "
        "set 1"
    ]
