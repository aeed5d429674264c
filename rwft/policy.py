"""A Hugging Face causal LM as a policy: loaded, adapted, and asked for log-probabilities of trained positions only."""

from __future__ import annotations

import copy
import hashlib
import json
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from rwft.config import FrozenConfig, ModelConfig
from rwft.data.packing import Layout
from rwft.errors import PolicyError
from rwft.head import Draws, HeadResult, Vocabulary, Weigh, distribution_signals, weighted_loss
from rwft.model_files import check_model, is_tokenizer, refuse_code
from rwft.regularizers import Penalty
from rwft.sharding import whole_state

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


class Policy(nn.Module):
    """`pi(y_t | x, y_<t)`. `ids (b t+1)` in, log-probabilities of the masked target positions out."""

    def __init__(self, model: Any, dtype: str) -> None:
        super().__init__()
        self.model = model
        self.autocast = dtype == "bfloat16"
        self._scale, self._softcap = _logit_transform(self.causal.config)
        self.size = int(self.causal.get_output_embeddings().weight.shape[0])  # of the vocabulary, on every rank
        self.tokens = min(self.size, int(self.causal.get_input_embeddings().weight.shape[0]))  # that it reads and gives

    @property
    def causal(self) -> Any:
        """The Hugging Face model itself, below LoRA if there is any."""
        return self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model

    @property
    def _no_split_modules(self) -> Any:
        """The layers that FSDP wraps, under the name by which Accelerate asks for them."""
        return self.causal._no_split_modules

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def float_dtype(self) -> torch.dtype:
        """What log-probabilities and weights are computed in: float32, or float64 for a float64 model."""
        return torch.float64 if next(self.model.parameters()).dtype == torch.float64 else torch.float32

    def vocabulary(self) -> Vocabulary:
        """The output projection as the model defines it."""
        head = self.causal.get_output_embeddings()
        return Vocabulary(head.weight, getattr(head, "bias", None), self._scale, self._softcap)

    def hidden(self, ids: Tensor, mask: Tensor, layout: Layout | None = None) -> Tensor:
        """`(b t+1), (b t) -> (n h)`: last hidden states at the masked positions; rows are padded on the right.

        Right padding under a causal mask is invisible to real tokens, so no attention mask is
        passed: kernels keep their fast causal path. `layout` holds the same rows in another way
        (behind one copy of each prompt, or packed into one sequence), and gives the same states.
        """
        if layout is not None:
            return layout.hidden(self.causal.base_model)
        states = self.causal.base_model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
        return rearrange(states, "b t h -> (b t) h")[_flat(mask)]

    def forward(
        self,
        ids: Tensor,
        mask: Tensor,
        weigh: Weigh | None = None,
        *,
        segments: list[int] | None = None,
        signals: tuple[str, ...] = (),
        penalties: tuple[Penalty, ...] = (),
        penalty_scale: Tensor | None = None,
        reference: Any = None,
        two_pass: bool = False,
        sampled: Draws | None = None,
        layout: Layout | None = None,
    ) -> HeadResult | dict[str, Tensor]:
        """With `weigh`: the weighted loss over masked positions (see `rwft.head.weighted_loss`).

        Without: `{name: (n)}`, log-probabilities ("logp") and the `signals` asked for, no gradient.
        """
        cast = torch.autocast(ids.device.type, torch.bfloat16) if self.autocast else nullcontext()
        targets = rearrange(ids[:, 1:], "b t -> (b t)")[_flat(mask)]
        if weigh is None:
            with torch.no_grad(), cast:
                hidden = self.hidden(ids, mask, layout)
            return distribution_signals(hidden, self.vocabulary(), targets, ("logp", *signals))
        with cast:
            hidden = self.hidden(ids, mask, layout)
            frozen = None
            if reference is not None:
                with torch.no_grad():
                    frozen = (reference.hidden(ids, mask, layout), reference.vocabulary())
        if two_pass:
            segments = [len(targets)]
        return weighted_loss(
            hidden,
            self.vocabulary(),
            targets,
            weigh,
            segments=segments,
            signals=signals,
            penalties=penalties,
            penalty_scale=penalty_scale,
            reference=frozen,
            sampled=sampled,
        )

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """What the optimiser moves, by name; a tied parameter once."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}


def _flat(mask: Tensor) -> Tensor:
    """`(b t) -> (n)`: flat indices of the trained positions, in row order."""
    return rearrange(mask > 0, "b t -> (b t)").nonzero().squeeze(-1)


def _logit_transform(config: Any) -> tuple[float, float | None]:
    """Scale and soft-cap of the logits, under the names that model families give them."""
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    scale *= float(getattr(config, "lm_head_multiplier", None) or 1.0)
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)
    softcap = getattr(config, "final_logit_softcapping", None)
    return scale, None if softcap is None else float(softcap)


def load_policy(config: ModelConfig, seed: int, device: torch.device | str = "cpu") -> Policy:
    """The policy as a run starts with it: weights from `config.path`, or random from `config.config` and `seed`.

    Raises PolicyError for a model that does not exist, names code, or whose logits are not a
    plain projection of its last hidden state.
    """
    trained = torch.float32 if config.dtype == "bfloat16" and config.lora is None else DTYPES[config.dtype]
    model = load_causal(config.path, config.revision, trained, config.attention, config.config, seed)
    check_head(model)
    if config.gradient_checkpointing:
        checkpoint_activations(model)
    if config.lora is not None:
        model = add_lora(model, config, seed)
    policy = Policy(model, config.dtype).to(device)
    if config.compile:
        _compile_layers(policy)
    return policy


def checkpoint_activations(model: Any) -> None:
    """Keep no activations of a block; make them again in the backward pass."""
    settings = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):  # the name since transformers 5.20 or so
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=settings)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)


def _compile_layers(policy: Policy) -> None:
    """In place, so that parameters keep their names; lengths vary, so shapes are dynamic from the start."""
    layers = [m for m in policy.causal.modules() if type(m).__name__ in (policy._no_split_modules or ())]
    if not layers:
        raise PolicyError(f"model.compile: {type(policy.causal).__name__} does not name its layers; leave it out")
    for layer in layers:
        layer.compile(dynamic=True)


def load_frozen(config: FrozenConfig, dtype: str, attention: str, device: torch.device | str) -> Policy:
    """A frozen model that only gives log-probabilities."""
    model = load_causal(config.path, config.revision, DTYPES[dtype], attention, None, 0)
    check_head(model)
    policy = Policy(model, dtype).to(device).eval()
    return policy.requires_grad_(False)


def load_causal(
    path: str | None, revision: str | None, dtype: torch.dtype, attention: str, config: Any, seed: int
) -> Any:
    """The Hugging Face model of a folder or Hub name, or of an architecture alone, with random weights from `seed`.

    Raises PolicyError for a model that does not exist or names code.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # the run has bars of its own
    if path is None:
        settings = dict(config)
        refuse_code(settings, "model.config")
        try:
            architecture = AutoConfig.for_model(settings.pop("model_type", "llama"), **settings)
        except ValueError as error:
            raise PolicyError(f"model.config: {' '.join(str(error).split())[:300]}") from None
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(
            architecture,
            dtype=dtype,
            attn_implementation=None if attention == "auto" else attention,
            trust_remote_code=False,
        )
    check_model(path, revision)
    try:
        return AutoModelForCausalLM.from_pretrained(
            path,
            revision=revision,
            dtype=dtype,
            attn_implementation=None if attention == "auto" else attention,
            trust_remote_code=False,
            use_safetensors=True,
        )
    except (OSError, ValueError) as error:
        raise PolicyError(f"model.path '{path}': cannot be loaded: {' '.join(str(error).split())[:300]}") from None


def load_tokenizer(config: ModelConfig) -> Any:
    """The tokenizer of the policy: the model's own unless `model.tokenizer` names another."""
    from transformers import AutoTokenizer

    name = config.tokenizer or config.path
    if name == "characters":
        from rwft.data.characters import character_tokenizer

        return character_tokenizer()
    assert name is not None
    if config.tokenizer is None or not is_tokenizer(Path(name).expanduser()):
        check_model(name, config.revision)
    try:
        return AutoTokenizer.from_pretrained(name, revision=config.revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        key = "model.tokenizer" if config.tokenizer else "model.path"
        raise PolicyError(f"{key} '{name}': no tokenizer can be loaded: {' '.join(str(error).split())[:300]}") from None


def check_head(model: Any) -> None:
    """Refuse a model whose logits are not cap(scale * (hidden @ W.T + b)): its log-probabilities would be wrong."""
    head = model.get_output_embeddings()
    name = type(model).__name__
    if head is None or getattr(head, "weight", None) is None or not hasattr(model, "base_model"):
        raise PolicyError(f"model {name}: no plain output projection was found; it cannot be trained here")
    scale, softcap = _logit_transform(model.config)
    ids = torch.arange(1, 5, device=head.weight.device)[None] % head.weight.shape[0]
    training = model.training
    model.eval()
    with torch.no_grad():
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        expected = model(input_ids=ids, use_cache=False).logits.double()
        ours = torch.nn.functional.linear(hidden, head.weight, getattr(head, "bias", None)).double() * scale
        if softcap is not None:
            ours = softcap * torch.tanh(ours / softcap)
    model.train(training)
    tolerance = 2e-2 if head.weight.dtype == torch.bfloat16 else 1e-4
    gap = float((ours - expected).abs().max() / expected.abs().max().clamp(min=1e-6))
    if not gap <= tolerance:
        raise PolicyError(
            f"model {name}: its logits differ from a projection of its last hidden state by {gap:.2g} (relative); "
            "it changes logits in a way that is not known here, so it cannot be trained correctly"
        )


def add_lora(model: Any, config: ModelConfig, seed: int) -> Any:
    """The model with adapters as `config.lora` says. Raises PolicyError for targets that cannot be adapted."""
    from peft import LoraConfig as PeftLora
    from peft import get_peft_model

    assert config.lora is not None
    targets = config.lora.targets
    targets = targets if isinstance(targets, str) else list(targets)
    named = [targets] if isinstance(targets, str) else targets
    head_name = next((name for name, module in model.named_modules() if module is model.get_output_embeddings()), "")
    if head_name and head_name.rpartition(".")[2] in named:
        raise PolicyError(
            f"model.lora.targets: '{head_name}' is the output head, which the loss reads directly; leave it out"
        )
    torch.manual_seed(seed)
    settings = PeftLora(
        r=config.lora.rank,
        lora_alpha=config.lora.alpha,  # type: ignore[arg-type]  # PEFT takes fractions too
        lora_dropout=config.lora.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    try:
        with warnings.catch_warnings():  # PEFT asks by a name that transformers has given up
            warnings.filterwarnings("ignore", r"`is_gradient_checkpointing` is deprecated", FutureWarning)
            adapted = get_peft_model(model, settings)
    except ValueError as error:
        raise PolicyError(f"model.lora.targets: {' '.join(str(error).split())[:300]}") from None
    if config.gradient_checkpointing:
        adapted.enable_input_require_grads()
    return adapted


def fingerprint(policy: Policy) -> str:
    """Hex digest of the frozen or initial weights and the architecture: what log-probabilities depend on."""
    digest = hashlib.sha256(json.dumps(policy.causal.config.to_diff_dict(), sort_keys=True, default=str).encode())
    for name, value in policy.named_parameters():
        if ".lora_" in name:  # an adapter starts as the identity
            continue
        digest.update(name.encode())
        digest.update(value.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def export(policy: Policy, tokenizer: Any, folder: Path, dtype: str, *, merge: bool, main: bool) -> None:
    """Write a folder that plain transformers loads: the model, or the LoRA adapter unless `merge`.

    The policy stays as it is. All ranks take part, since weights may be spread over them; `main` writes.
    """
    model = policy.model
    adapted = hasattr(model, "peft_config")
    state = whole_state(model)
    if not main:
        return
    if adapted and merge:
        model = copy.deepcopy(model).merge_and_unload()
        state = model.state_dict()
    if dtype == "bfloat16" and (merge or not adapted):
        state = {name: value.to(torch.bfloat16) for name, value in state.items()}
    model.save_pretrained(folder, state_dict=state)
    tokenizer.save_pretrained(folder)
    if dtype == "bfloat16" and (
        merge or not adapted
    ):  # save_pretrained writes the dtype of the parameters it came from
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), "dtype": dtype}, indent=2))
