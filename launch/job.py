"""What was launched: written by the submitter into the run's folder, read by the batch script on the cluster."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.policy import Attempt, Ending
from launch.progress import newest_step
from pretrain.attempts import Launch, read_json, write_json
from pretrain.errors import UserError

if TYPE_CHECKING:
    from launch.settings import ClusterSettings


@dataclass(frozen=True)
class LaunchedRun:
    """A run that Slurm runs, by its folder."""

    run: Path

    @property
    def launch(self) -> Launch:
        return Launch(self.run)

    @property
    def folder(self) -> Path:
        return self.run / "launch"

    @property
    def config(self) -> Path:
        """The resolved config, as it was when the run was launched."""
        return self.folder / "config.yaml"

    @property
    def code(self) -> Path:
        """The packages as they were then; every attempt imports these."""
        return self.folder / "snapshot" / "code"

    @property
    def job_file(self) -> Path:
        return self.folder / "job.json"

    def write_job(
        self,
        settings: ClusterSettings,
        *,
        nodes: int,
        name: str,
        jobs: list[str],
        swept: Mapping[str, Any] | None = None,
        command: str = "",
    ) -> None:
        """The attempts that begin from here on are this launch's. swept: what tells the run from others of a sweep.
        command: what launches it again."""
        facts = {"name": name, "nodes": nodes, "jobs": jobs, "settings": settings.model_dump(mode="json")}
        facts |= {"swept": swept or {}, "first_attempt": self.launch.current + 1, "command": command}
        write_json(self.job_file, facts)

    def write_jobs(self, jobs: list[str]) -> None:
        """Slurm's numbers, once they are known."""
        write_json(self.job_file, {**self.job(), "jobs": jobs})

    def job(self) -> dict[str, Any]:
        """Raises UserError if the run was never launched."""
        try:
            found: dict[str, Any] = read_json(self.job_file)
        except FileNotFoundError:
            raise UserError(
                f"{self.run}: was not launched; `triptych launch --help` says how to do that"
            ) from None
        return found

    @property
    def settings(self) -> ClusterSettings:
        from launch.settings import ClusterSettings

        return ClusterSettings.model_validate(self.job()["settings"])

    def log(self, rank: int, attempt: int) -> Path:
        """What a rank printed in an attempt."""
        return self.run / "logs" / f"rank-{rank:05d}.attempt-{attempt:04d}.log"

    # ------------------------------------------------------------------------------------------- attempts

    def ended_attempts(self) -> list[Attempt]:
        """Of the newest launch, oldest first. What an earlier launch ended with, its user has seen."""
        found = [read_json(path) for path in sorted((self.folder / "attempts").glob("*/ended.json"))]
        first = self.job()["first_attempt"]
        return [_attempt(facts) for facts in found if facts["number"] >= first]

    def ended_attempt(self, number: int) -> Attempt | None:
        """What an attempt was found to have ended with; None while nobody has judged it."""
        path = self._ended_file(number)
        return _attempt(read_json(path)) if path.is_file() else None

    def write_ended(self, attempt: Attempt) -> None:
        write_json(self._ended_file(attempt.number), asdict(attempt))

    def _ended_file(self, number: int) -> Path:
        return self.launch.attempt(number).path / "ended.json"

    @property
    def excluded_file(self) -> Path:
        return self.folder / "excluded.json"

    @property
    def excluded(self) -> list[str]:
        """Nodes that were found bad, and are not to be had again."""
        return list(read_json(self.excluded_file)) if self.excluded_file.is_file() else []

    def exclude(self, nodes: tuple[str, ...]) -> None:
        write_json(self.excluded_file, list(nodes))

    def newest_step(self) -> int:
        """Of the whole checkpoints; 0 without any."""
        return newest_step(self.run)

    @property
    def outcome_file(self) -> Path:
        """There once the run has finished, or was given up: no attempt starts any more."""
        return self.folder / "outcome.json"


def _attempt(facts: dict[str, Any]) -> Attempt:
    """As it was written."""
    return Attempt(**{**facts, "ending": Ending(facts["ending"]), "bad_nodes": tuple(facts["bad_nodes"])})
