"""The tutorial, typed command by command: real guests, the agent and a broker."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[2] / "docs/tutorial.md").read_text(encoding="utf-8")
PATIENCE_S = 300
SEEN = (
    r"^first-web: 192 MiB -> 110 MiB reached in ",
    r"^refused, with exit code 1$",
    r"^first-web: 110 MiB -> 192 MiB reached in ",
    r"^first-db: no findings ",
    r"^first-web: actual is .* \(through the agent tutorial\)$",
    r"grew .* \((emergency|thin|grow)\)",
    r"^first-db: actual is .* \(through the agent tutorial\)$",
    r"^tutorial  vm first-web ",
    r"^tutorial/first-web  target 100 MiB ",
    r"^cleared qmpballoon/tutorial/host$",
)


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory with a short path; QEMUs whose process ids are in it are ended."""
    made = Path(tempfile.mkdtemp(prefix="qb-", dir="/tmp"))
    yield made
    for file in made.glob("*.pid"):
        with suppress(ProcessLookupError):
            os.kill(int(file.read_text()), signal.SIGKILL)
    shutil.rmtree(made, ignore_errors=True)


def commands(directory: Path) -> str:
    """Return the commands of the page after the installation, with a directory and a port of their own."""
    blocks = "".join(re.findall(r"^```sh\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE))
    _, _, typed = blocks.partition("qmpballoon --version\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    typed = re.sub(r"\b(web|db)\b", r"first-\1", typed)  # agents of other tests may have VMs of these names
    return typed.replace("/tmp/first", str(directory)).replace("18830", str(port))


def test_every_command_does_what_the_page_says(directory: Path) -> None:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    del environment["QMPBALLOON_CONTROL"]  # the commands find the agent by themselves
    environment.pop("PYTHONASYNCIODEBUG", None)
    with tempfile.TemporaryFile("w+", encoding="utf-8") as output:  # a pipe would stay open with the agent
        shell = subprocess.Popen(
            ["bash", "-e", "-x", "-c", commands(directory)],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            shell.wait(PATIENCE_S)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(shell.pid, signal.SIGKILL)
            shell.wait(PATIENCE_S)
            output.seek(0)
            printed = output.read()
            print(printed)  # shown if the test fails
    assert shell.returncode == 0, printed
    missing = [each for each in SEEN if not re.search(each, printed, flags=re.MULTILINE)]
    assert not missing, printed
    assert not directory.exists()
