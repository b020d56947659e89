"""The `triptych` command. Bodies import what they need, so that `--help` answers at once."""

from __future__ import annotations

import errno
import logging
import os
import sys
import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from pretrain.commands.checkpoint import app as checkpoint_app
from pretrain.commands.data import app as data_app
from pretrain.commands.evaluate_options import EvaluateOptions
from pretrain.commands.generate_options import HowOptions, WhatOptions
from pretrain.commands.options import with_options
from pretrain.exit_codes import EXIT_USER_ERROR
from pretrain.terminal import guard_output

RANK_0_TELLS_S = 3.0

app = typer.Typer(
    name="triptych",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Pretrain sigmoid-attention Transformers, parallel nonlinear RNNs and tri-modal masked diffusion.",
)
app.add_typer(data_app, name="data")
app.add_typer(checkpoint_app, name="checkpoint")


class DeviceKind(StrEnum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


ConfigPath = Annotated[
    str, typer.Argument(help="A YAML file, e.g. configs/sigmoid/demo.yaml.", show_default=False)
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Settings over the file's, e.g. optim.lr=3e-3."),
]
AllowEnv = Annotated[
    bool, typer.Option("--allow-env", help="Let the config read the environment: ${oc.env:NAME}.")
]
RunName = Annotated[str, typer.Argument(help="A run's name under runs/, or its folder.", show_default=False)]
Step = Annotated[int | None, typer.Option(help="A saved step. Default: the newest whole checkpoint.")]
Device = Annotated[DeviceKind, typer.Option(help="auto takes a GPU if there is one.")]


@app.command()
def train(
    config: ConfigPath,
    overrides: Overrides = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the resolved config and stop.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
    allow_env: AllowEnv = False,
) -> None:
    """Train here: one process, or as many as torchrun or srun started. Resumes by itself.

    Exit codes: 0 done, 75 saved and wants to be started again, 2 a mistake that the message explains. SIGTERM, Ctrl-C
    and a closed terminal save first; `| head` takes the output away, not the run.

        triptych train configs/sigmoid/demo.yaml

        triptych train configs/sigmoid/demo.yaml data.path=data/mine run.name=mine optim.lr=3e-3

        torchrun --nproc-per-node 8 -m pretrain.cli train configs/sigmoid/1b.yaml data.path=data/web
    """
    from pretrain.commands.train import run_training

    raise typer.Exit(
        run_training(config, overrides or [], print_config=print_config, quiet=quiet, allow_env=allow_env)
    )


@app.command()
def plan(
    config: ConfigPath,
    overrides: Overrides = None,
    gpus: Annotated[
        int | None, typer.Option(min=1, help="Devices. Default: launch.nodes x launch.gpus_per_node.")
    ] = None,
    gpu: Annotated[str | None, typer.Option(help="h100, h200, a100 or a100_40. Default: launch.gpu.")] = None,
    mfu: Annotated[
        float | None,
        typer.Option(help="Model FLOPs utilisation to reckon with. Default: the predicted step's."),
    ] = None,
    price: Annotated[float | None, typer.Option(help="Price of a GPU hour, for the cost.")] = None,
    suggest: Annotated[
        bool, typer.Option("--suggest", help="Layouts of these GPUs that fit, fastest first.")
    ] = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="What the predicted step rests on: fitted, measured or assumed.")
    ] = False,
    allow_env: AllowEnv = False,
) -> None:
    """Parameters, memory per GPU, traffic, FLOPs, hyperparameters, time and cost, before a GPU is touched.

    triptych plan configs/sigmoid/7b.yaml --gpus 512 --suggest

    triptych plan configs/sigmoid/7b.yaml --gpus 256 parallel.tensor=4 parallel.pipeline=4 parallel.zero=1

    triptych plan configs/sigmoid/1b.yaml parallel.zero=2 --gpus 64 --mfu 0.45 --price 2.5
    """
    from pretrain.config.merge import merged_values

    # What is no config at all is told before anything slow is imported.
    merged_values(Path(config), overrides or [], allow_env=allow_env)
    from pretrain.commands.plan import print_plan

    print_plan(
        config,
        overrides or [],
        gpus=gpus,
        gpu=gpu,
        mfu=mfu,
        price=price,
        suggest=suggest,
        explain=explain,
        allow_env=allow_env,
    )


@app.command()
@with_options(what=WhatOptions, how=HowOptions)
def generate(
    run: RunName,
    what: WhatOptions,
    how: HowOptions,
    step: Step = None,
    device: Device = DeviceKind.auto,
) -> None:
    """Continue a text with a trained model; texts, pictures and sounds from one of masked diffusion.

    triptych generate demo --prompt "def read(self" --temperature 0.7

    triptych generate digits --task text-to-image --prompt seven --out seven.png --count 9 --sheet --guidance 2

    triptych generate digits --task image-to-text --image seven.png

    triptych generate digits --task text-to-audio --prompt five --out five.wav

    triptych generate digits --prompt "three [MASK] four equals seven"
    """
    from pretrain.commands.generate import print_generated

    print_generated(run, what, how, step=step, device=device)


@app.command()
@with_options(what=EvaluateOptions)
def evaluate(
    run: RunName,
    what: EvaluateOptions,
    step: Step = None,
    device: Device = DeviceKind.auto,
    json_output: Annotated[bool, typer.Option("--json", help="One line of JSON.")] = False,
) -> None:
    """Loss in nats per token, perplexity and bits per byte of a trained model on any dataset; accuracy on a task;
    of masked diffusion the likelihood bound by modality and task, with 95 % intervals, or questions answered.

    triptych evaluate demo

    triptych evaluate demo --data data/mine --split train --rows 200

    triptych evaluate parity --length 100 --length 1000

    triptych evaluate digits --draws 32

    triptych evaluate digits --choices questions.jsonl
    """
    from pretrain.commands.inference import print_evaluation_of

    print_evaluation_of(run, what, step=step, device=device, json_output=json_output)


def main() -> None:
    """Entry point. A user's error is a message and exit code 2; anything else is a bug and keeps its traceback."""
    from data_pipelines.errors import DataError
    from pretrain.errors import UserError

    guard_output()
    _speak_up()
    try:
        app(standalone_mode=True)
    except (UserError, DataError) as error:
        rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"
        if rank != "0":
            # What all ranks find wrong, rank 0 tells, and torchrun or srun ends the others: the first of them to exit
            # could end rank 0 before it has. What one rank finds, it tells itself.
            time.sleep(RANK_0_TELLS_S)
        print(f"error: {error}" if rank == "0" else f"error: rank {rank}: {error}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror}; make room, then the same command goes on", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)


def _speak_up() -> None:
    """Our own warnings go to stderr, one line each."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("warning: %(message)s"))
    for room in ("data_pipelines", "pretrain", "launch"):
        logger = logging.getLogger(room)
        logger.addHandler(handler)
        logger.propagate = False


if __name__ == "__main__":
    main()
