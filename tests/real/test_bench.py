"""The benchmarks run to their end and clean up; their figures are not checked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, ROOT / "scripts" / script, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_a_quick_bench_has_all_figures() -> None:
    done = run("bench.py", "--quick", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(done.stdout)
    assert figures["failed"] == []
    assert [scene["vms"] for scene in figures["scenes"]] == [20]
    assert all(window["cost_us"] > 0 for window in figures["scenes"][0]["busy"]["agent"])
    assert [case["name"] for case in figures["neighbours"]] == ["alone", "5 mute", "5 stopped"]
    assert figures["tenth"]["attach"]["online"] == 10
    assert len(figures["latency"]) == 2


def test_bench_compare_removes_its_worktree_also_when_it_fails() -> None:
    done = run("bench_compare.py", "no-such-commit")
    assert (done.returncode, done.stdout) == (1, "")
    assert "no-such-commit" in done.stderr
    listed = subprocess.run(
        ["git", "-C", ROOT, "worktree", "list"], capture_output=True, text=True, timeout=60, check=False
    )
    assert "qmpballoon-base-" not in listed.stdout


def test_a_profile_names_functions_of_the_agent() -> None:
    done = run("bench_profile.py", "--vms", "5", "--seconds", "2", "--cumulative")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("5 of 5 VMs online, quiet: ")
    assert "qmpballoon/" in done.stdout
