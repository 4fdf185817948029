"""A queue that serves groups in turn, and the members of each group in turn. No I/O."""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(slots=True)
class _Group(Generic[T]):
    members: OrderedDict[str, deque[T]] = field(default_factory=OrderedDict)
    length: int = 0


@dataclass(slots=True)
class Turns(Generic[T]):
    """Items by group and member. Those of one member stay in order."""

    _groups: OrderedDict[str, _Group[T]] = field(default_factory=OrderedDict)
    _length: int = 0

    def __len__(self) -> int:
        return self._length

    def put(self, group: str, member: str, item: T) -> None:
        """Add an item as the last one of its member."""
        found = self._groups.get(group)
        if found is None:
            found = self._groups[group] = _Group()
        found.members.setdefault(member, deque()).append(item)
        found.length += 1
        self._length += 1

    def take(self) -> T | None:
        """Remove and return the next item, None if there is none."""
        if not self._groups:
            return None
        name, group = self._groups.popitem(last=False)
        member, items = group.members.popitem(last=False)
        item = items.popleft()
        if items:
            group.members[member] = items
        group.length -= 1
        self._length -= 1
        if group.length:
            self._groups[name] = group
        return item

    def has_share(self, group: str, most: int) -> bool:
        """Tell whether one more item of a group keeps it within an even share of ``most`` items.

        One share is left for a group that comes next.
        """
        found = self._groups.get(group)
        return found is None or found.length < most // (len(self._groups) + 1)
