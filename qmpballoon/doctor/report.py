"""The findings as JSON objects, and as text for a terminal. Pure."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from qmpballoon.doctor.facts import ExaminedHost, ExaminedVm
from qmpballoon.doctor.findings import SEVERITIES, Finding, finding_of, worst_first
from qmpballoon.doctor.host_rules import host_findings, host_not_told
from qmpballoon.doctor.vm_rules import abilities, not_told, vm_findings
from qmpballoon.log import one_line

_FEATURES: Final = {"deflate_on_oom": "deflate-on-oom", "free_page_reporting": "free-page-reporting"}
_COMMAND: Final = re.compile(r"`([^`]*)`")  # what must be typed
_NO_BREAK: Final = "\0"  # no character of a finding, and no blank for textwrap
_WORDS: Final = {
    "on": "on",
    "offered": "offered",
    "refused": "refused by the guest",
    "not-offered": "off",
}


@dataclass(frozen=True, slots=True)
class Examination:
    """The findings about one VM or the host, worst first, as they are shown.

    ``can`` is empty for the host; ``not_told`` has what could not be found out; ``qemu`` is the version.
    """

    findings: Sequence[Finding]
    can: Mapping[str, object] = field(default_factory=dict)
    not_told: Sequence[str] = ()
    qemu: str | None = None

    @property
    def fails(self) -> bool:
        """Tell whether ``--strict`` fails on it: on errors and warnings, not on notes."""
        return any(finding.severity != "note" for finding in self.findings)

    @property
    def rank(self) -> int:
        """How bad it is: 0 is the worst."""
        return min((SEVERITIES.index(finding.severity) for finding in self.findings), default=len(SEVERITIES))

    def as_json(self) -> dict[str, object]:
        """Return it as a JSON object."""
        of_vm = {"can": dict(self.can), "qemu": self.qemu} if self.can else {}
        return {
            "findings": [finding.as_json() for finding in self.findings],
            **of_vm,
            "not_told": list(self.not_told),
        }


def of_vm(vm: ExaminedVm) -> Examination:
    """Judge a VM."""
    return Examination(vm_findings(vm), abilities(vm), not_told(vm), vm.qemu)


def of_host(host: ExaminedHost) -> Examination:
    """Judge the host."""
    return Examination(host_findings(host), {}, host_not_told(host))


def vm_result(vm: ExaminedVm) -> dict[str, object]:
    """Return the result of the request ``doctor`` of a VM."""
    return of_vm(vm).as_json()


def host_result(host: ExaminedHost) -> dict[str, object]:
    """Return the result of the request ``doctor`` of the host."""
    return of_host(host).as_json()


def examination_of(value: object) -> Examination:
    """Return what an agent sent as the result of the request ``doctor``; what is invalid is left out."""
    result = value if isinstance(value, dict) else {}
    findings, can, told, qemu = (result.get(key) for key in ("findings", "can", "not_told", "qemu"))
    return Examination(
        worst_first([found for each in _list(findings) if (found := finding_of(each)) is not None]),
        can if isinstance(can, dict) else {},
        [one_line(each) for each in _list(told)],
        one_line(qemu) if isinstance(qemu, str) else None,
    )


def merged(examinations: Iterable[Examination]) -> Examination:
    """Return the host's findings as several agents made them; each once."""
    findings: dict[Finding, None] = {}
    told: dict[str, None] = {}
    for each in examinations:
        findings |= dict.fromkeys(each.findings)
        told |= dict.fromkeys(each.not_told)
    return Examination(worst_first(list(findings)), {}, list(told))


def summary(examination: Examination) -> str:
    """Return how many findings there are: ``1 error, 2 notes``."""
    counts = {
        severity: sum(finding.severity == severity for finding in examination.findings)
        for severity in SEVERITIES
    }
    parts = [f"{count} {severity}{'s' * (count > 1)}" for severity, count in counts.items() if count]
    return ", ".join(parts) or "no findings"


def capabilities(can: Mapping[str, object]) -> str:
    """Return what a balloon can do, in words: ``driver up, statistics, deflate-on-oom on``."""
    parts = []
    driver, statistics = can.get("driver"), can.get("statistics")
    if isinstance(driver, bool):
        parts.append("driver up" if driver else "no driver")
    if isinstance(statistics, bool):
        parts.append("statistics" if statistics else "no statistics")
    parts += [
        f"{name} {_WORDS[word]}" for key, name in _FEATURES.items() if (word := str(can.get(key))) in _WORDS
    ]
    if can.get("frees") is False:
        parts.append("frees no host memory")
    return ", ".join(parts)


def lines_of(
    name: str, about: str, examination: Examination, *, width: int, explained: set[str]
) -> list[tuple[str, str]]:
    """Return lines for a terminal, each with its colour word: a severity, ``name`` or empty.

    ``about`` follows the name. What a word means is told once: ``explained`` has those that were told.
    """
    lines = [("name", f"{one_line(name)}: {summary(examination)}{f'  ({one_line(about)})' if about else ''}")]
    can = capabilities(examination.can)
    lines += [("", line) for line in _filled(can, "  ", width)]
    for finding in examination.findings:
        head = f"  {finding.severity.upper():7} {finding.word}: "
        first, *more = _filled(finding.seen, "          ", width, first=head)
        lines += [(finding.severity, first), *(("", line) for line in more)]
        if finding.word not in explained:
            explained.add(finding.word)
            lines += [("", line) for line in _filled(finding.means, "          ", width)]
        mend = _COMMAND.sub(lambda found: found[1].replace(" ", _NO_BREAK), finding.mend)
        lines += [("", line) for line in _filled(mend, "          ", width, first="       -> ")]
    for each in examination.not_told:
        lines += [("", line) for line in _filled(each, "          ", width, first="  not told: ")]
    return lines


def _filled(text: str, indent: str, width: int, *, first: str | None = None) -> list[str]:
    """Return the lines of a text; words and what must be typed are not broken."""
    if not text:
        return []
    lines = textwrap.wrap(
        text,
        width,
        initial_indent=indent if first is None else first,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return [line.replace(_NO_BREAK, " ") for line in lines]


def _list(value: object) -> list[object]:
    return value if isinstance(value, list) else []
