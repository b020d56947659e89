"""A run on a synthetic task: trained on several ranks, resumed, judged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pretrain.exit_codes import EXIT_DONE, EXIT_USER_ERROR
from tests.e2e.training import losses, metrics, run_forked, train_rank
from tests.harness import run_ranks

CONFIG = """
run: {{name: task, folder: {folder}, steps: 40, device: cpu}}
model: {{family: softmax, layers: 1, width: 32, heads: 2, positions: rope, vocabulary: null}}
data: {{task: {{name: keep_nth, n: 1, vocabulary: 6}}, sequence_length: 12, global_batch_rows: 16}}
optim: {{lr: 1e-2, matrix_lr_multiplier: 1.0, warmup_steps: 5}}
parallel: {{zero: 1}}
checkpoint: {{save_every_steps: 20}}
monitor: {{log_every_steps: 1, evaluate_rows: 50, evaluate_length: 20, tensorboard: false}}
"""


def write(folder: Path) -> Path:
    path = folder / "task.yaml"
    path.write_text(CONFIG.format(folder=folder / "runs"))
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("task")
    assert run_forked("train", str(write(folder))).code == EXIT_DONE
    return folder / "runs" / "task"


def test_it_learns_and_reports_accuracy(trained: Path) -> None:
    last = [record for record in metrics(trained) if "task/token_accuracy" in record][-1]
    assert last["step"] == 40 and last["task/token_accuracy"] > 0.7  # one in six by chance
    assert 0 < last["task/longer_token_accuracy"] <= 1
    assert not any("loss/validation_bits_per_byte" in record for record in metrics(trained))


def test_evaluate_agrees_with_what_training_logged(trained: Path) -> None:
    ended = run_forked("evaluate", str(trained), "--json")
    assert ended.code == EXIT_DONE, ended
    accuracy = json.loads(ended.output)["accuracy"]
    logged = [record for record in metrics(trained) if "task/token_accuracy" in record][-1]
    assert accuracy["12"]["token"] == logged["task/token_accuracy"]
    assert accuracy["20"]["sequence"] == logged["task/longer_sequence_accuracy"]
    table = run_forked("evaluate", str(trained), "--length", "7").output
    assert "keep_nth" in table and "50 rows" in table


def test_generate_and_another_task_are_refused(trained: Path, tmp_path: Path) -> None:
    generated = run_forked("generate", str(trained))
    assert generated.code == EXIT_USER_ERROR and "synthetic task keep_nth" in generated.errors
    again = write(tmp_path)
    other = run_forked("train", str(again), f"run.folder={trained.parent}", "data.task.n=2")
    assert other.code == EXIT_USER_ERROR and "the dataset, mixture, sequence length" in other.errors


def test_two_ranks_and_a_resume_train_the_same_rows(trained: Path, tmp_path: Path) -> None:
    config = write(tmp_path)
    run_ranks(2, train_rank, config, ["run.steps=20", "optim.schedule=constant", "parallel.zero=2"])
    run_ranks(1, train_rank, config, ["optim.schedule=constant"])
    alone = tmp_path / "alone"
    alone.mkdir()
    run_ranks(1, train_rank, write(alone), ["optim.schedule=constant"])
    ours, whole = losses(tmp_path / "runs" / "task"), losses(alone / "runs" / "task")
    assert list(ours) == list(range(1, 41))
    assert ours == pytest.approx(whole, abs=1e-5)
