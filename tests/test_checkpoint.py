"""Checkpoints: every bit comes back, damage is found and named, and no code is loaded."""

from __future__ import annotations

import ast
import json
import logging
import math
import os
import random
import stat
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import rwft.checkpoint
from rwft.checkpoint import CheckpointStore, join_optimizer, split_optimizer, verify, write_atomic
from rwft.durable import write_parts
from rwft.errors import CheckpointError, SaveError

FILES = ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"]


def groups(step: int) -> dict[str, dict[str, Tensor]]:
    """Tensors that tell their step."""
    return {
        "model": {"weight": torch.arange(300, dtype=torch.float32) + step, "bias": torch.full((7,), float(step))},
        "optimizer": {"state.0.step": torch.tensor(float(step)), "state.0.exp_avg": torch.full((50,), 0.1 * step)},
    }


def save(store: CheckpointStore, *steps: int) -> None:
    for step in steps:
        store.save(step, groups(step), {"step": step, "note": "ü"}, {"config": "c1", "data": "d1"})


def loaded(folder: Path) -> tuple[int, list[str]]:
    """The step that a new process would go on from, checked against its own content, and what it was warned of."""
    store = CheckpointStore(folder)
    found = store.load()
    assert found is not None
    checkpoint, tensors, state = found
    assert state == {"step": checkpoint.step, "note": "ü"}
    assert same(tensors, groups(checkpoint.step))
    return checkpoint.step, store.warnings


def same(left: Any, right: Any) -> bool:
    """Equal in every bit and type, tensors by their bytes."""
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return left.dtype == right.dtype and left.shape == right.shape and raw(left) == raw(right)
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[k], right[k]) for k in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, float):
        return struct.pack("<d", left) == struct.pack("<d", right)
    return left == right


def raw(tensor: Tensor) -> bytes:
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run" / "checkpoints"


@pytest.fixture
def two(folder: Path) -> Path:
    """Valid checkpoints of steps 10 and 20."""
    save(CheckpointStore(folder), 10, 20)
    return folder


# -- what is written comes back


TENSORS = {
    "float32": torch.tensor([1.5, -0.0, math.inf, math.nan, 1e-45]),
    "float64": torch.tensor([math.pi, -1e-308], dtype=torch.float64),
    "bfloat16": torch.arange(-5, 5).to(torch.bfloat16) / 3,
    "float16": torch.tensor([65504.0, 6e-8], dtype=torch.float16),
    "int64": torch.tensor([2**62 + 1, -(2**63)]),
    "bool": torch.tensor([True, False, True]),
    "scalar": torch.tensor(3.0),
    "empty": torch.empty(0, 4),
    "transposed": torch.arange(6.0).reshape(2, 3).t(),
    "every other": torch.arange(10.0)[::2],
    "parameter": torch.nn.Parameter(torch.ones(2)),
    "conjugated": torch.view_as_complex(torch.tensor([[1.0, 2.0]])).conj(),
    "negated": torch._neg_view(torch.tensor([4.0])),
    "nan with a payload": torch.tensor([0x7FC12345], dtype=torch.int32).view(torch.float32),
}


@pytest.mark.parametrize("name", TENSORS)
def test_every_bit_of_a_tensor_comes_back(folder: Path, name: str) -> None:
    expected = TENSORS[name].detach().resolve_conj().resolve_neg()
    CheckpointStore(folder).save(1, {"model": {name: TENSORS[name]}}, {}, {})
    found = CheckpointStore(folder).load()
    assert found is not None
    assert same(found[1], {"model": {name: expected}})


def test_the_file_holds_the_bytes_that_the_format_prescribes(folder: Path) -> None:
    store = CheckpointStore(folder)
    checkpoint = store.save(3, {"model": {"x": torch.tensor([1.0, -2.0])}}, {"a": [1]}, {"config": "c"})
    content = (checkpoint.folder / "model.safetensors").read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    entry = json.loads(content[8 : 8 + size])["x"]
    start, end = entry["data_offsets"]
    assert (entry["dtype"], entry["shape"]) == ("F32", [2])
    assert content[8 + size + start : 8 + size + end] == struct.pack("<2f", 1.0, -2.0)
    assert json.loads((checkpoint.folder / "state.json").read_text()) == {"a": [1]}


def test_the_manifest_is_what_sha256sum_says(two: Path) -> None:
    folder = two / "step_00000020"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["step"], manifest["fingerprints"]) == (20, {"config": "c1", "data": "d1"})
    assert sorted(manifest["files"]) == sorted(set(FILES) - {"manifest.json"})
    for name, entry in manifest["files"].items():
        told = subprocess.run(["sha256sum", folder / name], capture_output=True, text=True, check=True).stdout.split()[
            0
        ]
        assert entry == {"size": (folder / name).stat().st_size, "sha256": told}


def test_a_group_may_be_empty(folder: Path) -> None:
    CheckpointStore(folder).save(0, {"model": {"x": torch.ones(1)}, "optimizer": {}}, {}, {})
    found = CheckpointStore(folder).load()
    assert found is not None
    assert (found[0].step, found[1]["optimizer"]) == (0, {})


def test_what_was_loaded_does_not_change_with_the_file(two: Path) -> None:
    found = CheckpointStore(two).load()
    assert found is not None
    file = two / "step_00000020" / "model.safetensors"
    with open(file, "r+b") as content:
        content.seek(-64, os.SEEK_END)
        content.write(b"\xff" * 64)
    assert same(found[1], groups(20))


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_have_the_rights_that_the_umask_gives(folder: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        save(CheckpointStore(folder), 1)
    finally:
        os.umask(before)
    files = [*(folder / "step_00000001").iterdir(), folder / "latest.json"]
    assert len(files) == 5
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o666 & ~umask}


# -- optimisers


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1),
    "adam-amsgrad": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True),
    "adam-tensor-lr": lambda p: torch.optim.Adam(p, lr=torch.tensor(1e-2), capturable=False, foreach=False),
    "sgd-nesterov": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "rmsprop-centered": lambda p: torch.optim.RMSprop(p, lr=1e-2, centered=True, momentum=0.5),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "lbfgs": lambda p: torch.optim.LBFGS(list(p), lr=1e-2, max_iter=2),
}


def steps_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer, first: int, count: int) -> None:
    for step in range(first, first + count):
        inputs = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))

        def closure(inputs: Tensor = inputs) -> Tensor:
            optimizer.zero_grad()
            loss = model(inputs).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)


def small_model() -> torch.nn.Module:
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_goes_on_bit_by_bit(folder: Path, name: str) -> None:
    straight = small_model()
    optimizer = OPTIMIZERS[name](straight.parameters())
    steps_of(straight, optimizer, 0, 3)
    tensors, rest = split_optimizer(optimizer.state_dict())
    weights = {key: p.detach() for key, p in straight.named_parameters()}
    CheckpointStore(folder).save(3, {"model": weights, "optimizer": tensors}, {"optimizer": rest}, {})

    found = CheckpointStore(folder).load()
    assert found is not None
    resumed = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
    resumed.load_state_dict(found[1]["model"])
    state = join_optimizer(found[1]["optimizer"], found[2]["optimizer"])
    assert same(state, optimizer.state_dict())
    again = OPTIMIZERS[name](resumed.parameters())
    again.load_state_dict(state)
    steps_of(straight, optimizer, 3, 5)
    steps_of(resumed, again, 3, 5)
    assert same([p.detach() for p in resumed.parameters()], [p.detach() for p in straight.parameters()])
    assert same(again.state_dict(), optimizer.state_dict())


def test_an_optimizer_without_its_state_goes_elsewhere() -> None:
    """The test above can fail: leave the state out, and the weights differ."""
    straight, resumed = small_model(), small_model()
    optimizer = OPTIMIZERS["adamw"](straight.parameters())
    steps_of(straight, optimizer, 0, 3)
    resumed.load_state_dict(straight.state_dict())
    steps_of(straight, optimizer, 3, 1)
    steps_of(resumed, OPTIMIZERS["adamw"](resumed.parameters()), 3, 1)
    assert not same([p.detach() for p in resumed.parameters()], [p.detach() for p in straight.parameters()])


def test_the_rest_of_an_optimizer_is_json_and_keeps_every_type() -> None:
    state = {
        "state": {0: {"step": 3, "x": torch.ones(1)}, "0": {"y": None}},
        "param_groups": [
            {"betas": (0.9, 0.95), "lr": math.nan, "max": math.inf, "low": -math.inf, "on": True, "name": "a"}
        ],
        "a.b": torch.zeros(1),
        "a": {"b": torch.full((1,), 2.0)},
        "shapes": [(), [], {}, -0.0],
    }
    tensors, rest = split_optimizer(state)
    assert sorted(tensors) == ["a.b", "a.b'", "state.0.x"]
    joined = join_optimizer(tensors, json.loads(json.dumps(rest, allow_nan=False)))
    assert same(joined, state)
    assert list(joined) == list(state)


def test_a_tensor_met_twice_is_stored_once_and_is_one_again() -> None:
    rate = torch.tensor(0.1)
    tensors, rest = split_optimizer({"param_groups": [{"lr": rate}, {"lr": rate}]})
    assert list(tensors) == ["param_groups.0.lr"]
    joined = join_optimizer(tensors, rest)
    assert joined["param_groups"][0]["lr"] is joined["param_groups"][1]["lr"]


def test_an_optimizer_that_cannot_be_split_names_the_place() -> None:
    with pytest.raises(SaveError, match=r"^optimizer: param_groups\.0\.kind: found a dtype, expected"):
        split_optimizer({"param_groups": [{"kind": torch.float32}]})


def test_parts_that_do_not_fit_are_refused() -> None:
    tensors, rest = split_optimizer({"state": {0: {"x": torch.ones(1)}}})
    with pytest.raises(CheckpointError, match=r"do not fit: KeyError\('state\.0\.x'\)"):
        join_optimizer({}, rest)
    with pytest.raises(CheckpointError, match="nothing refers to the tensor 'extra'"):
        join_optimizer({**tensors, "extra": torch.ones(1)}, rest)
    with pytest.raises(CheckpointError, match="do not fit"):
        join_optimizer(tensors, {"call": "os.system"})


# -- what cannot be saved is refused before anything is written


def test_tensors_in_the_same_memory_are_refused(folder: Path) -> None:
    weight = torch.ones(4, 4)
    for other in (weight, weight.t(), weight[2:], weight.reshape(-1)[15:]):
        with pytest.raises(SaveError, match=r"'embed' and 'head' share memory|'head' and 'embed' share memory"):
            CheckpointStore(folder).save(1, {"model": {"embed": weight, "head": other}}, {}, {})
    assert not folder.exists()


def test_neighbours_in_one_memory_are_apart(folder: Path) -> None:
    both = torch.arange(4.0)
    CheckpointStore(folder).save(1, {"model": {"a": both[:2], "b": both[2:]}}, {}, {})
    found = CheckpointStore(folder).load()
    assert found is not None
    assert same(found[1]["model"], {"a": torch.tensor([0.0, 1.0]), "b": torch.tensor([2.0, 3.0])})


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"model": {"x": torch.ones(2, device="meta")}}, "'x': found a Tensor .*meta.*, expected a plain dense tensor"),
        ({"model": {"x": torch.ones(2).to_sparse()}}, "'x': found a Tensor .*sparse.*, expected a plain dense tensor"),
        ({"model": {"__metadata__": torch.ones(2)}}, "no tensor can be called '__metadata__'"),
        ({"../model": {"x": torch.ones(2)}}, r"cannot have a file '\.\./model\.safetensors'"),
    ],
)
def test_what_the_format_has_no_room_for_is_refused(folder: Path, tensors: Any, said: str) -> None:
    with pytest.raises(SaveError, match=said):
        CheckpointStore(folder).save(1, tensors, {}, {})
    assert not folder.exists()


def test_a_tensor_of_another_class_is_refused(folder: Path) -> None:
    class Sharded(Tensor):
        pass

    with pytest.raises(SaveError, match=r"'x': found a Sharded .*; gather it first"):
        CheckpointStore(folder).save(1, {"model": {"x": torch.ones(2).as_subclass(Sharded)}}, {}, {})


@pytest.mark.parametrize("value", [math.nan, (1, 2), {1: "a"}, [{"x": (1,)}], torch.ones(1), {1, 2}])
def test_state_that_would_come_back_changed_is_refused(folder: Path, value: Any) -> None:
    with pytest.raises(SaveError, match=r"step_00000001/state\.json: 'bad'.*expected plain JSON"):
        CheckpointStore(folder).save(1, {}, {"good": [1, "a", None, {"b": 1.5}], "bad": value}, {})
    assert not folder.exists()


def test_a_checkpoint_is_never_overwritten(two: Path) -> None:
    store = CheckpointStore(two)
    before = (two / "step_00000020" / "manifest.json").read_bytes()
    with pytest.raises(
        SaveError, match="step_00000020: is valid, and never overwritten; found step 20, expected more than 20"
    ):
        save(store, 20)
    with pytest.raises(SaveError, match="found step 15, expected more than 20"):
        save(store, 15)
    assert (two / "step_00000020" / "manifest.json").read_bytes() == before
    assert sorted(os.listdir(two)) == ["latest.json", "step_00000010", "step_00000020"]


def test_a_save_asks_for_more_room_than_it_needs(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = (300 + 7 + 1 + 50) * 4 + len(json.dumps({"step": 30, "note": "ü"}))
    wanted = int(1.2 * size)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": wanted - 1}))
    with pytest.raises(
        SaveError, match=rf"step_00000030: not saved: {wanted} bytes are needed .*, {wanted - 1} bytes are free"
    ):
        save(CheckpointStore(two), 30)
    assert loaded(two) == (20, [])
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": wanted}))
    save(CheckpointStore(two), 30)


def test_an_interrupt_is_no_failed_save(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(rwft.checkpoint, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(CheckpointStore(two), 30)
    assert sorted(os.listdir(two)) == ["latest.json", "step_00000010", "step_00000020"]


def test_an_error_that_is_no_exception_is_a_failed_save(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rust's panics reach Python as BaseException."""

    class PanicException(BaseException):
        pass

    def panic(*_: Any) -> None:
        raise PanicException("two\nlines")

    monkeypatch.setattr(rwft.checkpoint, "save_file", panic)
    with pytest.raises(
        SaveError, match=r"step_00000030: not saved: PanicException: two lines; \d+ bytes are needed, \d+ bytes"
    ):
        save(CheckpointStore(two), 30)
    assert sorted(os.listdir(two)) == ["latest.json", "step_00000010", "step_00000020"]


# -- what is kept


def test_the_newest_are_kept_after_a_save_has_succeeded(folder: Path) -> None:
    store = CheckpointStore(folder, keep=3)
    save(store, 1, 2, 30, 100_000_000)
    assert store.steps() == [2, 30, 100_000_000]
    assert sorted(os.listdir(folder)) == ["latest.json", "step_00000002", "step_00000030", "step_100000000"]
    assert json.loads((folder / "latest.json").read_text())["step"] == 100_000_000
    assert loaded(folder) == (100_000_000, [])


def test_fewer_than_two_are_never_kept(folder: Path) -> None:
    with pytest.raises(ValueError, match="keep: found 1, expected a whole number >= 2"):
        CheckpointStore(folder, keep=1)


def test_a_sweep_deletes_what_a_dead_run_left_and_nothing_else(two: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("x")
    (two / ".tmp-step_00000030").mkdir()
    (two / ".tmp-step_00000030" / "model.safetensors").write_text("half")
    (two / ".trash-step_00000005").mkdir()
    (two / ".tmp-latest.json-7-0").write_text("{")
    (two / ".tmp-link").symlink_to(outside)
    (two / ".bad-step_00000001").mkdir()
    kept = [".bad-step_00000001", "latest.json", "step_00000010", "step_00000020"]
    removed = CheckpointStore(two).sweep()
    assert removed == [".tmp-latest.json-7-0", ".tmp-link", ".tmp-step_00000030", ".trash-step_00000005"]
    assert sorted(os.listdir(two)) == kept
    assert (outside / "precious").exists()
    assert CheckpointStore(two / "nowhere").sweep() == []


def test_a_leftover_that_was_not_swept_does_not_end_up_in_a_checkpoint(two: Path) -> None:
    (two / ".tmp-step_00000030").mkdir()
    (two / ".tmp-step_00000030" / "old.safetensors").write_text("half")
    save(CheckpointStore(two), 30)
    assert sorted(os.listdir(two / "step_00000030")) == sorted(FILES)
    assert loaded(two) == (30, [])


def test_names_that_are_almost_a_step_are_no_checkpoint(two: Path) -> None:
    for name in ("step_30", "step_000000030", "step_0000003x", "xstep_00000030", "step_00000030 ", "step_٠٠٠٠٠٠٣٠"):
        (two / name).mkdir()
    assert CheckpointStore(two).steps() == [10, 20]


# -- what is loaded


def test_nothing_saved_is_none(folder: Path) -> None:
    assert CheckpointStore(folder).load() is None
    folder.mkdir(parents=True)
    (folder / ".tmp-step_00000010").mkdir()
    assert CheckpointStore(folder).load() is None


def test_the_newest_is_loaded_with_its_fingerprints(two: Path) -> None:
    store = CheckpointStore(two)
    found = store.load({"config": "c1"})
    assert found is not None
    assert (found[0].step, found[0].folder, store.warnings) == (20, two / "step_00000020", [])
    assert found[0].manifest["fingerprints"] == {"config": "c1", "data": "d1"}


@pytest.mark.parametrize(("name", "value"), [("data", "d2"), ("tokenizer", "t1")])
def test_another_fingerprint_is_refused_not_passed_over(two: Path, name: str, value: str) -> None:
    with pytest.raises(
        CheckpointError, match=rf"step_00000020: '{name}' has changed since .* found '{value}', expected"
    ):
        CheckpointStore(two).load({"config": "c1", name: value})


def test_a_folder_that_cannot_be_read_is_no_fresh_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="expected a folder of checkpoints"):
        CheckpointStore(tmp_path / "file").load()


# -- damage


def flip(file: Path, bit: int) -> None:
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


def require_fallback(folder: Path, name: str) -> None:
    """Step 20 is passed over for step 10, with a warning that names the step and the file."""
    step, warnings = loaded(folder)
    assert step == 10
    assert len(warnings) == 1
    assert "step 20" in warnings[0]
    assert str(folder / "step_00000020" / name) in warnings[0]


def every_flip_is_found(folder: Path, name: str, count: int) -> None:
    file = folder / "step_00000020" / name
    good = file.read_bytes()
    bits = [0, len(good) * 8 - 1, *random.Random(name).sample(range(len(good) * 8), count)]
    for bit in bits:
        flip(file, bit)
        require_fallback(folder, name)
        file.write_bytes(good)
    assert loaded(folder) == (20, [])


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_found(two: Path, name: str) -> None:
    every_flip_is_found(two, name, 6)


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_any_flipped_bit_is_found(two: Path, name: str) -> None:
    every_flip_is_found(two, name, 64)


@pytest.mark.parametrize("name", FILES)
def test_truncation_zeros_and_absence_are_found(two: Path, name: str) -> None:
    file = two / "step_00000020" / name
    good = file.read_bytes()
    for size in sorted({0, 1, 7, 8, len(good) // 4, len(good) // 2, len(good) - 8, len(good) - 1}):
        file.write_bytes(good[:size])
        require_fallback(two, name)
    for bad in (bytes(len(good)), good + b"\0", good + b"\n", bytes(4096)):
        file.write_bytes(bad)
        require_fallback(two, name)
    file.unlink()
    require_fallback(two, name)
    file.symlink_to(two / "step_00000010" / name)
    require_fallback(two, name)
    file.unlink()
    file.write_bytes(good)
    elsewhere = two.parent / "elsewhere"
    file.rename(elsewhere)
    file.symlink_to(elsewhere)  # the very same content, behind a link
    require_fallback(two, name)
    file.unlink()
    file.mkdir()
    require_fallback(two, name)


def test_a_file_that_nobody_listed_is_found(two: Path) -> None:
    (two / "step_00000020" / "extra.safetensors").write_bytes(b"")
    require_fallback(two, "extra.safetensors")


def test_a_link_in_place_of_a_checkpoint_is_found(two: Path) -> None:
    (two / "step_00000020").rename(two.parent / "moved")
    (two / "step_00000020").symlink_to(two.parent / "moved")
    require_fallback(two, "")


def test_a_checkpoint_under_the_name_of_another_step_is_found(two: Path) -> None:
    (two / "step_00000020").rename(two / "step_00000030")
    store = CheckpointStore(two)
    found = store.load()
    assert found is not None
    assert found[0].step == 10
    assert "manifest.json: is of step 20, expected 30" in store.warnings[0]


def forge(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """A manifest changed by somebody who knows how to sign it."""
    file = folder / "step_00000020" / "manifest.json"
    manifest = json.loads(file.read_text())
    del manifest["digest"]
    change(manifest)
    file.write_bytes(rwft.checkpoint._signed(manifest))


@pytest.mark.parametrize(
    "name", ["../state.json", "..", "/etc/passwd", "a/b.safetensors", "x.pkl", "model.safetensors\n"]
)
def test_a_manifest_cannot_name_anything_outside(two: Path, name: str) -> None:
    forge(two, lambda manifest: manifest["files"].update({name: manifest["files"]["state.json"]}))
    require_fallback(two, "manifest.json")
    assert repr(name) in loaded(two)[1][0]


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.pop("files"),
        lambda m: m.update(files=[]),
        lambda m: m["files"].update({"state.json": None}),
        lambda m: m["files"]["state.json"].pop("sha256"),
        lambda m: m.pop("step"),
        lambda m: m.pop("format"),
    ],
)
def test_a_manifest_with_other_fields_is_found(two: Path, change: Any) -> None:
    forge(two, change)
    require_fallback(two, "manifest.json")


@pytest.mark.parametrize("content", [b"[]", b"null", b'"x"', b"[" * 100_000, b"\xff\xfe", b'{"a": NaN}'])
def test_a_manifest_that_is_none_is_found(two: Path, content: bytes) -> None:
    (two / "step_00000020" / "manifest.json").write_bytes(content)
    require_fallback(two, "manifest.json")


def test_a_manifest_without_the_state_is_found(two: Path) -> None:
    forge(two, lambda manifest: manifest["files"].pop("state.json"))
    (two / "step_00000020" / "state.json").unlink()
    require_fallback(two, "state.json")


@pytest.mark.parametrize(("name", "content"), [("model.safetensors", b"\x80\x04pickle"), ("state.json", b"{")])
def test_a_signed_file_that_cannot_be_read_is_passed_over(two: Path, name: str, content: bytes) -> None:
    (two / "step_00000020" / name).write_bytes(content)
    forge(two, lambda m: m["files"].update({name: rwft.checkpoint.describe(two / "step_00000020" / name)}))
    require_fallback(two, "")


def test_a_later_format_is_refused_not_passed_over(two: Path) -> None:
    forge(two, lambda manifest: manifest.update(format=2))
    with pytest.raises(
        CheckpointError, match=r"manifest\.json: found format 2, expected 1; load it with what wrote it"
    ):
        CheckpointStore(two).load()


def test_none_valid_is_no_fresh_start(two: Path, caplog: pytest.LogCaptureFixture) -> None:
    flip(two / "step_00000020" / "model.safetensors", 1000)
    (two / "step_00000010" / "state.json").unlink()
    with caplog.at_level(logging.WARNING, "rwft"), pytest.raises(CheckpointError) as error:
        CheckpointStore(two).load()
    assert error.value.exit_status == 3
    assert "\n" not in str(error.value)
    for part in ("no valid checkpoint is left", "step 20", "model.safetensors", "step 10", "state.json: is missing"):
        assert part in str(error.value)
    assert [record.name for record in caplog.records] == ["rwft", "rwft"]


def test_checkpoints_that_are_gone_are_no_fresh_start(two: Path) -> None:
    for step in (10, 20):
        (two / f"step_000000{step}").rename(two.parent / str(step))
    with pytest.raises(CheckpointError, match=r"latest\.json names step 20, which is gone"):
        CheckpointStore(two).load()


def test_a_newest_that_is_gone_is_said(two: Path) -> None:
    (two / "step_00000020").rename(two.parent / "gone")
    step, warnings = loaded(two)
    assert (step, warnings) == (10, [f"{two / 'latest.json'} names step 20, which is gone"])


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"\xff", b'{"step": "x"}'])
def test_the_hint_is_only_a_hint(two: Path, content: bytes) -> None:
    (two / "latest.json").write_bytes(content)
    step, warnings = loaded(two)
    assert step == 20
    assert len(warnings) == 1
    assert "latest.json cannot be read" in warnings[0]


def test_a_damaged_checkpoint_does_not_stand_in_the_way(two: Path) -> None:
    """Neither its step number, nor its place among those that are kept."""
    flip(two / "step_00000020" / "model.safetensors", 1000)
    store = CheckpointStore(two)
    assert store.load() is not None
    save(store, 12, 15, 20)
    assert store.steps() == [15, 20]
    assert loaded(two) == (20, [])
    aside = [name for name in os.listdir(two) if name.startswith(".bad-step_00000020-")]
    assert len(aside) == 1
    assert any("is damaged, and now in" in warning for warning in store.warnings)


def test_a_damaged_checkpoint_does_not_count_among_those_kept(two: Path) -> None:
    flip(two / "step_00000020" / "model.safetensors", 1000)
    store = CheckpointStore(two)
    assert store.load() is not None
    save(store, 30)
    assert store.steps() == [10, 30]
    for step in (10, 30):
        verify(two / f"step_000000{step}", step)


# -- no code


def test_no_module_of_pickle_is_named() -> None:
    for module in ("checkpoint", "durable", "optimizer_state"):
        tree = ast.parse((Path(rwft.checkpoint.__file__).parent / f"{module}.py").read_text())
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        imported = {
            a.name for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom)) for a in node.names
        }
        attributes = {
            f"{n.value.id}.{n.attr}"
            for n in ast.walk(tree)
            if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name)
        }
        assert not (names | imported) & {
            "pickle",
            "cPickle",
            "dill",
            "cloudpickle",
            "marshal",
            "shelve",
            "eval",
            "exec",
        }
        assert not attributes & {"torch.load", "torch.save"}


AUDITED = """
import pickle, sys, torch
from pathlib import Path
from rwft.checkpoint import CheckpointStore, split_optimizer, join_optimizer
events = []
watched = {"pickle.find_class", "os.system", "subprocess.Popen", "socket.connect", "os.exec", "ctypes.dlopen"}
model = torch.nn.Linear(3, 3)
optimizer = torch.optim.AdamW(model.parameters())
model(torch.ones(1, 3)).sum().backward()
optimizer.step()
sys.addaudithook(lambda event, arguments: events.append(event) if event in watched else None)
tensors, rest = split_optimizer(optimizer.state_dict())
store = CheckpointStore(Path(sys.argv[1]))
for step in (1, 2, 3):
    store.save(step, {"model": model.state_dict(), "optimizer": tensors}, {"optimizer": rest}, {"data": "d"})
_, tensors, state = store.load({"data": "d"})
optimizer.load_state_dict(join_optimizer(tensors["optimizer"], state["optimizer"]))
assert events == [], events
pickle.loads(pickle.dumps(Path))
assert events == ["pickle.find_class"], events
print("heard")
"""


def test_saving_and_loading_unpickles_nothing(folder: Path) -> None:
    """The last lines of the script show that the hook hears a pickle."""
    done = subprocess.run([sys.executable, "-c", AUDITED, folder], capture_output=True, text=True, check=False)
    assert done.stdout == "heard\n", done.stderr


# -- small files


@pytest.mark.parametrize("data", ["text: ü\n", b"\x00bytes"])
def test_a_small_file_is_replaced_whole(tmp_path: Path, data: str | bytes) -> None:
    file = tmp_path / "status.json"
    file.write_text("old")
    write_atomic(file, data)
    assert file.read_bytes() == (data if isinstance(data, bytes) else "text: ü\n".encode())
    assert [p.name for p in tmp_path.iterdir() if p.name != "home"] == ["status.json"]


def test_a_small_file_that_cannot_be_written_says_where(tmp_path: Path) -> None:
    with pytest.raises(SaveError, match=r"nowhere/x\.json: not written: .*No such file.*; 2 bytes are needed"):
        write_atomic(tmp_path / "nowhere" / "x.json", "{}")


def test_a_file_of_parts_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "credit.json"
    write_parts(file, iter(["text: ", "", "ü\n"]))
    assert file.read_bytes() == "text: ü\n".encode()

    def breaks() -> Iterator[str]:
        yield "half"
        raise KeyError("the other half")

    with pytest.raises(KeyError, match="the other half"):
        write_parts(file, breaks())
    assert file.read_bytes() == "text: ü\n".encode()
    assert [p.name for p in tmp_path.iterdir() if p.name != "home"] == ["credit.json"]
    with pytest.raises(SaveError, match=r"nowhere/x\.json: not written: .*No such file or directory"):
        write_parts(tmp_path / "nowhere" / "x.json", ["{}"])
