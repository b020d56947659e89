"""The bidirectional Transformer: who sees whom, positions on two axes, settings, cost.

Shape suffixes: B batch, T time.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from models import families
from models.initialise import initialise
from models.layers.positions import rotary_table
from models.trimodal.model import Trimodal

VOCABULARY, TIME = 61, 20
KINDS = list(itertools.product(("softmax", "sigmoid"), ("1d", "2d")))


def small_config(**changes: Any) -> Any:
    settings = {"layers": 2, "width": 32, "heads": 4, "kv_heads": 2, **changes}
    return families["trimodal"].config(**settings).resolved(vocabulary=VOCABULARY, sequence_length=TIME)


def small_model(**changes: Any) -> Trimodal:
    model = families["trimodal"].build(small_config(**changes))
    initialise(model, seed=0)
    assert isinstance(model, Trimodal)
    return model.double()


def some_tokens(batch: int = 2, time: int = TIME, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCABULARY, (batch, time), generator=torch.Generator().manual_seed(seed))


def on_axes(positions_BT: torch.Tensor, images: str) -> torch.Tensor:
    """Positions as the model takes them; on two axes, they differ in the second half of a row."""
    if images == "1d":
        return positions_BT
    columns = torch.where(positions_BT > 4, positions_BT // 2, positions_BT)
    return torch.stack((positions_BT, columns), dim=-1)


@pytest.mark.parametrize(("attention", "images"), KINDS)
def test_every_token_sees_all_of_its_document_and_nothing_else(attention: str, images: str) -> None:
    model = small_model(attention=attention, image_positions=images)
    lengths = (5, 1, 8, 6)
    documents = [some_tokens(1, length, seed=length) for length in lengths]
    segments = torch.cat([torch.full((1, n), i) for i, n in enumerate(lengths)], dim=1)
    places = torch.cat([torch.arange(n)[None] for n in lengths], dim=1)
    packed = model(torch.cat(documents, 1), segments, on_axes(places, images))
    alone = [model(d, None, on_axes(torch.arange(d.shape[1])[None], images)) for d in documents]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), rtol=1e-9, atol=1e-9)
    last_changed = documents[2].clone()
    last_changed[0, -1] = (last_changed[0, -1] + 1) % VOCABULARY
    moved = model(last_changed, None, on_axes(torch.arange(8)[None], images)) - alone[2]
    assert (moved.abs().amax(-1) > 1e-6).all(), "the first token must see the last"


@pytest.mark.parametrize(("attention", "images"), KINDS)
def test_padding_influences_nothing(attention: str, images: str) -> None:
    model = small_model(attention=attention, image_positions=images)
    segments = torch.zeros(2, TIME, dtype=torch.long)
    segments[:, 13:] = 1
    places = torch.cat((torch.arange(13), torch.arange(TIME - 13))).expand(2, -1)
    outputs = []
    for seed in (1, 2):
        tokens = some_tokens()
        tokens[:, 13:] = some_tokens(seed=seed)[:, 13:]
        outputs.append(model(tokens, segments, on_axes(places, images))[:, :13])
    assert torch.equal(*outputs)


def test_equal_axes_are_one_dimension() -> None:
    positions_BT = torch.randint(0, 4096, (2, TIME))
    for width in (8, 12, 64):
        flat = rotary_table(positions_BT, width, 1e4)
        both = rotary_table(positions_BT[..., None].expand(-1, -1, 2), width, 1e4)
        assert all(torch.equal(a, b) for a, b in zip(flat, both, strict=True))
    rows_and_columns = torch.stack((positions_BT, positions_BT * 0), dim=-1)
    cosines = rotary_table(rows_and_columns, 8, 1e4)[0]
    assert torch.equal(cosines[..., 0::2], rotary_table(positions_BT, 8, 1e4)[0][..., 0::2])
    assert cosines[..., 1::2].eq(1).all()


def test_positions_of_the_wrong_shape_and_states_are_refused() -> None:
    tokens = some_tokens()
    places = torch.arange(TIME).expand(2, -1)
    with pytest.raises(ValueError, match=r"must be \(2, 20, 2\): image_positions is 2d"):
        small_model(image_positions="2d")(tokens, None, places)
    with pytest.raises(ValueError, match=r"must be \(2, 20\): image_positions is 1d"):
        small_model()(tokens, None, places[..., None].expand(-1, -1, 2))
    for act in (lambda m: m.new_state(1, 8), lambda m: m(tokens, state=[])):
        with pytest.raises(ValueError, match="keeps no state"):
            act(small_model())


BAD = {
    "alibi": ({"positions": "alibi"}, "positions", "use rope"),
    "bias of a softmax": ({"attention_bias": -3.0}, "attention_bias", "cancels in a softmax"),
    "infinite bias": ({"attention": "sigmoid", "attention_bias": math.inf}, "attention_bias", "finite"),
    "attention": ({"attention": "linear"}, "attention", "use softmax or sigmoid"),
    "2-D and odd pairs": ({"width": 24, "image_positions": "2d"}, "image_positions", "divide by 4"),
}


@pytest.mark.parametrize(("changes", "key", "text"), BAD.values(), ids=BAD.keys())
def test_bad_settings(changes: dict[str, Any], key: str, text: str) -> None:
    config = families["trimodal"].config(**{"layers": 2, "width": 32, "heads": 4, **changes})
    problems = config.problems(64)
    assert [found for found, _ in problems] == [key]
    assert text in problems[0][1]


def test_the_bias_is_resolved_for_sigmoid_alone() -> None:
    assert small_config(attention="sigmoid").attention_bias == -math.log(TIME)
    assert small_config().attention_bias is None
    assert small_config(attention="sigmoid").problems(TIME) == []


def test_flops_equal_those_that_torch_counts() -> None:
    """Torch's counter knows no attention on a CPU: its square is added here, whole."""
    config, model = small_config(qk_norm=False), small_model(qk_norm=False)
    tokens = some_tokens(3)
    with FlopCounterMode(display=False) as counter:
        model.head(model(tokens)[:, ::2])
    expected = counter.get_total_flops() / tokens.numel() + 4 * config.layers * config.width * TIME
    assert families["trimodal"].flops_per_token(config, TIME) == pytest.approx(3 * expected)
