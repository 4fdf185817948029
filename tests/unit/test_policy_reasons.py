"""The reasons that decisions carry are the documented ones, and no others."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import qmpballoon
from qmpballoon.policy.reasons import WORDS

PACKAGE = Path(qmpballoon.__file__).parent
SOURCES = [
    *sorted((PACKAGE / "policy").glob("**/*.py")),
    *(PACKAGE / "agent" / name for name in ("app.py", "service.py")),
]
CARRIERS = ("Hold", "SetTarget", "Judgement")


def reasons(source: Path) -> set[str]:
    """Return the words that stand where a reason goes; those of functions named ``_why`` too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source.read_text())):
        places: list[ast.expr] = []
        if isinstance(node, ast.Call):
            name = node.func.id if isinstance(node.func, ast.Name) else ""
            if name in CARRIERS:
                places = node.args[1:2] if name == "SetTarget" else node.args[:1]
            places = [*places, *(word.value for word in node.keywords if word.arg == "why")]
        elif isinstance(node, ast.FunctionDef) and node.name == "_why":
            places = [part.value for part in ast.walk(node) if isinstance(part, ast.Return) and part.value]
        elif isinstance(node, ast.Assign) and any(
            isinstance(target, ast.Name) and target.id == "why" for target in node.targets
        ):
            places = [node.value]
        found |= {word for place in places for word in texts(place)}
    return found


def texts(place: ast.expr) -> set[str]:
    """Return the strings that the expression may be, leaving out conditions."""
    match place:
        case ast.Constant(value=str(word)):
            return {word}
        case ast.IfExp():
            return texts(place.body) | texts(place.orelse)
        case ast.BoolOp(values=[ast.Attribute(attr="why"), *_]):
            return set()  # a judgement that forbids has a reason: what stands behind it is for the types
        case ast.BoolOp():
            return {word for value in place.values for word in texts(value)}
        case _:
            return set()


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_every_reason_in_the_sources_is_documented(source: Path) -> None:
    assert reasons(source) - WORDS.keys() == set()


def test_every_documented_reason_is_given_somewhere() -> None:
    from_modes = {"auto", "manual", "observe"}
    given = {word for source in SOURCES for word in reasons(source)} | from_modes
    assert WORDS.keys() - given == set()


@pytest.mark.parametrize("word", sorted(WORDS))
def test_each_word_says_in_a_sentence_what_it_means_and_what_to_do(word: str) -> None:
    for text in (WORDS[word].means, WORDS[word].do):
        assert text.endswith(".")
        assert len(text) < 120
