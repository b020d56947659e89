"""A gradient that is not finite: one rule for ZeRO 0 to 3 and both engines."""

from __future__ import annotations

import ast
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import orjson
import pytest
import torch

from pretrain.assembly import open_run
from pretrain.config import load_config
from pretrain.engine.base import StepReport
from pretrain.errors import UserError
from pretrain.hooks.base import Hook
from pretrain.json_text import number_of, to_json
from pretrain.loop import train
from pretrain.run import Run
from tests.corpus import build_corpus
from tests.e2e.training import write_config
from tests.harness import run_ranks
from tests.pretrain.parallel.runs import import_megatron

BAD_STEP, BAD_ROW = 3, 20  # of rows 16 to 23
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "1 rank ZeRO 0": (1, ["parallel.zero=0"]),
    "1 rank ZeRO 1 bf16": (1, ["parallel.zero=1", "precision.dtype=bf16"]),
    **{f"2 ranks ZeRO {stage}": (2, [f"parallel.zero={stage}"]) for stage in range(4)},
    "2 ranks tensor": (2, ["parallel.zero=0", "parallel.tensor=2"]),
    "2 ranks ZeRO 1 offload": (2, ["parallel.zero=1", "parallel.offload=optimizer"]),
    "2 ranks Megatron ZeRO 0": (2, ["parallel.engine=megatron", "parallel.zero=0"]),
    "2 ranks Megatron ZeRO 1": (2, ["parallel.engine=megatron", "parallel.zero=1"]),
    "2 ranks pipeline": (2, ["parallel.pipeline=2", "parallel.zero=0", "data.micro_batch_rows=4"]),
}


@pytest.fixture(scope="module", autouse=True)
def megatron() -> None:
    import_megatron()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_corpus(tmp_path_factory.mktemp("corpus"), documents=30)


class Poisoned:
    """An objective whose loss is NaN for some rows, on the rank that has them."""

    def __init__(self, objective: Any, rows: set[int]) -> None:
        self._objective, self._rows = objective, rows

    def __getattr__(self, name: str) -> Any:
        return getattr(self._objective, name)

    def __call__(self, model: Any, batch: Any) -> Any:
        loss = self._objective(model, batch)
        if self._rows.isdisjoint(batch.rows.tolist()):
            return loss
        return replace(loss, total=loss.total * math.nan, loss=loss.loss * math.nan)


class Watch(Hook):
    """Keeps what the engine owns before the bad step, and compares after it."""

    name = "watch"

    def __init__(self) -> None:
        self.unchanged: bool | None = None
        self.counters: set[float] = set()

    def after_step(self, run: Run, report: StepReport) -> None:
        now = [
            tensor.clone()
            for fragment in run.engine.fragments()
            for tensor in (*fragment.tensors.values(), fragment.step)
        ]
        if run.clock.step == BAD_STEP - 1:
            self._before = now
        if run.clock.step == BAD_STEP:
            self.unchanged = all(map(torch.equal, self._before, now))
        self.counters = {float(fragment.step) for fragment in run.engine.fragments()}


@dataclass(frozen=True)
class Ended:
    error: str | None
    step: int
    unchanged: bool | None
    counters: set[float]


def train_poisoned(config: Path, overrides: list[str], rows: set[int]) -> Ended:
    watch = Watch()
    error = None
    with open_run(load_config(config, overrides), quiet=True) as run:
        run.objective = cast(Any, Poisoned(run.objective, rows))
        run.hooks.add(watch)
        try:
            train(run)
        except UserError as raised:
            error = str(raised)
        return Ended(error, run.clock.step, watch.unchanged, watch.counters)


def lines(path: Path) -> list[dict[str, Any]]:
    """Every line as strict JSON."""
    return [orjson.loads(line) for line in path.read_bytes().splitlines()]


SETTINGS = ["monitor.log_every_steps=5", "checkpoint.save_every_steps=null", "optim.clip_norm=0.5"]


@pytest.mark.parametrize(
    "layout", ["1 rank ZeRO 0", "2 ranks ZeRO 0", "2 ranks ZeRO 3", "2 ranks Megatron ZeRO 1"]
)
def test_the_first_one_stops_the_run_by_default(layout: str, tmp_path: Path, data: Path) -> None:
    ranks, overrides = LAYOUTS[layout]
    config, run = write_config(tmp_path, data), tmp_path / "runs" / "tiny"
    for ended in run_ranks(ranks, train_poisoned, config, [*SETTINGS, *overrides], {BAD_ROW}):
        assert ended.error is not None and "step 3 (rows 16 to 23): the gradient norm is" in ended.error
        assert ended.step == BAD_STEP + 1, "found when the next step had been queued, and no later"
    found = [line for line in lines(run / "ledger.jsonl") if line["event"] == "not_finite"]
    assert [(line["step"], line["rows"], line["action"]) for line in found] == [(3, [16, 23], "stop")]
    assert not list((run / "checkpoints").iterdir())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_skipped_step_changes_nothing_and_the_run_goes_on(layout: str, tmp_path: Path, data: Path) -> None:
    ranks, overrides = LAYOUTS[layout]
    config, run = write_config(tmp_path, data), tmp_path / "runs" / "tiny"
    settings = [*SETTINGS, "monitor.log_every_steps=1", "optim.skip_non_finite_steps=1", *overrides]
    for ended in run_ranks(ranks, train_poisoned, config, settings, {BAD_ROW}):
        assert ended.error is None and ended.step == 12
        assert ended.unchanged, "weights, moments and counters"
        assert ended.counters <= {11.0}
    found = [line for line in lines(run / "ledger.jsonl") if line["event"] == "not_finite"]
    assert [(line["step"], line["rows"], line["action"]) for line in found] == [(3, [16, 23], "skip")]
    logged = {line["step"]: line for line in lines(run / "logs" / "metrics.jsonl") if "loss/train" in line}
    assert logged[BAD_STEP]["loss/train"] is None
    assert all(line["loss/train"] > 0 for step, line in logged.items() if step != BAD_STEP)
    assert [line["optim/skipped_steps"] for line in logged.values()] == [0, 0, *[1] * 10]


def test_all_layouts_come_to_the_same_losses(tmp_path: Path, data: Path) -> None:
    def losses(name: str) -> list[float]:
        ranks, overrides = LAYOUTS[name]
        (tmp_path / name).mkdir()
        config = write_config(tmp_path / name, data)
        settings = ["optim.skip_non_finite_steps=1", "optim.epsilon=1e-6", *overrides]
        run_ranks(ranks, train_poisoned, config, settings, {BAD_ROW})
        found = lines(tmp_path / name / "runs" / "tiny" / "logs" / "metrics.jsonl")
        return [line["loss/train"] for line in found if line.get("loss/train") is not None]

    first = losses("1 rank ZeRO 0")
    assert len(first) == 11
    for name in ("2 ranks ZeRO 1", "2 ranks ZeRO 3", "2 ranks Megatron ZeRO 1"):
        assert losses(name) == pytest.approx(first, abs=1e-4)


def test_the_limit_holds_over_the_whole_run(tmp_path: Path, data: Path) -> None:
    config, run = write_config(tmp_path, data), tmp_path / "runs" / "tiny"
    settings = [*SETTINGS, "optim.skip_non_finite_steps=1", "checkpoint.save_every_steps=4"]
    rows = {BAD_ROW, 8 * 5 + 1}  # of steps 3 and 6
    first = run_ranks(1, train_poisoned, config, settings, rows)[0]
    assert first.error is not None and "step 6 (rows 40 to 47)" in first.error
    assert "the 2. such step" in first.error
    # Started again from step 4, it still knows of the first.
    again = run_ranks(1, train_poisoned, config, settings, rows)[0]
    assert again.error is not None and "the 2. such step" in again.error
    more = run_ranks(1, train_poisoned, config, [*settings, "optim.skip_non_finite_steps=2"], rows)[0]
    assert more.error is None and more.step == 12 and more.counters == {10.0}
    actions = [line["action"] for line in lines(run / "ledger.jsonl") if line["event"] == "not_finite"]
    assert actions == ["skip", "stop", "stop", "skip"]


def test_a_bad_last_step_is_not_saved(tmp_path: Path, data: Path) -> None:
    config = write_config(tmp_path, data)
    ended = run_ranks(1, train_poisoned, config, SETTINGS, {8 * 11})[0]
    assert ended.error is not None and "step 12 (rows 88 to 95)" in ended.error
    assert not list((tmp_path / "runs" / "tiny" / "checkpoints").iterdir())


def test_json_has_no_number_that_is_not_finite() -> None:
    value = {"a": math.nan, "b": [math.inf, (1.5, -math.inf)], "c": {"d": 1}, "e": "NaN"}
    assert orjson.loads(to_json(value)) == {"a": None, "b": [None, [1.5, None]], "c": {"d": 1}, "e": "NaN"}
    assert math.isnan(number_of(None)) and number_of(0.5) == 0.5


def test_no_json_is_written_in_another_way() -> None:
    """Of what is hashed the text never leaves the process; datasets and codecs refuse such numbers, and say so."""
    found = []
    for room in ("pretrain", "launch", "data_pipelines", "benchmarks"):
        for path in sorted(Path(room).rglob("*.py")):
            for function in ast.walk(ast.parse(path.read_text())):
                if not isinstance(function, ast.FunctionDef) or "sha256" in ast.unparse(function):
                    continue
                found += [
                    f"{path}:{call.lineno}"
                    for call in ast.walk(function)
                    if isinstance(call, ast.Call)
                    and ast.unparse(call.func) in ("json.dumps", "json.dump", "orjson.dumps")
                    and not any(keyword.arg == "allow_nan" for keyword in call.keywords)
                ]
    assert found == []


def test_the_summary_of_a_run_survives_a_loss_that_is_not_finite() -> None:
    from pretrain.hooks.evaluation import EvaluationHook

    hook = EvaluationHook(None, None)
    hook.load_state(json.loads(to_json({"first": {"step": 0, "nats_per_token": math.inf}, "last": None})))
    assert hook.first is not None and f"{hook.first['nats_per_token']:.1f}" == "nan"
