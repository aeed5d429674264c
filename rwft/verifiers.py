"""Scores of sampled completions: small functions whose signature says what they look at.

A verifier gives 1 (or true) for success, 0 (or false) for failure, or any finite number. A
user's own is found by name as a plugin, as `path/to/file.py:function` or as
`package.module:function`, like an objective.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rwft.bounds import NonNegative
from rwft.data import tasks
from rwft.errors import DataError, ObjectiveError
from rwft.registry import Registry
from rwft.weighting import Factor, bind_factor

VOCABULARY = {
    "prompt": "text of the prompt (a conversation as JSON)",
    "completion": "text that was sampled, without the end-of-sequence token",
    "answer": "the right answer that the row gives",
    "row": "what is kept of the row: prompt, answer, file, row, reward, group",
}

verifier = Registry("verifier", VOCABULARY, builtin="rwft.verifiers", group="rwft.verifiers")
"""Decorator and registry: `@verifier` on a function, `verifier["numeric"]`, iteration, `in`."""

NUMBER = re.compile(
    r"""(?<!\w) (?<!\d\.) [-+]? (?: \d{1,3} (?:,\d{3})+ (?!\d) | \d+ ) (?:\.\d+)? (?:e[-+]?\d+)?
      | (?<![\w.]) [-+]? \.\d+ (?:e[-+]?\d+)?""",
    re.VERBOSE | re.IGNORECASE,
)


@verifier
def exact_match(completion: str, answer: str) -> bool:
    """The completion is the answer, but for white space around it."""
    return completion.strip() == answer.strip()


@verifier
def contains(completion: str, answer: str, *, ignore_case: bool = False) -> bool:
    """The answer occurs in the completion. An empty answer, which occurs everywhere, is an error in the data."""
    if not answer.strip():
        raise DataError("verifier 'contains': the answer is empty, so every completion would contain it")
    if ignore_case:
        return answer.strip().casefold() in completion.casefold()
    return answer.strip() in completion


@verifier
def regex(completion: str, *, pattern: str) -> bool:
    """The pattern (Python's `re`) is found somewhere in the completion."""
    return re.search(pattern, completion) is not None


@verifier
def numeric(completion: str, answer: str, *, tolerance: NonNegative = 1e-6) -> bool:
    """The last number of the completion is that of the answer, within `tolerance` (relative; absolute below 1).

    Thousands may be set off by commas. A completion without a number fails; an answer without
    one is an error in the data.
    """
    expected, found = last_number(answer), last_number(completion)
    if expected is None:
        raise DataError(f"verifier 'numeric': answer {answer!r} holds no number")
    return found is not None and abs(found - expected) <= tolerance * max(1.0, abs(expected))


def last_number(text: str) -> float | None:
    """The last decimal number in `text`; None if there is none."""
    found = NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


@verifier
def caesar(prompt: str, completion: str) -> bool:
    """The completion solves the embedded task `caesar`."""
    return completion == tasks.answer("caesar", prompt)


@verifier
def reverse(prompt: str, completion: str) -> bool:
    """The completion solves the embedded task `reverse`."""
    return completion == tasks.answer("reverse", prompt)


@dataclass(frozen=True)
class Verifier:
    """A verifier with its settings bound: `(row, completion) -> score`."""

    factor: Factor

    @property
    def reads(self) -> tuple[str, ...]:
        return self.factor.entry.reads

    def __call__(self, row: Mapping[str, Any], completion: str) -> float:
        """The score of a completion for a held-out row.

        Raises DataError if the row lacks the answer that is read, ObjectiveError if the score is no finite number.
        """
        name, where = self.factor.entry.name, f"{row['file']}:{row['row']}"
        given = {"row": row, "completion": completion, "prompt": row["prompt"], "answer": row["answer"]}
        if "answer" in self.reads and row["answer"] is None:
            raise DataError(f"{where}: no answer, which verifier '{name}' reads; map a column to it in data.adapter")
        score = self.factor.entry.function(*(given[key] for key in self.reads), **self.factor.settings)
        if not isinstance(score, (bool, int, float)) or not math.isfinite(score):
            raise ObjectiveError(f"verifier '{name}' ({where}): found {score!r}, expected a finite number or a bool")
        return float(score)


def build_verifier(spec: Any) -> Verifier:
    """A name, `path.py:function` or `{name: ..., **settings}`. Raises ObjectiveError for what breaks the contract."""
    bound = bind_factor(verifier, spec)
    if bound.entry.name == "regex":
        _check_pattern(str(bound.settings["pattern"]))
    return Verifier(bound)


def _check_pattern(pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ObjectiveError(f"verifier 'regex': pattern {pattern!r} does not compile: {error}") from None
