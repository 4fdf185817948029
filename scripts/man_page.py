"""The manual page, qmpballoon(1), out of the program's parsers; `scripts/write_docs.py` writes it."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import groupby
from typing import Final

from qmpballoon import __version__
from qmpballoon.cli.program import complete_parser, verbs_of

_CODES: Final = {
    0: "Done.",
    1: "Failed; the message says what.",
    2: "Wrong usage or configuration, or another agent of this name runs.",
    3: "The VM or the broker cannot be reached.",
    4: "Not reached in time.",
    130: "Interrupted.",
}
_FILES: Final = {
    "/etc/qmpballoon/agent.toml": "The configuration that the service reads.",
    "/run/qmpballoon/*.qmp": "The monitors of VMs, where no other is named.",
    "/run/qmpballoon/agent.sock": "The control socket of a running agent, for members of its group.",
    "/var/lib/qmpballoon": "The state of the agent: names, limits, modes and manual targets.",
    "/etc/credstore/qmpballoon.mqtt-password": "The password of the broker, a credential of systemd.",
}
_ENVIRONMENT: Final = {
    "QMPBALLOON_BROKER": "The URL of the broker, for verbs that take --broker.",
    "QMPBALLOON_CONTROL": "The control socket, for verbs that take --control.",
    "NO_COLOR": "No colour, also on a terminal.",
}


def man_page() -> str:
    """Return the page in the language of troff, with the macros of man(7)."""
    return "\n".join(_lines()) + "\n"


def _lines() -> Iterator[str]:
    parser = complete_parser()
    yield '.\\" Made by scripts/write_docs.py'
    yield f'.TH QMPBALLOON 1 "" "qmpballoon {__version__}" "User Commands"'
    yield from (".SH NAME", "qmpballoon \\- moves memory between QEMU guests")
    yield from (".SH SYNOPSIS", ".B qmpballoon", "\\fIVERB\\fR [\\fIoptions\\fR] [\\fIarguments\\fR]")
    yield from (".SH DESCRIPTION", _text(parser.description or ""))
    yield from _sizes()
    yield ".SH OPTIONS"
    yield from _tagged_actions(parser)
    yield ".SH VERBS"
    for verb, below in verbs_of(parser).items():
        yield from (f".SS {_text(verb)}", _text(below.description or ""))
        yield from _tagged_actions(below)
        yield from _explained(below.epilog or "")
    for title, rows in (("EXIT STATUS", _CODES), ("FILES", _FILES), ("ENVIRONMENT", _ENVIRONMENT)):
        yield f".SH {title}"
        for word, meaning in rows.items():
            yield from (".TP", f".B {_text(str(word))}", _text(meaning))
    yield from (
        ".SH SEE ALSO",
        ".BR qemu-system-x86_64 (1),",
        ".BR systemd.service (5),",
        ".BR mosquitto (8)",
    )


def _sizes() -> Iterator[str]:
    yield ".PP"
    yield "A size is 512MiB, 1.5GiB, 500MB (1000s), 50% of the VM's size, or a number of bytes."
    yield "A VM is the path of its QMP socket or a quoted glob; while an agent runs, also its name."


def _tagged_actions(parser: argparse.ArgumentParser) -> Iterator[str]:
    for action in parser._actions:
        if action.help in (None, argparse.SUPPRESS) or isinstance(action, argparse._SubParsersAction):
            continue
        if action.dest == "help":
            continue
        about = str(action.help) % {**vars(action), "prog": parser.prog}
        yield from (".TP", _heading(action), _text(" ".join(about.split())))


def _heading(action: argparse.Action) -> str:
    name = action.metavar
    if name is None:
        name = "{" + ",".join(map(str, action.choices)) + "}" if action.choices else action.dest
    value = f"\\fI{_text(str(name))}\\fR"
    if not action.option_strings:
        return value + (" ..." if action.nargs in ("*", "+") else "")
    options = ", ".join(f"\\fB{_text(option)}\\fR" for option in action.option_strings)
    if action.nargs == 0:
        return options
    return f"{options} [{value}]" if action.nargs == "?" else f"{options} {value}"


def _explained(epilog: str) -> Iterator[str]:
    """Yield the text below a verb's help: paragraphs, and what is indented as it stands."""
    for is_example, group in groupby(
        epilog.strip().splitlines(), key=lambda line: not line or line[0] == " "
    ):
        lines = list(group)
        while is_example and lines and not lines[-1]:
            lines.pop()
        if not lines:
            continue
        yield ".PP"
        if is_example:
            yield from (".RS 2", ".nf", *(_text(line.removeprefix("  ")) for line in lines), ".fi", ".RE")
        else:
            yield from map(_text, lines)


def _text(text: str) -> str:
    """Return a text as troff prints it: backslashes, hyphens, and what is a request at a line's begin."""
    escaped = text.replace("\\", "\\e").replace("-", "\\-").replace("^", "\\(ha").replace("~", "\\(ti")
    return f"\\&{escaped}" if escaped.startswith((".", "'")) else escaped
