"""`triptych train`: the run, and what it says at its end."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain.config import config_from_dict
from pretrain.config.merge import merged_values
from pretrain.exit_codes import EXIT_DONE, EXIT_RESUME
from pretrain.imports import uncollected
from pretrain.terminal import outlive_terminal
from pretrain.yaml_text import read_yaml

if TYPE_CHECKING:
    from pretrain.config import Config
    from pretrain.run import Run


def run_training(
    path: str,
    overrides: list[str],
    *,
    print_config: bool,
    quiet: bool,
    allow_env: bool = False,
    resolved: bool = False,
) -> int:
    """Train to the end or to a stop request; returns the exit code.

    resolved: the config is one that `Config.to_yaml` wrote, which has no references.
    """
    # Read before anything slow is imported: what is no config at all is told at once.
    raw = read_yaml(Path(path)) if resolved else merged_values(Path(path), overrides, allow_env=allow_env)
    if print_config:
        print(config_from_dict(raw, origin=path).to_yaml(), end="")
        return EXIT_DONE

    outlive_terminal()
    with uncollected():
        import torch.distributed as dist

        from pretrain.assembly import import_engine, open_run
        from pretrain.loop import train
        from pretrain.parallel.ranks import ranks_from_environment

        config = config_from_dict(raw, origin=path, world=ranks_from_environment().world)
        config, reason = laid_out(config)
        import_engine(config)
    with open_run(config, quiet=quiet) as run:
        if reason is not None:
            run.record("layout", chosen=config.parallel.model_dump(mode="json"), reason=reason)
        train(run)
        run.reporter.close()
        code = EXIT_DONE if run.clock.done else EXIT_RESUME
        reason = "finished" if run.clock.done else run.stop.reason
        run.record("end", step=run.clock.step, exit_code=code, reason=reason)
        if run.ranks.is_main:
            print_summary(run)
    dist.destroy_process_group()
    return code


def laid_out(config: Config) -> tuple[Config, str | None]:
    """With the layout that the plan chooses for what is auto on this machine, and why; None where nothing is."""
    from pretrain.parallel.ranks import choose_device, ranks_from_environment

    if not config.parallel.auto:
        return config, None
    from pretrain.plan.auto import choose_layout
    from pretrain.plan.machine import machine_at_hand

    ranks = ranks_from_environment()
    machine = machine_at_hand(config, choose_device(config.run.device, ranks), ranks.world)
    choice = choose_layout(config, ranks.world, machine)
    if ranks.is_main:
        print(choice.reason, flush=True)
    return choice.config, choice.reason


def print_summary(run: Run) -> None:
    from rich.console import Console

    from pretrain.checkpoint.steps import step_name
    from pretrain.typed import typed

    console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
    if run.clock.cursor is None:
        console.print(f"stopped by {run.stop.reason} before the first step: there was nothing to save")
        return
    if not run.clock.done:
        again = f"the same command goes on from step {run.clock.step}"
        console.print(
            f"stopped by {run.stop.reason} at step {run.clock.step} of {run.clock.steps}, saved; {again}"
        )
    first, last = run.evaluation.first, run.evaluation.last
    if run.clock.done and first is not None and last is not None:
        losses = f"{first['nats_per_token']:.4f} -> {last['nats_per_token']:.4f} nats/token"
        if "bits_per_byte" in last:
            losses += f", {first['bits_per_byte']:.4f} -> {last['bits_per_byte']:.4f} bits/byte"
        steps = f"step {first['step']:.0f} -> {last['step']:.0f}"
        console.print(f"validation loss: {losses} ({steps}; {run.data.validated})")
    console.print(f"checkpoint:      {shlex.quote(str(run.folder.checkpoints / step_name(run.clock.step)))}")
    if run.data.tokenizer is not None or run.data.vocabulary is not None:
        console.print(f"more text:       {typed('generate', run.folder.path)}")
    elif run.config.data.task is not None:
        console.print(f"again, longer:   {typed('evaluate', run.folder.path, '--length', '1000')}")
    if run.config.monitor.tensorboard:
        watch = typed("--logdir", run.folder.path.parent, program="tensorboard")
        console.print(f"watch:           {watch}")
