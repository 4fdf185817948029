"""Two minutes of the soak find nothing, and an interrupted one leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
START_S = 120.0  # of a soak on a busy machine


@contextmanager
def soaking(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Run a soak with the tree of these tests."""
    command = [sys.executable, str(ROOT / "scripts" / "soak.py"), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("PYTHONASYNCIODEBUG", None)  # it doubles the time of everything
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.timeout(600)
def test_two_minutes_of_faults_break_no_invariant(tmp_path: Path) -> None:
    report = tmp_path / "soak.json"
    with soaking(
        "--minutes", "2", "--vms", "50", "--real", "2", "--seed", "1", "--json", str(report)
    ) as process:
        output, _ = process.communicate(timeout=540)
    assert process.returncode == 0, output
    found = json.loads(report.read_text())
    assert found["violations"] == []
    assert found["counts"]["requests"] > 500
    assert found["counts"]["balloon commands"] > 50
    assert found["counts"]["calms"] >= 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_soak_leaves_no_process_and_no_file(number: signal.Signals) -> None:
    with soaking("--minutes", "2", "--vms", "5", "--real", "1", "--seed", "1") as process:
        assert process.stdout is not None
        directory = None
        for line in process.stdout:
            words = line.split()
            if words[1:2] == ["directory"]:
                directory = Path(words[2])
            if words[1:2] == ["started"]:
                break
        process.send_signal(number)
        output, _ = process.communicate(timeout=START_S)
    assert process.returncode == 130, output
    assert directory is not None
    assert not directory.exists()
    assert programs_in(directory) == []


def programs_in(directory: Path) -> list[bytes]:
    """Return the command lines that name the directory."""
    found = []
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = process.read_bytes()
        except OSError:  # it has just ended
            continue
        if os.fsencode(directory) in words:
            found.append(words)
    return found
