"""What a rank computes: by hand, and against the models' own count."""

from __future__ import annotations

from dataclasses import replace

import pytest

from models.layers.work import AttentionLayer, Fused, Product, Stream, Work, norm
from pretrain.config import load_config
from pretrain.hardware import ACCELERATORS
from pretrain.plan.constants import constants
from pretrain.plan.kernels import RECOMPUTED, Device, Load, computing
from pretrain.plan.parameters import resolved

DEVICE = Device(ACCELERATORS["h100"], constants())
LAYER = AttentionLayer(kernel="sigmoid attention", width=4096, heads=32, key_heads=32, hidden=11008).work()
LOAD = Load({LAYER: 4}, positions=4096, sequence_length=4096, width=4096, vocabulary=32768)
FAMILIES = ("sigmoid", "softmax", "pararnn/gru", "pararnn/lstm", "hybrid", "trimodal")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_work_of_a_layer_is_what_its_model_counts(family: str) -> None:
    config = resolved(load_config(f"configs/{family}/7b.yaml", ["model.vocabulary=32768"]))
    model, length = config.model, config.data.sequence_length
    work = sum(count * layer.multiply_adds(length) for layer, count in model.layer_work().items())
    assert work == pytest.approx(model.layers * model.block_products(length))
    assert sum(model.layer_work().values()) == model.layers


def test_mamba2_computes_its_chunks_besides() -> None:
    model = resolved(load_config("configs/mamba2/7b.yaml", ["model.vocabulary=32768"])).model
    ((layer, _),) = model.layer_work().items()
    within_chunks = model.chunk / 2 * (model.heads * model.state_width + model.channels)
    assert layer.multiply_adds(2048) == pytest.approx(model.block_products(2048) + within_chunks)


def test_large_products_reach_their_share_of_the_peak() -> None:
    rows = inputs = outputs = 16896  # 132 x 66 tiles: whole waves on 132 multiprocessors
    least = 2 * rows * inputs * outputs / (989e12 * constants().products_hopper)
    assert DEVICE.product(rows, inputs, outputs) == pytest.approx(least, rel=3e-3)


def test_thin_products_are_bound_by_memory() -> None:
    moved = 2 * (1 * 4096 + 4096 * 4096 + 1 * 4096)
    assert DEVICE.product(1, 4096, 4096) == pytest.approx(moved / DEVICE.memory)


def test_streams_take_the_time_of_their_bytes() -> None:
    load = replace(LOAD, layers={Work(streams=(norm(4096),)): 1}, head=0.0)
    forward, backward = computing(load, DEVICE)
    per_element = 4096 * 2 * constants().unfused / DEVICE.memory
    assert forward.memory == forward.total == pytest.approx(2 * 4096 * per_element)
    assert backward.memory == backward.total == pytest.approx(3 * 4096 * per_element)
    assert computing(replace(load, fused=True), DEVICE)[0].memory < forward.memory


def test_attention_doubles_with_the_row_and_halves_if_causal() -> None:
    attention = Fused("softmax attention", per_key=2.0 * 4096)
    load = replace(LOAD, layers={Work(fused=(attention,)): 1}, head=0.0)
    ramped = constants().attention_ramp
    once, twice = (
        computing(replace(load, sequence_length=length), DEVICE)[0].fused * length / (length + ramped)
        for length in (4096, 8192)
    )
    assert twice == pytest.approx(2 * once)
    whole = replace(load, layers={Work(fused=(replace(attention, causal=False),)): 1})
    assert computing(whole, DEVICE)[0].fused == pytest.approx(2 * computing(load, DEVICE)[0].fused)


def test_full_checkpointing_makes_the_layers_forward_pass_again() -> None:
    plain = computing(replace(LOAD, head=0.0), DEVICE)
    again = computing(replace(LOAD, head=0.0, recomputed=RECOMPUTED["full"]), DEVICE)
    assert again[0] == plain[0]
    assert again[1].total - plain[1].total == pytest.approx(plain[0].total)


def test_tensor_ranks_divide_products_and_with_sequence_parallelism_all_streams() -> None:
    product = Product("p", 4096, 4096, divided="outputs")
    layer = Work((product,), (), (norm(4096), Stream("s", 4096, 4096, 4096, 4096)))
    load = replace(LOAD, layers={layer: 1}, head=0.0)
    one, four, shared = (
        computing(replace(load, tensor=ranks, sequence=sequence), DEVICE)[0].memory
        for ranks, sequence in ((1, False), (4, False), (4, True))
    )
    assert four == pytest.approx(one * (2 + 1 / 4) / 3)
    assert shared == pytest.approx(one / 4)
