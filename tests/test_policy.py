"""The policy gives the log-probabilities that the model itself defines, or refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch._dynamo.utils import counters

from rwft.config import FrozenConfig, LoraConfig, ModelConfig
from rwft.data.characters import character_tokenizer
from rwft.errors import PolicyError
from rwft.head import HeadResult
from rwft.loop import train
from rwft.policy import Policy, load_frozen, load_policy, load_tokenizer
from tests.tiny import MODEL, tiny

SMALL = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **SMALL},
    "tied": {"model_type": "llama", "tie_word_embeddings": True, **SMALL},
    "qwen2": {"model_type": "qwen2", **SMALL},
    "gemma2, soft cap": {"model_type": "gemma2", "final_logit_softcapping": 0.5, "head_dim": 8, **SMALL},
    "cohere, logit scale": {"model_type": "cohere", "logit_scale": 0.3, **SMALL},
    "granite, logits scaling": {"model_type": "granite", "logits_scaling": 7.0, **SMALL},
    "gpt2": {"model_type": "gpt2", "vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "phi, bias": {"model_type": "phi", **SMALL, "num_key_value_heads": 2},
}


def batch() -> tuple[Tensor, Tensor]:
    ids = torch.randint(5, 40, (3, 9))
    mask = torch.zeros(3, 8, dtype=torch.float64)
    mask[0, 3:7], mask[1, 1:2], mask[2, 2:8] = 1, 1, 1
    ids[0, 8], ids[1, 3:] = 0, 0  # right padding
    return ids, mask


def by_definition(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """Log-softmax of the model's own full logits."""
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits.double()
    return logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0][mask > 0]


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_and_gradients_are_the_models_own(family: str) -> None:
    policy = load_policy(ModelConfig(config=FAMILIES[family], tokenizer="characters", dtype="float64"), seed=1)
    head = policy.causal.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        torch.nn.init.normal_(head.bias)  # zero at the start, which would hide that it is ignored
    ids, mask = batch()
    coefficients = torch.randn(int(mask.sum()), dtype=torch.float64)
    policy.eval()
    assert torch.allclose(policy(ids, mask)["logp"], by_definition(policy.model, ids, mask), rtol=0, atol=1e-6)
    result = policy(ids, mask, lambda signals, where: coefficients[where])
    result.loss.backward()
    ours = {name: p.grad.clone() for name, p in policy.named_parameters()}
    policy.zero_grad()
    (-(coefficients * by_definition(policy.model, ids, mask)).sum()).backward()
    for name, parameter in policy.named_parameters():
        scale = parameter.grad.abs().max().clamp(min=1e-3)
        assert float((ours[name] - parameter.grad).abs().max() / scale) < 1e-5, name  # models round to float32 inside


def test_padding_is_invisible() -> None:
    policy = load_policy(ModelConfig(config=FAMILIES["llama"], tokenizer="characters", dtype="float64"), seed=1).eval()
    ids, mask = batch()
    alone = torch.cat([policy(ids[i : i + 1], mask[i : i + 1])["logp"] for i in range(3)])
    assert torch.allclose(policy(ids, mask)["logp"], alone, rtol=0, atol=1e-12)


def test_a_model_that_changes_its_logits_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaForCausalLM

    forward = LlamaForCausalLM.forward

    def tempered(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = forward(self, *args, **kwargs)
        out.logits = out.logits / 1.1
        return out

    monkeypatch.setattr(LlamaForCausalLM, "forward", tempered)
    with pytest.raises(PolicyError, match="LlamaForCausalLM: its logits differ"):
        load_policy(ModelConfig(config=FAMILIES["llama"], tokenizer="characters"), seed=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_log_probabilities_are_never_below_float32(dtype: str) -> None:
    policy = load_policy(ModelConfig(config=FAMILIES["llama"], tokenizer="characters", dtype=dtype), seed=1).eval()
    ids, mask = batch()
    logp = policy(ids, mask)["logp"]
    assert logp.dtype == torch.float32
    with torch.no_grad():
        expected = by_definition(policy.model.double(), ids, mask)
    assert torch.allclose(logp.double(), expected, atol=1e-5 if dtype == "float32" else 3e-2)


def test_lora_trains_the_adapter_alone_and_exports_either_way(tmp_path: Path) -> None:
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    first = tiny(tmp_path, "model.dtype=float32", name="base")
    train(first)
    base = str(tmp_path / "base" / "model")
    lora = ("model.config=null", f"model.path={base}", "model.dtype=float32", "model.lora={rank: 4, dropout: 0.1}")
    train(tiny(tmp_path, *lora, objective="iw_sft", name="adapter"))
    train(tiny(tmp_path, *lora, "model.lora.merge=true", objective="iw_sft", name="merged"))
    saved = load_file(tmp_path / "adapter" / "model" / "adapter_model.safetensors")
    assert saved
    assert all("lora_" in name for name in saved)
    adapted = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter" / "model").eval()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged" / "model").eval()
    untouched = AutoModelForCausalLM.from_pretrained(base).eval()
    ids = torch.randint(5, 90, (2, 7))
    with torch.no_grad():
        one, two, zero = adapted(ids).logits, merged(ids).logits, untouched(ids).logits
    assert torch.allclose(one, two, atol=1e-5)
    assert float((one - zero).abs().max()) > 1e-3


def test_lora_on_the_output_head_is_refused() -> None:
    config = ModelConfig(
        config=FAMILIES["llama"], tokenizer="characters", lora=LoraConfig(targets=["q_proj", "lm_head"])
    )
    with pytest.raises(PolicyError, match="'lm_head' is the output head"):
        load_policy(config, seed=0)


def test_gradient_checkpointing_changes_nothing(tmp_path: Path) -> None:
    train(tiny(tmp_path, name="plain"))
    train(tiny(tmp_path, "model.gradient_checkpointing=true", name="checkpointed"))
    one, two = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("plain", "checkpointed"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def gradients(family: str, **settings: Any) -> dict[str, Tensor]:
    """By name, summed over batches of several shapes, without dropout."""
    architecture = FAMILIES[family] | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    policy = load_policy(ModelConfig(config=architecture, tokenizer="characters", dtype="float64", **settings), seed=0)
    for b, t in ((3, 9), (4, 12), (1, 7)):
        ids = torch.arange(b * t).reshape(b, t).mul(7).remainder(33) + 5
        found = policy(ids, torch.ones(b, t - 1), lambda head, _: head["logp"].exp())
        assert isinstance(found, HeadResult)
        found.loss.backward()
    return {name: p.grad for name, p in policy.trained_parameters().items() if p.grad is not None}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # inside of dynamo
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.parametrize("family", ["gpt2", "phi, bias"])  # their norms stay in float64
def test_compiled_layers_have_the_same_gradients(family: str) -> None:
    plain = gradients(family)
    counters.clear()
    compiled = gradients(family, compile=True)
    assert counters["stats"]["unique_graphs"] > 0
    assert plain.keys() == compiled.keys()
    gaps = {name: float((plain[name] - compiled[name]).abs().max() / plain[name].abs().max()) for name in plain}
    assert max(gaps.values()) < 1e-12, gaps


@pytest.mark.parametrize(
    ("key", "value"),
    [("auto_map", {"AutoModelForCausalLM": "evil.Model"}), ("_attn_implementation", "evil/kernel")],
)
def test_a_model_folder_that_names_code_is_refused(key: str, value: Any, tmp_path: Path) -> None:
    train(tiny(tmp_path))
    folder = tmp_path / "run" / "model"
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(PolicyError, match=key):
        load_policy(ModelConfig(path=str(folder)), seed=0)


def test_a_folder_may_hold_a_tokenizer_alone_where_a_tokenizer_is_asked_for(tmp_path: Path) -> None:
    folder = tmp_path / "letters"
    character_tokenizer().save_pretrained(folder)
    assert not (folder / "config.json").exists()
    given = tiny(tmp_path, f"model.tokenizer={folder}")
    assert load_tokenizer(given.model).get_vocab() == character_tokenizer().get_vocab()
    train(given)
    train(tiny(tmp_path, name="built"))  # with the same tokenizer, made in code
    one, two = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("run", "built"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    with pytest.raises(PolicyError, match=r"letters': the folder has no config.json; expected a .* model folder"):
        load_policy(ModelConfig(path=str(folder)), seed=0)
    with pytest.raises(PolicyError, match=r"letters': the folder has no config.json"):
        load_tokenizer(ModelConfig(path=str(folder)))  # what lacks there is the model
    (tmp_path / "empty").mkdir()
    for name in ("empty", "nowhere"):
        with pytest.raises(PolicyError, match=f"{name}'"):
            load_tokenizer(ModelConfig(config=MODEL, tokenizer=str(tmp_path / name)))


@pytest.mark.parametrize("key", ["auto_map", "custom_pipelines"])
def test_a_folder_with_a_tokenizer_that_names_code_is_refused(key: str, tmp_path: Path) -> None:
    character_tokenizer().save_pretrained(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: {"AutoTokenizer": ["evil.T", None]}}))
    with pytest.raises(PolicyError, match=f"tokenizer_config.json: '{key}' names code"):
        load_tokenizer(ModelConfig(config=MODEL, tokenizer=str(tmp_path)))


def test_the_exported_folder_is_a_plain_model(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    train(tiny(tmp_path))
    folder = tmp_path / "run" / "model"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("3:abc>", return_tensors="pt").input_ids
    out = model.generate(ids, max_new_tokens=5, do_sample=True)
    assert out.shape[1] > ids.shape[1]
    assert isinstance(tokenizer.decode(out[0]), str)
    frozen = load_frozen(FrozenConfig(path=str(folder)), "float64", "sdpa", "cpu")
    assert isinstance(frozen, Policy)
    assert not any(p.requires_grad for p in frozen.parameters())
    assert load_tokenizer(ModelConfig(path=str(folder))).get_vocab() == tokenizer.get_vocab()
    assert MODEL["vocab_size"] == model.config.vocab_size
