"""The complete, commented file that ``--print-default-config`` prints, made from the tree. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterator

from qmpballoon.config.environment import Surroundings
from qmpballoon.config.reader import defaults
from qmpballoon.config.tree import TABLES, Key, VmMatch, keys

_HEAD = """\
# Configuration of qmpballoon (TOML). Every value here is the default; remove the # before a key to
# change it. Check with: qmpballoon check-config FILE. The running agent reads it again on SIGHUP.
#
# Sizes are text like "512MiB", "1.5GiB", "500MB" (1000s) or "50%", or a number of bytes.
# Times are seconds."""

_MATCH = """\
# Settings of some VMs. All matches that fit apply, in file order, over those of [vm]; every key of
# [vm] may stand in one. For example:
#
# [[vm.match]]"""


def default_text(surroundings: Surroundings | None = None) -> str:
    """Return the default file; ``surroundings`` None: those of this process.

    Lines that start with ``#key = `` are settings; without the ``#`` they set the defaults. Keys without
    a default are examples, after ``# ``.
    """
    base = defaults(surroundings)
    lines = [_HEAD]
    for table, record in TABLES.items():
        lines += ["", f"[{table}]"]
        for name, key in keys(record).items():
            lines += _entry(name, key, getattr(getattr(base, table), name))
    lines += ["", _MATCH]
    for name, key in keys(VmMatch).items():
        lines += [f"# # {line}" for line in key.about.splitlines()]
        lines += [f"# {name} = {key.example}"]
    lines += ['# floor = "1GiB"']
    return "\n".join(lines) + "\n"


def default_value(table: str, name: str, surroundings: Surroundings) -> str:
    """Return the default of a key as the file has it."""
    return _toml(getattr(getattr(defaults(surroundings), table), name))


def _entry(name: str, key: Key, default: object) -> Iterator[str]:
    for line in key.about.splitlines():
        yield f"# {line}"
    if key.example is not None:
        yield f"# {name} = {key.example}"
    else:
        yield f"#{name} = {_toml(default)}"


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return f"{value:.10g}"
    if isinstance(value, tuple):
        return f"[{', '.join(_toml(each) for each in value)}]"
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
