"""The checkpoint folder of a run: save, wait, latest, load."""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.attempts import Fence, Launch
from pretrain.checkpoint.boxes import Boxes, boxes_of_fragments, step_leaf
from pretrain.checkpoint.fragments import Fragment, TrainingState
from pretrain.checkpoint.manifest import (
    META_NAME,
    FileRecord,
    Manifest,
    check_checksums,
    fsync_folder,
    make_durable_folder,
    read_manifest,
    write_manifest,
)
from pretrain.checkpoint.ranks import Ranks, describe
from pretrain.checkpoint.staging import Stager, Views, collect
from pretrain.checkpoint.steps import (
    StepInfo,
    is_step_folder,
    list_steps,
    move_aside,
    newest_whole,
    rank_file_name,
    read_meta,
    remove_unfinished,
    retire_steps,
    step_folders,
    step_name,
    step_of,
    telling_how_to_restore,
    verify_step,
)
from pretrain.errors import CheckpointError, NoRoomError, may_pass
from pretrain.json_text import to_json

if TYPE_CHECKING:
    from pretrain.checkpoint.storage import ChecksummingWriter

logger = logging.getLogger(__name__)

META_KEY = "meta"


@dataclass(frozen=True)
class _Job:
    """A save, as the writer thread needs it. Only the views still belong to the training loop."""

    step: int
    views: Views
    meta: str
    rank_bytes: bytes | None


class CheckpointStore:
    """Saves and loads the steps of one run, in `<folder>/step_00001000/`.

    All ranks make the same calls in the same order. A save notes which tensors there are and returns; a
    thread copies them to host memory while the loop computes the next gradients, and then writes them. So
    call `wait_staged` before each update of the tensors, and `wait` before the process ends, or the last save
    is torn.

    An asynchronous save takes, beyond the state, host memory as large as this rank's share of it (12 bytes for
    each parameter of the share), allocated once, and a few megabytes. The next save reuses it.

    Attributes:
        blocked_s: seconds that the newest save has held up the caller so far, in `save` and in `wait_staged`.

    Args:
        folder: the run's checkpoint folder; created at the first save.
        group: a gloo process group of all ranks, for this store alone (the writer thread uses it while the
            loop trains); None when torch.distributed is not initialised.
        keep_last: how many of the newest whole steps stay, at least 1.
        keep_every_steps: steps divisible by this stay for ever; None for no such rule.
        asynchronous: False writes inside `save`.
        writer_id: recorded in each manifest.
        fence: of the attempt that this process belongs to, for runs that a launcher starts again: an older
            attempt's rank that outlived it is kept from committing.
    """

    def __init__(
        self,
        folder: Path,
        *,
        group: dist.ProcessGroup | None,
        keep_last: int,
        keep_every_steps: int | None = None,
        asynchronous: bool = True,
        writer_id: str = "",
        fence: Fence | None = None,
    ) -> None:
        if keep_last < 1:
            raise CheckpointError(f"keep_last = {keep_last}: at least the newest step must be kept")
        if keep_every_steps is not None and keep_every_steps < 1:
            raise CheckpointError(f"keep_every_steps = {keep_every_steps}: use a positive number, or none")
        self.folder = Path(folder)
        self._ranks = Ranks(group)
        self._keep_last = keep_last
        self._keep_every_steps = keep_every_steps
        self._asynchronous = asynchronous
        self._writer_id = writer_id
        self._fence = fence or Fence(Launch(self.folder.parent), attempt=None)
        self._stager = Stager(copies=asynchronous)
        self.blocked_s = 0.0
        self._thread: threading.Thread | None = None
        self._staged: Future[None] | None = None  # there from an asynchronous save until it was waited for
        self._failure: CheckpointError | None = None
        self._cleaned = False
        self._known_whole: set[int] = set()  # steps written or verified by this store; equal on all ranks
        self._known_damaged: set[int] = set()  # steps that `latest` passed over

    # ---- saving

    def prepare(self) -> None:
        """Import what saving needs, in the background: the first save shall not come late. Call it once the first step
        is done, which the import would hold up."""
        threading.Thread(target=_import_dcp, name="checkpoint imports", daemon=True).start()

    def save(self, step: int, state: TrainingState) -> float:
        """Save one step, after waiting for the save before it.

        A step that this store has already written, or found whole, is not written again. A folder of that
        number of any other origin (damaged, or of a course that was abandoned by resuming before it) is
        replaced.

        Args:
            step: optimizer steps done.
            state: views of the engine's tensors. When asynchronous, they may change after `wait_staged`; the
                meta and the step counts are taken at once.

        Returns:
            Seconds the caller was blocked.

        Raises:
            CheckpointError: the previous save failed; or, when not asynchronous, this one did. On all ranks.
        """
        began = time.perf_counter()
        self.wait()
        if step in self._known_whole:
            logger.info("step %d is saved already", step)
        else:
            self._start(_Job(step, _views_of(state), _as_json(state.meta), state.rank_bytes))
        self.blocked_s = time.perf_counter() - began
        return self.blocked_s

    def wait_staged(self) -> float:
        """Wait until the tensors of the save in flight are copied on all ranks; at once when they are.

        Returns:
            Seconds the caller was blocked.

        Raises:
            CheckpointError: copying failed, on any rank. It is raised on all ranks, in the same call.
        """
        if self._staged is None:
            return 0.0
        began = time.perf_counter()
        failed = self._staged.exception() is not None
        self._staged = None
        if failed:
            self.wait()
        blocked_s = time.perf_counter() - began
        self.blocked_s += blocked_s
        return blocked_s

    def wait(self) -> None:
        """Wait for the save in flight.

        Raises:
            CheckpointError: it failed. Each failure is raised once.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            self._staged = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    @property
    def staging_bytes(self) -> int:
        """Host memory that the copies of this rank's tensors take; it stays between saves."""
        return self._stager.buffer_bytes

    @property
    def at_rest(self) -> bool:
        """Whether this rank's part of the last save has ended, and well. Never waits."""
        return self._failure is None and (self._thread is None or not self._thread.is_alive())

    @property
    def has_failed(self) -> bool:
        """Whether this rank's part of the save in flight has failed, which `wait` will raise. Never waits."""
        return self._failure is not None

    def _start(self, job: _Job) -> None:
        staged: Future[None] = Future()
        if not self._asynchronous:
            self._write(job, staged)
            return
        self._staged = staged
        self._thread = threading.Thread(
            target=self._write_in_background, args=(job, staged), name="checkpoint", daemon=True
        )
        self._thread.start()

    def _write_in_background(self, job: _Job, staged: Future[None]) -> None:
        try:
            self._write(job, staged)
        except BaseException as error:  # whatever ends this thread must reach the training loop
            self._failure = error if isinstance(error, CheckpointError) else CheckpointError(describe(error))
            if not staged.done():
                staged.set_exception(self._failure)

    def _write(self, job: _Job, staged: Future[None]) -> None:
        folder = self.folder / step_name(job.step)
        leaves: dict[str, Any] = {}
        try:
            # The ranks agree before any goes on, so that a failure stops all of them at the same update
            self._ranks.agree(lambda: leaves.update(self._stager.stage(job.views)))
            staged.set_result(None)
            self._write_folder(folder, job, leaves)
        except Exception as error:
            raise self._failure_of(folder, error, job) from error
        self._known_whole.add(job.step)
        self._known_damaged.discard(job.step)
        if self._ranks.rank == 0:
            retire_steps(
                self.folder, job.step, self._keep_last, self._keep_every_steps, ignore=self._known_damaged
            )

    def _write_folder(self, folder: Path, job: _Job, leaves: dict[str, Any]) -> None:
        """Write the step's folder, or leave none. It has its name only once it is whole."""
        partial = folder.with_name(f"{folder.name}.{self._fence.name}")
        try:
            self._ranks.on_first(lambda: self._make_folder(partial))
            self._write_files(partial, job, leaves)
            self._ranks.on_first(lambda: self._publish(partial, folder))
        except Exception:
            if self._ranks.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
            raise

    def _make_folder(self, partial: Path) -> None:
        """Rank 0: an empty folder for the step. A folder is never written into twice."""
        self._fence.check()
        if not self._cleaned:
            make_durable_folder(self.folder)
            remove_unfinished(self.folder)
            self._cleaned = True
        partial.mkdir()

    def _publish(self, partial: Path, folder: Path) -> None:
        """Rank 0: give the whole step its name."""
        self._fence.check()
        if folder.exists():
            logger.warning(
                "%s is not of this course of the run: moved to %s; delete that when nothing in it is wanted",
                folder,
                move_aside(folder).name,
            )
        partial.rename(folder)
        fsync_folder(self.folder)

    def _write_files(self, folder: Path, job: _Job, leaves: dict[str, Any]) -> None:
        from pretrain.checkpoint.dcp import write_leaves

        if self._ranks.rank == 0:
            leaves[META_KEY] = job.meta
        writer = write_leaves(folder, leaves, self._ranks)
        records = self._ranks.agree(lambda: self._write_own_files(writer, job))
        self._ranks.on_first(lambda: self._commit(folder, job.step, records))

    def _write_own_files(self, writer: ChecksummingWriter, job: _Job) -> dict[str, FileRecord]:
        if self._ranks.rank == 0:
            writer.write_file(META_NAME, job.meta.encode())
        if job.rank_bytes is not None:
            writer.write_file(rank_file_name(self._ranks.rank), job.rank_bytes)
        return writer.records

    def _commit(self, folder: Path, step: int, records: list[dict[str, FileRecord]]) -> None:
        files = {name: record for of_rank in records for name, record in of_rank.items()}
        write_manifest(folder, Manifest(step, self._ranks.size, time.time(), self._writer_id, files))

    def _failure_of(self, folder: Path, error: Exception, job: _Job) -> CheckpointError:
        """What happened, what room there is, and what is still there. Not collective."""
        on_each = f" on each of {self._ranks.size} ranks" if self._ranks.size > 1 else ""
        whole = newest_whole(self.folder)
        kept = f"{whole.name} is still whole" if whole else "there is no whole step before it"
        kind = NoRoomError if may_pass(error) else CheckpointError
        return kind(
            f"{folder} could not be saved: {describe(error)}. {_free_bytes(self.folder)}, "
            f"about {_bytes_of(job.views.leaves):,} bytes are needed{on_each}; {kept}. "
            "Make room or mend the cause"
        )

    # ---- finding

    def latest(self) -> Path | None:
        """The newest step whose manifest, sizes and checksums are right; the ranks share the reading.

        Each step passed over is named in a warning, with the reason.

        Returns:
            The step's folder, the same on all ranks; None when no save was ever completed.

        Raises:
            CheckpointError: there are steps, and none is whole: to begin anew would replace what was saved.
        """
        self.wait()
        damaged: list[str] = []
        for name in self._ranks.on_first(lambda: [folder.name for folder in step_folders(self.folder)]):
            folder = self.folder / name
            try:
                self._verify(folder)
                return folder
            except CheckpointError as error:
                self._known_damaged.add(step_of(folder))
                damaged.append(f"{name}: {error}")
                if self._ranks.rank == 0:
                    logger.warning("checkpoint %s is passed over: %s", folder, error)
        if damaged:
            raise CheckpointError(
                f"no step in {self.folder} is whole. {'. '.join(damaged)}. Put the files back from a copy, "
                "or move the folder away to begin anew; nothing was changed"
            )
        return None

    def steps(self, *, checksums: bool = False) -> list[StepInfo]:
        """All step folders, oldest first, each with what is wrong with it. Not collective."""
        return list_steps(self.folder, checksums=checksums)

    def _verify(self, folder: Path) -> Manifest:
        """Check a step on all ranks together.

        Raises:
            CheckpointError: on all ranks, naming the file.
        """

        manifest = self._ranks.on_first(lambda: verify_step(folder, checksums=False))
        self._ranks.agree(lambda: self._check_own_share(folder, manifest))
        if self._is_own(folder):
            self._known_whole.add(step_of(folder))
        return manifest

    def _check_own_share(self, folder: Path, manifest: Manifest) -> None:
        """Check every n-th file. At the world size of the save, a rank reads the file it will load from."""
        own = sorted(manifest.files)[self._ranks.rank :: self._ranks.size]
        check_checksums(folder, {name: manifest.files[name] for name in own})

    # ---- loading

    def load(self, path: Path, state: TrainingState) -> dict[str, Any]:
        """Fill the state's fragments in place, and its `rank_bytes`.

        The files are verified first, unless this store wrote or verified the step before.

        Args:
            path: a step folder.
            state: fragments of this rank, in any layout of the same model.

        Returns:
            The meta that was saved.

        Raises:
            CheckpointError: on all ranks: a missing or altered file; a parameter that the checkpoint lacks,
                has in another shape, or has beyond those of the model; step counts that one shared counter
                cannot hold.
        """
        self.wait()
        path = Path(path)
        try:
            manifest = self._manifest_of(path)
            self._check_model(path, state.fragments)
            self._fill(path, state.fragments)
            self._ranks.agree(lambda: self._take_rank_bytes(path, manifest, state))
            return self._ranks.on_first(lambda: read_meta(path))
        except Exception as error:
            raise CheckpointError(f"{path} cannot be loaded: {describe(error)}") from error

    read_meta = staticmethod(read_meta)

    @staticmethod
    def load_weights(path: Path, names_to_tensors: dict[str, Tensor], *, checksums: bool = True) -> None:
        """As `pretrain.checkpoint.weights.load_weights`."""
        from pretrain.checkpoint.weights import load_weights

        load_weights(path, names_to_tensors, checksums=checksums)

    def _manifest_of(self, path: Path) -> Manifest:
        def known() -> Manifest | None:
            is_known = self._is_own(path) and step_of(path) in self._known_whole
            return read_manifest(path) if is_known else None

        with telling_how_to_restore(path):
            return self._ranks.on_first(known) or self._verify(path)

    def _is_own(self, path: Path) -> bool:
        """Whether a step is one of this store's, and not of another run that this one starts from."""
        return path.resolve().parent == self.folder.resolve() and is_step_folder(path)

    def _check_model(self, path: Path, fragments: list[Fragment]) -> None:
        """Compare what all ranks have together with what is stored; one rank need not have everything."""
        from pretrain.checkpoint.weights import check_parameters, read_parameter_shapes

        shares = self._ranks.agree(lambda: {f.name: tuple(f.placement.shape) for f in fragments})
        expected = {name: shape for share in shares for name, shape in share.items()}
        self._ranks.on_first(lambda: check_parameters(expected, read_parameter_shapes(path)))

    def _fill(self, path: Path, fragments: list[Fragment]) -> None:
        from pretrain.checkpoint.dcp import read_leaves

        leaves = boxes_of_fragments(fragments)
        steps = {f.name: torch.zeros(1) for f in fragments if f.length}
        # Fragments may share a step counter, so each is read apart, to see whether they agree
        leaves.update({f"step.{name}": step_leaf(step) for name, step in steps.items()})
        read_leaves(path, leaves, self._ranks)
        self._ranks.agree(lambda: _set_steps(fragments, steps))

    def _take_rank_bytes(self, path: Path, manifest: Manifest, state: TrainingState) -> None:
        name = rank_file_name(self._ranks.rank)
        applies = manifest.world_size == self._ranks.size and name in manifest.files
        state.rank_bytes = (path / name).read_bytes() if applies else None


def _import_dcp() -> None:
    from pretrain.checkpoint import dcp  # noqa: F401


def _views_of(state: TrainingState) -> Views:
    """What to save: views of the tensors, and copies of the step counts, which are small."""
    owned = [f for f in state.fragments if f.is_saved]
    saved = [replace(f, step=f.step.detach().clone()) for f in owned]
    # Fragments may share a counter; it is compared once
    counts = {
        live.step.data_ptr(): (live.step.detach(), copy.step) for live, copy in zip(owned, saved, strict=True)
    }
    return collect(boxes_of_fragments(saved), list(counts.values()))


def _set_steps(fragments: list[Fragment], steps: dict[str, Tensor]) -> None:
    """Write the step counts that were read into the engine's counters.

    Raises:
        CheckpointError: parameters that share a counter were saved at different counts.
    """
    first_user: dict[int, str] = {}
    for fragment in fragments:
        if fragment.name not in steps:
            continue
        name = first_user.setdefault(fragment.step.data_ptr(), fragment.name)
        if not torch.equal(steps[name], steps[fragment.name]):
            raise CheckpointError(
                f"Adam's step count is {steps[name].item():.0f} for {name} and "
                f"{steps[fragment.name].item():.0f} for {fragment.name}, but this layout keeps one for both; "
                "load it with ZeRO stage 0"
            )
        fragment.step.detach().fill_(steps[name].item())


def _bytes_of(leaves: dict[str, Boxes]) -> int:
    """Bytes of the blocks that this rank holds."""
    return sum(view.nbytes for leaf in leaves.values() for view in leaf.blocks.values())


def _as_json(meta: dict[str, Any]) -> str:
    try:
        return to_json(meta, indent=1)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the checkpoint's meta is not JSON: {error}") from error


def _free_bytes(folder: Path) -> str:
    try:
        stats = os.statvfs(folder)
    except OSError as error:
        return f"the free space is unknown ({error.strerror})"
    return f"{stats.f_bavail * stats.f_frsize:,} bytes are free there"
