"""Run folders that were damaged: a start takes what is whole, or says what is not; it never deletes what was saved."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import torch

from data_pipelines.tokens.bytes_tokenizer import BytesTokenizer
from launch.progress import goodput, read_logs, read_progress
from pretrain.attempts import append_ledger
from pretrain.checkpoint import CheckpointStore
from pretrain.checkpoint.steps import list_steps, step_name
from pretrain.checkpoint.weights import load_weights
from pretrain.json_text import to_json
from pretrain.run_folder import RunFolder
from tests.fuzz.base import Finding, Fuzzer, chosen, mutated, refusals_name, require
from tests.pretrain.checkpoint.states import SHAPES, is_equal, make_state

STEPS = (2, 4)
ODD: tuple[Any, ...] = (None, True, -1, 1e400, float("nan"), "", "NaN", [], {}, [[]], 10**30, "9" * 30)


@cache
def _original() -> Path:
    """A run with two saved steps, for all cases of a process."""
    run = RunFolder(Path(tempfile.mkdtemp(prefix="fuzz-run-")) / "run")
    run.create()
    run.save_tokenizer(BytesTokenizer())
    run.config.write_text(
        "run: {name: run, steps: 9}\ncheckpoint: {save_every_steps: 2}\ndata: {task: null}\n"
    )
    store = _store(run)
    run.record("start", step=0, world=1, attempt=1)
    for step in STEPS:
        store.save(step, make_state(step))
        store.wait()
        run.record("save", step=step)
    run.record("attempt", attempt=1)
    run.record("attempt_end", attempt=1, step=4, last_step=6, ending="crash")
    with run.metrics.open("w") as file:
        for step in range(1, 7):
            record = {"step": step, "loss/train": 3.0 / step, "speed/step_seconds": 0.5}
            file.write(to_json({**record, "speed/data_wait_share": 0.1}) + "\n")
    return run.path


def _store(run: RunFolder) -> CheckpointStore:
    return CheckpointStore(run.checkpoints, group=None, keep_last=2, asynchronous=False)


def _copied(folder: Path) -> RunFolder:
    shutil.copytree(_original(), folder / "run")
    return RunFolder(folder / "run")


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def step_folder(seed: int, folder: Path) -> None:
    """Files of saved steps are damaged, missing or exchanged."""
    random = np.random.default_rng(seed)
    run = _copied(folder)
    for _ in range(int(random.integers(1, 4))):
        step = run.checkpoints / step_name(chosen(random, STEPS))
        path = chosen(random, sorted(step.iterdir()) or [step])
        match int(random.integers(6)):
            case 0 if path.is_file():
                path.unlink()
            case 1 if path.is_file():
                path.with_suffix(".other").write_bytes(path.read_bytes())
            case 2 if path.is_file():
                path.unlink()
                path.mkdir()
            case _ if path.is_file():
                path.write_bytes(mutated(path.read_bytes(), random))
    _start(run)


def renamed(seed: int, folder: Path) -> None:
    """Step folders have other names, and there are others of all kinds beside them."""
    random = np.random.default_rng(seed)
    run = _copied(folder)
    for _ in range(int(random.integers(1, 4))):
        there = sorted(run.checkpoints.iterdir())
        step = chosen(random, there) if there else run.checkpoints / "x"
        name = chosen(
            random,
            [
                "step_00000006",
                "step_99999999999999999999",
                "step_1",
                "step_00000004.aside-1",
                "step_ö",
                "latest",
            ],
        )
        with contextlib.suppress(OSError):
            if random.random() < 0.6:
                step.rename(run.checkpoints / name)
            else:
                (run.checkpoints / name).mkdir()
    _start(run)


def _start(run: RunFolder) -> None:
    """What a start does with the steps, and what `checkpoint list`, `generate` and the first save do."""
    before = {path: _files(path) for path in run.checkpoints.iterdir() if path.is_dir()}
    list_steps(run.checkpoints, checksums=True)
    store = _store(run)
    with refusals_name(run.checkpoints):
        latest = store.latest()
    if latest is None:
        require(not list(run.checkpoints.glob("step_????????")), "a start begins anew beside a step's folder")
        return
    state = make_state(99)
    with refusals_name(latest):
        meta = store.load(latest, state)
        load_weights(latest, {name: torch.empty(shape) for name, shape in SHAPES.items()})
    step = int(meta["step"])
    require(is_equal(state, make_state(step)), f"step {step} was loaded with other values than were saved")
    store.save(6, make_state(6))
    kept = [_files(path) for path in run.checkpoints.iterdir() if path.is_dir()]
    for path, files in before.items():
        if files not in kept and not _is_retired(path, step):
            raise Finding(f"{path.name} was deleted by a start")


def _is_retired(path: Path, loaded: int) -> bool:
    """keep_last = 2: with the new step and the loaded one, an older whole one may go."""
    return path.name == step_name(STEPS[0]) and loaded > STEPS[0]


def _lines(path: Path, random: np.random.Generator) -> None:
    """Damage a file of JSON lines: its bytes, or its values."""
    if random.random() < 0.5:
        path.write_bytes(mutated(path.read_bytes(), random))
        return
    lines = path.read_text().splitlines()
    for _ in range(int(random.integers(1, 4))):
        number = int(random.integers(len(lines)))
        if random.random() < 0.3:
            lines[number] = json.dumps(chosen(random, ODD))
            continue
        try:
            content = json.loads(lines[number])
        except ValueError:
            continue
        if isinstance(content, dict) and content:
            key = chosen(random, list(content))
            if random.random() < 0.3:
                del content[key]
            else:
                content[key] = chosen(random, ODD)
            lines[number] = json.dumps(content)
    path.write_text("\n".join(lines) + "\n" * int(random.integers(2)))


def metrics(seed: int, folder: Path) -> None:
    random = np.random.default_rng(seed)
    run = _copied(folder)
    _lines(run.metrics, random)
    _look(run)
    run.cut_metrics(after_step=4)
    for line in run.metrics.read_bytes().splitlines():
        step = orjson.loads(line).get("step")  # strict
        require(not (type(step) is int and step > 4), f"{line!r} is of a step to come")
    _look(run)


def ledger(seed: int, folder: Path) -> None:
    random = np.random.default_rng(seed)
    run = _copied(folder)
    _lines(run.ledger, random)
    before = run.ledger.read_bytes()
    _look(run)
    run.saved_step()
    run.keep_lost_course()
    append_ledger(run.ledger, "start", {"step": 4})
    after = run.ledger.read_bytes()
    require(after.startswith(before), "what stood in the ledger was changed")
    require(orjson.loads(after.splitlines()[-1])["event"] == "start", "the new line is lost in an old one")
    _look(run)


def _look(run: RunFolder) -> None:
    """What `triptych status` reads."""
    read_progress(run.path)
    logs = read_logs(run.path)
    goodput(logs.ledger, logs.metrics, now=2e9)


def small_files(seed: int, folder: Path) -> None:
    """The run's other files: config, tokenizer entry, owner of the lock."""
    random = np.random.default_rng(seed)
    run = _copied(folder)
    owner = run.path / "run.owner.json"
    owner.write_text('{"pid": 1, "host": "node1", "since": "now", "attempt": 3}')
    path = chosen(random, [run.config, run.tokenizer / "entry.json", owner])
    path.write_bytes(mutated(path.read_bytes(), random))
    held = run.lock(attempt=None)
    with contextlib.closing(_Releases(held)), refusals_name(path.name):
        run.trains_a_task()
        require(isinstance(run.load_tokenizer(), BytesTokenizer), "another tokenizer was loaded")


class _Releases:
    def __init__(self, held: Any) -> None:
        self._held = held

    def close(self) -> None:
        self._held.lock.release()


FUZZERS = [
    Fuzzer("run-steps", step_folder),
    Fuzzer("run-step-names", renamed),
    Fuzzer("run-metrics", metrics),
    Fuzzer("run-ledger", ledger),
    Fuzzer("run-files", small_files),
]
