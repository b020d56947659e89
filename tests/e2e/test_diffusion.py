"""Masked diffusion as a run: any layout, any micro-batch, a resume, its bad inputs, and its commands."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipelines.storage.dataset import write_dataset
from data_pipelines.tokens.tokenizer_training import word_tokenizer
from pretrain.checkpoint_reader import load_trained_model
from pretrain.config import load_config
from pretrain.errors import ConfigError
from pretrain.plan.estimate import make_plan
from pretrain.run_folder import RunFolder
from tests.data_pipelines.helpers import write_documents
from tests.e2e.pairs import build_pairs, modalities, write_config
from tests.e2e.training import losses, metrics, run_forked, train_rank
from tests.harness import RanksFailed, run_ranks


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_pairs(tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, pairs: Path) -> Path:
    """One process, ZeRO 0, the whole batch at once: the folder with its config and run."""
    folder = tmp_path_factory.mktemp("alone")
    run_ranks(1, train_rank, write_config(folder, pairs), ["parallel.zero=0"])
    return folder


def logged(folder: Path) -> list[dict[str, Any]]:
    """What was logged, without clocks and gauges."""
    kept = ("step", "loss/", "elbo", "cross_entropy/", "validation_", "optim/")
    return [{k: v for k, v in line.items() if k.startswith(kept)} for line in metrics(folder)]


def agree(folder: Path, reference: Path) -> None:
    ours, theirs = logged(folder / "runs" / "tiny"), logged(reference / "runs" / "tiny")
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert one == pytest.approx(other, rel=2e-4, abs=2e-5)


def test_every_part_is_logged_and_the_loss_falls(alone: Path) -> None:
    lines = logged(alone / "runs" / "tiny")
    training = [line for line in lines if "loss/train" in line]
    for name in ("elbo/all", "elbo/text", "elbo/image", "elbo/audio", "elbo_task/text"):
        assert any(name in line for line in training), name
    assert any(name.startswith("cross_entropy/masked_") for name in training[0])
    validation = [line for line in lines if "loss/validation" in line]
    assert [line["step"] for line in validation] == [0, 4, 8]
    for line in validation:
        assert line["validation_elbo/all"] == pytest.approx(line["loss/validation"], rel=1e-5)
        assert "validation_elbo_task/text-to-audio" in line
    assert validation[-1]["loss/validation"] < validation[0]["loss/validation"] - 0.3


@pytest.mark.parametrize(
    ("world", "overrides"),
    [
        (1, ["parallel.activation_checkpointing=full", "data.micro_batch_rows=2"]),
        (2, ["parallel.zero=3", "data.micro_batch_rows=1", "data.workers=1"]),
        (4, ["parallel.zero=2"]),
    ],
)
def test_any_layout_trains_as_one_process(
    tmp_path: Path, pairs: Path, alone: Path, world: int, overrides: list[str]
) -> None:
    run_ranks(world, train_rank, write_config(tmp_path, pairs), overrides, timeout_s=120)
    agree(tmp_path, alone)


def test_bf16_stays_near_fp32(tmp_path: Path, pairs: Path, alone: Path) -> None:
    run_ranks(2, train_rank, write_config(tmp_path, pairs), ["precision.dtype=bf16", "parallel.zero=2"])
    ours, theirs = (losses(folder / "runs" / "tiny") for folder in (tmp_path, alone))
    assert ours == pytest.approx(theirs, abs=5e-2)


def test_sigmoid_attention_trains_too(tmp_path: Path, pairs: Path) -> None:
    settings = ["model.attention=sigmoid", "model.image_positions=1d", "objective.condition=joint"]
    settings += ["objective.masking=bernoulli", "optim.scaling.base_rows=4"]
    run_ranks(2, train_rank, write_config(tmp_path, pairs), settings)
    lines = logged(tmp_path / "runs" / "tiny")
    rates = [line["optim/learning_rate"] for line in lines if "optim/learning_rate" in line]
    assert max(rates) == pytest.approx(5e-3 * 2**0.5), "the rule's rate is the one that is logged"
    found = [line for line in lines if "loss/validation" in line]
    assert found[-1]["loss/validation"] < found[0]["loss/validation"] - 0.2


def test_complementary_pairs_on_one_and_four_ranks(tmp_path: Path, pairs: Path) -> None:
    """Four ranks of one row each: a pair is never on one rank."""
    folders = []
    for world in (1, 4):
        folders.append(tmp_path / str(world))
        folders[-1].mkdir()
        settings = ["objective.complementary=true", "data.global_batch_rows=4", "run.steps=4"]
        run_ranks(world, train_rank, write_config(folders[-1], pairs), settings)
    agree(*folders)


def test_a_resumed_run_on_other_ranks_goes_on_as_if_never_stopped(
    tmp_path: Path, pairs: Path, alone: Path
) -> None:
    config = write_config(tmp_path, pairs)
    stopped = run_ranks(2, train_rank, config, [], 4)[0]
    assert not stopped.done
    trained = run_ranks(1, train_rank, config, ["data.micro_batch_rows=4"])[0]
    assert (trained.first_step, trained.last_step) == (stopped.last_step, 8)
    assert losses(tmp_path / "runs" / "tiny") == pytest.approx(losses(alone / "runs" / "tiny"), abs=2e-5)
    with pytest.raises(RanksFailed, match="the data cursor|fingerprint"):
        run_ranks(1, train_rank, config, ["objective.complementary=true", "run.steps=10"])


def test_a_runs_model_comes_back_with_its_modalities(alone: Path) -> None:
    trained = load_trained_model(RunFolder(alone / "runs" / "tiny"), device="cpu")
    assert trained.modalities is not None
    assert trained.modalities.vocabulary == modalities().vocabulary
    assert trained.modalities.vocabulary.size <= trained.config.model.vocabulary == 320


def test_evaluate_prints_bounds_with_intervals(alone: Path, pairs: Path) -> None:
    run = str(alone / "runs" / "tiny")
    ended = run_forked("evaluate", run, "--draws", "6", "--json", "--device", "cpu")
    assert ended.code == 0, ended.errors
    found = json.loads(ended.output)
    bounds = found["bounds"]
    assert set(bounds) == {
        *(f"elbo/{name}" for name in ("all", "text", "image", "audio")),
        *(f"elbo_task/{name}" for name in ("text", "text-to-image", "image-to-text", "text-to-audio")),
    }
    at_end = next(line for line in reversed(logged(alone / "runs" / "tiny")) if "loss/validation" in line)
    everything = bounds["elbo/all"]
    assert 0 < everything["half_interval"] < 0.3
    assert abs(everything["nats_per_token"] - at_end["loss/validation"]) < 0.5
    table = run_forked("evaluate", run, "--draws", "2", "--rows", "4", "--device", "cpu")
    assert "95 % interval" in table.output and "elbo_task/text-to-image" in table.output


def test_evaluate_takes_plain_text_of_the_runs_tokenizer(alone: Path, pairs: Path, tmp_path: Path) -> None:
    """Alone or beside pairs, where it is the same rows with another padding."""
    run = str(alone / "runs" / "tiny")
    options = ("--draws", "40", "--json", "--device", "cpu")
    found = []
    for data in ([pairs / "text"], [pairs / "text", pairs / "text-to-image"]):
        ended = run_forked("evaluate", run, *options, *(f"--data={path}" for path in data))
        assert ended.code == 0, ended.errors
        found.append(json.loads(ended.output)["bounds"])
    assert set(found[0]) == {"elbo/all", "elbo/text", "elbo_task/text"}
    one, other = (bounds["elbo_task/text"] for bounds in found)
    assert one["tokens"] == other["tokens"]
    noise = math.hypot(one["half_interval"], other["half_interval"])
    assert abs(one["nats_per_token"] - other["nats_per_token"]) < 2 * noise
    words = tmp_path / "words"
    words.mkdir()
    splits = {"validation": write_documents(words, "validation", [np.zeros(4, np.int64)], 10**9)}
    write_dataset(words, splits, word_tokenizer(("a", "b")).save(words))
    refused = run_forked("evaluate", run, "--device", "cpu", f"--data={words}")
    assert refused.code == 2 and "build the data with the run's tokenizer" in refused.errors


def test_plan_takes_the_vocabulary_from_the_data(pairs: Path, tmp_path: Path) -> None:
    plan = make_plan(load_config(write_config(tmp_path, pairs)), gpus=2, gpu="h100", mfu=0.4)
    assert plan.parameters["embedding"] == 320 * 32


def test_another_codec_is_refused_by_name(tmp_path: Path, alone: Path, pairs: Path) -> None:
    shutil.copytree(alone, tmp_path / "copy")
    other = build_pairs(tmp_path / "other", image_codec="fedcba9876543210")
    config = write_config(tmp_path / "copy", other)
    with pytest.raises(RanksFailed) as caught:
        run_ranks(1, train_rank, config, ["run.steps=9"])
    assert "image: codec 0123456789ab, 8 ids from 257 in the checkpoint, codec fedcba987654" in str(
        caught.value
    )
    data = [str(other / task) for task in ("text-to-image", "image-to-text")]
    ended = run_forked(
        "evaluate", str(alone / "runs" / "tiny"), "--device", "cpu", "-d", data[0], "-d", data[1]
    )
    assert ended.code == 2 and "build the data with the run's tokenizer and codecs" in ended.errors


MISTAKES = [
    (["objective.condition_dropout=1.5"], "objective.condition_dropout = 1.5"),
    (["objective.whole_modality=-0.1", "objective.condition=joint"], "objective.whole_modality = -0.1"),
    (["objective.whole_modality=0.1"], "only objective.condition=joint has it"),
    (
        ["objective.text.schedule=sqrt"],
        "objective.text.schedule = sqrt: should be 'linear', 'cosine' or 'polynomial'",
    ),
    (
        ["objective.image.clip=0", "objective.image.scale=-1"],
        "objective.image.scale = -1: should be greater than",
    ),
    (
        ["objective.image.clip=0", "objective.image.scale=-1"],
        "objective.image.clip = 0: should be greater than 0",
    ),
    (
        ["objective.audio.wieght=elbo"],
        "objective.audio.wieght: no such setting; did you mean objective.audio.weight",
    ),
    (["objective.kind=masked_difusion"], "no such objective; did you mean masked_diffusion?"),
    (["objective={kind: next_token}"], "objective.kind = next_token: a trimodal model sees the token"),
    (["model={family: softmax, layers: 1, width: 8, heads: 2}"], "use model.family=trimodal"),
    (
        ["objective.complementary=true", "data.global_batch_rows=7"],
        "data.global_batch_rows = 7: complementary",
    ),
    (["data.task={name: parity}"], "data.task: synthetic tasks are for objective.kind=next_token"),
    (["model.positions=alibi"], "model.positions = alibi"),
]


@pytest.mark.parametrize(("overrides", "expected"), MISTAKES)
def test_mistakes_are_told(tmp_path: Path, overrides: list[str], expected: str) -> None:
    path = write_config(tmp_path, tmp_path)
    if overrides[0].startswith(("objective={", "model={")):
        key, _, value = overrides[0].partition("=")
        lines = [line for line in path.read_text().splitlines() if not line.startswith(f"{key}:")]
        path.write_text("\n".join([*lines, f"{key}: {value}"]))
        overrides = []
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    assert expected in str(caught.value)


def test_a_vocabulary_too_small_for_the_data_is_refused(tmp_path: Path, pairs: Path) -> None:
    with pytest.raises(RanksFailed, match=r"model.vocabulary = 257: .* has 283 ids, specials included"):
        run_ranks(1, train_rank, write_config(tmp_path, pairs), ["model.vocabulary=257"])
