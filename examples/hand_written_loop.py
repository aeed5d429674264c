"""An objective of rwft in a loop of one's own: hidden states in, log-probabilities out, the one equation, a step.

Run: python examples/hand_written_loop.py
"""

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from rwft import build_objective, surrogate_loss, token_logprobs

torch.manual_seed(0)
model = AutoModelForCausalLM.from_config(
    LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
)
objective = build_objective(["dft", {"name": "rwr", "temperature": 0.5}])
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

# two prompts of three tokens, each with a good and a bad answer of four; only answers are trained
ids = torch.randint(3, 50, (2, 7)).repeat_interleave(2, dim=0)
ids[1::2, 3:] = torch.randint(3, 50, (2, 4))
mask = torch.zeros(4, 6)
mask[:, 2:] = 1
reward = torch.tensor([[1.0], [0.0], [1.0], [0.0]])

for step in range(60):
    hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
    logp = token_logprobs(hidden, model.lm_head.weight, ids[:, 1:])  # (b t), no logits of the whole vocabulary
    weights = objective({"logp": logp, "mask": mask, "reward": reward})  # detached inside
    loss = surrogate_loss(logp, weights, mask, denominator=mask.sum())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 20 == 19:
        good, bad = (logp.detach()[rows][:, 2:].mean() for rows in (slice(0, None, 2), slice(1, None, 2)))
        print(f"step {step + 1}: log-probability of a good token {good:.2f}, of a bad one {bad:.2f}")
