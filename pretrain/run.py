"""One run, assembled from its config: who owns what, in the order in which it comes up."""

from __future__ import annotations

import contextlib
import io
import logging
import pickle
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from data_pipelines.batch import Batch, Cursor
from data_pipelines.rows import ORDER
from data_pipelines.stream import open_stream
from data_pipelines.vocabulary import MODALITIES, Vocabulary
from models import families
from pretrain.attempts import AttemptFolder, Fence, Launch, own_attempt, tell_stage
from pretrain.checkpoint import CheckpointStore, TrainingState
from pretrain.checkpoint_meta import as_of_today, check_meta
from pretrain.config.nearest import check_layout
from pretrain.config.world import micro_batch_rows
from pretrain.engine.base import Engine
from pretrain.errors import CheckpointError, UserError, of_storage
from pretrain.hooks.base import Hook, Hooks
from pretrain.hooks.checkpoints import CheckpointHook
from pretrain.hooks.evaluation import EvaluationHook
from pretrain.hooks.finite import FiniteHook
from pretrain.hooks.metrics import MetricsHook
from pretrain.hooks.newton import NewtonHook
from pretrain.hooks.samples import DiffusionSampleHook, SampleHook
from pretrain.hooks.tasks import TaskHook
from pretrain.hooks.watchdog import WatchdogHook
from pretrain.monitoring import JsonLinesSink, ProgressSink, Reporter, Sink, TensorBoardSink
from pretrain.objectives import Objective, build_objective
from pretrain.optim import schedule_factor
from pretrain.optim.scaling import resolve
from pretrain.parallel.mesh import Mesh, build_mesh, import_parallel_state, needs_parallel_state
from pretrain.parallel.parallelize import parallelize
from pretrain.parallel.ranks import Ranks, choose_device, ranks_from_environment, start_process_group
from pretrain.parallel.stages import build_parts, whole_model
from pretrain.run_data import DiffusionData, RunData, TaskData, TextData, open_run_data
from pretrain.run_folder import RunFolder, write_config
from pretrain.signals import StopRequest
from pretrain.versions import library_versions

if TYPE_CHECKING:
    from data_pipelines.stream import Rows, Stream
    from pretrain.config import Config


logger = logging.getLogger(__name__)

FINISH_SAVE_TIMEOUT_S = 120


@dataclass
class Clock:
    """How far the run is. Only the loop advances it."""

    steps: int
    step: int = 0
    tokens: int = 0
    cursor: Cursor | None = None

    def advance(self, cursor: Cursor, tokens: int) -> None:
        self.step += 1
        self.tokens += tokens
        self.cursor = cursor

    @property
    def done(self) -> bool:
        return self.step >= self.steps


@dataclass
class Run:
    config: Config
    folder: RunFolder
    ranks: Ranks
    mesh: Mesh
    device: torch.device
    engine: Engine
    objective: Objective
    data: RunData
    stream: Stream
    store: CheckpointStore
    reporter: Reporter
    hooks: Hooks
    clock: Clock
    stop: StopRequest
    evaluation: EvaluationHook
    finite: FiniteHook

    def lr_factor(self, step: int) -> float:
        return schedule_factor(self.config.optim, step, self.config.run.steps)

    def validation_batches(self) -> Iterator[Batch]:
        rows = micro_batch_rows(self.config.data, self.mesh.data.size, self.config.parallel)
        batches = self.data.validation_batches(rows, self.mesh.data.rank, self.mesh.data.size)
        return self.objective.evaluation_batches(batches)

    def record(self, event: str, **facts: Any) -> None:
        if self.ranks.is_main:
            self.folder.record(event, **facts)

    def state(self) -> TrainingState:
        """All that a resume needs, as it is after the clock's last step."""
        assert self.clock.cursor is not None
        return TrainingState(
            fragments=self.engine.fragments(),
            meta={
                "step": self.clock.step,
                "tokens": self.clock.tokens,
                "cursor": self.clock.cursor.to_dict(),
                "hooks": self.hooks.state(),
                "config": self.config.to_dict(),
                "tokenizer": self.data.fingerprint,
                "row_order": ORDER,
                "vocabulary": None if self.data.vocabulary is None else self.data.vocabulary.to_dict(),
                "versions": library_versions(),
            },
            rank_bytes=random_state(),
        )


@dataclass(frozen=True)
class Stages:
    """Says what the start-up of a launched run is doing; `triptych status` shows it. attempt: None says nothing."""

    run: Path
    attempt: int | None

    def __call__(self, stage: str) -> None:
        tell_stage(self.run, stage, self.attempt)


@contextlib.contextmanager
def open_run(config: Config, *, quiet: bool = False) -> Iterator[Run]:
    """Bring a run up, resumed from its newest whole checkpoint if it has one, and take it down again."""
    with contextlib.ExitStack() as stack:
        ranks = ranks_from_environment()
        device = choose_device(config.run.device, ranks)
        check_layout(config, ranks.world)
        stage = Stages(Path(config.run.folder) / config.run.name, own_attempt() if ranks.is_main else None)
        stage("opening the data")
        data = open_run_data(config)
        config = data.config
        stage("meeting the other ranks")
        start_process_group(ranks, device)
        if device.type == "cuda":
            torch.set_float32_matmul_precision(
                "high"
            )  # TF32: what fp32 runs and the plan's peak are meant to use
        mesh = build_mesh(config.parallel)
        folder = RunFolder(Path(config.run.folder) / config.run.name)
        _enter_folder(folder, mesh, stack)

        store = _open_store(config, folder, mesh)
        stage("verifying the newest checkpoint")
        latest = store.latest()
        if latest is not None:
            refuse_another_run(data, store.read_meta(latest), latest)
        stage("building the model and its engine")
        engine = build_engine(config, mesh, device)
        bytes_per_token = data.bytes_per_token if isinstance(data, TextData) else None
        evaluation = EvaluationHook(config.monitor.evaluate_every_steps, bytes_per_token)
        finite = FiniteHook(config.optim.skip_non_finite_steps)
        hooks = Hooks(_hooks(config, data, finite, evaluation, folder))
        clock = Clock(config.run.steps)
        if latest is not None:
            stage(f"loading {latest.name}")
            _resume(store, latest, engine, hooks, clock)
        engine.before_update(store.wait_staged)
        stack.push(lambda error, *_: finish_save(store) if error else None)
        objective = build_objective(config, data.vocabulary)
        rows = objective.rows(data.train)
        stream = stack.enter_context(_open_stream(config, rows, mesh, clock, device))
        # Everything that could refuse this start has had its say: only now do the run's files change.
        _write_folder(folder, config, data, clock, mesh)
        stage("at its first steps")
        stop = stack.enter_context(StopRequest(mesh.control))
        stream.stop_when(lambda: stop.signal is not None, alone=ranks.world == 1)
        stack.callback(hooks.close)
        reporter = Reporter(_sinks(config, folder, clock, data.validated, quiet) if ranks.is_main else [])
        stack.callback(reporter.close)
        if clock.step == 0:
            reporter.text(0, "config", f"```yaml\n{config.to_yaml()}```")
        run = Run(
            config=config,
            folder=folder,
            ranks=ranks,
            mesh=mesh,
            device=device,
            engine=engine,
            objective=objective,
            data=data,
            stream=stream,
            store=store,
            reporter=reporter,
            hooks=hooks,
            clock=clock,
            stop=stop,
            evaluation=evaluation,
            finite=finite,
        )
        stack.push(lambda _, error, __: record_crash(run, error))
        _tell_start(run)
        yield run


def _tell_start(run: Run) -> None:
    """What is odd about it, and a line in the ledger."""
    clock = run.clock
    if run.ranks.is_main:
        for warning in run.engine.scaled.warnings:
            logger.warning("%s", warning)
        if clock.step > clock.steps:
            logger.warning(
                "step %d is saved already, run.steps = %d: nothing to train", clock.step, clock.steps
            )
    run.record(
        "start",
        step=clock.step,
        world=run.ranks.world,
        zero=run.config.parallel.zero,
        device=str(run.device),
        attempt=own_attempt(),
    )


def import_engine(config: Config) -> None:
    """The libraries that `open_run` imports late, at once, for a process in which that is quicker."""
    if config.parallel.chosen_engine == "megatron":
        import pretrain.engine.megatron
        import pretrain.parallel.stages  # noqa: F401
    else:
        from pretrain.engine.deepspeed import import_deepspeed

        import_deepspeed(choose_device(config.run.device, ranks_from_environment()))
    if needs_parallel_state(config.parallel):
        import_parallel_state()


def build_engine(config: Config, mesh: Mesh, device: torch.device) -> Engine:
    """The model with its initial weights, parallel, inside its engine."""
    if config.parallel.chosen_engine == "megatron":
        return _build_megatron(config, mesh, device)
    from pretrain.engine.deepspeed import DeepSpeedEngine

    sharding = families[config.model.family].sharding
    parallelized = parallelize(
        whole_model(config), sharding, mesh, config.parallel, device=device, seed=config.run.seed
    )
    return DeepSpeedEngine(parallelized, config, mesh, device)


def _build_megatron(config: Config, mesh: Mesh, device: torch.device) -> Engine:
    from pretrain.engine.megatron import MegatronEngine

    # The rules that set learning rates look at the whole model's size.
    scaled = resolve(config, whole_model(config))
    return MegatronEngine(build_parts(config, mesh, device), scaled, config, mesh, device)


def _open_store(config: Config, folder: RunFolder, mesh: Mesh) -> CheckpointStore:
    return CheckpointStore(
        folder.checkpoints,
        group=mesh.storage,
        keep_last=config.checkpoint.keep_last,
        keep_every_steps=config.checkpoint.keep_every_steps,
        asynchronous=config.checkpoint.asynchronous,
        fence=Fence(Launch(folder.path), own_attempt()),
    )


def _hooks(
    config: Config, data: RunData, finite: FiniteHook, evaluation: EvaluationHook, folder: RunFolder
) -> list[Hook]:
    family = families[config.model.family]
    monitor = config.monitor
    flops = family.flops_per_token(config.model, config.data.sequence_length)
    hooks: list[Hook] = [finite]
    if hasattr(config.model, "newton"):
        hooks.append(NewtonHook(monitor.log_every_steps, config.model.newton))
    hooks += [MetricsHook(monitor.log_every_steps, flops), evaluation]
    if isinstance(data, TaskData):
        hooks.append(TaskHook(monitor.evaluate_every_steps, data))
    hooks.append(CheckpointHook(config.checkpoint.save_every_steps))
    if isinstance(data, TextData):
        # Last: sampling has no state, and whatever goes wrong in it must not cost the final save.
        settings = (monitor.sample_every_steps, data.prompts, monitor.sample_tokens)
        hooks.append(SampleHook(data.tokenizer, *settings))
    if isinstance(data, DiffusionData):
        hooks.append(DiffusionSampleHook(data, monitor.sample_every_steps))
    limit_s = monitor.watchdog_seconds
    # A process by itself waits for no other.
    if limit_s is not None and (own_attempt() is not None or dist.get_world_size() > 1):
        hooks.append(WatchdogHook(limit_s, watchdog_folder(folder)))
    return hooks


def watchdog_folder(folder: RunFolder) -> AttemptFolder:
    """Where the ranks' signs of life are: the attempt's, or of a run that no launcher started one for all starts."""
    attempt = own_attempt()
    return AttemptFolder(folder.watchdog) if attempt is None else Launch(folder.path).attempt(attempt)


def _enter_folder(folder: RunFolder, mesh: Mesh, stack: contextlib.ExitStack) -> None:
    """Rank 0 locks the folder; what it finds wrong, all ranks raise."""
    problem: list[UserError | None] = [None]
    if mesh.is_main:
        try:
            folder.create()
            stack.enter_context(folder.lock(own_attempt()))
            folder.forget_signs_of_life()
        except UserError as error:
            problem = [error]
        except ValueError as error:
            problem = [UserError(str(error))]
        except OSError as error:
            message = (
                f"{folder.path}: {error.strerror}; make room there or mend it, then the same command goes on"
            )
            problem = [of_storage(error, message)]
    dist.broadcast_object_list(problem, src=0, group=mesh.control)
    if problem[0] is not None:
        raise problem[0]


def refuse_another_run(data: RunData, meta: dict[str, Any], path: Path) -> None:
    """A run's weights fit one tokenizer and one model. Raises CheckpointError that lists what differs."""
    meta = as_of_today(meta)
    check_meta(meta, path, resumed=True)
    if meta["tokenizer"] != data.fingerprint and isinstance(data, TaskData):
        raise CheckpointError(
            f"{path}: this checkpoint was not trained on {data.describe()}; set data.task back, or train under another "
            "run.name; the checkpoint is untouched"
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
    ours, saved = data.config.to_dict()["model"], meta["config"]["model"]
    changed = [
        f"  model.{key}: {saved.get(key)} in the checkpoint, {ours.get(key)} in the config"
        for key in dict.fromkeys([*saved, *ours])
        if saved.get(key) != ours.get(key) and key not in getattr(data.config.model, "CHANGEABLE", ())
    ]
    if changed:
        raise CheckpointError(
            f"{path}: this checkpoint is of another model:\n"
            + "\n".join(changed)
            + "\nset them back to resume, or train under another run.name; the checkpoint is untouched"
        )


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


def _resume(store: CheckpointStore, path: Path, engine: Engine, hooks: Hooks, clock: Clock) -> None:
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


def record_crash(run: Run, error: BaseException | None) -> None:
    """A line in the ledger; a full disk is no reason to hide the error."""
    if error is not None:
        with contextlib.suppress(UserError):
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            run.record("crash", step=run.clock.step, reason=reason)


def random_state() -> bytes:
    """This rank's generators.

    What a run draws is seeded by (seed, purpose, row), never from these; they are kept for code of the user's
    that does draw from them, and belong to one rank of one world size.
    """
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    buffer = io.BytesIO()
    torch.save(states, buffer)
    return buffer.getvalue()


def set_random_state(saved: bytes, path: Path) -> None:
    """Raises CheckpointError for bytes that `random_state` did not write; they are read as tensors alone."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own of a foreign pickle say how to run it
            states = torch.load(io.BytesIO(saved), weights_only=True)
        torch.set_rng_state(states["cpu"])
        if "cuda" in states and torch.cuda.is_available():
            torch.cuda.set_rng_state(states["cuda"])
    except Exception as error:  # what a pickle of foreign bytes raises is anything
        foreign = isinstance(error, pickle.UnpicklingError)
        reason = "it holds something other than tensors; nothing of it was run" if foreign else str(error)
        reason = reason.split("\n", 1)[0]
        raise CheckpointError(
            f"{path}: a rank's random state cannot be read ({type(error).__name__}: {reason}); put the file back from "
            "a copy, or remove it and its line in MANIFEST.json to go on without"
        ) from None


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


def _write_folder(folder: RunFolder, config: Config, data: RunData, clock: Clock, mesh: Mesh) -> None:
    if mesh.is_main:
        write_config(folder, config.to_yaml())
        if isinstance(data, TextData):
            folder.save_tokenizer(data.tokenizer)
        if isinstance(data, DiffusionData):
            folder.save_modalities(data.modalities)
        if clock.step == 0:
            folder.keep_lost_course()
        folder.cut_metrics(after_step=clock.step if clock.step else -1)


def _open_stream(config: Config, rows: Rows, mesh: Mesh, clock: Clock, device: torch.device) -> Stream:
    return open_stream(
        rows,
        global_batch_rows=config.data.global_batch_rows,
        rank=mesh.data.rank,
        world=mesh.data.size,
        start=clock.cursor,
        workers=config.data.workers,
        prefetch=config.data.prefetch_batches,
        steps=config.run.steps - clock.step,
        pin=device.type == "cuda",
    )


def _sinks(config: Config, folder: RunFolder, clock: Clock, validated: str, quiet: bool) -> list[Sink]:
    from rich.console import Console

    sinks: list[Sink] = [JsonLinesSink(folder.metrics)]
    if config.monitor.tensorboard:
        sinks.append(TensorBoardSink(folder.tensorboard, clock.step))
    if not quiet:
        sinks.append(ProgressSink(Console(), clock.step, clock.steps, validated))
    return sinks
