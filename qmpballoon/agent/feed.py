"""The feed: passes changes and events of VMs and of the host on to any number of listeners."""

from __future__ import annotations

from typing import Protocol

from qmpballoon.model.names import VmId
from qmpballoon.model.records import Event, HostStatus, VmStatus


class Listener(Protocol):
    """Takes changes and events. Every call must return at once and raise nothing: it runs in the caller."""

    def vm_changed(self, vm: VmStatus) -> None:
        """Take a VM's newest record; a VM that was not known appears."""

    def vm_gone(self, vm: VmId) -> None:
        """Note that a VM was forgotten or renamed."""

    def vm_event(self, vm: VmId, event: Event) -> None:
        """Take an event of a VM."""

    def host_changed(self, host: HostStatus) -> None:
        """Take the host's newest record."""

    def host_event(self, event: Event) -> None:
        """Take an event of the host."""

    def sampled(self) -> None:
        """Note that a tick is over: the figures of all VMs and of the host are current."""


class Feed:
    """Passes each call on to all listeners, in the order in which they were added."""

    def __init__(self) -> None:
        self._listeners: tuple[Listener, ...] = ()

    def add(self, listener: Listener) -> None:
        """Add a listener."""
        self._listeners = (*self._listeners, listener)

    def remove(self, listener: Listener) -> None:
        """Remove a listener; one that is not there is ignored."""
        self._listeners = tuple(other for other in self._listeners if other is not listener)

    def vm_changed(self, vm: VmStatus) -> None:
        """A VM changed, or appeared."""
        for listener in self._listeners:
            listener.vm_changed(vm)

    def vm_gone(self, vm: VmId) -> None:
        """A VM was forgotten or renamed."""
        for listener in self._listeners:
            listener.vm_gone(vm)

    def vm_event(self, vm: VmId, event: Event) -> None:
        """Something happened to a VM."""
        for listener in self._listeners:
            listener.vm_event(vm, event)

    def host_changed(self, host: HostStatus) -> None:
        """The host has new figures."""
        for listener in self._listeners:
            listener.host_changed(host)

    def host_event(self, event: Event) -> None:
        """Something happened to the host."""
        for listener in self._listeners:
            listener.host_event(event)

    def sampled(self) -> None:
        """A tick is over."""
        for listener in self._listeners:
            listener.sampled()
