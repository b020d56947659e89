"""`triptych plan`: the figures of a run in tables."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from models.layers.transfer import multipliers, residual_factor
from pretrain.config import load_config
from pretrain.plan.estimate import Plan, make_plan
from pretrain.plan.layouts import describe, suggest_layouts

if TYPE_CHECKING:
    from pretrain.config import Config
    from pretrain.hardware import Accelerator

GIB = 1 << 30


def print_plan(
    path: str,
    overrides: list[str],
    *,
    gpus: int | None,
    gpu: str,
    mfu: float | None,
    price: float | None,
    suggest: bool = False,
) -> None:
    config = load_config(path, overrides)
    if gpus is None:
        gpus = max(1, config.launch.nodes * config.launch.gpus_per_node)
    plan = make_plan(config, gpus=gpus, gpu=gpu, mfu=mfu)
    console = Console(highlight=False)
    console.print(f"{config.run.name}: {config.model.family}, {sum(plan.parameters.values()):,} parameters")
    console.print(_parameters(plan))
    console.print(_memory(plan, config))
    if gpus > 1:
        console.print(_traffic(plan))
    console.print(_training(plan, config, price))
    console.print(_step(plan))
    console.print(_optimizer(plan, config))
    for warning in plan.optim.warnings:
        console.print(f"[bold]warning[/bold]: {warning}")
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
    table = Table("s/step", "GiB", "tokens/s per GPU", "MFU", box=None, pad_edge=False)
    table.add_column("layouts that fit, fastest first", overflow="fold")
    for one in found:
        seconds = one.layout.time.total
        figures = (f"{seconds:.2f}", f"{one.layout.memory.total / GIB:.1f}")
        speed = one.tokens_per_step / seconds / gpus
        table.add_row(*figures, f"{speed:,.0f}", f"{one.mfu:.0%}", one.settings)
    console.print(table)


def _parameters(plan: Plan) -> Table:
    table = Table("parameters", "count", "share", title_justify="left")
    total = sum(plan.parameters.values())
    for group, count in plan.parameters.items():
        table.add_row(group, f"{count:,}", f"{count / total:.1%}")
    table.add_row("all", f"{total:,}", "")
    return table


def _memory(plan: Plan, config: Config) -> Table:
    parallel = config.parallel
    where = f", stage {plan.layout.stage}" if parallel.pipeline > 1 else ""
    title = f"memory per GPU ({plan.gpus} x {plan.accelerator.name}, {describe(parallel)}{where})"
    table = Table(title, "GiB")
    for kind in ("parameters", "gradients", "optimizer", "buffers", "activations", "logits", "update"):
        table.add_row(kind, f"{getattr(plan.memory, kind) / GIB:.3f}")
    table.add_row("most, during the passes", f"{plan.memory.during_passes / GIB:.3f}")
    table.add_row("most, during the update", f"{plan.memory.during_update / GIB:.3f}")
    table.add_row("of the GPU's", f"{plan.accelerator.memory_gib:.0f}")
    if plan.memory.host:
        table.add_row("in host memory", f"{plan.memory.host / GIB:.3f}")
    return table


def _traffic(plan: Plan) -> Table:
    table = Table("through the collectives of a GPU, per step", "of", "GB")
    for (axis, kind), size in sorted(plan.layout.traffic.items()):
        table.add_row(kind.removesuffix("_base").replace("_", "-"), f"{axis} axis", f"{size / 1e9:.3f}")
    return table


def _step(plan: Plan) -> Table:
    layout, time = plan.layout, plan.layout.time
    table = Table("predicted step", "seconds")
    for kind in ("compute", "exchange", "bubble", "replicas", "update", "total"):
        table.add_row(kind, f"{getattr(time, kind):.3f}")
    table.add_row("bubble, of the working time", f"{layout.bubble:.1%}")
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


def _training(plan: Plan, config: Config, price: float | None) -> Table:
    table = Table("training", "")
    rows = f"{config.data.global_batch_rows} rows x {config.data.sequence_length} tokens"
    table.add_row("FLOPs per token", f"{plan.flops_per_token:.4g} (forward + backward)")
    table.add_row("step", f"{rows} = {plan.tokens_per_step:,} tokens")
    table.add_row(
        "micro-batch", f"{plan.layout.micro_batch_rows} rows per GPU, {plan.layout.accumulation} per step"
    )
    table.add_row("steps, tokens", f"{config.run.steps:,}, {plan.tokens:.4g}")
    table.add_row("schedule", f"{config.optim.schedule}, {config.optim.warmup_steps} warm-up steps")
    if plan.attention_bias is not None:
        usual = math.isclose(plan.attention_bias, -math.log(config.data.sequence_length))
        table.add_row(
            "attention bias", f"{plan.attention_bias:.4f}" + (" = -ln(sequence length)" if usual else "")
        )
    table.add_row(
        f"time at MFU {plan.mfu:.0%}", f"{plan.seconds / 86400:.2f} days, {plan.gpu_hours:,.0f} GPU hours"
    )
    speed = plan.tokens / plan.seconds
    table.add_row("speed at that MFU", f"{speed:,.0f} tokens/s, {speed / plan.gpus:,.0f} per GPU")
    if price is not None:
        table.add_row(f"cost at {price:g} per GPU hour", f"{plan.gpu_hours * price:,.0f}")
    return table
