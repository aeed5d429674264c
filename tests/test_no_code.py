"""No code from data: nothing found in a checkpoint, a model, a run's folder or a row is ever executed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rwft import loop
from rwft.cli import main
from rwft.config import to_yaml
from rwft.errors import PolicyError
from rwft.loop import train
from tests.tampered.artefacts import ARTEFACTS, Payload
from tests.tiny import tiny


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two steps in `run/`, its data, and its config."""
    folder = tmp_path_factory.mktemp("finished")
    config = tiny(folder, "train.steps=2", "train.save_every=1", "model.dtype=float32")
    train(config)
    (folder / "config.yaml").write_text(to_yaml(config))
    return folder


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    """A copy of it, to be tampered with; all paths in it are its own."""
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    for file in [copy / "config.yaml", copy / "run" / "config.yaml", copy / "run" / "manifest.json"]:
        file.write_text(file.read_text().replace(str(finished), str(copy)))
    return copy


def run_command(words: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr("sys.argv", ["rwft", *words])
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.mark.parametrize("name", ARTEFACTS)
def test_an_artefact_is_refused_or_ignored_and_never_executed(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    build, expected = ARTEFACTS[name]
    marker = folder / "EXECUTED"
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))  # a module that an artefact names could be imported from here
    status = run_command(build(folder, marker), monkeypatch)
    error = capsys.readouterr().err
    assert not marker.exists()
    if expected:
        assert status in (1, 2, 3), error
        assert re.search(expected, error), error
        assert "Traceback" not in error
    else:
        assert status == 0, error


def test_there_are_enough_artefacts_and_their_payloads_work(tmp_path: Path) -> None:
    """Without this, a payload that cannot run would pass for one that was stopped."""
    import pickle

    from tests.tampered.artefacts import module

    assert len(ARTEFACTS) >= 20
    pickle.loads(pickle.dumps(Payload(tmp_path / "one")))
    module(tmp_path, tmp_path / "two")
    subprocess.run([sys.executable, "-c", "import evil"], cwd=tmp_path, check=True, timeout=60)
    assert (tmp_path / "one").exists()
    assert (tmp_path / "two").exists()


def test_code_that_the_command_line_names_is_loaded(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The way out that the refusal offers."""
    file = folder / "verify.py"
    file.write_text(f"open({str(folder / 'LOADED')!r}, 'w').close()\ndef verify(completion):\n    return True\n")
    words = ["evaluate", str(folder / "run"), f"evaluate.verifier={file}:verify", "evaluate.max_new_tokens=2"]
    assert run_command(words, monkeypatch) == 0, capsys.readouterr().err
    assert (folder / "LOADED").exists()


@pytest.mark.parametrize("key", ["auto_map", "_attn_implementation"])
def test_a_model_of_the_hub_is_looked_at_before_it_is_loaded(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    asked: list[str] = []

    def config(path: str, **settings: object) -> tuple[dict[str, object], dict[str, object]]:
        asked.append(path)
        return {"model_type": "llama", key: "evil/kernel"}, {}

    monkeypatch.setattr(transformers.PretrainedConfig, "get_config_dict", config)
    for loader in (transformers.AutoModelForCausalLM, transformers.AutoTokenizer):
        monkeypatch.setattr(loader, "from_pretrained", lambda *a, **k: pytest.fail("it was loaded"))
    with pytest.raises(PolicyError, match=r"names code|names a kernel"):
        train(tiny(tmp_path, "model.config=null", "model.path=some/model", "model.tokenizer=null"))
    assert asked == ["some/model"]


AUDITED = """
import json, sys
from pathlib import Path
from rwft.cli import main
import rwft.loop, rwft.evaluate, rwft.replay
from rwft.config import load_config, to_yaml
from dataclasses import replace

folder = Path(sys.argv[1])
kind = sys.argv[2]
WATCHED = ("pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty", "subprocess.Popen",
           "socket.connect")
seen, armed = [], False


def hook(event, arguments):
    if armed and event in WATCHED:
        seen.append([event, repr(arguments)[:200]])


sys.addaudithook(hook)


def command(*words):
    sys.argv = ["rwft", *words]
    try:
        main()
    except SystemExit as end:
        assert not end.code, end.code


def go():
    right = rwft.loop.optimiser_step

    def dies(training, step, meter):
        if step == 2:
            raise KeyboardInterrupt
        right(training, step, meter)

    rwft.loop.optimiser_step = dies
    try:
        rwft.loop.train(load_config(folder / "config.yaml"))
    except KeyboardInterrupt:
        pass
    rwft.loop.optimiser_step = right
    command("train", str(folder / "config.yaml"))
    command("evaluate", str(folder / "run"), "evaluate.verifier={name: regex, pattern: a}", "evaluate.max_new_tokens=4")
    command("train", "--replay", str(folder / "run"), f"output={folder}/again")


command("train", str(folder / "warm.yaml"))  # lazy imports happen here, before the hook is armed
command("evaluate", str(folder / "warm"), "evaluate.verifier={name: regex, pattern: a}", "evaluate.max_new_tokens=4")
armed = True
if kind == "bites":
    import io, os, pickle, socket, subprocess
    pickle.loads(pickle.dumps(Path("x")))
    os.system("true")
    subprocess.run(["true"])
    try:
        socket.create_connection(("127.0.0.1", 9), timeout=1)
    except OSError:
        pass
else:
    go()
armed = False
(folder / "seen.json").write_text(json.dumps(seen))
"""


def audited(folder: Path, root: Path, kind: str, *overrides: str) -> list[str]:
    """Names of the audit events that a run, its resumption, evaluation and replay gave rise to."""
    for name in ("run", "warm"):
        # a reference that is read, dropout, snapshots: as many parts as there are
        config = tiny(folder, "train.save_every=1", *overrides, objective=["iw_sft", "psft"], name=name)
        (folder / f"{'config' if name == 'run' else name}.yaml").write_text(to_yaml(config))
    (folder / "audited.py").write_text(AUDITED)
    words = [sys.executable, str(folder / "audited.py"), str(folder), kind]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "seen.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
def test_train_resume_evaluate_export_and_replay_start_nothing(lora: bool, tmp_path: Path, root: Path) -> None:
    overrides = ("model.lora.rank=2", "model.dtype=float32") if lora else ()
    assert audited(tmp_path, root, "run", *overrides) == []
    assert (tmp_path / "again" / "model").is_dir()


@pytest.mark.slow
def test_the_audit_sees_what_it_should(tmp_path: Path, root: Path) -> None:
    events = {event for event, _ in audited(tmp_path, root, "bites")}
    assert {"pickle.find_class", "os.system", "subprocess.Popen", "socket.connect"} <= events


def test_a_run_of_the_same_config_goes_on_without_naming_its_objective_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An objective of the user's own is named by the config that the user passes: nothing else is asked for."""
    (tmp_path / "mine.py").write_text("def one(logp):\n    return logp * 0 + 1\n")
    config = tiny(tmp_path, "train.save_every=1", objective=f"{tmp_path}/mine.py:one")
    right = loop.optimiser_step

    def dies(training: object, step: int, meter: object) -> None:
        if step == 2:
            raise KeyboardInterrupt
        right(training, step, meter)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "optimiser_step", dies)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    monkeypatch.setattr(loop, "optimiser_step", right)
    assert train(config).state == "done"
