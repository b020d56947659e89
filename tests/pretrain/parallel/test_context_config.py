"""Which rows and models ranks can share: refusals say what would be right."""

from __future__ import annotations

from pathlib import Path

import pytest

from pretrain.config import load_config
from pretrain.errors import ConfigError
from tests.pretrain.parallel.runs import Datasets, write_run

SUMMARIES = "parallel.recurrence=summaries"


@pytest.mark.parametrize(
    ("model", "overrides", "words"),
    [
        (
            "sigmoid",
            ["parallel.context=3"],
            ["data.sequence_length = 32", "6 pieces, two to a rank", "use 30"],
        ),
        ("sigmoid", ["parallel.context=2", "data.sequence_length=30"], ["4 pieces", "use 32"]),
        ("softmax", ["parallel.context=3"], ["use 33", "parallel.context = 3", "heads = 4", "use 1, 2 or 4"]),
        ("softmax", ["parallel.context=4", "parallel.tensor=2"], ["tensor x context = 8", "use 1 or 2"]),
        ("gru", ["parallel.context=16"], ["the 3 inputs that the convolution looks back", "use 48"]),
        (
            "gru",
            ["parallel.context=2", SUMMARIES, "model.newton.on_exceed=sequential", "model.newton.window=4"],
            ["model.newton.on_exceed", "model.newton.window", "parallel.recurrence=channels"],
        ),
        ("mamba2", ["parallel.context=2", SUMMARIES], ["mamba2 has no recurrence", "use channels"]),
        ("mamba2", ["parallel.context=16"], ["heads = 8 cannot be divided by 16", "use 1, 2, 4 or 8"]),
    ],
)
def test_what_cannot_be_shared_is_refused(
    tmp_path: Path, model: str, overrides: list[str], words: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write_run(tmp_path, Datasets(tmp_path, ()), model, 3), overrides)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_what_can_be_shared_is_not(tmp_path: Path) -> None:
    for model, ranks in (("sigmoid", 16), ("softmax", 4), ("gru", 8), ("mamba2", 4)):
        config = write_run(tmp_path, Datasets(tmp_path, ()), model, 3)
        load_config(config, [f"parallel.context={ranks}"])
