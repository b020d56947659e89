"""Stopping, dying and going on: the losses are those of a run that never stopped."""

from __future__ import annotations

import json
import random
import signal
import subprocess
from pathlib import Path

import pytest

from pretrain.exit_codes import EXIT_DONE, EXIT_RESUME
from tests.e2e.training import (
    Trained,
    command,
    environment,
    kill_at,
    losses,
    metrics,
    run_forked,
    train_rank,
    wait_for_step,
    write_config,
)
from tests.harness import run_ranks


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> dict[int, float]:
    """The losses of one process that trains to the end."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    done = run_forked("train", str(write_config(folder, corpus)))
    assert done.code == EXIT_DONE, done.errors
    return losses(folder / "runs" / "tiny")


def test_kill_9_twice_at_random_steps_and_resume_bit_identically(
    tmp_path: Path, corpus: Path, uninterrupted: dict[int, float]
) -> None:
    config, run = write_config(tmp_path, corpus), tmp_path / "runs" / "tiny"
    first = random.randint(4, 7)
    kill_at(config, first, run / "logs" / "metrics.jsonl")
    kill_at(config, random.randint(8, 11), run / "logs" / "metrics.jsonl")
    done = run_forked("train", str(config))
    assert done.code == EXIT_DONE, done.errors
    assert losses(run) == uninterrupted
    starts = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
    assert [line["event"] for line in starts if line["event"] in ("start", "end")] == [
        "start",
        "start",
        "start",
        "end",
    ]


def test_sigterm_saves_and_asks_to_be_started_again(tmp_path: Path, corpus: Path) -> None:
    settings = ["optim.schedule=constant", "checkpoint.save_every_steps=null", "monitor.log_every_steps=2"]
    (tmp_path / "stopped").mkdir()
    config, run = write_config(tmp_path / "stopped", corpus), tmp_path / "stopped" / "runs" / "tiny"
    process = subprocess.Popen(
        command(config, *settings, "run.steps=1000000"), env=environment(), stdout=subprocess.DEVNULL
    )
    try:
        wait_for_step(process, 4, run / "logs" / "metrics.jsonl")
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == EXIT_RESUME
    finally:
        process.kill()
        process.wait(timeout=30)
    ledger = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
    stopped = ledger[-1]["step"]
    assert (ledger[-1]["reason"], ledger[-1]["exit_code"]) == ("SIGTERM", EXIT_RESUME)
    assert [line["step"] for line in ledger if line["event"] == "save"] == [stopped]
    steps = f"run.steps={stopped + 5}"
    done = run_forked("train", str(config), *settings, steps)
    assert done.code == EXIT_DONE, done.errors
    (tmp_path / "whole").mkdir()
    whole = write_config(tmp_path / "whole", corpus)
    assert run_forked("train", str(whole), *settings, steps).code == EXIT_DONE
    # Also where the stop fell between two logs: the sums since the last log are part of the checkpoint.
    assert losses(run) == losses(tmp_path / "whole" / "runs" / "tiny")


def test_processes_2_4_1_and_zero_1_3_2_train_the_same_rows_to_the_same_losses(
    tmp_path: Path, corpus: Path, uninterrupted: dict[int, float]
) -> None:
    config, run = write_config(tmp_path, corpus), tmp_path / "runs" / "tiny"
    parts: list[list[Trained]] = [
        run_ranks(2, train_rank, config, ["parallel.zero=1"], 4),
        run_ranks(4, train_rank, config, ["parallel.zero=3"], 8),
        run_ranks(1, train_rank, config, ["parallel.zero=2"]),
    ]
    # The ranks read a stop request one boundary after it was made, so that no step waits for the network.
    assert [part[0].last_step for part in parts] == [5, 9, 12]
    assert [part[0].first_step for part in parts] == [0, 5, 9]
    rows = [
        sorted(row for rank in part for row in rank.rows[step])
        for part in parts
        for step in range(len(part[0].rows))
    ]
    assert rows == [list(range(8 * step, 8 * step + 8)) for step in range(12)]
    assert losses(run) == pytest.approx(uninterrupted, abs=1e-5)


def test_a_finished_run_started_again_changes_nothing(tmp_path: Path, corpus: Path) -> None:
    config, run = write_config(tmp_path, corpus), tmp_path / "runs" / "tiny"
    run_ranks(1, train_rank, config, [])
    before, saved = losses(run), sorted((run / "checkpoints").iterdir())
    again = run_ranks(1, train_rank, config, [])[0]
    assert again.rows == [] and again.done
    assert losses(run) == before and sorted((run / "checkpoints").iterdir()) == saved


def test_more_steps_go_on_from_the_end(tmp_path: Path, corpus: Path) -> None:
    config, run = write_config(tmp_path, corpus), tmp_path / "runs" / "tiny"
    run_ranks(1, train_rank, config, ["run.steps=4"])
    more = run_ranks(1, train_rank, config, ["run.steps=6"])[0]
    assert (more.first_step, more.last_step) == (4, 6)
    assert sorted(losses(run)) == [1, 2, 3, 4, 5, 6]


def test_the_first_validation_loss_survives_a_resume(tmp_path: Path, corpus: Path) -> None:
    config, run = write_config(tmp_path, corpus), tmp_path / "runs" / "tiny"
    run_ranks(1, train_rank, config, [], 3)
    run_ranks(1, train_rank, config, [])
    meta = json.loads((run / "checkpoints" / "step_00000012" / "meta.json").read_text())
    first, last = meta["hooks"]["evaluation"]["first"], meta["hooks"]["evaluation"]["last"]
    assert (first["step"], last["step"]) == (0, 12) and last["nats_per_token"] < first["nats_per_token"]
    assert [r["step"] for r in metrics(run) if "loss/validation" in r] == [0, 12]
