"""What a policy does on held-out rows: the likelihood it gives them, and the reward of what it writes itself.

Sampling sees each prompt as the tokens before the first trained one, so it is rendered as in
training by construction. It draws from the policy's own distribution: sampling defaults that
come with a model (top-k, penalties, ...) do not apply. One process does it all.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rwft.config import Config, EvaluateConfig, ModelConfig, load_config
from rwft.data.rows import Rows
from rwft.errors import ConfigError, DataError
from rwft.ope import OffPolicy, off_policy, off_policy_figures
from rwft.policy import Policy, check_adapter
from rwft.run import stored_settings
from rwft.trust import stored_config
from rwft.verifiers import Verifier, build_verifier

Z95 = 1.959963984540054  # 97.5% quantile of the normal distribution
RESAMPLES = 2000
UNREAD = {"objective": "sft", "regularize": [], "compare": {}}  # of a run's settings: its files are not loaded
COLUMNS = ("prompt", "answer", "file", "row", "reward", "group")


@dataclass(frozen=True)
class Sampled:
    """Scores of sampled completions. `mean` is over prompts; `low` and `high` bound it with 95% confidence.

    `pass_at[k]`: chance that one of k samples succeeds, unbiased over the samples drawn; only
    for scores that are all 0 or 1. `unfinished`: share of samples that ran into max_new_tokens.
    """

    verifier: str
    prompts: int
    samples: int
    temperature: float
    seed: int
    mean: float
    low: float
    high: float
    unfinished: float
    pass_at: dict[int, float] = field(default_factory=dict)
    per_prompt: tuple[float, ...] = ()


@dataclass(frozen=True)
class Evaluation:
    """A policy on held-out rows: likelihood figures by name (see `rwft.held_out`), and samples if there is a verifier.

    `behavior` is the mean reward that the held-out rows were logged with; None if they have no rewards.
    """

    model: str
    rows: int
    held_out: dict[str, float]
    behavior: float | None = None
    sampled: Sampled | None = None
    off_policy: OffPolicy | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values for a JSON file."""
        return asdict(self)


def evaluate(config: Config, console: Any = None, adapter: Path | None = None) -> Evaluation:
    """The policy of `config.model` on the held-out rows of `config.data`, as `config.evaluate` says.

    `adapter` is a folder with LoRA weights that a run exported on top of that model. Raises
    ConfigError if nothing is held out, PolicyError if the model cannot be loaded.
    """
    from rwft.data.prepare import prepare
    from rwft.policy import load_policy, load_tokenizer
    from rwft.progress import Display
    from rwft.setup import start_accelerator

    verifier = None if config.evaluate.verifier is None else build_verifier(config.evaluate.verifier)
    with Display(console, main=True) as display:
        accelerator = start_accelerator(config)
        tokenizer = load_tokenizer(config.model)
        cache = Path(config.cache).expanduser()
        data = prepare(config.data, tokenizer, frozenset(), cache, display.ticker("reading rows"))
        if data.held_out is None:
            raise ConfigError("evaluate: no rows are held out; set data.eval_path, or data.eval_fraction above 0")
        policy = load_policy(config.model, config.train.seed, accelerator.device)
        if adapter is not None:
            policy = _with_adapter(policy, adapter, config.model.dtype)
        held_out = _likelihood(policy, tokenizer, data, accelerator)
        logged = off_policy(policy, tokenizer, config, accelerator, display) if config.evaluate.off_policy else None
        sampled, seed = None, config.train.seed
        if verifier is not None:
            tick = display.ticker("sampling")
            sampled = sample_reward(policy, tokenizer, data.held_out, config.evaluate, verifier, seed, tick)
    name = adapter or config.model.path or "random weights"
    reward = data.held_out.reward
    behavior = None if np.isnan(reward).any() else float(reward.mean())
    return Evaluation(str(name), len(data.held_out), held_out, behavior, sampled, logged)


def _with_adapter(policy: Policy, folder: Path, dtype: str) -> Policy:
    from peft import PeftModel

    check_adapter(folder)
    return Policy(PeftModel.from_pretrained(policy.model, str(folder)), dtype).to(policy.device)


def _likelihood(policy: Policy, tokenizer: Any, data: Any, accelerator: Any) -> dict[str, float]:
    from rwft.held_out import held_out_likelihood
    from rwft.setup import make_collate

    collate = make_collate(data, data.held_out, frozenset(), tokenizer, policy)
    reward = data.train.reward
    good_above = 0.0 if np.isnan(reward).any() else float(reward.mean())
    return held_out_likelihood(policy, collate, data.held_out, accelerator, good_above)


@dataclass(frozen=True)
class Prompt:
    """A held-out prompt: its tokens as in training, and what a verifier may read."""

    ids: tuple[int, ...]
    row: dict[str, Any]


def held_out_prompts(rows: Rows, limit: int | None = None) -> list[Prompt]:
    """Each distinct prompt once, in the order of the data, at most `limit`; its row is the first with it."""
    prompts: dict[tuple[int, ...], Prompt] = {}
    for start in range(0, len(rows), 1024):
        if limit is not None and len(prompts) >= limit:
            break
        columns = rows.take(np.arange(start, min(start + 1024, len(rows))))
        for index, (ids, mask) in enumerate(zip(columns["ids"], columns["mask"], strict=True)):
            key = tuple(ids[: mask.index(True) + 1])
            prompts.setdefault(key, Prompt(key, {name: columns[name][index] for name in COLUMNS}))
    return list(prompts.values())[:limit]


def sample_reward(
    policy: Policy,
    tokenizer: Any,
    rows: Rows,
    config: EvaluateConfig,
    verifier: Verifier,
    seed: int,
    tick: Callable[[int], None] = lambda _: None,
) -> Sampled:
    """Sample `config.samples` completions of each held-out prompt and score them.

    The same seed and batch size give the same samples; the caller's random state is left as it was.
    """
    prompts = held_out_prompts(rows, config.prompts)
    if not prompts:
        raise DataError("evaluate: there are no held-out prompts to sample from")
    asked = [prompt for prompt in prompts for _ in range(config.samples)]
    texts, finished = sample(policy, tokenizer, [prompt.ids for prompt in asked], config, seed, tick)
    scores = np.array([verifier(prompt.row, text) for prompt, text in zip(asked, texts, strict=True)])
    scores = scores.reshape(len(prompts), config.samples)
    per_prompt = scores.mean(axis=1)
    low, high = mean_interval(per_prompt, seed)
    return Sampled(
        verifier=str(verifier.factor),
        prompts=len(prompts),
        samples=config.samples,
        temperature=config.temperature,
        seed=seed,
        mean=float(per_prompt.mean()),
        low=low,
        high=high,
        unfinished=1.0 - float(np.mean(finished)),
        pass_at=pass_at(scores),
        per_prompt=tuple(map(float, per_prompt)),
    )


def sample(
    policy: Policy,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    config: EvaluateConfig,
    seed: int,
    tick: Callable[[int], None] = lambda _: None,
) -> tuple[list[str], list[bool]]:
    """One completion a prompt, as text without its end token, and whether it came to its end.

    Prompts are padded on the left, batched with others of like length. Raises ConfigError if
    prompt and completion may not fit the model's positions.
    """
    _check_room(policy, max(map(len, prompts)), config.max_new_tokens)
    stops, pad = stop_ids(policy, tokenizer), _pad_id(tokenizer)
    texts, finished = [""] * len(prompts), [False] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    with torch.no_grad(), _sampling(policy, config, stops, pad), _seeded(policy.device, seed):
        for start in range(0, len(order), config.batch_size):
            part = order[start : start + config.batch_size]
            ids, attention = left_pad([prompts[i] for i in part], pad)
            out = _generate(policy, ids, attention)
            for i, row in zip(part, out[:, ids.shape[1] :].tolist(), strict=True):
                end = next((j for j, token in enumerate(row) if token in stops), None)
                texts[i], finished[i] = tokenizer.decode(row[:end], skip_special_tokens=True), end is not None
            tick(len(part))
    return texts, finished


def left_pad(prompts: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """`(b t), (b t)`: ids padded on the left, and 1 where there is a token."""
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad, dtype=torch.int64)
    attention = torch.zeros_like(ids)
    for index, prompt in enumerate(prompts):
        ids[index, width - len(prompt) :] = torch.as_tensor(prompt)
        attention[index, width - len(prompt) :] = 1
    return ids, attention


def _generate(policy: Policy, ids: Tensor, attention: Tensor) -> Tensor:
    device = policy.device
    cast = torch.autocast(device.type, torch.bfloat16) if policy.autocast else nullcontext()
    with cast:
        return policy.causal.generate(input_ids=ids.to(device), attention_mask=attention.to(device))


def stop_ids(policy: Policy, tokenizer: Any) -> frozenset[int]:
    """Tokens that end a completion: the tokenizer's EOS, and special tokens that the model's own defaults end on."""
    own = policy.causal.generation_config.eos_token_id
    own = own if isinstance(own, list) else [own]
    special = set(tokenizer.all_special_ids)
    stops = {token for token in own if token in special}
    if tokenizer.eos_token_id is not None:
        stops.add(tokenizer.eos_token_id)
    return frozenset(stops)


def _pad_id(tokenizer: Any) -> int:
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (tokenizer.eos_token_id or 0)


def _check_room(policy: Policy, longest: int, new_tokens: int) -> None:
    room = getattr(policy.causal.config.get_text_config(), "max_position_embeddings", None)
    if room is not None and longest + new_tokens > room:
        raise ConfigError(
            f"evaluate.max_new_tokens: {new_tokens} after a prompt of {longest} tokens, but the model has {room} "
            f"positions; expected at most {room - longest}"
        )


@contextmanager
def _sampling(policy: Policy, config: EvaluateConfig, stops: frozenset[int], pad: int) -> Iterator[None]:
    """The model in evaluation mode with our settings alone: `generate` fills what is unset from the model's own."""
    from transformers import GenerationConfig

    settings: dict[str, Any] = {"pad_token_id": pad, "eos_token_id": sorted(stops) or None}
    settings["do_sample"] = config.temperature > 0
    if config.temperature > 0:
        settings |= {"temperature": config.temperature, "top_k": 0, "top_p": 1.0}
    causal, training = policy.causal, policy.training
    own = causal.generation_config
    policy.eval()
    causal.generation_config = GenerationConfig(max_new_tokens=config.max_new_tokens, **settings)
    try:
        yield
    finally:
        causal.generation_config = own
        policy.train(training)


@contextmanager
def _seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Random draws that depend on `seed` alone and leave the caller's generators as they were."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def mean_interval(values: NDArray[np.float64], seed: int) -> tuple[float, float]:
    """`(n) -> low, high`: 95% interval of the mean over prompts.

    Wilson's where every value is 0 or 1, since it stays honest at 0% and 100%; else the
    percentile bootstrap over prompts.
    """
    if np.isin(values, (0.0, 1.0)).all():
        return wilson(float(values.mean()), len(values))
    rng = np.random.Generator(np.random.Philox(key=[seed, 95]))
    means = [values[rng.integers(len(values), size=len(values))].mean() for _ in range(RESAMPLES)]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def wilson(share: float, n: int) -> tuple[float, float]:
    """Wilson's 95% score interval of a proportion (Wilson 1927)."""
    centre = (share + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 / (1 + Z95**2 / n) * math.sqrt(share * (1 - share) / n + Z95**2 / (4 * n**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def pass_at(scores: NDArray[np.float64]) -> dict[int, float]:
    """`(prompts samples) -> {k: ...}` for k = 1, 2, 4, ..., n: mean of 1 - C(n-c, k) / C(n, k) (Chen et al. 2021)."""
    n = scores.shape[1]
    if n == 1 or not np.isin(scores, (0.0, 1.0)).all():
        return {}
    right = scores.sum(axis=1).astype(int)
    sizes = sorted({2**i for i in range(n.bit_length()) if 2**i <= n} | {n})
    return {k: float(np.mean([1 - math.comb(n - c, k) / math.comb(n, k) for c in right])) for k in sizes}


def evaluate_command(run: str, overrides: Sequence[str], console: Any = None) -> Evaluation:
    """Evaluate a finished run (its folder) or the model of a config (a YAML file); print a table.

    A run's evaluation is also written to `evaluation.json` in its folder.
    """
    from rwft.checkpoint import write_atomic
    from rwft.progress import Display

    config, adapter, folder = evaluation_config(run, overrides)
    result = evaluate(config, console, adapter)
    if folder is not None:
        write_atomic(folder / "evaluation.json", json.dumps(result.to_json(), indent=2, allow_nan=False) + "\n")
    title = f"{result.model} on {result.rows} held-out rows"
    Display(console, main=True).table(title, ["figure", "value"], _figures(result))
    return result


def evaluation_config(run: str, overrides: Sequence[str] = ()) -> tuple[Config, Path | None, Path | None]:
    """The config to evaluate with; of a run also its adapter, if it exported one, and its folder.

    Raises ConfigError if `run` is neither a config nor a run that is finished.
    """
    path = Path(run).expanduser()
    if path.is_file():
        return load_config(path, overrides), None, None
    if not (path / "config.yaml").is_file():
        raise ConfigError(f"evaluate: '{run}' is neither a config file nor the folder of a run (it has no config.yaml)")
    if not (path / "model").is_dir():
        raise ConfigError(
            f"evaluate: {path} has no exported model, so the run is not finished; `rwft train` goes on with it"
        )
    config = stored_config({**stored_settings(path / "config.yaml"), **UNREAD}, overrides, str(path / "config.yaml"))
    model, adapter = exported(config, path / "model")
    return replace(config, model=model), adapter, path


def exported(config: Config, folder: Path) -> tuple[ModelConfig, Path | None]:
    """The model section for what a run of `config` exported, and the folder if that holds an adapter alone."""
    if (folder / "adapter_config.json").is_file():
        return replace(config.model, lora=None), folder
    return replace(config.model, path=str(folder), config=None, revision=None, tokenizer=None, lora=None), None


def _figures(result: Evaluation) -> list[tuple[str, Any]]:
    out: list[tuple[str, Any]] = list(result.held_out.items())
    if result.behavior is not None:
        out.append(("reward that the rows were logged with", result.behavior))
    if result.off_policy is not None:
        out += off_policy_figures(result.off_policy)
    if result.sampled is not None:
        s = result.sampled
        out.append((f"{s.verifier}, {s.prompts} prompts x {s.samples}", f"{s.mean:.4g}  [{s.low:.4g}, {s.high:.4g}]"))
        out += [(f"pass@{k}", value) for k, value in s.pass_at.items()]
        out.append(("ran into max_new_tokens", s.unfinished))
    return out
