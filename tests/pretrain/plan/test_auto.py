"""`parallel: auto`: what is chosen, told, recorded, and refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pretrain.config import load_config
from pretrain.config.sections import CHOSEN
from pretrain.errors import ConfigError
from pretrain.hardware import ACCELERATORS, Accelerator
from pretrain.json_text import to_json
from pretrain.plan.auto import choose_layout
from pretrain.plan.estimate import plan_layout
from pretrain.plan.layouts import GIB, ROOM
from pretrain.plan.parameters import resolved

H100 = ACCELERATORS["h100"]
KNOWN: dict[Any, Any] = {}
"""Simulated passes of the small model, shared by the tests."""
SMALL = ["model.vocabulary=512", "model.layers=4", "data.micro_batch_rows=auto"]


def test_the_fastest_that_fits_is_taken_and_plans_as_it_was_told() -> None:
    config = load_config("configs/sigmoid/85m.yaml", [*SMALL, "parallel=auto"])
    choice = choose_layout(config, 16, H100, KNOWN)
    chosen = choice.config
    assert chosen.parallel.auto == ()
    layout = plan_layout(resolved(chosen), 16, H100)
    assert layout.memory.total <= ROOM * H100.memory_gib * GIB
    assert f"({layout.time.total:.3g} s/step, {layout.memory.total / GIB:.3g} GiB)" in choice.reason
    assert "fastest by the plan of" in choice.reason
    # Small as it is, it needs neither to be divided nor to compute anything twice.
    assert (chosen.parallel.tensor, chosen.parallel.pipeline) == (1, 1)
    assert chosen.parallel.activation_checkpointing == "none"
    assert choose_layout(config, 16, H100, KNOWN) == choice, "all ranks must choose alike"


def test_keys_that_are_stated_stay() -> None:
    config = load_config(
        "configs/sigmoid/85m.yaml", [*SMALL, "parallel=auto", "parallel.tensor=2", "parallel.zero=2"]
    )
    assert set(config.parallel.auto) == set(CHOSEN) - {"tensor", "zero"}
    chosen = choose_layout(config, 8, H100, KNOWN).config.parallel
    assert (chosen.tensor, chosen.zero) == (2, 2)


def test_one_key_alone_can_be_open() -> None:
    config = load_config(
        "configs/sigmoid/85m.yaml", ["model.vocabulary=512", "parallel.activation_checkpointing=auto"]
    )
    chosen = choose_layout(config, 8, H100).config
    assert chosen.parallel == config.parallel.model_copy(update={"auto": ()})
    assert chosen.data.micro_batch_rows == config.data.micro_batch_rows, "stated rows stay"


def cramped(gib: float) -> Accelerator:
    return replace(H100, memory_gib=gib)


def test_less_memory_is_answered_by_another_layout() -> None:
    config = load_config("configs/sigmoid/85m.yaml", [*SMALL, "parallel=auto"])
    roomy, tight = (choose_layout(config, 8, machine, KNOWN).config for machine in (H100, cramped(0.75)))
    layout = plan_layout(resolved(tight), 8, H100)
    assert layout.memory.total <= ROOM * 0.75 * GIB < plan_layout(resolved(roomy), 8, H100).memory.total


def test_where_nothing_fits_the_nearest_is_told() -> None:
    config = load_config("configs/sigmoid/85m.yaml", [*SMALL, "parallel=auto"])
    with pytest.raises(
        ConfigError, match=r"no layout of 8 x NVIDIA H100 SXM fits; the nearest, .* GiB above"
    ) as error:
        choose_layout(config, 8, cramped(0.05), KNOWN)
    assert "take " in str(error.value)


def test_stated_keys_that_cannot_be_are_refused_as_ever() -> None:
    config = load_config("configs/sigmoid/85m.yaml", [*SMALL, "parallel.zero=auto", "parallel.tensor=4"])
    with pytest.raises(ConfigError, match="does not divide the number of processes, 6"):
        choose_layout(config, 6, H100)


def test_a_word_that_is_not_auto_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"parallel\.tensor = often"):
        load_config("configs/sigmoid/85m.yaml", ["parallel.tensor=often"])


def test_a_chosen_layout_is_written_without_what_was_open() -> None:
    config = load_config("configs/sigmoid/85m.yaml", ["parallel=auto"])
    assert set(config.to_dict()["parallel"]["auto"]) == set(CHOSEN)


def test_training_chooses_records_and_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from pretrain.commands.train import laid_out

    config = load_config(
        "configs/sigmoid/demo.yaml",
        ["model.vocabulary=257", "parallel=auto", "run.device=cpu", "parallel.tensor=1"],
    )
    found, reason = laid_out(config)
    assert found.parallel.auto == ()
    assert reason is not None
    assert "layout chosen for 1 x CPU core: ZeRO" in capsys.readouterr().out
    assert to_json(found.parallel.model_dump(mode="json")), "what the ledger records"
