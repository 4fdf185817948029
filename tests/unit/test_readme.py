"""What the README promises to explain, it explains."""

from __future__ import annotations

from pathlib import Path

import pytest

from qmpballoon.errors import ERROR_WORDS
from qmpballoon.model.records import HEALTH_WORDS, LEVELS, MODES, POLICIES
from qmpballoon.policy.reasons import WORDS

README = (Path(__file__).parent.parent.parent / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("word", [*ERROR_WORDS, *HEALTH_WORDS, *LEVELS, *MODES, *POLICIES])
def test_every_stable_word_stands_in_the_readme(word: str) -> None:
    assert f"`{word}`" in README


@pytest.mark.parametrize("word", WORDS)
def test_every_reason_is_explained_as_the_program_explains_it(word: str) -> None:
    assert f"| `{word}` | {WORDS[word].means} | {WORDS[word].do} |" in README
