"""The pytest plugin's fixtures take what the functions behind them take."""

from __future__ import annotations

from inspect import Parameter, signature

import pytest

import qmpballoon
from qmpballoon import sync
from qmpballoon.pytest_plugin import BalloonConnect, StartQemuVm


def parameters_of(function: object) -> list[tuple[str, object, object]]:
    assert callable(function)
    found = signature(function).parameters.values()
    return [(each.name, each.kind, each.default) for each in found if each.name != "self"]


def test_balloon_connect_takes_what_connect_takes(balloon_connect: BalloonConnect) -> None:
    expected = parameters_of(sync.connect)
    assert parameters_of(balloon_connect) == expected == parameters_of(BalloonConnect.__call__)


def test_qemu_vm_takes_what_start_takes() -> None:
    from qmpballoon.lab.vms import QemuVms

    def names(function: object) -> list[tuple[str, object]]:
        return [(name, kind) for name, kind, _ in parameters_of(function)]

    assert names(StartQemuVm.__call__) == names(QemuVms.start)
    assert ("command", Parameter.VAR_POSITIONAL) in names(QemuVms.start)


def test_another_machine_is_permitted_by_allow_remote(balloon_connect: BalloonConnect) -> None:
    address = "tcp:192.0.2.1:4444"  # of documents: RFC 5737
    with pytest.raises(qmpballoon.Unreachable, match="allow_remote=True"):
        balloon_connect(address, timeout_s=0.01)
    with pytest.raises(qmpballoon.Unreachable) as raised:
        balloon_connect(address, timeout_s=0.01, allow_remote=True)
    assert "--allow-remote" not in str(raised.value)
