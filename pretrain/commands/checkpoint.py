"""`triptych checkpoint`: what a run's checkpoint folder holds, and whether it is whole."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from pretrain.checkpoint.steps import StepInfo

app = typer.Typer(help="List and verify the checkpoints of a run.", no_args_is_help=True)

RunArgument = Annotated[str, typer.Argument(help="A run's folder, or its name under runs/.", metavar="RUN")]


@app.command(
    "list",
    epilog="Examples:  triptych checkpoint list demo  ·  triptych checkpoint list runs/demo",
)
def list_command(run: RunArgument) -> None:
    """List the steps of a run: size, time, and whether all files are there.

    Files are compared by size; `verify` reads them. The exit code is 1 if a step is damaged; saves that go
    on, or were interrupted, have no step's name yet.
    """
    from pretrain.checkpoint.steps import list_steps

    steps = list_steps(checkpoint_folder(run))
    _report(steps)
    if any(info.is_damaged for info in steps):
        raise typer.Exit(1)


@app.command(
    epilog="Examples:  triptych checkpoint verify demo  ·  triptych checkpoint verify runs/demo --step 1000",
)
def verify(
    run: RunArgument,
    step: Annotated[int | None, typer.Option(help="Only this step; by default all of them.")] = None,
) -> None:
    """Read every file and compare its checksum with the manifest.

    The exit code is 1 if a step is damaged.
    """
    from pretrain.checkpoint.steps import list_steps, step_info, step_name
    from pretrain.errors import CheckpointError
    from pretrain.typed import typed

    folder = checkpoint_folder(run)
    if step is None:
        steps = list_steps(folder, checksums=True)
    else:
        path = folder / step_name(step)
        info = step_info(path, checksums=True)
        if info is None:
            raise CheckpointError(f"{path} does not exist; see `{typed('checkpoint', 'list', run)}`")
        steps = [info]
    _report(steps)
    if not steps or any(info.is_damaged for info in steps):
        raise typer.Exit(1)


def checkpoint_folder(run: str) -> Path:
    """The checkpoint folder of a run, given its folder or its name.

    Raises:
        CheckpointError: there is none.
    """
    from pretrain.errors import CheckpointError

    for folder in (Path(run), Path("runs") / run):
        if (folder / "checkpoints").is_dir():
            return folder / "checkpoints"
    raise CheckpointError(f"{run}: neither {run}/checkpoints nor runs/{run}/checkpoints is a folder")


def _report(steps: list[StepInfo]) -> None:
    from rich.table import Table
    from rich.text import Text

    from pretrain.commands.console import plain_console

    table = Table("step", "size", "ranks", "saved", "state")
    for info in steps:
        # Text, not str: a message may hold brackets, which rich would take for markup
        state = Text("whole", "green") if info.problem is None else Text(info.problem, "red")
        saved = info.written_at.astimezone().strftime("%Y-%m-%d %H:%M:%S") if info.written_at else "-"
        ranks = "-" if info.world_size is None else str(info.world_size)
        table.add_row(f"{info.step:,}", _size(info.bytes), ranks, saved, state)
    console = plain_console()
    console.print(table if steps else "no checkpoints yet")


def _size(count: int) -> str:
    """Bytes for people, in powers of 1000."""
    value, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
