"""The README is short, and every stable word is explained on the page that it belongs to."""

from __future__ import annotations

import pytest
from doc_pages import ROOT, text_of

from qmpballoon.errors import ERROR_WORDS
from qmpballoon.model.records import HEALTH_WORDS, LEVELS, MODES, POLICIES
from qmpballoon.policy.reasons import WORDS

README = (ROOT / "README.md").read_text(encoding="utf-8")
PLACES = {
    "requests.md": ERROR_WORDS,
    "operating.md": (*HEALTH_WORDS, *LEVELS),
    "vms.md": MODES,
    "policy.md": POLICIES,
}


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 150


@pytest.mark.parametrize(("page", "word"), [(page, word) for page, words in PLACES.items() for word in words])
def test_every_stable_word_is_explained_on_its_page(page: str, word: str) -> None:
    assert f"`{word}`" in text_of(page)


@pytest.mark.parametrize("word", WORDS)
def test_every_reason_is_explained_as_the_program_explains_it(word: str) -> None:
    assert f"| `{word}` | {WORDS[word].means} | {WORDS[word].do} |" in text_of("why.md")
