"""The families' settings: what is refused, with which words, and what is filled in."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models import families
from models.layers.config import swiglu_width

BASE: dict[str, Any] = {"layers": 2, "width": 48, "heads": 12}
ATTENTION = ("sigmoid", "softmax")
BAD = {
    "kv heads": (
        {"kv_heads": 5},
        [("kv_heads", "12 heads do not divide by 5 kv_heads; use 1, 2, 3, 4, 6 or 12")],
    ),
    "heads": (
        {"heads": 7},
        [("heads", "width 48 does not divide by 7 heads; use 1, 2, 3, 4, 6, 8, 12, 16, 24 or 48")],
    ),
    "odd heads under rope": (
        {"heads": 16, "positions": "rope"},
        [
            (
                "heads",
                "rope needs an even head width, and width 48 / 16 heads = 3; "
                "use another number of heads, or positions: alibi",
            )
        ],
    ),
    "all at once": (
        {"layers": 0, "mlp_width": -1, "norm": "post", "rope_base": 0.0, "kv_heads": 5},
        [
            ("layers", "0 must be at least 1"),
            ("mlp_width", "-1 must be at least 1"),
            ("rope_base", "0.0 must be greater than 0"),
            ("norm", "'post' is unknown; use hybrid or pre"),
            ("kv_heads", "12 heads do not divide by 5 kv_heads; use 1, 2, 3, 4, 6 or 12"),
        ],
    ),
    "nothing to divide": (
        {"width": 0, "heads": 0},
        [("width", "0 must be at least 1"), ("heads", "0 must be at least 1")],
    ),
}


@pytest.mark.parametrize("family", ATTENTION)
@pytest.mark.parametrize(("changes", "expected"), BAD.values(), ids=BAD.keys())
def test_every_problem_is_named(
    family: str, changes: dict[str, Any], expected: list[tuple[str, str]]
) -> None:
    config = families[family].config(**{**BASE, **changes})
    assert config.problems(64) == expected


@pytest.mark.parametrize("family", ATTENTION)
def test_a_good_config_has_no_problems_and_is_frozen(family: str) -> None:
    config = families[family].config(**BASE)
    assert config.problems(64) == []
    assert config.family == family
    with pytest.raises(FrozenInstanceError):
        config.layers = 3
    assert [key for key, _ in config.problems(0)] == ["sequence_length"]


def test_what_is_none_is_filled_in_and_what_is_set_stays() -> None:
    config = families["sigmoid"].config(**BASE).resolved(vocabulary=300, sequence_length=4096)
    assert (config.vocabulary, config.attention_bias) == (300, -math.log(4096))
    kept = config.resolved(vocabulary=5, sequence_length=8)
    assert kept == config
    bad = families["sigmoid"].config(**BASE, attention_bias=math.inf)
    assert [key for key, _ in bad.problems(64)] == ["attention_bias"]


@pytest.mark.parametrize("family", ATTENTION)
def test_building_an_unresolved_config_is_refused(family: str) -> None:
    with pytest.raises(ValueError, match="resolved"):
        families[family].build(families[family].config(**BASE))


@given(st.integers(8, 20000))
def test_the_default_hidden_width(width: int) -> None:
    hidden, multiple = swiglu_width(width), 256 if width >= 768 else 64
    assert hidden % multiple == 0
    assert 0 <= hidden - 8 * width / 3 < multiple
