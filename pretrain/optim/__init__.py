"""AdamW by parameter type, schedules, and the rules that carry tuned settings to other sizes."""

from pretrain.optim.adamw import (
    REFERENCE_WIDTH,
    UncompiledAdamW,
    build_optimizer,
    matrix_lr_multiplier,
    parameter_groups,
    parameter_type,
    schedule_factor,
    set_learning_rate,
)

__all__ = [
    "REFERENCE_WIDTH",
    "UncompiledAdamW",
    "build_optimizer",
    "matrix_lr_multiplier",
    "parameter_groups",
    "parameter_type",
    "schedule_factor",
    "set_learning_rate",
]
