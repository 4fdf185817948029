"""The recipes of docs/testing.md and docs/one-vm.md, run word by word on real QEMUs."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from qmpballoon.lab import image

DOCS = Path(__file__).parents[2] / "docs"
RUN_S = 300.0


@pytest.fixture
def environment(guest_image: image.GuestImage) -> dict[str, str]:
    """Return the environment in which the recipes find their guest and the program."""
    return {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "KERNEL": str(guest_image.kernel),
        "INITRD": str(guest_image.initramfs),
    }


@pytest.fixture
def run(sockets_dir: Path, environment: dict[str, str]) -> Callable[..., str]:
    """Run a program where the recipes find their guest; return what it prints."""

    def run(*command: str) -> str:
        done = subprocess.run(
            command, cwd=sockets_dir, env=environment, capture_output=True, text=True, timeout=RUN_S
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def recipe(heading: str, page: str = "testing.md") -> str:
    """Return the first block of code below a heading."""
    section = (DOCS / page).read_text().split(f"\n## {heading}\n")[1]
    found = re.search(r"```[a-z]+\n(.*?)```", section, re.DOTALL)
    assert found is not None
    return found[1]


def test_the_recipe_for_the_shell(run: Callable[..., str]) -> None:
    printed = run("sh", "-c", recipe("Shell"))
    [actual] = re.findall(r'"actual": (\d+)', printed)
    assert abs(int(actual) - 192 * 2**20) <= 2**20
    assert "vm: 192 MiB -> 256 MiB reached" in printed


def test_the_recipe_for_python(run: Callable[..., str]) -> None:
    ready, squeezed, back = run(sys.executable, "-c", recipe("Python")).splitlines()
    assert ready.startswith("vm: ")
    available = [int(re.findall(r"(\d+) (?:of \d+ )?bytes", line)[0]) for line in (ready, squeezed, back)]
    assert available[1] < min(available[0], available[2]) - 48 * 2**20


def test_the_recipe_for_pytest(run: Callable[..., str], sockets_dir: Path) -> None:
    (sockets_dir / "test_recipe.py").write_text(recipe("pytest"))
    assert "2 passed" in run(
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:asyncio"
    )


def test_the_recipe_for_a_container(sockets_dir: Path, environment: dict[str, str]) -> None:
    log = sockets_dir / "log"
    with log.open("wb") as output:
        words = ["sh", "-c", recipe("In a container", "one-vm.md")]
        entry = subprocess.Popen(
            words, cwd=sockets_dir, env=environment, stderr=output, start_new_session=True
        )
    try:
        deadline_s = time.monotonic() + RUN_S
        while "vm-online" not in log.read_text():
            assert time.monotonic() < deadline_s, log.read_text()
            assert entry.poll() is None, log.read_text()
            time.sleep(0.01)
        online = re.search(r"vm-online vm=vm life=(\d+)-", log.read_text())
        assert online is not None
        entry.terminate()
        deadline_s = time.monotonic() + RUN_S
        while entry.poll() is None and time.monotonic() < deadline_s:
            try:
                entry.wait(timeout=5)
            except subprocess.TimeoutExpired:  # QEMU 7.2 may hang in its end; a second signal ends it
                os.kill(int(online[1]), signal.SIGTERM)
        assert entry.returncode == 128 + signal.SIGTERM
    finally:
        with contextlib.suppress(ProcessLookupError):  # all have ended, unless the test failed
            os.killpg(entry.pid, signal.SIGKILL)
        entry.wait()
    ended = log.read_text().partition("qemu-ended vm=vm")[2]
    assert "agent-stopped" in ended
