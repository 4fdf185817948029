"""The reasons that decisions carry: stable words, what each means, and what an operator may do. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Word:
    """What a reason means, and what an operator may do about it, in a sentence each."""

    means: str
    do: str


_NOTHING: Final = "Nothing: this is the normal course."
_PEER: Final = "Nothing, or choose another policy with set-policy."

WORDS: Final[Mapping[str, Word]] = {
    # fairshare: moves
    "grow": Word(
        "The guest has less than half of the headroom it is entitled to, and gets the rest.", _NOTHING
    ),
    "thin": Word(
        "The guest is near an emergency and grows before it comes to one.",
        "If it comes often, raise the guest's floor or its shares.",
    ),
    "emergency": Word(
        "The guest is about to run out of memory and grows before all others, whatever its mode.",
        "If it comes often, raise its floor, turn on deflate-on-oom, or give the host a larger budget.",
    ),
    "cache": Word("The guest uses its page cache in full and there is memory for more.", _NOTHING),
    "give": Word("The guest has memory to spare that another one lacks, or the free pool is low.", _NOTHING),
    # fairshare and guard: holds
    "at-ease": Word("The guest has what it needs and nobody needs what it has.", _NOTHING),
    "no-figures": Word(
        "The guest has sent no usable figures, or may not be moved by the policy.",
        "If it lasts, see whether the guest's balloon driver is loaded and sends statistics.",
    ),
    "no-decision": Word("The policy has nothing to say about the guest.", _NOTHING),
    "awaits-memory": Word(
        "The guest grows as soon as other guests have given the memory that they were asked for.",
        "If it lasts, look for guests that are stuck, or give the host a larger budget.",
    ),
    # guard: trust and problems
    "nothing-left": Word(
        "The guest has less to give than it was asked for, and keeps what it has.", _NOTHING
    ),
    "stuck": Word(
        "The balloon did not move for 5 s: its target is set to actual, and it is not moved for a while.",
        "Look at the guest: its driver may hang, or its memory may be locked.",
    ),
    "backs-off": Word(
        "The balloon was stuck and is not moved for 5 s up to a minute.",
        "As for stuck; nothing if it moves again by itself.",
    ),
    "probe": Word("The balloon was stuck and is asked for 12 MiB, to see whether it moves again.", _NOTHING),
    "contradicted": Word(
        "The guest reports much available memory and gives none, so its figures are ignored for a minute.",
        "Look at the guest: it may have its own lower limit, or wrong statistics.",
    ),
    "untrusted": Word(
        "The guest gave memory that its QEMU did not free on the host, so it is charged by what is resident.",
        "Look for hugepages, locked memory or a passed-through device; such a VM is better left at its size.",
    ),
    "stale": Word(
        "The guest's figures are too old to take memory from it.", "If it lasts, look at the guest."
    ),
    "long-stale": Word(
        "The guest has sent no figures for half a minute: it gives none and may grow to an equal part.",
        "Look at the guest: it may hang, or its balloon driver may be unloaded.",
    ),
    "figures-missing": Word(
        "The guest does not report how much memory it has left: it gives none and may grow to an equal part.",
        "Start the guest's statistics (Windows: the balloon service), or set its target by hand.",
    ),
    "grace": Word("The guest has just come up and gives no memory before its grace time is over.", _NOTHING),
    "booting": Word(
        "No balloon driver is up, so the guest is charged with its whole size and left at its ceiling.",
        "If it lasts, load the balloon driver in the guest.",
    ),
    "paused": Word("The guest does not run, so its balloon is left alone.", "Resume it if it should run."),
    "migrating": Word("The guest is being migrated, so its balloon is left alone.", _NOTHING),
    "silent": Word("QEMU does not answer on its monitor.", "Look at the QEMU process."),
    "foreign-hand": Word(
        "Another controller moved the balloon, so it is not moved for a minute.",
        "Find the other controller, and let only one of the two set this VM's balloon.",
    ),
    # guard: modes
    "manual": Word(
        "The VM is in manual mode, or its target was set in that mode.",
        "Set its mode to auto to hand it over.",
    ),
    "observe": Word("The VM is only observed.", "Set its mode to auto to hand it over."),
    "on-exit": Word("The agent stops and leaves the guest with more memory, as on_exit says.", _NOTHING),
    # peers
    "static-split": Word("fixed: the guest gets its part of the budget, by shares.", _PEER),
    "waits-for-shrinks": Word("fixed: the guest grows once the others have shrunk.", _PEER),
    "equal-part-of-range": Word("proportional: all have the same part of their ranges.", _PEER),
    "free-first": Word("proportional: the guest shrinks before others grow.", _PEER),
    "pinned-stuck": Word("proportional: the guest made no progress and is left where it is.", _PEER),
    "host-below-target": Word("proxmox: the host uses less than 80 % of its memory.", _PEER),
    "host-above-target": Word("proxmox: the host uses more than 80 % of its memory.", _PEER),
    "host-pressure": Word("mom: less than a fifth of the host's memory is free.", _PEER),
    "no-host-pressure": Word("mom: a fifth of the host's memory is free or more.", _PEER),
    "above-preference": Word("qubes: the guest has more than it prefers.", _PEER),
    "below-preference": Word("qubes: the guest has less than it prefers, and donors have given.", _PEER),
    "donors-late": Word("qubes: the guest gets what is there, as donors did not deliver.", _PEER),
}
"""By word, in the order of the documents."""
