"""The rooms of data_pipelines: all named on their page, and what makes no batches needs no torch.

Which room may import which is import-linter's (pyproject.toml).
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import data_pipelines

ROOT = Path(data_pipelines.__file__).parent
ROOMS = sorted(path.parent.name for path in ROOT.glob("*/__init__.py"))
WITHOUT_TORCH = (
    "digits",
    "prepare",
    "raw",
    "storage",
    "inspection.lint",
    "tokens.document_form",
    "tokens.modalities",
    "tokens.tokenizer_loading",
    "tokens.tokenizer_training",
    "tokens.vocabulary",
)
"""Rooms, or modules of rooms of which others do need it."""


def modules(room: str) -> list[str]:
    folder = ROOT / room
    return [f"{room}.{path.stem}" for path in sorted(folder.glob("*.py"))] if folder.is_dir() else [room]


@pytest.mark.parametrize("room", WITHOUT_TORCH)
def test_what_makes_no_batches_needs_no_torch(room: str) -> None:
    names = [f"data_pipelines.{name}" for name in modules(room)]
    assert names
    code = f"import sys, importlib\nfor name in {names}: importlib.import_module(name)\nprint('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT.parent
    )
    assert done.stdout.strip() == "False", (done.stdout, done.stderr)


def test_the_page_has_a_line_for_each_room_and_names_files_that_are_there() -> None:
    page = (ROOT / "README.md").read_text()
    assert sorted(re.findall(r"^\| `([a-z]+)/` \|", page, re.MULTILINE)) == ROOMS
    named = set(re.findall(r"`((?:[a-z_]+/)*[a-z_]+\.py)\b", page))
    assert "storage/dataset.py" in named
    lost = [name for name in named if not (ROOT / name).is_file() and not list(ROOT.glob(f"*/{name}"))]
    assert not lost, lost


def test_no_room_is_named_as_a_folder_that_tools_leave_out() -> None:
    """git ignores `build`, and ruff and pytest pass it over."""
    assert not {"build", "dist", "venv", "env"} & set(ROOMS)
