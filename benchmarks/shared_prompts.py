"""One copy of a prompt for its completions, against separate rows: python benchmarks/shared_prompts.py.

Forward and backward through a llama of 4 layers and hidden size 256, with the DFT loss over its completions, in
turns in one process; medians of CPU seconds. "counted" is what the cost model expects of the layers alone; where it
expects less than its margin, `data.share_prompts: auto` keeps the rows apart.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rwft.config import ModelConfig
from rwft.data.shared import cost_model, divide, lay_out
from rwft.policy import Policy, load_policy

SHAPES = [(192, 64, 8), (384, 128, 8), (768, 256, 8), (128, 128, 8), (128, 256, 8), (32, 256, 8), (256, 256, 2)]
"""(prompt, completion, completions of a prompt)"""
MODEL = {
    "model_type": "llama",
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
}


def cpu_seconds(run: Callable[[], None]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def line(policy: Policy, shape: tuple[int, int, int], repeats: int) -> str:
    prompt, completion, group = shape
    torch.manual_seed(0)
    head = torch.randint(4096, (1, prompt)).expand(group, prompt)
    ids = torch.cat([head, torch.randint(4096, (group, completion))], dim=1)
    mask = torch.zeros(group, prompt + completion - 1)
    mask[:, prompt - 1 :] = 1
    shared = lay_out(*divide(ids.tolist(), mask.tolist()))
    cost = cost_model(policy.causal)
    apart = cost.separate(group, prompt + completion - 1)
    together = cost.shared(1, prompt, group, completion - 1)

    def run(layout: object) -> None:
        weigh = lambda signals, _: signals["logp"].exp() / (group * completion)
        policy(ids, mask, weigh, layout=layout).loss.backward()
        policy.zero_grad(set_to_none=True)

    times: dict[str, list[float]] = {"apart": [], "shared": []}
    for turn in range(repeats + 1):
        for name, layout in (("apart", None), ("shared", shared)):
            seconds = cpu_seconds(lambda layout=layout: run(layout))
            if turn:  # the first turn touches memory for the first time
                times[name].append(seconds)
    one, other = (statistics.median(times[name]) for name in ("apart", "shared"))
    cells = [prompt, completion, group, f"{one:.2f}", f"{other:.2f}", f"{one / other:.2f}", f"{apart / together:.2f}"]
    return f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    policy = load_policy(ModelConfig(config=MODEL, tokenizer="characters"), seed=0)
    print("\n| prompt | completion | group | separate, CPU s | shared, CPU s | faster | counted |")
    print("|---|---|---|---|---|---|---|")
    for shape in SHAPES:
        print(line(policy, shape, given.repeats), flush=True)


if __name__ == "__main__":
    main()
