"""One run, assembled from its config: who owns what, in the order in which it comes up."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from data_pipelines.batch import Batch, Cursor
from data_pipelines.evaluation import evaluation_batches
from data_pipelines.stream import open_stream
from data_pipelines.tokenizers import Tokenizer
from models import families
from models.initialise import initialise
from pretrain.checkpoint import CheckpointStore, TrainingState
from pretrain.engine.base import Engine
from pretrain.errors import CheckpointError, UserError
from pretrain.hooks.base import Hook, Hooks
from pretrain.hooks.checkpoints import CheckpointHook
from pretrain.hooks.evaluation import EvaluationHook
from pretrain.hooks.metrics import MetricsHook
from pretrain.hooks.samples import SampleHook
from pretrain.monitoring import JsonLinesSink, ProgressSink, Reporter, Sink, TensorBoardSink
from pretrain.objectives import Objective, build_objective
from pretrain.optim import schedule_factor
from pretrain.parallel.mesh import Mesh, build_mesh, data_parallel_size
from pretrain.parallel.parallelize import parallelize
from pretrain.parallel.ranks import Ranks, choose_device, ranks_from_environment, start_process_group
from pretrain.run_data import RunData, open_run_data
from pretrain.run_folder import RunFolder, write_config
from pretrain.signals import StopRequest

if TYPE_CHECKING:
    from data_pipelines.stream import Stream
    from pretrain.config import Config


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

    @property
    def tokenizer(self) -> Tokenizer:
        return self.data.tokenizer

    def lr_factor(self, step: int) -> float:
        return schedule_factor(self.config.optim, step, self.config.run.steps)

    def validation_batches(self) -> Iterator[Batch]:
        return evaluation_batches(
            self.data.validation,
            self.config.data.sequence_length,
            rows_per_batch=max(1, self.config.data.global_batch_rows // self.mesh.data.size),
            rank=self.mesh.data.rank,
            world=self.mesh.data.size,
            limit_rows=self.config.monitor.evaluate_rows,
        )

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
                "tokenizer": self.tokenizer.fingerprint,
                "versions": library_versions(),
            },
            rank_bytes=torch.get_rng_state().numpy().tobytes(),
        )


@contextlib.contextmanager
def open_run(config: Config, *, quiet: bool = False) -> Iterator[Run]:
    """Bring a run up, resumed from its newest whole checkpoint if it has one, and take it down again."""
    with contextlib.ExitStack() as stack:
        ranks = ranks_from_environment()
        device = choose_device(config.run.device, ranks)
        data_size = data_parallel_size(config.parallel, ranks.world, config.data.global_batch_rows)
        data = open_run_data(config)
        config = data.config
        start_process_group(ranks, device)
        mesh = build_mesh(config.parallel)
        assert mesh.data.size == data_size
        folder = RunFolder(Path(config.run.folder) / config.run.name)
        _enter_folder(folder, mesh, stack)

        store = CheckpointStore(
            folder.checkpoints,
            group=mesh.storage,
            keep_last=config.checkpoint.keep_last,
            keep_every_steps=config.checkpoint.keep_every_steps,
            asynchronous=config.checkpoint.asynchronous,
        )
        latest = store.latest()
        if latest is not None:
            refuse_another_run(data, store.read_meta(latest), latest)
        engine = build_engine(config, mesh, device)
        evaluation = EvaluationHook(config.monitor.evaluate_every_steps, data.bytes_per_token)
        hooks = Hooks(_hooks(config, evaluation))
        clock = Clock(config.run.steps)
        if latest is not None:
            _resume(store, latest, engine, hooks, clock, config)
        stream = stack.enter_context(_open_stream(config, data, mesh, clock))
        # Everything that could refuse this start has had its say: only now does the folder change.
        _write_folder(folder, config, data, clock, mesh)
        stop = StopRequest(mesh.control)
        stack.callback(stop.close)
        stack.callback(hooks.close)
        reporter = Reporter(_sinks(config, folder, clock, quiet) if ranks.is_main else [])
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
            objective=build_objective(config.objective),
            data=data,
            stream=stream,
            store=store,
            reporter=reporter,
            hooks=hooks,
            clock=clock,
            stop=stop,
            evaluation=evaluation,
        )
        run.record("start", step=clock.step, world=ranks.world, zero=config.parallel.zero, device=str(device))
        yield run


def build_engine(config: Config, mesh: Mesh, device: torch.device) -> Engine:
    """The model with its initial weights, parallel, inside its engine."""
    from pretrain.engine.deepspeed import DeepSpeedEngine

    family = families[config.model.family]
    with torch.device("meta"):
        model = family.build(config.model)
    model.to_empty(device=device)
    initialise(model, config.run.seed)
    return DeepSpeedEngine(parallelize(model, mesh, config.parallel), config, mesh, device)


def _hooks(config: Config, evaluation: EvaluationHook) -> list[Hook]:
    family = families[config.model.family]
    monitor = config.monitor
    flops = family.flops_per_token(config.model, config.data.sequence_length)
    return [
        MetricsHook(monitor.log_every_steps, flops),
        evaluation,
        SampleHook(monitor.sample_every_steps, monitor.sample_prompts, monitor.sample_tokens),
        CheckpointHook(config.checkpoint.save_every_steps),
    ]


def _enter_folder(folder: RunFolder, mesh: Mesh, stack: contextlib.ExitStack) -> None:
    """Rank 0 locks the folder; what it finds wrong, all ranks raise."""
    problem: list[str | None] = [None]
    if mesh.is_main:
        try:
            folder.create()
            stack.enter_context(folder.lock())
        except UserError as error:
            problem = [str(error)]
    dist.broadcast_object_list(problem, src=0, group=mesh.control)
    if problem[0] is not None:
        raise UserError(problem[0])


def refuse_another_run(data: RunData, meta: dict[str, Any], path: Path) -> None:
    """A run's weights fit one tokenizer and one model. Raises CheckpointError that lists what differs."""
    if meta["tokenizer"] != data.tokenizer.fingerprint:
        raise CheckpointError(
            f"{path}: this run reads text through tokenizer {meta['tokenizer'][:12]}, and "
            f"{data.config.data.sources[0].path} was built with {data.tokenizer.fingerprint[:12]} "
            f"({data.tokenizer.describe()}); set data.path back, build the dataset with `--tokenizer` of the run's "
            "tokenizer folder, or train under another run.name; the checkpoint is untouched"
        )
    ours, saved = data.config.to_dict()["model"], meta["config"]["model"]
    changed = [
        f"  model.{key}: {saved.get(key)} in the checkpoint, {ours.get(key)} in the config"
        for key in dict.fromkeys([*saved, *ours])
        if saved.get(key) != ours.get(key)
    ]
    if changed:
        raise CheckpointError(
            f"{path}: this checkpoint is of another model:\n"
            + "\n".join(changed)
            + "\nset them back to resume, or train under another run.name; the checkpoint is untouched"
        )


def _resume(
    store: CheckpointStore, path: Path, engine: Engine, hooks: Hooks, clock: Clock, config: Config
) -> None:
    state = TrainingState(fragments=engine.fragments(), meta={})
    meta = store.load(path, state)
    engine.after_load()
    hooks.load_state(meta["hooks"])
    clock.step, clock.tokens = meta["step"], meta["tokens"]
    clock.cursor = Cursor.from_dict(meta["cursor"])
    if state.rank_bytes is not None:
        torch.set_rng_state(torch.frombuffer(bytearray(state.rank_bytes), dtype=torch.uint8))


def _write_folder(folder: RunFolder, config: Config, data: RunData, clock: Clock, mesh: Mesh) -> None:
    if mesh.is_main:
        write_config(folder, config.to_yaml())
        folder.save_tokenizer(data.tokenizer)
        folder.cut_metrics(after_step=clock.step if clock.step else -1)


def _open_stream(config: Config, data: RunData, mesh: Mesh, clock: Clock) -> Stream:
    return open_stream(
        data.train,
        global_batch_rows=config.data.global_batch_rows,
        rank=mesh.data.rank,
        world=mesh.data.size,
        start=clock.cursor,
        workers=config.data.workers,
        prefetch=config.data.prefetch_batches,
        steps=config.run.steps - clock.step,
    )


def _sinks(config: Config, folder: RunFolder, clock: Clock, quiet: bool) -> list[Sink]:
    from rich.console import Console

    sinks: list[Sink] = [JsonLinesSink(folder.metrics)]
    if config.monitor.tensorboard:
        sinks.append(TensorBoardSink(folder.tensorboard, clock.step))
    if not quiet:
        sinks.append(ProgressSink(Console(), clock.step, clock.steps))
    return sinks


def library_versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("triptych", "torch", "deepspeed", "megatron-core"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
