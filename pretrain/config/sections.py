"""The sections of a config, and the whole of it as a value."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, Field, model_validator

from pretrain.config.data import DataSection
from pretrain.config.objective import NextTokenSection, ObjectiveSection
from pretrain.config.optim import OptimSection
from pretrain.config.section import Auto, Section


class RunSection(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$")
    """Names the run's folder. Letters, digits, dots, dashes and underscores; the first a letter or digit."""
    folder: str = "runs"
    seed: int = Field(default=1, ge=0, lt=2**63)
    steps: int = Field(ge=1, le=1_000_000_000)
    device: Literal["auto", "cpu", "cuda"] = "auto"


CHOSEN = ("tensor", "sequence", "context", "pipeline", "zero", "activation_checkpointing")
"""Keys of `parallel` that may be auto: then the fastest layout that fits the machine decides (`pretrain.plan.auto`)."""


class ParallelSection(Section):
    data: Annotated[int, Field(ge=1, le=1_048_576)] | Auto = "auto"
    """Data-parallel size. auto: the ranks that the other sizes leave."""
    tensor: int = Field(default=1, ge=1, le=4096)
    """Ranks that share every layer's heads, channels and vocabulary."""
    sequence: bool = False
    """Whether those ranks share the positions too, in what lies between the layers that they split."""
    context: int = Field(default=1, ge=1, le=4096)
    """Ranks that share the positions of a row."""
    recurrence: Literal["channels", "summaries"] = "channels"
    """How a recurrence crosses a row that is shared. channels: positions are exchanged for channels, bit-exact;
    summaries: each Newton iteration exchanges one summary per rank."""
    pipeline: int = Field(default=1, ge=1, le=4096)
    """Ranks that share the blocks, each a run of them."""
    pipeline_chunks: int = Field(default=1, ge=1, le=4096)
    """Runs of blocks per rank: above 1 the schedule is interleaved, with a smaller bubble."""
    zero: Literal[0, 1, 2, 3] = 1
    """ZeRO stage: 0 replicates, 1 shards optimizer states, 2 gradients too, 3 parameters too."""
    zero_group: Literal["all", "node"] = "all"
    """node: each node keeps a second copy of ZeRO 3's parameters, shared by its replicas, from which the backward
    pass gathers them; what the optimizer holds is shared by all replicas in either case."""
    offload: Literal["none", "optimizer"] = "none"
    """optimizer: fp32 masters, moments and their update in host memory; for ZeRO on DeepSpeed."""
    engine: Literal["auto", "deepspeed", "megatron"] = "auto"
    """auto: megatron with a pipeline, deepspeed without."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    compile: bool = False
    auto: tuple[
        Literal["tensor", "sequence", "context", "pipeline", "zero", "activation_checkpointing"], ...
    ] = ()
    """Keys that are still to be chosen. Write `auto` as their value, or `parallel: auto` for all of them."""

    @model_validator(mode="before")
    @classmethod
    def _gather_auto(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        chosen = [key for key in CHOSEN if values.get(key) == "auto"]
        rest = {key: value for key, value in values.items() if key not in chosen}
        return rest if not chosen else {**rest, "auto": [*chosen, *rest.get("auto", ())]}

    @property
    def chosen_engine(self) -> Literal["deepspeed", "megatron"]:
        """What `engine: auto` comes to."""
        if self.engine == "auto":
            return "megatron" if self.pipeline > 1 else "deepspeed"
        return self.engine


class PrecisionSection(Section):
    dtype: Literal["fp32", "bf16"] = "fp32"


class CheckpointSection(Section):
    save_every_steps: int | None = Field(default=1000, ge=1, le=1_000_000_000)
    """null: only at the end and when the run is asked to stop."""
    keep_last: int = Field(default=2, ge=1, le=1_000_000)
    keep_every_steps: int | None = Field(default=None, ge=1, le=1_000_000_000)
    asynchronous: bool = True


class MonitorSection(Section):
    log_every_steps: int = Field(default=10, ge=1, le=1_000_000_000)
    evaluate_every_steps: int | None = Field(default=1000, ge=1, le=1_000_000_000)
    """null: only before the first step and after the last."""
    evaluate_rows: int | None = Field(default=None, ge=1, le=1_000_000_000)
    """Validation rows per evaluation. null: the whole validation split, or 2048 rows of a synthetic task."""
    evaluate_length: int | None = Field(default=None, ge=1, le=16_777_216)
    """Synthetic tasks: also measure accuracy on sequences of this length."""
    sample_every_steps: int | None = Field(default=None, ge=1, le=1_000_000_000)
    """Samples in TensorBoard; null: only at the end. Masked diffusion makes anew what the first validation documents
    of each task have as their targets; prompts and tokens are for text of causal models."""
    sample_prompts: tuple[str, ...] | None = None
    """What the samples continue. null: nothing at all, and the first words of a validation document."""
    sample_tokens: int = Field(default=64, ge=1, le=1_000_000)
    tensorboard: bool = True
    watchdog_seconds: float | None = Field(default=1800, gt=0, le=2_592_000)
    """Runs of several processes: a rank without a step for so long counts as hung, and the run ends with its name; a
    launched one is started again without its node. Must exceed the longest evaluation and save. null: never."""
    hooks: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Hooks of your own, each with its settings: {"my_module:MyHook": {every: 10}} (a `HookSection`, on PYTHONPATH)."""


class LaunchSection(Section):
    nodes: int = Field(default=1, ge=1, le=65_536)
    gpus_per_node: int = Field(default=8, ge=0, le=256)
    gpu: Literal["h100", "h200", "a100", "a100_40"] = "h100"
    """Which, for the plan and for what `parallel: auto` chooses where a run is launched."""
    ports: int | None = Field(default=None, ge=1, le=256)
    """Network ports of a node, for the plan. null: as the cluster's file says, else one per GPU."""
    port_gb_s: float | None = Field(default=None, gt=0, le=10_000)
    """GB/s of a port in one direction (400 Gb/s are 50). null: as the cluster's file says, else the maker's own."""
    node_gb_s: float | None = Field(default=None, gt=0, le=100_000)
    """GB/s between a node's GPUs, of each in one direction. null: as the cluster's file says, else NVLink's."""


def with_lists(value: Any) -> Any:
    """As JSON would give it back: lists for tuples."""
    if isinstance(value, dict):
        return {key: with_lists(inner) for key, inner in value.items()}
    return [with_lists(inner) for inner in value] if isinstance(value, list | tuple) else value


@dataclass(frozen=True, kw_only=True)
class Config:
    """One run, whole. `model` is the config dataclass of its family (`models.families`)."""

    run: RunSection
    model: Any
    objective: ObjectiveSection
    data: DataSection
    optim: OptimSection
    parallel: ParallelSection
    precision: PrecisionSection
    checkpoint: CheckpointSection
    monitor: MonitorSection
    launch: LaunchSection

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for YAML or JSON; `config_from_dict` reads them back."""
        sections = ((field.name, getattr(self, field.name)) for field in dataclasses.fields(self))
        return {
            name: value.model_dump(mode="json")
            if isinstance(value, BaseModel)
            else with_lists(dataclasses.asdict(value))
            for name, value in sections
        }

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)

    def replace(self, **sections: Any) -> Config:
        return dataclasses.replace(self, **sections)


SECTIONS: Mapping[str, type[Section]] = {
    "run": RunSection,
    "objective": NextTokenSection,  # or as its kind says: OBJECTIVES
    "data": DataSection,
    "optim": OptimSection,
    "parallel": ParallelSection,
    "precision": PrecisionSection,
    "checkpoint": CheckpointSection,
    "monitor": MonitorSection,
    "launch": LaunchSection,
}
