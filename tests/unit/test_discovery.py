"""Sockets that appear and vanish."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager, suppress
from pathlib import Path

import pytest

from qmpballoon.qmp import discovery
from qmpballoon.qmp.discovery import SocketMark, SocketWatch, scan, unreadable


def bind(path: Path) -> None:
    """Make a socket file on which no process listens."""
    path.parent.mkdir(exist_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        server.bind(os.fspath(path))


def test_a_directory_that_may_not_be_listed_or_entered_is_unreadable_and_an_absent_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("open", "shut/below", "entered"):
        (tmp_path / name).mkdir(parents=True)
    may_not = {tmp_path / "shut": os.R_OK | os.X_OK, tmp_path / "entered": os.R_OK}

    def access(path: str, mode: int, *, effective_ids: bool) -> bool:
        assert effective_ids
        return os.path.exists(path) and not mode & may_not.get(Path(path), 0)

    monkeypatch.setattr("qmpballoon.qmp.discovery.os.access", access)
    shut, entered = str(tmp_path / "shut"), str(tmp_path / "entered")
    assert unreadable([f"{tmp_path}/*/a.qmp"]) == [shut]
    assert unreadable([f"{shut}/below/*.qmp", f"{shut}/*.qmp"]) == [shut]
    assert unreadable([f"{entered}/a.qmp"]) == []
    assert unreadable([f"{entered}/*.qmp", f"{tmp_path}/*/*.qmp"]) == [entered, shut]
    assert unreadable([f"{tmp_path}/open/*.qmp", f"{tmp_path}/none/*.qmp", "tcp:127.0.0.1:1", "@name"]) == []


class Changes:
    """The changes that a watch reports, in order."""

    def __init__(self, changes: AsyncIterator[Mapping[str, SocketMark]]) -> None:
        self._changes = changes

    async def until(self, *names: str) -> Mapping[str, SocketMark]:
        """Wait until exactly these sockets are reported; without them in time the test fails."""
        reported: list[list[str]] = []
        with suppress(TimeoutError):
            async with asyncio.timeout(10):
                while list(names) not in reported:
                    found = await anext(self._changes)
                    reported.append([os.path.basename(path) for path in found])
                return found
        raise AssertionError(f"expected {list(names)}, reported were {reported}")


@asynccontextmanager
async def watching(*globs: Path | str) -> AsyncIterator[tuple[SocketWatch, Changes]]:
    watch = SocketWatch([os.fspath(each) for each in globs])
    async with aclosing(watch.changes()) as changes:
        yield watch, Changes(changes)


@pytest.fixture(params=["inotify", "scan"])
def how(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With inotify and without periodic scans, or with periodic scans alone."""
    if request.param == "inotify":
        monkeypatch.setattr(discovery, "SCAN_EVERY_S", 3600.0)
    else:
        monkeypatch.setattr(discovery, "SCAN_EVERY_S", 0.01)

        def refused() -> None:
            raise OSError(24, "Too many open files")

        monkeypatch.setattr(discovery, "Inotify", refused)
    return str(request.param)


def test_a_scan_finds_only_sockets_and_sorts_them(sockets_dir: Path) -> None:
    for name in ("b.qmp", "a.qmp", "c.sock"):
        bind(sockets_dir / name)
    (sockets_dir / "file.qmp").write_text("", encoding="ascii")
    (sockets_dir / "lost.qmp").symlink_to("nowhere")
    found = scan([f"{sockets_dir}/*.qmp", f"{sockets_dir}/b.*"])
    assert [os.path.basename(path) for path in found] == ["a.qmp", "b.qmp"]
    assert scan([f"{sockets_dir}/none/*.qmp"]) == {}


async def test_sockets_appear_and_vanish(how: str, sockets_dir: Path) -> None:
    bind(sockets_dir / "a.qmp")
    async with watching(sockets_dir / "*.qmp") as (_, changes):
        await changes.until("a.qmp")
        bind(sockets_dir / "b.qmp")
        await changes.until("a.qmp", "b.qmp")
        (sockets_dir / "a.qmp").unlink()
        await changes.until("b.qmp")
        os.rename(sockets_dir / "b.qmp", sockets_dir / "c.qmp")
        await changes.until("c.qmp")


async def test_another_socket_on_the_same_path_is_a_change(how: str, sockets_dir: Path) -> None:
    path = sockets_dir / "a.qmp"
    bind(path)
    async with watching(path) as (_, changes):
        before = (await changes.until("a.qmp"))[os.fspath(path)]
        path.unlink()
        bind(path)
        after = scan([os.fspath(path)])[os.fspath(path)]
        assert after != before  # although the inode may be the same
        assert (await changes.until("a.qmp"))[os.fspath(path)] == after


async def test_a_directory_that_is_made_later_is_watched(how: str, sockets_dir: Path) -> None:
    later = sockets_dir / "vm1"
    async with watching(sockets_dir / "*" / "*.qmp") as (watch, changes):
        await changes.until()
        bind(later / "a.qmp")
        if how == "inotify":  # a directory under a glob in the middle is found by the next scan
            watch.watch(watch.globs)
        await changes.until("a.qmp")
        bind(later / "b.qmp")
        await changes.until("a.qmp", "b.qmp")


async def test_a_directory_that_is_made_again_is_watched_again(how: str, sockets_dir: Path) -> None:
    directory = sockets_dir / "vms"
    bind(directory / "a.qmp")
    async with watching(directory / "*.qmp") as (watch, changes):
        await changes.until("a.qmp")
        (directory / "a.qmp").unlink()
        directory.rmdir()
        await changes.until()
        bind(directory / "b.qmp")
        watch.watch(watch.globs)  # a directory that is made again is found by the next scan
        await changes.until("b.qmp")
        bind(directory / "c.qmp")
        await changes.until("b.qmp", "c.qmp")
        for name in ("b.qmp", "c.qmp"):
            (directory / name).unlink()
        directory.rmdir()
        bind(directory / "d.qmp")  # the next scan does not see that the directory was removed
        await changes.until("d.qmp")
        bind(directory / "e.qmp")
        await changes.until("d.qmp", "e.qmp")


async def test_the_globs_can_be_replaced(how: str, sockets_dir: Path) -> None:
    bind(sockets_dir / "a.qmp")
    bind(sockets_dir / "b.sock")
    async with watching(sockets_dir / "*.qmp") as (watch, changes):
        await changes.until("a.qmp")
        assert watch.covers(os.fspath(sockets_dir / "x.qmp"))
        watch.watch([f"{sockets_dir}/*.sock"])
        await changes.until("b.sock")
        assert not watch.covers(os.fspath(sockets_dir / "x.qmp"))


async def test_many_watches_leak_no_descriptor(sockets_dir: Path) -> None:
    bind(sockets_dir / "a.qmp")
    before = set(os.listdir("/proc/self/fd"))
    for _ in range(20):
        async with watching(sockets_dir / "*.qmp") as (_, changes):
            await changes.until("a.qmp")
    assert set(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    ("path", "covered"),
    [
        ("/run/vms/a.qmp", True),
        ("/run/vms/deep/a.qmp", False),
        ("/run/a.qmp", False),
        ("/run/vms/a.sock", False),
        ("/srv/x/web.qmp", True),
    ],
)
def test_a_glob_covers_a_path_that_does_not_exist(path: str, covered: bool) -> None:
    assert SocketWatch(["/run/vms/*.qmp", "/srv/*/web.qmp"]).covers(path) is covered
