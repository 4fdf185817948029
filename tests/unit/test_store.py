"""State that survives the agent."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from qmpballoon.agent import store as store_module
from qmpballoon.agent.context import Context
from qmpballoon.agent.registry import Registry
from qmpballoon.agent.state_file import Kept, KnownSocket, draft_of, parse_state, write_draft
from qmpballoon.agent.store import Store
from qmpballoon.config import defaults
from qmpballoon.errors import AnotherAgentRuns, StateUnusable
from qmpballoon.model.names import VmId

WEB1 = VmId("web1")
KNOWN = KnownSocket("web1", "web1", "web 1")


@asynccontextmanager
async def running(directory: Path) -> AsyncIterator[Store]:
    store = Store(directory, "edge-7")
    writing = asyncio.create_task(store.run())
    try:
        yield store
    finally:
        writing.cancel()
        await asyncio.wait((writing,))
        await store.close()


async def saved(store: Store) -> None:
    async with asyncio.timeout(10):
        await store.saved()


def stored(file: Path) -> Kept:
    """Return what is on disk for a VM."""
    try:
        text = draft_of(file).read_text()
    except FileNotFoundError:  # it has become the file
        text = file.read_text()
    return parse_state(text).vms[WEB1]


async def test_what_is_foreseen_is_on_disk_while_it_lasts_and_never_in_memory(tmp_path: Path) -> None:
    def on_disk() -> Kept:
        return stored(tmp_path / "edge-7.json")

    async def fails(store: Store) -> None:
        async with store.foreseen(WEB1, target=5, mode="manual"):
            assert on_disk() == Kept(target=5, shares=7, mode="manual")
            assert store.kept(WEB1) == Kept(target=4, shares=7)
            raise ZeroDivisionError

    async with running(tmp_path) as store:
        store.keep(WEB1, target=4, shares=7)
        await saved(store)
        with pytest.raises(ZeroDivisionError):
            await fails(store)
        await saved(store)
        assert on_disk() == store.kept(WEB1) == Kept(target=4, shares=7)
        async with store.foreseen(WEB1, target=6):
            store.keep(WEB1, target=6, sent=6)
            assert on_disk() == Kept(target=6, shares=7)
        await saved(store)
        assert on_disk() == Kept(target=6, shares=7, sent=6)


async def test_what_is_foreseen_for_a_name_that_another_vm_got_meanwhile_stays(tmp_path: Path) -> None:
    async with running(tmp_path) as store:
        first = store.foreseen(WEB1, target=5)
        await first.__aenter__()
        async with store.foreseen(WEB1, target=6):
            await first.__aexit__(None, None, None)
            await saved(store)
            assert stored(tmp_path / "edge-7.json") == Kept(target=6)
        await saved(store)
        assert store.kept(WEB1) == Kept()


async def test_a_new_host_name_takes_over_what_the_last_one_had(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store(tmp_path, "last")
    store.keep(WEB1, target=4)
    store.announce(["qmpballoon/last/status"])
    await store.close()
    older = tmp_path / "old.json"
    older.write_text("{}")
    os.utime(older, (1e9, 1e9))
    new = Store(tmp_path, "new")
    assert (new.kept(WEB1).target, new.announced) == (4, ["qmpballoon/last/status"])
    await new.close()
    assert "host-renamed host=new last=last" in caplog.text
    assert sorted(each.name for each in tmp_path.glob("*.json")) == ["new.json", "old.json"]
    again = Store(tmp_path, "new")
    assert again.kept(WEB1).target == 4
    await again.close()


async def test_a_draft_of_the_last_name_is_taken_over(tmp_path: Path) -> None:
    await Store(tmp_path, "last").close()
    store = Store(tmp_path, "last")
    store.keep(WEB1, target=5)
    write_draft(tmp_path / "last.json", store._encoder.text_of(store._contents, {}))
    (tmp_path / "last.json").write_text("{}")
    assert store._lock is not None
    os.close(store._lock)  # it was killed
    new = Store(tmp_path, "new")
    assert new.kept(WEB1).target == 5
    await new.close()


async def test_neither_a_name_in_use_nor_one_beside_its_own_file_is_taken_over(tmp_path: Path) -> None:
    async with running(tmp_path) as store:
        store.keep(WEB1, target=5)
        await saved(store)
        other = Store(tmp_path, "edge-8")
        assert other.kept(WEB1) == Kept()
        other.keep(WEB1, target=6)
        await other.close()
    own = Store(tmp_path, "edge-8")
    assert own.kept(WEB1).target == 6
    await own.close()


async def test_saved_state_is_read_again(tmp_path: Path) -> None:
    async with running(tmp_path) as store:
        store.know("/run/a\udce9.qmp", KNOWN)
        store.keep(WEB1, mode="manual", target=2**40, floor="1.5GiB", mode_until=12.5, shares=7)
        store.keep(WEB1, life="1-2", sent=4096)
        store.announce(["a/b", "a/c"])
        await saved(store)
    async with running(tmp_path) as again:
        assert again.sockets == {"/run/a\udce9.qmp": KNOWN}
        assert again.kept(WEB1) == Kept(
            mode="manual", target=2**40, floor="1.5GiB", mode_until=12.5, shares=7, life="1-2", sent=4096
        )
        assert again.announced == ["a/b", "a/c"]
        again.know("/run/a\udce9.qmp", None)
        again.forget(WEB1)
    async with running(tmp_path) as third:
        assert not third.sockets
        assert third.kept(WEB1) == Kept()


async def test_the_file_has_mode_600_and_no_temporary_file_is_left(tmp_path: Path) -> None:
    async with running(tmp_path / "new" / "state") as store:
        store.keep(WEB1, mode="manual")
    directory = tmp_path / "new" / "state"
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert stat.S_IMODE((directory / "edge-7.json").stat().st_mode) == 0o600
    assert sorted(os.listdir(directory)) == ["edge-7.json", "edge-7.lock"]


async def test_a_complete_temporary_file_wins_and_a_partial_one_is_ignored(tmp_path: Path) -> None:
    async with running(tmp_path) as store:
        store.keep(WEB1, mode="manual")
    file, draft = tmp_path / "edge-7.json", tmp_path / ".edge-7.json.new"
    text = file.read_text(encoding="utf-8")
    write_draft(file, text.replace("manual", "observe"))
    async with running(tmp_path) as again:
        assert again.kept(WEB1).mode == "observe"
    write_draft(file, text[: len(text) // 2])
    assert draft.exists()
    async with running(tmp_path) as third:
        assert third.kept(WEB1).mode == "observe"  # the complete one was put in place
        third.keep(WEB1, mode="auto")
    assert not draft.exists()
    async with running(tmp_path) as fourth:
        assert fourth.kept(WEB1).mode == "auto"


async def test_nothing_is_written_while_nothing_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    monkeypatch.setattr(store_module, "write_draft", lambda _, text: written.append(text))
    monkeypatch.setattr(store_module, "put_in_place", lambda _: None)
    async with running(tmp_path) as store:
        store.keep(WEB1, mode="manual")
        await saved(store)
        store.keep(WEB1, mode="manual")
        store.know("/run/none.qmp", None)
        store.forget(VmId("unknown"))
        store.announce([])
        await saved(store)
    assert len(set(written)) == 1


async def test_a_second_agent_of_the_same_name_is_refused(tmp_path: Path) -> None:
    async with running(tmp_path):
        with pytest.raises(AnotherAgentRuns) as caught:
            Store(tmp_path, "edge-7")
        assert caught.value.code == "busy"
        other = Store(tmp_path, "edge-8")
        await other.close()
    async with running(tmp_path):
        pass


def test_a_directory_that_cannot_be_made_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="ascii")
    with pytest.raises(StateUnusable, match="name another with --state-dir"):
        Store(tmp_path / "file" / "state", "edge-7")


def with_vm(row: str) -> bytes:
    return f'{{"version": 1, "sockets": {{}}, "vms": {{"a": {row}}}, "announced": []}}'.encode()


GARBAGE = {
    "nothing": b"",
    "no UTF-8": b"\xff\xfe\x00",
    "cut in half": b'{"version": 1, "sockets": {',
    "another version": b'{"version": 2, "sockets": {}, "vms": {}, "announced": []}',
    "a list": b"[]",
    "deeply nested": b"[" * 100_000,
    "too many digits": b'{"version": ' + b"1" * 5000 + b"}",
    "no version": b'{"sockets": {}, "vms": {}, "announced": []}',
    "vms is a list": b'{"version": 1, "sockets": {}, "vms": [], "announced": []}',
    "an odd mode": with_vm('{"mode": "fast"}'),
    "a target of text": with_vm('{"target": "1"}'),
    "a target that is a boolean": with_vm('{"target": true}'),
    "a floor that is no size": with_vm('{"floor": "512M"}'),
    "a floor of zero": with_vm('{"floor": "0"}'),
    "a socket of two words": b'{"version": 1, "sockets": {"/a": {"vm": "a"}}, "vms": {}, "announced": []}',
    "a topic that is a number": b'{"version": 1, "sockets": {}, "vms": {}, "announced": [1]}',
}


@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE.keys())
async def test_an_unreadable_file_is_moved_aside(garbage: bytes, tmp_path: Path) -> None:
    (tmp_path / "edge-7.json").write_bytes(garbage)
    async with running(tmp_path) as store:
        assert store.kept(WEB1) == Kept()
        assert not store.sockets
        store.keep(WEB1, mode="observe")
        await saved(store)
    (aside,) = tmp_path.glob("edge-7.json.unreadable-*")
    assert aside.read_bytes() == garbage
    async with running(tmp_path) as again:
        assert again.kept(WEB1).mode == "observe"


def test_what_a_newer_version_adds_to_a_vm_is_left_out() -> None:
    row = {"mode": "manual", "of_tomorrow": [1]}
    text = json.dumps({"version": 1, "sockets": {}, "vms": {"a": row}, "announced": []})
    assert parse_state(text).vms == {"a": Kept(mode="manual")}


GOOD: dict[str, Any] = {
    "version": 1,
    "sockets": {"/run/a.qmp": {"vm": "web1", "base": "web1", "name": "web 1"}},
    "vms": {"web1": {"mode": "manual", "target": 4096}},
    "announced": ["q/a", "q/b"],
    "policy": "fairshare",
    "mode": "auto",
}


def test_what_a_newer_version_adds_anywhere_is_left_out() -> None:
    tree = json.loads(json.dumps(GOOD))
    for place in (tree, tree["sockets"]["/run/a.qmp"], tree["vms"]["web1"]):
        place["of_tomorrow"] = [1]
    assert parse_state(json.dumps(tree)) == parse_state(json.dumps(GOOD))
    assert parse_state(json.dumps(tree)).unread == []
    assert parse_state(json.dumps(tree)).sockets == {"/run/a.qmp": KNOWN}


@pytest.mark.parametrize(
    ("table", "key", "row"),
    [
        ("sockets", "/run/b.qmp", {"vm": "b", "base": "b"}),
        ("sockets", "/run/b.qmp", {"vm": "b/#", "base": "b", "name": "b"}),
        ("sockets", "/run/b.qmp", {"vm": 1, "base": "b", "name": "b"}),
        ("sockets", "/run/b.qmp", None),
        ("vms", "b", {"mode": "fast"}),
        ("vms", "b", {"floor": "512M"}),
        ("vms", "b", {"mode_until": 10**400}),
        ("vms", "b", []),
        ("announced", 2, 7),
        ("policy", "", "of tomorrow"),
        ("mode", "", ["auto"]),
    ],
)
async def test_an_invalid_row_is_dropped_alone_and_logged_once(
    table: str, key: Any, row: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[tuple[str, str]] = []
    monkeypatch.setattr(store_module, "log_event", lambda word, text="", **_: logged.append((word, text)))
    expected = parse_state(json.dumps(GOOD))
    tree = json.loads(json.dumps(GOOD))
    if table == "announced":
        tree[table].append(row)
    elif key:
        tree[table][key] = row
    else:
        tree[table] = row
        setattr(expected, table, None)
    (tmp_path / "edge-7.json").write_text(json.dumps(tree))
    async with running(tmp_path) as store:
        assert dict(store.sockets) == expected.sockets
        assert store.kept(WEB1) == expected.vms[WEB1]
        assert store.announced == expected.announced
        assert store.chosen == (expected.policy, expected.mode)
        await saved(store)
    ((word, sentence),) = logged
    assert word == "state-incomplete"
    assert f"{table} {key}" in sentence
    (aside,) = tmp_path.glob("edge-7.json.unreadable-*")
    assert json.loads(aside.read_text()) == tree
    async with running(tmp_path) as again:
        assert again.kept(WEB1) == expected.vms[WEB1]
    assert len(logged) == 1


async def test_two_sockets_of_one_name_are_one_vm(tmp_path: Path) -> None:
    async with running(tmp_path) as store:
        store.know("/run/a.qmp", KNOWN)
        store.know("/run/b.qmp", KNOWN)
        registry = Registry(Context(defaults(), store))
        for path, known in list(store.sockets.items()):
            registry.remember(path, known)
        assert [vm.path for vm in registry] == ["/run/a.qmp"]
        assert list(store.sockets) == ["/run/a.qmp"]


async def test_a_full_disk_is_logged_once_and_retried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[str] = []
    monkeypatch.setattr(store_module, "log_event", lambda word, *_, **__: logged.append(word))
    monkeypatch.setattr(store_module, "_TRY_AGAIN_S", 0.01)
    full, tries = True, 0
    wrote = asyncio.Event()
    loop = asyncio.get_running_loop()

    def write(file: Path, text: str) -> None:
        nonlocal tries
        tries += 1
        if full:
            raise OSError(errno.ENOSPC, "No space left on device")
        write_draft(file, text)
        loop.call_soon_threadsafe(wrote.set)

    monkeypatch.setattr(store_module, "write_draft", write)
    async with running(tmp_path) as store:
        store.keep(WEB1, mode="manual")
        await saved(store)  # returns although the write failed
        assert store.kept(WEB1).mode == "manual"
        store.keep(WEB1, mode="observe")
        await saved(store)
        assert tries >= 2
        full = False
        async with asyncio.timeout(10):
            await wrote.wait()
    assert logged == ["state-not-saved"]
    async with running(tmp_path) as again:
        assert again.kept(WEB1).mode == "observe"


async def test_a_failed_write_is_retried_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    async with running(tmp_path) as store:
        with monkeypatch.context() as full:
            full.setattr(store_module, "write_draft", refuses)
            store.keep(WEB1, mode="manual")
            await saved(store)
    async with running(tmp_path) as again:
        assert again.kept(WEB1).mode == "manual"


def test_a_failed_write_leaves_the_old_file_and_no_temporary_file(tmp_path: Path) -> None:
    """A limit on the size of files stands for the full disk: it fails in the middle of the write."""
    program = (
        "import resource, signal, sys; from pathlib import Path\n"
        "from qmpballoon.agent.state_file import put_in_place, write_draft\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "file = Path(sys.argv[1]); write_draft(file, 'old'); put_in_place(file)\n"
        "try: write_draft(file, 'new' * 100000)\n"
        "except OSError as error: print(error.errno)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "a.json"], capture_output=True, check=True, timeout=60
    )
    assert int(done.stdout) == errno.EFBIG
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == "old"
    assert os.listdir(tmp_path) == ["a.json"]


async def test_a_slow_write_does_not_replace_a_later_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write whose task was cancelled continues in its thread: closing must wait for it."""
    began, may_continue, first_ended = asyncio.Event(), threading.Event(), threading.Event()
    loop = asyncio.get_running_loop()
    first = True

    def write(file: Path, text: str) -> None:
        nonlocal first
        if first:
            first = False
            loop.call_soon_threadsafe(began.set)
            may_continue.wait(10)
            write_draft(file, text)
            first_ended.set()
        else:
            write_draft(file, text)

    monkeypatch.setattr(store_module, "write_draft", write)
    store = Store(tmp_path, "edge-7")
    writing = asyncio.create_task(store.run())
    store.keep(WEB1, mode="observe")
    async with asyncio.timeout(10):
        await began.wait()
        store.keep(WEB1, mode="manual")
        writing.cancel()
        await asyncio.wait((writing,))
        closing = asyncio.create_task(store.close())
        loop.call_later(0.02, may_continue.set)
        await closing
        assert await asyncio.to_thread(first_ended.wait, 10)
    async with running(tmp_path) as again:
        assert again.kept(WEB1).mode == "manual"


def test_a_kill_in_the_middle_of_writing_leaves_a_readable_file(tmp_path: Path) -> None:
    program = (
        "import asyncio, sys\n"
        "from qmpballoon.agent.store import Store\n"
        "from qmpballoon.agent.state_file import KnownSocket\n"
        "from qmpballoon.model.records import VmId\n"
        "async def write():\n"
        "    store = Store(sys.argv[1], 'edge-7')\n"
        "    for number in range(200): store.know(f'/run/{number}.qmp', KnownSocket('a', 'b', 'c' * 99))\n"
        "    asyncio.create_task(store.run())\n"
        "    for number in range(10**9):\n"
        "        store.keep(VmId('web1'), target=number + 1)\n"
        "        await store.saved()\n"
        "        print(number, flush=True)\n"
        "asyncio.run(write())\n"
    )
    seen = 0
    for kill_after in (1, 4, 9):
        with subprocess.Popen([sys.executable, "-c", program, tmp_path], stdout=subprocess.PIPE) as writer:
            assert writer.stdout is not None
            for _ in range(kill_after):
                seen = int(writer.stdout.readline())
            writer.send_signal(signal.SIGKILL)
            writer.wait()
        again = Store(tmp_path, "edge-7")
        target = again.kept(WEB1).target
        assert target is not None
        assert target >= seen + 1  # every change that was reported as saved is saved
        assert len(again.sockets) == 200
        asyncio.run(again.close())
    assert len(os.listdir(tmp_path)) <= 3  # one draft at most, after any number of kills


async def test_settings_of_names_without_a_socket_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "_MOST_FORGOTTEN", 3)
    store = Store(tmp_path, "edge-7")
    try:
        store.know("/run/web1.qmp", KNOWN)
        store.keep(WEB1, mode="manual")
        for number in range(10):
            store.keep(VmId(f"old-{number}"), mode="manual")
        assert store.kept(WEB1).mode == "manual"
        kept = [number for number in range(10) if store.kept(VmId(f"old-{number}")) != Kept()]
        assert kept == [7, 8, 9]
    finally:
        await store.close()


# ── others on the same host ──────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", [".edge-7.json.new", "edge-7.lock"])
async def test_nothing_is_written_through_a_link(name: str, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious", encoding="utf-8")
    directory = tmp_path / "state"
    directory.mkdir(mode=0o700)
    (directory / name).symlink_to(victim)
    with suppress(StateUnusable):
        async with running(directory) as store:
            store.keep(WEB1, mode="manual")
            await saved(store)
            assert not (directory / "edge-7.json").is_symlink()
    assert victim.read_text(encoding="utf-8") == "precious"


@pytest.mark.parametrize("mode", [0o770, 0o777, 0o1777])
def test_a_directory_in_which_others_may_write_is_refused(mode: int, tmp_path: Path) -> None:
    directory = tmp_path / "state"
    directory.mkdir()
    directory.chmod(mode)
    with pytest.raises(StateUnusable, match="others may write in it"):
        Store(directory, "edge-7")
    assert os.listdir(directory) == []


async def test_a_complete_draft_is_put_in_place_before_the_next_one(tmp_path: Path) -> None:
    async with running(tmp_path) as store:
        store.keep(WEB1, mode="manual")
        await saved(store)
    file = tmp_path / "edge-7.json"
    write_draft(file, file.read_text(encoding="utf-8").replace("manual", "observe"))
    await Store(tmp_path, "edge-7").close()
    assert "observe" in file.read_text(encoding="utf-8")
    assert sorted(os.listdir(tmp_path)) == ["edge-7.json", "edge-7.lock"]


def test_a_draft_stays_until_the_next_one_is_complete(tmp_path: Path) -> None:
    file = tmp_path / "edge-7.json"
    write_draft(file, "first")
    with pytest.raises(UnicodeEncodeError):
        write_draft(file, "second\ud800")
    assert draft_of(file).read_text(encoding="utf-8") == "first"
    assert os.listdir(tmp_path) == [draft_of(file).name]


async def test_changes_that_follow_one_another_at_once_do_not_wait_for_the_disk_after_a_rest_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(store_module, "put_in_place", synced.append)
    monkeypatch.setattr(store_module, "_SYNC_AFTER_S", 3600.0)
    async with running(tmp_path) as store:
        monkeypatch.setattr(store_module, "_SYNC_WITHIN_S", 3600.0)
        for target in (1, 2, 3):
            store.keep(WEB1, target=target)
            await saved(store)
        assert synced == []
        monkeypatch.setattr(store_module, "_SYNC_WITHIN_S", 0.0)
        store.keep(WEB1, target=4)
        await saved(store)
        async with asyncio.timeout(10):
            while not synced:
                await asyncio.sleep(0)


async def test_without_a_directory_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    store, other = Store("", "edge-7"), Store("", "edge-7")
    store.keep(WEB1, shares=7)
    await store.saved()
    assert (store.kept(WEB1).shares, other.kept(WEB1).shares) == (7, None)
    await store.close()
    await other.close()
    assert list(tmp_path.iterdir()) == []
