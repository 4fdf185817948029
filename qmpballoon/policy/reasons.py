"""The reasons that decisions carry: stable words, their meaning, and what an operator may do. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Word:
    """The meaning of a reason, and what an operator may do about it, in one sentence each."""

    means: str
    do: str


_NOTHING: Final = "Nothing: this is normal."
_PEER: Final = "Nothing, or choose another policy with set-policy."

WORDS: Final[Mapping[str, Word]] = {
    # fairshare: moves
    "grow": Word(
        "The guest has less than half of the headroom it is entitled to, and gets the rest.", _NOTHING
    ),
    "thin": Word(
        "The guest is near an emergency and grows before it reaches one.",
        "If it happens often, raise the guest's floor or its shares.",
    ),
    "emergency": Word(
        "The guest is about to run out of memory and grows before all others, whatever its mode.",
        "If it happens often, raise its floor, turn on deflate-on-oom, or give the host a larger budget.",
    ),
    "cache": Word("The guest uses its page cache in full and there is memory for more.", _NOTHING),
    "give": Word("The guest has memory to spare that another one lacks, or the free pool is low.", _NOTHING),
    "even-out": Word("No guest lacks memory, and guests at rest are brought to equal headroom.", _NOTHING),
    # fairshare and guard: holds
    "at-ease": Word("The guest has what it needs, and nothing is taken from it.", _NOTHING),
    "unused-claims": Word(
        "The guest often got memory in emergencies and did not use it: for some time it has no urgent ones.",
        "Check the guest; if it has real short peaks, raise its floor.",
    ),
    "no-figures": Word(
        "The guest has sent no usable figures, or may not be moved by the policy.",
        "If it lasts, check whether the guest's balloon driver is loaded and sends statistics.",
    ),
    "no-decision": Word("The policy made no decision about the guest.", _NOTHING),
    "awaits-memory": Word(
        "The guest grows as soon as pending shrinks of other guests are complete.",
        "If it lasts, look for guests that are stuck, or give the host a larger budget.",
    ),
    # guard: trust and problems
    "nothing-left": Word("The guest cannot shrink to its target, so its target is set to actual.", _NOTHING),
    "stuck": Word(
        "The balloon did not move for 5 s: its target is set to actual, and it is not shrunk for some time.",
        "Check the guest: its driver may hang, or its memory may be locked.",
    ),
    "backs-off": Word(
        "The balloon was stuck and is not shrunk for 5 s up to a minute.",
        "As for stuck; nothing if it moves again.",
    ),
    "probe": Word(
        "The balloon was stuck and is shrunk by 12 MiB, to check whether it moves again.", _NOTHING
    ),
    "contradicted": Word(
        "The guest reports much available memory and gives none, so its figures are ignored for a minute.",
        "Check the guest: it may have its own lower limit, or wrong statistics.",
    ),
    "untrusted": Word(
        "The guest gave memory that its QEMU did not free on the host, so it is charged by what is resident.",
        "Check for hugepages, locked memory or a passed-through device; leave such a VM at its size.",
    ),
    "stale": Word("The guest's figures are too old to take memory from it.", "If it lasts, check the guest."),
    "long-stale": Word(
        "The guest has sent no figures for half a minute: it gives none and may grow to an equal part.",
        "Check the guest: it may hang, or its balloon driver may be unloaded.",
    ),
    "awaits-figures": Word(
        "The agent has just begun or resumed to observe the guest, and moves it in an emergency only.",
        "Nothing: the guest's next figures end it, or half a minute does.",
    ),
    "figures-missing": Word(
        "The guest does not report how much memory it has left: it gives none and may grow to an equal part.",
        "Start the guest's statistics (Windows: the balloon service), or set its target by hand.",
    ),
    "grace": Word("The guest has just booted and is not shrunk before its grace time is over.", _NOTHING),
    "booting": Word(
        "No balloon driver is up, so the guest is charged with its whole size and left at its ceiling.",
        "If it lasts, load the balloon driver in the guest.",
    ),
    "paused": Word("The guest does not run, so its balloon is not moved.", "Resume it if it should run."),
    "migrating": Word("The guest is being migrated, so its balloon is not moved.", _NOTHING),
    "silent": Word("QEMU does not answer on its monitor.", "Check the QEMU process."),
    "foreign-hand": Word(
        "Another controller moved the balloon, so it is not moved for a minute.",
        "Find the other controller, and let only one of the two set this VM's balloon.",
    ),
    # guard: modes
    "manual": Word(
        "The VM is in manual mode, or its target was set in that mode.",
        "Let the policy decide again: qmpballoon set VM auto.",
    ),
    "pulse": Word(
        "A request takes what the guest can spare for a moment, and gives all of it back.", _NOTHING
    ),
    "observe": Word(
        "The VM is in observe mode: it is counted and not moved.",
        "Let the policy decide: qmpballoon set VM auto, where the host's mode is auto.",
    ),
    "on-exit": Word("The agent stops and grows the guest, as on_exit says.", _NOTHING),
    # peers
    "static-split": Word("fixed: the guest gets its part of the budget, by shares.", _PEER),
    "waits-for-shrinks": Word("fixed: the guest grows when the others have shrunk.", _PEER),
    "equal-part-of-range": Word("proportional: all have the same part of their ranges.", _PEER),
    "free-first": Word("proportional: the guest shrinks before others grow.", _PEER),
    "pinned-stuck": Word("proportional: the guest made no progress and is left at its size.", _PEER),
    "host-below-target": Word("proxmox: the host uses less than 80 % of its memory.", _PEER),
    "host-above-target": Word("proxmox: the host uses more than 80 % of its memory.", _PEER),
    "host-pressure": Word("mom: less than a fifth of the host's memory is free.", _PEER),
    "no-host-pressure": Word("mom: a fifth of the host's memory is free or more.", _PEER),
    "above-preference": Word("qubes: the guest has more than it prefers.", _PEER),
    "below-preference": Word("qubes: the guest has less than it prefers, and donors have shrunk.", _PEER),
    "donors-late": Word(
        "qubes: the guest gets the free memory, because donors did not shrink in time.", _PEER
    ),
}
"""By word, in the order of the documents."""

MAY_NEED_A_PERSON: Final = frozenset(
    ("emergency", "stuck", "contradicted", "untrusted", "foreign-hand", "long-stale")
)
"""Reasons that an operator should hear of each time."""

KEPT_HOLDS: Final = frozenset(
    (
        "unused-claims",
        "awaits-memory",
        "stuck",
        "backs-off",
        "contradicted",
        "untrusted",
        "stale",
        "long-stale",
        "figures-missing",
        "paused",
        "migrating",
        "silent",
        "foreign-hand",
        "waits-for-shrinks",
        "pinned-stuck",
    )
)
"""Reasons of holds that a VM's history keeps; those of a guest at rest it does not."""
