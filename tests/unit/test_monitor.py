"""Opening a monitor's socket, and what the kernel tells of it."""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path

import pytest

from qmpballoon.errors import MonitorBusy, Unreachable
from qmpballoon.qmp import monitor as monitor_module
from qmpballoon.qmp.monitor import open_monitor, socket_table, was_accepted


def listening(path: Path, backlog: int = 1) -> socket.socket:
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    server.bind(os.fspath(path))
    server.listen(backlog)
    return server


def test_a_socket_that_is_not_there_is_unreachable(sockets_dir: Path) -> None:
    with pytest.raises(Unreachable, match="no such socket; is the VM running") as caught:
        open_monitor(sockets_dir / "a.qmp")
    assert caught.value.code == "offline"


def test_a_socket_file_left_by_a_killed_qemu_is_unreachable(sockets_dir: Path) -> None:
    listening(sockets_dir / "a.qmp").close()
    with pytest.raises(Unreachable, match="nobody listens on this socket"):
        open_monitor(sockets_dir / "a.qmp")


def test_a_plain_file_is_unreachable(sockets_dir: Path) -> None:
    (sockets_dir / "a.qmp").write_text("", encoding="ascii")
    with pytest.raises(Unreachable, match=r"a\.qmp: "):
        open_monitor(sockets_dir / "a.qmp")


def test_a_datagram_socket_is_unreachable(sockets_dir: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.bind(os.fspath(sockets_dir / "a.qmp"))
        with pytest.raises(Unreachable, match=r"a\.qmp: "):
            open_monitor(sockets_dir / "a.qmp")


def test_a_path_that_no_socket_can_have_is_unreachable(sockets_dir: Path) -> None:
    with pytest.raises(Unreachable, match="at most 107 bytes"):
        open_monitor(sockets_dir / ("é" * 60))


def test_a_socket_without_permission_names_its_owner(
    sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    class Denied(socket.socket):
        connect = refused  # root may open everything: so the refusal is simulated

    monkeypatch.setattr(socket, "socket", Denied)
    with pytest.raises(Unreachable, match="belongs to the user that runs QEMU"):
        open_monitor(sockets_dir / "a.qmp")


def test_a_socket_without_permission_tells_its_owner_group_and_mode(
    sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    class Denied(socket.socket):
        connect = refused

    path = sockets_dir / "a.qmp"
    with listening(path):
        path.chmod(0o750)
        monkeypatch.setattr(socket, "socket", Denied)
        with pytest.raises(Unreachable) as caught:
            open_monitor(path)
    assert f"(user {path.owner()}, group {path.group()}, mode 0750): run as this user" in str(caught.value)


def test_the_pid_is_that_of_the_process_that_listens(sockets_dir: Path) -> None:
    with listening(sockets_dir / "a.qmp"):
        monitor = open_monitor(os.fspath(sockets_dir / "a.qmp"))
        with monitor.connection:
            assert monitor.pid == os.getpid()
            assert monitor.path == os.fspath(sockets_dir / "a.qmp")


def test_a_full_backlog_is_busy_and_leaks_nothing(sockets_dir: Path) -> None:
    with listening(sockets_dir / "a.qmp"):
        waiting = [open_monitor(sockets_dir / "a.qmp") for _ in range(2)]
        descriptors = set(os.listdir("/proc/self/fd"))
        for _ in range(3):
            with pytest.raises(MonitorBusy, match="serves one at a time") as caught:
                open_monitor(sockets_dir / "a.qmp")
        assert caught.value.code == "busy"
        assert set(os.listdir("/proc/self/fd")) == descriptors
        for monitor in waiting:
            monitor.connection.close()


async def test_the_socket_table_distinguishes_accepted_from_queued_connections(sockets_dir: Path) -> None:
    path = os.fspath(sockets_dir / "a.qmp")
    assert not socket_table(path).listening
    with listening(sockets_dir / "a.qmp") as server, open_monitor(path).connection:
        waiting = socket_table(path)
        assert len(waiting.listening) == 1
        assert not waiting.accepted
        server.setblocking(False)
        accepted, _ = await asyncio.get_running_loop().sock_accept(server)
        with accepted:
            assert len(socket_table(path).accepted) == 1
            assert socket_table(path).listening == waiting.listening
    assert not socket_table(path).listening


def test_another_socket_on_the_same_path_has_another_mark(sockets_dir: Path) -> None:
    path = sockets_dir / "a.qmp"
    with listening(path):
        before = socket_table(os.fspath(path)).listening
        path.unlink()
        with listening(path):
            assert socket_table(os.fspath(path)).listening > before


def test_a_path_with_blanks_is_found_in_the_table(sockets_dir: Path) -> None:
    with listening(sockets_dir / "a b  c.qmp"):
        assert socket_table(os.fspath(sockets_dir / "a b  c.qmp")).listening


def test_without_the_socket_table_the_result_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: Path) -> bytes:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_bytes", missing)
    assert not socket_table("/run/a.qmp").listening
    assert not socket_table("/run/a.qmp").accepted


@pytest.mark.parametrize("directory", [".", "link"])
def test_a_connection_is_known_to_wait_or_to_be_accepted_under_whatever_name_the_server_has_bound(
    directory: str, sockets_dir: Path
) -> None:
    (sockets_dir / "link").symlink_to(".")
    with (
        listening(sockets_dir / directory / "a.qmp") as server,
        open_monitor(sockets_dir / "a.qmp").connection as first,
        open_monitor(sockets_dir / "a.qmp").connection as second,
    ):
        assert was_accepted(first) is False
        accepted, _ = server.accept()
        with accepted:
            assert was_accepted(first) is True
            assert was_accepted(second) is False
        assert was_accepted(first) is False  # the server has left


def test_it_is_not_known_whether_a_closed_connection_was_accepted(sockets_dir: Path) -> None:
    with listening(sockets_dir / "a.qmp"), open_monitor(sockets_dir / "a.qmp").connection as connection:
        pass
    assert was_accepted(connection) is None


def test_where_the_kernel_does_not_tell_it_is_not_known_whether_a_connection_was_accepted(
    sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with listening(sockets_dir / "a.qmp"), open_monitor(sockets_dir / "a.qmp").connection as connection:
        monkeypatch.setattr(monitor_module, "_BY_FAMILY", 99)  # it answers with an error
        assert was_accepted(connection) is None

        def refused(*_: object) -> None:
            raise PermissionError

        monkeypatch.setattr(socket, "socket", refused)
        assert was_accepted(connection) is None
