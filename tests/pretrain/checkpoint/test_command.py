"""`triptych checkpoint list` and `verify`."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pretrain.checkpoint import CheckpointStore
from pretrain.commands.checkpoint import app
from pretrain.errors import CheckpointError
from tests.pretrain.checkpoint.states import make_state


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run called `demo`, under runs/ of the current folder, with steps 2 and 4."""
    folder = tmp_path / "runs" / "demo"
    store = CheckpointStore(folder / "checkpoints", group=None, keep_last=5)
    for step in (2, 4):
        store.save(step, make_state(step))
    store.wait()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return folder


def invoke(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


@pytest.mark.parametrize("command", ["list", "verify"])
@pytest.mark.parametrize("name", ["demo", "runs/demo"])
def test_whole_steps_are_listed(run: Path, command: str, name: str) -> None:
    code, output = invoke(command, name)
    assert code == 0 and output.count("whole") == 2 and "kB" in output


def test_a_flipped_bit_is_found_by_verify(run: Path) -> None:
    file = run / "checkpoints" / "step_00000004" / "__0_0.distcp"
    data = bytearray(file.read_bytes())
    data[99] ^= 1
    file.write_bytes(data)
    assert invoke("list", "demo")[0] == 0
    code, output = invoke("verify", "demo")
    assert code == 1 and "__0_0.distcp has been altered" in output and output.count("whole") == 1
    assert invoke("verify", "demo", "--step", "2")[0] == 0
    assert invoke("verify", "demo", "--step", "4")[0] == 1


def test_a_step_whose_manifest_is_gone_is_damaged(run: Path) -> None:
    (run / "checkpoints" / "step_00000004" / "MANIFEST.json").unlink()
    for command in ("list", "verify"):
        code, output = invoke(command, "demo")
        assert code == 1 and "MANIFEST.json is gone: this step was whole once" in output
        assert output.count("whole") == 2, "the other is whole"
    assert invoke("verify", "demo", "--step", "4")[0] == 1
    (run / "checkpoints" / "step_00000004").rename(run / "checkpoints" / "step_00000004.partial")
    assert invoke("list", "demo")[0] == invoke("verify", "demo")[0] == 0, "a save that goes on is no step"


def test_values_of_a_wrong_type_are_damage_of_their_step(run: Path) -> None:
    manifest = run / "checkpoints" / "step_00000004" / "MANIFEST.json"
    manifest.write_text(re.sub(r'"written_at": [0-9.]+', '"written_at": "soon"', manifest.read_text()))
    for command in ("list", "verify"):
        code, output = invoke(command, "demo")
        assert code == 1 and "written_at is 'soon', not of type float" in output
        assert output.count("whole") == 1


def test_unknown_runs_and_steps_are_named(run: Path) -> None:
    with pytest.raises(CheckpointError, match="runs/other/checkpoints"):
        invoke("list", "other")
    with pytest.raises(CheckpointError, match="step_00000003 does not exist"):
        invoke("verify", "demo", "--step", "3")


def test_help_shows_examples() -> None:
    words = " ".join(invoke("verify", "--help")[1].split())  # the terminal's width decides where lines end
    assert "checkpoint verify runs/demo --step 1000" in words


def test_help_does_not_import_torch() -> None:
    program = (
        "import sys; from pretrain.cli import main; sys.argv = ['triptych', 'checkpoint', 'list', '--help']\n"
        "try: main()\n"
        "finally: assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0 and "List the steps of a run" in done.stdout, done.stderr
