"""The examples run, and show what they say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path


def test_a_hand_written_loop_prefers_the_good_answers(root: Path) -> None:
    done = subprocess.run(
        [sys.executable, "examples/hand_written_loop.py"],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    last = done.stdout.strip().splitlines()[-1]
    good, bad = map(float, re.findall(r"-?\d+\.\d+", last))
    assert good > -1.0 > bad + 1.0


def test_a_trainer_with_a_reward_column_prefers_the_good_answers(root: Path) -> None:
    done = subprocess.run(
        [sys.executable, "examples/trainer.py"],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    last = done.stdout.strip().splitlines()[-1]
    good, bad = map(float, re.findall(r"-?\d+\.\d+", last))
    assert good > -1.0 > bad + 1.0
