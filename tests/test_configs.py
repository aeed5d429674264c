"""Every config that ships is read, bound to what it names, and says how it is run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from rwft.config import as_dict, load_config, resolve
from rwft.regularizers import build_regularizers
from rwft.weighting import bind_factor, build_objective

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
RECIPES = [file for file in CONFIGS if not file.name.startswith("demo")]
ACCELERATE = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))
READS = {
    "sft": set(),
    "dft": {"logp"},
    "filtered_bc": {"reward"},
    "dft_filtered": {"logp", "reward"},
    "iw_sft": {"logp", "ref_logp", "mask"},
    "iw_sft_filtered": {"logp", "ref_logp", "mask", "reward"},
    "rwr": {"reward"},
    "awr": {"advantage"},
    "grpo": {"advantage"},
    "tis": {"logp", "behavior_logp", "advantage"},
    "asft": {"logp"},
    "gem": set(),
    "label_smoothing": set(),
    "quark": set(),
    "rloo": {"advantage"},
    "dr_grpo": {"advantage"},
    "opo": {"advantage"},
    "reinforce_pp": {"logp", "behavior_logp", "advantage"},
    "dapo": {"logp", "behavior_logp", "advantage"},
    "gspo": {"logp", "behavior_logp", "advantage", "mask"},
    "iw_sft_control": {"logp", "ref_logp", "mask"},
    "a_lol": {"logp", "ref_logp", "advantage", "mask"},
    "dro": {"logp", "ref_logp", "advantage", "mask"},
    "topr": {"logp", "behavior_logp", "reward", "mask"},
    "kto": {"logp", "ref_logp", "reward", "kl_running", "mask"},
    "dpo": {"logp", "ref_logp", "reward", "group", "mask"},
    "rpo": {"logp", "ref_logp", "reward", "group", "mask"},
    "psft": {"logp", "old_logp"},
    "gold_s": {"old_logp", "ref_logp", "mask"},
    "rho1": {"logp", "ref_logp", "mask"},
    "token_cleaning": {"ref_logp", "aux_logp", "mask"},
    "implicit_reward": {"logp", "aux_logp", "ref_logp", "mask"},
}
# (baseline, scale) of the credit, normaliser, regularizers with coefficients: what the paper is, beside its objective
PAPERS = {
    "asft": ("none", "none", "token", {"forward_kl": 0.05}),
    "gem": ("none", "none", "token", {"gem": 1.0}),
    "label_smoothing": ("none", "none", "token", {"label_smoothing": 0.1}),
    "quark": ("none", "none", "token", {"reverse_kl": 0.05, "entropy": 0.06}),
    "rloo": ("leave_one_out", "none", "sequence_sum", {}),
    "grpo": ("group_mean", "group_std", "sequence", {}),
    "dr_grpo": ("group_mean", "none", "sequence_sum", {}),
    "opo": ("length_weighted", "none", "sequence_sum", {}),
    "dapo": ("group_mean", "group_std", "token", {}),
    "gspo": ("group_mean", "group_std", "sequence", {}),
    "reinforce_pp": ("mean", "std", "token", {}),
    "a_lol": ("value", "none", "sequence_sum", {}),
    "dro": ("value", "none", "sequence_sum", {}),
    "topr": ("none", "none", "sequence", {}),
    "iw_sft_control": ("none", "none", "weight", {}),
    "rho1": ("none", "none", "weight", {}),
    "token_cleaning": ("none", "none", "weight", {}),
    "dpo": ("none", "none", "sequence_sum", {}),
    "kto": ("none", "none", "sequence_sum", {}),
}


def name(path: Path) -> str:
    return path.stem


def header(file: Path) -> str:
    """The comment that a file opens with."""
    lines = file.read_text().splitlines()
    return "\n".join(line for line in lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))])


def test_the_recipes_are_all_here() -> None:
    assert READS.keys() <= {file.stem for file in RECIPES}
    assert {file.stem for file in ACCELERATE} == {"ddp", "deepspeed_zero2", "deepspeed_zero3", "fsdp2"}


@pytest.mark.parametrize("file", CONFIGS, ids=name)
def test_a_config_loads_and_round_trips(file: Path) -> None:
    config = load_config(file)
    assert resolve(as_dict(config)) == config


@pytest.mark.parametrize("file", RECIPES, ids=name)
def test_a_recipe_says_what_when_and_how(file: Path) -> None:
    comment = header(file)
    assert "\n# When: " in comment
    assert re.search(rf"\n# Run:  (rwft|accelerate launch .* cli\.py) train configs/{file.name}", comment)
    assert load_config(file).output == f"runs/{file.stem}"


@pytest.mark.parametrize("file", CONFIGS, ids=name)
def test_a_config_names_an_adapter_that_exists_with_settings_that_it_has(file: Path) -> None:
    from rwft.data.adapters import adapter

    spec = load_config(file).data.adapter
    if spec != "auto":
        bind_factor(adapter, spec)


@pytest.mark.parametrize("file", RECIPES, ids=name)
def test_a_dataset_of_the_hub_is_named_with_its_split(file: Path) -> None:
    from rwft.data.sources import origins

    for origin in origins(load_config(file).data.path):
        assert origin.path.endswith(".jsonl") or origin.split


@pytest.mark.parametrize(("stem", "reads"), READS.items())
def test_a_recipe_reads_what_its_formula_needs(stem: str, reads: set[str]) -> None:
    objective = build_objective(load_config(ROOT / "configs" / f"{stem}.yaml").objective)
    assert objective.reads == reads


@pytest.mark.parametrize(("stem", "paper"), PAPERS.items())
def test_a_recipe_has_its_papers_credit_normaliser_and_penalties(stem: str, paper: tuple[Any, ...]) -> None:
    config = load_config(ROOT / "configs" / f"{stem}.yaml")
    penalties = {penalty.name: penalty.coef for penalty in build_regularizers(config.regularize)}
    credit = config.data.credit
    assert (credit.baseline, credit.scale, config.train.normalize, penalties) == paper


def test_numbers_of_the_papers() -> None:
    """Where a recipe is its paper's by its numbers."""
    settings = {stem: load_config(ROOT / "configs" / f"{stem}.yaml") for stem in ("dapo", "iw_sft_control", "psft")}
    assert settings["dapo"].objective == {"name": "ppo_clip", "low": 0.2, "high": 0.28}
    assert settings["iw_sft_control"].objective == {"name": "iw_sft", "temperature": 10.0, "clip": 1000.0}
    assert settings["psft"].train.snapshot_every == 8


@pytest.mark.parametrize("file", RECIPES, ids=name)
def test_a_recipe_of_frozen_models_names_those_that_have_no_default(file: Path) -> None:
    config = load_config(file)
    reads = build_objective(config.objective).reads
    assert ("aux_logp" in reads) == (config.auxiliary.path is not None)
    assert config.reference.path is None or reads & {"ref_logp", "ref_nll_median", "ref_nll_z"}


@pytest.mark.parametrize("file", RECIPES, ids=name)
def test_commands_in_a_recipe_use_files_and_settings_that_exist(file: Path) -> None:
    for command in re.findall(r"# Run:  (.*)", header(file)):
        words = command.split()
        for path in (word for word in words if word.startswith("configs/") or word == "cli.py"):
            assert (ROOT / path).is_file(), f"{file.name}: {path} does not exist"
        load_config(file, [word for word in words if re.fullmatch(r"[a-z_.]+=\S+", word)])


def launch_environment(file: Path) -> dict[str, str]:
    """What `accelerate launch --config_file` tells the processes that it starts."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    args = launch_command_parser().parse_args(["--config_file", str(file), "cli.py"])
    args, _, _ = _validate_launch_command(args)
    args.deepspeed_fields_from_accelerate_config = ""  # the launcher's own book-keeping
    return prepare_deepspeed_cmd_env(args)[1] if args.use_deepspeed else prepare_multi_gpu_env(args)


@pytest.mark.parametrize("file", ACCELERATE, ids=name)
def test_accelerate_reads_the_file_and_leaves_the_run_its_own_settings(file: Path) -> None:
    environment = launch_environment(file)
    assert "ACCELERATE_GRADIENT_ACCUMULATION_STEPS" not in environment
    assert environment["ACCELERATE_MIXED_PRECISION"] == "no"  # the run sets its own, from model.dtype
    given: dict[str, Any] = yaml.safe_load(file.read_text())
    for key, value in given.get("fsdp_config", {}).items():
        assert environment[key.upper()].lower() == str(value).lower(), key
    if "deepspeed_config" in given:
        stage = str(given["deepspeed_config"]["zero_stage"])
        assert environment["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == stage == file.stem[-1]


@pytest.mark.parametrize("file", ACCELERATE, ids=name)
def test_accelerate_knows_every_key(file: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    config = load_config_from_file(str(file))  # unknown keys of the top level raise
    known = {option.dest for option in launch_command_parser()._actions}
    for key in [*(config.fsdp_config or {}), *(config.deepspeed_config or {})]:
        assert key in known, f"{file.name}: {key}"


def test_fsdp2_is_the_second_version(monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate import FullyShardedDataParallelPlugin

    environment = launch_environment(ROOT / "configs" / "accelerate" / "fsdp2.yaml")
    for key in [key for key in environment if key.startswith("FSDP_")]:
        monkeypatch.setenv(key, environment[key])
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert type(plugin.cpu_offload).__name__ == "OffloadPolicy"  # the policy that offloads nothing
    assert plugin.state_dict_type.name == "FULL_STATE_DICT"
