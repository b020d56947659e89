"""A run's assembly from its config: what it is made of, in the order in which it comes up."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from data_pipelines.stream.stream import open_stream
from pretrain.attempts import Fence, Launch, own_attempt, tell_stage
from pretrain.checkpoint import CheckpointStore
from pretrain.config.nearest import check_layout
from pretrain.engine.base import Engine
from pretrain.errors import UserError, of_storage
from pretrain.hooks.base import Setup
from pretrain.hooks.evaluation import EvaluationHook
from pretrain.hooks.finite import FiniteHook
from pretrain.hooks.table import build_hooks
from pretrain.monitoring import JsonLinesSink, ProgressSink, Reporter, Sink, TensorBoardSink
from pretrain.objectives import build_objective
from pretrain.optim.scaling import resolve
from pretrain.parallel.mesh import Mesh, build_mesh, import_parallel_state, needs_parallel_state
from pretrain.parallel.parallelize import parallelize
from pretrain.parallel.ranks import choose_device, ranks_from_environment, start_process_group
from pretrain.parallel.stages import build_parts, whole_model
from pretrain.resuming import finish_save, refuse_another_run, resume
from pretrain.run import Clock, Run
from pretrain.run_data import RunData, open_run_data
from pretrain.run_folder import RunFolder, write_config
from pretrain.signals import StopRequest

if TYPE_CHECKING:
    from data_pipelines.stream.stream import Rows, Stream
    from pretrain.config import Config


logger = logging.getLogger(__name__)


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
        assert not config.parallel.auto, "choose_layout decides what is open before a run is built"
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
        hooks = build_hooks(Setup(config, data, folder))
        clock = Clock(config.run.steps)
        if latest is not None:
            stage(f"loading {latest.name}")
            resume(store, latest, engine, hooks, clock)
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
        scalars = {**objective.scalars, **hooks.scalars}
        sinks = _sinks(config, folder, clock, data.validated, scalars, quiet=quiet) if ranks.is_main else []
        reporter = Reporter(sinks)
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
            evaluation=hooks.one(EvaluationHook),
            finite=hooks.one(FiniteHook),
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

    parallelized = parallelize(
        whole_model(config), mesh, config.parallel, device=device, seed=config.run.seed
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


def record_crash(run: Run, error: BaseException | None) -> None:
    """A line in the ledger; a full disk is no reason to hide the error."""
    if error is not None:
        with contextlib.suppress(UserError):
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            run.record("crash", step=run.clock.step, reason=reason)


def _write_folder(folder: RunFolder, config: Config, data: RunData, clock: Clock, mesh: Mesh) -> None:
    if mesh.is_main:
        write_config(folder, config.to_yaml())
        data.keep_in(folder)
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


def _sinks(
    config: Config, folder: RunFolder, clock: Clock, validated: str, scalars: dict[str, str], *, quiet: bool
) -> list[Sink]:
    from rich.console import Console

    sinks: list[Sink] = [JsonLinesSink(folder.metrics)]
    if config.monitor.tensorboard:
        sinks.append(TensorBoardSink(folder.tensorboard, clock.step, scalars))
    if not quiet:
        sinks.append(ProgressSink(Console(), clock.step, clock.steps, validated))
    return sinks
