"""What a run will need, worked out before a GPU is touched."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from data_pipelines.errors import DataError
from data_pipelines.tasks import build_task
from data_pipelines.tokenizers import load_tokenizer
from data_pipelines.vocabulary import Modality, Vocabulary, load_vocabulary
from models import families
from pretrain.engine.deepspeed import bucket_elements
from pretrain.errors import ConfigError
from pretrain.hardware import ACCELERATORS, Accelerator
from pretrain.optim import parameter_groups
from pretrain.optim.scaling import Scaled, resolve
from pretrain.parallel.layout import data_parallel_size, micro_batch_rows
from pretrain.run_data import rounded_vocabulary

if TYPE_CHECKING:
    from pretrain.config import Config

BYTES = {"fp32": 4, "bf16": 2}
FP32_BYTES = 4


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank."""

    parameters: int
    gradients: int
    optimizer: int
    buffers: int
    """Where DeepSpeed gathers gradients before it reduces them."""
    activations: int
    update: int
    """The fp32 copy of a bf16 gradient share that the update works on, when the activations are gone."""

    @property
    def state(self) -> int:
        """What stays between steps and during the backward pass, activations excluded."""
        return self.parameters + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        return self.state + self.buffers + max(self.activations, self.update)


@dataclass(frozen=True)
class Group:
    """Parameters that the optimizer treats alike."""

    type: str
    lr: float
    """At the schedule's peak."""
    epsilon: float


GROUP_KEYS = ("type", "peak_lr", "eps")


@dataclass(frozen=True)
class Plan:
    parameters: Mapping[str, int]
    """By group: embedding, attention, mlp, norm, head."""
    memory: Memory
    flops_per_token: float
    """Forward and backward."""
    micro_batch_rows: int
    accumulation: int
    tokens_per_step: int
    tokens: int
    optim: Scaled
    """The optimizer's settings after `optim.scaling`."""
    groups: tuple[Group, ...]
    attention_bias: float | None
    gpus: int
    accelerator: Accelerator
    mfu: float
    seconds: float

    @property
    def gpu_hours(self) -> float:
        return self.seconds * self.gpus / 3600


def make_plan(config: Config, *, gpus: int, gpu: str, mfu: float) -> Plan:
    """Plan `config` on `gpus` devices of a kind, at a stated model FLOPs utilisation."""
    if gpu not in ACCELERATORS:
        raise ConfigError(f"--gpu {gpu}: not in the table; choose one of {', '.join(ACCELERATORS)}")
    if not 0 < mfu <= 1:
        raise ConfigError(f"--mfu {mfu}: should be above 0 and at most 1; 0.4 is usual")
    family = families[config.model.family]
    length = config.data.sequence_length
    model_config = config.model.resolved(vocabulary=planned_vocabulary(config), sequence_length=length)
    with torch.device("meta"):
        model = family.build(model_config)
    groups: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        group = family.parameter_group(name)
        groups[group] = groups.get(group, 0) + parameter.numel()
    scaled = resolve(config, model)
    transfer, width, layers = getattr(model_config, "transfer", None), model_config.width, model_config.layers
    types = parameter_groups(model.named_parameters(), scaled.optim, width, layers=layers, transfer=transfer)
    data_ranks = data_parallel_size(config.parallel, gpus, config.data.global_batch_rows)
    rows = config.data.global_batch_rows // data_ranks
    micro = micro_batch_rows(config.data, data_ranks, config.parallel)
    activations = activation_bytes(config, model_config, micro * length)
    flops = family.flops_per_token(model_config, length)
    tokens_per_step = config.data.global_batch_rows * length
    tokens = tokens_per_step * config.run.steps
    accelerator = ACCELERATORS[gpu]
    rate = accelerator.peak_teraflops[config.precision.dtype] * 1e12 * mfu * gpus
    return Plan(
        parameters=groups,
        memory=state_memory(sum(groups.values()), config, data_ranks, activations),
        flops_per_token=flops,
        micro_batch_rows=micro,
        accumulation=rows // micro,
        tokens_per_step=tokens_per_step,
        tokens=tokens,
        optim=scaled,
        groups=tuple(Group(*(group[key] for key in GROUP_KEYS)) for group in types),
        attention_bias=getattr(model_config, "attention_bias", None),
        gpus=gpus,
        accelerator=accelerator,
        mfu=mfu,
        seconds=flops * tokens / rate,
    )


def planned_vocabulary(config: Config) -> int:
    """The config's vocabulary, or that of its dataset if it is there already."""
    if config.model.vocabulary is not None:
        return int(config.model.vocabulary)
    if config.data.task is not None:
        return build_task(config.data.task).vocabulary
    paths = [source.path for source in config.data.sources]
    try:
        if config.objective.kind == "masked_diffusion":
            known = [found for path in paths if (found := load_vocabulary(Path(path))) is not None]
            if known:
                return rounded_vocabulary(known[0].size)
            tokenizer = load_tokenizer(paths[0])
            text = Modality("text", 0, tokenizer.vocabulary, tokenizer.fingerprint)
            return rounded_vocabulary(Vocabulary(text, tokenizer.eot).size)
        return rounded_vocabulary(load_tokenizer(paths[0]).vocabulary)
    except DataError as error:
        raise ConfigError(
            f"model.vocabulary: null leaves it to the dataset, which is not there ({error}); build it first, or name a "
            "number to plan with, e.g. model.vocabulary=32768"
        ) from None


def activation_bytes(config: Config, model_config: Any, tokens: int) -> int:
    """Bytes kept for the backward pass of a micro-batch of `tokens`.

    With full activation checkpointing: every block's input, and the inside of the one being recomputed.
    """
    estimate, width = families[config.model.family].activation_bytes, BYTES[config.precision.dtype]
    length = config.data.sequence_length
    if config.parallel.activation_checkpointing == "none":
        return estimate(model_config, tokens, length, width)
    inputs = model_config.layers * tokens * model_config.width * width
    return inputs + estimate(dataclasses.replace(model_config, layers=1), tokens, length, width)


def state_memory(parameters: int, config: Config, data_ranks: int, activations: int = 0) -> Memory:
    """Bytes per rank under the ZeRO stage, as DeepSpeed keeps them (benchmarks/memory.py measures it).

    From stage 1 on, DeepSpeed keeps an fp32 master copy of the rank's share, also of an fp32 model.
    """
    zero, width = config.parallel.zero, BYTES[config.precision.dtype]
    share = parameters / data_ranks
    return Memory(
        parameters=int(width * (share if zero == 3 else parameters)),
        gradients=int(width * (share if zero >= 2 else parameters)),
        optimizer=int(FP32_BYTES * (2 * parameters if zero == 0 else 3 * share)),
        buffers=width * bucket_elements(parameters) if zero else 0,
        activations=activations,
        update=int(FP32_BYTES * share) if zero and config.precision.dtype == "bf16" else 0,
    )
