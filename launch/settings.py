"""What a site's cluster wants to be told: `configs/cluster/*.yaml`, and the command line over it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator

from launch.durations import minutes_of
from pretrain.config.kinds import wrong_kinds
from pretrain.config.section import Section, told
from pretrain.errors import ConfigError
from pretrain.yaml_text import read_yaml

DEFAULT = Path("configs/cluster/default.yaml")


class PreflightSettings(Section):
    enabled: bool = True
    seconds: int = Field(default=300, ge=10, le=86_400)
    """The whole check is ended after this; a node that has not answered by then counts as bad."""
    least_gemm_teraflops: float | None = Field(default=None, gt=0, le=1e6)
    """A GPU whose bf16 matrix product is slower than this is bad. null: no limit."""
    most_clock_skew_seconds: float = Field(default=5.0, gt=0, le=86_400)
    dry_step: bool | None = None
    """Build the model and train one step of it, which is kept nowhere. null: on GPUs. A CPU's first step finds the
    same, and comes as soon."""


class InterconnectSettings(Section):
    """What GPUs there are and how they are joined, for the plan. null: as the run's `launch` says."""

    gpu: Literal["h100", "h200", "a100", "a100_40"] | None = None
    ports: int | None = Field(default=None, ge=1, le=256)
    port_gb_s: float | None = Field(default=None, gt=0, le=10_000)
    node_gb_s: float | None = Field(default=None, gt=0, le=100_000)


class ClusterSettings(Section):
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    time: str = "1-00:00:00"
    """Time limit of one job, days-hours:minutes:seconds as Slurm writes it. The run may take many jobs."""
    gpus_per_node: int = Field(default=8, ge=0, le=256)
    tasks_per_node: int | None = Field(default=None, ge=1, le=4096)
    """Ranks per node. null: one per GPU, or one without GPUs."""
    cpus_per_task: int | None = Field(default=None, ge=1, le=4096)
    exclusive: bool = True
    requeue: bool = True
    """False: the site forbids requeueing; `chain_jobs` jobs are queued at once, one to run after the other."""
    chain_jobs: int = Field(default=8, ge=1, le=1000)
    signal_seconds: int = Field(default=120, ge=1, le=86_400)
    """The ranks are told to save this long before the time limit."""
    wait_seconds: int = Field(default=60, ge=1, le=86_400)
    """After one rank ended, the others are ended this much later."""
    attempts_without_progress: int = Field(default=3, ge=1, le=1000)
    """So many attempts in a row that saved no new step end the run."""
    setup: tuple[str, ...] = ()
    """Shell lines of the batch script, before anything else: modules, variables."""
    container: str | None = None
    """Image for pyxis; the run folder and the data must be mounted."""
    mounts: tuple[str, ...] = ()
    sbatch: dict[str, Any] = Field(default_factory=dict)
    """Any other sbatch option, as key: value; true for one without a value."""
    interconnect: InterconnectSettings = Field(default_factory=InterconnectSettings)
    preflight: PreflightSettings = Field(default_factory=PreflightSettings)

    @field_validator("time", mode="before")
    @classmethod
    def _time_is_slurms(cls, value: Any) -> str:
        minutes_of(str(value))
        return str(value)

    def excluding(self, nodes: Iterable[str]) -> str:
        """For Slurm's `exclude`: these nodes, and those that sbatch is told to leave out anyway."""
        own = self.sbatch.get("exclude")
        return ",".join([*([str(own)] if own else []), *nodes])

    @property
    def copies(self) -> int:
        """Jobs that a launch queues."""
        return 1 if self.requeue else self.chain_jobs

    @property
    def ranks_per_node(self) -> int:
        return self.tasks_per_node or max(1, self.gpus_per_node)


def load_settings(
    path: Path | None, overrides: dict[str, Any], defaults: Mapping[str, Any] | None = None
) -> ClusterSettings:
    """The settings in `path`, or in `configs/cluster/default.yaml` if that is there, over `defaults` and under
    `overrides`.

    Raises ConfigError with every problem.
    """
    if path is None:
        values = _read(DEFAULT) if DEFAULT.is_file() else {}
    else:
        values = _read(_named(path))
    sbatch = values.get("sbatch") or {}
    if not isinstance(sbatch, dict):
        raise ConfigError(f"{path or DEFAULT}: sbatch = {sbatch}: should be options of sbatch, key: value")
    sbatch = {**sbatch, **overrides.pop("sbatch", {})}
    wrong = wrong_kinds("cluster", ClusterSettings, {**(defaults or {}), **values, **overrides})
    if wrong:
        raise ConfigError(told(f"config error in {path or DEFAULT} or its options", wrong))
    try:
        return ClusterSettings.model_validate({**(defaults or {}), **values, **overrides, "sbatch": sbatch})
    except ValidationError as error:
        given = {str(item["loc"][0]) for item in error.errors() if item["loc"]} & set(overrides)
        lines = [_line(item) for item in error.errors()]
        count = f"{len(lines)} problem" + ("s" if len(lines) > 1 else "")
        options = ", ".join(f"--{key.replace('_', '-')}" for key in sorted(given))
        where = f"{path or DEFAULT}" + (f" and {options}" if options else "")
        if given and len(given) == len(lines):
            where = options
        raise ConfigError(f"config error in {where}, {count}:\n" + "\n".join(lines)) from None


def _named(path: Path) -> Path:
    """A file, or the name of one in configs/cluster."""
    short = DEFAULT.parent / f"{path}.yaml"
    if path.is_file() or not short.is_file():
        return path
    return short


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        there = ", ".join(sorted(file.stem for file in DEFAULT.parent.glob("*.yaml"))) or "none"
        raise ConfigError(f"{path}: no such cluster settings; in {DEFAULT.parent} there are: {there}")
    return read_yaml(path)


def _line(item: Any) -> str:
    key = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        return f"  {key}: no such setting; there are {', '.join(ClusterSettings.model_fields)}"
    return f"  {key} = {item['input']}: {item['msg'].removeprefix('Value error, ')}"
