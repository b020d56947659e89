"""`triptych data ...` from the outside."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from data_pipelines.errors import DataError
from data_pipelines.storage.dataset import open_dataset
from data_pipelines.storage.index import index_path
from data_pipelines.storage.shards import write_tar
from pretrain.commands.data import app
from tests.data_pipelines.helpers import write_jsonl

TEXTS = [f"Text {n}: {'word ' * n}\n" for n in range(40)]


def run(*words: object, code: int = 0) -> str:
    """Run a subcommand and return what it printed."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    if isinstance(result.exception, DataError):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.stdout


def test_build_lint_stats_index(tmp_path: Path) -> None:
    source, out = write_jsonl(tmp_path / "in.jsonl", TEXTS), tmp_path / "out"
    text = run("build", source, "--out", out, "--tokenizer", "bpe:300", "--validation-fraction", 0.2)
    assert "removed" not in text and "train: " in text and f"data.path={out}" in text
    assert "no problems" in run("lint", out)
    shown = run("stats", out, "--samples", 2)
    assert "bytes per token" in shown and "Text " in shown and "validation: documents by length" in shown
    assert "2 indices written" in run("index", out)
    shard = out / "train-000000.tar"
    data = bytearray(shard.read_bytes())
    data[1100] ^= 4
    shard.write_bytes(data)
    assert "damaged" in run("lint", out, code=1)
    problems = json.loads(run("lint", out, "--json", code=1))
    assert problems and problems[0]["path"].endswith("train-000000.tar")


def test_build_says_what_training_still_needs(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", TEXTS)
    text = run(
        "build", source, "--out", tmp_path / "out", "--tokenizer", "bpe:9000", "--validation-fraction", 0
    )
    assert "instead of 9,000" in text and "Train on it" not in text
    assert "Training needs a validation split" in text and "a --validation-fraction that holds some" in text


def test_demo_and_tokenize_with_its_tokenizer(tmp_path: Path) -> None:
    run("demo", "--out", tmp_path / "demo", "--megabytes", 0.5, "--tokenizer", "bpe:400")
    (tmp_path / "raw").mkdir()
    write_tar(
        tmp_path / "raw" / "a.tar", [{"__key__": str(n), "txt": t.encode()} for n, t in enumerate(TEXTS)]
    )
    run("tokenize", tmp_path / "raw", "--out", tmp_path / "out", "--tokenizer", tmp_path / "demo")
    demo, out = open_dataset(tmp_path / "demo"), open_dataset(tmp_path / "out")
    assert demo.tokenizer["fingerprint"] == out.tokenizer["fingerprint"]
    with pytest.raises(DataError, match=r"no \.tar shards"):
        run("tokenize", tmp_path / "demo" / "dataset.json", "--out", tmp_path / "x", "--tokenizer", "bytes")


def test_raw_shards_can_be_indexed_and_linted(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [{"__key__": "0", "txt": b"one"}, {"__key__": "1", "txt": b"two"}])
    assert "1 indices written" in run("index", tmp_path) and index_path(tmp_path / "a.tar").exists()
    assert "no problems" in run("lint", tmp_path)


def test_importing_the_commands_costs_only_typer() -> None:
    code = "import sys, pretrain.commands.data; print([m for m in ('torch', 'numpy') if m in sys.modules])"
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert shown.stdout.strip() == "[]"
