"""The rules that carry tuned settings to other sizes, against the papers' figures, and what they do to a model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from models import families
from models.initialise import initialise
from models.layers.language_model import LanguageModel
from models.layers.transfer import Transfer, multipliers
from pretrain.config import config_from_dict, load_config
from pretrain.config.optim import MultiplierSection, OptimSection, ScalingSection
from pretrain.errors import ConfigError
from pretrain.optim import parameter_groups, parameter_type
from pretrain.optim.adamw import transfer_type
from pretrain.optim.scaling import (
    Shape,
    critical_rows,
    resolve,
    scale,
    sde,
    step_law_batch_tokens,
    step_law_lr,
)

BASE = OptimSection(lr=1e-3, betas=(0.9, 0.95), epsilon=1e-8, weight_decay=1e-4)
LENGTH = 1024


def shape(rows: int, tokens: float) -> Shape:
    return Shape(rows, LENGTH, round(tokens / LENGTH / rows), parameters=10**9)


@pytest.mark.parametrize(
    ("rows", "tokens", "kappa", "lr", "betas", "epsilon"),
    [
        (256, 1e12, 0.148, 0.385, (0.985, 0.992), 2.60),
        (1024, 6.4e12, 0.262, 0.511, (0.973, 0.987), 1.96),
        (4096, 6.4e12, 1.046, 1.02, (0.896, 0.948), 0.98),
        (8192, 6.4e12, 2.09, 1.45, (0.802, 0.898), 0.69),
    ],
)
def test_the_sde_rule_gives_the_worked_example(
    rows: int, tokens: float, kappa: float, lr: float, betas: tuple[float, float], epsilon: float
) -> None:
    rule = ScalingSection(base_rows=256, base_tokens=13e9)
    found = scale(BASE.model_copy(update={"scaling": rule}), shape(rows, tokens))
    assert found.kappa == pytest.approx(kappa, rel=5e-3)
    assert found.optim.lr / BASE.lr == pytest.approx(lr, rel=6e-3)
    assert found.optim.betas == pytest.approx(betas, abs=1e-3)
    assert found.optim.epsilon / BASE.epsilon == pytest.approx(epsilon, rel=6e-3)
    # lr x lambda is what a weight loses per step: sqrt(kappa) of each.
    assert found.kappa is not None
    assert found.optim.weight_decay == pytest.approx(BASE.weight_decay * found.kappa)


def test_without_a_rule_or_at_the_base_nothing_changes() -> None:
    assert scale(BASE, shape(512, 1e9)).optim is BASE
    for rule in ("sde", "complete", "marin"):
        given = BASE.model_copy(update={"scaling": ScalingSection(rule=rule)})
        found = scale(given, shape(512, 1e9)).optim
        for key in ("lr", "betas", "epsilon", "weight_decay"):
            assert getattr(found, key) == pytest.approx(getattr(BASE, key)), (rule, key)


def test_complete_is_the_sde_rule_with_gamma_one() -> None:
    settings: dict[str, Any] = {"base_rows": 64, "base_tokens": 1e9}
    one = BASE.model_copy(update={"scaling": ScalingSection(rule="complete", **settings)})
    other = BASE.model_copy(update={"scaling": ScalingSection(rule="sde", gamma=1.0, **settings)})
    found = scale(one, shape(128, 8e9))
    assert found.optim.lr == pytest.approx(BASE.lr * math.sqrt(2 / 8), rel=1e-4)
    assert found.optim == scale(other, shape(128, 8e9)).optim.model_copy(update={"scaling": one.scaling})


def test_marin_keeps_beta1_and_clips_beta2() -> None:
    rule = ScalingSection(rule="marin", base_rows=64, base_tokens=2.5e9)
    found = scale(BASE.model_copy(update={"scaling": rule}), shape(1024, 2.5e10)).optim
    assert found.betas == (0.9, 0.9)
    assert found.lr == pytest.approx(BASE.lr * 4 * 10**-0.3, rel=1e-4)
    assert found.epsilon == pytest.approx(BASE.epsilon * math.sqrt(10 / 16), rel=1e-4)
    assert found.weight_decay == BASE.weight_decay


@pytest.mark.parametrize(
    ("parameters", "tokens", "lr", "batch"),
    [(1e9, 100e9, 1.63e-3, 1.1e6), (3e9, 1e12, 1.51e-3, 4.1e6), (7e9, 2e12, 1.02e-3, 6.1e6)],
)
def test_step_law(parameters: float, tokens: float, lr: float, batch: float) -> None:
    assert step_law_lr(int(parameters), tokens) == pytest.approx(lr, rel=0.01)
    assert step_law_batch_tokens(tokens) == pytest.approx(batch, rel=0.02)


def test_a_rule_outside_of_its_range_is_said() -> None:
    rule = ScalingSection(base_rows=64, critical_steps=1000)
    given = BASE.model_copy(update={"scaling": rule})
    one = shape(1024, 1024 * LENGTH * 100)
    said = " ".join(scale(given, one).warnings)
    assert "16 times the base's" in said and f"{critical_rows(one, 1000)} rows" in said and "betas" in said
    assert scale(given, shape(128, 128 * LENGTH * 2000)).warnings == ()


def test_what_scales_step_laws_rate_again_is_said() -> None:
    law = "optim.scaling.rule=step_law"
    for overrides, said in (
        (["optim.matrix_lr_multiplier=0.5"], "gives matrices 0.5 of it"),
        (["model.transfer={width: 64, layers: 2}", "model.tied_head=false"], "leave one out"),
        (["optim.matrix_lr_multiplier=1"], ""),
    ):
        config = load_config(Path("configs/sigmoid/demo.yaml"), [law, *overrides])
        model = families["sigmoid"].build(config.model.resolved(vocabulary=64, sequence_length=16))
        found = " ".join(resolve(config, model).warnings)
        assert said in found and bool(said) == ("step_law's rate is" in found)


def decoder(transfer: Transfer | None, width: int, layers: int) -> Any:
    family = families["sigmoid"]
    config = family.config(
        layers=layers, width=width, heads=4, tied_head=False, initialisation="small", transfer=transfer
    )
    return config.resolved(vocabulary=64, sequence_length=16)


def test_a_model_of_the_base_size_is_unchanged_by_the_transfer() -> None:
    plain, carried = (
        families["sigmoid"].build(decoder(transfer, 32, 2))
        for transfer in (None, Transfer(width=32, layers=2))
    )
    for model in (plain, carried):
        initialise(model, seed=1)
    tokens = torch.arange(16)[None]
    assert torch.equal(plain(tokens), carried(tokens))
    optim = OptimSection(lr=0.01, matrix_lr_multiplier=0.5, weight_decay=0.01)
    ours, theirs = (
        settings_by_name(model, optim, transfer)
        for model, transfer in ((plain, None), (carried, Transfer(width=32, layers=2)))
    )
    assert ours == theirs


def settings_by_name(
    model: LanguageModel, optim: OptimSection, transfer: Transfer | None = None
) -> dict[str, tuple[float, ...]]:
    """(peak rate, epsilon, weight decay) of every parameter of a model of width 32 and two layers."""
    named = dict(model.named_parameters())
    groups = parameter_groups(named.items(), model.declared, optim, 32, layers=2, transfer=transfer)
    where = {id(parameter): group for group in groups for parameter in group["params"]}
    keys = ("peak_lr", "eps", "weight_decay")
    return {name: tuple(where[id(p)][key] for key in keys) for name, p in named.items()}


def test_an_untied_head_has_the_embeddings_factor_only_if_it_is_its_own() -> None:
    model = families["sigmoid"].build(decoder(None, 32, 2))
    for head in (1.0, 3.0):
        optim = OptimSection(lr=0.01, multipliers=MultiplierSection(embedding=3.0, head=head))
        found = settings_by_name(model, optim)
        assert found["embedding.weight"][0] == 0.03
        assert found["head.weight"][0] == pytest.approx(0.01 * head)


def gradient_sizes(width: int) -> dict[str, float]:
    """RMS of the gradients by type, after three updates (at the start, heads do not yet pull the gains that they
    share the same way); heads have a width of 16."""
    transfer = Transfer(width=64, layers=2)
    config = families["trimodal"].config(
        layers=2, width=width, heads=width // 16, norm="pre", transfer=transfer
    )
    model: Any = families["trimodal"].build(config.resolved(vocabulary=256, sequence_length=32))
    initialise(model, seed=1)
    optim = OptimSection(lr=3e-3, weight_decay=0.0)
    optimizer = torch.optim.AdamW(
        parameter_groups(model.named_parameters(), model.declared, optim, width, layers=2, transfer=transfer)
    )
    tokens = torch.randint(256, (8, 32), generator=torch.Generator().manual_seed(0))
    tokens[:, 1::2] = tokens[:, ::2]
    for step in range(4):
        optimizer.zero_grad()
        logits = model.head(model(tokens.roll(1, 1)))
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
        if step < 3:
            optimizer.step()
    found: dict[str, list[torch.Tensor]] = {}
    for name, parameter in model.named_parameters():
        kind = transfer_type(
            name, "head" if name.startswith("head.") else parameter_type(model.declared[name])
        )
        assert parameter.grad is not None
        found.setdefault(kind, []).append(parameter.grad.flatten())
    return {kind: float(torch.cat(parts).square().mean().sqrt()) for kind, parts in found.items()}


def test_epsilons_follow_the_gradients_of_wider_models() -> None:
    """Adam's epsilon is to stay the same share of the gradients' size, of every type of tensor."""
    base, wide = gradient_sizes(64), gradient_sizes(256)
    table = multipliers(Transfer(width=64, layers=2), width=256, layers=2)
    assert set(base) == set(table)
    for kind, ratio in ((kind, wide[kind] / base[kind]) for kind in base):
        assert 0.5 < ratio / table[kind].epsilon < 2.2, (kind, ratio)


def test_the_table_of_complete_d_p() -> None:
    table = multipliers(Transfer(width=64, layers=4, alpha=0.5), width=256, layers=16)
    assert table["matrix"].deviation == 0.5 and table["matrix"].lr == pytest.approx(0.25 * 0.5)
    assert table["matrix"].epsilon == pytest.approx(0.25 * 0.5)
    assert table["vector"].lr == pytest.approx(0.5)
    assert table["embedding"].lr == 1 and table["embedding"].epsilon == 0.25
    assert table["qk_norm"].lr == pytest.approx(0.5) and table["qk_norm"].epsilon == pytest.approx(0.5)
    assert table["final_norm"].lr == 1 and table["final_norm"].epsilon == 0.25
    assert table["head"].deviation == 0.25


def test_groups_follow_type_and_depth() -> None:
    config = decoder(Transfer(width=16, layers=2), 32, 4)
    model = families["sigmoid"].build(config)
    optim = OptimSection(
        lr=0.01, depth_multipliers=(1.0, 4.0), multipliers=MultiplierSection(head=0.5), weight_decay=0.01
    )
    groups = parameter_groups(
        model.named_parameters(), model.declared, optim, 32, layers=4, transfer=config.transfer
    )
    where = {id(parameter): group for group in groups for parameter in group["params"]}
    found = {name: where[id(parameter)] for name, parameter in model.named_parameters()}
    assert found["embedding.weight"]["peak_lr"] == 0.01
    assert found["head.weight"]["peak_lr"] == pytest.approx(0.01 * 0.5 / 2)
    rates = [found[f"blocks.{layer}.mlp.up.weight"]["peak_lr"] for layer in range(4)]
    assert rates == pytest.approx([0.005 * m for m in (1, 2, 3, 4)])
    assert all(group["weight_decay"] * group["peak_lr"] in (0, pytest.approx(0.01)) for group in groups)


def test_activations_keep_their_scale_with_the_transfer() -> None:
    """The updates of one step move the logits of a wide and deep model about as much as the base's."""
    moved = []
    for width, layers in ((32, 2), (256, 8)):
        torch.manual_seed(0)
        config = decoder(Transfer(width=32, layers=2), width, layers)
        model: Any = families["sigmoid"].build(config)
        initialise(model, seed=1)
        optim = OptimSection(lr=1e-3, weight_decay=0.0)
        groups = parameter_groups(
            model.named_parameters(), model.declared, optim, width, layers=layers, transfer=config.transfer
        )
        optimizer = torch.optim.AdamW(groups)
        tokens = torch.arange(64).view(4, 16)
        before = model.head(model(tokens))
        torch.nn.functional.cross_entropy(before.flatten(0, 1), tokens.flatten()).backward()
        optimizer.step()
        moved.append(float((model.head(model(tokens)) - before).detach().square().mean().sqrt()))
    assert 0.5 < moved[1] / moved[0] < 2


def test_config_errors_name_the_key() -> None:
    overrides = [
        "optim.scaling.rule=sd",
        "optim.scaling.gama=1",
        "model.transfer.width=64",
        "model.tied_head=true",
    ]
    with pytest.raises(ConfigError) as error:
        load_config(Path("configs/sigmoid/demo.yaml"), overrides)
    text = str(error.value)
    assert "optim.scaling.rule = sd" in text and "optim.scaling.gama: no such setting" in text
    assert "model.transfer.layers: missing" in text


def test_a_transfer_with_a_tied_head_is_refused() -> None:
    overrides = ["model.transfer.width=64", "model.transfer.layers=2", "model.tied_head=true"]
    with pytest.raises(ConfigError, match="model.transfer = .*tied head"):
        load_config(Path("configs/sigmoid/demo.yaml"), overrides)


def test_it_survives_the_run_folder() -> None:
    overrides = ["optim.scaling.base_rows=4", "model.transfer={width: 64, layers: 2}"]
    config = load_config(Path("configs/sigmoid/demo.yaml"), overrides)
    assert config_from_dict(config.to_dict(), "again") == config
    assert sde(config.optim, 4.0).lr == 2 * config.optim.lr


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["optim.scaling={rule: sde}"], "optim.scaling: rule sde changes nothing without a base"),
        (
            ["optim.scaling={rule: step_law, base_rows: 4}"],
            "optim.scaling.base_rows = 4: rule step_law does not",
        ),
        (
            ["optim.multipliers.head=2", "model.tied_head=true"],
            "optim.multipliers.head = 2.0: the head is the",
        ),
        (["optim.scaling=5"], "optim.scaling = 5: should be settings of its own: {key: value}"),
    ],
)
def test_settings_without_effect_are_refused(overrides: list[str], expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(Path("configs/sigmoid/demo.yaml"), overrides)
    assert expected in str(error.value)
