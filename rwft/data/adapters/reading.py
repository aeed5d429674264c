"""Examples from files: rows, the adapter that is named or fits, and the account of both."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rwft.data.adapters.contract import Coerced, Dropped, Yield, adapter
from rwft.data.adapters.conversation import group_of
from rwft.data.adapters.detection import Choice, choose, detect
from rwft.data.adapters.values import number
from rwft.data.example import Example, Source
from rwft.data.ledger import Ledger
from rwft.data.sources import read_rows, scan
from rwft.data.strict_json import Row
from rwft.errors import DataError, ObjectiveError
from rwft.registry import place
from rwft.weighting import split_spec

SAMPLE = 1000
NO_PROMPT = "empty prompt"
NO_COMPLETION = "empty completion"


def read_examples(
    path: Any, adapter: Any = "auto", *, limit: int | None = None, report: str | Path | None = None
) -> Examples:
    """The examples of `path` (see `read_rows`) through an adapter: `auto`, a name, or `{name: ..., **settings}`.

    The first rows are read at once, to check the mapping of columns. Raises DataError if that or a row is wrong.
    """
    return Examples(path, adapter, limit, report)


class Examples:
    """Examples in the order of the rows; each iteration reads anew and keeps its account in `ledger`.

    A problem in any row ends the examples; the remaining rows are checked, then BadRows names them all.
    """

    def __init__(self, path: Any, spec: Any, limit: int | None, report: str | Path | None) -> None:
        self.path, self.limit, self.report = path, limit, report
        sample = list(itertools.islice(read_rows(path, limit=limit, report=report), SAMPLE))
        rows, places = [row for row, _ in sample], [source for _, source in sample]
        self.choice: Choice = detect(rows, places) if spec == "auto" else _named(spec, rows)
        self.entry = adapter.entry(self.choice.name if spec == "auto" else split_spec("adapter", spec)[0])
        self.settings = self.entry.bind(self.choice.settings, f"adapter '{self.entry.name}'")
        self.ledger = Ledger()
        self._prompts: dict[str, str] = {}

    @property
    def description(self) -> str:
        """Which format, and which column is what."""
        return self.choice.describe()

    def __iter__(self) -> Iterator[Example]:
        ledger = self.ledger = Ledger()
        self._prompts = {}
        for row, source in scan(self.path, ledger, self.limit):
            examples = self._examples(row, source, ledger)
            if not ledger.count:
                ledger.examples += len(examples)
                yield from examples
        ledger.settle(self.report)
        if not ledger.examples:
            raise DataError(f"{self.path}: found no examples ({ledger}), expected at least one")

    @property
    def _where(self) -> str:
        return f"adapter '{self.entry.name}' ({place(self.entry.function)})"

    def _examples(self, row: Row, source: Source, ledger: Ledger) -> list[Example]:
        """The examples of one row, none if anything in it is wrong; what was dropped or coerced is counted."""
        try:
            yielded = self._adapt(row, source)
            examples = [self._checked(item, ledger) for item in yielded if not isinstance(item, (Dropped, Coerced))]
        except DataError as problem:
            ledger.problem(source, problem)
            return []
        for item in yielded:
            if isinstance(item, Dropped):
                ledger.drop(source, item.reason, item.detail)
        ledger.notes.update(item.reason for item in yielded if isinstance(item, Coerced))
        return examples

    def _adapt(self, row: Row, source: Source) -> list[Yield]:
        inputs = {"row": row, "source": source}
        try:
            return list(self.entry.function(*[inputs[name] for name in self.entry.reads], **self.settings))
        except DataError:
            raise
        except Exception as error:  # a user's own adapter may raise anything
            raise ObjectiveError(f"{source}: {self._where}: {type(error).__name__}: {error}") from error

    def _checked(self, example: Any, ledger: Ledger) -> Example:
        if not isinstance(example, Example):
            raise ObjectiveError(
                f"{self._where}: yielded {type(example).__name__}, expected Example, Dropped or Coerced"
            )
        if example.reward is not None:
            number(example.reward, "reward")
        if isinstance(example.prompt, str) != isinstance(example.completion, str):
            raise DataError("completion: found another kind than in prompt, expected both text or both messages")
        if not example.prompt:
            ledger.notes[NO_PROMPT] += 1
        if isinstance(example.completion, str) and not example.completion.strip():
            ledger.notes[NO_COMPLETION] += 1
        if "group" in self.choice.columns and example.group is not None:
            self._check_group(example, ledger)
        return example

    def _check_group(self, example: Example, ledger: Ledger) -> None:
        """Count groups of a group column that hold several prompts: their baselines would mix tasks."""
        prompt = group_of(example.prompt)
        if self._prompts.setdefault(str(example.group), prompt) not in (prompt, ""):
            self._prompts[str(example.group)] = ""
            ledger.notes["group with several prompts"] += 1


def _named(spec: Any, rows: list[Row]) -> Choice:
    name, settings = split_spec("adapter", spec)
    flat = {key: _flat(value) for key, value in settings.items()}
    entry = adapter.entry(name)
    for key in flat:
        if key not in entry.settings:
            entry.bind(flat, f"adapter '{entry.name}'")
    return choose(entry, flat, rows)


def _flat(value: Any) -> Any:
    """A mapping such as `weights: {helpfulness: 1}` as the text that a setting can hold."""
    return ",".join(f"{key}={item}" for key, item in value.items()) if isinstance(value, Mapping) else value
