"""A run's folder: where its files lie, who may write there, and the ledger of what happened."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import logging
import os
import platform
import shutil
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock

from data_pipelines.tokens.bytes_tokenizer import BytesTokenizer
from data_pipelines.tokens.modalities import Modalities, load_modalities
from data_pipelines.tokens.tokenizer import Tokenizer
from data_pipelines.tokens.tokenizer_loading import tokenizer_from_spec
from pretrain.attempts import append_ledger
from pretrain.errors import UserError, of_storage, writing
from pretrain.json_text import to_json
from pretrain.records import is_count, read_lines
from pretrain.yaml_text import read_yaml

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
    def watchdog(self) -> Path:
        """Signs of life of the ranks, where no launcher has a folder for them; of the latest start alone."""
        return self.logs / "watchdog"

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

    def forget_signs_of_life(self) -> None:
        """Of the start before: its ranks are not this one's."""
        shutil.rmtree(self.watchdog, ignore_errors=True)

    def lock(self, attempt: int | None = None) -> AbstractContextManager[object]:
        """Held until the context ends or the process dies; raises UserError if another live run holds it.

        attempt: of a launched run. It takes the lock from an older attempt of its own, which may live on where
            nobody can end it: on a node that was cut off.
        """
        path, owner = self.path / "run.lock", self.path / "run.owner.json"
        try:
            held = _acquire(path)
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
            held = _acquire(path)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        facts = {"pid": os.getpid(), "host": platform.node(), "since": since, "attempt": attempt}
        with writing(owner):
            owner.write_text(to_json(facts))
        return held

    def trains_a_task(self) -> bool:
        """Whether the run learns a synthetic task, by its latest start."""
        if not self.config.is_file():
            return False
        data = read_yaml(self.config).get("data")
        return isinstance(data, dict) and data.get("task") is not None

    def save_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Keep what generation needs, so that a run outlives its dataset."""
        with writing(self.tokenizer):
            self.tokenizer.mkdir(exist_ok=True)
            entry = tokenizer.save(self.tokenizer)
            (self.tokenizer / "entry.json").write_text(to_json(entry, indent=1), encoding="utf-8")

    def save_modalities(self, modalities: Modalities) -> None:
        """The same of a run over several modalities: its vocabulary and codecs beside the tokenizer."""
        with writing(self.tokenizer):
            self.tokenizer.mkdir(exist_ok=True)
            entry = modalities.save(self.tokenizer)
            (self.tokenizer / "entry.json").write_text(to_json(entry, indent=1), encoding="utf-8")

    def load_modalities(self) -> Modalities:
        """What `save_modalities` kept. Raises DataError that names a missing or changed file."""
        return load_modalities(self.tokenizer)

    @property
    def has_tokenizer(self) -> bool:
        return (self.tokenizer / "entry.json").is_file()

    def load_tokenizer(self) -> Tokenizer:
        entry = self.tokenizer / "entry.json"
        if not entry.is_file():
            raise UserError(f"{entry}: missing; training this run again writes it")
        try:
            content = json.loads(entry.read_text(encoding="utf-8"))
            kind, file, eot = content["kind"], content["file"], content["eot"]
            known = kind == "bytes" or file is not None
        except (ValueError, KeyError, TypeError, RecursionError):
            known = False
        if not known:
            raise UserError(f"{entry}: damaged; training this run again writes it")
        if file not in (None, TOKENIZER_FILE):
            raise UserError(f"{entry}: its file is {file!r}, and only {TOKENIZER_FILE} beside it is read")
        return (
            BytesTokenizer()
            if file is None
            else tokenizer_from_spec(str(self.tokenizer / TOKENIZER_FILE), eot)
        )

    def record(self, event: str, **facts: Any) -> None:
        """Add a line to the ledger: starts, saves, stops, with reasons."""
        with writing(self.ledger):
            append_ledger(self.ledger, event, facts)

    def saved_step(self) -> int | None:
        """The newest step that the ledger calls saved; None where it has none."""
        if not self.ledger.exists():
            return None
        saves = [
            line["step"] for line in _lines(self.ledger) if line.get("event") == "save" and "step" in line
        ]
        return max(filter(is_count, saves), default=None)

    def keep_lost_course(self) -> None:
        """Called where the run begins at its first step. If steps of it were saved, and somebody has taken them
        away, what was logged of them is kept under another name."""
        saved = self.saved_step()
        if saved is None or not self.metrics.exists():
            return
        names = (self.metrics.with_name(f"metrics.aside-{number}.jsonl") for number in itertools.count(1))
        aside = next(path for path in names if not path.exists())
        with writing(aside):
            self.metrics.rename(aside)
        logger.warning(
            "%s: step %d was saved by the ledger, and %s has no step: the run begins anew. If that is not meant, stop "
            "it and put the steps back; what was logged before is in %s",
            self.path,
            saved,
            self.checkpoints,
            aside,
        )

    def cut_metrics(self, after_step: int) -> None:
        """Forget what was logged beyond `after_step`: those steps are about to be trained again."""
        if not self.metrics.exists():
            return
        kept = [line for line in _lines(self.metrics) if _step_of(line) <= after_step]
        temporary = self.metrics.with_suffix(".tmp")
        with writing(temporary):
            temporary.write_text("".join(to_json(line) + "\n" for line in kept), encoding="utf-8")
            temporary.replace(self.metrics)


def _acquire(path: Path) -> AbstractContextManager[object]:
    """Raises filelock.Timeout if another process holds it, UserError if the storage knows no locks."""
    try:
        # Its own way out, a file that is there or not, would outlive a killed run.
        return filelock.FileLock(path, fallback_to_soft=False).acquire(timeout=0)
    except NotImplementedError as error:
        raise UserError(_no_locks(path, str(error))) from None
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK):
            raise
        raise UserError(_no_locks(path, str(error.strerror))) from None


def _no_locks(path: Path, what: str) -> str:
    kind, mount = _storage_of(path)
    return (
        f"{path}: the storage has no file locks ({what}): {mount} is mounted as {kind}. Without them two runs could "
        "write here at once. Mount it with locks (Lustre: -o flock; NFS: without nolock, rpc.statd running), or set "
        "run.folder to another storage"
    )


def _storage_of(path: Path) -> tuple[str, str]:
    """Kind and mount point of the storage that a file lies on."""
    kind, mount, there = "?", "?", path.resolve()
    with contextlib.suppress(OSError):
        for line in Path("/proc/mounts").read_text(encoding="utf-8", errors="replace").splitlines():
            fields = line.split(" ")
            # Later mounts lie over earlier ones.
            if (
                len(fields) > 2
                and there.is_relative_to(fields[1])
                and len(fields[1]) >= len(mount.rstrip("?"))
            ):
                kind, mount = fields[2], fields[1]
    return kind, mount


def _owner(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}  # being written at this moment
    return found if isinstance(found, dict) else {}


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file of lines; of others, such as the half line of a killed process, one warning counts."""
    passed_over = 0
    for found in read_lines(path.read_bytes().split(b"\n")):
        if found is None:
            passed_over += 1
        else:
            yield found
    if passed_over:
        logger.warning("%s: %d lines that are no JSON objects are passed over", path, passed_over)


def _step_of(line: dict[str, Any]) -> int:
    """Of a metrics line; one that has none is of no step to come."""
    step = line.get("step")
    return step if is_count(step) else 0


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
    with writing(folder.config):
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(folder.config)
