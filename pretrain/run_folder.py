"""A run's folder: where its files lie, who may write there, and the ledger of what happened."""

from __future__ import annotations

import json
import logging
import os
import platform
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock

from data_pipelines.modalities import Modalities, load_modalities
from data_pipelines.tokenizers import BytesTokenizer, Tokenizer, tokenizer_from_spec
from pretrain.attempts import append_ledger
from pretrain.config_yaml import read_yaml
from pretrain.errors import UserError, of_storage

logger = logging.getLogger(__name__)

TOKENIZER_FILE = "tokenizer.json"


@dataclass(frozen=True)
class RunFolder:
    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def tokenizer(self) -> Path:
        return self.path / "tokenizer"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def metrics(self) -> Path:
        """One JSON object per logged step or evaluation; a resumed run cuts what it will write again."""
        return self.logs / "metrics.jsonl"

    @property
    def ledger(self) -> Path:
        return self.path / "ledger.jsonl"

    def create(self) -> None:
        try:
            for folder in (self.path, self.checkpoints, self.logs):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            message = f"{self.path}: the run folder cannot be made ({error}); set run.folder elsewhere"
            raise of_storage(error, message) from None

    def lock(self, attempt: int | None = None) -> AbstractContextManager[object]:
        """Held until the context ends or the process dies; raises UserError if another live run holds it.

        attempt: of a launched run. It takes the lock from an older attempt of its own, which may live on where
            nobody can end it: on a node that was cut off.
        """
        path, owner = self.path / "run.lock", self.path / "run.owner.json"
        try:
            held = filelock.FileLock(path).acquire(timeout=0)
        except filelock.Timeout:
            who = _owner(owner)
            older = who.get("attempt")
            if attempt is None or not isinstance(older, int) or older >= attempt:
                raise UserError(
                    f"{self.path}: another run is writing here (process {who.get('pid', '?')} on "
                    f"{who.get('host', '?')}, since {who.get('since', '?')}); end it, or choose another run.name"
                ) from None
            logger.warning("%s: taken over from attempt %d on %s", path, older, who.get("host", "?"))
            path.unlink()
            held = filelock.FileLock(path).acquire(timeout=0)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        facts = {"pid": os.getpid(), "host": platform.node(), "since": since, "attempt": attempt}
        owner.write_text(json.dumps(facts))
        return held

    def trains_a_task(self) -> bool:
        """Whether the run learns a synthetic task, by its latest start."""
        if not self.config.is_file():
            return False
        data = read_yaml(self.config).get("data")
        return isinstance(data, dict) and data.get("task") is not None

    def save_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Keep what generation needs, so that a run outlives its dataset."""
        self.tokenizer.mkdir(exist_ok=True)
        entry = tokenizer.save(self.tokenizer)
        (self.tokenizer / "entry.json").write_text(json.dumps(entry, indent=1), encoding="utf-8")

    def save_modalities(self, modalities: Modalities) -> None:
        """The same of a run over several modalities: its vocabulary and codecs beside the tokenizer."""
        self.tokenizer.mkdir(exist_ok=True)
        entry = modalities.save(self.tokenizer)
        (self.tokenizer / "entry.json").write_text(json.dumps(entry, indent=1), encoding="utf-8")

    def load_modalities(self) -> Modalities:
        """What `save_modalities` kept. Raises DataError that names a missing or changed file."""
        return load_modalities(self.tokenizer)

    def load_tokenizer(self) -> Tokenizer:
        entry = self.tokenizer / "entry.json"
        if not entry.is_file():
            raise UserError(f"{entry}: missing; training this run again writes it")
        try:
            file = json.loads(entry.read_text(encoding="utf-8"))["file"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"{entry}: damaged ({error!r}); training this run again writes it") from None
        if file is None:
            return BytesTokenizer()
        if file != TOKENIZER_FILE:
            raise UserError(f"{entry}: its file is {file!r}, and only {TOKENIZER_FILE} beside it is read")
        return tokenizer_from_spec(str(self.tokenizer / TOKENIZER_FILE))

    def record(self, event: str, **facts: Any) -> None:
        """Add a line to the ledger: starts, saves, stops, with reasons."""
        append_ledger(self.ledger, event, facts)

    def cut_metrics(self, after_step: int) -> None:
        """Forget what was logged beyond `after_step`: those steps are about to be trained again."""
        if not self.metrics.exists():
            return
        kept = [line for line in _lines(self.metrics) if line["step"] <= after_step]
        temporary = self.metrics.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        temporary.replace(self.metrics)


def _owner(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}  # being written at this moment
    return found if isinstance(found, dict) else {}


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue  # the half line of a killed process


def find_run(name_or_path: str, folder: str = "runs") -> RunFolder:
    """The run called `name_or_path`, or lying there. Raises UserError that lists the runs there are."""
    for path in (Path(name_or_path), Path(folder) / name_or_path):
        if (path / "config.yaml").is_file():
            return RunFolder(path)
    known = (
        sorted(config.parent.name for config in Path(folder).glob("*/config.yaml"))
        if Path(folder).is_dir()
        else []
    )
    listed = f"; {folder}/ has {', '.join(known)}" if known else f"; {folder}/ has no runs"
    raise UserError(f"{name_or_path}: no run there, nor under {folder}/{listed}")


def write_config(folder: RunFolder, text: str) -> None:
    temporary = folder.config.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(folder.config)
