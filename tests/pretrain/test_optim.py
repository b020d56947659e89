"""Parameter groups, weight decay and schedules."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import nn

from models import families
from models.declared import Declared
from models.initialise import Constant
from pretrain.config.optim import OptimSection
from pretrain.optim import (
    UncompiledAdamW,
    build_optimizer,
    parameter_groups,
    schedule_factor,
    set_learning_rate,
)


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.linear = nn.Linear(4, 4, bias=False)
        self.norm = nn.RMSNorm(4)


TINY = {
    "embedding.weight": Declared(Constant(0.0), "embedding", is_vector=False),
    "linear.weight": Declared(Constant(0.0), "mlp", is_vector=False),
    "norm.weight": Declared(Constant(1.0), "norm", is_vector=True),
}


def test_types_have_their_learning_rates() -> None:
    groups = parameter_groups(
        Tiny().named_parameters(), TINY, OptimSection(lr=0.01, weight_decay=0.1), width=2048
    )
    by_type = {group["type"]: group for group in groups}
    assert by_type["matrix"]["peak_lr"] == pytest.approx(0.01 * 768 / 2048)
    assert by_type["embedding"]["peak_lr"] == by_type["vector"]["peak_lr"] == 0.01
    assert by_type["vector"]["weight_decay"] == 0


def test_the_recurrent_weights_of_a_cell_are_vectors() -> None:
    family = families["pararnn"]
    config = family.config(cell="lstm", layers=1, width=8).resolved(vocabulary=5, sequence_length=4)
    model = family.build(config)
    groups = parameter_groups(
        model.named_parameters(), model.declared, OptimSection(lr=0.01, weight_decay=0.1), width=8
    )
    types = {id(p): group["type"] for group in groups for p in group["params"]}
    found = {name: types[id(parameter)] for name, parameter in model.named_parameters()}
    cell = {name.rsplit(".", 1)[-1]: kind for name, kind in found.items() if ".cell." in name}
    assert cell == {"input": "matrix", "recurrent": "vector", "bias": "vector", "peephole": "vector"}
    assert found["blocks.0.skip"] == found["blocks.0.mixer.conv.bias"] == "vector"
    assert found["blocks.0.mixer.conv.weight"] == "matrix" and found["head.weight"] == "embedding"


def test_narrow_models_keep_the_whole_rate() -> None:
    groups = parameter_groups(Tiny().named_parameters(), TINY, OptimSection(lr=0.01), width=192)
    assert {group["peak_lr"] for group in groups} == {0.01}


@pytest.mark.parametrize("lr", [1e-4, 1e-1])
@pytest.mark.parametrize("factor", [1.0, 0.25])
def test_weight_decay_follows_the_schedule_and_not_the_learning_rate(lr: float, factor: float) -> None:
    model = Tiny()
    before = model.linear.weight.detach().clone()
    optim = OptimSection(lr=lr, weight_decay=0.1)
    optimizer = build_optimizer(parameter_groups(model.named_parameters(), TINY, optim, width=2048), optim)
    set_learning_rate(optimizer.param_groups, factor)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)  # no gradient: what moves is decay alone
    optimizer.step()
    torch.testing.assert_close(model.linear.weight.detach(), before * (1 - 0.1 * factor))


def test_cosine_starts_at_the_peak_and_ends_at_its_fraction() -> None:
    optim = OptimSection(lr=1, warmup_steps=10, schedule="cosine", final_lr_fraction=0.1)
    factors = [schedule_factor(optim, step, 100) for step in range(100)]
    assert factors[0] == pytest.approx(0.1) and factors[9] == 1.0 and factors[10] == pytest.approx(1.0)
    assert factors[-1] == pytest.approx(0.1)
    # The two middle steps lie on both sides of the half-way point, where the cosine is 0.
    assert (factors[54] + factors[55]) / 2 == pytest.approx(0.1 + 0.9 * 0.5, abs=1e-3)
    assert all(a >= b for a, b in itertools.pairwise(factors[10:]))


def test_warmup_stable_decay() -> None:
    optim = OptimSection(lr=1, warmup_steps=10, schedule="wsd", decay_steps=20, final_lr_fraction=0.0)
    factors = [schedule_factor(optim, step, 100) for step in range(100)]
    assert set(factors[9:80]) == {1.0}
    assert factors[80] == pytest.approx(0.95) and factors[-1] == pytest.approx(0.0)


def test_constant() -> None:
    optim = OptimSection(lr=1, warmup_steps=2, schedule="constant")
    assert [schedule_factor(optim, step, 5) for step in range(5)] == [0.5, 1, 1, 1, 1]


def test_updates_are_those_of_torchs_adamw() -> None:
    """Bit for bit, without a graph; hooks run, and either takes the other's state."""
    torch.manual_seed(0)
    ours, theirs = Tiny(), Tiny()
    theirs.load_state_dict(ours.state_dict())
    settings: dict[str, Any] = {
        "lr": 0.01,
        "betas": (0.9, 0.95),
        "eps": 1e-6,
        "weight_decay": 0.1,
        "fused": True,
    }
    mine, stock = (
        UncompiledAdamW(ours.parameters(), **settings),
        torch.optim.AdamW(theirs.parameters(), **settings),
    )
    called: list[str] = []
    mine.register_step_post_hook(lambda *_: called.append("after"))
    for _ in range(3):
        for model, optimizer in ((ours, mine), (theirs, stock)):
            optimizer.zero_grad()
            model.norm(model.linear(model.embedding(torch.arange(5)))).square().sum().backward()
            optimizer.step()
        kept = copy.deepcopy(stock.state_dict())  # a state that is loaded shares its tensors
        stock.load_state_dict(copy.deepcopy(mine.state_dict()))
        mine.load_state_dict(kept)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert len(called) == 3 and not any(p.grad_fn for p in ours.parameters())
