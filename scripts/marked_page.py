"""Pages of which parts are made by a script: what stands between two marks is replaced."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path


def filled(page: Path, mark: str, parts: Mapping[str, Iterable[str]]) -> str:
    """Return the text of a page with its parts made anew; ``mark`` is a comment with a place for a name.

    A part stands between the marks ``begin NAME`` and ``end NAME``.

    Raises:
        SystemExit: the page has no marks of a part.
    """
    text = page.read_text(encoding="utf-8")
    for name, lines in parts.items():
        begin, end = (re.escape(mark.format(f"{edge} {name}")) for edge in ("begin", "end"))
        pattern = re.compile(f"({begin}).*?({end})", re.DOTALL)
        if not pattern.search(text):
            raise SystemExit(f"{page} has no marks of {name!r}")
        made = "\n" + "\n".join(lines) + "\n\n"
        text = pattern.sub(lambda found, made=made: found[1] + made + found[2], text)  # type: ignore[misc]
    return text
