"""What a model weighs before it is loaded: parameters, activations and the head, from its architecture alone.

The model is built of tensors that have a shape and no content, and forwarded once in that form: what autograd
would keep for the backward pass is counted, not guessed from a formula for one family of models.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from rwft.config import ModelConfig
from rwft.errors import PolicyError
from rwft.head import Draws, chunk_rows
from rwft.head_sampled import bytes_of_draws
from rwft.model_files import check_model
from rwft.policy import DTYPES, Policy, add_lora, checkpoint_activations, load_causal
from rwft.softmax import precision


@dataclass(frozen=True)
class Footprint:
    """A model's parameters: how many, and what they take in bytes.

    `root` is what belongs to no block (embeddings, last norm, output head), `block` the largest block,
    both in bytes; `products` the weights that each position is multiplied with, the head excluded.
    """

    parameters: int
    trained: int
    weights: int  # bytes of all
    gradients: int  # bytes of the trained
    root: int
    block: int
    blocks: int
    products: int
    layers: int
    attention: int  # width of all heads together
    vocabulary: tuple[int, int]  # (v, h)
    head_trained: bool


class Outline:
    """The policy of a config without weights. Raises PolicyError for a model that does not exist or names code."""

    def __init__(self, config: ModelConfig) -> None:
        from torch._subclasses.fake_tensor import FakeTensorMode

        self.mode = FakeTensorMode()
        # without a cache transformers would read positions, which have no content, and keep a mask that no run makes
        self.cache = not config.gradient_checkpointing
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            self.policy = _without_weights(config)
        with self.mode:
            _materialise(self.policy)

    def footprint(self) -> Footprint:
        """Counts and bytes of the parameters."""
        head = self.policy.causal.get_output_embeddings().weight
        parameters, trained = list(self.policy.parameters()), self.policy.trained_parameters().values()
        blocks = self._blocks()
        inside = [sum(p.nbytes for p in block.parameters()) for block in blocks]
        weights = sum(p.nbytes for p in parameters)
        text = self.policy.causal.config.get_text_config()
        heads = text.num_attention_heads
        return Footprint(
            parameters=sum(p.numel() for p in parameters),
            trained=sum(p.numel() for p in trained),
            weights=weights,
            gradients=sum(p.nbytes for p in trained),
            root=weights - sum(inside),
            block=max(inside, default=0),
            blocks=len(blocks),
            products=sum(p.numel() for p in self._multiplied(head)),
            layers=text.num_hidden_layers,
            attention=heads * (getattr(text, "head_dim", None) or text.hidden_size // heads),
            vocabulary=(head.shape[0], head.shape[1]),
            head_trained=head.requires_grad,
        )

    def _blocks(self) -> list[nn.Module]:
        names = set(self.policy._no_split_modules or ())
        return [module for module in self.policy.modules() if type(module).__name__ in names]

    def _multiplied(self, head: Tensor) -> Iterator[Tensor]:
        """Matrices but the output head and tables that are looked up."""
        tables = {id(m.weight) for m in self.policy.modules() if isinstance(m, nn.Embedding)} | {id(head)}
        return (p for p in self.policy.parameters() if p.ndim > 1 and id(p) not in tables)

    def kept(self, rows: int, positions: int) -> int:
        """Bytes that autograd keeps for the backward pass of `(rows positions)`; parameters are not among them."""
        own = {p.untyped_storage()._cdata for p in self.policy.parameters()}
        found: dict[int, torch.UntypedStorage] = {}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                found[storage._cdata] = storage  # kept alive, so that its number stays its own
            return tensor

        cast = torch.autocast("cpu", torch.bfloat16, enabled=self.policy.autocast)
        with self.mode, torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), cast:
            ids = torch.zeros(rows, positions, dtype=torch.long)
            self.policy.causal.base_model(input_ids=ids, use_cache=self.cache)
        return sum(storage.nbytes() for storage in found.values())

    def head(self, trained: int, sampled: bool = False) -> int:
        """Bytes of the loss head at `trained` positions: logits of a chunk, hidden states, gradients on their way.

        Before `sampled` gradients are written, the logits lie in their place; beside them are the tokens drawn.
        """
        with self.mode:
            vocabulary = self.policy.vocabulary()
            v, h = vocabulary.weight.shape
            dtype = torch.bfloat16 if self.policy.autocast else vocabulary.weight.dtype
            hidden = torch.empty(trained, h, dtype=dtype)
            kinds, chunk = precision(hidden, vocabulary.weight), chunk_rows(hidden, vocabulary, None, None, sampled)
        logits = min(trained, chunk) * v * kinds.product.itemsize
        cast = 0 if kinds.product == vocabulary.weight.dtype else v * h * kinds.product.itemsize
        gradient = v * h * kinds.exact.itemsize if vocabulary.weight.requires_grad else 0
        drawn = bytes_of_draws(trained, Draws.count, kinds.exact) if sampled else 0
        apart = 0 if sampled and logits <= gradient else logits
        return apart + cast + gradient + drawn + (3 if sampled else 2) * hidden.nbytes


def activations(config: ModelConfig, rows: int, positions: int) -> tuple[int, int]:
    """Bytes kept for the backward pass of `(rows positions)`: without and with gradient checkpointing."""
    plain, spare = (Outline(replace(config, gradient_checkpointing=on)) for on in (False, True))
    everything, inputs = plain.kept(rows, positions), spare.kept(rows, positions)
    return everything, inputs + everything // max(1, plain.footprint().blocks)  # one block is made anew at a time


def _without_weights(config: ModelConfig) -> Policy:
    trained = torch.float32 if config.dtype == "bfloat16" and config.lora is None else DTYPES[config.dtype]
    attention = "eager" if config.attention == "eager" else "auto"  # the other kinds keep the same
    if config.path is None:
        model = load_causal(None, None, trained, attention, config.config, 0)
    else:
        model = _from_files(config.path, config.revision, trained, attention)
    if config.gradient_checkpointing:
        checkpoint_activations(model)
    if config.lora is not None:
        model = add_lora(model, config, 0)
    return Policy(model.train(), config.dtype)


def _from_files(path: str, revision: str | None, dtype: torch.dtype, attention: str) -> Any:
    """The architecture that a folder or the Hub describes; the files that hold weights are not opened."""
    from transformers import AutoConfig, AutoModelForCausalLM

    check_model(path, revision)
    try:
        architecture = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False)
        return AutoModelForCausalLM.from_config(
            architecture,
            dtype=dtype,
            attn_implementation=None if attention == "auto" else attention,
            trust_remote_code=False,
        )
    except (OSError, ValueError) as error:
        raise PolicyError(f"model.path '{path}': cannot be outlined: {' '.join(str(error).split())[:300]}") from None


def _materialise(policy: Policy) -> None:
    """Tensors of no content on the CPU in place of those on no device, which kernels refuse; tied ones stay tied."""
    made: dict[int, Any] = {}
    for module in policy.modules():
        for name, old in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if id(old) not in made:
                new = torch.empty(old.shape, dtype=old.dtype)
                made[id(old)] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
            own: Any = module._parameters if name in module._parameters else module._buffers
            own[name] = made[id(old)]
