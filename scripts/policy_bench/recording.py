"""The recording of one run: samples ten times a second, kills, and the agent's decisions."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Final

BEFORE_KILL_S: Final = 3.0


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample of a guest, in bytes, from inside the guest, its QEMU and /proc."""

    at_s: float
    actual: int
    available: int
    held: int  # by the workload
    wanted: int  # by the workload
    rss: int
    target: int | None  # the agent's last
    used: int | None = None  # of actual; None if the balloon moved during the sample
    booting: bool = False  # it may use all of its memory, even if QEMU's actual is less


@dataclass(frozen=True, slots=True)
class Decision:
    """One command that the agent sent."""

    at_s: float
    vm: str
    was: int | None
    now: int
    why: str


@dataclass(frozen=True, slots=True)
class Kill:
    """One workload that the guest's kernel killed, and the samples before that."""

    at_s: float
    vm: str
    samples: tuple[Sample, ...]
    decisions: tuple[Decision, ...]  # of any guest, in the same time


@dataclass(slots=True)
class Recording:
    """One run of one policy. Times are seconds since the start of the measured part."""

    policy: str
    deflate_on_oom: bool
    size: int  # of each guest
    budget: int
    seconds: float
    rests_from_s: float
    samples: dict[str, list[Sample]] = field(default_factory=dict)
    kills_at: list[tuple[float, str]] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)
    crashes: int = 0  # guests that ended or rebooted unexpectedly
    oom_kills: int = 0  # as the guests' kernels count them
    settled_after_s: float = 0.0  # from the agent's start until the guests were within the budget

    def at(self, vm: str, at_s: float) -> Sample | None:
        """Return the last sample of a guest at a moment."""
        samples = self.samples.get(vm, [])
        index = bisect_right(samples, at_s, key=attrgetter("at_s"))
        return samples[index - 1] if index else None

    @property
    def kills(self) -> Sequence[Kill]:
        """Return every kill with the samples before it."""
        return [
            Kill(
                at_s,
                vm,
                tuple(one for one in self.samples[vm] if at_s - BEFORE_KILL_S <= one.at_s <= at_s + 0.2),
                tuple(one for one in self.decisions if at_s - BEFORE_KILL_S <= one.at_s <= at_s + 0.2),
            )
            for at_s, vm in self.kills_at
        ]
