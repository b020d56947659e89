"""What every mixer must hold, whichever there are: adding one to `HybridConfig` adds these tests.

Each is tested as a model of its own, and beside attention. The example mixer, of outside of the tree, is one of them.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models import configs, families
from models.declared import (
    Crossing,
    DeclarationError,
    crossings_of,
    declared,
    mixers,
    splits_of,
    undivided_mixers,
)
from models.hybrid.config import MIXERS, HybridConfig
from models.hybrid.mixers import GRUMixer, LSTMMixer, Mamba2Mixer, MixerSettings, Shape
from models.initialise import Normal, initialise
from models.layers.decoder import attention_shape
from models.layers.language_model import LanguageModel
from models.layers.recipes import recipe
from models.pararnn.config import NewtonConfig
from models.sharding import Channels, Column, Row, Shared
from models.sigmoid.mixer import SigmoidAttention
from pretrain.config import config_from_dict, load_config
from pretrain.errors import ConfigError
from pretrain.parallel.context import check_served

EXAMPLE = "gated_linear_attention:GatedLinear"
NAMES = (*MIXERS, EXAMPLE)
WIDTH, VOCABULARY, TIME = 32, 50, 24


@pytest.fixture(autouse=True)
def path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(Path("examples/gated_linear_attention").resolve()))
    monkeypatch.setenv("TRIPTYCH_MODULES", "gated_linear_attention")
    yield
    sys.modules.pop(EXAMPLE.partition(":")[0], None)


def small_settings(name: str) -> dict[str, Any]:
    """What a mixer must be told, and no more: whole numbers are 4."""
    if ":" in name:
        return {"heads": 4}
    return {
        one.name: 4
        for one in dataclasses.fields(MIXERS[name])
        if one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING
    }


def small_config(*names: str, layers: int | None = None, **changes: Any) -> HybridConfig:
    from pydantic import TypeAdapter

    values: dict[str, Any] = {
        "mixers": names,
        "layers": layers or len(names),
        "width": WIDTH,
        "mlp_width": 64,
    }
    values["own"] = {name: small_settings(name) for name in names if ":" in name}
    values |= {name: small_settings(name) for name in names if ":" not in name}
    if set(names) == {"mamba2"}:
        del values["mlp_width"]  # whose layers have no feed-forward part
    config: HybridConfig = TypeAdapter(HybridConfig).validate_python({**values, **changes})
    assert config.problems(TIME) == []
    return config.resolved(vocabulary=VOCABULARY, sequence_length=TIME)


def small_model(*names: str, **changes: Any) -> LanguageModel:
    model = families["hybrid"].build(small_config(*names, **changes))
    initialise(model, seed=1)
    return model.double().eval()


def some_tokens(rows: int) -> Tensor:
    return torch.randint(VOCABULARY, (rows, TIME), generator=torch.Generator().manual_seed(0))


STACKS = [(name,) for name in NAMES] + [(name, "sigmoid") for name in NAMES if name != "sigmoid"]


@pytest.mark.parametrize("names", STACKS, ids="+".join)
def test_a_token_sees_nothing_that_follows(names: tuple[str, ...]) -> None:
    model, tokens = small_model(*names), some_tokens(2)
    changed = tokens.clone()
    changed[:, 15:] = (changed[:, 15:] + 1) % VOCABULARY
    torch.testing.assert_close(model(tokens)[:, :15], model(changed)[:, :15], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("names", STACKS, ids="+".join)
def test_a_neighbour_document_changes_nothing(names: tuple[str, ...]) -> None:
    model, tokens = small_model(*names), some_tokens(1)
    ids = (torch.arange(TIME) >= 9).long()[None]
    positions = torch.cat((torch.arange(9), torch.arange(TIME - 9)))[None]
    packed = model(tokens, ids, positions)
    torch.testing.assert_close(packed[:, :9], model(tokens[:, :9]), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(packed[:, 9:], model(tokens[:, 9:]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("names", STACKS, ids="+".join)
def test_decoding_with_a_state_equals_the_whole(names: tuple[str, ...]) -> None:
    """A prompt at once, then token by token, then several again."""
    model, tokens = small_model(*names), some_tokens(2)
    state = model.new_state(2, TIME, dtype=torch.float64)
    cuts = [0, 7, *range(8, 15), 20, TIME]
    with torch.no_grad():
        pieces = [model(tokens[:, a:b], state=state) for a, b in itertools.pairwise(cuts)]
        torch.testing.assert_close(torch.cat(pieces, 1), model(tokens), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", NAMES)
def test_flops_count_every_projection_and_little_else(name: str) -> None:
    """Two per weight of every linear layer; the rest is what positions do with each other."""
    model, config = small_model(name), small_config(name)
    linear = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    forward = families["hybrid"].flops_per_token(config, TIME) / 3
    assert 2 * linear <= forward <= 2.1 * 2 * linear


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_is_declared(name: str) -> None:
    model = small_model(name)
    assert set(model.declared) == {parameter for parameter, _ in model.named_parameters()}
    assert {one.group for one in model.declared.values()} <= {
        "embedding",
        "attention",
        "recurrence",
        "mlp",
        "norm",
        "head",
    }


@pytest.mark.parametrize("name", NAMES)
def test_what_a_mixer_is_divided_into_has_a_half(name: str) -> None:
    """Every weight of the mixer is divided, or said to be whole; two parts have equal shapes."""
    model = small_model(name)
    assert not undivided_mixers(model)
    table = splits_of(model)
    (mixer,) = mixers(model)
    prefix = next(found for found, module in model.named_modules() if module is mixer)
    for parameter_name, parameter in mixer.named_parameters():
        owner, _, last = f"{prefix}.{parameter_name}".rpartition(".")
        split = table.get(owner)
        assert split is not None, f"{owner} is neither divided nor Shared()"
        if isinstance(split, Shared):
            continue
        dimension = (
            split.dimensions[last] if isinstance(split, Channels) else {Column: 0, Row: 1}[type(split)]
        )
        assert parameter.shape[dimension] % 2 == 0, parameter_name


@pytest.mark.parametrize("name", NAMES)
def test_settings_and_module_name_the_same_ways(name: str) -> None:
    """The layout is checked by the settings, which know no torch, and made by what the module declares."""
    config = small_config(name)
    settings = config.settings(name)
    ways = {way for _, crossing in crossings_of(small_model(name)) for way in crossing.ways}
    assert set(settings.ways) == ways - {"halo"}
    assert (settings.reach > 0) == ("halo" in ways)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("initialisation", ["fan_in", "small"])
def test_first_weights_are_drawn_by_name(name: str, initialisation: str) -> None:
    """A layer's weights do not depend on what stands around it; projections back are smaller in `small`."""
    alone = small_model(*[name] * (2 if initialisation == "small" else 1), initialisation=initialisation)
    beside = small_model(name, name, initialisation="fan_in")
    first = dict(alone.named_parameters())
    if initialisation == "fan_in":
        for parameter_name, parameter in beside.named_parameters():
            if parameter_name.startswith("blocks.0."):
                assert torch.equal(parameter, first[parameter_name]), parameter_name
        return
    drawn = {n: p for n, p in first.items() if n.endswith(".weight") and p.ndim == 2}
    drawn = {n: p for n, p in drawn.items() if isinstance(alone.declared[n].rule, Normal)}
    back = {n: p for n, p in drawn.items() if n.endswith((".out.weight", ".down.weight"))}
    assert len(back) == (2 if name == "mamba2" else 4)
    assert len(drawn) - len(back) >= 2 + len(back), "embedding, head, and more into the branches than out"
    for parameter_name, parameter in drawn.items():
        expected = 0.02 / len(back) ** 0.5 if parameter_name in back else 0.02
        assert parameter.std().item() == pytest.approx(expected, rel=0.2), parameter_name


def test_patterns_repeat_and_lists_are_taken_as_they_are() -> None:
    pattern = small_config("pararnn_gru", "sigmoid", layers=5)
    assert pattern.layer_mixers == ("pararnn_gru", "sigmoid", "pararnn_gru", "sigmoid", "pararnn_gru")
    kinds = [type(mixer).__name__ for mixer in mixers(families["hybrid"].build(pattern))]
    assert kinds == ["RecurrentMixer", "SigmoidAttention"] * 2 + ["RecurrentMixer"]


@pytest.mark.parametrize(
    ("name", "family", "own"),
    [
        ("sigmoid", "sigmoid", {"positions": "none", "norm": "pre", "tied_head": False}),
        ("softmax", "softmax", {"positions": "none", "norm": "pre", "tied_head": False}),
        ("pararnn_gru", "pararnn", {"cell": "gru"}),
        ("pararnn_lstm", "pararnn", {"cell": "lstm"}),
        ("mamba2", "mamba2", {}),
    ],
)
def test_a_pattern_of_one_is_its_family(name: str, family: str, own: dict[str, Any]) -> None:
    """The same parameters, weights and outputs, bit for bit."""
    values = {**small_settings(name), **own, "layers": 2, "width": WIDTH}
    if family != "mamba2":
        values["mlp_width"] = 64
    config = configs[family](**values).resolved(vocabulary=VOCABULARY, sequence_length=TIME)
    plain = families[family].build(config)
    initialise(plain, seed=1)
    stacked = small_model(name, layers=2)
    plain = plain.double().eval()
    assert all(
        a == b and torch.equal(p, q)
        for (a, p), (b, q) in zip(plain.named_parameters(), stacked.named_parameters(), strict=True)
    )
    assert torch.equal(plain(some_tokens(2)), stacked(some_tokens(2)))


class Undeclared(nn.Module):
    group = "recurrence"

    def __init__(self, settings: MixerSettings, shape: Shape) -> None:
        super().__init__()
        self.conv = nn.Conv1d(shape.width, shape.width, 3)


def test_what_declares_nothing_is_refused_by_name() -> None:
    model = small_model("pararnn_gru")
    block: Any = model.blocks[0]
    block.mixer = Undeclared(MixerSettings(), small_config("sigmoid").shape)
    assert undivided_mixers(model) == ["Undeclared"]
    with pytest.raises(DeclarationError, match="Undeclared does not declare `crossing`"):
        list(crossings_of(model))
    with pytest.raises(
        DeclarationError, match="Conv1d: `initial_rules` does not say how blocks.0.mixer.conv.weight"
    ):
        declared(model, recipe("fan_in", 2))


def test_a_known_layer_inside_does_not_speak_for_its_mixer() -> None:
    """A convolution that says how it crosses, in a mixer that does not."""
    model = small_model("pararnn_gru")
    block: Any = model.blocks[0]
    conv = block.mixer.conv
    block.mixer = Undeclared(MixerSettings(), small_config("sigmoid").shape)
    block.mixer.conv = conv
    with pytest.raises(DeclarationError, match="Undeclared"):
        list(crossings_of(model))


class Silent(MixerSettings):
    mixer = "tests.models.test_mixers:Undeclared"


def test_settings_that_say_nothing_refuse_every_layout_but_copies() -> None:
    shape, settings = small_config("sigmoid").shape, Silent()
    assert settings.division_problems(shape, 1) == settings.swap_problems(shape, 1) == []
    assert "Silent does not say how it is divided" in settings.division_problems(shape, 2)[0]
    assert "Silent does not say how its positions meet" in settings.swap_problems(shape, 2)[0]
    with pytest.raises(NotImplementedError, match="Silent gives no `products`"):
        settings.products(shape, TIME)


class Unsaid(MixerSettings):
    """Claims to be divided and shared, but its module says nothing of either."""

    mixer = "tests.models.test_mixers:Unspoken"
    ways = ("swap",)

    def products(self, shape: Shape, sequence_length: int) -> float:
        return float(shape.width**2)

    def division_problems(self, shape: Shape, parts: int) -> list[str]:
        return []


class Unspoken(nn.Module):
    group = "recurrence"

    def __init__(self, settings: MixerSettings, shape: Shape) -> None:
        super().__init__()
        self.out = nn.Linear(shape.width, shape.width, bias=False)


class Uncounted(Unsaid):
    def products(self, shape: Shape, sequence_length: int) -> float:
        return MixerSettings.products(self, shape, sequence_length)


class Unmade(Unsaid):
    mixer = "tests.models.test_mixers:Undeclared"


@pytest.mark.parametrize(
    ("settings", "layout", "message"),
    [
        ("Unsaid", {"tensor": 2}, "Unspoken does not declare `splits`"),
        ("Unsaid", {"context": 2}, "Unspoken does not declare `crossing`"),
        ("Uncounted", {}, "Uncounted gives no `products`"),
        ("Unmade", {}, "Conv1d: `initial_rules` does not say how blocks.0.mixer.conv.weight starts"),
    ],
)
def test_what_a_module_leaves_unsaid_is_in_the_report_of_the_config(
    settings: str, layout: dict[str, int], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIPTYCH_MODULES", __name__)
    name = f"{__name__}:{settings}"
    model = {"family": "hybrid", "layers": 2, "width": WIDTH, "vocabulary": 32, "mixers": [name]}
    base = load_config("configs/sigmoid/demo.yaml").to_dict()
    values = {**base, "model": model, "parallel": {"zero": 1, **layout}}
    with pytest.raises(ConfigError) as caught:
        config_from_dict(values, origin="test")
    assert f"model.own.{name}: {message}" in str(caught.value)
    if layout:
        config_from_dict({**values, "parallel": {"zero": 1}}, origin="test")


def test_recurrences_that_are_solved_differently_are_told_by_key() -> None:
    config = HybridConfig(
        mixers=("pararnn_gru", "pararnn_lstm"),
        layers=2,
        width=WIDTH,
        pararnn_gru=GRUMixer(),
        pararnn_lstm=LSTMMixer(newton=NewtonConfig(limit=0.5)),
    )
    ((key, message),) = config.problems(TIME)
    assert key == "pararnn_lstm.newton.limit"
    assert message == "must be 0.01, as pararnn_gru.newton.limit is: one alarm watches all recurrences"


def test_how_recurrences_are_solved_may_change_on_resuming_and_nothing_else() -> None:
    assert small_config("pararnn_gru", "sigmoid").changeable == (
        "pararnn_gru.newton",
        "pararnn_gru.recurrent_clip",
    )
    assert small_config("mamba2", "sigmoid").changeable == ()


def test_a_module_that_nobody_trusts_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "harmful.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    monkeypatch.syspath_prepend(str(tmp_path))
    problems = dict(HybridConfig(mixers=("harmful:Mixer",), layers=1, width=WIDTH).problems(TIME))
    assert "export TRIPTYCH_MODULES=gated_linear_attention,harmful" in problems["mixers"]
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gated_linear_attention:Missing", "has no Missing"),
        ("gated_linear_attention:Column", "is no models.hybrid.mixers.MixerSettings"),
        ("no_such_module:Mixer", "cannot be imported"),
    ],
)
def test_what_is_wrong_with_a_module_is_said(
    name: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIPTYCH_MODULES", "gated_linear_attention,no_such_module")
    problems = dict(HybridConfig(mixers=(name,), layers=1, width=WIDTH).problems(TIME))
    assert message in problems["mixers"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"heads": 3},
            "own.gated_linear_attention:GatedLinear.heads = 3: width 32 does not divide by 3 heads",
        ),
        ({"heads": 0}, "own.gated_linear_attention:GatedLinear.heads = 0: must be at least 1"),
        ({"heads": "four"}, "heads = 'four' should be a whole number"),
        ({"heads": True}, "heads = True should be a whole number"),
        ({"heads": None}, "heads = None should be a whole number"),
        ({"heads": 4, "hads": 1}, "no such setting: hads"),
        ({}, "missing 1 required keyword-only argument: 'heads'"),
    ],
)
def test_settings_of_ones_own_are_checked_in_the_report(settings: dict[str, Any], message: str) -> None:
    model = {"family": "hybrid", "layers": 1, "width": WIDTH, "mixers": [EXAMPLE], "own": {EXAMPLE: settings}}
    base = load_config("configs/sigmoid/demo.yaml").to_dict()
    with pytest.raises(ConfigError) as caught:
        config_from_dict({**base, "model": model}, origin="test")
    assert message in str(caught.value)


class LikeSigmoid(SigmoidAttention):
    def attend(self, *inputs: Any) -> Tensor:
        return inputs[2].relu()


def test_a_way_is_for_the_class_it_was_written_for() -> None:
    """A subclass that computes something else would silently be computed as its parent."""
    shape = attention_shape(configs["sigmoid"](layers=1, width=WIDTH, heads=4))
    check_served(SigmoidAttention(shape, 0.0), SigmoidAttention.crossing, "gather")
    with pytest.raises(
        DeclarationError, match="LikeSigmoid declares 'gather', which is for SigmoidAttention.attend"
    ):
        check_served(LikeSigmoid(shape, 0.0), LikeSigmoid.crossing, "gather")
    with pytest.raises(DeclarationError, match="declares 'ring'"):
        check_served(nn.Identity(), Crossing("forward", ("ring",)), "ring")  # type: ignore[arg-type]
    for name in NAMES:
        for module, crossing in crossings_of(small_model(name)):
            for way in crossing.ways:
                check_served(module, crossing, way)


def test_positions_and_a_constant_state_do_not_go_together() -> None:
    model = small_model("pararnn_gru")
    assert model.constant_state
    model.needs_positions = True
    with pytest.raises(ValueError, match="give positions_BT"):
        model(some_tokens(1), state=model.new_state(1, TIME, dtype=torch.float64))


def test_a_width_that_no_layer_has_is_refused() -> None:
    config = HybridConfig(
        mixers=("mamba2",), layers=1, width=WIDTH, mlp_width=64, mamba2=Mamba2Mixer(heads=4)
    )
    assert ("mlp_width", "64 has no effect: no layer has a feed-forward part") in config.problems(TIME)


@pytest.mark.parametrize(
    ("sigmoid", "message"),
    [
        (
            {"heads": 4, "newton": 3},
            "model.sigmoid.newton: no such setting; model.sigmoid has heads, kv_heads",
        ),
        ({"heads": 4, "hads": 3}, "model.sigmoid.hads: no such setting; did you mean model.sigmoid.heads?"),
    ],
)
def test_a_key_of_another_mixer_is_told_once(sigmoid: dict[str, Any], message: str) -> None:
    model = {"family": "hybrid", "layers": 1, "width": WIDTH, "mixers": ["sigmoid"], "sigmoid": sigmoid}
    base = load_config("configs/sigmoid/demo.yaml").to_dict()
    with pytest.raises(ConfigError) as caught:
        config_from_dict({**base, "model": model}, origin="test")
    assert message in str(caught.value)


def test_gated_linear_attention_is_a_sum_over_pairs() -> None:
    """The recurrence against its closed form: what reaches t from s has decayed by all
    factors after s."""
    example = import_module("gated_linear_attention")
    settings = example.GatedLinear(heads=2, key_width=3)
    mixer = example.GatedLinearAttention(settings, small_config("sigmoid").shape)
    generator = torch.Generator().manual_seed(0)
    q, k, v, decay = (
        torch.randn(2, 7, 2, width, generator=generator, dtype=torch.float64) for width in (3, 3, 16, 3)
    )
    decay = -decay.square()
    passed = decay.cumsum(1)
    between = (passed[:, :, None] - passed[:, None]).exp()  # (B, t, s, H, K)
    scores = (q[:, :, None] * k[:, None] * between).sum(-1) * 3**-0.5
    scores = scores * torch.ones(7, 7, dtype=torch.float64).tril()[None, :, :, None]
    expected = torch.einsum("btsh,bshv->bthv", scores, v)
    torch.testing.assert_close(mixer.scan(q, k, v, decay, None, None)[0], expected, rtol=1e-10, atol=1e-10)
