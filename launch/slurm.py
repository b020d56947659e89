"""Slurm's own commands, each bounded in time and answered in one line when it fails."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass

from launch.durations import minutes_of
from pretrain.errors import UserError

CALL_TIMEOUT_S = 20
"""Clients wait for minutes when the controller is gone."""

ACCOUNTING_TIMEOUT_S = 5
CONTROLLER_AWAY_S = 1800
CONTROLLER_AWAY = (
    "unable to contact slurm controller",
    "did not answer in",
    "socket timed out",
    "zero bytes were transmitted",
    "controller in standby",
)
"""What a client says when slurmctld restarts, or hands over to its backup."""

CAUSES = {
    "invalid partition": "there is no such partition; `sinfo -s` lists them",
    "node count specification invalid": "more nodes than the partition has, or than it gives one job",
    "requested node configuration is not available": "no node has that many GPUs, CPUs or that feature",
    "memory specification can not be satisfied": "no node has that much memory",
    "invalid feature": "no node has this feature; `sinfo -o '%N %f'` lists them",
    "invalid account": "this account or partition is not yours to use; `sacctmgr show associations user=$USER`",
    "invalid qos": "this QOS is not yours to use; `sacctmgr show qos`",
    "violates accounting/qos policy": "a limit of your account or QOS on jobs, nodes or time; "
    "`sacctmgr show associations user=$USER` and `sacctmgr show qos`",
    "dependency problem": "the job to wait for is not known to Slurm any more",
    "time limit": "the partition allows less time; `sinfo -o '%P %l'`",
    "unable to contact slurm controller": "the controller does not answer; `scontrol ping`",
    "unrecognized option": "a key under sbatch: is no option of this Slurm's sbatch",
    "invalid --": "a value that this Slurm's sbatch does not take",
}
"""Part of sbatch's refusal -> its likely cause."""


def require() -> None:
    """Raises UserError if this machine has no Slurm."""
    for program in ("sbatch", "squeue", "scontrol"):
        if shutil.which(program) is None:
            raise UserError(
                f"{program} is not on the PATH: this machine cannot submit to Slurm. Go to a login node, load its "
                "module, or use --local to run here and --dry-run to see the script"
            )


def call(*command: str, timeout_s: float = CALL_TIMEOUT_S) -> str:
    """A client's output. Raises UserError with its refusal and the likely cause."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    except FileNotFoundError:
        raise UserError(f"{command[0]} is not on the PATH; load Slurm's module") from None
    except subprocess.TimeoutExpired:
        raise UserError(
            f"{command[0]} did not answer in {timeout_s:.0f} s; is slurmctld up? `scontrol ping`"
        ) from None
    if done.returncode:
        raise UserError(explain(command[0], done.stderr or done.stdout))
    return done.stdout


def explain(program: str, refusal: str) -> str:
    """A refusal in one line, with its likely cause."""
    text = " ".join(
        line.removeprefix(f"{program}: ").removeprefix("error: ") for line in refusal.split("\n") if line
    )
    cause = next((cause for part, cause in CAUSES.items() if part in text.lower()), None)
    return f"{program} refused: {text}" + (f"\n  likely: {cause}" if cause else "")


@dataclass(frozen=True)
class Partition:
    name: str
    nodes: int
    default: bool
    time_limit: str
    """Of a job, as sinfo writes it."""

    @property
    def most_minutes(self) -> int | None:
        """None without a limit."""
        return minutes_of(self.time_limit) if self.time_limit[:1].isdigit() else None


def partitions() -> list[Partition]:
    """As sinfo shows them."""
    lines = call("sinfo", "-a", "-h", "-o", "%P|%D|%l").splitlines()
    found: dict[str, Partition] = {}
    for line in lines:
        name, nodes, limit = line.split("|")
        plain = name.rstrip("*")
        before = found[plain].nodes if plain in found else 0
        found[plain] = Partition(plain, before + int(nodes), name.endswith("*"), limit)
    return list(found.values())


def nodes_of(partition: str, patience_s: float = 0) -> list[str]:
    """The names of its nodes, whatever state they are in. patience_s: for a controller that is away."""
    asked = ("sinfo", "-a", "-h", "-N", "-p", partition, "-o", "%N")
    return sorted(set(call_patiently(*asked, patience_s=patience_s).split()))


@dataclass(frozen=True)
class QueuedJob:
    job: str
    name: str
    state: str
    reason: str
    eligible: str
    """When it may start at the earliest, as squeue writes it."""
    nodes: str
    elapsed: str

    @property
    def is_live(self) -> bool:
        """Whether it runs, or will."""
        return self.state in LIVE_STATES


FORMAT = "%i|%j|%T|%r|%S|%N|%M"


LIVE_STATES = (
    "PENDING",
    "RUNNING",
    "CONFIGURING",
    "COMPLETING",
    "SUSPENDED",
    "REQUEUED",
    "REQUEUE_HOLD",
    "STOPPED",
)


def queue(jobs: Sequence[str], patience_s: float = 0) -> list[QueuedJob]:
    """What squeue knows of these jobs, also of ones that ended a while ago; array tasks one by one.

    patience_s: how long to wait for a controller that is away.
    """
    if not jobs:
        return []
    asked = ("squeue", "-h", "-r", "-t", "all", "-o", FORMAT, "-j", ",".join(jobs))
    try:
        lines = call_patiently(*asked, patience_s=patience_s).splitlines()
    except UserError as error:
        if "Invalid job id" in str(error):  # none of them is remembered
            return []
        raise
    return [_queued(line) for line in lines]


def past_states(jobs: Sequence[str]) -> dict[str, str]:
    """The last states of jobs that squeue has forgotten, from the accounting; nothing where a site keeps none."""
    if not jobs or shutil.which("sacct") is None:
        return {}
    asked = ("sacct", "-n", "-P", "-X", "-o", "JobID,State", "-j", ",".join(jobs))
    try:
        lines = call(*asked, timeout_s=ACCOUNTING_TIMEOUT_S).splitlines()
    except UserError:  # most often: "Slurm accounting storage is disabled"
        return {}
    pairs = (line.split("|") for line in lines)
    return {
        job: state.split()[0] for job, state in pairs if state
    }  # CANCELLED by 1000; of a requeued job, the last


def _queued(line: str) -> QueuedJob:
    job, name, state, reason, eligible, nodes, elapsed = line.split("|")
    return QueuedJob(job, name, state, reason, eligible, nodes, elapsed)


def requeue(job: str, exclude: str, timeout_s: float = 30) -> None:
    """Put a running job back into the queue, without some nodes.

    Slurm changes the nodes of a pending job only, so that comes second; meanwhile it ends the batch script that calls
    this, which therefore must ignore SIGTERM.
    """
    try:
        call_patiently("scontrol", "requeue", job)
    except UserError:
        # A first answer may have been lost on the way, and the second try found the job in the queue already.
        state = [found.state for found in queue([job], patience_s=CONTROLLER_AWAY_S)]
        if state not in (["PENDING"], ["COMPLETING"], ["REQUEUED"]):
            raise
    end = time.monotonic() + timeout_s
    while exclude:
        try:
            call("scontrol", "update", f"JobId={job}", f"ExcNodeList={exclude}")
            return
        except UserError:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)


def call_patiently(*command: str, patience_s: float = CONTROLLER_AWAY_S) -> str:
    """`call`, but for as long as the controller is away, it is asked again: a run must not be lost because slurmctld
    restarts at the moment when an attempt ends."""
    end = time.monotonic() + patience_s
    while True:
        try:
            return call(*command)
        except UserError as error:
            away = any(part in str(error).lower() for part in CONTROLLER_AWAY)
            if not away or time.monotonic() > end:
                raise
            time.sleep(2)


def hostnames(nodes: str) -> list[str]:
    """node[1-2] as node1, node2."""
    return call("scontrol", "show", "hostnames", nodes).split()
