"""The README and the pages of docs/, taken apart for tests: code blocks, commands, links and anchors."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[2]
PAGES: Final = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))

_FENCE: Final = re.compile(r"( *)```(\S*) *")
_LINK: Final = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
_HEADING: Final = re.compile(r"#+ +(.*)")
_INLINE: Final = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
_COMMENT: Final = re.compile(r"(?:^|(?<=\s))#(?: .*)?$", re.MULTILINE)
_SIGNS: Final = "();<>|&\n"  # what stands between commands, and redirections


@dataclass(frozen=True, slots=True)
class Block:
    """One block of code: its language ("" if it is indented, not fenced), its first line and its text."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        """Return the place, which names the test's case."""
        return f"{self.page}:{self.line}"


def text_of(page: str) -> str:
    """Return the text of a page of docs/."""
    return (ROOT / "docs" / page).read_text(encoding="utf-8")


def blocks(path: Path) -> list[Block]:
    """Return the blocks of code of a page, fenced or indented by four spaces."""
    found: list[Block] = []
    lines = path.read_text(encoding="utf-8").splitlines()
    at = 0
    while at < len(lines):
        begin = at
        fence = _FENCE.fullmatch(lines[at])
        if fence:
            at += 1
            while not lines[at].strip().startswith("```"):
                at += 1
            inner = [line.removeprefix(fence[1]) for line in lines[begin + 1 : at]]
            found.append(Block(path.name, begin + 1, fence[2], "\n".join(inner) + "\n"))
        elif lines[at].startswith("    ") and not (at and lines[at - 1].strip()):
            while at + 1 < len(lines) and (lines[at + 1].startswith("    ") or not lines[at + 1].strip()):
                at += 1
            inner = [line.removeprefix("    ") for line in lines[begin : at + 1]]
            found.append(Block(path.name, begin + 1, "", "\n".join(inner).rstrip() + "\n"))
        at += 1
    return found


def prose(path: Path) -> str:
    """Return a page without its fenced blocks."""
    return re.sub(r"^( *)```.*?^\1```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def inline_code(path: Path) -> list[str]:
    """Return what stands between single backquotes."""
    return _INLINE.findall(prose(path))


def links(path: Path) -> list[str]:
    """Return the targets of links and pictures."""
    return _LINK.findall(_INLINE.sub("", prose(path)))


def anchors(path: Path) -> set[str]:
    """Return the anchors of a page's headings, as the generator and GitHub make them."""
    headings = [_HEADING.fullmatch(line) for line in prose(path).splitlines()]
    return {_slug(heading[1]) for heading in headings if heading}


def _slug(heading: str) -> str:
    words = re.sub(r"[^\w\s-]", "", heading.replace("`", "")).strip().lower()
    return re.sub(r"[-\s]+", "-", words)


def commands(block: Block) -> Iterator[list[str]]:
    """Yield each command of a block of shell lines, as its words, without redirections."""
    lines = block.text.splitlines()
    if block.language == "console":
        lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    reading = shlex.shlex(
        _COMMENT.sub("", "\n".join(lines).replace("\\\n", " ")), posix=True, punctuation_chars=_SIGNS
    )
    reading.whitespace, reading.commenters, reading.whitespace_split = " \t", "", True
    words: list[str] = []
    is_redirected = False
    for word in (*reading, "\n"):
        if word and set(word) <= set("<>&") and set(word) & set("<>"):
            is_redirected = True
            if words and words[-1].isdigit():
                words.pop()
        elif word and set(word) <= set(_SIGNS):
            if words:
                yield words
            words = []
        elif is_redirected:
            is_redirected = False
        else:
            words.append(word)
