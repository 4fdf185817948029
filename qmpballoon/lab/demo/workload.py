"""What the demo's guests want to hold over a minute: bursts, one after another, that fit the budget. Pure.

At every moment all demands together fit into the budget, with a margin: a policy that moves memory can meet
them all. An equal part of the budget is enough for some of them, not for all.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from qmpballoon.units import MIB

SIZE: Final = 192 * MIB  # of each guest
NAMES: Final = ("web", "db", "mail", "build", "test")
BUDGET: Final = SIZE * len(NAMES) * 62 // 100 // MIB * MIB
EQUAL_PART: Final = BUDGET // len(NAMES)
IDLE_MIB: Final = 8  # that an idle workload holds
MIB_PER_S: Final = 12
PLAYED_S: Final = 54.0  # at the end, while all are idle again


@dataclass(frozen=True, slots=True)
class Step:
    """From ``at_s`` on a workload wants to hold ``mib``; it shrinks to it at once, or grows to it."""

    at_s: float
    mib: int


SCRIPT: Final[Mapping[str, Sequence[Step]]] = {
    "web": (Step(2, 100), Step(19, IDLE_MIB), Step(41, 90), Step(52, IDLE_MIB)),
    "db": (Step(9, 50), Step(25, IDLE_MIB)),
    "mail": (Step(21, 50), Step(33, IDLE_MIB)),
    "build": (Step(26, 110), Step(40, IDLE_MIB)),
    "test": (),  # always idle
}


def step_at(steps: Sequence[Step], at_s: float) -> Step:
    """Return the step in force, ``at_s`` seconds after the start."""
    return next((step for step in reversed(steps) if step.at_s <= at_s), Step(0, IDLE_MIB))


def wanted(steps: Sequence[Step], at_s: float) -> int:
    """Return what an unhindered workload holds ``at_s`` seconds after the start, in bytes."""
    level = float(IDLE_MIB)
    for step, following in itertools.zip_longest(steps, steps[1:]):
        if step.at_s > at_s:
            break
        grown = level + (min(at_s, following.at_s if following else at_s) - step.at_s) * MIB_PER_S
        level = min(step.mib, grown) if step.mib > level else step.mib
    return int(level * MIB)
