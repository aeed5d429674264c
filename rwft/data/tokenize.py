"""Examples -> token ids and what is trained of them: boundary, end-of-sequence and length rules in one place.

At inference the policy continues the tokens of the prompt alone, so a token that would cross
from prompt to completion never occurs there, and must not be trained. The prompt is therefore
always tokenised alone; the completion gets the tokens that it has behind the prompt when these
leave the prompt's intact, and else those that it has behind a neutral character. Either way
it carries no token that belongs to the start of a text, and both together spell the text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

from tokenizers import Encoding

from rwft.config import DataConfig
from rwft.data.chat import Chat, Piece, Spelling, end_tokens
from rwft.data.example import Example, Source
from rwft.errors import DataError, PolicyError

VERSION = "tokens-1"  # part of the fingerprint: changes when the same row would get other tokens
ANCHORS = ("\n", "a", ".", "1")  # neutral characters; one serves if it stays a token of its own before the piece

NO_CONTEXT = "empty prompt: the first token has no context"
NOTHING = "nothing to train on"
TOO_LONG = "longer than data.max_length"
ANSWER_TOO_LONG = "answer longer than data.max_length"
OTHER_IDS = "completion_ids are not this tokenizer's tokens of the completion"
NO_BOUNDARY = "no tokenisation with a boundary between prompt and completion"

TOKENISED_APART = "completion tokenised apart, since a token would have crossed into it"
PROMPT_CUT = "prompt cut on the left to data.max_length"
END_NOT_LOGGED = "end token not trained, since its behaviour log-probability was not logged"


@dataclass(frozen=True)
class Tokens:
    """One row in tokens: `ids (t+1)`, everything else per target position `(t)`; target j is `ids[j+1]`.

    `mask` is 1 where the target is trained. `weight` is None where all messages weigh 1, and 1
    under mask 0. `behavior_logp` is None unless it was asked for, and 0 under mask 0.
    `step_reward` pairs the target position of each span's last token with the span's reward.
    """

    ids: list[int]
    mask: list[int]
    weight: list[float] | None = None
    behavior_logp: list[float] | None = None
    step_reward: list[tuple[int, float]] | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Dropped:
    """A row that is left out, and why; reasons are few, so that they can be counted."""

    reason: str
    source: Source


class Answer(NamedTuple):
    """What follows the prompt: ids, the weight of each (None: not trained), and where each ends in the trained text.

    `ended` tells that the last one is an end token. `places` is None unless the row has spans.
    """

    ids: list[int]
    weights: list[float | None]
    places: list[int] | None
    ended: bool

    @property
    def trained(self) -> list[int]:
        """The ids that are trained, in order."""
        return [token for token, weight in zip(self.ids, self.weights, strict=True) if weight is not None]

    def without_end(self) -> Answer:
        """All but the end token."""
        return Answer(self.ids[:-1], self.weights[:-1], None if self.places is None else self.places[:-1], False)


class Part(NamedTuple):
    """The tokens of one piece: from `first` to `last` of an encoding whose text has `shift` characters before it."""

    encoding: Encoding
    first: int
    last: int
    shift: int

    @property
    def ids(self) -> list[int]:
        return self.encoding.ids[self.first : self.last]

    @property
    def places(self) -> list[int]:
        """Where each token ends, in characters of the piece."""
        return [end - self.shift for _, end in self.encoding.offsets[self.first : self.last]]


class Tokenize:
    """A pure function of (example, tokenizer, settings); picklable, so worker processes can have it.

    `needs_behavior`: rows must have behaviour log-probabilities, one per trained token.
    Raises PolicyError for a tokenizer that cannot tell where its tokens lie in the text.
    """

    def __init__(self, tokenizer: Any, config: DataConfig, needs_behavior: bool = False) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise PolicyError(
                f"model.tokenizer: found {type(tokenizer).__name__}, which cannot tell where its tokens lie in the "
                "text; expected a fast tokenizer (a folder with tokenizer.json)"
            )
        self.tokenizer, self.config, self.needs_behavior = tokenizer, config, needs_behavior
        self.chat = Chat(tokenizer)
        self.end_ids = frozenset(end_tokens(tokenizer).values())
        self.eos_id: int | None = tokenizer.eos_token_id
        self.opening = _opening(tokenizer)

    def __call__(self, example: Example) -> Tokens | Dropped:
        """The tokens of one example, or why it is left out. Raises DataError, naming the row, for one that is wrong."""
        return self.batch([example])[0]

    def batch(self, examples: Sequence[Example]) -> list[Tokens | Dropped]:
        """What a call for each example would give, faster. Raises DataError for the first that is wrong."""
        rows, problem = self._spelt(examples)
        texts = {text for row in rows for text in accumulate(piece.text for piece in row.pieces)}
        encodings = self._encode(texts)
        made = [self._row(example, row, encodings) for example, row in zip(examples, rows, strict=False)]
        if problem is not None:
            raise problem
        return made

    def prompt(self, example: Example) -> list[int]:
        """The ids that the policy continues, as in training but uncut."""
        if isinstance(example.prompt, str):
            return self._opened(self._encode({example.prompt})[example.prompt].ids)
        head = self.chat.head(example.prompt, example.source)
        return self._encode({head})[head].ids

    def stop_ids(self, example: Example) -> list[int]:
        """The ids that end a completion of this example's prompt: EOS, and the chat template's end of turn."""
        stops = [] if self.eos_id is None else [self.eos_id]
        if not isinstance(example.prompt, str):
            closing = self.chat.closing(example.prompt, example.source)
            stops += [] if closing is None else self._encode({closing})[closing].ids[:1]
        return sorted(set(stops))

    def fingerprint(self) -> str:
        """Hex digest of everything that the tokens of an example depend on."""
        return fingerprint(self.tokenizer, self.config, self.needs_behavior)

    def _spelt(self, examples: Sequence[Example]) -> tuple[list[Spelling], DataError | None]:
        """The spelling of all examples, or of those before the first that cannot be spelt, and why it cannot."""
        rows: list[Spelling] = []
        for example in examples:
            try:
                rows.append(self._spell(example))
            except DataError as error:
                return rows, error
        return rows, None

    def _spell(self, example: Example) -> Spelling:
        prompt, completion, eos = example.prompt, example.completion, self.config.eos == "auto"
        if isinstance(prompt, str) != isinstance(completion, str):
            raise DataError(f"{example.source}: found text with messages, expected prompt and completion of one kind")
        if isinstance(prompt, str) and isinstance(completion, str):
            return Spelling([Piece(prompt), Piece(completion, 1.0)], eos and example.finished)
        return self.chat.spell(example, eos) if prompt else Spelling([Piece("")], False)

    def _encode(self, texts: Iterable[str]) -> Mapping[str, Encoding]:
        distinct = list(texts)
        if not distinct:
            return {}
        out = self.tokenizer(
            distinct,
            add_special_tokens=False,
            padding=False,
            truncation=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        assert out.encodings is not None
        return dict(zip(distinct, out.encodings, strict=True))

    def _row(self, example: Example, row: Spelling, encodings: Mapping[str, Encoding]) -> Tokens | Dropped:
        """Every rule in its order; the first that leaves the row out gives the reason."""
        if not row.pieces:
            return Dropped(NOTHING, example.source)
        parts, notes = _together(row.pieces, encodings), []
        if parts is None:
            parts, notes = self._apart(row.pieces, encodings), [TOKENISED_APART]
        if parts is None:
            return Dropped(NO_BOUNDARY, example.source)
        prompt = self._opened(parts[0].ids) if isinstance(example.prompt, str) else parts[0].ids
        if not prompt:
            return Dropped(NO_CONTEXT, example.source)
        answer = self._answer(example, row, parts)
        if self.needs_behavior:
            logged = _as_logged(example, answer)
            if logged is None:
                return Dropped(OTHER_IDS, example.source)
            notes += [END_NOT_LOGGED] if logged is not answer else []
            answer = logged
        if not answer.trained:
            return Dropped(NOTHING, example.source)
        return self._fitted(example, prompt, answer, tuple(notes))

    def _apart(self, pieces: Sequence[Piece], encodings: Mapping[str, Encoding]) -> list[Part] | None:
        """Each piece behind the first as a continuation of what precedes it; None if the text cannot be spelt so."""
        first = encodings[pieces[0].text]
        parts = [Part(first, 0, len(first.ids), 0)]
        for piece in pieces[1:]:
            part = next((p for p in map(self._behind, ANCHORS, [piece.text] * len(ANCHORS)) if p is not None), None)
            if part is None:
                return None
            parts.append(part)
        spelt = self._decode([token for part in parts for token in part.ids])
        whole = encodings["".join(piece.text for piece in pieces)].ids
        return parts if spelt == self._decode(whole) else None

    def _behind(self, anchor: str, text: str) -> Part | None:
        """The tokens of `text` behind `anchor`, if the anchor's own stay as they are alone."""
        encodings = self._encode([anchor, anchor + text])
        before, both = encodings[anchor].ids, encodings[anchor + text]
        good = before and both.ids[: len(before)] == before
        return Part(both, len(before), len(both.ids), len(anchor)) if good else None

    def _decode(self, ids: list[int]) -> str:
        text = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    def _opened(self, prompt: list[int]) -> list[int]:
        """The prompt behind what the tokenizer opens every text with (BOS), once."""
        return prompt if self.opening and prompt[: len(self.opening)] == self.opening else self.opening + prompt

    def _answer(self, example: Example, row: Spelling, parts: list[Part]) -> Answer:
        """What follows the prompt, with EOS behind it where the answer is to end and does not yet."""
        ids = [token for part in parts[1:] for token in part.ids]
        weights = [piece.weight for piece, part in zip(row.pieces[1:], parts[1:], strict=True) for _ in part.ids]
        places = _places(example, row.pieces, parts) if example.spans else None
        answer = Answer(ids, weights, places, bool(ids) and ids[-1] in self.end_ids)
        if answer.ended or not row.close:
            return answer
        outside = None if places is None else [*places, -1]
        return Answer([*ids, self._eos(example)], [*weights, row.pieces[-1].weight], outside, True)

    def _eos(self, example: Example) -> int:
        if self.eos_id is None:
            raise DataError(
                f"{example.source}: the completion is finished, but the tokenizer has no end-of-sequence token; "
                "give it one (eos_token), or set data.eos: never"
            )
        return self.eos_id

    def _fitted(self, example: Example, prompt: list[int], answer: Answer, notes: tuple[str, ...]) -> Tokens | Dropped:
        """The row within data.max_length, or what becomes of it beyond."""
        length, limit = len(prompt) + len(answer.ids), self.config.max_length
        if length <= limit:
            return _tokens(example, prompt, answer, self.needs_behavior, notes)
        if self.config.overlong == "raise":
            raise DataError(f"{example.source}: found {length} tokens, expected at most data.max_length = {limit}")
        if self.config.overlong == "drop":
            return Dropped(TOO_LONG, example.source)
        opening = self.opening if prompt[: len(self.opening)] == self.opening else []
        opening = opening or [token for token in prompt[:1] if token == self.tokenizer.bos_token_id]
        room = limit - len(opening) - len(answer.ids)
        if room < 1:
            return Dropped(ANSWER_TOO_LONG, example.source)
        return _tokens(example, opening + prompt[-room:], answer, self.needs_behavior, (*notes, PROMPT_CUT))


def _together(pieces: Sequence[Piece], encodings: Mapping[str, Encoding]) -> list[Part] | None:
    """The pieces' tokens within the whole text, if every beginning of it is tokenised the same alone; else None."""
    texts = list(accumulate(piece.text for piece in pieces))
    whole, parts, start, shift = encodings[texts[-1]], [], 0, 0
    for text in texts:
        alone = encodings[text].ids
        if whole.ids[: len(alone)] != alone:
            return None
        parts.append(Part(whole, start, len(alone), shift))
        start, shift = len(alone), len(text)
    return parts


def _as_logged(example: Example, answer: Answer) -> Answer | None:
    """The answer with as many trained tokens as were logged; None if the logged ids are others."""
    logged, ours = example.behavior_logp, answer.trained
    if logged is None:
        raise DataError(
            f"{example.source}: no log-probabilities of the behaviour policy (behavior_logp), which the objective, "
            "train.watch or evaluate.off_policy reads; give one per completion token, or choose an objective that "
            "does without (rwft objectives lists what each reads)"
        )
    shorter = ours[:-1] if answer.ended else ours
    if example.completion_ids is not None and example.completion_ids not in (ours, shorter):
        return None
    if len(logged) == len(ours):
        return answer
    if answer.ended and len(logged) == len(shorter):
        return answer.without_end()
    without = (
        f", or {len(shorter)} without the end token" if answer.ended else "; it was cut off, so without an end token"
    )
    raise DataError(
        f"{example.source}: behaviour log-probabilities: found {len(logged)}, expected one per token of the "
        f"completion: {len(ours)}{without}"
    )


def _tokens(
    example: Example, prompt: list[int], answer: Answer, needs_behavior: bool, notes: tuple[str, ...]
) -> Tokens:
    before = len(prompt) - 1  # target positions of the prompt
    mask = [0] * before + [int(weight is not None) for weight in answer.weights]
    weights = [1.0] * before + [1.0 if weight is None else weight for weight in answer.weights]
    logged = iter(example.behavior_logp or ()) if needs_behavior else None
    return Tokens(
        ids=prompt + answer.ids,
        mask=mask,
        weight=None if set(answer.weights) <= {None, 1.0} else weights,
        behavior_logp=None if logged is None else [next(logged) if trained else 0.0 for trained in mask],
        step_reward=_step_rewards(example, before, answer) if example.spans else None,
        notes=notes,
    )


def _places(example: Example, pieces: list[Piece], parts: list[Part]) -> list[int]:
    """Where each answer token ends in the completion's text, which the spans count in; -1 outside of it."""
    start = 0
    if not isinstance(example.completion, str):
        content = example.completion[0].get("content") if len(example.completion) == 1 else None
        start = pieces[-1].text.find(content) if isinstance(content, str) else -1
        if start < 0:
            raise DataError(f"{example.source}: steps: expected one message, written by the chat template as it is")
    untrained = [-1 for part in parts[1:-1] for _ in part.ids]
    return untrained + [place - start for place in parts[-1].places]


def _step_rewards(example: Example, before: int, answer: Answer) -> list[tuple[int, float]]:
    """A token belongs to the span that its last character lies in; a span's reward comes with its last token."""
    assert answer.places is not None
    text = example.completion if isinstance(example.completion, str) else str(example.completion[0]["content"])
    out, reached = [], 0
    for number, span in enumerate(example.spans):
        if not reached <= span.start < span.end <= len(text):
            raise DataError(
                f"{example.source}: step {number}: found characters [{span.start}, {span.end}), expected a stretch "
                f"of the completion's {len(text)} behind character {reached}"
            )
        inside = [k for k, place in enumerate(answer.places) if span.start < place <= span.end]
        if not inside:
            raise DataError(f"{example.source}: step {number}: no token ends in characters [{span.start}, {span.end})")
        out.append((before + inside[-1], span.reward))
        reached = span.end
    return out


def _opening(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before every text; whatever it puts behind is not for prompts."""
    bare = tokenizer("a", add_special_tokens=False).input_ids
    full = tokenizer("a").input_ids
    start = next(i for i in range(len(full) - len(bare) + 1) if full[i : i + len(bare)] == bare)
    return full[:start]


def fingerprint(tokenizer: Any, config: DataConfig, needs_behavior: bool = False) -> str:
    """Hex digest of what tokens depend on: the tokenizer's rules and template, settings, and this code's version."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend.update(truncation=None, padding=None)  # state of the last call, not of the tokenizer
    settings = [config.max_length, config.overlong, config.eos, needs_behavior]
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    content = [VERSION, backend, tokenizer.chat_template, special, settings]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
