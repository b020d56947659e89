"""What the preflight's reports say, taken together. No torch: the batch script reads it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pretrain.attempts import read_json, write_json


@dataclass
class Report:
    """One rank's findings, written again after each stage, so that a rank that hangs has said how far it came."""

    rank: int
    host: str
    stage: str = "began"
    problems: list[str] = field(default_factory=list)
    """With this node."""
    alone: list[str] = field(default_factory=list)
    """Of what this rank tried by itself. With the node if others could do it, else with the run or the site."""
    passing: list[str] = field(default_factory=list)
    """Of `alone`, what another attempt may find gone."""
    everywhere: list[str] = field(default_factory=list)
    """With the run or the site, whatever the node."""
    versions: dict[str, str] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)

    def write(self, folder: Path, stage: str) -> None:
        assert stage in STAGES, stage
        self.stage = stage
        write_json(self.path(folder), asdict(self))

    def path(self, folder: Path) -> Path:
        return folder / f"report.{self.rank:05d}.json"


FIRST_STAGE, ALONE_STAGE, MET_STAGE = "began", "checked itself", "met the others"
COMPARED_STAGE, MEASURED_STAGE = "compared clocks and storage", "measured the network"
TRIED_STAGE, LAST_STAGE = "tried a step", "finished"
STAGES = (
    FIRST_STAGE,
    ALONE_STAGE,
    MET_STAGE,
    COMPARED_STAGE,
    MEASURED_STAGE,
    TRIED_STAGE,
    LAST_STAGE,
)
"""In their order. From the second on, all ranks meet between one and the next."""
ALIVE_S = 1.0
"""How often a rank sets its report's time, so that one whose process no longer runs is known."""
STILL_S = 10.0
"""Without that for so long, it does not run."""


@dataclass(frozen=True)
class Verdict:
    bad_nodes: Mapping[str, str]
    """Node -> what is wrong with it."""
    everywhere: str | None
    """What is wrong with the run or the site."""
    may_pass: bool
    """Whether another attempt on the same nodes may find it gone."""
    figures: Mapping[str, float]
    """Least or worst over the ranks."""

    @property
    def well(self) -> bool:
        return not self.bad_nodes and self.everywhere is None

    def __str__(self) -> str:
        if self.well:
            shown = ", ".join(f"{name} {value:.3g}" for name, value in self.figures.items())
            return f"all nodes are well ({shown})" if shown else "all nodes are well"
        nodes = [f"{node}: {what}" for node, what in self.bad_nodes.items()]
        return "; ".join([*nodes, *([self.everywhere] if self.everywhere else [])])


def judge(folder: Path, nodes: Sequence[str], *, code: int | None, seconds: float) -> Verdict:
    """The verdict on an allocation. code: the preflight step's exit code, None if its time ran out."""
    reports = [Report(**read_json(path)) for path in sorted(folder.glob("report.*.json"))]
    lone, common = _alone(reports)
    bad = _bad_nodes(folder, reports, nodes, code, seconds) | lone
    everywhere = list(dict.fromkeys([*common, *(said for report in reports for said in report.everywhere)]))
    passing = {said for report in reports for said in report.passing}
    may_pass = bool(everywhere) and passing.issuperset(everywhere)
    unfinished = [report for report in reports if report.stage != LAST_STAGE]
    if not bad and not everywhere and (code is None or code or unfinished):
        last = ", ".join(sorted({f"rank {report.rank}: {report.stage}" for report in unfinished})) or "none"
        ended = f"did not end in {seconds:.0f} s" if code is None else f"ended with code {code}"
        everywhere, may_pass = [f"the check {ended}; not finished: {last}; see {folder}"], True
    text = "; ".join(everywhere) or None
    return Verdict(bad, text, may_pass, worst(reports))


def _bad_nodes(
    folder: Path, reports: Sequence[Report], nodes: Sequence[str], code: int | None, seconds: float
) -> dict[str, str]:
    bad = {report.host: "; ".join(report.problems) for report in reports if report.problems}
    heard = {report.host for report in reports}
    if code != 0 and heard:  # where nobody answered, it is no single node's fault
        ended = (
            f"did not answer in {seconds:.0f} s"
            if code is None
            else "left no report: does it see the run folder?"
        )
        bad |= {node: ended for node in nodes if node not in heard}
    hung = {} if code == 0 else _hung(folder, reports, timed_out=code is None)
    return hung | bad | _other_versions(reports)


def _hung(folder: Path, reports: Sequence[Report], *, timed_out: bool) -> dict[str, str]:
    """Nodes with a rank that the others waited for, if those are at most half of the nodes: that most nodes hang is no
    single node's fault, and where most ranks have ended, those that still run are the ones that hang.

    What a rank found wrong, and ended with, is judged by itself.
    """
    waiting = [report for report in reports if not (report.problems or report.alone or report.everywhere)]
    most = len({report.host for report in reports}) // 2
    still = _still(folder, reports, waiting) if timed_out else {}
    behind = {} if still else _behind(reports, waiting)
    return next((found for found in (still, behind) if 0 < len(found) <= most), {})


def _still(folder: Path, reports: Sequence[Report], waiting: Sequence[Report]) -> dict[str, str]:
    """Of those waiting, whose process did not run any more, or did not reach the storage, when the time ran out."""
    seen = {report.rank: report.path(folder).stat().st_mtime for report in reports}
    silent_s = {rank: max(seen.values()) - at for rank, at in seen.items()}
    return {
        report.host: f"rank {report.rank} stood still for {silent_s[report.rank]:.0f} s; it last said: {report.stage}"
        for report in waiting
        if silent_s[report.rank] > STILL_S
    }


def _behind(reports: Sequence[Report], waiting: Sequence[Report]) -> dict[str, str]:
    """Of those waiting, who did not come to where others were."""
    furthest = max((STAGES.index(report.stage) for report in reports), default=0)
    return {
        report.host: f"rank {report.rank} came no further than: {report.stage}; the others waited for it"
        for report in waiting
        if STAGES.index(report.stage) < furthest
    }


def _alone(reports: Sequence[Report]) -> tuple[dict[str, str], list[str]]:
    """What ranks could not do by themselves: of the nodes, if it was so on at most half of them, else of the site."""
    hosts = {report.host for report in reports}
    failed = {report.host: "; ".join(report.alone) for report in reports if report.alone}
    if 2 * len(failed) <= len(hosts):
        return failed, []
    return {}, [problem for report in reports for problem in report.alone]


def _other_versions(reports: Sequence[Report]) -> dict[str, str]:
    """Nodes whose libraries differ from those of most nodes."""
    by_host = {report.host: tuple(sorted(report.versions.items())) for report in reports if report.versions}
    if len(set(by_host.values())) < 2:
        return {}
    usual, _ = Counter(by_host.values()).most_common(1)[0]
    found = {}
    for host, versions in by_host.items():
        differing = [f"{name} {number}" for name, number in versions if (name, number) not in usual]
        if differing:
            found[host] = f"other library versions than most nodes: {', '.join(differing)}"
    return found


def worst(reports: Sequence[Report]) -> dict[str, float]:
    """Rates by their least, seconds by their greatest."""
    found: dict[str, float] = {}
    for report in reports:
        for name, value in report.figures.items():
            pick: Any = max if name.endswith("seconds") else min
            found[name] = pick(found.get(name, value), value)
    return found
