"""What is on the screen: the rows of hosts and VMs in their order, made of a fleet's records. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Final

from qmpballoon.fleet import FleetHost, FleetVm
from qmpballoon.top.history import History
from qmpballoon.top.rows import (
    SORT_KEYS,
    HostRow,
    Row,
    SortKey,
    View,
    VmRow,
    host_row,
    in_order,
    matching,
    natural,
    vm_row,
)

VIEWS: Final[tuple[View, ...]] = ("tree", "vms", "hosts")


@dataclass(slots=True)
class Wishes:
    """What the person wants to see: a view, an order, a filter; ``host`` is a name or a glob."""

    view: View = "tree"
    key: SortKey = "name"
    reverse: bool = False
    filter: str = ""
    host: str | None = None

    def next_view(self) -> None:
        """Go to the next view."""
        self.view = VIEWS[(VIEWS.index(self.view) + 1) % len(VIEWS)]

    def next_key(self, step: int = 1) -> None:
        """Go to the next order."""
        self.key = SORT_KEYS[(SORT_KEYS.index(self.key) + step) % len(SORT_KEYS)]

    def sort_by(self, key: SortKey) -> None:
        """Order by a key; by the same again: the other way round."""
        self.key, self.reverse = key, self.key == key and not self.reverse


@dataclass(frozen=True, slots=True)
class Counts:
    """How many there are, and how many the filter lets through."""

    hosts: int = 0
    vms: int = 0
    not_ok: int = 0
    shown: int = 0


class Picture:
    """The rows to draw, top first. A VM's row is made anew only when its record is another one."""

    def __init__(self, wishes: Wishes | None = None) -> None:
        self.wishes: Final = wishes or Wishes()
        self.history: Final = History()
        self.rows: list[Row] = []
        self.counts = Counts()
        self._vms: dict[str, VmRow] = {}
        self._hosts: dict[str, HostRow] = {}

    def update(self, hosts: Mapping[str, FleetHost], vms: Mapping[str, FleetVm], now_s: float) -> None:
        """Take the present records; ``now_s`` is monotonic. Call `arrange` afterwards."""
        known, counted = self._vms, dict[str, list[int]]()
        current: dict[str, VmRow] = {}
        for key, record in vms.items():
            if not self._is_wanted(record.host):
                continue
            row = known.get(key)
            if row is None or row.record is not record:
                row = vm_row(record)
                self.history.add(row, now_s)
            current[key] = row
            count = counted.setdefault(record.host, [0, 0])
            count[0] += 1
            count[1] += row.online
        for gone in known.keys() - current.keys():
            self.history.forget(gone)
        self._vms = current
        before, self._hosts = self._hosts, {}
        for name in sorted(dict.fromkeys((*hosts, *counted)), key=natural):
            if self._is_wanted(name):
                made = host_row(hosts.get(name), name, *counted.get(name, (0, 0)))
                same = before.get(name)
                self._hosts[name] = same if same is not None and same == made else made

    def arrange(self) -> None:
        """Order and filter the rows as wished."""
        wishes, matches = self.wishes, matching(self.wishes.filter)
        found = [row for row in self._vms.values() if matches(row)]
        self.counts = Counts(
            hosts=len(self._hosts),
            vms=len(self._vms),
            not_ok=sum(row.health != "ok" for row in self._vms.values()),
            shown=len(found),
        )
        if wishes.view == "hosts":
            self.rows = [*self._hosts_with(found)]
        elif wishes.view == "vms":
            self.rows = [*in_order(found, wishes.key, reverse=wishes.reverse)]
        else:
            of_host: dict[str, list[VmRow]] = {}
            for row in in_order(found, wishes.key, reverse=wishes.reverse):
                of_host.setdefault(row.host, []).append(row)
            self.rows = [row for host in self._hosts_with(found) for row in (host, *of_host.get(host.id, ()))]

    def vm(self, key: str) -> VmRow | None:
        """Return the row of a VM by its id, shown or not."""
        return self._vms.get(key)

    def _hosts_with(self, found: list[VmRow]) -> list[HostRow]:
        """Return the hosts; with a filter only those with a VM that matches."""
        if not self.wishes.filter:
            return list(self._hosts.values())
        wanted = {row.host for row in found}
        return [host for host in self._hosts.values() if host.id in wanted]

    def _is_wanted(self, host: str) -> bool:
        return self.wishes.host is None or fnmatchcase(host, self.wishes.host)
