"""Artefacts of an attacker: each holds a payload that, if it ever runs, leaves the file `EXECUTED` behind.

Every builder takes a folder with a finished run in `run/`, its data, and the path of that file; it
tampers with something and gives back the words of the command line that meets it.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Builder = Callable[[Path, Path], list[str]]
ARTEFACTS: dict[str, tuple[Builder, str]] = {}


def artefact(expected: str) -> Callable[[Builder], Builder]:
    """`expected`: what the one-line error must say, or "" where the payload is ignored and the command succeeds."""

    def register(build: Builder) -> Builder:
        ARTEFACTS[build.__name__] = (build, expected)
        return build

    return register


class Payload:
    """An object that runs a command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.marker}",)


def module(folder: Path, marker: Path, name: str = "evil.py") -> Path:
    """A Python file that runs on import, with functions of every kind."""
    file = folder / name
    file.write_text(
        f"open({str(marker)!r}, 'w').close()\n"
        "def objective(logp):\n    return logp * 0 + 1\n"
        "def rows(row, source):\n    yield row\n"
        "def verify(completion):\n    return True\n"
        "class Config: pass\nclass Model: pass\nclass Tokenizer: pass\n"
    )
    return file


def newest(folder: Path) -> Path:
    return max((folder / "run" / "checkpoints").glob("step_*"))


def unfinished(folder: Path) -> list[str]:
    """The run is made to go on from its checkpoint."""
    (folder / "run" / "status.json").write_text('{"state": "running", "step": 2}')
    return ["train", str(folder / "config.yaml")]


def edit_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def model_folder(folder: Path) -> tuple[Path, list[str]]:
    """A copy of the exported model, and the command that trains it."""
    copy = folder / "model"
    shutil.copytree(folder / "run" / "model", copy)
    words = ["train", str(folder / "config.yaml"), "model.config=null", "model.tokenizer=null"]
    return copy, [*words, f"model.path={copy}", f"output={folder}/other"]


@artefact("is not in manifest.json")
def checkpoint_with_a_pickle_beside(folder: Path, marker: Path) -> list[str]:
    (newest(folder) / "optimizer.bin").write_bytes(pickle.dumps(Payload(marker)))
    only_newest(folder)
    return unfinished(folder)


@artefact("its content is not what was written|bytes, expected")
def checkpoint_with_a_pickle_for_tensors(folder: Path, marker: Path) -> list[str]:
    (newest(folder) / "model.safetensors").write_bytes(pickle.dumps(Payload(marker)))
    only_newest(folder)
    return unfinished(folder)


@artefact("found a link or a folder, expected a file")
def checkpoint_with_a_link(folder: Path, marker: Path) -> list[str]:
    file = newest(folder) / "state.json"
    shutil.move(file, folder / "elsewhere.json")
    file.symlink_to(folder / "elsewhere.json")
    only_newest(folder)
    return unfinished(folder)


@artefact("expected names such as model.safetensors")
def checkpoint_that_names_a_file_outside(folder: Path, marker: Path) -> list[str]:
    from rwft.checkpoint import _signed

    file = newest(folder) / "manifest.json"
    manifest = json.loads(file.read_text())
    del manifest["digest"]
    manifest["files"]["../../evil.safetensors"] = {"size": 1, "sha256": "0" * 64}
    file.write_bytes(_signed(manifest))
    only_newest(folder)
    return unfinished(folder)


def only_newest(folder: Path) -> None:
    for step in sorted((folder / "run" / "checkpoints").glob("step_*"))[:-1]:
        shutil.rmtree(step)


@artefact("'auto_map' names code")
def model_with_auto_map(folder: Path, marker: Path) -> list[str]:
    model, words = model_folder(folder)
    module(model, marker)
    edit_json(model / "config.json", auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})
    return words


@artefact("'auto_map' names code")
def model_with_auto_map_in_a_nested_config(folder: Path, marker: Path) -> list[str]:
    model, words = model_folder(folder)
    module(model, marker)
    edit_json(model / "config.json", text_config={"auto_map": {"AutoConfig": "evil.Config"}, "trust_remote_code": True})
    return words


@artefact("names a kernel to fetch")
def model_with_a_kernel_for_attention(folder: Path, marker: Path) -> list[str]:
    model, words = model_folder(folder)
    edit_json(model / "config.json", _attn_implementation="evil/kernel")
    return words


@artefact("names a kernel to fetch")
def model_with_a_kernel_for_experts(folder: Path, marker: Path) -> list[str]:
    model, words = model_folder(folder)
    edit_json(model / "config.json", sub={"_experts_implementation": "evil/kernel"})
    return words


@artefact("cannot be loaded")
def model_with_pickled_weights_only(folder: Path, marker: Path) -> list[str]:
    model, words = model_folder(folder)
    (model / "model.safetensors").unlink()
    torch.save({"x": Payload(marker)}, model / "pytorch_model.bin")
    return words


@artefact("holds a LoRA adapter")
def model_with_an_adapter_that_names_another_base(folder: Path, marker: Path) -> list[str]:
    model, words = model_folder(folder)
    evil = folder / "evil"
    shutil.copytree(model, evil)
    module(evil, marker)
    edit_json(evil / "config.json", _attn_implementation="evil/kernel", auto_map={"AutoModelForCausalLM": "evil.Model"})
    (model / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(evil)}))
    return words


@artefact("'auto_map' names code")
def tokenizer_that_names_code(folder: Path, marker: Path) -> list[str]:
    model, words = model_folder(folder)
    module(model, marker)
    edit_json(model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]})
    return words


@artefact("'megatron_config' makes PEFT import modules")
def adapter_that_names_a_module(folder: Path, marker: Path) -> list[str]:
    adapter = as_adapter(folder)
    module(folder, marker)
    edit_json(adapter / "adapter_config.json", megatron_config={"x": 1}, megatron_core="evil")
    return ["evaluate", str(folder / "run")]


@artefact("has no adapter_model.safetensors")
def adapter_with_pickled_weights(folder: Path, marker: Path) -> list[str]:
    adapter = as_adapter(folder)
    torch.save({"x": Payload(marker)}, adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink(missing_ok=True)
    return ["evaluate", str(folder / "run")]


def as_adapter(folder: Path) -> Path:
    """The run's exported folder, as if it held an adapter."""
    model = folder / "run" / "model"
    settings = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], "base_model_name_or_path": "x"}
    (model / "adapter_config.json").write_text(json.dumps(settings))
    (model / "adapter_model.safetensors").write_bytes(b"")
    return model


def edit_config(folder: Path, old: str, new: str) -> None:
    file = folder / "run" / "config.yaml"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


@artefact("")
def run_folder_that_names_an_objective_for_evaluate(folder: Path, marker: Path) -> list[str]:
    edit_config(folder, "objective: sft", f"objective: {module(folder, marker)}:objective")
    return ["evaluate", str(folder / "run")]


@artefact("loads code that only this file names")
def run_folder_that_names_an_adapter(folder: Path, marker: Path) -> list[str]:
    edit_config(folder, "adapter: auto", f"adapter: {{name: '{module(folder, marker)}:rows'}}")
    return ["evaluate", str(folder / "run")]


@artefact("loads code that only this file names")
def run_folder_that_names_a_verifier(folder: Path, marker: Path) -> list[str]:
    edit_config(folder, "verifier: null", f"verifier: '{module(folder, marker)}:verify'")
    return ["evaluate", str(folder / "run"), "evaluate.max_new_tokens=2"]


@artefact("holds a run with objective")
def run_folder_that_names_an_objective_for_train(folder: Path, marker: Path) -> list[str]:
    edit_config(folder, "objective: sft", f"objective: {module(folder, marker)}:objective")
    return unfinished(folder)


@artefact("loads code that only this file names")
def manifest_that_names_an_objective(folder: Path, marker: Path) -> list[str]:
    file = folder / "run" / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["config"]["objective"] = {"name": f"{module(folder, marker)}:objective"}
    file.write_text(json.dumps(manifest))
    return ["train", "--replay", str(folder / "run"), f"output={folder}/again"]


@artefact("not readable as YAML")
def config_with_a_tag(folder: Path, marker: Path) -> list[str]:
    (folder / "evil.yaml").write_text(f"objective: !!python/object/apply:os.system ['touch {marker}']\n")
    return ["train", str(folder / "evil.yaml")]


@artefact("interpolations are not read here")
def config_with_an_interpolation(folder: Path, marker: Path) -> list[str]:
    return ["train", str(folder / "config.yaml"), "output=${oc.env:HOME}"]


@artefact("is no setting")
def config_with_a_target(folder: Path, marker: Path) -> list[str]:
    return ["train", str(folder / "config.yaml"), "model._target_=os.system", f"model.command=touch {marker}"]


@artefact("")
def rows_that_look_like_code(folder: Path, marker: Path) -> list[str]:
    """Text is text: a template, a reduce protocol and a dunder in a row are trained on as they stand."""
    texts = [f"__import__('os').system('touch {marker}')", "{{ ''.__class__.__mro__ }}", "!!python/name:os.system"]
    rows = [{"prompt": text[:20], "completion": text[:20], "__class__": "os.system"} for text in texts * 4]
    (folder / "evil.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    adapter = "data.adapter=prompt_completion"
    return ["train", str(folder / "config.yaml"), f"data.path={folder}/evil.jsonl", adapter, f"output={folder}/other"]


@artefact("evil.pkl")
def data_that_is_a_pickle(folder: Path, marker: Path) -> list[str]:
    (folder / "evil.pkl").write_bytes(pickle.dumps(Payload(marker)))
    return ["train", str(folder / "config.yaml"), f"data.path={folder}/evil.pkl", f"output={folder}/other"]


@artefact("")
def dataset_folder_with_a_script(folder: Path, marker: Path) -> list[str]:
    """A loading script beside the rows is none of ours."""
    rows = folder / "rows"
    rows.mkdir()
    shutil.copy(folder / "rollouts.jsonl", rows / "train.jsonl")
    module(rows, marker, "rows.py")
    return ["train", str(folder / "config.yaml"), f"data.path={rows}", f"output={folder}/other"]
