"""A small pretrained language model, rewarded by a property of its text that a program can check.

The logs are samples of the model itself with its exact log-probabilities. After training, success is measured by
sampling at several temperatures, with the KL divergence from the start: a gain that the start also has at a lower
temperature is sharpening.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

import rwft
from rwft.config import ModelConfig, resolve
from rwft.policy import Policy, load_policy, load_tokenizer

KINDS = ("girl", "boy", "dog", "cat", "bird", "bear", "rabbit", "mouse")
NAMES = ("Lily", "Tim", "Sue", "Max", "Mia", "Ben", "Anna", "Sam", "Amy", "Tom")
PROMPTS = tuple(f"Once upon a time, there was a {kind} named {name}" for kind in KINDS for name in NAMES)
TEMPERATURES = (1.0, 0.5, 0.0)
START_TEMPERATURES = (1.0, 0.7, 0.5, 0.0)
ONE_WORD = {
    "sft": "sft",
    "dft": "dft",
    "rwr": "rwr",
    "filtered_bc": "filtered_bc",
    "dft * filtered_bc": ["dft", "filtered_bc"],
    "iw_sft * filtered_bc": ["iw_sft", "filtered_bc"],
    "reinforce (GRPO)": "reinforce",
    "topr": "topr",
}
SPELLING = {name: ONE_WORD[name] for name in ("sft", "dft", "filtered_bc", "dft * filtered_bc")}
Reward = Callable[[str], bool]


@dataclass(frozen=True)
class Size:
    """How much is spent; the smoke form of the tests is smaller."""

    heldout: int = 16
    completions: int = 12
    tokens: int = 32
    steps: int = 60
    batch: int = 32
    samples: int = 12


@dataclass(frozen=True)
class Samples:
    """Completions `(n)` of prompts as token ids, up to and with the end token if there is one."""

    prompts: list[list[int]]
    completions: list[list[int]]


class Model:
    """A model in a folder: it samples, and says how probable a text is."""

    def __init__(self, path: Path) -> None:
        self.settings = ModelConfig(path=str(path))

    @cached_property
    def policy(self) -> Policy:
        return load_policy(self.settings, 0).eval()

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.settings)

    def prompt(self, text: str) -> list[int]:
        return self.tokenizer(text).input_ids

    def text(self, completion: Sequence[int]) -> str:
        return self.tokenizer.decode(completion, skip_special_tokens=True)

    def sample(self, prompts: Sequence[str], each: int, tokens: int, temperature: float, seed: int) -> Samples:
        """`each` completions of every prompt from the model's own distribution; temperature 0 is greedy."""
        asked = [ids for ids in map(self.prompt, prompts) for _ in range(each)]
        width, pad, end = max(map(len, asked)), self.tokenizer.pad_token_id or 0, self.tokenizer.eos_token_id
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in asked])
        attention = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in asked])
        how = {"do_sample": False}
        if temperature > 0:
            how = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        torch.manual_seed(seed)
        with torch.no_grad():
            out = self.policy.causal.generate(
                input_ids=ids, attention_mask=attention, max_new_tokens=tokens, pad_token_id=pad, **how
            )
        return Samples(asked, [upto(row, end) for row in out[:, width:].tolist()])

    def logp(self, samples: Samples) -> list[list[float]]:
        """Log-probability in nats of every completion token, at temperature 1."""
        rows = [p + c for p, c in zip(samples.prompts, samples.completions, strict=True)]
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        mask = torch.zeros(len(rows), width - 1)
        for index, (prompt, row) in enumerate(zip(samples.prompts, rows, strict=True)):
            mask[index, len(prompt) - 1 : len(row) - 1] = 1
        with torch.no_grad():
            found = self.policy(ids, mask)
        assert isinstance(found, dict)
        return [piece.tolist() for piece in found["logp"].split(mask.sum(1).long().tolist())]


def upto(row: list[int], end: int | None) -> list[int]:
    """A completion without what was padded behind its end token."""
    return row[: row.index(end) + 1] if end in row else row


def words(text: str) -> list[str]:
    """Words in small letters, but for one that the token limit may have cut off."""
    found = re.findall(r"[a-z']+", text.lower())
    return found if re.search(r"[^A-Za-z']$", text) else found[:-1]


def mentions(word: str) -> Reward:
    """The text has this word."""
    return lambda text: word in words(text)


def spelt(texts: Sequence[str], often: int = 3) -> Reward:
    """Every word occurs at least `often` times in `texts`: rare ones are mostly no words."""
    known = {word for word, count in Counter(w for t in texts for w in words(t)).items() if count >= often}
    return lambda text: set(words(text)) <= known


def split(size: Size) -> tuple[list[str], list[str]]:
    """Prompts to train on and others to measure with."""
    order = np.random.Generator(np.random.Philox(key=[0, 5])).permutation(len(PROMPTS))
    shuffled = [PROMPTS[i] for i in order]
    return shuffled[size.heldout :], shuffled[: size.heldout]


def log(model: Model, size: Size, seed: int) -> tuple[list[dict[str, Any]], float]:
    """Rows of the model's own samples, and the share left out since their text is tokenised otherwise."""
    prompts, _ = split(size)
    drawn = model.sample(prompts, size.completions, size.tokens, 1.0, seed)
    scores, rows = model.logp(drawn), {prompt: [] for prompt in prompts}
    end, lost = model.tokenizer.eos_token_id, 0
    for index, (ids, logp) in enumerate(zip(drawn.completions, scores, strict=True)):
        prompt, text = prompts[index // size.completions], model.text(ids)
        ended = ids[-1] == end
        plain = ids[:-1] if ended else ids
        if not text.strip() or model.prompt(prompt + text) != drawn.prompts[index] + plain:
            lost += 1
            continue
        rows[prompt].append((text, [min(x, 0.0) for x in logp], ids, ended))
    return [row(prompt, kept) for prompt, kept in rows.items() if kept], lost / len(scores)


def row(prompt: str, kept: list[Any]) -> dict[str, Any]:
    """One prompt with its completions, as a framework would log them."""
    texts, logps, ids, ended = (list(column) for column in zip(*kept, strict=True))
    return {"prompt": prompt, "completions": texts, "logprobs": logps, "token_ids": ids, "finish_reasons": ended}


def write(rows: Sequence[dict[str, Any]], reward: Reward, file: Path) -> float:
    """The rows with rewards 1 and -1; returns the share of successes."""
    scored = [{**r, "rewards": [1.0 if reward(text) else -1.0 for text in r["completions"]]} for r in rows]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{json.dumps(r)}\n" for r in scored), encoding="utf-8")
    return float(np.mean([value > 0 for r in scored for value in r["rewards"]]))


def train(path: Path, data: Path, objective: Any, seed: int, size: Size, output: Path) -> Path:
    """Train with an objective; the folder of the exported model."""
    adapter = {"name": "rollouts", "logprobs": "logprobs", "token_ids": "token_ids", "finish_reasons": "finish_reasons"}
    config = resolve(
        {
            "model": {"path": str(path)},
            "objective": objective,
            "data": {
                "path": str(data), "adapter": adapter, "max_length": 128, "eval_fraction": 0.0,
                "credit": {"baseline": "group_mean", "scale": "group_std"},
            },
            "train": {"steps": size.steps, "batch_size": size.batch, "lr": 1e-3, "seed": seed},
            "cache": str(output.parent / "cache"),
            "output": str(output),
        }
    )  # fmt: skip
    from rich.console import Console

    return rwft.train(config, console=Console(quiet=True)).model


def success(model: Model, reward: Reward, size: Size, temperature: float, seed: int) -> tuple[float, Samples]:
    """Share of held-out samples that the reward accepts; greedy once a prompt."""
    _, heldout = split(size)
    each = size.samples if temperature > 0 else 1
    drawn = model.sample(heldout, each, size.tokens, temperature, seed)
    return float(np.mean([reward(model.text(ids)) for ids in drawn.completions])), drawn


def behaviour(model: Model, start: Model, reward: Reward, size: Size, seed: int) -> dict[str, Any]:
    """Success at each temperature; KL(policy, start) in nats a completion, and entropy, from samples at 1."""
    found: dict[str, Any] = {}
    for temperature in START_TEMPERATURES if model is start else TEMPERATURES:
        found[f"{temperature:g}"], drawn = success(model, reward, size, temperature, 1000 + seed)
        if temperature == 1.0:
            own = np.array([sum(x) for x in model.logp(drawn)])
            first = np.array([sum(x) for x in start.logp(drawn)])
            found |= {"kl": float((own - first).mean()), "entropy": float(-own.mean())}
    return found


def measure(
    path: Path, word: str, seed: int, folder: Path, size: Size | None = None, only: Sequence[str] = ()
) -> dict[str, Any]:
    """Both rewards with one seed: logs, objectives, and what came of them."""
    size, start = size or Size(), Model(path)
    rows, lost = log(start, size, seed)
    rewards = {
        "word": (mentions(word), ONE_WORD),
        "spelling": (spelt([text for r in rows for text in r["completions"]]), SPELLING),
    }
    out: dict[str, Any] = {"seed": seed, "rows": sum(len(r["completions"]) for r in rows), "lost": lost, "rewards": {}}
    for name, (reward, objectives) in rewards.items():
        data = folder / f"{name}.jsonl"
        found = {"logs": write(rows, reward, data), "runs": {"start": behaviour(start, start, reward, size, seed)}}
        for place, (label, spec) in enumerate(objectives.items()):
            if not only or label in only:
                model = Model(train(path, data, spec, seed, size, folder / f"{name}-{place}"))
                found["runs"][label] = behaviour(model, start, reward, size, seed)
        out["rewards"][name] = found
    return out
