"""`triptych plan`: the figures of a run in tables."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from models.layers.transfer import multipliers, residual_factor
from pretrain.commands.console import plain_console
from pretrain.config import load_config
from pretrain.plan.auto import choose_layout
from pretrain.plan.constants import origins
from pretrain.plan.estimate import Plan, make_plan
from pretrain.plan.layouts import describe, suggest_layouts
from pretrain.plan.machine import planned_machine

if TYPE_CHECKING:
    from pretrain.config import Config
    from pretrain.hardware import Accelerator

GIB, MIB = 1 << 30, 1 << 20
LAUNCHES_S = 0.05
"""Some thousand kernels of a step, each launched in some 10 microseconds, take about as long."""
SHOWN = 5e-4
"""Share of the whole from which a row is shown."""


def print_plan(
    path: str,
    overrides: list[str],
    *,
    gpus: int | None,
    gpu: str | None,
    mfu: float | None,
    price: float | None,
    suggest: bool = False,
    explain: bool = False,
    allow_env: bool = False,
) -> None:
    config = load_config(path, overrides, gpus, allow_env=allow_env)
    if gpus is None:
        gpus = max(1, config.launch.nodes * config.launch.gpus_per_node)
    gpu = gpu or config.launch.gpu
    console = plain_console(markup=True)
    if config.parallel.auto:
        with console.status("choosing the layout ..."):
            choice = choose_layout(config, gpus, planned_machine(config, gpu))
        console.print(escape(choice.reason))
        config = choice.config
    plan = make_plan(config, gpus=gpus, gpu=gpu, mfu=mfu)
    console.print(f"{config.run.name}: {config.model.family}, {sum(plan.parameters.values()):,} parameters")
    console.print(f"on {gpus} x {plan.accelerator.name}: {describe(config.parallel)}")
    console.print(_parameters(plan))
    console.print(_memory(plan))
    if plan.layout.traffic:
        console.print(_traffic(plan))
    console.print(_step(plan))
    if plan.layout.time.total < LAUNCHES_S:
        console.print(
            "a step this short takes longer: launches of kernels are not counted, nor data and logging"
        )
    if explain:
        console.print(_explained(plan, config))
    console.print(_training(plan, config, price, is_predicted=mfu is None))
    console.print(_optimizer(plan, config))
    for warning in plan.optim.warnings:
        console.print(f"[bold]warning[/bold]: {escape(warning)}")
    free = plan.accelerator.memory_gib * GIB - plan.memory.total
    if free < 0:
        console.print(f"[bold]does not fit[/bold]: {-free / GIB:.1f} GiB too much per GPU")
    if suggest or free < 0:
        _print_suggestions(config, gpus, plan.accelerator, console)


def _print_suggestions(config: Config, gpus: int, accelerator: Accelerator, console: Console) -> None:
    with console.status("looking for layouts that fit ..."):
        found = suggest_layouts(config, gpus, accelerator)
    if not found:
        console.print(
            "no layout of these GPUs fits; take more of them, a smaller model, or a shorter data.sequence_length"
        )
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("s/step", "GiB", "tokens/s per GPU", "MFU"):
        table.add_column(heading, justify="right")
    table.add_column("layouts that fit, fastest first: add to the command line", overflow="fold")
    for one in found:
        seconds = one.layout.time.total
        speed = f"{one.tokens_per_step / seconds / gpus:,.0f}"
        memory = f"{one.layout.memory.total / GIB:.3g}"
        table.add_row(f"{seconds:.3g}", memory, speed, f"{one.mfu:.0%}", one.settings or "nothing: as it is")
    console.print(table)


def _table(title: str, *headings: str) -> Table:
    """Words on the left, figures on the right."""
    table = Table(title)
    for heading in headings:
        table.add_column(heading, justify="right")
    return table


def _parameters(plan: Plan) -> Table:
    table = _table("parameters", "count", "share")
    total = sum(plan.parameters.values())
    for group, count in plan.parameters.items():
        table.add_row(group, f"{count:,}", f"{count / total:.1%}")
    table.add_row("all", f"{total:,}", "")
    return table


MEMORY = {
    "parameters": "parameters",
    "gradients": "gradients",
    "optimizer": "optimizer states",
    "buffers": "buffers of collectives",
    "activations": "activations",
    "logits": "logits and loss, beyond that peak",
    "update": "fp32 gradients during the update",
}


def _memory(plan: Plan) -> Table:
    memory, stage = plan.memory, plan.layout.stage
    of_stage = "" if plan.layout.stages == 1 else f", pipeline stage {stage} (it holds most)"
    unit, name = (GIB, "GiB") if memory.total >= GIB else (MIB, "MiB")
    table = _table(f"memory per GPU{of_stage}", name)
    for kind, words in MEMORY.items():
        if getattr(memory, kind) >= SHOWN * memory.total:
            table.add_row(words, f"{getattr(memory, kind) / unit:.3g}")
    table.add_section()
    table.add_row("most during forward and backward", f"{memory.during_passes / unit:.3g}")
    table.add_row("most during the update", f"{memory.during_update / unit:.3g}")
    table.add_row("the GPU has", f"{plan.accelerator.memory_gib * GIB / unit:,.0f}")
    if memory.host:
        table.add_row("beside it, in host memory", f"{memory.host / unit:.3g}")
    return table


COLLECTIVES = {"allgather": "all-gather", "allreduce": "all-reduce", "alltoall": "all-to-all"}
AXES = {"ends": "pipeline's ends", "replicas": "replicas (data x context)"}


def _traffic(plan: Plan) -> Table:
    table = Table("a GPU's messages in one step, among", "by")
    table.add_column("GB", justify="right")
    for (axis, kind), size in sorted(plan.layout.traffic.items()):
        name = kind.removesuffix("_base")
        by = COLLECTIVES.get(name, name.replace("_", "-"))
        table.add_row(AXES.get(axis, axis), by, f"{size / 1e9:.3g}")
    return table


STEP = {
    "products": "matrix products",
    "fused": "attention, state spaces",
    "memory": "memory-bound: norms, gates, loss ...",
    "recomputed": "recomputed",
    "exchange": "messages within a replica",
    "bubble": "waiting for other stages",
    "replicas": "replicas' messages, what computing does not hide",
    "update": "update",
    "straggling": "waiting for the slowest",
}


def _step(plan: Plan) -> Table:
    time = plan.layout.time
    unit, name = (1.0, "seconds") if time.total >= 1 else (1e-3, "ms")
    table = _table("predicted step", name, "share")
    for kind, words in STEP.items():
        seconds = getattr(time, kind)
        if seconds >= SHOWN * time.total:
            table.add_row(words, f"{seconds / unit:.3g}", f"{seconds / time.total:.1%}")
    table.add_row("all", f"{time.total / unit:.3g}", "")
    return table


def _explained(plan: Plan, config: Config) -> Table:
    """What the prediction takes from elsewhere, and from where."""
    accelerator = plan.accelerator
    table = Table("the step's time rests on", "value", "origin")
    sheet = {
        "peak, TFLOP/s": accelerator.peak_teraflops[config.precision.dtype],
        "memory, GB/s": accelerator.memory_gb_s,
        "GPUs of a node": accelerator.gpus_per_node,
        "between them, GB/s": accelerator.node_gb_s,
        "network ports of a node": accelerator.ports,
        "of a port, GB/s": accelerator.port_gb_s,
    }
    for words, value in sheet.items():
        table.add_row(words, f"{value:g}", "data sheet, or stated in launch")
    table.add_section()
    for name, origin in origins().items():
        table.add_row(name, f"{origin.value:g}", f"{origin.kind}: {origin.source}")
    return table


def _optimizer(plan: Plan, config: Config) -> Table:
    """The settings as the run will use them, and as the config has them where a rule changed them."""
    table = Table("optimizer", "run", "config")
    now, given = plan.optim.optim, config.optim
    for kind in dict.fromkeys(group.type for group in plan.groups):
        rates = [group.lr for group in plan.groups if group.type == kind]
        epsilon = next(group.epsilon for group in plan.groups if group.type == kind)
        shown = (
            f"{min(rates):.4g}" if len(set(rates)) == 1 else f"{min(rates):.4g} to {max(rates):.4g} by depth"
        )
        table.add_row(f"peak learning rate, {kind}", shown, f"{given.lr:.4g}")
        if epsilon != given.epsilon:
            table.add_row(f"epsilon, {kind}", f"{epsilon:.3g}", f"{given.epsilon:.3g}")
    table.add_row(
        "betas", f"{now.betas[0]:.4g}, {now.betas[1]:.4g}", f"{given.betas[0]:g}, {given.betas[1]:g}"
    )
    table.add_row("weight decay per step", f"{now.weight_decay:.4g}", f"{given.weight_decay:g}")
    if given.depth_multipliers:
        points = ", ".join(f"{point:g}" for point in given.depth_multipliers)
        table.add_row("rates by depth", f"x {points}", "")
    for what, factor in _of_transfer(config):
        table.add_row(what, f"x {factor:.4g}", "")
    if given.scaling is not None:
        kappa = "" if plan.optim.kappa is None else f"kappa = {plan.optim.kappa:.4g}"
        table.add_row("rule", kappa, given.scaling.rule)
    return table


def _of_transfer(config: Config) -> list[tuple[str, float]]:
    """What a base model changes besides rates and epsilons."""
    model = config.model
    transfer = getattr(model, "transfer", None)
    if transfer is None:
        return []
    by_type = multipliers(transfer, model.width, model.layers)
    deviations = [(f"initial deviation, {kind}", by_type[kind].deviation) for kind in ("matrix", "head")]
    return [*deviations, ("residual branches", residual_factor(transfer, model.layers))]


def _training(plan: Plan, config: Config, price: float | None, *, is_predicted: bool) -> Table:
    table = Table("training", "")
    rows = f"{config.data.global_batch_rows} rows x {config.data.sequence_length} tokens"
    table.add_row("FLOPs per token", f"{plan.flops_per_token:.4g} (forward + backward)")
    table.add_row("step", f"{rows} = {plan.tokens_per_step:,} tokens")
    each, number = plan.layout.micro_batch_rows, plan.layout.accumulation
    table.add_row("micro-batches", f"{number} per step, of {each} row{'s' if each > 1 else ''}")
    table.add_row("steps, tokens", f"{config.run.steps:,}, {plan.tokens:.4g}")
    table.add_row("schedule", f"{config.optim.schedule}, {config.optim.warmup_steps} warm-up steps")
    if plan.attention_bias is not None:
        usual = math.isclose(plan.attention_bias, -math.log(config.data.sequence_length))
        table.add_row(
            "attention bias", f"{plan.attention_bias:.4f}" + (" = -ln(sequence length)" if usual else "")
        )
    reckoned = f"the predicted MFU, {plan.mfu:.0%}" if is_predicted else f"MFU {plan.mfu:.0%}"
    hours = f"{plan.gpu_hours:,.0f}" if plan.gpu_hours >= 10 else f"{plan.gpu_hours:.2g}"
    table.add_row(f"time at {reckoned}", f"{_duration(plan.seconds)}, {hours} GPU hours")
    speed = plan.tokens / plan.seconds
    table.add_row("speed at that", f"{speed:,.0f} tokens/s, {speed / plan.gpus:,.0f} per GPU")
    if price is not None:
        table.add_row(f"cost at {price:g} per GPU hour", f"{plan.gpu_hours * price:,.0f}")
    return table


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds:.3g} s"
