"""Rows end to end in one sequence: the states and gradients of separate rows, which cannot see each other.

Flash attention needs an accelerator. Here a few lines of float64 stand for its two kernels, behind all of
transformers' own code that decides which of them is called, and with what.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import transformers.masking_utils as masks
import transformers.modeling_flash_attention_utils as flash
from torch import Tensor

from rwft.config import LoraConfig, ModelConfig, to_yaml
from rwft.data import batching
from rwft.data.batching import Collate, Plan, pass_tokens
from rwft.data.logprobs import length_batches
from rwft.data.packing import MASKED, MODELS, VARIABLE, Packed, end_to_end, packing, tried_packing
from rwft.data.shared import Shared, Sharing
from rwft.errors import ConfigError, PolicyError
from rwft.footprint import Outline
from rwft.invariance import rehearsal
from rwft.loop import train
from rwft.plan import largest, packs, planned
from rwft.policy import Policy, load_policy
from rwft.progress import Display
from rwft.weighting import build_objective
from tests.test_distributed import SCRIPT, SHARDED, largest_difference, torchrun
from tests.test_shared_prompts import SMALL, keep_float64, model
from tests.tiny import tiny

KERNELS = [*MASKED, "flash_attention_2", "flash_attention_3"]
WINDOW = {"sliding_window": 3, "use_sliding_window": True, "max_window_layers": 1, "no_rope_layers": [0, 1]}
BY_LAYER = {"sliding_window": 3, "layer_types": ["full_attention", "sliding_attention"], "head_dim": 8}
SLIDING = {
    **dict.fromkeys(["mistral", "phi3", "qwen2", "qwen3", "smollm3", "starcoder2"], WINDOW),
    **dict.fromkeys(["cohere2", "exaone4", "gemma3_text", "olmo3"], BY_LAYER),
}


class Call(NamedTuple):
    """One call of the kernel for rows of variable length."""

    starts: list[int]
    longest: int


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int) -> Tensor:
    """`(q h d), (k g d), (k g d) -> (q h d)`: causal attention of one row, written out."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    back = torch.arange(len(q))[:, None] - torch.arange(len(k))[None]
    seen = (back >= 0) & ((back <= window) if window >= 0 else True)
    return torch.einsum("hqk,khd->qhd", torch.exp(scores.masked_fill(~seen, -torch.inf).log_softmax(-1)), v)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """Puts the stand-ins in the place of flash attention; what the one for variable lengths was called with."""
    seen: list[Call] = []

    def batched(
        q: Any, k: Any, v: Any, dropout_p: float = 0.0, softmax_scale: Any = None, causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
    ) -> Tensor:  # fmt: skip
        assert causal
        assert dropout_p == 0
        return torch.stack([attend(*row, softmax_scale, window_size[0]) for row in zip(q, k, v, strict=True)])

    def variable(
        q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlen_q: Any, max_seqlen_k: Any,
        dropout_p: float = 0.0, softmax_scale: Any = None, causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
    ) -> Tensor:  # fmt: skip
        assert causal
        assert dropout_p == 0
        assert cu_seqlens_q.dtype == torch.int32
        assert torch.equal(cu_seqlens_q, cu_seqlens_k)
        assert int(max_seqlen_q) == int(max_seqlen_k)
        starts = cu_seqlens_q.tolist()
        seen.append(Call(starts, int(max_seqlen_q)))
        rows = [slice(*cut) for cut in pairwise(starts)]
        return torch.cat([attend(q[row], k[row], v[row], softmax_scale, window_size[0]) for row in rows])

    functions = (batched, variable, *([None] * (3 if hasattr(flash, "_flash_with_kvcache_fn") else 2)))
    monkeypatch.setattr(flash, "_lazy_imports", lambda *_, **__: functions)
    monkeypatch.setattr(flash, "_loaded_implementation", None)
    return seen


def under(policy: Policy, kernel: str) -> Policy:
    policy.causal.config._attn_implementation = kernel
    return policy


def rows() -> tuple[list[list[int]], list[list[int]]]:
    """Unequal lengths; a turn left out, an untrained end, nothing trained, everything trained, a single input."""
    draw = np.random.default_rng(0)
    mask = [[0, 0, 1, 1, 0, 1, 1, 0, 0], [0, 1, 1], [0] * 5, [1] * 12, [1], [0, 0, 0, 0, 0, 1], [1, 0, 0, 1]]
    return [draw.integers(3, 40, len(row) + 1).tolist() for row in mask], mask


def padded(ids: list[list[int]], mask: list[list[int]]) -> tuple[Tensor, Tensor]:
    width = max(map(len, mask))
    return (
        torch.tensor([row + [0] * (width + 1 - len(row)) for row in ids]),
        torch.tensor([row + [0] * (width - len(row)) for row in mask], dtype=torch.float64),
    )


def coefficients(mask: list[list[int]]) -> Tensor:
    return torch.linspace(-1, 2, sum(map(sum, mask)), dtype=torch.float64)


def taken(policy: Policy) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


def packed_gradients(policy: Policy, ids: list[list[int]], mask: list[list[int]]) -> tuple[Tensor, dict[str, Tensor]]:
    packed, w = end_to_end(ids, mask), coefficients(mask)
    assert packed is not None
    policy.zero_grad()
    result: Any = policy(*padded(ids, mask), lambda signals, where: w[where], layout=packed)
    result.loss.backward()
    return result.logp, taken(policy)


def separate_gradients(policy: Policy, ids: list[list[int]], mask: list[list[int]]) -> tuple[Tensor, dict[str, Tensor]]:
    """Each row alone through the whole model, all logits at once, autograd alone."""
    policy.zero_grad()
    parts = []
    for tokens, wanted in zip(ids, mask, strict=True):
        logits = policy.causal(input_ids=torch.tensor([tokens[:-1]]), use_cache=False).logits[0]
        logp = logits.log_softmax(-1).gather(-1, torch.tensor(tokens[1:])[:, None])[:, 0]
        parts.append(logp[torch.tensor(wanted) > 0])
    logp = torch.cat(parts)
    (-(coefficients(mask) * logp).sum()).backward()
    return logp.detach(), taken(policy)


def assert_close(one: tuple[Tensor, dict[str, Tensor]], other: tuple[Tensor, dict[str, Tensor]]) -> None:
    assert torch.allclose(one[0], other[0], rtol=0, atol=1e-10)
    assert one[1].keys() == other[1].keys()
    for name, gradient in other[1].items():
        gap = float((gradient - one[1][name]).abs().max())
        assert gap < 1e-10 * max(1.0, float(gradient.abs().max())), name


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("family", sorted(MODELS))
def test_gradients_are_those_of_separate_rows(
    family: str, kernel: str, calls: list[Call], monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_float64(monkeypatch)
    policy = model(family).eval()
    expected = separate_gradients(under(policy, "eager"), *rows())
    found = packed_gradients(under(policy, kernel), *rows())
    assert_close(found, expected)
    inputs = [7, 3, 12, 1, 6, 4]
    starts = [0, *np.cumsum(inputs).tolist()]
    assert calls == ([Call(starts, 12)] * 2 if kernel in VARIABLE else [])  # two layers
    assert packing("always", [policy.causal])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("family", SLIDING)
def test_a_window_slides_within_a_row(
    family: str, kernel: str, calls: list[Call], monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_float64(monkeypatch)
    config = {"model_type": family, **SMALL, **SLIDING[family]}
    policy = load_policy(ModelConfig(config=config, tokenizer="characters", dtype="float64"), seed=1).eval()
    expected = separate_gradients(under(policy, "eager"), *rows())
    policy.causal.config.sliding_window = 2
    assert float((separate_gradients(policy, *rows())[0] - expected[0]).abs().max()) > 1e-3  # there is a window
    policy.causal.config.sliding_window = 3
    assert_close(packed_gradients(under(policy, kernel), *rows()), expected)
    assert packing("always", [policy.causal])


@pytest.mark.parametrize("which", [[3], [4], [1, 1, 1], [5, 6]])
def test_single_rows_equal_rows_and_few(which: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    keep_float64(monkeypatch)
    ids, mask = rows()
    given = [ids[i] for i in which], [mask[i] for i in which]
    policy = model("llama").eval()
    assert_close(packed_gradients(policy, *given), separate_gradients(policy, *given))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("family", sorted(MODELS))
def test_no_row_reaches_into_another(family: str, kernel: str, calls: list[Call]) -> None:
    """The states of a row do not move with another row's tokens, in any bit, and have no gradient there."""
    ids, mask = rows()
    policy, packed = under(model(family).eval(), kernel), end_to_end(ids, mask)
    assert packed is not None
    middle = slice(10, 22)  # where the row of twelve inputs lies
    inside = (packed.trained >= middle.start) & (packed.trained < middle.stop)
    embedded: list[Tensor] = []
    tables = policy.causal.get_input_embeddings()
    handle = tables.register_forward_hook(lambda _, __, out: embedded.append(out.requires_grad_()) or out)
    states = packed.hidden(policy.causal.base_model)
    handle.remove()
    for chosen, own in ((states[inside], True), (states[~inside], False)):
        seen = torch.autograd.grad(chosen.square().sum(), embedded[0], retain_graph=True)[0][0].abs().sum(-1) > 0
        assert seen[middle].all() == own
        assert seen[:10].any() == seen[22:].any() == (not own)
    other = packed.ids.clone()
    other[:, middle] = (other[:, middle] + 5) % 37 + 3
    changed = Packed(other, packed.places, packed.starts, packed.trained, packed.longest)
    again = changed.hidden(policy.causal.base_model)
    assert torch.equal(states[~inside], again[~inside])
    assert not torch.isclose(states, again)[inside].all(dim=-1).any()


@pytest.mark.parametrize("family", sorted(MODELS))
def test_a_rows_gradient_does_not_move_with_another_row(family: str) -> None:
    policy = model(family).eval()
    found = []
    for tokens in ([7, 8, 9, 10, 11], [30, 31, 32, 33, 34]):
        ids, mask = [tokens, [4, 5, 6, 7]], [[1, 1, 1, 1], [1, 1, 1]]
        packed = end_to_end(ids, mask)
        assert packed is not None
        policy.zero_grad()
        packed.hidden(policy.causal.base_model)[4:].square().sum().backward()
        found.append(taken(policy))
    assert all(torch.allclose(found[0][name], found[1][name], rtol=0, atol=1e-12) for name in found[0])


def test_the_naive_calls_let_rows_see_each_other() -> None:
    """With a cache, which is transformers' default, with a mask of ones, or with places that go on."""
    ids, mask = rows()
    policy, packed = model("llama").eval(), end_to_end(ids, mask)
    assert packed is not None
    trunk, places = policy.causal.base_model, packed.places
    right = packed.hidden(trunk)
    naive: list[dict[str, Any]] = [
        {"position_ids": places},
        {"position_ids": places, "use_cache": False, "attention_mask": torch.ones_like(places)},
        {"position_ids": torch.arange(places.shape[1])[None], "use_cache": False},
        {"use_cache": False},
    ]
    for settings in naive:
        wrong = trunk(input_ids=packed.ids, **settings).last_hidden_state[0, packed.trained]
        assert float((wrong - right).detach().abs().max()) > 0.1, settings
    kept = trunk(input_ids=packed.ids, position_ids=places, use_cache=False).last_hidden_state[0, packed.trained]
    assert torch.equal(kept, right)


def test_rows_are_cut_behind_the_last_trained_target() -> None:
    packed = end_to_end([[5, 6, 7, 8], [3, 4], [1, 2, 9], [9, 9]], [[0, 1, 0], [0], [1, 1], [1]])
    assert packed is not None
    assert packed.ids.tolist() == [[5, 6, 1, 2, 9]]
    assert packed.places.tolist() == [[0, 1, 0, 1, 0]]
    assert packed.starts.tolist() == [0, 2, 4, 5]
    assert packed.trained.tolist() == [1, 2, 3, 4]
    assert packed.longest == 2
    assert end_to_end([[1, 2]], [[0]]) is None


def test_flash_attention_is_told_what_transformers_would_work_out() -> None:
    packed = end_to_end(*rows())
    assert packed is not None
    (starts, others), (longest, _) = flash.prepare_fa_kwargs_from_position_ids(packed.places)
    assert torch.equal(packed.starts, starts)
    assert torch.equal(packed.starts, others)
    assert packed.starts.dtype == starts.dtype == torch.int32
    assert packed.longest == int(longest)
    assert bool(flash._is_packed_sequence(packed.places, 1))


def test_activations_may_be_checkpointed(monkeypatch: pytest.MonkeyPatch) -> None:
    keep_float64(monkeypatch)
    policy = model("llama", gradient_checkpointing=True).train()
    assert packing("always", [policy.causal])
    assert any(getattr(module, "gradient_checkpointing", False) for module in policy.modules())
    assert_close(packed_gradients(policy, *rows()), separate_gradients(model("llama").eval(), *rows()))


def test_lora_packs_too(monkeypatch: pytest.MonkeyPatch) -> None:
    keep_float64(monkeypatch)
    policy = model("llama", lora=LoraConfig(rank=2)).eval()
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    found = packed_gradients(policy, *rows())
    assert_close(found, separate_gradients(policy, *rows()))
    assert all("lora_" in name for name in found[1])


def test_auto_packs_under_kernels_of_variable_length_alone() -> None:
    policy = model("llama")
    for kernel in MASKED:
        assert not packing("auto", [under(policy, kernel).causal])
        assert packing("always", [policy.causal])
        assert packing("auto", [policy.causal], "flash_attention_2")  # what an outline stands for
    for kernel in VARIABLE:
        assert packing("auto", [under(policy, kernel).causal])
        assert not packing("never", [policy.causal])
        assert not packing("auto", [policy.causal, model("llama").causal])
        assert not packing("auto", [model("llama").causal, policy.causal])


def test_always_refuses_what_was_not_proven() -> None:
    dynamic, flexible = model("llama"), under(model("llama"), "flex_attention")
    dynamic.causal.config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0}
    by_layer = load_policy(ModelConfig(config={"model_type": "olmo3", **SMALL, **BY_LAYER}, tokenizer="characters"), 0)
    full, sliding = {"rope_type": "longrope"}, {"rope_type": "default"}
    by_layer.causal.config.rope_parameters = {"full_attention": full, "sliding_attention": sliding}
    recurrent = {"model_type": "mamba", "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
    unproven = [
        load_policy(ModelConfig(config=config, tokenizer="characters"), seed=0)
        for config in ({"model_type": "gemma2", **SMALL}, recurrent)
    ]
    for refused, sentence in [
        (dynamic, "scaled by the length of the batch .dynamic."),
        (by_layer, "scaled by the length of the batch .longrope."),
        (flexible, "attention 'flex_attention', but for sdpa, eager, flash_attention_2, flash_attention_3"),
        (unproven[0], "model type 'gemma2'"),
        (unproven[1], "model type 'mamba'"),
    ]:
        for mode in ("auto", "never"):
            assert not packing(mode, [refused.causal])
        if refused is not flexible:
            assert not packing("auto", [under(refused, "flash_attention_2").causal])
        for models in ([refused.causal], [model("llama").causal, refused.causal]):
            with pytest.raises(PolicyError, match=rf"data\.pack: always, but .*{sentence}; use auto or never"):
                packing("always", models)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_each_model_is_tried_before_its_rows_are_packed(
    dtype: str, calls: list[Call], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {"model_type": "llama", **SMALL, "attention_dropout": 0.5}
    policy = load_policy(ModelConfig(config=config, tokenizer="characters", dtype=dtype), seed=0).train()
    assert tried_packing("always", [policy])
    assert policy.training
    assert not tried_packing("never", [policy])
    assert not calls
    assert tried_packing("auto", [under(policy, "flash_attention_2")])
    assert [call.starts for call in calls] == [[0, 4, 7]] * 4  # two layers, twice
    monkeypatch.setattr(masks, "find_packed_sequence_indices", lambda places: None)
    monkeypatch.setattr(flash, "_is_packed_sequence", lambda *_, **__: False)
    assert tried_packing("always", [policy])  # flash attention is told where rows start: it need not detect them
    sentence = r"data\.pack: under attention '\w+' packed rows see each other here: .* by [\d.e-]+ nats; set .*never"
    with pytest.raises(PolicyError, match=sentence):
        tried_packing("always", [under(policy, "sdpa")])
    with pytest.raises(PolicyError, match=sentence):
        tried_packing("always", [model("llama"), under(policy, "eager")])


@pytest.mark.parametrize("family", ["bloom", "opt"])
def test_a_model_that_does_not_look_at_the_places_would_be_seen(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    keep_float64(monkeypatch)
    policy = under(model(family).eval(), "eager")
    with pytest.raises(PolicyError, match=f"model type '{family}'"):
        tried_packing("always", [policy])
    leaking, right = packed_gradients(policy, *rows()), separate_gradients(policy, *rows())
    assert float((leaking[0] - right[0]).abs().max()) > 0.1
    monkeypatch.setattr("rwft.data.packing.MODELS", MODELS | {family})
    with pytest.raises(PolicyError, match="rows see each other"):
        tried_packing("always", [policy])


def test_batches_are_counted_without_padding() -> None:
    length = np.array([5, 1, 9, 2, 9, 3])
    batches = [part.tolist() for part in length_batches(length, np.arange(6), most=11, packed=True)]
    assert batches == [[1, 3, 5, 0], [2], [4]]  # 1 + 2 + 3 + 5; 4 x 5 with padding
    assert pass_tokens(packed=True) == np.inf
    assert pass_tokens() < np.inf
    apart = Plan(np.array([1, 500, 2, 400]), batch_size=4, accumulate=1, world=1, seed=0, pass_tokens=pass_tokens())
    packed = Plan(apart.length, batch_size=4, accumulate=1, world=1, seed=0, pass_tokens=pass_tokens(packed=True))
    assert len(apart.micro_batches(0, 0)) > 1
    assert [sorted(part) for part in packed.micro_batches(0, 0)] == [[0, 1, 2, 3]]


class Few:
    """Three rows, two of them behind one prompt."""

    ids = ([5, 6, 7, 8], [5, 6, 1], [9, 8])
    mask = ([0, 1, 1], [0, 1], [1])

    def take(self, indices: Any) -> dict[str, Any]:
        return {"ids": [self.ids[i] for i in indices], "mask": [self.mask[i] for i in indices]}


def test_a_batch_shares_its_prompts_or_else_is_packed() -> None:
    few: Any = Few()
    collate = Collate(few, frozenset(), dtype=torch.float64, share=Sharing(1, 0, always=True), pack=True)
    assert isinstance(collate(np.array([0, 1])).layout, Shared)
    apart = collate(np.array([0, 2])).to(torch.device("cpu")).layout
    assert isinstance(apart, Packed)
    assert apart.ids.tolist() == [[5, 6, 7, 9]]
    assert not collate.packed
    assert isinstance(collate.plain()(np.array([0, 2])).layout, Packed)
    alone = Collate(few, frozenset(), dtype=torch.float64, pack=True)
    assert alone.packed
    assert isinstance(alone(np.array([0, 1])).layout, Packed)
    assert alone(np.array([], dtype=np.int64)).layout is None  # a rank without rows
    assert Collate(few, frozenset(), dtype=torch.float64)(np.array([0, 1])).layout is None


@pytest.fixture
def passed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kind of every pass through the layers that is no padded one."""
    seen: list[str] = []
    for kind in (Packed, Shared):
        hidden = kind.hidden
        note = lambda self, base, kind=kind, hidden=hidden: (seen.append(kind.__name__), hidden(self, base))[1]
        monkeypatch.setattr(kind, "hidden", note)
    return seen


RUNS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "sft": ("sft", ()),
    "a stored reference": ("iw_sft", ("train.batch_size=4", "train.accumulate=4")),
    "a live reference": ("dft", ("regularize=[{name: forward_kl, coef: 0.3}]",)),
    "snapshots": ("psft", ("train.snapshot_every=2",)),
    "rows left out": (["dft", "filtered_bc"], ("train.normalize=sequence",)),
    "pairs": ("dpo", ()),
    "checkpointed": ("sft", ("model.gradient_checkpointing=true",)),
}


@pytest.mark.parametrize("name", RUNS)
def test_training_gives_the_same_parameters(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passed: list[str]
) -> None:
    keep_float64(monkeypatch)
    objective, more = RUNS[name]
    for mode in ("never", "always"):
        overrides = (*more, f"data.pack={mode}", "train.steps=3", f"cache={tmp_path}/{mode}")
        train(tiny(tmp_path, *overrides, objective=objective, name=mode))
        assert set(passed) == (set() if mode == "never" else {"Packed"})
    assert 0 < largest_difference(tmp_path / "never", tmp_path / "always") < 1e-9


def test_auto_trains_packed_under_flash_attention(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passed: list[str], calls: list[Call]
) -> None:
    keep_float64(monkeypatch)
    train(tiny(tmp_path, f"cache={tmp_path}/padded", objective="iw_sft", name="padded"))
    assert not passed
    assert not calls
    monkeypatch.setattr("rwft.setup.load_policy", lambda *given: under(load_policy(*given), "flash_attention_2"))
    train(tiny(tmp_path, f"cache={tmp_path}/flash", objective="iw_sft", name="flash"))
    assert len(passed) == len(calls) > 4  # steps; one layer
    assert 0 < largest_difference(tmp_path / "padded", tmp_path / "flash") < 1e-9


def test_prompts_are_shared_in_the_same_run_that_packs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passed: list[str]
) -> None:
    keep_float64(monkeypatch)
    for mode in ("never", "always"):
        more = ("train.batch_size=2", f"data.share_prompts={mode}", f"data.pack={mode}", f"cache={tmp_path}/{mode}")
        train(tiny(tmp_path, *more, objective="iw_sft", name=mode))
    assert set(passed) == {"Packed", "Shared"}
    assert largest_difference(tmp_path / "never", tmp_path / "always") < 1e-9


@pytest.mark.parametrize(("regularize", "models"), [("[]", 1), ("[{name: forward_kl, coef: 0.3}]", 2)])
def test_every_model_passes_packed_rows_once_a_step(
    regularize: str, models: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passed: list[str]
) -> None:
    monkeypatch.setattr("rwft.data.batching.pass_tokens", lambda packed=False: np.inf if packed else 0.0)
    monkeypatch.setattr("rwft.setup.pass_tokens", batching.pass_tokens)
    train(tiny(tmp_path, "data.pack=always", "train.steps=2", f"regularize={regularize}"))
    assert passed == ["Packed"] * (2 + 2) * models  # two steps, and two when a model is tried


def test_cached_log_probabilities_are_the_same_packed_or_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passed: list[str]
) -> None:
    keep_float64(monkeypatch)
    cut: list[bool] = []
    for name in ("frozen", "data.logprobs"):
        note = lambda *given, packed=False: (cut.append(packed), length_batches(*given, packed=packed))[1]
        monkeypatch.setattr(f"rwft.{name}.length_batches", note)
    for mode in ("never", "always"):
        config = tiny(tmp_path, f"data.pack={mode}", f"cache={tmp_path}/{mode}", name=f"run-{mode}", objective="iw_sft")
        with rehearsal(config, Display(None, main=False)):  # no step is taken
            assert len(passed) == (0 if mode == "never" else 2 + 2 + 1)  # the reference and the policy are tried
        assert cut[-2:] == [mode == "always"] * 2
    files = [sorted((tmp_path / mode / "logprobs").glob("*.npy")) for mode in ("never", "always")]
    assert [file.name for file in files[0]] == [file.name for file in files[1]]
    assert len(files[0]) == 1
    one, other = (np.load(pair[0]) for pair in files)
    assert len(one) > 50
    assert np.abs(one - other).max() < 1e-10


def test_a_packed_run_resumes_bit_by_bit_and_not_unpacked(tmp_path: Path) -> None:
    from tests.test_resume import cut, losses, states

    more = ("data.pack=always", "model.config.attention_dropout=0.2", "train.save_every=1", "train.keep=9")
    train(tiny(tmp_path, *more, objective="dft", name="whole"))
    copy = cut(tmp_path / "whole", 2, "resumed")
    with pytest.raises(ConfigError, match=r"data\.pack: .*always.*never"):
        train(tiny(tmp_path, *more, "data.pack=never", objective="dft", name="resumed"))
    train(tiny(tmp_path, *more, objective="dft", name="resumed"))
    assert states(copy) == states(tmp_path / "whole")
    assert losses(copy) == losses(tmp_path / "whole")


@pytest.mark.distributed
def test_ranks_pack_and_give_the_parameters_of_one_process(tmp_path: Path, root: Path) -> None:
    ranks = f"""
import torch
to = torch.Tensor.to
torch.Tensor.to = lambda x, *a, **k: x if a == (torch.float32,) and x.dtype == torch.float64 else to(x, *a, **k)
{SCRIPT}"""
    for name, mode, accumulate in (("alone", "never", 4), ("ranks", "always", 2), ("spread", "always", 2)):
        more = ("train.batch_size=5", f"train.accumulate={accumulate}", "train.steps=3", f"data.pack={mode}")
        config = tiny(tmp_path, *more, objective="iw_sft", name=name)
        (tmp_path / f"{name}.yaml").write_text(to_yaml(config))
    torchrun(1, tmp_path, ["alone"], root, ranks)
    torchrun(2, tmp_path, ["ranks"], root, ranks)
    torchrun(2, tmp_path, ["spread"], root, SHARDED + ranks)
    assert largest_difference(tmp_path / "alone", tmp_path / "ranks") < 1e-9
    assert largest_difference(tmp_path / "alone", tmp_path / "spread") < 1e-9


def test_the_plan_counts_packed_rows_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rwft.data.prepare import prepare
    from rwft.policy import load_tokenizer

    monkeypatch.setattr(batching, "pass_tokens", lambda packed=False: np.inf if packed else 0.0)
    monkeypatch.setattr("rwft.setup.pass_tokens", batching.pass_tokens)
    passes = {}
    for mode in ("never", "always"):
        config = tiny(tmp_path, f"data.pack={mode}", "data.share_prompts=never")
        data = prepare(config.data, load_tokenizer(config.model), frozenset(), tmp_path / "cache", lambda _: None)
        outline = Outline(config.model)
        plan = planned(config, build_objective("sft"), data, outline, 1, "one")
        passes[mode] = [part for step in range(2) for part in plan.micro_batches(step, 0)]
        found = largest(plan, data, 2, packed=packs(config, outline))
        sums = [int(data.train.length[part].sum()) for part in passes[mode]]
        if mode == "always":
            assert (found.rows, found.positions) == (1, max(sums))
        else:
            assert found.rows * found.positions >= max(sums)
    assert len(passes["always"]) == 2  # one pass a step of 16 rows
    assert len(passes["never"]) > 2
    flash_config = tiny(tmp_path, "model.attention=flash_attention_2")
    assert packs(flash_config, Outline(flash_config.model))
    assert not packs(tiny(tmp_path), Outline(tiny(tmp_path).model))


def test_pack_is_checked_with_its_choices(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.pack: 'allways' is unknown; did you mean 'always'"):
        tiny(tmp_path, "data.pack=allways")
    assert tiny(tmp_path).data.pack == "auto"
