"""The plan's arithmetic."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pretrain.config import ParallelSection, load_config
from pretrain.errors import ConfigError
from pretrain.plan.estimate import make_plan
from pretrain.plan.memory import state_memory
from pretrain.plan.parameters import count_parameters, resolved


@pytest.mark.parametrize("family", ["sigmoid", "softmax"])
@pytest.mark.parametrize(
    ("size", "expected"), [("85m", 0.1101e9), ("1b", 1.3004e9), ("3b", 3.045e9), ("7b", 6.6108e9)]
)
def test_parameters_of_the_shipped_sizes(family: str, size: str, expected: float) -> None:
    counts = count_parameters(resolved(load_config(f"configs/{family}/{size}.yaml")))
    assert sum(counts.values()) == pytest.approx(expected, rel=5e-4)


def test_the_7b_plan_in_figures() -> None:
    stated = [f"parallel.{key}={value}" for key, value in ParallelSection() if key != "auto"]
    config = load_config("configs/sigmoid/7b.yaml", [*stated, "parallel.zero=3", "data.micro_batch_rows=1"])
    plan = make_plan(config, gpus=256, gpu="h100", mfu=0.4)
    assert plan.tokens == 250_000 * 1024 * 4096
    assert (plan.layout.micro_batch_rows, plan.layout.accumulation) == (1, 4)
    rates = {group.type: group.lr for group in plan.groups}
    assert rates["matrix"] == pytest.approx(0.01 * 768 / 4096)
    assert plan.attention_bias == pytest.approx(-8.3178, abs=1e-4)
    assert plan.seconds == pytest.approx(plan.flops_per_token * plan.tokens / (989e12 * 0.4 * 256))
    assert plan.flops_per_token == pytest.approx(6 * sum(plan.parameters.values()), rel=0.15)


def test_activation_checkpointing_keeps_less() -> None:
    kept = [
        make_plan(
            load_config("configs/sigmoid/85m.yaml", [f"parallel.activation_checkpointing={mode}"]),
            gpus=8,
            gpu="h100",
            mfu=0.4,
        ).memory.activations
        for mode in ("none", "full")
    ]
    assert kept[1] < kept[0] / 5


def test_a_copy_per_node_needs_two_replicas_on_it() -> None:
    copied = ["parallel.zero=3", "parallel.zero_group=node", "launch.gpus_per_node=4"]
    config = load_config("configs/sigmoid/85m.yaml", [*copied, "parallel.tensor=4"])
    with pytest.raises(ConfigError, match="each node holds one replica"):
        make_plan(config, gpus=16, gpu="h100")
    within = replace(config, parallel=config.parallel.model_copy(update={"tensor": 2}))
    plain = replace(within, parallel=within.parallel.model_copy(update={"zero_group": "all"}))
    with_copy, without = (make_plan(one, gpus=16, gpu="h100").memory for one in (within, plain))
    assert with_copy.buffers > without.buffers


@pytest.mark.parametrize(
    ("zero", "bytes_per_parameter"), [(0, 4 + 4 + 8), (1, 4 + 4 + 3), (2, 4 + 1 + 3), (3, 1 + 1 + 3)]
)
def test_state_in_fp32_on_four_ranks(zero: int, bytes_per_parameter: int) -> None:
    config = load_config("configs/sigmoid/demo.yaml", [f"parallel.zero={zero}"])
    assert state_memory(1_000_000, config, replicas=4).state == bytes_per_parameter * 1_000_000


@pytest.mark.parametrize(("zero", "on_device"), [(1, 2 + 2), (2, 2), (3, 0.5)])
def test_offload_takes_the_optimizer_off_the_device(zero: int, on_device: float) -> None:
    overrides = [f"parallel.zero={zero}", "parallel.offload=optimizer", "precision.dtype=bf16"]
    memory = state_memory(1_000_000, load_config("configs/sigmoid/85m.yaml", overrides), replicas=4)
    assert memory.state == on_device * 1_000_000
    # Masters, two moments, the gradient share in fp32, and one bf16 copy.
    assert memory.host == (16 + 2) / 4 * 1_000_000


@pytest.mark.parametrize(
    ("overrides", "gpus", "gpu", "mfu", "expected"),
    [
        ([], 8, "b9000", 0.4, "choose one of h100, h200, a100"),
        ([], 8, "h100", 1.4, "--mfu 1.4"),
        ([], 7, "h100", 0.4, "data.global_batch_rows = 256: does not divide by 7"),
        ([], 7, "h100", 0.4, "the nearest layout that fits: parallel.pipeline=7"),
        (["model.vocabulary=null"], 8, "h100", 0.4, "model.vocabulary"),
    ],
)
def test_plans_that_cannot_be_made(
    overrides: list[str], gpus: int, gpu: str, mfu: float, expected: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        make_plan(load_config("configs/sigmoid/85m.yaml", overrides), gpus=gpus, gpu=gpu, mfu=mfu)
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    "overrides",
    [
        ["parallel.context=2", "parallel.recurrence=summaries"],
        ["model.cell=elman", "model.block=mixer", "model.mlp_width=0", "model.newton.method=newton"],
    ],
)
def test_recurrences_in_plain_torch_are_planned(overrides: list[str]) -> None:
    """Their passes look at values, which tensors without storage have not."""
    small = ["model.vocabulary=64", "model.layers=1", "data.sequence_length=16"]
    config = load_config("configs/pararnn/gru/demo.yaml", [*small, *overrides])
    layout = make_plan(config, gpus=2, gpu="h100").layout
    assert layout.memory.activations > 0 and layout.traffic
