"""When each VM is polled next: one timer for all of them.

VMs whose pauses end in the same slot are polled together, so that their replies arrive together, too: few
wake-ups of the loop serve many VMs. A slot with many VMs is served in parts, between which other tasks run.
"""

from __future__ import annotations

import asyncio
import heapq
from collections import deque
from math import ceil
from typing import Final, Protocol

SLOT_S: Final = 0.05
SHORT_SLOT_S: Final = 0.005  # for short pauses: of guests that are thin, growing or moving
_SHORT_S: Final = 0.5
_SLOTS: Final = round(SLOT_S / SHORT_SLOT_S)
MOST_AT_ONCE: Final = 32


class Member(Protocol):
    """What is polled: a VM."""

    def due(self) -> None:
        """Poll; it must return at once, and put itself on the wheel again."""


class Wheel:
    """Calls each member when its pause is over, never earlier."""

    def __init__(self) -> None:
        self._due: dict[Member, int] = {}  # by member: its slot
        self._slots: dict[int, list[Member]] = {}
        self._order: list[int] = []  # a heap of the slots
        self._ready: deque[tuple[int, Member]] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._wakeup = asyncio.Event()
        self._latest_s = 0.0

    def put(self, member: Member, pause_s: float) -> None:
        """Call a member after this pause, in place of an earlier time that was set."""
        at_s = asyncio.get_running_loop().time() + pause_s
        slot = ceil(at_s / SHORT_SLOT_S) if pause_s < _SHORT_S else ceil(at_s / SLOT_S) * _SLOTS
        if self._due.get(member) == slot:
            return
        self.remove(member)
        self._due[member] = slot
        members = self._slots.get(slot)
        if members is not None:
            members.append(member)
            return
        self._slots[slot] = [member]
        heapq.heappush(self._order, slot)
        if self._order[0] == slot:
            self._arm()

    def remove(self, member: Member) -> None:
        """Do not call a member any more."""
        slot = self._due.pop(member, None)
        if slot is not None and member in (members := self._slots.get(slot, [])):
            members.remove(member)

    def lateness_s(self) -> float:
        """Return how late members were called at most since this was asked last, in seconds."""
        latest_s, self._latest_s = self._latest_s, 0.0
        return latest_s

    async def run(self) -> None:
        """Call members for as long as the agent runs."""
        while True:
            self._wakeup.clear()
            self._collect()
            if not self._ready:
                await self._wakeup.wait()
                continue
            for _ in range(min(len(self._ready), MOST_AT_ONCE)):
                slot, member = self._ready.popleft()
                if self._due.get(member) == slot:
                    del self._due[member]
                    member.due()
            await asyncio.sleep(0)

    def _collect(self) -> None:
        """Move the members whose pause is over to the ready ones, and set the timer for the next slot."""
        now_s = asyncio.get_running_loop().time()
        while self._order and self._order[0] * SHORT_SLOT_S <= now_s:
            slot = heapq.heappop(self._order)
            late_s = now_s - slot * SHORT_SLOT_S
            members = self._slots.pop(slot)
            if members:
                self._latest_s = max(self._latest_s, late_s)
            self._ready.extend((slot, member) for member in members)
        self._arm()

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._order:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_at(self._order[0] * SHORT_SLOT_S, self._wakeup.set)
