"""Going on from a checkpoint: what is refused, what is set, and a save in flight when a run fails."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipelines.stream.batch import Cursor
from data_pipelines.tokens.vocabulary import MODALITIES, Vocabulary
from pretrain.checkpoint import CheckpointStore, TrainingState
from pretrain.checkpoint_meta import as_of_today, check_meta
from pretrain.engine.base import Engine
from pretrain.errors import CheckpointError
from pretrain.hooks.base import Hooks
from pretrain.random_state import set_random_state
from pretrain.run import Clock
from pretrain.run_data import RunData

if TYPE_CHECKING:
    pass


logger = logging.getLogger(__name__)

FINISH_SAVE_TIMEOUT_S = 120


def refuse_another_run(data: RunData, meta: dict[str, Any], path: Path) -> None:
    """A run's weights fit one tokenizer and one model. Raises CheckpointError that lists what differs."""
    meta = as_of_today(meta)
    check_meta(meta, path, resumed=True)
    named_by = data.config.data.named_by
    if meta["tokenizer"] != data.fingerprint and named_by != "path":
        raise CheckpointError(
            f"{path}: this checkpoint was not trained on {data.describe()}; set data.{named_by} back, or train "
            "under another run.name; the checkpoint is untouched"
        )
    if meta["tokenizer"] != data.fingerprint and data.vocabulary is not None:
        raise CheckpointError(_other_vocabulary(data.vocabulary, meta.get("vocabulary"), path))
    if meta["tokenizer"] != data.fingerprint:
        raise CheckpointError(
            f"{path}: this run reads text through tokenizer {meta['tokenizer'][:12]}, and "
            f"{data.config.data.sources[0].path} was built with {data.fingerprint[:12]} "
            f"({data.describe()}); set data.path back, build the dataset with `--tokenizer` of the run's "
            "tokenizer folder, or train under another run.name; the checkpoint is untouched"
        )
    ours, saved = (
        dict(flat_settings(one)) for one in (data.config.to_dict()["model"], meta["config"]["model"])
    )
    allowed = getattr(data.config.model, "changeable", ())
    changed = [
        f"  model.{key}: {saved.get(key)} in the checkpoint, {ours.get(key)} in the config"
        for key in dict.fromkeys([*saved, *ours])
        if saved.get(key) != ours.get(key) and not any(f"{key}.".startswith(f"{one}.") for one in allowed)
    ]
    if changed:
        raise CheckpointError(
            f"{path}: this checkpoint is of another model:\n"
            + "\n".join(changed)
            + "\nset them back to resume, or train under another run.name; the checkpoint is untouched"
        )


def flat_settings(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Settings and those within them, by dotted keys."""
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from flat_settings(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _other_vocabulary(ours: Vocabulary, saved: dict[str, Any] | None, path: Path) -> str:
    """What differs between the data's vocabulary and a checkpoint's, by modality."""
    if saved is None:
        return (
            f"{path}: this checkpoint is of text alone, and the data has {len(ours.modalities)} modalities in one "
            "vocabulary; train under another run.name; the checkpoint is untouched"
        )
    here, there = ours.to_dict(), Vocabulary.from_dict(saved, str(path)).to_dict()
    lines = []
    for name in MODALITIES:
        one, other = there.get(name), here.get(name)
        if one != other:
            lines.append(f"  {name}: {_described(one)} in the checkpoint, {_described(other)} in the data")
    return (
        f"{path}: this checkpoint was trained on other token ids than the data has:\n"
        + "\n".join(lines or [f"  end of text: {there['eot']} in the checkpoint, {here['eot']} in the data"])
        + "\nset data.path back, build the data with the run's tokenizer and codecs (they are in the run's tokenizer "
        "folder), or train under another run.name; the checkpoint is untouched"
    )


def _described(modality: dict[str, Any] | None) -> str:
    if modality is None:
        return "none"
    what = "tokenizer" if modality["name"] == "text" else "codec"
    return f"{what} {modality['codec'][:12]}, {modality['size']:,} ids from {modality['first']:,}"


def resume(store: CheckpointStore, path: Path, engine: Engine, hooks: Hooks, clock: Clock) -> None:
    state = TrainingState(fragments=engine.fragments(), meta={})
    meta = store.load(path, state)
    engine.after_load()
    try:
        hooks.load_state(meta["hooks"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        message = f"{path}/meta.json: the state of the hooks is not what a save writes ({error!r})"
        raise CheckpointError(f"{message}; put the file back from a copy") from None
    clock.step, clock.tokens = meta["step"], meta["tokens"]
    clock.cursor = Cursor.from_dict(meta["cursor"])
    if state.rank_bytes is not None:
        set_random_state(state.rank_bytes, path)


def finish_save(store: CheckpointStore) -> None:
    """After an error: give a save in flight the time to become whole, but no more, for a peer may be gone."""

    def wait() -> None:
        try:
            store.wait()
        except CheckpointError as error:
            logger.warning("%s", error)

    waiter = threading.Thread(target=wait, daemon=True)
    waiter.start()
    waiter.join(FINISH_SAVE_TIMEOUT_S)
