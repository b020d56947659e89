"""ParaRNN and Mamba-2 runs: layouts, the bound, resuming, telemetry and its alarm, generation."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from models.pararnn.telemetry import FIGURES
from pretrain.assembly import open_run
from pretrain.config import load_config
from pretrain.engine.base import StepReport
from pretrain.errors import UserError
from pretrain.exit_codes import EXIT_DONE, EXIT_USER_ERROR
from pretrain.hooks.base import Hook
from pretrain.loop import train
from pretrain.run import Run
from tests.e2e.training import losses, metrics, run_forked, train_rank
from tests.harness import run_ranks

RECURRENT = """
run: {{name: tiny, folder: {folder}, steps: {steps}, device: cpu}}
model: {{{model}, layers: 2, width: 32, heads: 4}}
data: {{path: {data}, sequence_length: 32, global_batch_rows: 8}}
optim: {{lr: 5e-3, matrix_lr_multiplier: 1.0, warmup_steps: 2, weight_decay: 1e-4, clip_norm: 0.5}}
parallel: {{zero: 1}}
checkpoint: {{save_every_steps: null}}
monitor: {{log_every_steps: 1, evaluate_every_steps: null, evaluate_rows: 8, sample_tokens: 4, tensorboard: false}}
"""
MODELS = {
    "gru": "family: pararnn, cell: gru, mlp_width: 64",
    "lstm": "family: pararnn, cell: lstm, mlp_width: 64",
    "mamba2": "family: mamba2, state_width: 8, chunk: 8",
}
NEWTON = ["model.newton.method=newton", "model.newton.iterations=3"]
TOO_STRICT = [*NEWTON, "model.newton.limit=1e-12", "model.newton.max_iterations=4"]


def write(folder: Path, data: Path, model: str, steps: int = 6) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tiny.yaml"
    path.write_text(RECURRENT.format(folder=folder / "runs", data=data, model=MODELS[model], steps=steps))
    return path


def curve(
    folder: Path, data: Path, model: str, world: int, settings: list[str]
) -> tuple[dict[int, float], list[float]]:
    trained = run_ranks(world, train_rank, write(folder, data, model), settings)
    return losses(folder / "runs" / "tiny"), trained[0].gradient_norms


@pytest.fixture(scope="module")
def alone(
    tmp_path_factory: pytest.TempPathFactory, corpus: Path
) -> dict[str, tuple[dict[int, float], list[float]]]:
    """One process, ZeRO 0, the whole batch at once."""
    folder = tmp_path_factory.mktemp("alone")
    return {model: curve(folder / model, corpus, model, 1, ["parallel.zero=0"]) for model in MODELS}


@pytest.mark.parametrize(
    ("model", "world", "zero"),
    [
        ("gru", 1, 1),
        ("gru", 2, 0),
        ("gru", 2, 2),
        ("gru", 4, 3),
        ("lstm", 2, 1),
        ("lstm", 2, 3),
        ("mamba2", 2, 3),
    ],
)
def test_every_layout_trains_as_one_process(
    tmp_path: Path,
    corpus: Path,
    alone: dict[str, tuple[dict[int, float], list[float]]],
    model: str,
    world: int,
    zero: int,
) -> None:
    settings = [f"parallel.zero={zero}", "data.micro_batch_rows=2"]
    found, norms = curve(tmp_path, corpus, model, world, settings)
    assert found == pytest.approx(alone[model][0], abs=1e-5)
    assert norms == pytest.approx(alone[model][1], rel=1e-4)


def test_bf16_stays_near_fp32(
    tmp_path: Path, corpus: Path, alone: dict[str, tuple[dict[int, float], list[float]]]
) -> None:
    found, _ = curve(tmp_path, corpus, "lstm", 2, ["parallel.zero=2", "precision.dtype=bf16"])
    assert found == pytest.approx(alone["lstm"][0], abs=3e-2)


@pytest.mark.parametrize("option", ["parallel.activation_checkpointing=full", "model.newton.method=newton"])
def test_options_that_must_not_change_the_loss(
    tmp_path: Path, corpus: Path, alone: dict[str, tuple[dict[int, float], list[float]]], option: str
) -> None:
    found, _ = curve(tmp_path, corpus, "gru", 2, [option, "parallel.zero=3", "model.newton.iterations=5"])
    assert found == pytest.approx(alone["gru"][0], abs=1e-5)


BOUND = 0.1
AT_THE_BOUND = [f"model.recurrent_clip={BOUND}", "optim.lr=2e-2"]


@dataclass(frozen=True)
class Bounded:
    losses: dict[int, float]
    shares: list[float]
    norms: list[float]
    greatest: float
    """Of all bounded masters after the last step, as the optimizer holds them."""


def bounded_rank(
    config: Path, settings: list[str], first_part: list[str] | None
) -> tuple[list[float], float]:
    """Gradient norms, and the greatest bounded weight that this rank owns; `first_part`: of an earlier start."""
    norms = [] if first_part is None else train_rank(config, first_part, 3).gradient_norms

    class Watch(Hook):
        name = "watch"

        def after_step(self, run: Run, report: StepReport) -> None:
            norms.append(float(report.gradient_norm))

    with open_run(load_config(config, settings), quiet=True) as run:
        run.hooks.add(Watch())
        train(run)
        owned = [f for f in run.engine.fragments() if f.name.endswith((".recurrent", ".peephole"))]
        return norms, max((float(f.tensors["master"].abs().max()) for f in owned), default=0.0)


def train_at_the_bound(
    folder: Path, data: Path, world: int, settings: list[str], first_part: list[str] | None = None
) -> Bounded:
    settings = [*AT_THE_BOUND, *settings]
    if first_part is not None:
        first_part = [*AT_THE_BOUND, *first_part]
    ended = run_ranks(world, bounded_rank, write(folder, data, "lstm"), settings, first_part)
    run = folder / "runs" / "tiny"
    shares = [r["newton/clip_saturation"] for r in metrics(run) if "newton/acted" in r]
    return Bounded(losses(run), shares, ended[0][0], max(greatest for _, greatest in ended))


@pytest.fixture(scope="module")
def at_the_bound(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Bounded:
    """One process, ZeRO 0, the whole batch at once."""
    return train_at_the_bound(tmp_path_factory.mktemp("bound"), corpus, 1, ["parallel.zero=0"])


@pytest.mark.parametrize(("world", "zero", "micro"), [(1, 0, 2), (2, 0, 1), (2, 1, 2), (2, 2, 4), (4, 3, 1)])
def test_weights_at_the_bound_do_not_depend_on_the_layout(
    tmp_path: Path, corpus: Path, at_the_bound: Bounded, world: int, zero: int, micro: int
) -> None:
    settings = [f"parallel.zero={zero}", f"data.micro_batch_rows={micro}"]
    found = train_at_the_bound(tmp_path, corpus, world, settings)
    assert all(0.1 < share < 1 for share in at_the_bound.shares) and len(set(at_the_bound.shares)) > 1
    assert found.losses == pytest.approx(at_the_bound.losses, abs=1e-5)
    assert found.norms == pytest.approx(at_the_bound.norms, rel=1e-4)
    assert found.shares == pytest.approx(at_the_bound.shares, abs=0.01)
    assert found.greatest == at_the_bound.greatest == pytest.approx(BOUND, abs=1e-8)


def test_weights_at_the_bound_resume_bit_for_bit(tmp_path: Path, corpus: Path, at_the_bound: Bounded) -> None:
    zero = ["parallel.zero=0"]
    assert train_at_the_bound(tmp_path, corpus, 1, zero, zero).losses == at_the_bound.losses


def test_a_resumed_run_may_change_the_bound(tmp_path: Path, corpus: Path) -> None:
    """As the alarm advises. A narrower one holds from the first step on, in every layout."""
    curves = []
    for world, zero, micro in ((1, 0, 8), (2, 2, 2)):
        common = [f"parallel.zero={zero}", f"data.micro_batch_rows={micro}", "optim.schedule=constant"]
        narrower = [*common, "model.recurrent_clip=0.05"]
        folder = tmp_path / str(world)
        curves.append(train_at_the_bound(folder, corpus, world, narrower, [*common, "run.steps=3"]))
    alone, split = curves
    assert alone.greatest == split.greatest == pytest.approx(0.05, abs=1e-8)
    assert len(alone.losses) == 6 and split.losses == pytest.approx(alone.losses, abs=1e-5)
    assert alone.shares[3] > alone.shares[2] + 0.1


def test_bf16_weights_at_the_bound(tmp_path: Path, corpus: Path, at_the_bound: Bounded) -> None:
    """0.1 rounds up in bf16: the model's weight at the bound counts as within it, and as saturated."""
    settings = ["parallel.zero=1", "precision.dtype=bf16"]
    whole = train_at_the_bound(tmp_path / "whole", corpus, 1, settings)
    split = train_at_the_bound(tmp_path / "split", corpus, 2, [*settings, "data.micro_batch_rows=2"])
    assert whole.losses == pytest.approx(at_the_bound.losses, abs=3e-2)
    assert split.losses == pytest.approx(whole.losses, abs=3e-2)
    assert whole.shares == pytest.approx(at_the_bound.shares, abs=0.1)
    assert whole.greatest == split.greatest == pytest.approx(BOUND, abs=1e-8)


@pytest.mark.parametrize("model", MODELS)
def test_a_resumed_run_repeats_the_losses_bit_for_bit(
    tmp_path: Path, corpus: Path, alone: dict[str, tuple[dict[int, float], list[float]]], model: str
) -> None:
    config = write(tmp_path, corpus, model)
    assert run_ranks(1, train_rank, config, ["parallel.zero=0"], 3)[0].last_step == 3
    # How the recurrence is solved may change between starts; what the model computes may not.
    settings = ["parallel.zero=0", *(["model.newton.limit=0.5"] if model != "mamba2" else [])]
    assert run_ranks(1, train_rank, config, settings)[0].first_step == 3
    assert losses(tmp_path / "runs" / "tiny") == alone[model][0]


@pytest.mark.parametrize(
    "options", [["parallel.zero=1"], ["parallel.zero=3", "parallel.activation_checkpointing=full"]]
)
def test_every_layers_figures_are_logged(tmp_path: Path, corpus: Path, options: list[str]) -> None:
    run_ranks(2, train_rank, write(tmp_path, corpus, "gru", 3), [*NEWTON, *options])
    logged = [record for record in metrics(tmp_path / "runs" / "tiny") if "newton/iterations" in record]
    assert [record["step"] for record in logged] == [1, 2, 3]
    for record in logged:
        names = [f"newton/{name}" for name in FIGURES]
        assert set(record) == {"step", *names, *(f"{name}/layer_{n:02d}" for name in names for n in range(2))}
        assert record["newton/iterations"] == 3 and record["newton/acted"] == 0
        assert 0 < record["newton/residual_mean"] < record["newton/residual_max"] < 1e-2
        assert record["newton/residual_max"] == max(
            record[f"newton/residual_max/layer_{n:02d}"] for n in range(2)
        )


@pytest.mark.parametrize("zero", [0, 1, 3])
def test_the_error_policy_stops_before_the_update(tmp_path: Path, corpus: Path, zero: int) -> None:
    """All ranks stop with the same words, and the weights are those the run began with."""
    settings = [*TOO_STRICT, "model.newton.on_exceed=error", f"parallel.zero={zero}"]
    results = run_ranks(2, refused_rank, write(tmp_path, corpus, "gru"), settings)
    for message, changed in results:
        assert "blocks.0.mixer.cell, step 1" in message and "on_exceed" in message and not changed
    assert results[0][0] == results[1][0]


def refused_rank(config: Path, settings: list[str]) -> tuple[str, bool]:
    """The error's words, and whether any weight changed."""

    class Watch(Hook):
        name = "watch"

        def before_training(self, run: Run) -> None:
            self.before = [f.tensors["master"].clone() for f in run.engine.fragments()]

    with pytest.raises(UserError) as caught, open_run(load_config(config, settings), quiet=True) as run:
        watch = Watch()
        run.hooks.add(watch)
        try:
            train(run)
        finally:
            after = [f.tensors["master"] for f in run.engine.fragments()]
            changed = any(not a.equal(b) for a, b in zip(watch.before, after, strict=True))
    return str(caught.value), changed


def test_a_command_that_the_alarm_stops_ends_with_a_users_error(tmp_path: Path, corpus: Path) -> None:
    config = write(tmp_path, corpus, "lstm")
    ended = run_forked("train", str(config), *TOO_STRICT, "model.newton.on_exceed=error")
    assert ended.code == EXIT_USER_ERROR, ended
    assert "blocks.0.mixer.cell" in ended.errors and "Traceback" not in ended.errors


@pytest.mark.parametrize("policy", ["iterate", "sequential"])
def test_a_policy_that_acts_says_so(tmp_path: Path, corpus: Path, policy: str) -> None:
    config = write(tmp_path, corpus, "gru", 2)
    ended = run_forked(
        "train", str(config), *TOO_STRICT, f"model.newton.on_exceed={policy}", "optim.warmup_steps=1"
    )
    assert ended.code == EXIT_DONE, ended
    ledger = [
        json.loads(line) for line in (tmp_path / "runs" / "tiny" / "ledger.jsonl").read_text().splitlines()
    ]
    alarms = [line for line in ledger if line["event"] == "newton"]
    assert [line["step"] for line in alarms] == [1, 2]
    assert alarms[0]["layers"] == ["blocks.0.mixer.cell", "blocks.1.mixer.cell"]
    assert alarms[0]["policy"] == policy
    logged = [r for r in metrics(tmp_path / "runs" / "tiny") if "newton/acted" in r]
    assert all(record["newton/acted"] == 1 for record in logged)
    assert all((record["newton/residual_max"] == 0) == (policy == "sequential") for record in logged)


@pytest.mark.parametrize("model", MODELS)
def test_generate_writes_all_prompts_together(tmp_path: Path, corpus: Path, model: str) -> None:
    run_ranks(1, train_rank, write(tmp_path, corpus, model), [])
    run = str(tmp_path / "runs" / "tiny")
    both = run_forked("generate", run, "-p", "def main", "-p", "x", "--tokens", "12", "--temperature", "0")
    single = [
        run_forked("generate", run, "-p", prompt, "--tokens", "12", "--temperature", "0").output
        for prompt in ("def main", "x")
    ]
    assert both.code == EXIT_DONE, both
    assert both.output == "".join(single) and both.output.startswith("def main")


def test_misspelt_solver_settings_are_told(tmp_path: Path, corpus: Path) -> None:
    config = write(tmp_path, corpus, "gru")
    ended = run_forked("train", str(config), "model.newton.iteration=3", "model.cell=gruu", "model.heads=5")
    assert ended.code == EXIT_USER_ERROR
    assert "model.newton.iteration: no such setting; did you mean model.newton.iterations?" in ended.errors
    ended = run_forked("train", str(config), "model.newton.iterations=0", "model.cell=gruu", "model.heads=5")
    for text in ("3 problems", "model.newton.iterations = 0", "model.cell = gruu", "model.heads = 5"):
        assert text in ended.errors, ended.errors
