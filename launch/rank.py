"""What each rank of a launched run does: train, and say how it ended."""

from __future__ import annotations

import contextlib
import os
import platform
import signal
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn

from launch.job import LaunchedRun
from pretrain.attempts import AttemptFolder, RankExit, own_attempt
from pretrain.exit_codes import EXIT_DONE, EXIT_RESUME, EXIT_USER_ERROR, SIGNALLED

EARLY_SIGNALS = (signal.SIGTERM, signal.SIGUSR2)


@dataclass(frozen=True)
class TrainJob:
    """Called by submitit in every rank. run: the run's folder."""

    run: str

    def __call__(self) -> None:
        run = LaunchedRun(Path(self.run))
        attempt = own_attempt()
        assert attempt is not None, "the batch script numbers the attempt"
        rank = take_place()
        folder = run.launch.attempt(attempt)
        redirect_output(run.log(rank, attempt))
        leave_early_on_signals(folder, rank)
        leave(train(run, folder, rank))


def leave(code: int) -> NoReturn:
    """End the process, without the interpreter's own way down: libraries' threads that are still there have made
    it abort, and a finished rank would count as crashed.

    A code other than 0 makes Slurm kill the other ranks, which may still be on their way out of a run that was
    asked to stop: that code is for the batch script, which reads it from the attempt's folder.
    """
    with contextlib.suppress(OSError):  # the disk of its log may be full
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(EXIT_DONE if code == EXIT_RESUME else code)


def take_place() -> int:
    """This process's rank. submitit's local ranks are told what torch.distributed wants to know."""
    if "SLURM_PROCID" in os.environ:
        return int(os.environ["SLURM_PROCID"])
    import submitit

    here = submitit.JobEnvironment()
    os.environ |= {
        "RANK": str(here.global_rank),
        "WORLD_SIZE": str(here.num_tasks),
        "LOCAL_RANK": str(here.local_rank),
    }
    return int(here.global_rank)


def train(run: LaunchedRun, folder: AttemptFolder, rank: int) -> int:
    """The run's exit code, recorded for the batch script with its reason."""
    from data_pipelines.errors import DataError
    from pretrain.commands.train import run_training
    from pretrain.errors import CheckpointError, TransientError, UserError

    def record(code: int, reason: str) -> int:
        record_exit(folder, RankExit(rank, platform.node(), code, reason, None))
        return code

    def failed(code: int, error: BaseException) -> int:
        with contextlib.suppress(OSError):
            print(f"error: {error}", file=sys.stderr)
        return record(code, _first_line(error))

    if rank == 0:
        folder.tell("importing libraries")
    try:
        code = run_training(str(run.config), [], print_config=False, quiet=False, resolved=True)
        for number in EARLY_SIGNALS:
            signal.signal(number, signal.SIG_IGN)  # it has ended well, whatever comes now
        return record(code, "finished" if code == EXIT_DONE else "asked to stop, and saved")
    except (CheckpointError, TransientError) as error:
        return failed(1, error)  # e.g. a peer died in a save: another attempt may do better
    except (UserError, DataError) as error:
        return failed(EXIT_USER_ERROR, error)
    except BaseException as error:  # raised further, it would wait for threads that wait for other ranks
        with contextlib.suppress(OSError):
            traceback.print_exc()
        return record(1, f"{type(error).__name__}: {_first_line(error)}")


def record_exit(folder: AttemptFolder, found: RankExit) -> None:
    """For the batch script. On a full disk the rank ends without: raised, it would keep the process from its end."""
    with contextlib.suppress(OSError):
        folder.record_exit(found)


def _first_line(error: BaseException) -> str:
    return str(error).split("\n")[0]


def leave_early_on_signals(folder: AttemptFolder, rank: int) -> None:
    """Until the run is up, a request to stop finds nothing to save: the rank leaves at once, alone, and says which
    signal it was, for Slurm also sends one to the ranks whose peer has died. The run then puts its own handlers in
    place of these, as these are in place of submitit's, which would requeue from rank 0."""

    def leave_early(number: int, _frame: FrameType | None) -> None:
        reason = f"{signal.Signals(number).name} before the first step"
        record_exit(folder, RankExit(rank, platform.node(), SIGNALLED + number, reason, None))
        leave(EXIT_RESUME)

    for number in EARLY_SIGNALS:
        signal.signal(number, leave_early)
    signal.signal(signal.SIGCONT, signal.SIG_DFL)


def redirect_output(path: Path) -> None:
    """Send this process's output, also that of libraries in C, to a file of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    number = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(number, 1)
    os.dup2(number, 2)
    os.close(number)
