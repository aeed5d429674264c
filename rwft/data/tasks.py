"""Offline data that need no download: text to rewrite, logged by a behaviour policy that slips.

The behaviour policy writes the right answer letter by letter. It gets letter `c` right with
probability `skill ** hardness(c)`, where hardness rises from 0 for `a` to 2 for `z`, and else
writes one of the two neighbours of `c` in the alphabet; then it always stops. So the right
answer is the most likely one, a slip is plausible rather than noise, some prompts are harder
than others, and success rates and log-probabilities are known in closed form.

What this leaves out of real logs: systematic mistakes (where the likeliest answer is wrong),
answers of other lengths, and rewards between 0 and 1.
"""

from __future__ import annotations

import hashlib
import json
import math
import string
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray

from rwft.bounds import Bound, Count
from rwft.durable import write_atomic
from rwft.errors import ConfigError, DataError, did_you_mean
from rwft.registry import parse
from rwft.weighting import split_spec

LETTERS = string.ascii_lowercase
ARROW = ">"  # ends a prompt
FORMAT = 1  # changes when the same settings give other files

Seed = Annotated[int, Bound(low=0)]
Skill = Annotated[float, Bound(low=0.6, high=1.0)]  # below 0.58 the right answer would not be the likeliest


def caesar(text: str) -> str:
    """Each letter becomes the next one of the alphabet, z becomes a."""
    return "".join(neighbour(letter, 1) for letter in text)


def reverse(text: str) -> str:
    """The letters from last to first."""
    return text[::-1]


TASKS: Mapping[str, Callable[[str], str]] = {"caesar": caesar, "reverse": reverse}
"""What each task makes of the text in its prompt."""


def neighbour(letter: str, step: int) -> str:
    """The letter `step` places on in the alphabet, which is a circle."""
    return LETTERS[(LETTERS.index(letter) + step) % len(LETTERS)]


def answer(name: str, prompt: str) -> str:
    """The right completion of a prompt. Raises DataError for text that is no prompt of these tasks."""
    text, arrow, rest = prompt.rpartition(ARROW)
    if not arrow or rest or not text or not set(text) <= set(LETTERS):
        raise DataError(f"task '{name}': prompt {prompt!r}: expected small letters and then '{ARROW}'")
    return task(name)(text)


def task(name: str) -> Callable[[str], str]:
    """The rewriting called `name`."""
    if name not in TASKS:
        raise ConfigError(f"data.task: '{name}' is unknown; {did_you_mean(name, TASKS)}")
    return TASKS[name]


@dataclass(frozen=True)
class Behavior:
    """The policy that wrote the logs; `skill` is the chance that it gets a letter of mean hardness right."""

    skill: float

    def right(self, letter: str) -> float:
        """Probability that it writes `letter` where `letter` is right."""
        return self.skill ** (2 * LETTERS.index(letter) / (len(LETTERS) - 1))

    def logp(self, written: str, right: str) -> list[float]:
        """Log-probability in nats of each letter of `written`, then of the end; `-inf` for what it never writes."""
        return [self._letter_logp(w, r) for w, r in zip(written, right, strict=True)] + [0.0]

    def _letter_logp(self, written: str, right: str) -> float:
        p = self.right(right)
        if written == right:
            return math.log(p)
        slips = p < 1 and written in (neighbour(right, -1), neighbour(right, 1))
        return math.log((1 - p) / 2) if slips else -math.inf

    def success(self, right: str) -> float:
        """Probability that all of the answer is right."""
        return math.prod(map(self.right, right))

    def entropy(self, right: str) -> float:
        """Entropy of its answer in nats, which is also its expected negative log-likelihood."""
        return sum(map(self._letter_entropy, right))

    def _letter_entropy(self, letter: str) -> float:
        p = self.right(letter)
        return 0.0 if p == 1 else -p * math.log(p) - (1 - p) * math.log((1 - p) / 2)

    def write(self, right: str, rng: np.random.Generator) -> str:
        """One answer, sampled."""
        draws = rng.random(len(right))
        return "".join(self._letter(letter, float(draw)) for letter, draw in zip(right, draws, strict=True))

    def _letter(self, right: str, draw: float) -> str:
        p = self.right(right)
        return right if draw < p else neighbour(right, -1 if draw < p + (1 - p) / 2 else 1)


@dataclass(frozen=True)
class TaskFiles:
    """A task on disk, and what its behaviour policy does on the held-out prompts, in closed form."""

    train: Path
    heldout: Path
    success: float  # expected reward, in 0..1
    nll: float  # expected negative log-likelihood a token (the end counts as one), in nats


def write_task(
    name: str,
    folder: str | Path,
    *,
    rows: Count = 1000,
    heldout: Count = 256,
    completions: Count = 4,
    length: Count = 6,
    skill: Skill = 0.9,
    seed: Seed = 0,
) -> TaskFiles:
    """Write `train.jsonl` (`rows` prompts) and `heldout.jsonl` (`heldout` others), `completions` answers each.

    A row holds prompt, completions, rewards, logprobs (one a letter, and one for the end) and
    the right answer. The same arguments write the same bytes; no prompt occurs twice. Raises
    ConfigError for an unknown task or more prompts than half of what `length` letters can spell.
    """
    rewrite, behavior, folder = task(name), Behavior(skill), Path(folder)
    rng = np.random.Generator(np.random.Philox(key=[seed, FORMAT]))
    texts = _distinct_texts(rows + heldout, length, rng)
    folder.mkdir(parents=True, exist_ok=True)
    for file, part in (("train.jsonl", texts[:rows]), ("heldout.jsonl", texts[rows:])):
        lines = (json.dumps(row) for row in _log(part, rewrite, behavior, completions, rng))
        write_atomic(folder / file, "".join(f"{line}\n" for line in lines))
    answers = [rewrite(text) for text in texts[rows:]]
    success = float(np.mean([behavior.success(a) for a in answers]))
    nll = float(np.mean([behavior.entropy(a) for a in answers])) / (length + 1)
    return TaskFiles(folder / "train.jsonl", folder / "heldout.jsonl", success, nll)


def _distinct_texts(count: int, length: int, rng: np.random.Generator) -> list[str]:
    if count > len(LETTERS) ** length / 2:
        raise ConfigError(
            f"data.task: {count} prompts are more than half of the {len(LETTERS) ** length} of {length} letters; "
            "lower rows or heldout, or raise length"
        )
    texts: dict[str, None] = {}
    while len(texts) < count:
        texts.update(dict.fromkeys(_spell(row) for row in rng.integers(len(LETTERS), size=(count, length))))
    return list(texts)[:count]


def _spell(indices: NDArray[np.int64]) -> str:
    return "".join(LETTERS[i] for i in indices)


def _log(
    texts: Iterable[str], rewrite: Callable[[str], str], behavior: Behavior, completions: int, rng: np.random.Generator
) -> Iterator[dict[str, Any]]:
    """One row a text, as the behaviour policy answered it and the verifier scored it."""
    for text in texts:
        right = rewrite(text)
        written = [behavior.write(right, rng) for _ in range(completions)]
        yield {
            "prompt": text + ARROW,
            "completions": written,
            "rewards": [float(w == right) for w in written],
            "logprobs": [behavior.logp(w, right) for w in written],
            "answer": right,
        }


def task_files(spec: Any, folder: str | Path) -> tuple[Path, Path]:
    """Training and held-out file of `data.task`, a name or `{name: ..., rows: ...}`; written below `folder` once.

    Raises ObjectiveError for an unknown setting or a value out of bounds, ConfigError for an unknown task.
    """
    files = load_task(spec, folder)
    return files.train, files.heldout


def load_task(spec: Any, folder: str | Path) -> TaskFiles:
    """Like `task_files`, with what the behaviour policy does on the held-out prompts."""
    name, given = split_spec("data.task", spec)
    task(name)
    settings = parse(write_task, "task", {"name": "", "folder": ""}).bind(given, f"data.task '{name}'")
    key = hashlib.sha256(json.dumps([FORMAT, name, settings], sort_keys=True).encode()).hexdigest()[:16]
    place = Path(folder).expanduser() / f"{name}-{key}"
    note = place / "task.json"
    if not note.is_file():  # written last: the other files are whole
        files = write_task(name, place, **settings)
        facts = {"name": name, "settings": settings, "success": files.success, "nll": files.nll}
        write_atomic(note, json.dumps(facts, indent=2) + "\n")
    facts = json.loads(note.read_text(encoding="utf-8"))
    return TaskFiles(place / "train.jsonl", place / "heldout.jsonl", facts["success"], facts["nll"])
