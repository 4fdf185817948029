"""systemd's own checks of the units in examples/, without a running systemd."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest
from doc_pages import ROOT

from qmpballoon.config.environment import Surroundings
from qmpballoon.config.reader import parse

EXAMPLES: Final = ROOT / "examples"
UNITS: Final = ("qmpballoon.service", "vm@.service")
WORST: Final = 2.0  # exposure, of 10

with_systemd: Final = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed"
)


def analyze(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["systemd-analyze", *arguments], capture_output=True, text=True, timeout=60, check=False
    )


def exposure(unit: Path) -> float:
    done = analyze("security", "--no-pager", "--offline=true", unit)
    found = re.search(r"Overall exposure level for \S+: ([0-9.]+)", done.stdout)
    assert found, done.stderr
    return float(found[1])


@with_systemd
@pytest.mark.parametrize("name", UNITS)
def test_a_unit_is_not_much_exposed(name: str) -> None:
    assert exposure(EXAMPLES / name) <= WORST


@with_systemd
def test_a_unit_that_is_not_confined_is_found(tmp_path: Path) -> None:
    bare = tmp_path / "bare.service"
    bare.write_text("[Service]\nExecStart=/bin/true\n", encoding="utf-8")
    assert exposure(bare) > WORST


@with_systemd
@pytest.mark.parametrize("name", UNITS)
def test_systemd_understands_every_line_of_a_unit(name: str, tmp_path: Path) -> None:
    text = (EXAMPLES / name).read_text(encoding="utf-8")
    # The programs need not be installed here.
    text = re.sub(r"^ExecStart=\S+", f"ExecStart={sys.executable}", text, flags=re.MULTILINE)
    unit = tmp_path / name.replace("@", "@web1")
    unit.write_text(text, encoding="utf-8")
    done = analyze("verify", "--man=no", unit)
    assert [line for line in done.stderr.splitlines() if unit.name in line] == []
    assert done.returncode == 0, done.stderr


def test_the_packaged_configuration_is_valid() -> None:
    here = Surroundings("edge-7", "/var/lib/qmpballoon", ("/run/qmpballoon/*.qmp",))
    text = (EXAMPLES / "agent-local.toml").read_text(encoding="utf-8")
    parsed = parse(text, "agent.toml", surroundings=here)
    assert parsed.agent.control == "/run/qmpballoon/agent.sock"
    parse(
        re.sub(r"^# (?=\[mqtt|url|username)", "", text, flags=re.MULTILINE),
        "agent.toml",
        surroundings=Surroundings(here.host, here.state_dir, here.sockets, "/run/credentials/mqtt-password"),
    )
