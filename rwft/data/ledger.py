"""The account of a reading: how many rows, what was dropped and why, what is worth a note, and every problem."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rwft.errors import DataError

SHOWN = 5
KEPT = 100_000


class BadRows(DataError):
    """Rows that cannot be trained on. `problems` lists them (the first 100,000); `count` is how many there are."""

    def __init__(self, message: str, problems: list[str], count: int) -> None:
        super().__init__(message)
        self.problems, self.count = problems, count


@dataclass
class Ledger:
    """What reading met so far. `notes` count what was taken otherwise than as written, or is odd."""

    rows: int = 0
    examples: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)  # reason -> which was the first to be dropped for it, and why
    problems: list[str] = field(default_factory=list)
    count: int = 0

    def problem(self, where: object, what: object) -> None:
        """Note one problem; all are counted, the first 100,000 kept."""
        self.count += 1
        if len(self.problems) < KEPT:
            self.problems.append(f"{where}: {what}")

    def drop(self, where: object, reason: str, detail: str = "") -> None:
        """Count one that is left out; of each reason the first is told, if there is more to say of it."""
        self.dropped[reason] += 1
        if detail:
            self.first.setdefault(reason, f"{where}: {detail}")

    def settle(self, report: str | Path | None = None) -> None:
        """Raise BadRows if there was any problem; with `report`, write all of them there first."""
        if not self.count:
            return
        if report is not None:
            Path(report).write_text("\n".join(self.problems) + "\n", encoding="utf-8")
        raise BadRows(self._message(report), self.problems, self.count)

    def _message(self, report: str | Path | None) -> str:
        first, others = self.problems[0], self.problems[1:SHOWN]
        lines = [first if self.count == 1 else f"{first} (one of {self.count} problems)"]
        lines += [f"  {problem}" for problem in others]
        rest = self.count - 1 - len(others)
        if rest:
            lines.append(f"  and {rest} more" + (f", see {report}" if report is not None else ""))
        return "\n".join(lines)

    def __str__(self) -> str:
        parts = [f"{self.rows} rows", f"{self.examples} examples"]
        parts += dropped_lines(self.dropped, self.first)
        parts += [f"{n}: {note}" for note, n in sorted(self.notes.items())]
        return "; ".join(parts)


def dropped_lines(dropped: Mapping[str, int], first: Mapping[str, str]) -> list[str]:
    """A line for each reason, in order, with the first that was left out for it."""
    told = {reason: f" (first {first[reason]})" if reason in first else "" for reason in dropped}
    return [f"dropped {number}: {reason}{told[reason]}" for reason, number in sorted(dropped.items())]
