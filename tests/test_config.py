"""Settings: what is accepted, what is refused, and with which sentence."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from rwft.config import MAX_CONFIG_BYTES, Config, as_dict, load_config, resolve, to_yaml
from rwft.errors import ConfigError, ObjectiveError, UserError

LEAST: dict[str, Any] = {"model": {"path": "m"}, "data": {"path": "rows.jsonl"}}
ONE_OF_MODEL = "expected one of `path` (a folder or Hub name) and `config` (an architecture)"


BAD_YAML = "override '%s': not readable as YAML"
MEND = "; close every bracket, and quote text that holds one: key='{name: \"a[0]\"}'"


def refusal(content: dict[str, Any], *overrides: str) -> str:
    """The one line that refuses it."""
    with pytest.raises(UserError) as caught:
        resolve(content, overrides, "run.yaml")
    assert caught.value.exit_status == 2
    message = str(caught.value)
    assert "\n" not in message
    return message


def with_(section: str, **values: Any) -> dict[str, Any]:
    return {**LEAST, section: {**LEAST.get(section, {}), **values}}


def test_defaults_are_the_documented_ones() -> None:
    config = resolve(LEAST)
    assert config.objective == "sft"
    assert (config.train.steps, config.train.epochs) == (None, 1.0)
    assert (config.train.normalize, config.train.lr, config.train.clip) == ("token", 1e-5, 1.0)
    assert (config.model.dtype, config.data.adapter, config.output) == ("float32", "auto", "runs/rwft")


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("train.lr=1e-5", "train.lr", 1e-5),
        ("train.lr=2", "train.lr", 2.0),
        ("train.steps=7", "train.steps", 7),
        ("train.betas=[0.8,0.9]", "train.betas", (0.8, 0.9)),
        ("model.gradient_checkpointing=true", "model.gradient_checkpointing", True),
        ("model.revision=123", "model.revision", "123"),
        ("data.credit.baseline=0.5", "data.credit.baseline", "0.5"),
        ("data.credit.clip=null", "data.credit.clip", None),
        ("data.path=[a.jsonl,b.jsonl]", "data.path", ["a.jsonl", "b.jsonl"]),
        ("objective=dft", "objective", "dft"),
        ("objective=[dft,{name: rwr, temperature: 0.5}]", "objective", ["dft", {"name": "rwr", "temperature": 0.5}]),
        ("model.lora.rank=4", "model.lora.rank", 4),
    ],
)
def test_overrides_reach_their_setting(override: str, path: str, value: object) -> None:
    found: Any = resolve(LEAST, [override])
    for name in path.split("."):
        found = getattr(found, name)
    assert found == value
    assert type(found) is type(value)


def test_an_override_wins_over_the_file_and_keeps_its_neighbours() -> None:
    config = resolve(with_("train", lr=0.1, seed=5), ["train.lr=0.2"])
    assert (config.train.lr, config.train.seed) == (0.2, 5)


def test_a_product_may_be_written_as_it_is_printed() -> None:
    config = resolve(
        {**LEAST, "compare": {"objectives": ["sft", "dft * filtered_bc"]}}, ["objective=dft * rwr(clip=3)"]
    )
    assert config.objective == ["dft", {"name": "rwr", "clip": 3}]
    assert config.compare.objectives == ["sft", ["dft", "filtered_bc"]]


def test_a_hyperparameter_can_be_overridden_alone() -> None:
    content = {**LEAST, "objective": {"name": "rwr", "temperature": 2.0, "clip": 7.0}}
    assert resolve(content, ["objective.temperature=0.5"]).objective == {"name": "rwr", "temperature": 0.5, "clip": 7.0}


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"model": {"path": "m"}}, "run.yaml: 'data' is missing; a config needs at least `model` and `data`"),
        ({"data": {"path": "d"}}, "run.yaml: 'model' is missing; a config needs at least `model` and `data`"),
        ({**LEAST, "lr": 1.0}, "run.yaml: 'lr' is no setting; did you mean 'train.lr'?"),
        (with_("train", learning_rate=1), "run.yaml: 'train.learning_rate' is no setting; it is 'train.lr' here"),
        ({**LEAST, "num_train_epochs": 1}, "run.yaml: 'num_train_epochs' is no setting; it is 'train.epochs' here"),
        (with_("train", batchsize=3), "run.yaml: 'train.batchsize' is no setting; did you mean 'train.batch_size'?"),
        ({**LEAST, "train": 3}, "run.yaml: train: found 3, expected a mapping of settings"),
        (with_("train", betas=[0.9]), "run.yaml: train.betas: found [0.9], expected a list of 2 numbers"),
        (with_("train", betas=[0.9, 1.0]), "train.betas: found (0.9, 1.0), expected two numbers in [0, 1)"),
        (with_("train", steps=1.5), "run.yaml: train.steps: found 1.5, expected a whole number or null"),
        (with_("train", steps=True), "run.yaml: train.steps: found True, expected a whole number or null"),
        (with_("train", lr=True), "run.yaml: train.lr: found True, expected a number"),
        (with_("train", lr="abc"), "run.yaml: train.lr: found 'abc', expected a number"),
        (with_("data", max_length="1024"), "run.yaml: data.max_length: found '1024', expected a whole number"),
        (
            with_("train", lr="1e-5"),
            "run.yaml: train.lr: found '1e-5', expected a number "
            "(write 1.0e-5, not 1e-5: YAML reads the latter as text)",
        ),
        (
            with_("model", gradient_checkpointing=1),
            "run.yaml: model.gradient_checkpointing: found 1, expected true or false",
        ),
        (
            with_("model", gradient_checkpointing=True, compile=True),
            "model.compile: found true beside model.gradient_checkpointing; expected one of them, since torch "
            "was seen to compute other gradients with both (GPT-2, torch 2.13)",
        ),
        (with_("train", steps=3, epochs=1.0), "train: found both `steps` and `epochs`, expected one of them"),
        (with_("train", normalize="tokens"), "train.normalize: 'tokens' is unknown; did you mean 'token'?"),
        (with_("train", schedule="cosin"), "train.schedule: 'cosin' is unknown; did you mean 'cosine'?"),
        (with_("train", head="fused"), "train.head: 'fused' is unknown; known: auto, sampled, two_pass"),
        (
            with_("train", keep=1),
            "train.keep: found 1, expected a whole number >= 2, so that one survives a damaged newest",
        ),
        (with_("train", lr=0.0), "train.lr: found 0.0, expected a finite number > 0"),
        (with_("train", lr=float("inf")), "train.lr: found inf, expected a finite number > 0"),
        (with_("train", lr=float("nan")), "train.lr: found nan, expected a finite number > 0"),
        (with_("train", clip=-1.0), "train.clip: found -1.0, expected a finite number >= 0"),
        (with_("train", epochs=0.0), "train.epochs: found 0.0, expected a finite number > 0"),
        (with_("train", steps=0), "train.steps: found 0, expected a whole number >= 1"),
        (with_("train", seed=-1), "train.seed: found -1, expected a whole number >= 0"),
        (with_("train", warmup=1.5), "train.warmup: found 1.5, expected a fraction in [0, 1]"),
        (with_("model", dtype="bf16"), "model.dtype: 'bf16' is unknown; did you mean 'bfloat16'?"),
        (
            with_("model", attention="flash"),
            "model.attention: 'flash' is unknown; known: auto, eager, flash_attention_2, sdpa",
        ),
        (with_("model", lora={"rank": 0}), "model.lora.rank: found 0, expected a whole number >= 1"),
        (with_("model", lora={"dropout": 1.0}), "model.lora.dropout: found 1.0, expected a number in [0, 1)"),
        (with_("model", config={"model_type": "llama"}), f"model: found both, {ONE_OF_MODEL}"),
        ({**LEAST, "model": {}}, f"model: found neither, {ONE_OF_MODEL}"),
        (
            {**LEAST, "model": {"config": {"model_type": "llama"}}},
            "model.tokenizer: needed with model.config; for instance `tokenizer: characters`",
        ),
        (with_("data", task="t"), "data: found both, expected one of `path` and `task`"),
        ({**LEAST, "data": {}}, "data: found neither, expected one of `path` and `task`"),
        (with_("data", eval_fraction=1.0), "data.eval_fraction: found 1.0, expected a number in [0, 1)"),
        (with_("data", max_length=1), "data.max_length: found 1, expected a whole number >= 2"),
        (with_("data", limit=0), "data.limit: found 0, expected a whole number >= 1"),
        (with_("data", overlong="truncate"), "data.overlong: 'truncate' is unknown; did you mean 'truncate_prompt'?"),
        (
            with_("data", credit={"baseline": "avg"}),
            "data.credit.baseline: 'avg' is unknown; known: group_mean, leave_one_out, length_weighted, mean, none, "
            "value",
        ),
        (with_("data", credit={"clip": 0.0}), "data.credit.clip: found 0.0, expected a finite number > 0"),
        (with_("data", credit={"discount": 1.1}), "data.credit.discount: found 1.1, expected a number in [0, 1]"),
        (with_("evaluate", samples=0), "evaluate.samples: found 0, expected a whole number >= 1"),
        (with_("evaluate", temperature=-1.0), "evaluate.temperature: found -1.0, expected a finite number >= 0"),
        (
            with_("data", path="${oc.env:HOME}"),
            "run.yaml: data.path: interpolations are not read here; write the value itself",
        ),
        (
            with_("data", path=["a", "${b}"]),
            "run.yaml: data.path[1]: interpolations are not read here; write the value itself",
        ),
        ({**LEAST, "objective": []}, "objective: an empty list; name at least one, for instance 'sft'"),
        (
            {**LEAST, "objective": {"temperature": 1.0}},
            "objective: found {'temperature': 1.0}; expected a name or a mapping such as {name: rwr, temperature: 0.5}",
        ),
        (
            {**LEAST, "objective": {"name": "rwr", "temprature": 2.0}},
            "objective 'rwr': 'temprature' is no setting of it; did you mean 'temperature'?",
        ),
        (
            {**LEAST, "objective": {"name": "rwr", "temperature": 0}},
            "objective 'rwr': temperature: found 0.0, expected a number > 0",
        ),
    ],
)
def test_a_mistake_is_named_with_its_key_and_what_was_expected(content: dict[str, Any], sentence: str) -> None:
    assert refusal(content) == sentence


def test_an_unknown_objective_offers_the_nearest() -> None:
    with pytest.raises(ObjectiveError, match=r"^objective 'rwrr' is unknown; did you mean 'rwr'\?"):
        resolve({**LEAST, "objective": "rwrr"})


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("train.lr", "override 'train.lr': expected key=value, such as train.lr=1e-5"),
        ("train.lr=", "run.yaml: train.lr: found None, expected a number"),
        ("lr=1", "run.yaml: 'lr' is no setting; did you mean 'train.lr'?"),
        ("model=foo", "run.yaml: model: found 'foo', expected a mapping of settings"),
        (
            "data.adapter={name: scored",
            f"{BAD_YAML % 'data.adapter={name: scored'}: did not find expected ',' or '}}'{MEND}",
        ),
        ("objective=[dft", f"{BAD_YAML % 'objective=[dft'}: did not find expected ',' or ']'{MEND}"),
        (
            "data.adapter={completion: response.choices[0].message.content}",
            f"{BAD_YAML % 'data.adapter={completion: response.choices[0].message.content}'}: did not find expected "
            f"',' or '}}'{MEND}",
        ),
        ("[=1", f"{BAD_YAML % '[=1'}: list index out of range{MEND}"),
        ("output=${x}", "run.yaml: output: interpolations are not read here; write the value itself"),
    ],
)
def test_a_mistaken_override_is_named(override: str, sentence: str) -> None:
    assert refusal(LEAST, override) == sentence


def written(folder: Path, content: str | bytes) -> Path:
    file = folder / "run.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


@pytest.mark.parametrize(
    ("content", "pattern"),
    [
        ("- a", r": found a list, expected a mapping of settings$"),
        ("", r": 'model' is missing"),
        ("a: [1", r": not readable as YAML: .*line \d+, column \d+"),
        ("model: {path: a}\nmodel: {path: b}", r": not readable as YAML: .*duplicate key model"),
        ("a: !!python/object/apply:os.system ['true']", r": not readable as YAML: .*tag"),
        (b"\xff\xfe\x00a", r": not readable as YAML: .*decode byte 0xff"),
        ("#" * (MAX_CONFIG_BYTES + 1), rf": larger than {MAX_CONFIG_BYTES} bytes; this is no config$"),
    ],
)
def test_a_file_that_is_no_config_is_refused_with_its_name(tmp_path: Path, content: str | bytes, pattern: str) -> None:
    file = written(tmp_path, content)
    with pytest.raises(ConfigError, match=pattern) as caught:
        load_config(file)
    assert str(caught.value).startswith(str(file))
    assert "\n" not in str(caught.value)


def test_a_file_that_does_not_exist_is_named(tmp_path: Path) -> None:
    missing = tmp_path / "none.yaml"
    with pytest.raises(ConfigError) as caught:
        load_config(missing)
    assert str(caught.value) == f"config '{missing}': no such file"


def test_yaml_exponents_without_a_point_are_numbers(tmp_path: Path) -> None:
    file = written(tmp_path, "model: {path: m}\ndata: {path: d}\ntrain: {lr: 1e-5}")
    assert load_config(file).train.lr == 1e-5


@pytest.mark.parametrize("overrides", [[], ["train.steps=3"], ["model.lora.rank=2"], ["train.betas=[0.5,0.6]"]])
def test_the_resolved_config_round_trips(tmp_path: Path, overrides: list[str]) -> None:
    content = {**LEAST, "objective": ["dft", {"name": "rwr", "temperature": 0.5}]}
    config = resolve(content, overrides)
    assert resolve(as_dict(config)) == config
    assert load_config(written(tmp_path, to_yaml(config))) == config


def test_the_written_config_holds_every_default() -> None:
    plain = yaml.safe_load(to_yaml(resolve(LEAST)))
    assert set(plain) == {field.name for field in dataclasses.fields(Config)}
    assert plain["train"]["betas"] == [0.9, 0.95]
    assert plain["data"]["credit"]["singleton"] == "zero"


def test_a_config_cannot_be_changed() -> None:
    config = resolve(LEAST)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.output = "elsewhere"  # type: ignore[misc]
