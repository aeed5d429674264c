"""One copy of a prompt for its completions: the same gradients as separate rows, and used only where it pays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from rwft.config import LoraConfig, ModelConfig, to_yaml
from rwft.data.batching import Plan
from rwft.data.shared import FAMILIES, Shared, Sharing, cost_model, divide, lay_out, sharing
from rwft.errors import ConfigError, PolicyError
from rwft.loop import train
from rwft.policy import Policy, load_policy
from tests.test_distributed import SCRIPT, torchrun
from tests.tiny import tiny

ROOT = Path(__file__).resolve().parents[1]

SMALL = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "initializer_range": 0.4,  # so that attention and places matter
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OWN_NAMES = {
    "gpt2": {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "initializer_range": 0.4},
    "mistral": {**SMALL, "sliding_window": None},
}
COUNT = Sharing(position=10.0, pair=4.0)


def model(family: str = "llama", **settings: Any) -> Policy:
    config = {"model_type": family, **OWN_NAMES.get(family, SMALL)}
    return load_policy(ModelConfig(config=config, tokenizer="characters", dtype="float64", **settings), seed=1)


def rows() -> tuple[list[list[int]], list[list[int]]]:
    """Seven rows behind three prompts, one of one token; one trained token, a turn left out, an untrained end."""
    draw = np.random.default_rng(0)
    a, b, c = (draw.integers(3, 40, size).tolist() for size in (7, 4, 1))
    pairs = [(a, 3), (b, 5), (a, 6), (a, 1), (c, 2), (b, 4), (b, 3)]
    ids = [prompt + draw.integers(3, 40, size).tolist() for prompt, size in pairs]
    mask = [[0] * (p - 1) + [1] * (len(row) - p) for p, row in zip((7, 4, 7, 7, 1, 4, 4), ids, strict=True)]
    mask[2][8] = mask[2][9] = 0  # a turn in between that is not trained
    mask[5][-1] = 0
    return ids, mask


def padded(ids: list[list[int]], mask: list[list[int]]) -> tuple[Tensor, Tensor]:
    width = max(map(len, mask))
    return (
        torch.tensor([row + [0] * (width + 1 - len(row)) for row in ids]),
        torch.tensor([row + [0] * (width - len(row)) for row in mask], dtype=torch.float64),
    )


def keep_float64(patch: pytest.MonkeyPatch) -> None:
    """Norms and softmaxes of many models round to float32 inside; without that, gradients can be compared to 1e-10."""
    to, single, softmax = Tensor.to, Tensor.float, torch.nn.functional.softmax

    def keep(x: Tensor, *args: Any, **settings: Any) -> Tensor:
        return x if args == (torch.float32,) and x.dtype == torch.float64 else to(x, *args, **settings)

    patch.setattr(Tensor, "to", keep)
    patch.setattr(Tensor, "float", lambda x: x if x.dtype == torch.float64 else single(x))
    patch.setattr(torch.nn.functional, "softmax", lambda x, dim, dtype=None: softmax(x, dim=dim))


def loss_gradients(
    policy: Policy, shared: Shared | None, given: tuple[list[list[int]], list[list[int]]] | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    ids, mask = padded(*(given or rows()))
    coefficients = torch.linspace(-1, 2, int(mask.sum()), dtype=torch.float64)
    policy.zero_grad()
    result: Any = policy(ids, mask, lambda signals, where: coefficients[where], layout=shared)
    result.loss.backward()
    return result.logp, {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_gradients_are_those_of_separate_rows(family: str, attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    keep_float64(monkeypatch)
    policy = model(family, attention=attention).eval()
    assert sharing("always", [policy.causal]) is not None
    shared = lay_out(*divide(*rows()))
    logp, gradients = loss_gradients(policy, None)
    logp_shared, gradients_shared = loss_gradients(policy, shared)
    assert torch.allclose(logp, logp_shared, rtol=0, atol=1e-10)
    assert gradients.keys() == gradients_shared.keys()
    for name, gradient in gradients.items():
        gap = float((gradient - gradients_shared[name]).abs().max())
        assert gap < 1e-10 * max(1.0, float(gradient.abs().max())), name


@pytest.mark.parametrize("order", [[0, 2, 1, 5], [0, 1, 2, 5]])
def test_as_many_rows_behind_each_prompt_side_by_side_or_not(order: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    keep_float64(monkeypatch)
    ids, mask = rows()  # rows 0 and 2 have one prompt, 1 and 5 another
    given = [ids[i] for i in order], [mask[i] for i in order]
    shared = lay_out(*divide(*given))
    assert shared.each == (2 if order[1] == 2 else 0)
    assert shared.prompt.tolist() == ([0, 0, 1, 1] if order[1] == 2 else [0, 1, 0, 1])
    policy = model("llama").eval()
    (logp, gradients), (logp_shared, others) = (loss_gradients(policy, s, given) for s in (None, shared))
    assert torch.allclose(logp, logp_shared, rtol=0, atol=1e-10)
    assert all(torch.allclose(gradients[name], others[name], rtol=1e-10, atol=1e-10) for name in gradients)


def test_the_comparison_would_see_a_position_or_a_prompt_that_is_wrong() -> None:
    policy = model("llama").eval()
    shared = lay_out(*divide(*rows()))
    right, _ = loss_gradients(policy, shared)
    for wrong in (
        Shared(shared.trunk, shared.length + 1, shared.branches, shared.prompt, shared.trained, shared.padded),
        Shared(shared.trunk, shared.length, shared.branches, shared.prompt.flip(0), shared.trained, shared.padded),
        Shared(shared.trunk, shared.length, shared.branches, shared.prompt, shared.trained, padded=False),
    ):
        assert float((loss_gradients(policy, wrong)[0] - right).abs().max()) > 1e-3


def test_lora_shares_too() -> None:
    policy = model("llama", lora=LoraConfig(rank=2)).eval()
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    (logp, gradients), (logp_shared, shared) = (loss_gradients(policy, s) for s in (None, lay_out(*divide(*rows()))))
    assert torch.allclose(logp, logp_shared, rtol=0, atol=1e-6)  # norms round to float32
    assert all("lora_" in name for name in gradients)
    assert gradients.keys() == shared.keys()
    assert all(torch.allclose(gradients[name], shared[name], rtol=1e-4, atol=1e-5) for name in gradients)


def test_rows_are_divided_behind_the_input_that_predicts_the_first_trained_target() -> None:
    prompts, branches = divide([[5, 6, 7, 8, 9], [5, 6, 1, 2], [5, 6], [3, 4]], [[0, 1, 0, 1], [0, 1, 0], [0], [1]])
    assert prompts == [(5, 6), (3,)]  # target 1 is predicted from input 1; the third row trains nothing
    assert [(b.prompt, list(b.ids), b.mask.tolist()) for b in branches] == [
        (0, [7, 8], [True, False, True]),
        (0, [], [True]),
        (1, [], [True]),
    ]


def test_the_layout_by_hand() -> None:
    shared = lay_out(*divide([[5, 6, 7, 8, 9], [3, 4, 1], [5, 6, 2]], [[0, 1, 1, 1], [1, 1], [0, 1]]))
    assert shared.trunk.tolist() == [[5, 6], [3, 0]]
    assert shared.length.tolist() == [2, 1]
    assert shared.padded
    assert shared.branches.tolist() == [[7, 8], [4, 0], [0, 0]]
    assert shared.prompt.tolist() == [0, 1, 0]
    assert shared.trained.tolist() == [1, 4, 5, 2, 6, 1]  # trunk is 0..3, branches 4..9


def test_costs_by_hand() -> None:
    assert COUNT.separate(2, 5) == 2 * 5 * (10 + 0.5 * 5 * 4 * 1.5)
    assert COUNT.shared(1, 3, 2, 2) == 3 * (10 + 0.5 * 3 * 4 * 1.5) + 2 * 2 * (10 + 5 * 4 * 1.5)


def test_the_cost_of_a_model_counts_its_products() -> None:
    cost = cost_model(model("llama").causal)
    attention, mlp = 16 * 16 + 2 * 16 * 8 + 16 * 16, 3 * 16 * 32
    assert cost.position == 2 * (attention + mlp)  # the embedding is a look-up, norms are no products
    assert cost.pair == 2 * 2 * 16  # queries by keys, weights by values; two layers


def group(prompt: int, completion: int, size: int) -> tuple[list[list[int]], list[list[int]]]:
    ids = [[1] * prompt + [2 + k] * completion for k in range(size)]
    return ids, [[0] * (prompt - 1) + [1] * completion for _ in ids]


def test_auto_shares_where_it_pays_and_nowhere_else() -> None:
    assert COUNT(*group(30, 10, 8)) is not None
    assert COUNT(*group(2, 30, 2)) is None  # saves 2 of 62 inputs, less than the margin
    inputs = Sharing(position=1.0, pair=0.0)
    assert inputs(*group(10, 31, 2)) is None  # 80 inputs or 70: within the margin of 15 %
    assert inputs(*group(11, 30, 2)) is not None  # 80 or 69
    always = Sharing(position=10.0, pair=4.0, always=True)
    assert always(*group(2, 30, 2)) is not None
    different = [[k] * 30 + [1] * 3 for k in range(8)], [[0] * 29 + [1] * 3] * 8
    assert COUNT(*different) is None
    assert always(*different) is None


def test_a_row_that_trains_nothing_does_not_hide_that_no_prompt_is_shared() -> None:
    assert Sharing(1.0, 1.0, always=True)([[1, 2, 3], [1, 2]], [[0, 1], [0]]) is None


def test_never_is_never_and_always_refuses_what_was_not_proven() -> None:
    assert sharing("never", [model("llama").causal]) is None
    for mode in ("auto", "always"):
        made = sharing(mode, [model("llama").float().causal])
        assert made is not None
        assert made.always == (mode == "always")
    assert sharing("auto", [model("llama").causal]) is None  # float64 is for checking
    sliding = load_policy(
        ModelConfig(config={"model_type": "mistral", **SMALL, "sliding_window": 4}, tokenizer="characters"), seed=0
    )
    dynamic = model("llama")
    dynamic.causal.config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0}
    flash = model("llama")
    flash.causal.config._attn_implementation = "flash_attention_2"
    unproven = load_policy(ModelConfig(config={"model_type": "gemma2", **SMALL}, tokenizer="characters"), seed=0)
    checkpointed = model("llama", gradient_checkpointing=True)
    compiled = model("llama", compile=True)
    for refused, sentence in [
        (sliding, "slides over a window"),
        (dynamic, "scaled by the length of the batch .dynamic."),
        (flash, "attention 'flash_attention_2'"),
        (unproven, "model type 'gemma2'"),
        (checkpointed, r"model\.gradient_checkpointing"),
        (compiled, r"model\.compile"),
    ]:
        assert sharing("auto", [refused.float().causal]) is None
        assert sharing("auto", [model("llama").float().causal, refused.causal]) is None
        with pytest.raises(PolicyError, match=rf"data\.share_prompts: always, but .*{sentence}.*use auto or never"):
            sharing("always", [refused.causal])


def test_weights_that_are_spread_over_ranks_are_not_passed_through_twice() -> None:
    assert sharing("auto", [model("llama").float().causal], spread=True) is None
    with pytest.raises(PolicyError, match="weights are spread over ranks"):
        sharing("always", [model("llama").causal], spread=True)


@pytest.mark.distributed
def test_ranks_share_prompts_and_give_the_parameters_of_one_process(tmp_path: Path) -> None:
    ranks = f"""
import torch
to = torch.Tensor.to
torch.Tensor.to = lambda x, *a, **k: x if a == (torch.float32,) and x.dtype == torch.float64 else to(x, *a, **k)
{SCRIPT}"""
    more = ("train.batch_size=5", "train.accumulate=2", "train.steps=3")
    for name, mode in (("alone", "never"), ("ranks", "always")):
        batch = ("train.accumulate=4",) if mode == "never" else ()
        config = tiny(tmp_path, *more, *batch, f"data.share_prompts={mode}", name=name)
        (tmp_path / f"{name}.yaml").write_text(to_yaml(config))
    torchrun(1, tmp_path, ["alone"], ROOT, ranks)
    torchrun(2, tmp_path, ["ranks"], ROOT, ranks)
    one, two = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("alone", "ranks"))
    assert all(float((one[name] - two[name]).abs().max()) < 1e-9 for name in one)


@pytest.mark.parametrize("objective", ["sft", "iw_sft", ["dft", "filtered_bc"], "dpo"])
def test_training_gives_the_same_parameters(objective: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep_float64(monkeypatch)
    used: list[int] = []
    hidden = Shared.hidden
    monkeypatch.setattr(Shared, "hidden", lambda self, base: (used.append(len(self.prompt)), hidden(self, base))[1])
    finals = []
    for mode in ("never", "always"):
        config = tiny(
            tmp_path,
            f"data.share_prompts={mode}",
            "train.steps=3",
            f"cache={tmp_path}/{mode}",
            objective=objective,
            name=mode,
        )
        train(config)
        assert bool(used) == (mode == "always")
        finals.append(load_file(tmp_path / mode / "model" / "model.safetensors"))
    assert all(float((finals[0][name] - finals[1][name]).abs().max()) < 1e-9 for name in finals[0])


def plan(prompt: Any, batch_size: int, accumulate: int) -> Plan:
    length = np.random.default_rng(0).integers(1, 60, len(prompt))
    return Plan(length, batch_size=batch_size, accumulate=accumulate, world=1, seed=3, prompt=np.asarray(prompt))


def test_rows_of_one_prompt_stand_beside_each_other_in_the_same_steps() -> None:
    prompt = np.repeat(np.arange(16), 4)
    together = plan(prompt, 8, 8)  # one step holds all rows
    parts = together.micro_batches(0, 0)
    assert [len(part) for part in parts] == [8] * 8
    assert all(len(np.unique(prompt[part])) == 2 for part in parts)
    alone = Plan(together.length, batch_size=8, accumulate=2, world=1, seed=3)
    cut = plan(prompt, 8, 2)
    for step in range(4):
        assert sorted(np.concatenate(cut.micro_batches(step, 0))) == sorted(
            np.concatenate(alone.micro_batches(step, 0))
        )


def test_larger_groups_come_first_so_that_the_cut_does_not_split_them() -> None:
    prompt = [0, 1, 1, 2, 3, 3, 4, 5, 5, 6, 7, 7]
    parts = plan(prompt, 2, 6).micro_batches(0, 0)
    assert sorted(tuple(sorted(prompt[i] for i in part)) for part in parts[:4]) == [(1, 1), (3, 3), (5, 5), (7, 7)]


def test_without_shared_prompts_rows_come_longest_first() -> None:
    p = plan(np.arange(24), 4, 6)
    lengths = [int(p.length[i]) for part in p.micro_batches(0, 0) for i in part]
    assert lengths == sorted(lengths, reverse=True)


def test_order_groups_brings_every_completion_of_a_prompt_into_one_micro_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rwft import loop

    seen: list[list[int]] = []
    step = loop.optimiser_step

    def watch(training: Any, index: int, meter: Any) -> None:
        group = training.data.train.group
        for part in training.plan.micro_batches(index, 0):
            assert all((group[part] == g).sum() == (group == g).sum() for g in np.unique(group[part]))
            seen.append(part.tolist())
        step(training, index, meter)

    monkeypatch.setattr(loop, "optimiser_step", watch)
    config = tiny(tmp_path, "data.order=groups", "train.steps=null", "train.epochs=1", "train.batch_size=8")
    train(config)
    assert len(seen) > 1
    assert sorted(i for part in seen for i in part) == list(range(sum(map(len, seen))))
    with pytest.raises(
        ConfigError, match=r"train\.batch_size: 1 is smaller than the largest group.*data\.order: groups"
    ):
        train(tiny(tmp_path, "data.order=groups", "train.batch_size=1", name="too_small"))


def test_order_groups_leaves_out_rows_of_weight_zero() -> None:
    group, alive = np.repeat(np.arange(6), 3), np.arange(18) % 3 > 0
    p = Plan(np.full(18, 5), batch_size=6, accumulate=1, world=1, seed=0, group=group, alive=alive)
    forwarded = sorted(int(i) for s in range(p.steps_per_epoch) for part in p.micro_batches(s, 0) for i in part)
    assert forwarded == np.flatnonzero(alive).tolist()


def test_share_prompts_is_checked_with_its_choices(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.share_prompts: 'allways' is unknown; did you mean 'always'"):
        tiny(tmp_path, "data.share_prompts=allways")
    with pytest.raises(ConfigError, match=r"data\.order: 'group' is unknown; did you mean 'groups'"):
        tiny(tmp_path, "data.order=group")
    assert tiny(tmp_path).data.share_prompts == "auto"
