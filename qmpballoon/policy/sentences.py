"""One sentence for each reason, with the figures of a decision, for a person who asks why. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from string import Formatter
from typing import Final

from qmpballoon.policy.reasons import WORDS
from qmpballoon.units import MIB, format_size

SENTENCES: Final[Mapping[str, str]] = {
    "grow": "the guest had {available} available of the {headroom} that it should keep",
    "thin": "the guest had {available} available; below {critical} an emergency begins",
    "emergency": "the guest was about to run out of memory, with {available} available",
    "cache": "the guest used its page cache of {caches} in full, and there was memory for more",
    "give": "the guest had {available} available, and others or the free pool lacked memory",
    "even-out": "no guest lacked memory, and those at rest are brought to equal headroom; "
    "this one had {available} available",
    "at-ease": "the guest had what it needs, with {available} available",
    "unused-claims": "the guest often got memory in emergencies and did not use it, so that it has no "
    "urgent ones for some time",
    "no-figures": "the guest sent no usable figures, or the policy may not move it",
    "no-decision": "the policy made no decision about the guest",
    "awaits-memory": "the guest had {available} available and grows as soon as other guests have shrunk",
    "nothing-left": "the guest held {held} and could not shrink to its target",
    "stuck": "the balloon did not move for 5 s and stood at {actual}",
    "backs-off": "the balloon was stuck at {actual}, and is not shrunk for 5 s up to a minute",
    "probe": "the balloon was stuck, and a shrink of 12 MiB shows whether it moves again",
    "contradicted": "the guest reported {available} available and gave none, so that its figures are "
    "ignored for a minute",
    "untrusted": "the guest gave memory that its QEMU did not free on the host, where {rss} are resident",
    "stale": "the guest's figures were too old to take memory from it",
    "long-stale": "the guest had sent no figures for half a minute, so that it gives none",
    "awaits-figures": "the agent had just begun or resumed to observe the guest",
    "figures-missing": "the guest did not report how much memory it has left, so that it gives none",
    "grace": "the guest had just booted and is not shrunk before its grace time is over",
    "booting": "no balloon driver was up, so that the guest is charged with all of its {size}",
    "paused": "the guest did not run",
    "migrating": "the guest was being migrated",
    "silent": "QEMU did not answer on its monitor",
    "foreign-hand": "another controller moved the balloon to {actual}, so that it is left alone for a minute",
    "manual": "its target was set by a request",
    "pulse": "a request takes what the guest can spare for a moment, and gives it back",
    "observe": "the VM was in observe mode",
    "on-exit": "the agent stopped and grew the guest, as on_exit says",
    "static-split": "fixed: its part of the budget of {budget}, by shares",
    "waits-for-shrinks": "fixed: it grows when the others have shrunk",
    "equal-part-of-range": "proportional: all got the same part of their ranges; "
    "this one has {floor} to {ceiling}",
    "free-first": "proportional: it shrank before others grew",
    "pinned-stuck": "proportional: it made no progress and is left at {actual}",
    "host-below-target": "proxmox: the host used less than 80 % of its memory",
    "host-above-target": "proxmox: the host used more than 80 % of its memory",
    "host-pressure": "mom: less than a fifth of the host's memory was free ({mem_available})",
    "no-host-pressure": "mom: a fifth of the host's memory was free or more ({mem_available})",
    "above-preference": "qubes: the guest had more than it prefers, with {available} available",
    "below-preference": "qubes: the guest had less than it prefers, with {available} available",
    "donors-late": "qubes: donors did not shrink in time, so that it got the free memory",
}
"""By word of `reasons.WORDS`. In braces are figures of the decision, or ``headroom``: what its target leaves
the guest beyond what it holds."""

_GROWS_FROM: Final = MIB  # bytes per second: less is not worth a word


def sentence(why: str, figures: Mapping[str, int | None], to: int | None = None) -> str:
    """Return why a decision was made, without a full stop.

    ``to`` is its target in bytes, None if the guest was left as it is. Where a figure is missing, or the word
    is of a newer agent, the sentence has none.
    """
    template, held = SENTENCES.get(why), figures.get("held")
    if template is None:
        return f"the reason is {why}"
    known = {**figures, "headroom": None if to is None or held is None else to - held}
    names = [name for _, name, _, _ in Formatter().parse(template) if name]
    if any(known.get(name) is None for name in names):
        means = WORDS[why].means.rstrip(".")
        return means if means.startswith("QEMU") else means[0].lower() + means[1:]
    return template.format(**{name: format_size(known[name]) for name in names})


def circumstances(figures: Mapping[str, int | None]) -> list[str]:
    """Return what else counted when a target was decided: the guest's growth, and the budget."""
    growth, budget, used = (figures.get(name) for name in ("growth", "budget", "used"))
    found = [f"it held {format_size(growth)} more each second"] if growth and growth >= _GROWS_FROM else []
    if budget is not None and used is not None:
        found.append(f"{format_size(used)} of the budget of {format_size(budget)} were used")
    return found
