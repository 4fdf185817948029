"""uvloop where it is installed, asyncio's loop elsewhere."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import uvloop

from qmpballoon.agent import event_loop
from qmpballoon.agent.event_loop import loop_factory


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    words: list[str] = []

    def say(word: str, *_: Any, **__: Any) -> None:
        words.append(word)

    monkeypatch.setattr(event_loop, "say", say)
    return words


def test_uvloop_is_used_where_it_is_and_nothing_is_said(said: list[str]) -> None:
    loop = loop_factory()()
    try:
        assert isinstance(loop, uvloop.Loop)
    finally:
        loop.close()
    assert said == []


def test_without_it_asyncio_serves_and_that_is_said_once(
    said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "uvloop", None)  # importing it raises ImportError
    loop = loop_factory()()
    try:
        assert not isinstance(loop, uvloop.Loop)
    finally:
        loop.close()
    assert said == ["asyncio-loop"]
