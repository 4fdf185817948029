"""Every reason of a decision is documented, and every documented reason is used."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import qmpballoon
from qmpballoon.policy.reasons import MAY_NEED_A_PERSON, WORDS

PACKAGE = Path(qmpballoon.__file__).parent
SOURCES = [
    *sorted((PACKAGE / "policy").glob("**/*.py")),
    *(PACKAGE / "agent" / name for name in ("app.py", "pulse.py", "service.py")),
]
CARRIERS = ("Hold", "SetTarget", "Judgement")


def reasons(source: Path) -> set[str]:
    """Return the words in the place of a reason, and those that functions named ``_why`` return."""
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
    """Return the possible string values of the expression."""
    match place:
        case ast.Constant(value=str(word)):
            return {word}
        case ast.IfExp():
            return texts(place.body) | texts(place.orelse)
        case ast.BoolOp(values=[ast.Attribute(attr="why"), *_]):
            return set()  # a judgement that forbids has a reason; the alternative is for the type checker
        case ast.BoolOp():
            return {word for value in place.values for word in texts(value)}
        case _:
            return set()


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_every_reason_in_the_sources_is_documented(source: Path) -> None:
    assert reasons(source) - WORDS.keys() == set()


def test_every_documented_reason_is_used() -> None:
    from_modes = {"auto", "manual", "observe"}
    given = {word for source in SOURCES for word in reasons(source)} | from_modes
    assert WORDS.keys() - given == set()


@pytest.mark.parametrize("word", sorted(WORDS))
def test_each_reason_has_a_sentence_for_its_meaning_and_one_for_the_operator(word: str) -> None:
    for text in (WORDS[word].means, WORDS[word].do):
        assert text.endswith(".")
        assert len(text) < 120


def test_the_reasons_that_are_always_logged_are_documented() -> None:
    assert WORDS.keys() >= MAY_NEED_A_PERSON
    assert "emergency" in MAY_NEED_A_PERSON
