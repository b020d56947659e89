"""Everything a user can get wrong: a clear message, exit code 2, and nothing lost."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from data_pipelines.prepare.text import BuildOptions, build
from pretrain import cli
from pretrain.exit_codes import EXIT_DONE, EXIT_USER_ERROR
from tests.e2e.training import (
    Ended,
    command,
    environment,
    losses,
    run_forked,
    train_rank,
    wait_for_step,
    write_config,
)
from tests.harness import run_ranks

STEPS = 12


@dataclass
class Scene:
    """A run stopped at step 6 of 12, with steps 3 and 6 saved, and a dataset of its own."""

    folder: Path
    data: Path
    config: Path

    @property
    def run(self) -> Path:
        return self.folder / "runs" / "tiny"

    def step(self, number: int) -> Path:
        return self.run / "checkpoints" / f"step_{number:08d}"

    @property
    def shard(self) -> Path:
        return self.data / "train-000000.tar"

    def train(self, *overrides: str, before: Callable[[], object] | None = None) -> Ended:
        return run_forked("train", str(self.config), "--quiet", *overrides, before=before)


@pytest.fixture(scope="module")
def half_run(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    folder = tmp_path_factory.mktemp("half")
    shutil.copytree(corpus, folder / "data")
    run_ranks(1, train_rank, write_config(folder, folder / "data"), [], 6)
    return folder


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory, half_run: Path) -> dict[int, float]:
    """The losses of the same run when nothing goes wrong."""
    folder = tmp_path_factory.mktemp("whole")
    run_ranks(1, train_rank, write_config(folder, half_run / "data"), [])
    return losses(folder / "runs" / "tiny")


@pytest.fixture
def scene(tmp_path: Path, half_run: Path) -> Iterator[Scene]:
    shutil.copytree(half_run, tmp_path / "scene", dirs_exist_ok=True)
    folder = tmp_path / "scene"
    yield Scene(folder, folder / "data", write_config(folder, folder / "data"))


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a run but those that every start may touch."""
    passing = {"run.lock", "run.owner.json"}
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file() and p.name not in passing
    }


def flip_token_byte(scene: Scene) -> None:
    from data_pipelines.storage.index import read_index

    index = read_index(scene.shard.with_suffix(".idx"))
    content = bytearray(scene.shard.read_bytes())
    content[int(index.data_offset_N[0]) + 7] ^= 0x10
    scene.shard.write_bytes(bytes(content))


def zero_first_header(scene: Scene) -> None:
    content = bytearray(scene.shard.read_bytes())
    content[:512] = bytes(512)
    scene.shard.write_bytes(bytes(content))


def alter_checkpoint(scene: Scene) -> None:
    for step in (3, 6):
        file = scene.step(step) / "__0_0.distcp"
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(bytes(content))


def other_tokenizer(scene: Scene) -> None:
    texts = scene.folder / "other"
    texts.mkdir()
    for number in range(4):
        (texts / f"{number}.txt").write_text("the quick brown fox jumps over the lazy dog. " * 40)
    shutil.rmtree(scene.data)
    build(texts, scene.data, BuildOptions(tokenizer="bpe:300"))


CASES: dict[str, tuple[Callable[[Scene], object] | None, list[str], list[str]]] = {
    "misspelt key": (None, ["optim.lrr=1"], ["optim.lrr: no such setting; did you mean optim.lr?"]),
    "ill-typed key": (None, ["run.steps=soon"], ["run.steps = soon"]),
    "value out of range": (None, ["optim.clip_norm=-3"], ["optim.clip_norm = -3"]),
    "heads that do not divide": (None, ["model.kv_heads=3"], ["model.kv_heads = 3", "4 heads"]),
    "missing dataset": (lambda s: shutil.rmtree(s.data), [], ["data", "triptych data build"]),
    "missing shard": (lambda s: s.shard.unlink(), [], ["train-000000.tar"]),
    "empty shard": (lambda s: s.shard.write_bytes(b""), [], ["train-000000.tar"]),
    "truncated shard": (
        lambda s: s.shard.write_bytes(s.shard.read_bytes()[:-20_000]),
        [],
        ["train-000000.tar"],
    ),
    "flipped byte": (flip_token_byte, [], ["train-000000.tar", "member", "checksum is not the index's"]),
    "zeroed tar header": (zero_first_header, [], ["train-000000.tar"]),
    "index of another shard": (
        lambda s: shutil.copy(s.data / "validation-000000.idx", s.data / "train-000000.idx"),
        [],
        ["train-000000.idx"],
    ),
    "another tokenizer": (other_tokenizer, [], ["tokenizer", "data.path", "the checkpoint is untouched"]),
    "other rows": (None, ["run.seed=7"], ["seed", "cursor"]),
    "changed model": (
        None,
        ["model.layers=3", "model.qk_norm=false"],
        [
            "model.layers: 2 in the checkpoint, 3 in the config",
            "model.qk_norm: True in the checkpoint, False",
        ],
    ),
    "vocabulary too small": (None, ["model.vocabulary=100"], ["model.vocabulary = 100", "257"]),
    "batch that ranks cannot share": (
        None,
        ["parallel.data=3"],
        ["parallel.data = 3: 1 process leaves 1", "the nearest layout that fits"],
    ),
}


@pytest.mark.parametrize(("damage", "overrides", "expected"), CASES.values(), ids=CASES)
def test_bad_input_is_told_and_nothing_is_lost(
    scene: Scene, damage: Callable[[Scene], object] | None, overrides: list[str], expected: list[str]
) -> None:
    if damage is not None:
        damage(scene)
    before = contents(scene.run)
    ended = scene.train(*overrides)
    assert ended.code == EXIT_USER_ERROR, ended
    assert "Traceback" not in ended.errors
    for text in expected:
        assert text in ended.errors
    after = contents(scene.run)
    # A run that came as far as its first batch has noted its start; all that was there is still there.
    assert {name: after[name] for name in before if name != "ledger.jsonl"} == {
        name: content for name, content in before.items() if name != "ledger.jsonl"
    }


@pytest.mark.parametrize("damage", ["missing", "altered", "truncated", "no manifest"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    scene: Scene, whole_run: dict[int, float], damage: str
) -> None:
    file = scene.step(6) / ("MANIFEST.json" if damage == "no manifest" else "__0_0.distcp")
    if damage in ("missing", "no manifest"):
        file.unlink()
    else:
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(bytes(content[: len(content) // (2 if damage == "truncated" else 1)]))
    ended = scene.train()
    assert ended.code == EXIT_DONE, ended
    assert "step_00000006" in ended.errors and "passed over" in ended.errors
    start = [json.loads(line) for line in (scene.run / "ledger.jsonl").read_text().splitlines()][-1 - 4 :]
    assert {"event": "start", "step": 3}.items() <= next(
        line for line in start if line["event"] == "start"
    ).items()
    assert losses(scene.run) == whole_run


def test_asking_for_a_damaged_checkpoint_by_name_says_which_file(scene: Scene) -> None:
    alter_checkpoint(scene)
    ended = run_forked("generate", str(scene.run), "--step", "3", "--tokens", "4")
    assert ended.code == EXIT_USER_ERROR
    assert "step_00000003" in ended.errors and "__0_0.distcp" in ended.errors


def test_a_full_disk_ends_the_run_and_the_previous_step_stays_whole(
    scene: Scene, whole_run: dict[int, float]
) -> None:
    size = (scene.step(6) / "__0_0.distcp").stat().st_size

    def fill() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))

    ended = scene.train(before=fill)
    assert ended.code == EXIT_USER_ERROR, ended
    assert "could not be saved" in ended.errors and "step_00000006 is still whole" in ended.errors
    assert not scene.step(9).exists()
    with_room = scene.train()
    assert with_room.code == EXIT_DONE, with_room
    assert losses(scene.run) == whole_run


def test_a_full_disk_under_the_logs_is_told_in_one_line(scene: Scene) -> None:
    def fill() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (400, 400))  # of the error output too

    ended = scene.train(before=fill)
    assert ended.code == EXIT_USER_ERROR, ended
    assert "make room" in ended.errors and "Traceback" not in ended.errors


@pytest.mark.parametrize("zero", [0, 1])
def test_a_run_that_diverges_stops_and_keeps_its_last_good_step(scene: Scene, zero: int) -> None:
    diverging = ["optim.clip_norm=null", "optim.multipliers={matrix: 1e6, vector: 1e6, embedding: 1e6}"]
    ended = scene.train("optim.lr=10", *diverging, f"parallel.zero={zero}")
    assert ended.code == EXIT_USER_ERROR, ended
    assert "the gradient norm is" in ended.errors and "Lower optim.lr" in ended.errors
    assert scene.step(6).exists() and not scene.step(12).exists()
    crash = json.loads((scene.run / "ledger.jsonl").read_text().splitlines()[-1])
    assert crash["event"] == "crash" and "gradient norm" in crash["reason"]
    assert scene.train().code == EXIT_DONE


def test_a_second_run_in_the_same_folder_is_refused(scene: Scene) -> None:
    long = [*command(scene.config, "run.steps=100000"), "checkpoint.save_every_steps=null"]
    first = subprocess.Popen(long, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for_step(first, 8, scene.run / "logs" / "metrics.jsonl")
        ended = scene.train()
        assert ended.code == EXIT_USER_ERROR
        assert "another run is writing here" in ended.errors and f"process {first.pid} on" in ended.errors
        assert first.poll() is None, "the first run must not notice"
    finally:
        first.kill()
        first.wait(timeout=30)
    assert scene.train().code == EXIT_DONE  # the lock died with its owner


def test_an_error_of_one_rank_is_told_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(cli, "RANK_0_TELLS_S", 0.1)
    ended = run_forked("train", "configs/sigmoid/demo.yaml", "parallel.tensor=4", "optim.lr=-1")
    assert ended.code == EXIT_USER_ERROR
    assert "error: rank 1: config error" in ended.errors
    assert "parallel.tensor = 4" in ended.errors and "optim.lr = -1" in ended.errors
