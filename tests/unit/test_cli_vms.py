"""Which VMs typed words name, beside a running agent."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from qmpballoon.cli.vms import choose_from
from qmpballoon.control import Agents, AgentVm, RunningAgent
from qmpballoon.errors import Unreachable


def an_agent(*vms: AgentVm) -> Agents:
    return Agents((RunningAgent("/run/agent.sock", "edge-7", 1, vms),))


def test_a_glob_of_sockets_here_is_found_beside_an_agent_of_others(
    sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(sockets_dir)
    with socket.socket(socket.AF_UNIX) as monitor:
        monitor.bind("web.qmp")
        (found,) = choose_from(an_agent(AgentVm("db", "db", "/run/db.qmp", "ok")), ["*.qmp"]).vms
    assert (found.path, found.through) == ("web.qmp", None)


def test_a_glob_of_names_is_of_the_agents_vms(sockets_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(sockets_dir)
    agents = an_agent(AgentVm("db", "db", "/run/db.qmp", "ok"), AgentVm("web", "web", "/run/web.qmp", "ok"))
    (found,) = choose_from(agents, ["d*"]).vms
    assert (found.path, found.through) == ("/run/db.qmp", (agents.running[0], agents.running[0].vms[0]))
    with pytest.raises(Unreachable, match="no VM and no socket 'x\\*'"):
        choose_from(agents, ["x*"])
