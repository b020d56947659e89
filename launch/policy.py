"""What an attempt's end means, and what is done next. Pure functions: no Slurm, no files."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from pretrain.attempts import RankExit
from pretrain.exit_codes import EXIT_DONE, EXIT_NODE_FAULT, EXIT_RESUME, EXIT_USER_ERROR, SIGNALLED


class Ending(StrEnum):
    done = "done"
    resume = "resume"
    """Asked to stop, and saved, if there was a step to save."""
    configuration = "configuration"
    """A mistake that the next attempt would repeat."""
    node_fault = "node fault"
    crash = "crash"
    cancelled = "cancelled"
    """Slurm ended the job: scancel, or a preemption, after which Slurm itself requeues it."""


@dataclass(frozen=True)
class Attempt:
    """One start of the run, ended."""

    number: int
    ending: Ending
    step_before: int
    """Newest whole checkpoint when it began."""
    step_after: int
    reason: str
    bad_nodes: tuple[str, ...] = ()

    @property
    def saved_something(self) -> bool:
        return self.step_after > self.step_before


@dataclass(frozen=True)
class Decision:
    action: Literal["finish", "again", "stop"]
    message: str
    """For the log's last line and the ledger."""
    exclude: tuple[str, ...] = ()
    """Nodes that the next attempt must not have."""


def classify(code: int, exits: Sequence[RankExit], *, fault: bool, ranks: int) -> tuple[Ending, str]:
    """How an attempt ended, and why, from srun's exit code and what the ranks said.

    srun's code alone is not enough: a rank that ends with an error makes Slurm kill the others, and the greatest
    code wins. The order below is that of what can be trusted most.

    code: srun's. exits: of the ranks that said something. fault: the watchdog found a silent rank. ranks: in all.
    """
    for wanted, ending in (
        (EXIT_USER_ERROR, Ending.configuration),
        (EXIT_NODE_FAULT, Ending.node_fault),
        (EXIT_RESUME, Ending.resume),  # all ranks agree on the stop and save together: none says so by itself
    ):
        said = [found for found in exits if found.code == wanted]
        if said:
            return ending, said[0].reason
    if fault or code == EXIT_NODE_FAULT:
        return Ending.node_fault, "a rank fell silent"
    if len(exits) == ranks and all(found.code == EXIT_DONE for found in exits):
        return Ending.done, exits[0].reason
    silent = sorted(set(range(ranks)) - {found.rank for found in exits})
    ended = f"signal {code - SIGNALLED}" if code > SIGNALLED else f"code {code}"
    if code == SIGNALLED + signal.SIGTERM:
        ended += ", sent to all when one dies; the job's log names that one"
    unsaid = f"{_listed(silent)} ended without saying why ({ended})"
    failed = [found for found in exits if EXIT_DONE < found.code < SIGNALLED]
    if failed:
        why = f"rank {failed[0].rank} on {failed[0].host}: {failed[0].reason}"
        # Where most ranks failed and few are silent, those may have been killed, and the others lost a connection.
        return Ending.crash, f"{why}; {unsaid}" if 0 < len(silent) < len(failed) else why
    asked = [found for found in exits if found.code > SIGNALLED]
    if asked and len(exits) == ranks:
        return Ending.resume, asked[0].reason
    # Slurm asks the others to stop when a rank dies: what they answer then is not why the attempt ended.
    return Ending.crash, unsaid


def _listed(ranks: Sequence[int], most: int = 8) -> str:
    if not ranks:
        return "no rank"
    more = f" and {len(ranks) - most} more" if len(ranks) > most else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks[:most]))}{more}"


def decide(attempts: Sequence[Attempt], *, most_without_progress: int, excluded: Sequence[str]) -> Decision:
    """What to do after the last of `attempts` (oldest first), nodes of `excluded` being out already."""
    last = attempts[-1]
    if last.ending is Ending.done:
        return Decision("finish", f"finished at step {last.step_after}")
    if last.ending is Ending.configuration:
        return Decision("stop", f"not started again, for it would fail the same way: {last.reason}")
    if last.ending is Ending.cancelled:
        return Decision("stop", f"ended by Slurm at step {last.step_after} ({last.reason})")
    idle = 0
    for attempt in reversed(attempts):
        if attempt.saved_something or attempt.ending is Ending.cancelled:
            break
        idle += 1
    if idle >= most_without_progress:
        return Decision(
            "stop",
            f"not started again: {idle} attempts in a row saved nothing beyond step {last.step_after}; the last one "
            f"ended with: {last.reason}",
        )
    exclude = tuple(dict.fromkeys([*excluded, *last.bad_nodes]))
    without = f", without {', '.join(exclude)}" if exclude else ""
    return Decision(
        "again", f"{last.ending} ({last.reason}); starts again from step {last.step_after}{without}", exclude
    )


def with_enough_nodes(decision: Decision, partition: Sequence[str] | None, wanted: int) -> Decision:
    """`decision` with as few of the excluded nodes let in again, those first that were found bad first, that Slurm
    can give the job `wanted` nodes of the partition. Without them it would wait for ever."""
    if partition is None:
        return decision
    spare = max(0, len(partition) - wanted)
    counted = [node for node in decision.exclude if node in partition]
    again = counted[: max(0, len(counted) - spare)]
    if not again:
        return decision
    exclude = tuple(node for node in decision.exclude if node not in again)
    message = (
        f"{decision.message}; but {', '.join(again)} may be had again, for the partition has {len(partition)} nodes "
        f"and the run needs {wanted}"
    )
    return Decision(decision.action, message, exclude)
