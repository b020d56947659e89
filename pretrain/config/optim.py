"""The config's optim section."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from pretrain.config.section import Auto, Section


class ScalingSection(Section):
    """`optim.lr`, `betas`, `epsilon` and `weight_decay` are a base batch's and horizon's; the rule finds the run's."""

    rule: Literal["sde", "complete", "marin", "step_law"] = "sde"
    base_rows: int | None = Field(default=None, ge=1, le=16_777_216)
    """Global batch at which the settings were tuned. null: the run's own."""
    base_tokens: float | None = Field(default=None, gt=0, le=1e15)
    """Horizon of the runs they were tuned on. null: the run's own."""
    gamma: float = Field(default=0.44, ge=0, le=2)
    """sde only. Fit it again for another schedule."""
    critical_steps: int | None = Field(default=None, ge=1, le=1_000_000_000)
    """Below so many steps the batch is above the critical one, and the rule does not hold. null: not known."""


class MultiplierSection(Section):
    """Factors on the learning rate, by type of tensor."""

    embedding: float = Field(default=1.0, gt=0, le=1e6)
    matrix: float = Field(default=1.0, gt=0, le=1e6)
    vector: float = Field(default=1.0, gt=0, le=1e6)
    head: float = Field(default=1.0, gt=0, le=1e6)
    """Of an untied head."""


class OptimSection(Section):
    lr: float = Field(gt=0, le=10)
    """Peak learning rate of embeddings and norms; matrices get it times `matrix_lr_multiplier`."""
    matrix_lr_multiplier: Annotated[float, Field(gt=0, le=1e6)] | Auto = "auto"
    """auto: min(768 / width, 1)."""
    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: float = Field(default=1e-8, gt=0, le=1)
    weight_decay: float = Field(default=1e-4, ge=0, lt=1)
    """Share of a weight lost per step at the schedule's peak, whatever the learning rate."""
    warmup_steps: int = Field(default=0, ge=0, le=1_000_000_000)
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    final_lr_fraction: float = Field(default=0.1, ge=0, le=1)
    decay_steps: int | None = Field(default=None, ge=0, le=1_000_000_000)
    """wsd only: length of the final linear decay. null: a fifth of the run."""
    clip_norm: float | None = Field(default=1.0, gt=0, le=1e9)
    skip_non_finite_steps: int = Field(default=0, ge=0, le=1_000_000_000)
    """How many steps of the run whose gradient is not finite are passed over: their rows train nothing. 0: the first
    one stops the run."""
    scaling: ScalingSection | None = None
    """null: the settings above as they are. Else they are a base batch's and horizon's (`pretrain.optim.scaling`)."""
    multipliers: MultiplierSection = MultiplierSection()
    depth_multipliers: tuple[Annotated[float, Field(gt=0, le=1e6)], ...] = ()
    """Factors on the blocks' learning rates, spread evenly from the first block to the last."""

    def wsd_decay_steps(self, steps: int) -> int:
        """Length of wsd's final decay in a run of `steps`."""
        return steps // 5 if self.decay_steps is None else self.decay_steps

    def scaling_problems(self, *, tied_head: bool) -> list[tuple[str, str, Any]]:
        """(key, what is wrong and what would be right, value) of settings that would have no effect."""
        found: list[tuple[str, str, Any]] = []
        if self.multipliers.head != 1 and tied_head:
            message = (
                "the head is the embedding here; set optim.multipliers.embedding, or model.tied_head=false"
            )
            found.append(("multipliers.head", message, self.multipliers.head))
        rule = self.scaling
        if rule is None:
            return found
        if rule.rule == "step_law":
            unused = {key: getattr(rule, key) for key in ("base_rows", "base_tokens", "critical_steps")}
            message = "rule step_law does not use it; remove it"
            found += [
                (f"scaling.{key}", message, value) for key, value in unused.items() if value is not None
            ]
        elif rule.base_rows is None and rule.base_tokens is None:
            message = (
                f"rule {rule.rule} changes nothing without a base; set base_rows or base_tokens of the run whose "
                "settings these are, or optim.scaling=null"
            )
            found.append(("scaling", message, None))
        return found
