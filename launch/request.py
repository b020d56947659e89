"""What is to be launched: one or several runs of equal shape, and on what."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.job import LaunchedRun
from launch.settings import ClusterSettings
from pretrain.config import Config, DataSection, SourceSection
from pretrain.config.validation import own_data_section


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
    data = config.data.model_copy(update={"path": path, "own": _absolute_own(config.data)})
    return config.replace(run=run, data=data)


def joined(config: Config, settings: ClusterSettings) -> Config:
    """With the cluster's word on its GPUs and on how nodes are joined, where the run's own is silent."""
    known = settings.interconnect.model_dump(exclude_none=True)
    said = config.launch.model_dump(exclude_none=True, exclude_defaults=True)
    return config.replace(launch=config.launch.model_copy(update={**known, **said}))


def overrides_of(config: Config) -> list[str]:
    """What a launch settled, as it is written on a command line: the cluster's GPUs, and the layout."""
    launch = [f"launch.{key}={value}" for key, value in config.launch if value is not None]
    layout = [f"parallel.{key}={value}" for key, value in config.parallel if key != "auto"]
    return [*launch, *layout, f"data.micro_batch_rows={config.data.micro_batch_rows}"]


def laid_out(config: Config, settings: ClusterSettings, ranks: int) -> tuple[Config, str | None]:
    """With the layout that the plan chooses for what is auto, and why; None where nothing is."""
    if not config.parallel.auto:
        return config, None
    from pretrain.plan.auto import choose_layout
    from pretrain.plan.machine import cpu_machine, planned_machine

    on_cpu = config.run.device == "cpu" or settings.gpus_per_node == 0
    machine = cpu_machine(settings.ranks_per_node) if on_cpu else planned_machine(config, config.launch.gpu)
    choice = choose_layout(config, ranks, machine)
    return choice.config, choice.reason


def _absolute_own(data: DataSection) -> dict[str, Any] | None:
    """The same of data from outside, which says which of its settings are paths."""
    if data.own is None:
        return None
    section = own_data_section(data)
    paths = {name: getattr(section, name) for name in section.paths}
    return {
        **data.own,
        **{name: str(Path(path).resolve()) for name, path in paths.items() if path is not None},
    }
