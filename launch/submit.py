"""From a config to a job: the folder it runs from, the batch script, and Slurm's answer."""

from __future__ import annotations

import itertools
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from launch import slurm
from launch.batch import EXIT_NOTHING_TO_DO
from launch.durations import minutes_of
from launch.job import LaunchedRun
from launch.policy import Ending
from launch.rank import TrainJob
from launch.settings import ClusterSettings
from launch.snapshot import take_snapshot
from pretrain.attempts import ATTEMPT_VARIABLE, read_json
from pretrain.config import Config, SourceSection, load_config
from pretrain.config.nearest import check_layout
from pretrain.errors import ConfigError, UserError
from pretrain.typed import typed_for_runs
from pretrain.yaml_text import parse_yaml

LEAST_SECONDS_BEFORE_SIGNAL = 30
"""A job must have at least this long between its start and the request to save, or no step is ever saved."""
RECORDED_COLLECTIVES = 2000


@dataclass(frozen=True)
class Request:
    """One or several runs of equal shape, to be submitted together."""

    name: str
    """Of the job."""
    configs: tuple[Config, ...]
    settings: ClusterSettings
    nodes: int
    after: str | None = None
    """What must end well first, as Slurm's `dependency` has it."""
    preflight_only: bool = False
    swept: tuple[str, ...] = ()
    """Keys of the config in which the runs differ."""
    command: str = ""
    """What was typed, to be typed again."""

    @property
    def ranks(self) -> int:
        return self.nodes * self.settings.ranks_per_node

    @property
    def runs(self) -> list[LaunchedRun]:
        return [run_of(config) for config in self.configs]

    @property
    def is_sweep(self) -> bool:
        return len(self.configs) > 1

    @property
    def excluded(self) -> list[str]:
        """Nodes that were found bad in an earlier launch of these runs."""
        return list(dict.fromkeys(node for run in self.runs for node in run.excluded))

    @property
    def copies(self) -> int:
        """How many jobs each run gets."""
        return 1 if self.preflight_only else self.settings.copies

    @property
    def folder(self) -> Path:
        """Where the script, the pickles and Slurm's own logs go."""
        if not self.is_sweep:
            return self.runs[0].folder / "submitit"
        return Path(self.configs[0].run.folder) / f"{self.name}.sweep"


def run_of(config: Config) -> LaunchedRun:
    return LaunchedRun(Path(config.run.folder) / config.run.name)


def absolute(config: Config) -> Config:
    """With paths that mean the same on every node, wherever the job's working folder is."""
    run = config.run.model_copy(update={"folder": str(Path(config.run.folder).resolve())})
    path = config.data.path
    if isinstance(path, str):
        path = str(Path(path).resolve())
    elif path is not None:
        path = tuple(SourceSection(path=str(Path(item.path).resolve()), weight=item.weight) for item in path)
    return config.replace(run=run, data=config.data.model_copy(update={"path": path}))


def sweep_configs(
    path: str, overrides: Sequence[str], sweeps: Sequence[str], *, allow_env: bool = False
) -> tuple[Config, ...]:
    """One config per combination of the swept values, each with a run name of its own.

    sweeps: `key=[value, value]`. Raises ConfigError.
    """
    axes = [_axis(text) for text in sweeps]
    base = load_config(path, overrides, allow_env=allow_env)
    found = []
    for combination in itertools.product(*axes):
        # A value is written as YAML again, so that lists and nulls survive.
        settings = [f"{key}={_plain(value)}" for key, value in combination]
        name = "-".join(
            [base.run.name, *(f"{key.split('.')[-1]}-{_plain(value)}" for key, value in combination)]
        )
        name = re.sub(r"[^A-Za-z0-9._-]", "_", name)
        found.append(load_config(path, [*overrides, *settings, f"run.name={name}"], allow_env=allow_env))
    names = [config.run.name for config in found]
    twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if twice:
        raise ConfigError(
            f"--sweep gives {len(names)} runs, and more than one would be called {', '.join(twice)}"
        )
    return tuple(found)


def swept_keys(sweeps: Sequence[str]) -> tuple[str, ...]:
    return tuple(text.partition("=")[0] for text in sweeps)


def _setting(config: Config, key: str) -> Any:
    """The value of a dotted key."""
    found: Any = config.to_dict()
    for part in key.split("."):
        found = found[part]
    return found


def _axis(text: str) -> list[tuple[str, Any]]:
    key, equals, values = text.partition("=")
    try:
        listed = parse_yaml(values, f"--sweep {key}") if equals else None
    except ConfigError:
        listed = None
    if not isinstance(listed, list) or not listed:
        raise ConfigError(f"--sweep {text}: write key=[value, value], e.g. --sweep 'optim.lr=[1e-3,3e-3]'")
    return [(key, value) for value in listed]


def _plain(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("\n").removesuffix("\n...")


# ------------------------------------------------------------------------------------------------ the script


def script_parameters(request: Request) -> dict[str, Any]:
    """What submitit makes the batch script of."""
    settings = request.settings
    extra: dict[str, Any] = {
        "chdir": str(request.runs[0].code),  # before PYTHONPATH in the order of imports
        "requeue" if settings.requeue else "no-requeue": True,
        **settings.sbatch,
    }
    if request.after is not None:
        extra["kill-on-invalid-dep"] = "yes"
    if request.excluded:
        extra["exclude"] = settings.excluding(request.excluded)
    given = {
        "job_name": request.name,
        "partition": settings.partition,
        "account": settings.account,
        "qos": settings.qos,
        "constraint": settings.constraint,
        "time": minutes_of(settings.time),
        "nodes": request.nodes,
        "ntasks_per_node": settings.ranks_per_node,
        "gpus_per_node": settings.gpus_per_node or None,
        "cpus_per_task": settings.cpus_per_task,
        "exclusive": settings.exclusive or None,
        "dependency": _dependency(request),
    }
    return {
        **{key: value for key, value in given.items() if value is not None},
        "signal_delay_s": settings.signal_seconds,
        "stderr_to_stdout": True,
        "setup": _before(request),
        "srun_args": _srun_arguments(settings),
        "teardown": _after(),
        "additional_parameters": extra,
    }


def _dependency(request: Request) -> str | None:
    turn = "singleton" if request.copies > 1 else None
    return ",".join(part for part in (request.after, turn) if part is not None) or None


def dependency_on(runs: Sequence[LaunchedRun]) -> str | None:
    """What Slurm must wait for until all of these runs have finished; None if they have. Raises UserError for one
    that never will."""
    parts = []
    for run in runs:
        if run.outcome_file.is_file():
            outcome = read_json(run.outcome_file)
            if outcome["ending"] != Ending.done:
                raise UserError(
                    f"--after {run.run.name}: it has ended: {outcome['message']}; launch it again first"
                )
            continue
        jobs = run.job()["jobs"]
        if len(jobs) < run.settings.copies:
            raise UserError(
                f"--after {run.run.name}: its jobs' numbers are not all known; is its submission going on, or was it "
                "interrupted?"
            )
        # Of a chain, the job that finishes the run is the only one that ends well.
        parts.append("?".join(f"afterok:{job}" for job in jobs))
    if len(parts) > 1 and any("?" in part for part in parts):
        raise UserError(
            "--after several runs, one of them a chain of jobs: Slurm cannot wait for that; name one run"
        )
    return ",".join(parts) or None


def _srun_arguments(settings: ClusterSettings) -> list[str]:
    # Without the first two a rank that is killed leaves the others waiting for ever.
    arguments = ["--kill-on-bad-exit=1", f"--wait={settings.wait_seconds}", "--open-mode=append"]
    if settings.container is not None:
        arguments.append(f"--container-image={settings.container}")
        if settings.mounts:
            arguments.append(f"--container-mounts={','.join(settings.mounts)}")
    return arguments


def _before(request: Request) -> list[str]:
    python = shlex.quote(sys.executable)
    code = shlex.quote(str(request.runs[0].code))
    moment = "check" if request.preflight_only else "begin"
    if request.is_sweep:
        listed = shlex.quote(str(request.folder / "runs.txt"))
        run = f'run=$(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" {listed})'
    else:
        run = f"run={shlex.quote(str(request.runs[0].run))}"
    return [
        "trap : TERM  # what is below still runs after a preemption",
        f"export PYTHONPATH={code}${{PYTHONPATH:+:$PYTHONPATH}} PYTHONUNBUFFERED=1",
        # How many collectives torch's flight recorder keeps; a hang then shows which rank waits in which.
        f"export TORCH_FR_BUFFER_SIZE={RECORDED_COLLECTIVES} TORCH_NCCL_TRACE_BUFFER_SIZE={RECORDED_COLLECTIVES}",
        *_cpus_of_steps(request.settings),
        *request.settings.setup,
        run,
        f'{ATTEMPT_VARIABLE}=$({python} -m launch.batch {moment} "$run"); code=$?',
        f"[ $code -eq {EXIT_NOTHING_TO_DO} ] && exit 0",
        "[ $code -ne 0 ] && exit $code",
        f"export {ATTEMPT_VARIABLE}",
    ]


def _cpus_of_steps(settings: ClusterSettings) -> list[str]:
    """Since Slurm 22.05 srun does not take --cpus-per-task from its job, and each rank would get one core."""
    return [] if settings.cpus_per_task is None else [f"export SRUN_CPUS_PER_TASK={settings.cpus_per_task}"]


def _after() -> list[str]:
    python = shlex.quote(sys.executable)
    return [
        "code=$?",
        "trap '' TERM CONT  # the verdict outlives what ends the job",
        f'{python} -m launch.batch end "$run" --code $code',
        "exit $?",
    ]


def script(request: Request) -> str:
    """The whole batch script, as submitit will submit it."""
    from submitit.slurm.slurm import _make_sbatch_string

    command = f"{shlex.quote(sys.executable)} -u -m submitit.core._submit {shlex.quote(str(request.folder))}"
    count = len(request.configs) if request.is_sweep else None
    text: str = _make_sbatch_string(
        command=command, folder=request.folder, map_count=count, **script_parameters(request)
    )
    return text


# ------------------------------------------------------------------------------------------------ submission


def check_shape(request: Request) -> None:
    """What can be known without Slurm. Raises ConfigError."""
    for config in request.configs:
        check_layout(config, request.ranks)
    settings = request.settings
    limit_s = 60 * minutes_of(settings.time)
    if limit_s < settings.signal_seconds + LEAST_SECONDS_BEFORE_SIGNAL:
        raise ConfigError(
            f"time = {settings.time}: the ranks are told to save {settings.signal_seconds} s before the limit, which "
            f"leaves {limit_s - settings.signal_seconds} s to train; allow more time, or lower signal_seconds"
        )


def check_data(request: Request) -> None:
    """Raises DataError for a dataset that is not there, which every rank would find after the queue.

    In a container, paths are the container's.
    """
    from data_pipelines.storage.dataset import read_dataset

    if request.settings.container is None:
        for path in dict.fromkeys(
            source.path for config in request.configs for source in config.data.sources
        ):
            read_dataset(Path(path)).split("train")


def check_cluster(request: Request) -> None:
    """What Slurm would refuse only after a while, or in its own words. Raises UserError."""
    slurm.require()
    if request.after is not None and "?" in request.after and request.copies > 1:
        raise UserError(
            "--after a chain of jobs, and a chain itself: Slurm cannot wait for both; leave one of them out"
        )
    if request.after is not None and not any(job.is_live for job in slurm.queue(_jobs_in(request.after))):
        raise UserError(
            "--after: the job to wait for is not in the queue any more, and did not finish; launch it again"
        )
    known = slurm.partitions()
    wanted = request.settings.partition
    names = wanted.split(",") if wanted else [item.name for item in known if item.default]
    chosen = [item for item in known if item.name in names]
    if not names or len(chosen) < len(names):
        there = ", ".join(item.name for item in known) or "none"
        missing = f"partition = {wanted}: there is none" if wanted else "no default partition; name one"
        raise UserError(f"{missing}; there are: {there}")
    most = max(chosen, key=lambda item: item.nodes)
    if request.nodes > most.nodes:
        raise UserError(f"--nodes {request.nodes}: partition {most.name} has {most.nodes}")
    _check_time(request.settings.time, chosen)
    for run in request.runs:
        refuse_a_second_job(run)


def _jobs_in(dependency: str) -> list[str]:
    return re.findall(r"afterok:([0-9_]+)", dependency)


def _check_time(wanted: str, chosen: Sequence[slurm.Partition]) -> None:
    """Slurm takes a job whose limit exceeds its partition's, and never starts it."""
    limits = [item.most_minutes for item in chosen]
    most = None if None in limits else max(limit for limit in limits if limit is not None)
    if most is not None and minutes_of(wanted) > most:
        allowed = ", ".join(f"{item.name} {item.time_limit}" for item in chosen)
        raise UserError(
            f"time = {wanted}: more than the partition allows ({allowed}); the run takes many jobs anyway"
        )


def refuse_a_second_job(run: LaunchedRun) -> None:
    """Raises UserError if a job of this run is in the queue."""
    if not run.job_file.is_file():
        return
    alive = [job for job in slurm.queue(run.job()["jobs"]) if job.is_live]
    if alive:
        states = ", ".join(f"{job.job} ({job.state.lower()})" for job in alive)
        raise UserError(
            f"{run.run}: launched already, job {states}; "
            f"`{typed_for_runs('cancel', run.run.name, run.run.parent)}` ends it, or choose another run.name"
        )


def prepare(request: Request) -> None:
    """Write what the job will read: snapshots, configs, settings. A run that had ended may start again."""
    for config, run in zip(request.configs, request.runs, strict=True):
        run.folder.mkdir(parents=True, exist_ok=True)
        take_snapshot(run, config)
        if not request.preflight_only:
            run.outcome_file.unlink(missing_ok=True)
        swept = {key: _setting(config, key) for key in request.swept}
        run.write_job(
            request.settings,
            nodes=request.nodes,
            name=request.name,
            jobs=[],
            swept=swept,
            command=request.command,
        )
    if request.is_sweep:
        request.folder.mkdir(parents=True, exist_ok=True)
        lines = "".join(f"{run.run}\n" for run in request.runs)
        (request.folder / "runs.txt").write_text(lines, encoding="utf-8")


def submit(request: Request) -> list[str]:
    """Submit through submitit; the jobs' numbers. Raises UserError with sbatch's refusal and its likely cause."""
    import submitit
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    executor = submitit.SlurmExecutor(folder=request.folder)
    executor.update_parameters(**script_parameters(request))
    functions = [TrainJob(str(run.run)) for run in request.runs]
    jobs: list[list[str]] = [[] for _ in functions]
    try:
        for _ in range(request.copies):
            if len(functions) == 1:
                jobs[0].append(str(executor.submit(functions[0]).job_id))
            else:
                submitted = executor.map_array(_run, functions)
                for found, job in zip(jobs, submitted, strict=True):
                    found.append(str(job.job_id))
            # At once: the first job of a chain may end before the last one is queued.
            _write_jobs(request, jobs)
    except (FailedJobError, FailedSubmissionError) as error:
        if any(jobs):  # a chain of which a limit allowed a part: all of it, or nothing
            slurm.call("scancel", *(job for found in jobs for job in found))
            _write_jobs(request, [[] for _ in jobs])
        raise UserError(slurm.explain("sbatch", str(error))) from None
    for run, found in zip(request.runs, jobs, strict=True):
        run.launch.record("launch", jobs=found, nodes=request.nodes, ranks=request.ranks)
    return [job for found in jobs for job in found]


def _write_jobs(request: Request, jobs: Sequence[list[str]]) -> None:
    for run, found in zip(request.runs, jobs, strict=True):
        run.write_jobs(found)


def _run(job: TrainJob) -> None:
    job()
