"""Writes the parts of the documents that are made from the program's own tables.

These are the command line, the manual page, the configuration and the commands that are sent to a QEMU. A
test compares the files with what this writes. `scripts/write_schemas.py` does the same for MQTT.

    .venv/bin/python scripts/write_docs.py
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Final

from man_page import man_page
from marked_page import filled

from qmpballoon.cli.program import complete_parser, verbs_of
from qmpballoon.config.environment import Surroundings
from qmpballoon.config.matching import NEEDS_RESTART
from qmpballoon.config.printed import default_text, default_value
from qmpballoon.config.tree import TABLES, Key, VmMatch, keys
from qmpballoon.qmp.commands import COMMANDS

ROOT: Final = Path(__file__).parents[1]
HERE: Final = Surroundings("edge-7", "/var/lib/qmpballoon", ("/run/qmpballoon/*.qmp",))
"""The host, state directory and sockets that the pages show: those of no machine."""

_MARKED: Final = "<!-- {}: made by scripts/write_docs.py -->\n"
_EXAMPLE: Final = re.compile(r"(qmpballoon .*?\S)\s{3,}(\S.*)")  # a command, and what it does


def files() -> dict[str, str]:
    """Return the text of each file by its path in the repository."""
    parts = {
        "docs/command-line.md": {"verbs": _verbs()},
        "docs/configuration.md": {"keys": _keys(), "file": _file()},
        "docs/qemu.md": {"commands": _commands()},
    }
    return {path: filled(ROOT / path, _MARKED, made) for path, made in parts.items()} | {
        "docs/qmpballoon.1": man_page()
    }


# ---- the command line ----


def _verbs() -> Iterator[str]:
    for verb, parser in verbs_of(complete_parser()).items():
        yield from (
            f"## {verb}",
            "",
            parser.description or "",
            "",
            "```text",
            _usage(verb, parser),
            "```",
            "",
        )
        for group in parser._action_groups:
            rows = [row for action in group._group_actions if (row := _row(action, parser))]
            if rows:
                first = "argument" if group.title == "positional arguments" else "option"
                yield from (f"| {first} | {_about(group.title)} |", "|---|---|", *rows, "")
        yield from _explained(parser.epilog or "")
        yield ""


def _usage(verb: str, parser: argparse.ArgumentParser) -> str:
    arguments = [action for action in parser._actions if not action.option_strings]
    return " ".join(["qmpballoon", verb, "[options]", *map(_argument, arguments)])


def _argument(action: argparse.Action) -> str:
    name = str(action.metavar or action.dest)
    return {"*": f"[{name} ...]", "+": f"{name} [{name} ...]", "?": f"[{name}]"}.get(str(action.nargs), name)


def _about(title: str | None) -> str:
    return "meaning" if title in (None, "options", "positional arguments") else f"meaning ({title})"


def _row(action: argparse.Action, parser: argparse.ArgumentParser) -> str | None:
    if action.help is None or action.help == argparse.SUPPRESS or action.dest == "help":
        return None
    if action.option_strings:
        value = _value(action)
        name = ", ".join(
            f"{option}{value if option.startswith('--') else ''}" for option in action.option_strings
        )
    else:
        name = str(action.metavar or action.dest)
    return f"| `{name}` | {_cell(action.help % {**vars(action), 'prog': parser.prog})} |"


def _value(action: argparse.Action) -> str:
    if action.nargs == 0:
        return ""
    names = action.metavar or (
        "{" + ",".join(map(str, action.choices)) + "}" if action.choices else action.dest
    )
    return f" [{names}]" if action.nargs == "?" else f" {names}"


def _explained(epilog: str) -> Iterator[str]:
    """Yield the text below a verb's help: paragraphs, and what is indented as code."""
    for is_code, group in groupby(epilog.strip().splitlines(), key=lambda line: not line or line[0] == " "):
        lines = list(group)
        if not is_code:
            yield from map(_prose, lines)
            continue
        inner = [line.removeprefix("  ") for line in lines]
        while inner and not inner[-1]:
            inner.pop()
        if inner:
            is_shell = any(line.startswith("qmpballoon ") for line in inner)
            yield from ("", "```sh" if is_shell else "```text", *_aligned(inner), "```")
        yield ""


def _aligned(lines: Sequence[str]) -> Iterator[str]:
    """Yield lines with what a command does as a comment of the shell."""
    pairs = [_EXAMPLE.fullmatch(line) for line in lines]
    width = max((len(pair[1]) for pair in pairs if pair), default=0)
    for line, pair in zip(lines, pairs, strict=True):
        yield f"{pair[1]:<{width}}  # {pair[2]}" if pair else line


def _prose(line: str) -> str:
    return (
        re.sub(r"(?<![`\w])(--[a-z][a-z-]*|\$[A-Z_]+)", r"`\1`", line)
        .replace("*", r"\*")
        .replace("<", "&lt;")
    )


def _cell(text: str) -> str:
    return _prose(" ".join(text.split())).replace("|", r"\|")


# ---- the configuration ----


def _keys() -> Iterator[str]:
    for table, record in TABLES.items():
        yield from (f"## [{table}]", "", "| key | default | meaning |", "|---|---|---|")
        yield from _key_rows(keys(record), table)
        yield ""
    yield from ("## [[vm.match]]", "", "Every key of `[vm]` may stand in one, and these:", "")
    yield from ("| key | example | meaning |", "|---|---|---|")
    for name, key in keys(VmMatch).items():
        yield f"| `{name}` | `{key.example}` | {_meaning(key)} |"


def _key_rows(known: dict[str, Key], table: str) -> Iterator[str]:
    for name, key in known.items():
        late = " A change takes effect at a restart." if (table, name) in NEEDS_RESTART else ""
        default = f"`{default_value(table, name, HERE)}`" if key.example is None else ""
        yield f"| `{name}` | {default} | {_meaning(key)}{_for_example(key)}{late} |"


def _meaning(key: Key) -> str:
    return _cell(key.about)


def _for_example(key: Key) -> str:
    return "" if key.example is None else f" For example `{key.example}`."


def _file() -> Iterator[str]:
    yield from ("```toml", default_text(HERE).rstrip("\n"), "```")


# ---- what is sent to a QEMU ----


def _commands() -> Iterator[str]:
    yield "| command, or property of the balloon | why | first QEMU | stability |"
    yield "|---|---|---|---|"
    for sent in COMMANDS.values():
        yield f"| `{sent.name}` | {sent.why} | {sent.since} | {sent.stability} |"


def main() -> None:
    """Write the files."""
    for path, text in files().items():
        (ROOT / path).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
