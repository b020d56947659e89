"""What the recurrent family is for, on the shipped configs: states that attention cannot track.

Each test trains the real command for as few steps as decide the question (definitions: data_pipelines/tasks).
"""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.state_tracking import STACKED_TASKS, STACKS, configured
from pretrain.config import config_from_dict
from pretrain.exit_codes import EXIT_DONE, EXIT_USER_ERROR
from tests.e2e.training import Ended, losses, metrics, run_forked

PARITY, ONE_HOP = "configs/tasks/parity.yaml", "configs/tasks/one_hop.yaml"


def train(config: str, folder: Path, *overrides: str) -> Ended:
    common = ("run.device=cpu", f"run.folder={folder}", "run.name=run", "monitor.tensorboard=false")
    return run_forked("train", config, *common, *overrides, timeout_s=280)


def last(folder: Path, name: str) -> float:
    return [float(record[name]) for record in metrics(folder / "run") if name in record][-1]


@pytest.mark.parametrize(("cell", "steps"), [("gru", 250), ("lstm", 400)])
def test_parity_at_the_trained_length_and_at_four_times_it(tmp_path: Path, cell: str, steps: int) -> None:
    ended = train(PARITY, tmp_path, f"model.cell={cell}", f"run.steps={steps}")
    assert ended.code == EXIT_DONE, ended
    assert last(tmp_path, "task/last_accuracy") == 1.0
    assert last(tmp_path, "task/longer_last_accuracy") == 1.0


def test_projected_newton_trains_as_the_loop_does(tmp_path: Path) -> None:
    """Up to the step where Parity is solved, and beyond the weights that plain Newton bears: three iterations, and
    more only where the residual asks for them."""
    curves = []
    for method in ("sequential", "newton"):
        folder = tmp_path / method
        ended = train(
            PARITY,
            folder,
            f"model.newton.method={method}",
            "run.steps=200",
            "monitor.evaluate_rows=64",
            "monitor.evaluate_length=null",
        )
        assert ended.code == EXIT_DONE, ended
        curves.append(losses(folder / "run"))
    assert curves[1] == pytest.approx(curves[0], abs=1e-3)
    assert curves[1][200] < 0.15


def test_parity_stays_at_chance_within_the_language_models_bound(tmp_path: Path) -> None:
    ended = train(PARITY, tmp_path, "model.recurrent_clip=0.5", "run.steps=250")
    assert ended.code == EXIT_DONE, ended
    assert abs(last(tmp_path, "task/last_accuracy") - 0.5) < 0.05


def test_plain_newton_trips_the_alarm_before_it_loses_the_run(tmp_path: Path) -> None:
    ended = train(
        PARITY,
        tmp_path,
        "model.newton.method=newton",
        "model.newton.project=false",
        "model.newton.on_exceed=error",
        "run.steps=250",
    )
    assert ended.code == EXIT_USER_ERROR
    assert "blocks.0.cell" in ended.errors and "residual" in ended.errors and "Traceback" not in ended.errors


def test_one_hop_within_the_language_models_bound(tmp_path: Path) -> None:
    ended = train(ONE_HOP, tmp_path, "run.steps=500")
    assert ended.code == EXIT_DONE, ended
    assert last(tmp_path, "task/token_accuracy") >= 0.999


@pytest.mark.parametrize("task", STACKED_TASKS)
def test_stacks_of_a_task_differ_in_their_mixers_alone(task: str) -> None:
    """Otherwise the comparison would be one of recipes."""
    found = [configured(task, stack, steps=None, device="cpu") for stack in STACKS]
    for values in found:
        assert config_from_dict(values, origin=task).model.layers == 3
        for key in ("mixers", "softmax", "pararnn_gru"):
            values["model"].pop(key, None)
    assert all(values == found[0] for values in found)
