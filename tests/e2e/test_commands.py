"""The commands as a user types them, on a trained run."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_pipelines.inspection.stats import sample_texts
from data_pipelines.rows.cut_rows import ORDER, Source, open_sources
from data_pipelines.rows.evaluation import evaluation_rows
from data_pipelines.storage.dataset import open_dataset
from data_pipelines.tokens.tokenizer_loading import load_tokenizer
from pretrain import checkpoint_reader
from pretrain.checkpoint_reader import load_trained_model
from pretrain.exit_codes import EXIT_DONE, EXIT_USER_ERROR
from pretrain.run_folder import RunFolder
from tests.e2e.training import environment, metrics, run_forked, train_rank, write_config
from tests.harness import run_ranks


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A finished run, with the last validation loss over the whole split."""
    folder = tmp_path_factory.mktemp("trained")
    run_ranks(2, train_rank, write_config(folder, corpus), ["parallel.zero=3", "monitor.evaluate_rows=null"])
    return folder / "runs" / "tiny"


def test_evaluate_agrees_with_the_loss_that_training_logged(trained: Path) -> None:
    ended = run_forked("evaluate", str(trained), "--json")
    assert ended.code == EXIT_DONE, ended
    result = json.loads(ended.output)
    logged = [record for record in metrics(trained) if "loss/validation" in record][-1]
    assert result["step"] == logged["step"] == 12
    assert result["nats_per_token"] == pytest.approx(logged["loss/validation"], abs=1e-5)
    assert result["bits_per_byte"] == pytest.approx(logged["loss/validation_bits_per_byte"], abs=1e-5)


def test_evaluate_another_split_up_to_so_many_rows(trained: Path) -> None:
    ended = run_forked("evaluate", str(trained), "--split", "train", "--rows", "5")
    assert ended.code == EXIT_DONE and "nats/token" in ended.output and "bits/byte" in ended.output


def test_evaluate_refuses_another_tokenizer(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("some words and some more words\n" * 200)
    built = run_forked(
        "data", "build", str(tmp_path / "text.txt"), "--out", str(tmp_path / "d"), "--tokenizer", "bpe:300"
    )
    assert built.code == EXIT_DONE, built
    ended = run_forked("evaluate", str(trained), "--data", str(tmp_path / "d"))
    assert ended.code == EXIT_USER_ERROR and "tokenizer" in ended.errors and "Traceback" not in ended.errors


def test_a_model_of_an_earlier_version_is_told_of(
    trained: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_trained_model(RunFolder(trained), device="cpu")
    assert "earlier version" not in caplog.text
    monkeypatch.setattr(checkpoint_reader, "FIRST_TOKENS_TRAINED", ORDER + 1)
    load_trained_model(RunFolder(trained), device="cpu")
    assert "first token of a document was never predicted" in caplog.text


def test_training_says_how_many_rows_were_evaluated_and_samples_begin_as_the_data_does(
    trained: Path, tmp_path: Path, corpus: Path
) -> None:
    config = write_config(tmp_path, corpus)
    ended = run_forked("train", str(config), "run.steps=4", "monitor.evaluate_rows=5")
    assert ended.code == EXIT_DONE, ended
    there = evaluation_rows(open_sources([Source(corpus)], "validation"), 32)
    assert f"(step 0 -> 4; 5 of {there:,} rows)" in ended.output
    text = sample_texts(open_dataset(corpus), load_tokenizer(corpus), "validation", 1)[0]
    words = " ".join(text[:32].split()[:3])
    assert len(words) > 3 and f"samples/1: {words}" in ended.output


def test_generate_continues_and_repeats_itself(trained: Path) -> None:
    texts = [
        run_forked("generate", str(trained), "-p", "def main", "--tokens", "16").output for _ in range(2)
    ]
    assert texts[0] == texts[1] and texts[0].startswith("def main")


def test_generate_at_a_saved_step_and_at_one_that_is_not_there(trained: Path) -> None:
    assert run_forked("generate", str(trained), "--step", "9", "--tokens", "4").code == EXIT_DONE
    ended = run_forked("generate", str(trained), "--step", "8")
    assert ended.code == EXIT_USER_ERROR and "steps there: 6, 9, 12" in ended.errors


@pytest.mark.parametrize(
    "options",
    [["--task", "text-to-image"], ["--sampler", "confidence"], ["--guidance", "2"], ["--out", "x.png"]],
)
def test_a_causal_run_refuses_what_is_for_masked_diffusion(trained: Path, options: list[str]) -> None:
    ended = run_forked("generate", str(trained), *options)
    assert ended.code == EXIT_USER_ERROR
    assert f"{options[0]}: for runs of masked diffusion; this one is of family sigmoid" in ended.errors


def test_a_causal_run_answers_no_questions(trained: Path, tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text('{"task": "text", "prompt": "x", "choices": ["a", "b"], "answer": 0}')
    ended = run_forked("evaluate", str(trained), "--choices", str(path))
    assert ended.code == EXIT_USER_ERROR and "for runs of masked diffusion" in ended.errors


def test_a_run_that_is_not_there(tmp_path: Path) -> None:
    ended = run_forked("generate", str(tmp_path / "nothing"))
    assert ended.code == EXIT_USER_ERROR and "no run there" in ended.errors


def test_checkpoint_list_and_verify(trained: Path) -> None:
    for verb in ("list", "verify"):
        ended = run_forked("checkpoint", verb, str(trained))
        assert ended.code == EXIT_DONE and "whole" in ended.output, ended


def test_plan_prints_its_tables() -> None:
    stated = ("parallel.tensor=1", "parallel.pipeline=1", "parallel.sequence=false")
    ended = run_forked(
        "plan", "configs/sigmoid/1b.yaml", *stated, "--gpus", "64", "--price", "2.5", "--explain"
    )
    assert ended.code == EXIT_DONE, ended
    tables = ("1,300,", "optimizer", "FLOPs per token", "attention bias", "cost")
    for text in ("layout chosen for 64 x", "fitted: python -m", *tables):
        assert text in ended.output


def test_a_users_own_text_in_two_commands(tmp_path: Path) -> None:
    """A single plain file becomes a train and a validation part, and a run."""
    (tmp_path / "mine.txt").write_text("\n".join(f"line {n}: all work and no play" for n in range(1500)))
    built = run_forked(
        "data", "build", str(tmp_path / "mine.txt"), "--out", str(tmp_path / "d"), "--tokenizer", "bytes"
    )
    assert built.code == EXIT_DONE, built
    settings = [
        f"data.path={tmp_path / 'd'}",
        f"run.folder={tmp_path / 'runs'}",
        "run.name=mine",
        "run.steps=3",
    ]
    settings += ["optim.warmup_steps=1", "model.layers=1", "model.width=48", "monitor.evaluate_rows=4"]
    ended = run_forked("train", "configs/sigmoid/demo.yaml", *settings)
    assert ended.code == EXIT_DONE, ended
    assert "validation loss:" in ended.output and "tensorboard --logdir" in ended.output
    assert list((tmp_path / "runs" / "mine" / "tensorboard").glob("events.*"))


def test_print_config_resolves_without_training(tmp_path: Path, corpus: Path) -> None:
    config = write_config(tmp_path, corpus)
    ended = run_forked("train", str(config), "--print-config", "optim.lr=0.5")
    assert ended.code == EXIT_DONE and "lr: 0.5" in ended.output and not (tmp_path / "runs").exists()


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys; import pretrain.cli; print(sorted({'torch', 'deepspeed', 'pydantic'} & set(sys.modules)))"
    began = time.perf_counter()
    shown = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment(),
        check=True,
    )
    assert shown.stdout.strip() == "[]"
    assert time.perf_counter() - began < 20  # the import list is the test; this only catches a hang
