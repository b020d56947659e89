"""A run as a value: typed sections, validated all at once.

A config file is YAML. `extends: other.yaml` (relative to the file) is merged under it, then come the command
line's `key=value` overrides (`config_merge`). `load_config` returns a `Config`, or raises one `ConfigError`
that lists every problem with its path, its value, what would be right, and a near miss for a misspelt key.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

import yaml
from pydantic import BaseModel, Field, TypeAdapter, ValidationError, field_validator

from pretrain.config_kinds import with_whole_numbers, wrong_kinds
from pretrain.config_merge import merged_values
from pretrain.config_objective import OBJECTIVES, ModalitySection, NextTokenSection, ObjectiveSection
from pretrain.config_optim import MultiplierSection, OptimSection, ScalingSection
from pretrain.config_section import Auto, Problem, Section, divisors_of, told
from pretrain.config_yaml import read_yaml
from pretrain.errors import ConfigError
from pretrain.parallel.nearest import advice, problems_of


class RunSection(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$")
    """Names the run's folder. Letters, digits, dots, dashes and underscores; the first a letter or digit."""
    folder: str = "runs"
    seed: int = Field(default=1, ge=0, lt=2**63)
    steps: int = Field(ge=1, le=1_000_000_000)
    device: Literal["auto", "cpu", "cuda"] = "auto"


class SourceSection(Section):
    path: str
    weight: float = Field(default=1.0, gt=0, le=1e9)
    """Share of the rows, relative to the other sources."""


class DataSection(Section):
    path: str | tuple[SourceSection, ...] | None = None
    """A dataset folder, or a list of them: [a, b], or [{path: a, weight: 3}, {path: b, weight: 1}]."""
    task: dict[str, Any] | None = None
    """A synthetic task instead: {name: k_hop, hops: 2, vocabulary: 5}. `data_pipelines/tasks` has them all."""
    sequence_length: int = Field(ge=1, le=16_777_216)
    """Tokens per row."""
    global_batch_rows: int = Field(ge=1, le=16_777_216)
    """Rows per optimizer step, over all ranks and micro-batches."""
    micro_batch_rows: Annotated[int, Field(ge=1, le=16_777_216)] | Auto = "auto"
    """Rows per forward pass of one rank. auto: all of the rank's rows at once."""
    workers: int = Field(default=0, ge=0, le=1024)
    """Reader processes per rank. 0: one background thread, enough for tokenised text."""
    prefetch_batches: int = Field(default=4, ge=1, le=4096)
    shuffle_window_shards: int = Field(default=16, ge=1, le=1_000_000)
    """Documents are shuffled within windows of this many shuffled shards."""
    shuffle_rows: bool = True
    """Next-token prediction: shuffle the rows of a window too, so that a long document (or a single file) is not read
    from its beginning to its end. false: only documents are shuffled, and a long one's rows follow each other."""

    @field_validator("path", mode="before")
    @classmethod
    def _names_are_sources(cls, value: Any) -> Any:
        if isinstance(value, list):
            return [{"path": item} if isinstance(item, str) else item for item in value]
        return value

    @field_validator("task")
    @classmethod
    def _task_is_known(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value is not None:
            from data_pipelines.tasks import (
                build_task,
            )  # with torch, which Slurm's batch script should not wait for

            build_task(value)
        return value

    @property
    def sources(self) -> tuple[SourceSection, ...]:
        """None for a synthetic task."""
        return (SourceSection(path=self.path),) if isinstance(self.path, str) else self.path or ()


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


class LaunchSection(Section):
    nodes: int = Field(default=1, ge=1, le=65_536)
    gpus_per_node: int = Field(default=8, ge=0, le=256)


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
            else _with_lists(dataclasses.asdict(value))
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


# ---------------------------------------------------------------------------------------------- reading


def load_config(
    path: str | Path, overrides: Sequence[str] = (), world: int | None = None, *, allow_env: bool = False
) -> Config:
    """The config in `path`, with `key=value` overrides.

    world: the number of processes that the layout must fit; None: any.
    allow_env: whether it may read the environment, by `${oc.env:NAME}`.

    Raises ConfigError with all problems at once.
    """
    raw = merged_values(Path(path), overrides, allow_env=allow_env)
    return config_from_dict(raw, origin=str(path), world=world)


def load_resolved(path: str | Path, world: int | None = None) -> Config:
    """A config that `Config.to_yaml` wrote: whole, and without references."""
    return config_from_dict(read_yaml(Path(path)), origin=str(path), world=world)


def config_from_dict(raw: Mapping[str, Any], origin: str, world: int | None = None) -> Config:
    """Validate plain values. `origin` names the file in the error; `world` as in `load_config`."""
    problems: list[Problem] = []
    sections: dict[str, Any] = {}
    for name in raw:
        if name not in SECTIONS and name != "model":
            problems.append(
                Problem(str(name), "no such section" + _did_you_mean(str(name), [*SECTIONS, "model"]))
            )
    for name, section in SECTIONS.items():
        value, found = _validate(name, section, raw.get(name, {}))
        problems += found
        if value is not None:
            sections[name] = value
    model, found = _validate_model(raw.get("model"))
    problems += found
    if model is not None:
        sections["model"] = model
    told_of = {problem.path for problem in problems}
    problems += [problem for problem in _cross_checks(sections) if problem.path not in told_of]
    of_layout, nearest = _check_layout(sections, world)
    problems += of_layout
    if problems:
        raise ConfigError(told(f"config error in {origin}", problems, nearest))
    return Config(**sections)


# ------------------------------------------------------------------------------------------- validation


_NESTED_NAMES = {
    "data": tuple(SourceSection.model_fields),
    "objective": tuple(ModalitySection.model_fields),
    "optim": (*ScalingSection.model_fields, *MultiplierSection.model_fields),
}


def _validate(name: str, section: type[Section], raw: Any) -> tuple[Section | None, list[Problem]]:
    if raw is None:
        raw = {}
    if name == "objective" and isinstance(raw, dict) and "kind" in raw:
        kind = str(raw["kind"])
        if kind not in OBJECTIVES:
            near = _did_you_mean(kind, list(OBJECTIVES)) or f"; choose one of {', '.join(OBJECTIVES)}"
            return None, [Problem("objective.kind", "no such objective" + near, kind, True)]
        section = OBJECTIVES[kind]
    wrong = wrong_kinds(name, section, raw)
    raw = with_whole_numbers(section, raw)
    try:
        return section.model_validate(raw), wrong
    except ValidationError as error:
        nested = _NESTED_NAMES.get(name, ())
        return None, _together(wrong, _problems(name, error, list(section.model_fields), nested))


def _together(wrong: list[Problem], others: Iterator[Problem]) -> list[Problem]:
    """Each setting once: a value of the wrong kind is often out of range, too."""
    told_of = {problem.path for problem in wrong}
    return wrong + [problem for problem in others if problem.path not in told_of]


def _with_lists(value: Any) -> Any:
    """As JSON would give it back: lists for tuples."""
    if isinstance(value, dict):
        return {key: _with_lists(inner) for key, inner in value.items()}
    return [_with_lists(inner) for inner in value] if isinstance(value, list | tuple) else value


def _validate_model(raw: Any) -> tuple[Any, list[Problem]]:
    from models import configs
    from models.layers.limits import beyond_limits, too_large

    if raw is not None and not isinstance(raw, dict):
        return None, [
            Problem("model", "should be settings of its own: {family: ..., layers: ...}", raw, True)
        ]
    if not isinstance(raw, dict) or "family" not in raw:
        return None, [Problem("model.family", f"missing; choose one of {', '.join(configs)}")]
    if not isinstance(raw["family"], str) or raw["family"] not in configs:
        near = _did_you_mean(str(raw["family"]), list(configs)) or f"; choose one of {', '.join(configs)}"
        return None, [Problem("model.family", "no such family" + near, raw["family"], True)]
    kind = configs[raw["family"]]
    names = [field.name for field in dataclasses.fields(kind)]
    # A misspelt key is reported by us: a plain dataclass has nowhere to say `extra="forbid"`.
    problems = [
        Problem(f"model.{key}", "no such setting" + _suggest("model", str(key), names))
        for key in raw
        if key not in names
    ]
    wrong = wrong_kinds("model", kind, raw)
    raw = with_whole_numbers(kind, raw)
    try:
        model: Any = TypeAdapter(kind).validate_python({key: raw[key] for key in raw if key in names})
    except ValidationError as error:
        return None, problems + _together(wrong, _problems("model", error, names, _nested_names(kind)))
    beyond = [
        Problem(f"model.{key}", message, attrgetter(key)(model), True)
        for key, message in beyond_limits(model)
    ]
    # What else is wrong with a model that is too large could take as long as building it.
    return (None if too_large(model) else model), problems + _together(wrong, iter(beyond))


def _nested_names(kind: type) -> list[str]:
    """The settings of those settings that are dataclasses themselves, such as `model.newton`."""
    hints = [part for hint in get_type_hints(kind).values() for part in (hint, *get_args(hint))]
    nested = [hint for hint in hints if dataclasses.is_dataclass(hint)]
    return [field.name for hint in nested for field in dataclasses.fields(hint)]


def _problems(
    section: str, error: ValidationError, names: list[str], inner: Sequence[str] = ()
) -> Iterator[Problem]:
    seen: set[str] = set()
    for item in error.errors():
        # Branches of a union (int | "auto") add their own tag to the location; only the keys matter to a user.
        keys = _keys(item["loc"], names, inner)
        if item["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            key, nested = str(item["loc"][-1]), len(item["loc"]) > 1
            path = ".".join([section, *keys])
            yield Problem(
                f"{path}.{key}", "no such setting" + _suggest(path, key, list(inner) if nested else names)
            )
            continue
        path = ".".join([section, *keys])
        if item["type"] == "missing":
            yield Problem(path, "missing; it has no default")
        elif path not in seen:
            seen.add(path)
            alternatives = [
                other for other in error.errors() if _within(_keys(other["loc"], names, inner), keys)
            ]
            if any(len(other["loc"]) > len(item["loc"]) + 1 for other in alternatives):
                continue  # another branch of the union came further: what it says is nearer to the mistake
            message = " or ".join(dict.fromkeys(_plain(other["msg"]) for other in alternatives))
            yield Problem(path, message, item["input"], True)


def _keys(location: Sequence[int | str], names: Sequence[str], inner: Sequence[str]) -> list[str]:
    return [str(part) for part in location if isinstance(part, int) or part in names or part in inner]


def _within(one: Sequence[str], other: Sequence[str]) -> bool:
    """Whether one of two settings is the other or a part of it."""
    shorter = min(len(one), len(other))
    return one[:shorter] == other[:shorter]


def _plain(message: str) -> str:
    plain = message.removeprefix("Value error, ").replace("Input should be", "should be")
    plain = re.sub(r"a valid dictionary or (instance|object) .*", "settings of its own: {key: value}", plain)
    return plain.replace("a valid tuple", "a list, e.g. [a, b]").replace("should be 'auto'", "auto")


def _suggest(section: str, key: str, names: list[str]) -> str:
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {section}.{near[0]}?"
    elsewhere = [f"{other}.{key}" for other, kind in SECTIONS.items() if key in kind.model_fields]
    return f"; did you mean {elsewhere[0]}?" if elsewhere else f"; {section} has {', '.join(names)}"


def _did_you_mean(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""


# ----------------------------------------------------------------------------------------- cross checks


def _cross_checks(sections: Mapping[str, Any]) -> Iterator[Problem]:
    """Rules between settings. Each runs where the sections it reads are valid by themselves."""
    rules: list[tuple[Callable[..., Iterator[Problem]], tuple[str, ...]]] = [
        (_check_model, ("model", "data")),
        (_check_precision, ("precision", "parallel")),
        (_check_batch, ("data",)),
        (_check_objective, ("objective", "model", "data")),
        (_check_task, ("data", "monitor")),
        (_check_evaluation, ("data", "monitor")),
        (_check_optim, ("optim", "run")),
        (_check_scaling, ("optim", "model")),
    ]
    for rule, needs in rules:
        if all(name in sections for name in needs):
            yield from rule(*(sections[name] for name in needs))


def _check_layout(sections: Mapping[str, Any], world: int | None) -> tuple[list[Problem], str]:
    """What is wrong with the layout, and the nearest one that can be."""
    if not {"parallel", "model", "data"} <= sections.keys():
        return [], ""
    settings = (sections["parallel"], sections["model"], sections["data"], world)
    problems = list(problems_of(*settings))
    return problems, advice(*settings) if problems else ""


def _check_model(model: Any, data: DataSection) -> Iterator[Problem]:
    for key, message in model.problems(data.sequence_length):
        yield Problem(f"model.{key}", message, attrgetter(key)(model), True)


def _check_precision(precision: PrecisionSection, parallel: ParallelSection) -> Iterator[Problem]:
    if precision.dtype == "bf16" and parallel.zero == 0:
        yield Problem(
            "parallel.zero",
            "bf16 without sharded optimizer states keeps no exact master weights; use 1, also on one GPU",
            0,
            True,
        )


def _check_batch(data: DataSection) -> Iterator[Problem]:
    if data.path is None and data.task is None:
        yield Problem("data.path", "missing; name a dataset folder, or a synthetic task under data.task")
    if data.path is not None and data.task is not None:
        yield Problem("data.task", "data.path is set too; set one of them to null")
    if isinstance(data.path, tuple) and not data.path:
        yield Problem("data.path", "the list of sources is empty; name at least one dataset folder")
    micro = data.micro_batch_rows
    if isinstance(micro, int) and data.global_batch_rows % micro:
        near = min(divisors_of(data.global_batch_rows), key=lambda n: abs(n - micro))
        yield Problem(
            "data.micro_batch_rows",
            f"data.global_batch_rows = {data.global_batch_rows} does not divide by it; use {near}",
            micro,
            True,
        )


def _check_objective(objective: ObjectiveSection, model: Any, data: DataSection) -> Iterator[Problem]:
    causal = model.causal
    if isinstance(objective, NextTokenSection):
        if not causal:
            message = f"a {model.family} model sees the token it is to predict; use masked_diffusion"
            yield Problem("objective.kind", message, objective.kind, True)
        return
    if causal:
        message = (
            f"a {model.family} model does not see what follows a masked token; use model.family=trimodal"
        )
        yield Problem("objective.kind", message, objective.kind, True)
    if data.task is not None:
        yield Problem(
            "data.task", "synthetic tasks are for objective.kind=next_token; name data.path instead"
        )
    if objective.complementary and data.global_batch_rows % 2:
        message = "complementary masks pair the rows of a step: use an even number"
        yield Problem("data.global_batch_rows", message, data.global_batch_rows, True)
    if objective.condition == "clean" and objective.whole_modality:
        message = "only objective.condition=joint has it; use condition_dropout, or set 0"
        yield Problem("objective.whole_modality", message, objective.whole_modality, True)


def _check_task(data: DataSection, monitor: MonitorSection) -> Iterator[Problem]:
    if data.task is None:
        if monitor.evaluate_length is not None:
            yield Problem(
                "monitor.evaluate_length",
                "only synthetic tasks have it; remove it",
                monitor.evaluate_length,
                True,
            )
        return
    from data_pipelines.tasks import build_task

    lengths = {
        "data.sequence_length": data.sequence_length,
        "monitor.evaluate_length": monitor.evaluate_length,
    }
    for key, length in lengths.items():
        if length is not None:
            for option, message in build_task(data.task).problems(length):
                yield Problem(f"data.task.{option}", f"{message} ({key} = {length})")


def _check_evaluation(data: DataSection, monitor: MonitorSection) -> Iterator[Problem]:
    sources, rows = len(data.sources), monitor.evaluate_rows
    if rows is not None and rows < sources:
        message = f"some of the {sources} sources of data.path would not be evaluated; use at least {sources}"
        yield Problem("monitor.evaluate_rows", message, rows, True)


def _check_optim(optim: OptimSection, run: RunSection) -> Iterator[Problem]:
    if any(not 0 <= beta < 1 for beta in optim.betas):
        yield Problem("optim.betas", "both should be at least 0 and below 1", list(optim.betas), True)
    if optim.warmup_steps >= run.steps:
        yield Problem(
            "optim.warmup_steps",
            f"should be below run.steps = {run.steps}, else the peak is never reached",
            optim.warmup_steps,
            True,
        )
    decay = optim.decay_steps
    if decay is not None and optim.schedule != "wsd":
        yield Problem(
            "optim.decay_steps",
            "only the wsd schedule has it; set optim.schedule=wsd or remove it",
            decay,
            True,
        )
    length = optim.wsd_decay_steps(run.steps)
    if optim.schedule == "wsd" and optim.warmup_steps + length > run.steps:
        message = f"{optim.warmup_steps} warm-up and {length} decay steps exceed run.steps = {run.steps}"
        yield Problem("optim.decay_steps", message, decay, True)


def _check_scaling(optim: OptimSection, model: Any) -> Iterator[Problem]:
    for key, message, value in optim.scaling_problems(tied_head=getattr(model, "tied_head", False)):
        yield Problem(f"optim.{key}", message, value, value is not None)
