"""The Mamba-2 mixer against its authors' definition, step by step and group by group.

Written from Dao and Gu, "Transformers are SSMs" (the recurrence of section 2, the block of figure 6), and their code
(mamba_ssm/modules/mamba2.py: in_proj's order z, x, B, C, dt; RMSNormGated with group_size = d_ssm // ngroups and
norm_before_gate=False). Every number is a Python loop over time, heads and groups; nothing of `models` is used but the
weights.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from models import families
from models.layers.norm import GatedRMSNorm
from models.mamba2.config import Mamba2Config
from models.mamba2.mixer import Mamba2Mixer
from models.sharding import Part
from pretrain.checkpoint_meta import as_of_today
from tests.pretrain.parallel.threads import run_threads

TIME, ROWS = 13, 2
Array = np.ndarray


def config(groups: int, heads: int = 4, **changes: Any) -> Mamba2Config:
    found = Mamba2Config(
        layers=1, width=8, heads=heads, groups=groups, state_width=3, conv_width=3, chunk=5, norm_epsilon=1e-3
    )
    return replace(found, **changes)


def drawn(mixer: Mamba2Mixer, seed: int = 0) -> Mamba2Mixer:
    generator = torch.Generator().manual_seed(seed)
    for parameter in mixer.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return mixer


def silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


def by_the_authors(mixer: Mamba2Mixer, x_BTC: Array, *, norm_groups: int) -> Array:
    """Position by position, head by head."""
    c = mixer.config
    w = {name: value.detach().numpy() for name, value in mixer.named_parameters()}
    out = np.zeros_like(x_BTC)
    for row, x_TC in enumerate(x_BTC):
        z, u = x_TC @ w["gate.weight"].T, x_TC @ w["input.weight"].T
        maps, step = x_TC @ w["maps.weight"].T, x_TC @ w["step.weight"].T
        u, maps = convolved(u, w, "conv"), convolved(maps, w, "maps_conv")
        per_head, state_width, of_group = c.channels // c.heads, c.state_width, c.heads // c.groups
        for h in range(c.heads):
            state = np.zeros((per_head, state_width))
            for t in range(len(x_TC)):
                dt = math.log1p(math.exp(step[t, h] + w["step_bias"][h]))
                g = h // of_group
                b = maps[t, g * state_width : (g + 1) * state_width]
                c_out = maps[t, (c.groups + g) * state_width : (c.groups + g + 1) * state_width]
                x = u[t, h * per_head : (h + 1) * per_head].copy()
                state = math.exp(-dt * math.exp(w["log_rate"][h])) * state + dt * np.outer(x, b)
                u[t, h * per_head : (h + 1) * per_head] = state @ c_out + w["direct"][h] * x
        gated, size = u * silu(z), c.channels // norm_groups
        for g in range(norm_groups):
            part = gated[:, g * size : (g + 1) * size]
            for t in range(len(part)):
                part[t] /= math.sqrt((part[t] ** 2).sum() / size + c.norm_epsilon)
        out[row] = (gated * w["norm.weight"]) @ w["out.weight"].T
    return out


def convolved(x_TE: Array, w: dict[str, Array], name: str) -> Array:
    """Causal and depthwise, then the activation. The last tap is the position's own."""
    taps = w[f"{name}.weight"].reshape(x_TE.shape[1], -1)
    found = np.zeros_like(x_TE) + w[f"{name}.bias"]
    for t in range(len(x_TE)):
        for back in range(taps.shape[1]):
            if t >= back:
                found[t] += taps[:, -1 - back] * x_TE[t - back]
    return silu(found)


def inputs() -> Tensor:
    return torch.randn(ROWS, TIME, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_the_mixer_is_its_authors(groups: int) -> None:
    mixer = drawn(Mamba2Mixer(config(groups)))
    x_BTC = inputs()
    wanted = by_the_authors(mixer, x_BTC.numpy(), norm_groups=groups)
    np.testing.assert_allclose(mixer(x_BTC, None).detach().numpy(), wanted, rtol=1e-10, atol=1e-12)
    if groups > 1:  # the test sees the difference
        other = by_the_authors(mixer, x_BTC.numpy(), norm_groups=1)
        assert np.abs(other - wanted).max() > 0.1 * np.abs(wanted).max()


@pytest.mark.parametrize("groups", [2, 4])
def test_a_norm_over_all_channels_is_what_models_had_before(groups: int) -> None:
    mixer = drawn(Mamba2Mixer(config(groups, gated_norm="channels")))
    x_BTC = inputs()
    wanted = by_the_authors(mixer, x_BTC.numpy(), norm_groups=1)
    np.testing.assert_allclose(mixer(x_BTC, None).detach().numpy(), wanted, rtol=1e-10, atol=1e-12)


def test_with_one_group_nothing_changes() -> None:
    x_BTC = inputs()
    one, other = (drawn(Mamba2Mixer(config(1, gated_norm=kind))) for kind in ("groups", "channels"))
    assert torch.equal(one(x_BTC, None), other(x_BTC, None))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compiled", [False, True])
def test_the_norm_has_exact_gradients_and_its_inputs_dtype(dtype: torch.dtype, compiled: bool) -> None:
    norm = GatedRMSNorm(12, 1e-5, groups=3)
    torch.nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(0))
    x, gate = (torch.randn(5, 12, generator=torch.Generator().manual_seed(n)).to(dtype) for n in (1, 2))
    forward = torch.compile(norm, backend="eager", fullgraph=True) if compiled else norm
    found = forward(x, gate)
    assert found.dtype == dtype
    wide = (x * torch.nn.functional.silu(gate)).double()
    parts = [part / (part.square().mean(-1, keepdim=True) + 1e-5).sqrt() for part in wide.split(4, -1)]
    wanted = torch.cat(parts, -1) * norm.weight.double()
    torch.testing.assert_close(
        found.double(), wanted, rtol=1e-6 if dtype == torch.float32 else 8e-3, atol=1e-6
    )


def divided(mixer: Mamba2Mixer, number: int, of: int, add_up: Any) -> Mamba2Mixer:
    """The part of a mixer that one of `of` ranks holds, by the family's table."""
    c, part = mixer.config, drawn(Mamba2Mixer(mixer.config))
    part.take_part(Part(number, of, add_up))
    part.norm.take_part(Part(number, of, add_up))
    for name in ("gate", "input", "step"):
        layer = getattr(part, name)
        layer.weight.data = getattr(mixer, name).weight.data.chunk(of)[number].clone()
    part.conv.weight.data = mixer.conv.weight.data.chunk(of)[number].clone()
    assert part.conv.bias is not None and mixer.conv.bias is not None
    part.conv.bias.data = mixer.conv.bias.data.chunk(of)[number].clone()
    for name in ("log_rate", "step_bias", "direct"):
        getattr(part, name).data = getattr(mixer, name).data.chunk(of)[number].clone()
    part.norm.weight.data = mixer.norm.weight.data.chunk(of)[number].clone()
    part.out.weight.data = mixer.out.weight.data.chunk(of, 1)[number].clone()
    assert c.channels % of == 0
    return part


@pytest.mark.parametrize("gated_norm", ["groups", "channels"])
@pytest.mark.parametrize(("of", "groups"), [(2, 1), (2, 2), (2, 4), (4, 2), (4, 4), (8, 2), (8, 4)])
def test_ranks_that_divide_groups_compute_what_one_does(of: int, groups: int, gated_norm: str) -> None:
    """Whole groups on a rank, or a group over several ranks: outputs and every gradient."""
    whole = drawn(Mamba2Mixer(config(groups, heads=8, gated_norm=gated_norm)))
    x_BTC = inputs().requires_grad_()
    weight_BTC = torch.randn(x_BTC.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    wanted = whole(x_BTC, None)
    (wanted * weight_BTC).sum().backward()

    def on_rank(exchange: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        def add_up(x: Tensor) -> Tensor:
            return exchange.gather(x.clone()).sum(0)

        part, mine = divided(whole, exchange.rank, of, add_up), inputs().requires_grad_()
        found = part(mine, None)
        (found * weight_BTC).sum().backward()
        norm, out = part.norm.weight.grad, part.out.weight.grad
        assert mine.grad is not None and norm is not None and out is not None
        return found.detach(), mine.grad, norm, out

    parts = run_threads(of, on_rank)
    close: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-11}
    torch.testing.assert_close(sum(part[0] for part in parts), wanted.detach(), **close)
    torch.testing.assert_close(sum(part[1] for part in parts), x_BTC.grad, **close)
    torch.testing.assert_close(torch.cat([part[2] for part in parts]), whole.norm.weight.grad, **close)
    torch.testing.assert_close(torch.cat([part[3] for part in parts], 1), whole.out.weight.grad, **close)


@pytest.mark.parametrize(("groups", "expected"), [(1, "groups"), (2, "channels"), (4, "channels")])
def test_a_checkpoint_from_before_is_what_it_was(groups: int, expected: str) -> None:
    before = {"family": "mamba2", "groups": groups, "width": 8}
    found = as_of_today({"step": 1, "config": {"model": before}})
    assert found["config"]["model"]["gated_norm"] == expected
    assert "gated_norm" not in before
    said = as_of_today({"config": {"model": {**before, "gated_norm": "groups"}}})
    assert said["config"]["model"]["gated_norm"] == "groups"


def test_other_families_are_left_alone() -> None:
    for family in families:
        if family != "mamba2":
            meta = {"config": {"model": {"family": family, "groups": 3}}}
            assert as_of_today(meta) == meta
