"""The whole `triptych` command: what trains, and what puts it onto machines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pretrain.cli import AllowEnv, ConfigPath, Overrides, app
from pretrain.cli import main as run_app

RunsFolder = Annotated[Path, typer.Option("--runs", help="Folder of the runs.")]
Runs = Annotated[
    list[str] | None, typer.Argument(metavar="[RUN]...", help="Names, patterns such as 'lr-*', or folders.")
]
OneRun = Annotated[
    str, typer.Argument(metavar="RUN", help="A run's name, or its folder.", show_default=False)
]


Nodes = Annotated[int | None, typer.Option(min=1, help="Default: launch.nodes of the config.")]
GpusPerNode = Annotated[int | None, typer.Option(min=0, help="0 trains on CPUs.")]
TasksPerNode = Annotated[int | None, typer.Option(min=1, help="Ranks per node. Default: one per GPU.")]
Cluster = Annotated[
    Path | None, typer.Option(help="A file, or the name of one in configs/cluster. Default: default.yaml.")
]
SlurmOption = Annotated[str | None, typer.Option(help="As sbatch has it.")]
TimeLimit = Annotated[
    str | None, typer.Option(help="Of one job, e.g. 1-00:00:00; the run goes on in the next one.")
]
Container = Annotated[str | None, typer.Option(help="Image for pyxis.")]
Sbatch = Annotated[
    list[str] | None, typer.Option("--sbatch", help="Any other option, key=value; may be repeated.")
]
Sweep = Annotated[
    list[str] | None,
    typer.Option("--sweep", help="'key=[value,value]'; may be repeated: one run per combination."),
]
After = Annotated[str | None, typer.Option(help="Start when this run's job has ended well.")]
Chain = Annotated[
    bool, typer.Option("--chain", help="Queue several jobs, one after the other, instead of requeueing.")
]
Preflight = Annotated[bool | None, typer.Option(help="Check the nodes first.")]
PreflightOnly = Annotated[bool, typer.Option("--preflight-only", help="Check the nodes, train nothing.")]
Local = Annotated[bool, typer.Option("--local", help="Here, without Slurm.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print the batch script and the plan; submit nothing.")
]


@app.command()
def launch(
    config: ConfigPath,
    overrides: Overrides = None,
    nodes: Nodes = None,
    gpus_per_node: GpusPerNode = None,
    tasks_per_node: TasksPerNode = None,
    cluster: Cluster = None,
    partition: SlurmOption = None,
    time: TimeLimit = None,
    account: SlurmOption = None,
    qos: SlurmOption = None,
    constraint: SlurmOption = None,
    container: Container = None,
    sbatch: Sbatch = None,
    sweep: Sweep = None,
    after: After = None,
    chain: Chain = False,
    preflight: Preflight = None,
    preflight_only: PreflightOnly = False,
    local: Local = False,
    dry_run: DryRun = False,
    allow_env: AllowEnv = False,
) -> None:
    """Submit a run to Slurm; it comes back by itself after preemptions, time limits and dead nodes.

    triptych launch configs/sigmoid/7b.yaml --nodes 32 --gpus-per-node 8 --partition h100

    triptych launch configs/sigmoid/1b.yaml --nodes 4 --sweep 'optim.lr=[3e-3,1e-2]' --dry-run

    triptych launch configs/sigmoid/demo.yaml --local --gpus-per-node 0 --tasks-per-node 2
    """
    from launch.commands import LaunchOptions, launch_run

    given = {
        "partition": partition,
        "time": time,
        "account": account,
        "qos": qos,
        "constraint": constraint,
        "container": container,
        "gpus_per_node": gpus_per_node,
        "tasks_per_node": tasks_per_node,
        "requeue": False if chain else None,
        "sbatch": _options(sbatch or []),
    }
    options = LaunchOptions(
        cluster=cluster,
        settings={key: value for key, value in given.items() if value is not None},
        nodes=nodes,
        sweep=tuple(sweep or ()),
        after=after,
        preflight=preflight,
        preflight_only=preflight_only,
        local=local,
        allow_env=allow_env,
        dry_run=dry_run,
    )
    raise typer.Exit(launch_run(config, overrides or [], options))


@app.command()
def status(
    runs: Runs = None,
    folder: RunsFolder = Path("runs"),
    watch: Annotated[float | None, typer.Option(help="Refresh every so many seconds.")] = None,
    details: Annotated[bool, typer.Option("--details", help="Where the time went, and the ledger.")] = False,
    sort: Annotated[
        str, typer.Option(help="name, loss or validation: of a sweep the best comes first.")
    ] = "name",
    json_output: Annotated[bool, typer.Option("--json", help="As JSON, for programs.")] = False,
) -> None:
    """What runs, why it waits, step, loss, speed and goodput.

    triptych status

    triptych status "sigmoid-7b*" --watch 10

    triptych status --json
    """
    from launch.watch_commands import show_status

    show_status(folder, runs or [], watch=watch, details=details, sort=sort, json_output=json_output)


@app.command()
def logs(
    run: OneRun,
    folder: RunsFolder = Path("runs"),
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as it is written.")] = False,
    rank: Annotated[int, typer.Option(min=0)] = 0,
    attempt: Annotated[int | None, typer.Option(min=1, help="Default: the newest.")] = None,
    lines: Annotated[int, typer.Option(min=1, help="So many of the last lines.")] = 50,
) -> None:
    """What a rank printed.

    triptych logs sigmoid-7b -f

    triptych logs sigmoid-7b --rank 17 --attempt 3
    """
    from launch.watch_commands import show_logs

    show_logs(folder, run, follow=follow, rank=rank, attempt=attempt, lines=lines)


@app.command()
def cancel(runs: Runs = None, folder: RunsFolder = Path("runs")) -> None:
    """End the jobs of runs. They save first, if the site gives them the time.

    triptych cancel sigmoid-7b
    """
    from launch.watch_commands import cancel_runs

    cancel_runs(folder, runs or [])


@app.command()
def tensorboard(
    folder: RunsFolder = Path("runs"),
    port: Annotated[int, typer.Option(min=0, help="0 takes a free one.")] = 6006,
    slurm: Annotated[
        bool, typer.Option("--slurm", help="As a Slurm job; prints the ssh line for your own machine.")
    ] = False,
    partition: Annotated[str | None, typer.Option(help="With --slurm.")] = None,
    time: Annotated[str, typer.Option(help="With --slurm: the job's limit.")] = "1-00:00:00",
) -> None:
    """TensorBoard on all runs of a folder.

    triptych tensorboard
    """
    from launch.watch_commands import start_tensorboard

    start_tensorboard(folder, port, slurm=slurm, partition=partition, time_limit=time)


def _options(given: list[str]) -> dict[str, Any]:
    """key=value of --sbatch; a key alone is an option without a value."""
    found: dict[str, Any] = {}
    for text in given:
        key, equals, value = text.partition("=")
        found[key.lstrip("-")] = value if equals else True
    return found


def main() -> None:
    """Entry point of the `triptych` command."""
    run_app()


if __name__ == "__main__":
    main()
