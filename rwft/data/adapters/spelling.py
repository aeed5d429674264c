"""Token ids that were logged -> the text that has these tokens, or none: rows are trained as text."""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Callable
from typing import Any

from rwft.data.chat import end_tokens
from rwft.data.example import Example, Source
from rwft.data.tokenize import Dropped as LeftOut
from rwft.data.tokenize import Tokenize
from rwft.errors import ConfigError, PolicyError
from rwft.settings import DataConfig


@functools.lru_cache(maxsize=2)
def tokenizer_of(name: str) -> Any:
    """The tokenizer that the ids were logged with: a folder, a name on the Hub, or `characters`."""
    from rwft.policy import load_tokenizer
    from rwft.settings import ModelConfig

    try:
        return load_tokenizer(ModelConfig(path=name))
    except PolicyError as error:
        raise ConfigError(f"tokenizer: found '{name}', expected a folder or Hub name of a model: {error}") from None


def spelt(tokenizer: Any, prompt: list[int], completion: list[int]) -> tuple[str, str] | None:
    """Prompt and completion as text, special tokens in it; None if the tokens of that text are others.

    A sample may hold ids that no text has (a word in unusual pieces, a character cut in half): whoever trains
    on its text trains on other tokens than were sampled.
    """
    sides = (_sides(tokenizer, prompt, completion, decode) for decode in (_decode, _decode_apart))
    return next((both for both in sides if both and _tokens(tokenizer, *both) == (prompt, completion)), None)


def difference(tokenizer: Any, prompt: list[int], completion: list[int]) -> str:
    """Where the ids part from the tokens of their text, in words: of ids that `spelt` has no text for."""
    both = _sides(tokenizer, prompt, completion, _decode_apart)
    if both is None:
        return "the completion begins in the middle of a character"
    logged, ours = prompt + completion, list(itertools.chain(*_tokens(tokenizer, *both)))
    if not ours:
        return "its text has no tokens with a boundary between prompt and completion"
    place = next((i for i, (a, b) in enumerate(zip(logged, ours, strict=False)) if a != b), min(len(logged), len(ours)))
    found, expected = (_named(tokenizer, ids[place:]) for ids in (logged, ours))
    return f"at token {place}, counted from 0, {found} was logged, and its text has {expected}"


def ended(tokenizer: Any, completion: list[int]) -> bool:
    """Whether the last token is one that ends a turn or the text."""
    return completion[-1] in end_tokens(tokenizer).values()


def _sides(
    tokenizer: Any, prompt: list[int], completion: list[int], decode: Callable[[Any, list[int]], str]
) -> tuple[str, str] | None:
    """Prompt and completion as text; None if the boundary lies within a character."""
    head, whole = decode(tokenizer, prompt), decode(tokenizer, prompt + completion)
    return (head, whole[len(head) :]) if whole.startswith(head) else None


def _tokens(tokenizer: Any, head: str, tail: str) -> tuple[list[int], list[int]]:
    """The ids of both as training has them; no ids where training would leave the row out."""
    made = _tokenize(tokenizer)(Example(head, tail, Source("", 0), finished=False))
    if isinstance(made, LeftOut):
        return [], []
    start = made.mask.index(1) + 1
    return made.ids[:start], made.ids[start:]


@functools.lru_cache(maxsize=2)
def _tokenize(tokenizer: Any) -> Tokenize:
    return Tokenize(tokenizer, DataConfig(path="", eos="never", max_length=sys.maxsize))


def _decode(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _decode_apart(tokenizer: Any, ids: list[int]) -> str:
    """What stands between special tokens, each stretch decoded alone.

    SentencePiece puts a space before each stretch that it encodes, and takes only the first away when it decodes all
    of them at once.
    """
    special = frozenset(tokenizer.all_special_ids)
    stretches = itertools.groupby(ids, lambda token: (token in special, token if token in special else None))
    return "".join(_decode(tokenizer, list(stretch)) for _, stretch in stretches)


def _named(tokenizer: Any, ids: list[int]) -> str:
    return f"{ids[0]} ({tokenizer.convert_ids_to_tokens(ids[0])})" if ids else "nothing"
