"""The recurrent families: counts, decoding, packing, gradients, first weights, cost, and what is refused.

Shape suffixes: B batch, T time, C model width.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kernels.newton_rnn import Solver
from models import families
from models.declared import splits_of
from models.initialise import initialise
from models.layers.language_model import LanguageModel
from models.layers.loss import token_cross_entropy
from models.pararnn.config import NewtonConfig
from models.sharding import Channels

VOCABULARY, TIME = 61, 24
SMALL: dict[str, dict[str, Any]] = {
    "gru": {"family": "pararnn", "cell": "gru", "layers": 2, "width": 32},
    "lstm": {"family": "pararnn", "cell": "lstm", "layers": 2, "width": 32},
    "elman": {"family": "pararnn", "cell": "elman", "layers": 2, "width": 32, "heads": 2},
    "mixer": {
        "family": "pararnn",
        "cell": "gru",
        "layers": 1,
        "width": 32,
        "block": "mixer",
        "mlp_width": 0,
        "initialisation": "torch",
    },
    "mamba2": {"family": "mamba2", "layers": 2, "width": 32, "heads": 4, "state_width": 8, "chunk": 5},
}
PAPER = {
    ("gru", "mixer", 3): 3_840,
    ("lstm", "mixer", 3): 3_968,
    ("gru", "mixer", 128): 19_840,
    ("lstm", "mixer", 128): 19_968,
    ("gru", "full", 128): 32_704,
    ("lstm", "full", 128): 32_832,
    ("gru", "full", 10): 17_600,
    ("lstm", "full", 10): 17_728,
    ("gru", "full", 5): 16_960,
    ("lstm", "full", 5): 17_088,
}
PUBLISHED: dict[str, tuple[dict[str, Any], float]] = {
    "pararnn 400m": ({"cell": "gru", "layers": 24, "width": 1024}, 406e6),
    "pararnn 1b": ({"cell": "lstm", "layers": 24, "width": 2048}, 1.42e9),
    "pararnn 3b": ({"cell": "gru", "layers": 32, "width": 2560, "heads": 2}, 2.90e9),
    "pararnn 7b": ({"cell": "lstm", "layers": 32, "width": 4096}, 6.76e9),
    "mamba2 400m": ({"layers": 48, "width": 1024, "heads": 32, "state_width": 16}, 409e6),
    "mamba2 1b": ({"layers": 48, "width": 2048, "heads": 64, "state_width": 16}, 1.43e9),
    "mamba2 3b": ({"layers": 64, "width": 2560, "heads": 80}, 2.83e9),
    "mamba2 7b": ({"layers": 64, "width": 4096, "heads": 128}, 6.96e9),
}


def small_config(name: str, **changes: Any) -> Any:
    settings = {**SMALL[name], **changes}
    config = families[settings["family"]].config(**settings)
    return config.resolved(vocabulary=VOCABULARY, sequence_length=TIME)


def small_model(name: str, **changes: Any) -> LanguageModel:
    config = small_config(name, **changes)
    model = families[config.family].build(config)
    initialise(model, seed=0)
    assert isinstance(model, LanguageModel)
    return model.double()


def some_tokens(batch: int = 2, time: int = TIME, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCABULARY, (batch, time), generator=torch.Generator().manual_seed(seed))


def count(family: str, vocabulary: int, **settings: Any) -> int:
    config = families[family].config(**settings).resolved(vocabulary=vocabulary, sequence_length=2048)
    with torch.device("meta"):
        model = families[family].build(config)
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(("case", "expected"), PAPER.items(), ids=str)
def test_parameters_of_the_papers_task_models(case: tuple[str, str, int], expected: int) -> None:
    cell, block, vocabulary = case
    assert count("pararnn", vocabulary, cell=cell, block=block, layers=1, width=64, mlp_width=0) == expected


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_of_the_papers_language_models(name: str) -> None:
    settings, expected = PUBLISHED[name]
    assert count(name.split()[0], 50432, **settings) == pytest.approx(expected, rel=4e-3)


@pytest.mark.parametrize("name", SMALL)
def test_decoding_equals_the_full_forward_in_constant_memory(name: str) -> None:
    model, tokens = small_model(name), some_tokens()
    with torch.no_grad():
        full = model(tokens)
        state = model.new_state(2, 0, dtype=torch.float64)
        before = [layer.bytes for layer in state]
        pieces = [model(tokens[:, :9], state=state), model(tokens[:, 9:14], state=state)]
        pieces += [model(tokens[:, i : i + 1], state=state) for i in range(14, TIME)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), full, rtol=1e-9, atol=1e-9)
    assert [layer.bytes for layer in state] == before
    assert all(tensor._base is None for layer in state for tensor in vars(layer).values()), (
        "a view holds more"
    )


@pytest.mark.parametrize("name", SMALL)
def test_packed_documents_equal_separate_ones_gradients_too(name: str) -> None:
    model = small_model(name)
    lengths = (5, 1, 11, 7)
    documents = [some_tokens(1, length, seed=length) for length in lengths]
    segment_ids = torch.cat([torch.full((1, n), i) for i, n in enumerate(lengths)], dim=1)
    packed = model(torch.cat(documents, dim=1), segment_ids)
    separate = torch.cat([model(document) for document in documents], dim=1)
    torch.testing.assert_close(packed, separate, rtol=1e-9, atol=1e-9)
    weights = torch.randn_like(packed)
    leaves = [p for n, p in model.named_parameters() if n != "head.weight"]
    grads = [torch.autograd.grad((out * weights).sum(), leaves) for out in (packed, separate)]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", SMALL)
def test_padded_rows_decode_as_each_alone(name: str) -> None:
    """Prompts of different lengths in one batch: what lies before a prompt is a document of its own."""
    model = small_model(name)
    prompts, following = [some_tokens(1, n, seed=n) for n in (2, 7)], some_tokens(2, 4, seed=9)
    tokens, ids = torch.zeros(2, 7, dtype=torch.long), torch.zeros(2, 7, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        tokens[row, -prompt.shape[1] :], ids[row, -prompt.shape[1] :] = prompt[0], 1
    with torch.no_grad():
        state = model.new_state(2, 0, dtype=torch.float64)
        outputs = [model(tokens, ids, state=state)[:, -1:]]
        outputs += [model(following[:, i : i + 1], state=state) for i in range(4)]
        alone = [model(torch.cat((p, f[None]), 1))[:, -5:] for p, f in zip(prompts, following, strict=True)]
    torch.testing.assert_close(torch.cat(outputs, 1), torch.cat(alone), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", SMALL)
def test_first_loss_and_gradients(name: str) -> None:
    model, tokens = small_model(name), some_tokens(8)
    loss, _ = token_cross_entropy(
        model.head, model(tokens), tokens.roll(-1, 1), torch.ones_like(tokens), chunk_tokens=10**6
    )
    assert loss.item() / tokens.numel() == pytest.approx(math.log(VOCABULARY) + 0.3, abs=0.6)
    loss.backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.abs().max() > 0, parameter_name


@pytest.mark.parametrize("name", SMALL)
def test_bf16_stays_near(name: str) -> None:
    model, tokens = small_model(name), some_tokens()
    exact = model(tokens)
    hidden = model.bfloat16()(tokens)
    assert hidden.dtype == torch.bfloat16
    assert (hidden.double() - exact).norm() / exact.norm() < 0.03


@pytest.mark.parametrize("initialisation", ["fan_in", "small", "torch"])
@pytest.mark.parametrize("name", ["lstm", "mamba2"])
def test_first_weights_follow_the_rule(name: str, initialisation: str) -> None:
    model = small_model(name, initialisation=initialisation, width=64, layers=4)
    values = dict(model.named_parameters())
    back = 0.02 / (8 if name == "lstm" else 4) ** 0.5
    scale = {"fan_in": 1.0, "small": 0.0, "torch": 3**-0.5}[initialisation]
    width = 64 if name == "lstm" else 128
    deviations = {
        "embedding.weight": {"fan_in": 0.125, "small": 0.02, "torch": 1.0}[initialisation],
        "head.weight": scale * 64**-0.5 or 0.02,
        "blocks.1.mixer.gate.weight": scale * 64**-0.5 or 0.02,
        "blocks.1.mixer.out.weight": scale * width**-0.5 or back,
        "blocks.1.mixer.conv.weight": 0.5 * 3**-0.5,
    }
    if name == "lstm":
        deviations |= {"blocks.1.mixer.cell.input": 0.25, "blocks.1.mixer.cell.recurrent": 0.125}
    for key, deviation in deviations.items():
        assert values[key].std().item() == pytest.approx(deviation, rel=0.12), key
    if name == "mamba2":
        rates, steps = values["blocks.1.mixer.log_rate"].exp(), values["blocks.1.mixer.step_bias"]
        assert rates.min() >= 1 and rates.max() <= 16
        assert (
            torch.nn.functional.softplus(steps).min() >= 1e-3
            and torch.nn.functional.softplus(steps).max() <= 0.1
        )
    assert values["blocks.0.mixer_norm.weight"].eq(1).all()


def test_first_weights_of_dclm_shrink_with_depth_on_the_way_back() -> None:
    model = small_model("gru", initialisation="dclm", width=64, layers=4)
    blocks: Any = model.blocks
    for layer, block in enumerate(blocks):
        for weight in (block.mixer.out.weight, block.mlp.down.weight):
            deviation = (weight.shape[1] * 2 * (layer + 1)) ** -0.5
            assert weight.std().item() == pytest.approx(deviation, rel=0.05)
            assert weight.abs().max().item() == pytest.approx(3 * deviation)
        assert block.mixer.gate.weight.std().item() == pytest.approx(1 / 8, rel=0.05)
    assert model.embedding.weight.std().item() == pytest.approx(1 / 8, rel=0.05)


@pytest.mark.parametrize("name", SMALL)
def test_every_weight_is_divided(name: str) -> None:
    """All that is within a mixer or a feed-forward layer once; the norms of the stream and the skip's factor are
    replicated."""
    model = small_model(name)
    table = splits_of(model)
    for parameter_name, parameter in model.named_parameters():
        owner, _, last = parameter_name.rpartition(".")
        replicated = last == "skip" or owner.endswith(("mixer_norm", "mlp_norm")) or owner == "norm"
        assert (owner in table) == (not replicated), parameter_name
        split = table.get(owner)
        if isinstance(split, Channels):
            assert parameter.shape[split.dimensions[last]] % 2 == 0, parameter_name


@pytest.mark.parametrize("name", SMALL)
def test_every_parameter_has_a_group(name: str) -> None:
    model = small_model(name)
    assert set(model.declared) == {parameter for parameter, _ in model.named_parameters()}
    groups = {one.group for one in model.declared.values()}
    expected = {"embedding", "recurrence", "mlp", "norm", "head"}
    missing = {"mixer": {"mlp", "norm"}, "mamba2": {"mlp"}}.get(name, set())
    assert groups == expected - missing


@pytest.mark.parametrize("name", ["gru", "lstm", "elman", "mixer"])
def test_flops_equal_those_that_torch_counts(name: str) -> None:
    model, config, tokens = small_model(name), small_config(name), some_tokens(3)
    with FlopCounterMode(display=False) as counter:
        model.head(model(tokens))
    counted = counter.get_total_flops() / tokens.numel()
    assert families[config.family].flops_per_token(config, TIME) == pytest.approx(3 * counted)


def test_flops_of_mamba2_by_hand() -> None:
    by_hand = 3 * 2 * (2 * (32 * (3 * 64 + 16 + 4) + 2 * 64 * 8) + 32 * VOCABULARY)
    assert families["mamba2"].flops_per_token(small_config("mamba2"), TIME) == by_hand


def test_every_problem_is_named() -> None:
    family = families["pararnn"]
    bad = family.config(
        cell="gur",
        layers=0,
        width=48,
        heads=7,
        conv_width=0,
        mlp_width=-1,
        recurrent_clip=-0.5,
        newton=NewtonConfig(iterations=0, limit=0.0),
    )
    assert [key for key, _ in bad.problems(0)] == [
        "layers",
        "conv_width",
        "recurrent_clip",
        "cell",
        "newton.iterations",
        "newton.limit",
        "sequence_length",
        "mlp_width",
        "heads",
    ]
    assert ("cell", "'gur' is unknown; use gru or lstm or elman") in bad.problems(0)
    assert (
        "heads",
        "width 48 does not divide by 7 heads; use 1, 2, 3, 4, 6, 8, 12, 16, 24 or 48",
    ) in bad.problems(1)
    mixer = family.config(cell="gru", layers=1, width=16, block="mixer", recurrent_clip=math.inf)
    assert [key for key, _ in mixer.problems(8)] == ["mlp_width", "recurrent_clip"]
    mamba = families["mamba2"].config(layers=1, width=48, heads=7, groups=3, kernel="cuda")
    assert [key for key, _ in mamba.problems(8)] == ["kernel", "heads", "groups"]


@pytest.mark.parametrize("name", SMALL)
def test_good_configs_have_no_problems_and_must_be_resolved(name: str) -> None:
    family = families[SMALL[name]["family"]]
    config = family.config(**SMALL[name])
    assert config.problems(TIME) == []
    with pytest.raises(ValueError, match="resolved"):
        family.build(config)
    assert (
        config.resolved(vocabulary=7, sequence_length=4).resolved(vocabulary=9, sequence_length=4).vocabulary
        == 7
    )


def test_the_solver_is_the_configs() -> None:
    model = small_model("gru", newton=NewtonConfig(method="newton", iterations=5))
    cells = model.cells()
    assert list(cells) == ["blocks.0.mixer.cell", "blocks.1.mixer.cell"]
    solver = cells["blocks.0.mixer.cell"].shape.solver
    assert isinstance(solver, Solver) and (solver.method, solver.iterations) == ("newton", 5)


@pytest.mark.parametrize("name", ["gru", "lstm", "mixer"])
def test_bad_calls_are_told(name: str) -> None:
    model, tokens = small_model(name), some_tokens()
    with pytest.raises(ValueError, match="segment_ids"):
        model(tokens, torch.zeros(2, TIME - 1, dtype=torch.long))
    with pytest.raises(ValueError, match="length 0"):
        model(tokens[:, :0])
    with pytest.raises(ValueError, match="state"):
        model(tokens, state=model.new_state(3, 0, dtype=torch.float64))
