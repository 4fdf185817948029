"""A finding, and the rules that make findings of facts. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Final, Generic, Literal, TypeAlias, TypeVar, get_args

from qmpballoon.log import one_line

F = TypeVar("F")

Severity: TypeAlias = Literal["error", "warning", "note"]
SEVERITIES: Final[tuple[Severity, ...]] = get_args(Severity)
"""The worst first. ``error``: the balloon does not work, or the host is at risk; ``warning``: it works less
well, or at a risk; ``note``: what an operator should know and may want."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was found: what was seen, what that means, and the option or command that mends it.

    What must be typed stands between backquotes in ``mend``.
    """

    word: str
    severity: Severity
    seen: str
    means: str
    mend: str

    def as_json(self) -> dict[str, object]:
        """Return it as a JSON object."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Rule(Generic[F]):
    """A row of a table of findings.

    ``see`` returns what was seen of it, with figures; None: it is not so. ``mend`` may name ``{pid}``,
    ``{socket}`` and ``{device}``.
    """

    word: str
    severity: Severity
    means: str
    mend: str
    see: Callable[[F], str | None]


def found(rules: Iterable[Rule[F]], facts: F, places: Mapping[str, object]) -> list[Finding]:
    """Return what the rules find in the facts, worst first; ``places`` fill the gaps of ``mend``.

    Text that comes from a VM is made one line without control characters.
    """
    findings = [
        Finding(rule.word, rule.severity, one_line(seen), rule.means, one_line(rule.mend.format_map(places)))
        for rule in rules
        if (seen := rule.see(facts)) is not None
    ]
    return worst_first(findings)


def worst_first(findings: Sequence[Finding]) -> list[Finding]:
    """Return findings sorted by severity; those of one severity stay as they are."""
    return sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity))


def finding_of(value: object) -> Finding | None:
    """Return the finding in a JSON object that an agent sent; None if it is none."""
    if not isinstance(value, dict):
        return None
    texts = {key: value.get(key) for key in ("word", "seen", "means", "mend")}
    severity = value.get("severity")
    if severity not in SEVERITIES or not all(isinstance(text, str) for text in texts.values()):
        return None
    return Finding(severity=severity, **{key: one_line(text) for key, text in texts.items()})
