"""Demonstrations: somebody showed how; the reward, if there is one, is a column of the row."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from rwft.data.adapters import conversation
from rwft.data.adapters.contract import Coerced, Content, Holds, Key, Label, Messages, Number, Row, Text, Yield, adapter
from rwft.data.adapters.conversation import Message, group_of, joined, system_first, turn_pairs
from rwft.data.adapters.values import column, items, key, number, optional, spoken, text, verdict, wrong
from rwft.data.example import Example, Source
from rwft.errors import DataError, did_you_mean

Turns = Annotated[str, Holds(("turns",))]
Pairs = Annotated[str, Holds(("lists",))]

SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "observation": "tool",
    "tool": "tool",
    "function_response": "tool",
    "function_call": "assistant",
}


@adapter
def prompt_completion(
    row: Row,
    source: Source,
    *,
    prompt: Content = "prompt",
    completion: Content = "completion",
    group: Key | None = None,
) -> Iterator[Yield]:
    """A prompt and the completion that was shown for it, each text or messages."""
    reply = conversation.answer(column(row, completion), completion)
    if isinstance(reply, str):
        spoken(reply, completion)
    question, reply = joined(conversation.content(column(row, prompt), prompt), reply)
    yield Example(question, reply, source, group=_group(row, group, question))


@adapter
def messages(
    row: Row,
    source: Source,
    *,
    messages: Messages = "messages",
    reward: Number | None = None,
    label: Label | None = None,
    good: float = 1.0,
    bad: float = 0.0,
    group: Key | None = None,
) -> Iterator[Yield]:
    """A conversation of role and content; the prompt ends where the assistant first speaks.

    A `weight` on an assistant message (or `loss`, `loss_scale`, `loss_weight`, `train`) scales its tokens. The whole
    may have a `reward`, or a `label` such as true or `up` for the reward `good`, false or `down` for `bad`.
    """
    turns = conversation.messages(column(row, messages), messages)
    if reward is not None and label is not None:
        raise DataError(
            f"adapter 'messages': found a reward ({reward}) and a label ({label}), expected one of them; "
            "write null for the other"
        )
    judged = _conversation(row, source, turns, messages, reward, group)
    yield from judged if label is None else (_labelled(item, row, label, (bad, good)) for item in judged)


def _labelled(item: Yield, row: Row, label: str, rewards: tuple[float, float]) -> Yield:
    if not isinstance(item, Example):
        return item
    return dataclasses.replace(item, reward=rewards[verdict(column(row, label), label)])


@adapter
def sharegpt(
    row: Row,
    source: Source,
    *,
    conversations: Turns = "conversations",
    system: Text | None = None,
    reward: Number | None = None,
    group: Key | None = None,
) -> Iterator[Yield]:
    """A conversation of `from` (human, gpt, system, observation, function_call) and `value`."""
    given = items(column(row, conversations), conversations)
    turns = [_turn(item, f"{conversations}[{i}]") for i, item in enumerate(given)]
    turns = system_first(optional(row, system), str(system), turns)
    yield from _conversation(row, source, turns, conversations, reward, group)


@adapter
def alpaca(
    row: Row,
    source: Source,
    *,
    instruction: Text = "instruction",
    output: Text = "output",
    input: Text | None = None,
    system: Text | None = None,
    history: Pairs | None = None,
    reward: Number | None = None,
    group: Key | None = None,
) -> Iterator[Yield]:
    """An instruction, its input on the next line, and the output; before them a system message and past turns."""
    request, extra = text(column(row, instruction), instruction), optional(row, input)
    if extra:
        request = f"{request}\n{text(extra, str(input))}"
    past = optional(row, history)
    before = turn_pairs(past, str(history)) if past else []
    prompt = system_first(optional(row, system), str(system), [*before, {"role": "user", "content": request}])
    reply: list[Message] = [{"role": "assistant", "content": spoken(column(row, output), output)}]
    yield Example(prompt, reply, source, reward=_reward(row, reward), group=_group(row, group, prompt))


def _conversation(
    row: Row, source: Source, turns: list[Message], field: str, reward: str | None, group: str | None
) -> Iterator[Yield]:
    prompt, reply = conversation.split(turns, field)
    if len(prompt) + len(reply) < len(turns):
        yield Coerced("messages after the last answer left out")
    yield Example(prompt, reply, source, reward=_reward(row, reward), group=_group(row, group, prompt))


def _turn(value: Any, field: str) -> Message:
    if not isinstance(value, Mapping) or "from" not in value or "value" not in value:
        hint = "; turns of `role` and `content` are read by `adapter: messages`" if _is_message(value) else ""
        raise wrong(value, field, f"a turn with `from` and `value`{hint}")
    speaker = text(value["from"], f"{field}.from")
    if speaker not in SPEAKERS:
        raise DataError(f"{field}.from: found {speaker!r}, expected a known speaker; {did_you_mean(speaker, SPEAKERS)}")
    said = text(value["value"], f"{field}.value")
    turn = {**value, "role": SPEAKERS[speaker], "content": said}
    if speaker == "function_call":
        turn |= {"content": None, "tool_calls": [_call(said, f"{field}.value")]}
    return conversation.message({k: v for k, v in turn.items() if k not in ("from", "value")}, field)


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and "role" in value


def _call(said: str, field: str) -> dict[str, Any]:
    try:
        call = json.loads(said)
    except (json.JSONDecodeError, RecursionError):
        call = None
    if not isinstance(call, dict) or "name" not in call:
        raise DataError(f"{field}: found {said[:40]!r}, expected a call as a JSON object with `name` and `arguments`")
    return {"type": "function", "function": call}


def _reward(row: Row, name: str | None) -> float | None:
    value = optional(row, name)
    return None if value is None else number(value, str(name))


def _group(row: Row, name: str | None, prompt: str | list[Message]) -> str:
    return group_of(prompt) if name is None else key(column(row, name), name)
