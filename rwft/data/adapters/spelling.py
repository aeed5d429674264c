"""Token ids that were logged -> the text that has these tokens, or none: rows are trained as text."""

from __future__ import annotations

import functools
from typing import Any

from rwft.data.chat import end_tokens
from rwft.errors import ConfigError, PolicyError


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
    head, whole = _decode(tokenizer, prompt), _decode(tokenizer, prompt + completion)
    tail = whole[len(head) :]
    if not whole.startswith(head) or _encode(tokenizer, head) != prompt:
        return None
    together = _encode(tokenizer, whole) == prompt + completion
    return (head, tail) if together or _encode(tokenizer, tail) == completion else None


def ended(tokenizer: Any, completion: list[int]) -> bool:
    """Whether the last token is one that ends a turn or the text."""
    return completion[-1] in end_tokens(tokenizer).values()


def _decode(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _encode(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False).input_ids
