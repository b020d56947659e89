"""Ranks that share every layer train as one process does."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import nn

from pretrain.config import Config, load_config
from pretrain.engine.base import Engine
from pretrain.generate.causal import Sampling, generate
from pretrain.parallel.mesh import build_mesh
from pretrain.run import build_engine
from pretrain.run_data import TextData, open_run_data
from tests.e2e.training import losses, metrics, train_rank
from tests.harness import run_ranks
from tests.pretrain.parallel.conftest import Alone
from tests.pretrain.parallel.runs import MODELS, Curve, Datasets, agree, difference, train_in, write_run

TENSOR, SEQUENCE = "parallel.tensor=2", "parallel.sequence=true"

SAMPLE = [
    ("sigmoid", 2, [TENSOR]),
    ("softmax", 4, [TENSOR, SEQUENCE, "parallel.zero=3"]),
    ("gru", 2, [TENSOR, SEQUENCE, "parallel.zero=1"]),
    ("lstm", 4, [TENSOR, "parallel.zero=2", "data.micro_batch_rows=2"]),
    ("mamba2", 4, ["parallel.tensor=4", SEQUENCE]),
    ("trimodal", 4, [TENSOR, SEQUENCE, "parallel.zero=2"]),
    ("sigmoid", 2, [TENSOR, SEQUENCE, "objective.z_loss=1e-3"]),
    ("sigmoid", 4, [TENSOR, SEQUENCE, "parallel.context=2"]),
    ("gru", 4, [TENSOR, SEQUENCE, "parallel.pipeline=2", "data.micro_batch_rows=2"]),
]


@pytest.mark.parametrize(
    ("model", "world", "settings"), SAMPLE, ids=[" ".join([model, *s]) for model, _, s in SAMPLE]
)
def test_a_sample_of_the_table(
    tmp_path: Path, data: Datasets, alone: Alone, model: str, world: int, settings: list[str]
) -> None:
    z_loss = [setting for setting in settings if "z_loss" in setting]
    expected = train_in(tmp_path / "alone", data, model, 1, z_loss) if z_loss else alone(model, 6)
    agree(train_in(tmp_path / "tensor", data, model, world, settings), expected)


LAYOUTS = {
    "tp2": (2, [TENSOR]),
    "tp2+sp": (2, [TENSOR, SEQUENCE]),
    **{f"tp2 dp2 zero{zero}": (4, [TENSOR, f"parallel.zero={zero}"]) for zero in range(4)},
    **{f"tp2+sp dp2 zero{zero}": (4, [TENSOR, SEQUENCE, f"parallel.zero={zero}"]) for zero in range(4)},
    "tp2 cp2": (4, [TENSOR, "parallel.context=2"]),
    "tp2+sp cp2": (4, [TENSOR, SEQUENCE, "parallel.context=2"]),
    "tp2 pp2": (4, [TENSOR, "parallel.pipeline=2", "data.micro_batch_rows=2"]),
    "tp2+sp pp2": (4, [TENSOR, SEQUENCE, "parallel.pipeline=2", "data.micro_batch_rows=2"]),
    "tp2+sp dp2 megatron": (4, [TENSOR, SEQUENCE, "parallel.engine=megatron", "parallel.zero=1"]),
}


@pytest.mark.slow
@pytest.mark.parametrize(("model", "layout"), itertools.product(MODELS, LAYOUTS))
def test_the_whole_table(tmp_path: Path, data: Datasets, alone: Alone, model: str, layout: str) -> None:
    world, settings = LAYOUTS[layout]
    agree(train_in(tmp_path, data, model, world, settings, steps=20), alone(model, 20))


@pytest.mark.slow
@pytest.mark.parametrize(("model", "zero"), itertools.product(MODELS, (1, 2, 3)))
def test_bf16_is_near_the_same_stage_undivided(tmp_path: Path, data: Datasets, model: str, zero: int) -> None:
    bf16 = ["precision.dtype=bf16", f"parallel.zero={zero}"]
    undivided = train_in(tmp_path / "undivided", data, model, 2, bf16, steps=20)
    for name, more in (("tensor", []), ("sequence", [SEQUENCE])):
        divided = train_in(tmp_path / name, data, model, 4, [*bf16, TENSOR, *more], steps=20)
        assert difference(divided, undivided)[0] < 1e-3


@pytest.mark.parametrize("model", ["gru", "mamba2"])
def test_selective_recomputation_changes_nothing(
    tmp_path: Path, data: Datasets, alone: Alone, model: str
) -> None:
    settings = [TENSOR, SEQUENCE, "parallel.zero=3", "parallel.activation_checkpointing=selective"]
    agree(train_in(tmp_path, data, model, 2, settings), alone(model, 6))


@pytest.mark.slow
@pytest.mark.parametrize("option", ["parallel.activation_checkpointing=full", "parallel.compile=true"])
def test_options_change_nothing(tmp_path: Path, data: Datasets, alone: Alone, option: str) -> None:
    settings = [TENSOR, SEQUENCE, "parallel.zero=2", option]
    agree(train_in(tmp_path, data, "sigmoid", 2, settings), alone("sigmoid", 6))


def test_a_run_moves_between_layouts(tmp_path: Path, data: Datasets) -> None:
    """From two by two ranks to one, two and three, each from where the one before stopped."""
    rows = "data.global_batch_rows=12"
    expected = train_in(tmp_path / "alone", data, "sigmoid", 1, [rows], steps=12)
    config = write_run(tmp_path / "moved", data, "sigmoid", 12)
    legs = [
        (4, 3, [TENSOR, SEQUENCE, "parallel.zero=2"]),
        (1, 5, ["parallel.zero=0"]),
        (2, 7, [TENSOR, "parallel.zero=3"]),
        (3, 10, ["parallel.zero=1"]),
        (4, None, [TENSOR, "parallel.zero=1"]),
    ]
    norms: list[float] = []
    for world, stop_at, settings in legs:
        norms += run_ranks(world, train_rank, config, [rows, *settings], stop_at)[0].gradient_norms
    agree(Curve(losses(tmp_path / "moved" / "runs" / "tiny"), norms), expected)


@pytest.mark.slow
@pytest.mark.parametrize("model", [model for model in MODELS if model != "sigmoid"])
def test_every_family_moves_between_layouts(tmp_path: Path, data: Datasets, alone: Alone, model: str) -> None:
    config = write_run(tmp_path, data, model, 6)
    legs = [
        (4, 2, [TENSOR, SEQUENCE, "parallel.zero=2"]),
        (1, 4, ["parallel.zero=0"]),
        (2, None, [TENSOR, "parallel.zero=3"]),
    ]
    norms: list[float] = []
    for world, stop_at, settings in legs:
        norms += run_ranks(world, train_rank, config, settings, stop_at)[0].gradient_norms
    agree(Curve(losses(tmp_path / "runs" / "tiny"), norms), alone(model, 6))


def _engine(path: Path, settings: list[str]) -> tuple[Config, TextData, Engine]:
    data = open_run_data(load_config(path, settings))
    assert isinstance(data, TextData)
    return data.config, data, build_engine(data.config, build_mesh(data.config.parallel), torch.device("cpu"))


def _texts(path: Path, settings: list[str]) -> list[str]:
    _, data, engine = _engine(path, settings)
    with engine.inference() as model:
        prompts = ["def", "import torch", ""]
        return generate(model, data.tokenizer, prompts, Sampling(tokens=7), torch.device("cpu"))


@pytest.mark.parametrize("model", ["sigmoid", "mamba2"])
def test_all_ranks_generate_the_text_of_one_process(tmp_path: Path, data: Datasets, model: str) -> None:
    """One token at a time, which sequence parallelism could not divide."""
    path = write_run(tmp_path, data, model, 3)
    expected = run_ranks(1, _texts, path, [])[0]
    assert run_ranks(2, _texts, path, [TENSOR, SEQUENCE, "parallel.zero=3"]) == [expected] * 2


@pytest.mark.parametrize("model", ["lstm", "trimodal"])
def test_evaluation_is_that_of_one_process(tmp_path: Path, data: Datasets, model: str) -> None:
    logged = []
    for world, settings in ((1, []), (4, [TENSOR, SEQUENCE, "parallel.zero=1"])):
        train_in(tmp_path / str(world), data, model, world, settings, steps=3)
        lines = metrics(tmp_path / str(world) / "runs" / "tiny")
        kept = ("loss/", "validation_", "newton/")
        logged.append(
            {f"{n} {k}": v for n, x in enumerate(lines) for k, v in x.items() if k.startswith(kept)}
        )
    assert any("loss/validation" in key for key in logged[0])
    assert logged[1] == pytest.approx(logged[0], rel=1e-5, abs=1e-6)


def test_accuracy_on_a_task_is_that_of_one_process(tmp_path: Path, data: Datasets) -> None:
    found = []
    for world, settings in ((1, []), (2, [TENSOR, SEQUENCE])):
        task = ["data.path=null", "data.task={name: parity}", *settings]
        train_in(tmp_path / str(world), data, "gru", world, task, steps=3)
        lines = metrics(tmp_path / str(world) / "runs" / "tiny")
        found.append([line["task/token_accuracy"] for line in lines if "task/token_accuracy" in line])
    assert found[0]
    assert found[0] == found[1]


def _sizes(path: Path, settings: list[str]) -> tuple[int, int, bool, tuple[int, ...]]:
    config, _, engine = _engine(path, settings)
    seen: list[tuple[int, ...]] = []
    with engine.inference() as model:
        block: nn.Module = model.blocks[0]  # type: ignore[index]
        block.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape)))
        tied = model.head.weight is model.embedding.weight  # type: ignore[union-attr]
        elements = sum(parameter.numel() for parameter in model.parameters())
        model.train()
        model(torch.zeros(2, config.data.sequence_length, dtype=torch.long))
    return elements, sum(fragment.length for fragment in engine.fragments()), tied, seen[0]


@pytest.mark.parametrize("tied", [True, False])
def test_a_rank_holds_its_part_and_no_more(tmp_path: Path, data: Datasets, tied: bool) -> None:
    """Of the sigmoid model's 2 x (4 x 32 + 2 x 8) vectors outside of the layers, all; of the rest, half."""
    path = write_run(tmp_path, data, "sigmoid", 3)
    settings = [f"model.tied_head={str(tied).lower()}", "model.vocabulary=261"]
    whole = run_ranks(1, _sizes, path, settings)[0]
    parts = run_ranks(2, _sizes, path, [TENSOR, SEQUENCE, *settings])
    copies, filling = 2 * (4 * 32 + 2 * 8) + 32, 32 * (1 if tied else 2)
    for elements, owned, is_tied, stream in parts:
        assert elements == owned == (whole[0] - copies + filling) // 2 + copies
        assert is_tied == tied
        assert stream == (2, 16, 32)
