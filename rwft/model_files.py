"""The files of a model, before a library reads them: what names code, kernels or pickled weights is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rwft.errors import PolicyError

KERNEL_KEYS = ("attn_implementation", "experts_implementation", "attn_implementation_internal")
CODE_KEYS = ("auto_map", "custom_pipelines", "trust_remote_code")
ADAPTER_CODE_KEYS = ("auto_mapping", "megatron_config")
CONFIGS = ("config.json", "generation_config.json", "tokenizer_config.json")


def is_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer and no model; refused is also what such a folder names of code."""
    if (folder / "config.json").exists() or not (folder / "tokenizer.json").is_file():
        return False
    _refuse_named_code(folder)
    return True


def check_model(path: str, revision: str | None) -> None:
    """Refuse what names code or kernels to fetch, before transformers reads it."""
    folder = Path(path).expanduser()
    if folder.exists():
        _check_folder(path, folder)
    elif path.count("/") > 1 or path.startswith((".", "/", "~")):
        raise PolicyError(f"model '{path}': no such folder")
    else:
        from transformers import PretrainedConfig

        try:
            config, _ = PretrainedConfig.get_config_dict(path, revision=revision)
        except (OSError, ValueError) as error:
            raise PolicyError(f"model '{path}': cannot be loaded: {' '.join(str(error).split())[:300]}") from None
        refuse_code(config, f"model '{path}'")


def _check_folder(path: str, folder: Path) -> None:
    """A local folder must hold a model."""
    if (folder / "adapter_config.json").exists():  # transformers would load whatever model that file names
        raise PolicyError(f"model '{path}': holds a LoRA adapter; give its base model, or export with model.lora.merge")
    if not (folder / "config.json").is_file():
        raise PolicyError(f"model '{path}': the folder has no config.json; expected a Hugging Face model folder")
    _refuse_named_code(folder)


def _refuse_named_code(folder: Path) -> None:
    for name in CONFIGS:
        if (folder / name).is_file():
            refuse_code(_read_json(folder / name), str(folder / name))


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise PolicyError(f"{file}: not JSON: {error}") from None
    if not isinstance(content, dict):
        raise PolicyError(f"{file}: found a {type(content).__name__}, expected an object")
    return content


def check_adapter(folder: Path) -> None:
    """Refuse a LoRA adapter with settings under which PEFT imports modules, or whose weights are no safetensors."""
    file = folder / "adapter_config.json"
    settings = _read_json(file)
    if settings.get("peft_type") != "LORA":
        raise PolicyError(f"{file}: peft_type: found {settings.get('peft_type')!r}, expected 'LORA'")
    for key in ADAPTER_CODE_KEYS:
        if settings.get(key):
            raise PolicyError(f"{file}: '{key}' makes PEFT import modules that it names; such adapters are not loaded")
    if not (folder / "adapter_model.safetensors").is_file():
        raise PolicyError(f"{folder}: has no adapter_model.safetensors; weights in other formats are not loaded")


def refuse_code(config: Mapping[str, Any], where: str) -> None:
    """Refuse settings that make a loader run code that came with the model."""
    for key, value in config.items():
        if key in CODE_KEYS:
            raise PolicyError(f"{where}: '{key}' names code that comes with the model; such models are not loaded")
        if key.endswith(KERNEL_KEYS) and isinstance(value, str) and "/" in value:
            raise PolicyError(f"{where}: '{key}: {value}' names a kernel to fetch; such models are not loaded")
        if isinstance(value, Mapping):
            refuse_code(value, f"{where}: {key}")
