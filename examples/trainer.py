"""An objective of rwft in a plain `transformers.Trainer`: rewards are a column of the dataset, the loop is theirs.

Run: python examples/trainer.py
"""

import tempfile

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainingArguments

from rwft.integrations.hf import weighted

torch.manual_seed(0)
model = AutoModelForCausalLM.from_config(
    LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
)

# two prompts of three tokens, each with a good and a bad answer of four; only answers are trained
prompts, answers = torch.randint(3, 50, (2, 3)).tolist(), torch.randint(3, 50, (4, 4)).tolist()
rows = [
    {"input_ids": prompts[i // 2] + answers[i], "labels": [-100] * 3 + answers[i], "reward": 1.0 - i % 2}
    for i in range(4)
]
good, bad = Dataset.from_list(rows[::2]), Dataset.from_list(rows[1::2])

with tempfile.TemporaryDirectory() as folder:
    args = TrainingArguments(
        folder,
        max_steps=60,
        learning_rate=3e-3,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    RewardTrainer = weighted(Trainer, ["dft", {"name": "rwr", "temperature": 0.5}], normalize="token")
    trainer = RewardTrainer(model=model, args=args, train_dataset=Dataset.from_list(rows))
    trainer.train()
    a, b = (-trainer.evaluate(held_out)["eval_loss"] for held_out in (good, bad))
print(f"log-probability of a good token {a:.2f}, of a bad one {b:.2f}")
