"""docs/why.md explains each reason as the program does, and each figure."""

from __future__ import annotations

from pathlib import Path

import pytest

from qmpballoon.condition import FIGURES as COMPARED
from qmpballoon.condition import WORDS as CONDITIONS
from qmpballoon.policy.decided import FIGURES
from qmpballoon.policy.reasons import WORDS

DOCS = Path(__file__).parent.parent.parent / "docs"
WHY = (DOCS / "why.md").read_text(encoding="utf-8")
WAIT = (DOCS / "wait.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("word", WORDS)
def test_every_reason_is_explained_as_the_program_explains_it(word: str) -> None:
    assert WHY.count(f"| `{word}` | {WORDS[word].means} | {WORDS[word].do} |\n") == 1


def test_no_word_is_explained_that_is_no_reason() -> None:
    rows = WHY.partition("## Words")[2].splitlines()
    assert {row.split("`")[1] for row in rows if row.startswith("| `")} == set(WORDS)


@pytest.mark.parametrize("figure", FIGURES)
def test_every_figure_is_explained(figure: str) -> None:
    assert f"\n| `{figure}` | " in WHY


@pytest.mark.parametrize("word", [*COMPARED, *CONDITIONS])
def test_every_condition_and_figure_to_wait_for_is_named(word: str) -> None:
    assert f"`{word}`" in WAIT
