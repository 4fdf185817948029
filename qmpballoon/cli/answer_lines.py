"""The results of requests as lines for a person. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from qmpballoon.cli.why_lines import lines_of as why_lines_of
from qmpballoon.units import format_size

_SIZES: Final = frozenset(
    {
        *("size", "actual", "balloon", "target", "floor", "ceiling", "held", "rss", "room", "headroom"),
        *("freed", "keep", "budget", "reserve", "used", "available", "free", "caches", "total"),
    }
)
_LONGEST_S: Final = 1e12  # what is longer is no time
_OF_VM: Final = ("health", "mode", "size", "actual", "target", "held", "rss", "why")


def lines_of(result: object) -> list[str]:
    """Return a line for each element of a list, else one line; none if there is nothing to say."""
    if isinstance(result, list):
        return [line for each in result for line in lines_of(each)]
    if not isinstance(result, Mapping):
        return [] if result is None else [str(result)]
    if "decisions" in result and "why" in result:
        return list(why_lines_of(result))
    if isinstance(findings := result.get("findings"), list):
        return [_finding(each) for each in findings] or ["no findings"]
    if "run_state" in result and "guest" in result:
        result = _vm_figures(result)
    return ["  ".join(parts)] if (parts := _parts(result)) else []


def _finding(finding: object) -> str:
    if not isinstance(finding, Mapping):
        return str(finding)
    return f"{finding.get('severity')}  {finding.get('word')}: {finding.get('seen')}"


def _vm_figures(vm: Mapping[str, object]) -> dict[str, object]:
    """Return what a person wants to know of a VM object."""
    guest = vm.get("guest")
    available = guest.get("available") if isinstance(guest, Mapping) else None
    return {key: vm.get(key) for key in _OF_VM} | {"available": available}


def _parts(values: Mapping[str, object], *, are_sizes: bool = False) -> list[str]:
    parts: list[str] = []
    for key, value in values.items():
        match value:
            case None:
                continue
            case bool():
                text = "yes" if value else "no"
            case int() if are_sizes or key in _SIZES:
                text = format_size(value)
            case int() | float() if key.endswith("_s") and abs(value) < _LONGEST_S:
                text = f"{value:g} s"
            case Mapping():
                text = ", ".join(_parts(value, are_sizes=key == "gave")) or "none"
            case list():
                text = f"{len(value)}" if any(isinstance(each, Mapping) for each in value) else _joined(value)
            case _:
                text = str(value)
        parts.append(f"{key} {text}")
    return parts


def _joined(values: list[object]) -> str:
    return ", ".join(map(str, values)) or "none"
