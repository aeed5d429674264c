"""The one shape that every row takes before tokenisation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypedDict

from typing_extensions import NotRequired


class Message(TypedDict):
    """One turn of a conversation. `weight` scales an assistant turn's tokens (1 if absent; 0 leaves it untrained)."""

    role: str
    content: Any
    weight: NotRequired[float]
    tool_calls: NotRequired[Any]


@dataclass(frozen=True)
class Source:
    """Where a row came from. `row` is the line of a text file (from 1), or the row of a table (from 0).

    `column` (from 1) is where the row starts in its line, for the items of a JSON array.
    """

    file: str
    row: int
    column: int | None = None

    def __str__(self) -> str:
        return f"{self.file}:{self.row}" + ("" if self.column is None else f":{self.column}")


@dataclass(frozen=True)
class Span:
    """A stretch of the completion's text, in characters `[start, end)`, with a reward of its own."""

    start: int
    end: int
    reward: float


@dataclass(frozen=True)
class Example:
    """One prompt with one completion.

    `prompt` and `completion` are both text, or both lists of messages (in a completion only
    assistant turns are trained). `reward` is None where the data give none; so is `value`, what
    somebody expected the reward to be (a critic, a mean over other samples). Examples that
    share a `group` answer the same prompt. `behavior_logp` holds one log-probability per
    completion token; `completion_ids` the token ids that they were logged with, if known.
    `finished` is False if the completion was cut off: then it does not end in EOS. `spans`
    carry per-step rewards. `answer` is what a verifier may compare with.
    """

    prompt: str | list[Message]
    completion: str | list[Message]
    source: Source
    reward: float | None = None
    group: str | None = None
    behavior_logp: list[float] | None = None
    completion_ids: list[int] | None = None
    finished: bool = True
    spans: tuple[Span, ...] = field(default=())
    answer: str | None = None
    value: float | None = None
