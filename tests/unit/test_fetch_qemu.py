"""The script that brings other QEMUs: what it does without a network."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "fetch-qemu"
NO_MIRROR = "file:/nonexistent/debian"


def fetch(*names: str, cache: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "QEMU_CACHE": str(cache), "DEBIAN_MIRROR": NO_MIRROR}
    return subprocess.run(
        [SCRIPT, *names], env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def fetched(cache: Path, name: str, version: str) -> Path:
    """Put a program that says this version where the script puts a QEMU."""
    directory = cache / name / "bin"
    directory.mkdir(parents=True)
    program = directory / "qemu-system-x86_64"
    program.write_text(f"#!/bin/sh\necho 'QEMU emulator version {version} (Debian 1:{version}+ds-1)'\n")
    program.chmod(0o755)
    return directory


@pytest.mark.parametrize("names", [(), ("9.9",), ("10.0", "9.9"), ("10",)])
def test_unknown_arguments_print_the_usage(names: tuple[str, ...], tmp_path: Path) -> None:
    done = fetch(*names, cache=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "usage: scripts/fetch-qemu {5.2|10.0|11.1|all}...\n"


def test_what_is_there_is_not_fetched_again(tmp_path: Path) -> None:
    versions = {"5.2": "5.2.0", "10.0": "10.0.13", "11.1": "11.1.3"}
    directories = [fetched(tmp_path, name, version) for name, version in versions.items()]
    done = fetch("all", cache=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == [str(directory) for directory in directories]


@pytest.mark.parametrize("version", ["11.2.0", "11.10.0"])
def test_another_version_than_requested_is_an_error(version: str, tmp_path: Path) -> None:
    directory = fetched(tmp_path, "11.1", version)
    done = fetch("11.1", cache=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"{directory}\n")
    assert f"the QEMU of trixie-backports is {version} now, not 11.1" in done.stderr


def test_a_qemu_that_does_not_start_is_an_error(tmp_path: Path) -> None:
    (fetched(tmp_path, "5.2", "5.2.0") / "qemu-system-x86_64").write_text("#!/bin/sh\nexit 1\n")
    done = fetch("5.2", cache=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert f"removed that directory: {tmp_path / '5.2'}" in done.stderr


def test_a_partial_download_is_removed_and_a_failure_leaves_nothing(tmp_path: Path) -> None:
    half = tmp_path / "5.2.unfinished" / "bin"
    half.mkdir(parents=True)
    (half / "qemu-system-x86_64").touch()
    done = fetch("5.2", cache=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert NO_MIRROR in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["5.2.lock"]
