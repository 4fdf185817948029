"""What a client of the control socket is told without asking: events, VM objects, the host's figures."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Final

from qmpballoon.agent.feed import Feed
from qmpballoon.model.names import VmId
from qmpballoon.model.records import Event, HostStatus, VmStatus, rfc3339, utc_now
from qmpballoon.protocol.objects import SCHEMA, event_object, host_figures, vm_object

_MOST_UNSENT: Final = 1024 * 1024  # bytes; more is dropped and counted for a client that reads too slowly


class Subscription:
    """A listener of the feed that writes to one client. ``vm`` None: all VMs and the host.

    ``states_s`` is the least time between two objects of one VM, or of the host; None: events alone. What a
    slow client misses is counted; when it reads again it gets an event ``lagged`` with that number
    (``missed``).
    """

    def __init__(
        self,
        feed: Feed,
        host: str,
        vm: str | None,
        states_s: float | None,
        writer: asyncio.StreamWriter,
        *,
        encode_line: Callable[[Mapping[str, object]], bytes],
    ) -> None:
        self._feed = feed
        self._host = host
        self._vm = vm
        self._states_s = states_s
        self._writer = writer
        self._encode_line = encode_line
        self._missed = 0
        self._changed: dict[VmId, VmStatus] = {}
        self._changed_host: HostStatus | None = None
        self._timer: asyncio.TimerHandle | None = None

    def begin(self, statuses: Iterable[VmStatus]) -> None:
        """Send the present state of the VMs, if states are wanted, and everything from now on."""
        self._feed.add(self)
        for status in statuses:
            self.vm_changed(status)
        self._send_states()

    def end(self) -> None:
        """Send nothing more."""
        self._feed.remove(self)
        if self._timer is not None:
            self._timer.cancel()

    # What the feed calls.

    def vm_changed(self, vm: VmStatus) -> None:
        """Keep the newest record until the VM's interval is over."""
        if self._states_s is None or not self._is_wanted(vm.id):
            return
        self._changed[vm.id] = vm
        self._send_later(self._states_s)

    def vm_gone(self, vm: VmId) -> None:
        """Drop its record."""
        self._changed.pop(vm, None)

    def vm_event(self, vm: VmId, event: Event) -> None:
        """Send it."""
        if self._is_wanted(vm):
            self._send(event_object(vm, event))

    def host_changed(self, host: HostStatus) -> None:
        """Keep the newest record until the interval is over."""
        if self._states_s is not None and self._vm is None:
            self._changed_host = host
            self._send_later(self._states_s)

    def host_event(self, event: Event) -> None:
        """Send it."""
        if self._vm is None:
            self._send(event_object(None, event))

    def sampled(self) -> None:
        """Nothing: figures come with the VM's record."""

    def _is_wanted(self, vm: str) -> bool:
        return self._vm is None or self._vm == vm

    def _send_later(self, states_s: float) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(states_s, self._send_states)

    def _send_states(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        now_s, ts = time.monotonic(), utc_now()
        changed, self._changed = self._changed, {}
        for status in changed.values():
            self._send(vm_object(status, self._host, now_s, ts))
        host, self._changed_host = self._changed_host, None
        if host is not None:
            self._send({"schema": SCHEMA, "ts": rfc3339(ts), "host": self._host, **host_figures(host)})

    def _send(self, value: Mapping[str, object]) -> None:
        if self._writer.is_closing():
            return
        if self._writer.transport.get_write_buffer_size() > _MOST_UNSENT:
            self._missed += 1
            return
        if self._missed:
            lagged = Event("lagged", utc_now(), {"missed": self._missed})
            self._missed = 0
            self._writer.write(self._encode_line(event_object(None, lagged)))
        self._writer.write(self._encode_line(value))
