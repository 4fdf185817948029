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

    def log_event(word: str, *_: Any, **__: Any) -> None:
        words.append(word)

    monkeypatch.setattr(event_loop, "log_event", log_event)
    return words


def test_an_installed_uvloop_is_used_without_a_log_line(said: list[str]) -> None:
    loop = loop_factory()()
    try:
        assert isinstance(loop, uvloop.Loop)
    finally:
        loop.close()
    assert said == []


def test_without_uvloop_asyncio_is_used_and_logged_once(
    said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "uvloop", None)  # importing it raises ImportError
    loop = loop_factory()()
    try:
        assert not isinstance(loop, uvloop.Loop)
    finally:
        loop.close()
    assert said == ["asyncio-loop"]
