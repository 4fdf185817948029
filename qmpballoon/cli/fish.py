"""Completion for the fish shell, out of the parser; shtab makes that of the other shells."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from typing import Final

FUNCTIONS: Final = """\
# The verb that was typed, or nothing.
function __qmpballoon_is
    set -l words (commandline -opc)
    set -e words[1]
    for word in $words
        if not string match -q -- '-*' $word
            test $word = "$argv[1]"
            return
        end
    end
    test -z "$argv[1]"
end
complete -c qmpballoon -f"""


def fish_completion(parser: argparse.ArgumentParser, verbs: Mapping[str, argparse.ArgumentParser]) -> str:
    """Return the script that completes ``parser``, whose verbs have a parser each."""
    lines = [FUNCTIONS, *_options(parser, "")]
    for verb, below in verbs.items():
        about = _quoted((below.description or "").rstrip("."))
        lines.append(f"complete -c qmpballoon -n '__qmpballoon_is' -a {verb} -d {about}")
        lines += _options(below, verb)
    return "\n".join(lines)


def _options(parser: argparse.ArgumentParser, verb: str) -> Iterator[str]:
    begin = f"complete -c qmpballoon -n '{f'__qmpballoon_is {verb}'.strip()}'"
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction) or action.help == argparse.SUPPRESS:
            continue
        names = [
            f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}" for name in action.option_strings
        ]
        values = _values(action)
        if not names and not values:
            continue
        about = (action.help or "") % {**vars(action), "prog": parser.prog}
        yield " ".join([begin, *names, *values, "-d", _quoted(" ".join(about.split()))])


def _values(action: argparse.Action) -> list[str]:
    """Return the words that tell which values an option or argument takes."""
    kind = str(action.metavar or action.dest)
    is_option = bool(action.option_strings)
    if action.nargs == 0 or (is_option and action.nargs == "?"):  # a value in a word of its own is not needed
        return []
    if action.choices is not None:
        return ["-xa" if is_option else "-a", _quoted(" ".join(map(str, action.choices)))]
    if any(word in kind for word in ("SOCKET", "FILE", "PATH", "TRACE")):
        return ["-rF" if is_option else "-F"]
    if "DIR" in kind:
        return ["-xa", "'(__fish_complete_directories)'"]
    return ["-x"] if is_option else []


def _quoted(text: str) -> str:
    """Return a text in single quotes, in which fish knows only \\\\ and \\' as escapes."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
