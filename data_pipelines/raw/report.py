"""What of a source was not taken, or was taken otherwise than it stands there: counted by reason, with an example."""

from __future__ import annotations

from dataclasses import dataclass, field

from data_pipelines.errors import DataError
from data_pipelines.raw.json_text import repaired

SHOWN = 120


@dataclass
class Tally:
    """Counts by reason, and the first name of each."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, reason: str, count: int = 1) -> None:
        """Count what `name` says."""
        self.counts[reason] = self.counts.get(reason, 0) + count
        self.examples.setdefault(reason, printable(name))

    @property
    def names(self) -> list[str]:
        """An example of each reason."""
        return [f"{name}: {reason}" for reason, name in self.examples.items()]

    def lines(self, title: str) -> list[str]:
        """For people, one line for each reason, most first."""
        ordered = sorted(self.counts.items(), key=lambda item: -item[1])
        return [
            f"{title}: {count:,} {reason}, for example {self.examples[reason]}" for reason, count in ordered
        ]


@dataclass
class Report:
    """What happened to a source.

    left_out: what is in no dataset.
    changed: what is there in another form (turned, laid on white, resampled).
    lost: what the tokenizer has no token for, in characters.
    """

    left_out: Tally = field(default_factory=Tally)
    changed: Tally = field(default_factory=Tally)
    lost: Tally = field(default_factory=Tally)

    def lines(self) -> list[str]:
        """All of it for people."""
        return [
            *self.left_out.lines("left out"),
            *self.lost.lines("lost"),
            *self.changed.lines("changed"),
        ]

    def refuse(self) -> None:
        """What --strict does: raises DataError if anything was left out or lost."""
        lines = [*self.left_out.lines("left out"), *self.lost.lines("lost")]
        if lines:
            raise DataError(
                "\n  ".join(["--strict: not all of the source would be in the dataset:", *lines])
                + "\nMend it or take it out of the source; without --strict the build goes on without it."
            )


def printable(name: str) -> str:
    """A name that is not UTF-8, or holds line breaks, in a form that can be printed in one line."""
    text = "".join(character if character.isprintable() else "\ufffd" for character in repaired(name))
    return text if len(text) <= 2 * SHOWN else f"{text[:SHOWN]}...{text[-SHOWN:]}"
