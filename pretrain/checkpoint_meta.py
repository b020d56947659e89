"""What a run's `meta.json` must hold: a checkpoint may come from anyone, and be altered by anyone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pretrain.checkpoint.steps import STEP_PATTERN
from pretrain.errors import CheckpointError
from pretrain.records import is_count

KINDS: Mapping[str, type] = {"step": int, "config": dict}
"""What a trained model is made from."""
RESUMED: Mapping[str, type] = {"tokens": int, "cursor": dict, "hooks": dict, "tokenizer": str}
"""What a run goes on from besides."""


def as_of_today(meta: Mapping[str, Any]) -> dict[str, Any]:
    """The meta with settings that came later than it at what they were then, where that is not their default."""
    config = meta.get("config")
    model = config.get("model") if isinstance(config, dict) else None
    if not isinstance(model, dict) or not isinstance(config, dict):
        return dict(meta)
    if model.get("family") == "mamba2" and model.get("groups") != 1:
        model = {"gated_norm": "channels", **model}
    elif model.get("family") == "mamba2":
        model = {"gated_norm": "groups", **model}
    return {**meta, "config": {**config, "model": model}}


def _counts_that_are_none(meta: Mapping[str, Any]) -> list[str]:
    counts = {"tokens": meta["tokens"], "cursor.row": meta["cursor"].get("row")}
    return [f"{key} is {value!r}"[:80] for key, value in counts.items() if not is_count(value)]


def check_meta(meta: Mapping[str, Any], path: Path, *, resumed: bool = False) -> None:
    """Raises CheckpointError naming what is missing in `path`/meta.json, or of another kind."""
    wanted = {**KINDS, **(RESUMED if resumed else {})}
    wrong = [
        f"{key} is {'missing' if key not in meta else repr(meta[key])[:80]}"
        for key, kind in wanted.items()
        if type(meta.get(key)) is not kind
    ]
    if isinstance(meta.get("config"), dict) and not isinstance(meta["config"].get("model"), dict):
        wrong.append("config has no model section")
    if isinstance(meta.get("step"), int) and meta["step"] < 0:
        wrong.append(f"step is {meta['step']}")
    named = STEP_PATTERN.fullmatch(path.name)
    if named and type(meta.get("step")) is int and meta["step"] != int(named[1]):
        wrong.append(f"step is {meta['step']}")
    if resumed and not wrong:
        wrong += _counts_that_are_none(meta)
    if wrong:
        raise CheckpointError(
            f"{path}/meta.json is not what a save of a run writes: {'; '.join(wrong)}. Put the file back from a copy, "
            "or take another step"
        )
