"""Reasoning with a judgement on each step: spans of the completion, each with a reward of its own.

The reward of the whole completion is the sum of its steps' rewards, unless the row has a reward column.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

from rwft.data.adapters.contract import Dropped, Holds, Key, Number, Row, Text, Yield, adapter
from rwft.data.adapters.conversation import group_of
from rwft.data.adapters.values import boolean, column, items, key, number, optional, parallel, spoken, text, wrong
from rwft.data.example import Example, Source, Span
from rwft.errors import DataError

Texts = Annotated[str, Holds(("texts",))]
Labels = Annotated[str, Holds(("booleans", "numbers"))]
Mapped = Annotated[str, Holds(("mapping",))]
Marked = Annotated[str, Holds(("marked text",))]

UNRATED = "step without a rating"
Step = tuple[str, float | None]


@adapter
def steps(
    row: Row,
    source: Source,
    *,
    prompt: Text = "prompt",
    completions: Texts = "completions",
    labels: Labels = "labels",
    separator: str = "\n",
    good: float = 1.0,
    bad: float = 0.0,
    reward: Number | None = None,
    group: Key | None = None,
) -> Iterator[Yield]:
    """Steps and their labels in parallel lists. `separator` joins the steps; true is `good`, false `bad`."""
    texts = items(column(row, completions), completions)
    values = parallel(column(row, labels), labels, len(texts), completions)
    rewards = _labels(values, labels, good, bad)
    pairs = [(spoken(t, f"{completions}[{i}]"), r) for i, (t, r) in enumerate(zip(texts, rewards, strict=True))]
    total = optional(row, reward)
    given = None if total is None else number(total, str(reward))
    name = None if group is None else key(column(row, group), group)
    yield _example(text(column(row, prompt), prompt), pairs, separator, source, given, name)


@adapter
def math_shepherd(
    row: Row,
    source: Source,
    *,
    input: Marked = "input",
    label: Text = "label",
    marker: str = "ки",
    first_step: str = "Step 1:",
    good: float = 1.0,
    bad: float = 0.0,
) -> Iterator[Yield]:
    """Math-Shepherd: a marker ends each step of `input`; at its place `label` has + (`good`) or - (`bad`)."""
    segments = text(column(row, input), input).split(marker)
    signs = _signs(segments, text(column(row, label), label), label)
    if len(segments) < 2 or segments[-1].strip():
        raise DataError(f"{input}: found {len(segments) - 1} markers '{marker}', expected one at the end of each step")
    question, start, opening = segments[0].partition(first_step)
    if not start:
        raise DataError(
            f"{input}: found no '{first_step}' before the first marker, expected the answer to begin with it"
        )
    texts = [start + opening, *segments[1:-1]]
    rewards = [good if sign == "+" else bad for sign in signs]
    pairs = [(spoken(step, input).strip(), value) for step, value in zip(texts, rewards, strict=True)]
    yield _example(question.rstrip(" "), pairs, "\n", source)


@adapter
def prm800k(
    row: Row, source: Source, *, question: Mapped = "question", label: Mapped = "label", separator: str = "\n"
) -> Iterator[Yield]:
    """PRM800K as published: rewards 1, 0 and -1 as rated.

    The chosen steps are one completion; each alternative that was rated but not chosen is another, with the
    chosen steps before it, and is not finished. A step without a rating has no span if it was chosen (people
    wrote it), and makes no alternative.
    """
    prompt = text(column(row, f"{question}.problem"), f"{question}.problem")
    field = f"{label}.steps"
    path: list[Step] = []
    ended = True
    for i, step in enumerate(items(column(row, field), field)):
        options, chosen = _options(step, f"{field}[{i}]")
        for j, option in enumerate(options):
            if j != chosen and option[1] is None:
                yield Dropped(UNRATED)
            elif j != chosen:
                yield _example(prompt, [*path, option], separator, source, finished="# Answer" in option[0])
        ended = chosen is not None
        if chosen is None:
            break
        path.append(options[chosen])
    if path and ended:
        reason = optional(row, f"{label}.finish_reason")
        yield _example(prompt, path, separator, source, finished=reason in (None, "solution"))


def _labels(values: Sequence[Any], field: str, good: float, bad: float) -> list[float]:
    """All true or false, or all numbers."""
    if any(isinstance(value, bool) for value in values):
        return [good if boolean(v, f"{field}[{i}]", ", as in the others") else bad for i, v in enumerate(values)]
    return [number(value, f"{field}[{i}]") for i, value in enumerate(values)]


def _signs(segments: Sequence[str], label: str, field: str) -> list[str]:
    """The sign at each marker's place; the text between must be that of the input."""
    signs, at = [], 0
    for segment in segments[:-1]:
        end = at + len(segment)
        sign = label[end : end + 1]
        if label[at:end] != segment or sign not in ("+", "-"):
            there = label[at : end + 1][-40:]
            raise DataError(f"{field}: found {there!r}, expected the input's text with + or - at its marker")
        signs.append(sign)
        at = end + 1
    if label[at:].strip() != segments[-1].strip():
        raise DataError(f"{field}: found {label[at:][:40]!r} behind the last marker, expected the input's text")
    return signs


def _options(step: Any, field: str) -> tuple[list[Step], int | None]:
    """The options of one step of PRM800K, and the index of the one that the next step continues, if any."""
    if not isinstance(step, Mapping):
        raise wrong(step, field, "a mapping with `completions`")
    given = step.get("completions") or []
    options = [_option(item, f"{field}.completions[{i}]") for i, item in enumerate(given)]
    chosen = step.get("chosen_completion")
    if chosen is None and step.get("human_completion") is not None:
        return [*options, _option(step["human_completion"], f"{field}.human_completion")], len(options)
    whole = isinstance(chosen, int) and not isinstance(chosen, bool)
    if chosen is not None and not (whole and 0 <= chosen < len(options)):
        raise wrong(chosen, f"{field}.chosen_completion", f"an index below {len(options)}, or null")
    return options, chosen


def _option(item: Any, field: str) -> Step:
    if not isinstance(item, Mapping) or "text" not in item:
        raise wrong(item, field, "a mapping with `text` and `rating`")
    rating = item.get("rating")
    if rating is not None and number(rating, f"{field}.rating") not in (-1, 0, 1):
        raise wrong(rating, f"{field}.rating", "-1, 0, 1 or null")
    return spoken(item["text"], f"{field}.text"), None if rating is None else float(rating)


def _example(
    prompt: str,
    pairs: Sequence[Step],
    separator: str,
    source: Source,
    reward: float | None = None,
    group: str | None = None,
    finished: bool = True,
) -> Example:
    """One completion of joined steps. A span ends with its step's text; the separator belongs to none."""
    spans, at = [], 0
    for piece, value in pairs:
        if value is not None:
            spans.append(Span(at, at + len(piece), value))
        at += len(piece) + len(separator)
    total = number(sum(span.reward for span in spans), "reward") if reward is None else reward
    whole = separator.join(piece for piece, _ in pairs)
    return Example(
        prompt, whole, source, reward=total, group=group or group_of(prompt), finished=finished, spans=tuple(spans)
    )
