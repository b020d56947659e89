"""A run that is hurt from outside while it trains: its terminal, its data workers, its ranks."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from pretrain.exit_codes import EXIT_DONE, EXIT_NODE_FAULT, EXIT_RESUME, EXIT_USER_ERROR
from tests.e2e.training import command, environment, losses, run_forked, wait_for_step, write_config

LONG = ["run.steps=1000000", "optim.schedule=constant", "checkpoint.save_every_steps=null"]
as_root = pytest.mark.skipif(
    os.geteuid() != 0, reason="mounts a small /dev/shm of its own, which only root may"
)


@contextlib.contextmanager
def started(
    config: Path, *overrides: str, step: int | None = 4, **how: Any
) -> Iterator[subprocess.Popen[str]]:
    """A run that has come to `step`; it is gone afterwards."""
    process = subprocess.Popen(command(config, *overrides), env=environment(), text=True, **how)
    try:
        if step is not None:
            wait_for_step(process, step, config.parent / "runs" / "tiny" / "logs" / "metrics.jsonl")
        yield process
    finally:
        for child in children(process):
            child.kill()
        process.kill()
        process.wait(timeout=30)


def children(process: subprocess.Popen[str]) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(process.pid).children(recursive=True)
    return []


def last_line(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "runs" / "tiny" / "ledger.jsonl").read_text().splitlines()[-1]))


# ---------------------------------------------------------------------------------------------------- terminals


def test_a_reader_that_ends_takes_only_the_output_away(tmp_path: Path, corpus: Path) -> None:
    config = write_config(tmp_path, corpus)
    with started(config, step=None, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline()
        process.stdout.close()
        assert process.wait(timeout=60) == EXIT_DONE
        errors = process.stderr.read()
    assert "standard output is gone (Broken pipe); the run goes on" in errors
    assert "Traceback" not in errors and "BrokenPipe" not in errors
    assert last_line(tmp_path)["reason"] == "finished" and sorted(losses(tmp_path / "runs" / "tiny")) == list(
        range(1, 13)
    )


def test_so_does_one_that_had_the_errors_too(tmp_path: Path, corpus: Path) -> None:
    config = write_config(tmp_path, corpus)
    with started(config, step=None, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        process.stdout.close()
        assert process.wait(timeout=60) == EXIT_DONE


def test_a_terminal_that_is_closed_has_the_run_save_and_end(tmp_path: Path, corpus: Path) -> None:
    config = write_config(tmp_path, corpus)
    ours, theirs = pty.openpty()

    def own_terminal() -> None:
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    streams = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
    with started(config, *LONG, step=None, preexec_fn=own_terminal, **streams) as process:
        os.close(theirs)
        shown = b""
        log = tmp_path / "runs" / "tiny" / "logs" / "metrics.jsonl"
        while not (log.exists() and '"step": 4,' in log.read_text()):
            shown += os.read(ours, 1 << 16)  # else the terminal's buffer fills, and the run waits
        os.close(ours)
        assert process.wait(timeout=60) == EXIT_RESUME
    end = last_line(tmp_path)
    assert b"training" in shown and end["reason"] == "SIGHUP" and end["step"] >= 4
    assert (tmp_path / "runs" / "tiny" / "checkpoints" / f"step_{end['step']:08d}" / "MANIFEST.json").exists()


def test_under_nohup_a_hang_up_is_ignored(tmp_path: Path, corpus: Path) -> None:
    config = write_config(tmp_path, corpus)

    def as_nohup() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    with started(config, *LONG, preexec_fn=as_nohup, stdout=subprocess.DEVNULL) as process:
        process.send_signal(signal.SIGHUP)
        wait_for_step(process, 12, tmp_path / "runs" / "tiny" / "logs" / "metrics.jsonl")
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == EXIT_RESUME
    assert last_line(tmp_path)["reason"] == "SIGTERM"


@pytest.mark.parametrize("arguments", [["data", "stats", "DATA"], ["--help"], ["checkpoint", "list", "RUN"]])
def test_other_commands_end_quietly_when_nobody_reads(
    arguments: list[str], tmp_path: Path, corpus: Path, once: Path
) -> None:
    known = {"DATA": str(corpus), "RUN": str(once)}
    whole = [sys.executable, "-m", "pretrain.cli", *(known.get(part, part) for part in arguments)]
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        whole, env=environment(), stdout=writing, stderr=subprocess.PIPE, text=True, timeout=60
    )
    os.close(writing)
    assert done.returncode == 1 and done.stderr == ""


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A finished run."""
    folder = tmp_path_factory.mktemp("once")
    assert run_forked("train", str(write_config(folder, corpus))).code == EXIT_DONE
    return folder / "runs" / "tiny"


# ------------------------------------------------------------------------------------------------- data workers


@as_root
@pytest.mark.parametrize(
    ("size", "expected"),
    [("4m", "could not hand over a batch"), ("4k", "could not be started")],
)
def test_a_full_shared_memory_is_told_with_the_way_out(
    size: str, expected: str, tmp_path: Path, corpus: Path
) -> None:
    config = write_config(tmp_path, corpus)
    # Batches of 1 MB, of which more than four want to be ready.
    large = [
        "data.global_batch_rows=512",
        "data.micro_batch_rows=1",
        "data.sequence_length=256",
        "data.workers=2",
    ]
    mount = f'mount -t tmpfs -o size={size} small /dev/shm && exec "$@"'
    inside = ["unshare", "--mount", "sh", "-c", mount, "sh", *command(config, "--quiet", *large)]
    done = subprocess.run(inside, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == EXIT_USER_ERROR, done
    assert expected in done.stderr and "No space left on device" in done.stderr
    assert "--shm-size" in done.stderr and "data.workers=0" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_worker_that_is_killed_is_told(tmp_path: Path, corpus: Path) -> None:
    config = write_config(tmp_path, corpus)
    with started(
        config, *LONG, "data.workers=1", stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
    ) as process:
        the_worker(process).kill()
        assert process.stderr is not None
        assert process.wait(timeout=60) == EXIT_USER_ERROR
        errors = process.stderr.read()
    assert "the data workers are lost" in errors and "data.workers=0" in errors and "Traceback" not in errors


def test_sigterm_is_heard_while_no_batch_comes(tmp_path: Path, corpus: Path) -> None:
    config = write_config(tmp_path, corpus)
    with started(config, *LONG, "data.workers=1", stdout=subprocess.DEVNULL) as process:
        the_worker(process).suspend()
        time.sleep(1)  # until the batches that were ready are used up
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == EXIT_RESUME
    end = last_line(tmp_path)
    assert end["reason"] == "SIGTERM"
    assert (tmp_path / "runs" / "tiny" / "checkpoints" / f"step_{end['step']:08d}" / "MANIFEST.json").exists()


def the_worker(process: subprocess.Popen[str]) -> psutil.Process:
    """Beside it there may be the tracker of what processes share."""
    return next(child for child in children(process) if "spawn_main" in " ".join(child.cmdline()))


# --------------------------------------------------------------------------------------------------------- ranks


def test_the_watchdog_ends_a_hung_rank_under_torchrun(tmp_path: Path, corpus: Path) -> None:
    config = write_config(tmp_path, corpus)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0"]
    launcher += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    whole = [*launcher, "-m", "pretrain.cli", *command(config)[3:], *LONG, "monitor.watchdog_seconds=4"]
    log = tmp_path / "runs" / "tiny" / "logs" / "metrics.jsonl"
    process = subprocess.Popen(
        whole, env=environment(), text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    try:
        wait_for_step(process, 4, log)
        ranks = {c.environ()["RANK"]: c for c in children(process) if "RANK" in c.environ()}
        ranks["1"].suspend()
        process.wait(timeout=90)
        assert process.stderr is not None
        errors = process.stderr.read()
    finally:
        for child in children(process):
            child.kill()
        process.kill()
        process.wait(timeout=30)
    assert "the first silent rank is 1 on" in errors and f"exitcode  : {EXIT_NODE_FAULT}" in errors
    assert list((log.parent / "watchdog" / "stacks").glob("*.txt"))


# --------------------------------------------------------------------------------------------------------- saves


def test_a_start_without_manifests_is_refused_and_changes_nothing(
    once: Path, tmp_path: Path, corpus: Path
) -> None:
    config = write_config(tmp_path, corpus)
    subprocess.run(["cp", "-a", str(once.parent), str(tmp_path)], check=True)
    run = tmp_path / "runs" / "tiny"
    for manifest in run.glob("checkpoints/*/MANIFEST.json"):
        manifest.unlink()
    before = sorted((p, p.read_bytes()) for p in run.rglob("*") if p.is_file() and "run." not in p.name)
    done = run_forked("train", str(config), "run.steps=20")
    assert done.code == EXIT_USER_ERROR and "step_00000012: MANIFEST.json is gone" in done.errors
    assert "Put the files back" in done.errors
    assert before == sorted(
        (p, p.read_bytes()) for p in run.rglob("*") if p.is_file() and "run." not in p.name
    )


def test_steps_that_somebody_took_away_are_missed(once: Path, tmp_path: Path, corpus: Path) -> None:
    config = write_config(tmp_path, corpus)
    subprocess.run(["cp", "-a", str(once.parent), str(tmp_path)], check=True)
    run = tmp_path / "runs" / "tiny"
    before = (run / "logs" / "metrics.jsonl").read_bytes()
    (run / "checkpoints").rename(tmp_path / "elsewhere")
    done = run_forked("train", str(config))
    assert done.code == EXIT_DONE, done.errors
    assert "step 12 was saved by the ledger" in done.errors and "the run begins anew" in done.errors
    assert (run / "logs" / "metrics.aside-1.jsonl").read_bytes() == before
    assert losses(run) == losses(once)
