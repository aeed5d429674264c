"""The sampled head against the exact one, in whole trainings: python benchmarks/sampled.py [--write].

A llama of 2 layers learns a bigram language over its whole vocabulary: each token has 4 possible successors of
probabilities 0.55, 0.25, 0.15 and 0.05, so that the best NLL is known, and tokens come with the frequencies 1/rank of
text. Both heads see the same rows; NLL is that of each step's rows before the step. --write puts the table and the
figure into docs/.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.report import PAGE, ROOT, put
from rwft.config import ModelConfig
from rwft.head import Draws
from rwft.policy import Policy, load_policy

FIGURE = ROOT / "docs" / "figures" / "sampled.png"
CHANCES = (0.55, 0.25, 0.15, 0.05)
FLOOR = -sum(p * math.log(p) for p in CHANCES)
SEEDS, COUNTS = (0, 1, 2), (16, 64, 256, 1024)
NOISE = ((32000, 1), (32000, 16), (151936, 16))  # (vocabulary, rows)
HEADS = {"exact": None, "sampled, 256": 256, "sampled, 16": 16}
HIDDEN, LENGTH, LAST = 128, 64, 10  # LAST: steps whose NLL is averaged at the end


@dataclass(frozen=True)
class Language:
    """Successors of each token, `(v 4)`; the common ones are successors as often as they are tokens."""

    successors: Tensor
    common: Tensor  # (v): frequencies

    @classmethod
    def of(cls, v: int) -> Language:
        common = 1.0 / torch.arange(1, v + 1, dtype=torch.float64)
        generator = torch.Generator().manual_seed(v)
        drawn = torch.multinomial(common, v * len(CHANCES), replacement=True, generator=generator)
        return cls(drawn.view(v, len(CHANCES)), common)

    def rows(self, n: int, generator: torch.Generator) -> Tensor:
        """`(n LENGTH+1)`: token ids."""
        ids = [torch.multinomial(self.common, n, replacement=True, generator=generator)]
        for _ in range(LENGTH):
            which = torch.multinomial(torch.tensor(CHANCES), n, replacement=True, generator=generator)
            ids.append(self.successors[ids[-1], which])
        return torch.stack(ids, dim=1)


def policy_of(v: int, seed: int) -> Policy:
    llama = {
        "model_type": "llama",
        "vocab_size": v,
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": LENGTH,
    }
    return load_policy(ModelConfig(config=llama, tokenizer="characters", dtype="float32"), seed)


def backward(policy: Policy, ids: Tensor, draws: Draws | None) -> float:
    """The mean NLL's gradient, left in the parameters, and its value."""
    mask = torch.ones(ids.shape[0], LENGTH)
    result = policy(ids, mask, lambda s, _: torch.full_like(s["logp"], 1 / mask.numel()), sampled=draws)
    result.loss.backward()
    return float(result.loss.detach())


@dataclass(frozen=True)
class Curve:
    """NLL before each step, and CPU seconds since the start after it."""

    nll: list[float]
    seconds: list[float]

    @property
    def end(self) -> float:
        return statistics.mean(self.nll[-LAST:])


def curve(v: int, rows: int, steps: int, seed: int, count: int | None) -> Curve:
    policy, language = policy_of(v, seed), Language.of(v)
    data, draws = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(1000 + seed)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    out, spent = Curve([], []), 0.0
    for _ in range(steps):
        ids = language.rows(rows, data)
        start = time.process_time()
        out.nll.append(backward(policy, ids, None if count is None else Draws(draws, count)))
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        spent += time.process_time() - start
        out.seconds.append(spent)
    return out


def gradient(policy: Policy, ids: Tensor, draws: Draws | None) -> tuple[Tensor, float]:
    """All parameters' in a row, and the CPU seconds of forward and backward."""
    policy.zero_grad(set_to_none=True)
    start = time.process_time()
    backward(policy, ids, draws)
    spent = time.process_time() - start
    return torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None]), spent


def noise(v: int, rows: int) -> Iterator[str]:
    """Rows of a table: relative error of one step's gradient, before training, and time against the exact head."""
    policy, generator = policy_of(v, 0), torch.Generator().manual_seed(0)
    ids = Language.of(v).rows(rows, generator)
    exact, _ = gradient(policy, ids, None)
    base = statistics.median(gradient(policy, ids, None)[1] for _ in range(3))
    for count in COUNTS:
        found = [gradient(policy, ids, Draws(generator, count)) for _ in range(3)]
        error = statistics.mean(float((g - exact).norm() / exact.norm()) for g, _ in found)
        spent = statistics.median(seconds for _, seconds in found) / base
        yield f"| {v} | {rows * LENGTH} | {count} | {error:.3f} | {spent:.2f} |"


def summary(v: int, rows: int, curves: dict[str, list[Curve]]) -> Iterator[str]:
    exact = statistics.mean(c.seconds[-1] for c in curves["exact"])
    for name, found in curves.items():
        ends, spent = [c.end for c in found], statistics.mean(c.seconds[-1] for c in found)
        gaps = [c.end - e.end for c, e in zip(found, curves["exact"], strict=True)]
        each = " ".join(f"{gap:+.3f}" for gap in gaps)
        steps = len(found[0].nll)
        yield (
            f"| {v} | {rows * LENGTH} | {name} | {steps} | {statistics.mean(ends):.3f} | {each} "
            f"| {spent / steps:.3f} | {spent / exact:.2f} |"
        )


def draw(found: dict[int, dict[str, list[Curve]]]) -> None:
    """NLL against steps and against CPU seconds, a row for each vocabulary; a thin line for each seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, grid = plt.subplots(len(found), 2, figsize=(10, 3.4 * len(found)), squeeze=False, layout="constrained")
    for axes, (v, curves) in zip(grid, found.items(), strict=True):
        for color, (name, runs) in zip(("black", "tab:blue", "tab:orange"), curves.items(), strict=True):
            for number, run in enumerate(runs):
                options = {"color": color, "lw": 0.9, "alpha": 0.8, "label": name if number == 0 else None}
                axes[0].plot(range(len(run.nll)), run.nll, **options)
                axes[1].plot(run.seconds, run.nll, **options)
        for axis, label in zip(axes, ("optimiser step", "CPU seconds"), strict=True):
            axis.set(xlabel=label, ylabel="NLL per token", title=f"vocabulary {v:,}")
            axis.legend(frameon=False)
    figure.savefig(FIGURE, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", default="32000:16:60,151936:16:60", help="vocabulary:rows:steps, ...")
    parser.add_argument("--write", action="store_true", help="into docs/performance.md and docs/figures/sampled.png")
    options = parser.parse_args()
    torch.set_num_threads(1)
    shapes = [tuple(map(int, shape.split(":"))) for shape in options.shapes.split(",")]
    found = {
        v: {name: [curve(v, rows, steps, seed, count) for seed in SEEDS] for name, count in HEADS.items()}
        for v, rows, steps in shapes
    }
    lines = [
        f"Best possible NLL {FLOOR:.3f}. Seeds {', '.join(map(str, SEEDS))}; the gap is to the exact head's run:",
        "",
    ]
    lines += ["| vocabulary | tokens a step | head | steps | NLL at the end | gap by seed | CPU s a step | of exact |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    lines += [line for v, rows, _ in shapes for line in summary(v, rows, found[v])]
    lines += ["", "| vocabulary | tokens | draws | error of the gradient | forward and backward, of exact |"]
    lines += ["|---|---|---|---|---|", *(line for v, rows in NOISE for line in noise(v, rows))]
    text = "\n".join(lines)
    print(text)
    if options.write:
        draw(found)
        PAGE.write_text(put(PAGE.read_text(encoding="utf-8"), "sampled", f"\n{text}\n"), encoding="utf-8")


if __name__ == "__main__":
    main()
