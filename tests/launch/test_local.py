"""`triptych launch --local`: a launched run without Slurm, and what becomes of it when its terminal goes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pretrain.exit_codes import EXIT_DONE, EXIT_RESUME
from tests.corpus import build_corpus
from tests.e2e.training import environment, metrics, write_config

pytestmark = pytest.mark.timeout(300)


def launched(tmp_path: Path, steps: int) -> tuple[list[str], Path]:
    """The command, and the run's ledger."""
    config = write_config(tmp_path, build_corpus(tmp_path, documents=4))
    command = [sys.executable, "-m", "launch.cli", "launch", str(config), "--local", "--gpus-per-node", "0"]
    command += ["--tasks-per-node", "1", f"run.steps={steps}", "parallel.zero=0"]
    return command, tmp_path / "runs" / "tiny" / "ledger.jsonl"


def events(ledger: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in ledger.read_text().splitlines()] if ledger.exists() else []


def test_nobody_reads_what_it_says(tmp_path: Path) -> None:
    """Beside it: a hook from outside, on a relative PYTHONPATH, is found in the job's own folder."""
    command, ledger = launched(tmp_path, steps=12)
    command.append('monitor.hooks={"gradient_spikes:Spikes": {every: 1}}')
    outside = {"PYTHONPATH": "examples/gradient_spikes", "TRIPTYCH_MODULES": "gradient_spikes"}
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment() | outside,
        start_new_session=True,
    )
    assert process.stdout is not None
    process.stdout.close()
    assert process.wait(timeout=200) == EXIT_DONE
    assert events(ledger)[-1]["event"] == "attempt_end" and events(ledger)[-1]["ending"] == "done"
    assert any("spikes/worst" in record for record in metrics(ledger.parent))


def test_sighup_saves_and_is_judged(tmp_path: Path) -> None:
    command, ledger = launched(tmp_path, steps=100_000)
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment(),
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 150
        while not any(line["event"] == "save" for line in events(ledger)):
            assert process.poll() is None and time.monotonic() < deadline, events(ledger)
            time.sleep(0.1)
        process.send_signal(signal.SIGHUP)
        assert process.wait(timeout=100) == EXIT_RESUME
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(timeout=30)
        shutil.rmtree(tmp_path / "runs" / "tiny" / "checkpoints", ignore_errors=True)
    assert events(ledger)[-1]["event"] == "attempt_end" and events(ledger)[-1]["ending"] == "resume"
