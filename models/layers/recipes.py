"""How a model's matrices start, by the name that a config's `initialisation` gives it."""

from __future__ import annotations

from collections.abc import Callable

from models.declared import Matrix
from models.initialise import Normal, Rule, Uniform


def recipe(initialisation: str, branches: int) -> Callable[[Matrix], Rule]:
    """The rule of each matrix of a model with so many branches off the residual stream.

    fan_in: N(0, 1 / fan_in). torch: as `nn.Linear` and `nn.Embedding`, U(+-1 / sqrt(fan_in)) and N(0, 1).
    small: N(0, 0.02^2), projections back to the stream / sqrt(branches).
    dclm: N(0, 1 / fan_in) within three deviations, projections back / sqrt(2 layer), layer 1 being the first.
        Source: open_lm, which DCLM trains with: `reset_parameters` of its attention, block and model.
    """

    def rule(matrix: Matrix) -> Rule:
        fan_in = matrix.fan_in
        if initialisation == "torch":
            return Normal(1.0) if matrix.group == "embedding" else Uniform(fan_in**-0.5)
        if initialisation == "fan_in":
            return Normal(fan_in**-0.5)
        if initialisation == "dclm":
            returns = matrix.returns and matrix.layer is not None
            layer = 0 if matrix.layer is None else matrix.layer
            deviation = (fan_in * 2 * (layer + 1)) ** -0.5 if returns else fan_in**-0.5
            return Normal(deviation, limit=3 * deviation)
        assert initialisation == "small", initialisation
        return Normal(0.02 / branches**0.5 if matrix.returns else 0.02)

    return rule
