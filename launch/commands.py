"""The body of `launch`."""

from __future__ import annotations

import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from launch import slurm
from launch.batch_script import script
from launch.dependencies import dependency_on
from launch.request import Request, absolute, joined, laid_out, overrides_of
from launch.settings import ClusterSettings, load_settings
from launch.status import find_runs, read_status
from launch.submission_checks import check_cluster, check_data, check_shape, refuse_a_second_job
from launch.submit import prepare, submit
from launch.sweep import sweep_configs, swept_keys
from launch.watch_commands import overview
from pretrain.attempts import read_json
from pretrain.commands.console import plain_console
from pretrain.config import Config, load_config
from pretrain.errors import UserError
from pretrain.run_folder import RunFolder
from pretrain.typed import typed, typed_for_runs

ASK_FOR_VERDICT_S = 0.5


@dataclass(frozen=True)
class LaunchOptions:
    cluster: Path | None
    settings: dict[str, Any]
    """Of the command line, over the cluster's file."""
    nodes: int | None
    sweep: tuple[str, ...]
    after: str | None
    preflight: bool | None
    preflight_only: bool
    local: bool
    allow_env: bool
    dry_run: bool


def launch_run(path: str, overrides: list[str], options: LaunchOptions) -> int:
    """Submit, or run here, or print what would be submitted. Returns the exit code."""
    console = plain_console(soft_wrap=True)
    request = _request(path, overrides, options)
    if options.preflight_only and (options.local or request.is_sweep):
        raise UserError(
            "--preflight-only checks the nodes that Slurm gives one run: leave out --local and --sweep"
        )
    check_shape(request)
    if options.dry_run:
        _print_plan(request, path, overrides, console, allow_env=options.allow_env)
        return 0
    if not options.local:
        check_cluster(request)
    elif shutil.which("squeue"):
        refuse_a_second_job(request.runs[0])
    check_data(request)
    for run in request.runs:
        RunFolder(run.run).create()
    prepare(request)
    if options.local:
        from launch.local import run_here

        return run_here(request, console.print)
    jobs = submit(request)
    if options.preflight_only:
        return _wait_for_verdict(request, jobs[0], console)
    _say_submitted(request, jobs, console)
    return 0


def _wait_for_verdict(request: Request, job: str, console: Console) -> int:
    """Show what the preflight found; 0 if all is well. Ctrl-C leaves the job in the queue."""
    path = request.runs[0].folder / "preflight" / job / "verdict.json"
    with console.status(f"job {job} checks {request.nodes} nodes ..."):
        while not path.is_file():
            found = slurm.queue([job])
            if not found or not found[0].is_live:
                break
            time.sleep(ASK_FOR_VERDICT_S)
    if not path.is_file():
        raise UserError(f"job {job} ended without a verdict; see {request.folder / f'{job}_0_log.out'}")
    verdict = read_json(path)
    console.print(verdict["message"])
    return 0 if verdict["well"] else 1


def _request(path: str, overrides: list[str], options: LaunchOptions) -> Request:
    base = load_config(path, overrides, allow_env=options.allow_env)
    configs = (
        sweep_configs(path, overrides, options.sweep, allow_env=options.allow_env)
        if options.sweep
        else (base,)
    )
    first = configs[0]
    settings = load_settings(
        options.cluster, dict(options.settings), {"gpus_per_node": first.launch.gpus_per_node}
    )
    settings = _with_preflight(settings, options)
    nodes = options.nodes or (1 if options.local else first.launch.nodes)
    return Request(
        name=base.run.name,
        configs=tuple(_laid_out(joined(absolute(config), settings), settings, nodes) for config in configs),
        settings=settings,
        nodes=nodes,
        after=None
        if options.after is None
        else dependency_on(find_runs(Path(first.run.folder), [options.after])),
        preflight_only=options.preflight_only,
        swept=swept_keys(options.sweep),
        command=f"cd {shlex.quote(str(Path.cwd()))} && {typed(*sys.argv[1:])}",
    )


def _laid_out(config: Config, settings: ClusterSettings, nodes: int) -> Config:
    """With the layout that the plan chooses for what is auto, told."""
    found, reason = laid_out(config, settings, nodes * settings.ranks_per_node)
    if reason is not None:
        plain_console(soft_wrap=True).print(f"{config.run.name}: {reason}", markup=False)
    return found


def _with_preflight(settings: ClusterSettings, options: LaunchOptions) -> ClusterSettings:
    wanted = True if options.preflight_only else options.preflight
    if wanted is None:
        return settings
    preflight = settings.preflight.model_copy(update={"enabled": wanted})
    return settings.model_copy(update={"preflight": preflight})


def _print_plan(
    request: Request, path: str, overrides: list[str], console: Console, *, allow_env: bool
) -> None:
    console.print(script(request))
    if request.is_sweep:
        for run in request.runs:
            console.print(f"# run: {run.run.name}")
    from pretrain.commands.plan import print_plan

    try:
        print_plan(
            path,
            [
                *overrides,
                *overrides_of(request.configs[0]),
            ],
            gpus=request.ranks,
            gpu="h100",
            mfu=None,
            price=None,
            allow_env=allow_env,
        )
    except UserError as error:  # e.g. a vocabulary that a dataset, not built yet, will decide
        console.print(f"# no plan: {error}")


def _say_submitted(request: Request, jobs: Sequence[str], console: Console) -> None:
    shape = f"{request.nodes} nodes x {request.settings.ranks_per_node} ranks"
    console.print(f"job {', '.join(jobs)}: {request.name}, {shape}")
    if request.excluded:
        path = request.runs[0].excluded_file
        console.print(
            f"without {', '.join(request.excluded)}, found bad before; to have them again: rm {shlex.quote(str(path))}"
        )
    if request.is_sweep:
        statuses, _ = read_status(request.runs)
        console.print(overview(statuses, console))
    first = request.runs[0].run
    name = f"{request.name}-*" if request.is_sweep else request.name
    console.print(f"where it is:  {typed_for_runs('status', name, first.parent)}")
    console.print(f"its output:   {typed_for_runs('logs', first.name, first.parent, '-f')}")
    console.print(f"to end it:    {typed_for_runs('cancel', name, first.parent)}")
