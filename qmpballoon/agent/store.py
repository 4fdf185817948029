"""The agent's persistent state in ``state_dir``: the name for each socket and the settings of each VM.

One JSON file per host name, written atomically, mode 0600, and locked, so that only one agent uses a
name. If the disk is full, the agent keeps running, logs it once and tries again.

A host may get its name late, at its first boots: a name without a file takes over that of the name that was
used last, unless an agent uses it. What that name announced is then cleared like other leftovers.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import threading
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Final

from qmpballoon.agent.state_file import (
    Contents,
    Encoder,
    Kept,
    KnownSocket,
    draft_of,
    parse_state,
    put_in_place,
    write_draft,
)
from qmpballoon.config import check_is_ours
from qmpballoon.descriptors import EXHAUSTED
from qmpballoon.errors import AnotherAgentRuns, StateUnusable
from qmpballoon.log import log_event
from qmpballoon.model.names import VmId

_TRY_AGAIN_S: Final = 30.0
_SYNC_AFTER_S: Final = 0.3  # without another change; longer than _SOON_S
_SYNC_WITHIN_S: Final = 1.0
_SOON_S: Final = 0.2  # so that one write has the names of many VMs that attach; `saved` does not wait for it
_LAZILY_S: Final = 5.0  # batch the writes of automatic moves: flash memory wears out
_MOST_TOLD: Final = 3  # how many invalid rows of a file are logged
_MOST_FORGOTTEN: Final = 1000  # names without a socket whose settings are still kept
_NOTHING: Final = Kept()


class Store:
    """The state on disk. A change is written in 0.2 s, or 5 s; ``saved()`` writes it at once, and waits.

    With an empty ``state_dir`` it is in memory only, and ends with the agent.
    """

    def __init__(self, state_dir: str | os.PathLike[str], host: str) -> None:
        """Lock and read the file of this host's name.

        Raises:
            AnotherAgentRuns: the lock is held.
            StateUnusable: the directory cannot be made or written, others may write in it, or no descriptor
                is left to read it.
        """
        self._directory = Path(state_dir)
        self._file = self._directory / f"{host}.json"
        self._lock = self._locked_directory(host) if state_dir else None
        try:
            if self._lock is not None:
                self._take_over_renamed()
            self._contents = Contents() if self._lock is None else self._read()
        except StateUnusable:
            assert self._lock is not None
            os.close(self._lock)
            raise
        self._encoder = Encoder()
        self._foreseen: dict[VmId, Kept] = {}  # on disk in place of what is kept
        self._wanted = 0  # changes made
        self._written = 0  # changes that are on disk, or that could not be written
        self._changed = asyncio.Event()
        self._drafted_since_s: float | None = None  # a draft is written and not yet renamed into place
        self._later: asyncio.TimerHandle | None = None  # of the next write
        self._settled = asyncio.Condition()
        self._failed = False  # the last attempt to write
        self._write_lock = threading.Lock()  # a write whose task was cancelled goes on in its thread
        if self._contents.unread:  # rewrite the file, so that the invalid rows are logged once
            self._wanted += 1
            self._changed.set()

    def _locked_directory(self, host: str) -> int:
        """Make the directory if it is not there, and hold the lock of this host's name."""
        directory = os.fspath(self._directory)
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            check_is_ours(self._directory)
            lock = _locked(self._file)
        except OSError as error:
            raise StateUnusable(directory, error) from error
        if lock is None:
            raise AnotherAgentRuns(host, directory)
        return lock

    # ── what is kept ─────────────────────────────────────────────────────────────────────────────

    @property
    def sockets(self) -> Mapping[str, KnownSocket]:
        """Names by the path of the socket."""
        return self._contents.sockets

    def know(self, path: str, known: KnownSocket | None) -> None:
        """Remember the name of a socket's VM; None forgets it."""
        if self._contents.sockets.get(path) == known:
            return
        if known is None:
            del self._contents.sockets[path]
        else:
            self._contents.sockets[path] = known
        self._touch()

    def kept(self, vm: VmId) -> Kept:
        """Return what is kept for a VM's name."""
        return self._contents.vms.get(vm) or _NOTHING

    def keep(self, vm: VmId, *, lazily: bool = False, **changes: object) -> None:
        """Change what is kept for a VM's name; ``lazily``: losing the last seconds of it does no harm."""
        before = self.kept(vm)
        after = replace(before, **changes)  # type: ignore[arg-type]  # names and types are Kept's
        if after != before:
            self._contents.vms.pop(vm, None)
            self._contents.vms[vm] = after
            self._drop_oldest()
            self._touch(lazily=lazily)

    @asynccontextmanager
    async def foreseen(self, vm: VmId, **changes: object) -> AsyncIterator[None]:
        """Write what is kept for a VM's name with these changes, and run the body; in memory nothing changes.

        The body makes the same changes if all goes well. It need not wait for the disk after them, because an
        agent that is started after this one was killed finds them. Other changes for this name are written
        when the body has ended.
        """
        row = self._foreseen[vm] = replace(self.kept(vm), **changes)  # type: ignore[arg-type]  # as in `keep`
        self._touch()
        try:
            await self.saved()
            yield
        except BaseException:
            self._changed.set()  # it is taken back now
            raise
        finally:
            if self._foreseen.get(vm) is row:  # else another VM has got the name meanwhile
                del self._foreseen[vm]
            self._touch()

    def forget(self, vm: VmId) -> None:
        """Forget all that was set for a VM's name."""
        if self._contents.vms.pop(vm, None) is not None:
            self._touch()

    @property
    def chosen(self) -> tuple[str | None, str | None]:
        """The policy and the host's mode that requests chose; None: as configured."""
        return self._contents.policy, self._contents.mode

    def choose(self, policy: str | None, mode: str | None) -> None:
        """Keep a policy and a host's mode."""
        if self.chosen != (policy, mode):
            self._contents.policy, self._contents.mode = policy, mode
            self._touch()

    @property
    def announced(self) -> list[str]:
        """Retained topics that were published, so that leftovers can be cleared."""
        return list(self._contents.announced)

    def announce(self, topics: list[str]) -> None:
        """Replace the list of published retained topics."""
        if topics != self._contents.announced:
            self._contents.announced = topics
            self._touch()

    # ── the disk ─────────────────────────────────────────────────────────────────────────────────

    async def saved(self) -> None:
        """Wait until all changes made so far are written, or the failure to write them is logged.

        The changes then survive the end of the agent. A power failure right after it may revert them all.
        """
        wanted = self._wanted
        if self._written < wanted:
            self._changed.set()  # now
        async with self._settled:
            await self._settled.wait_for(lambda: self._written >= wanted)

    async def run(self) -> None:
        """Write changes as they come, for as long as the agent runs."""
        while True:
            wait_s = _TRY_AGAIN_S if self._failed else _SYNC_AFTER_S if self._is_drafted else None
            with suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._changed.wait()
            is_changed = self._changed.is_set()
            self._changed.clear()
            self._forget_later()
            # Changes that follow one another at once do not wait for the disk; their end does.
            since_s, now_s = self._drafted_since_s, time.monotonic()
            is_late = since_s is not None and now_s - since_s > _SYNC_WITHIN_S
            await self._write_now(sync=not is_changed or is_late)

    async def close(self) -> None:
        """Write what is left and give up the lock."""
        self._forget_later()
        if self._failed or self._is_drafted or self._written < self._wanted:
            await self._write_now(sync=True)
        if self._lock is not None:
            os.close(self._lock)

    async def _write_now(self, *, sync: bool) -> None:
        wanted, text = self._wanted, self._encoder.text_of(self._contents, self._foreseen)
        try:
            if self._failed or self._written < wanted:
                await asyncio.to_thread(self._write, text)
                await self._settle(wanted)  # waiters need not wait for the disk
            if sync and self._is_drafted:
                await asyncio.to_thread(self._sync)
        except OSError as error:
            if not self._failed:
                log_event(
                    "state-not-saved",
                    "what is set now would be lost with the agent; it is tried again",
                    level=logging.ERROR,
                    file=self._file,
                    reason=error.strerror,
                )
            self._failed = True
        else:
            self._failed = False
        await self._settle(wanted)

    @property
    def _is_drafted(self) -> bool:
        return self._drafted_since_s is not None

    async def _settle(self, wanted: int) -> None:
        async with self._settled:
            self._written = max(self._written, wanted)
            self._settled.notify_all()

    def _forget_later(self) -> None:
        if self._later is not None:
            self._later.cancel()
            self._later = None

    def _write(self, text: str) -> None:
        with self._write_lock:
            write_draft(self._file, text)
            if self._drafted_since_s is None:
                self._drafted_since_s = time.monotonic()

    def _sync(self) -> None:
        with self._write_lock:
            put_in_place(self._file)
            self._drafted_since_s = None

    def _touch(self, *, lazily: bool = False) -> None:
        if self._lock is None:
            return
        self._wanted += 1
        loop = asyncio.get_running_loop()
        at_s = loop.time() + (_LAZILY_S if lazily else _SOON_S)
        if self._later is None or at_s < self._later.when():
            self._forget_later()
            self._later = loop.call_at(at_s, self._changed.set)

    def _drop_oldest(self) -> None:
        if len(self._contents.vms) <= _MOST_FORGOTTEN:
            return
        named = {known.vm for known in self._contents.sockets.values()}
        nameless = [vm for vm in self._contents.vms if vm not in named]
        for vm in nameless[: max(0, len(nameless) - _MOST_FORGOTTEN)]:
            del self._contents.vms[vm]

    def _take_over_renamed(self) -> None:
        """Take over the file of the host's last name, if this one has none."""
        if self._file.exists() or draft_of(self._file).exists():
            return
        with suppress(OSError):
            files = [each for each in self._directory.glob("*.json") if not each.name.startswith(".")]
            for last in sorted(files, key=lambda each: each.stat().st_mtime, reverse=True):
                lock = _locked(last)
                if lock is None:
                    continue  # another agent's
                try:
                    with suppress(FileNotFoundError):
                        draft_of(last).rename(draft_of(self._file))
                    last.rename(self._file)
                finally:
                    os.close(lock)
                log_event(
                    "host-renamed",
                    "what was set is kept, and what it published under the last name is cleared",
                    level=logging.WARNING,
                    host=self._file.stem,
                    last=last.stem,
                )
                return

    def _read(self) -> Contents:
        try:
            contents = self._read_from(draft_of(self._file))
            with suppress(OSError):
                put_in_place(self._file)  # the next draft replaces this one
            return contents
        except (OSError, ValueError) as error:  # a complete draft is newer than the file
            self._check_descriptors(error)
        try:
            return self._read_from(self._file)
        except FileNotFoundError:
            return Contents()
        except (OSError, ValueError) as error:
            self._check_descriptors(error)
            aside = self._aside
            with suppress(OSError):
                self._file.rename(aside)
            log_event(
                "state-unreadable",
                "moved aside; limits, modes and manual targets start as configured",
                level=logging.ERROR,
                file=aside,
                reason=error,
            )
            return Contents()

    def _read_from(self, file: Path) -> Contents:
        contents = parse_state(file.read_text(encoding="utf-8"))
        if contents.unread:
            aside = self._aside
            with suppress(OSError):
                aside.hardlink_to(file)  # the next write replaces the name only
            log_event(
                "state-incomplete",
                f"kept aside, and taken but for {'; '.join(contents.unread[:_MOST_TOLD])}",
                level=logging.ERROR,
                file=aside,
                unread=len(contents.unread),
            )
        return contents

    @property
    def _aside(self) -> Path:
        return self._file.with_name(f"{self._file.name}.unreadable-{int(time.time())}")

    def _check_descriptors(self, error: OSError | ValueError) -> None:
        if isinstance(error, OSError) and error.errno in EXHAUSTED:  # the file itself is intact
            raise StateUnusable(os.fspath(self._directory), error) from error


def _locked(file: Path) -> int | None:
    """Return the descriptor of the lock of a state file, None if another agent holds it.

    Raises:
        OSError: it cannot be opened.
    """
    flags = os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
    lock = os.open(file.with_suffix(".lock"), flags, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        return None
    return lock


def boot_id() -> str:
    """Return the kernel's name for this boot; empty where it has none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""
