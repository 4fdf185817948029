"""The log: one line per event."""

from __future__ import annotations

import io
import logging
import re
import sys
import time
from collections.abc import Iterator

import pytest

from qmpballoon import log as log_module
from qmpballoon.errors import QmpError
from qmpballoon.log import LOG, log_always, log_event, log_withheld, set_up


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """The log as on a terminal; restores the loggers afterwards."""
    monkeypatch.delenv("JOURNAL_STREAM", raising=False)
    monkeypatch.setattr(log_module, "_repeats", log_module._Repeats())
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    loggers = (LOG, logging.getLogger("asyncio"))
    before = [(logger.handlers[:], logger.propagate, logger.level) for logger in loggers]
    stream = io.StringIO()
    set_up(stream=stream)
    yield stream
    for logger, (handlers, propagates, level) in zip(loggers, before, strict=True):
        logger.handlers[:], logger.propagate = handlers, propagates
        logger.setLevel(level)


def test_a_line_has_a_stamp_a_word_its_fields_and_a_sentence(log: io.StringIO) -> None:
    log_event("vm-online", "the monitor answers", vm="web1", life=None, qemu="7.2.22")
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z INFO vm-online vm=web1 qemu=7\.2\.22: the monitor answers\n",
        log.getvalue(),
    )


def test_under_systemd_a_line_has_its_priority_instead(
    log: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JOURNAL_STREAM", "8:1")
    set_up(stream=log)
    log_event("health", level=logging.WARNING, vm="a")
    log_event("bad", level=logging.ERROR)
    assert log.getvalue() == "<4>health vm=a\n<3>bad\n"


def test_text_of_a_vm_cannot_forge_a_log_line(log: io.StringIO) -> None:
    log_event("vm-online", vm="a\n<0>panic\x1b[2J", name="", other="two words")
    assert log.getvalue().count("\n") == 1
    assert 'vm=a?<0>panic?[2J name="" other="two words"' in log.getvalue()


HOSTILE = "GenericError\n<0>kernel: panic\r\x1b[2J\u2028<0>more\x85<1>yet"


@pytest.mark.parametrize("journal", [False, True])
def test_untrusted_text_forges_no_log_line(
    journal: bool, log: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    if journal:
        monkeypatch.setenv("JOURNAL_STREAM", "8:1")
        set_up(stream=log)
    refused = QmpError("balloon", HOSTILE, HOSTILE)
    log_event("target-not-sent", str(refused), level=logging.WARNING, vm=HOSTILE, reason=refused)
    assert len(log.getvalue().splitlines()) == 1
    assert "\x1b" not in log.getvalue()
    assert log.getvalue().startswith("<4>target-not-sent vm=" if journal else "2")


@pytest.mark.parametrize("journal", [False, True])
def test_the_lines_of_a_traceback_are_not_messages(
    journal: bool, log: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    if journal:
        monkeypatch.setenv("JOURNAL_STREAM", "8:1")
        set_up(stream=log)
    try:
        raise ValueError(HOSTILE)
    except ValueError as error:
        logging.getLogger("asyncio").error("Task exception was never retrieved", exc_info=error)
    first, *others = log.getvalue().splitlines()
    assert first.endswith("asyncio: Task exception was never retrieved")
    assert any("Traceback (most recent call last)" in line for line in others)
    assert any(line.endswith("<0>kernel: panic??[2J?<0>more?<1>yet") for line in others)
    assert all(line.startswith("<3>" if journal else "  ") for line in others)


def test_an_exception_that_ends_the_program_is_logged(
    log: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JOURNAL_STREAM", "8:1")
    set_up(stream=log)
    error = ValueError("one\n<7>two")
    sys.excepthook(ValueError, error, None)
    assert log.getvalue() == "<2>crashed: a bug in this program\n<2>ValueError: one\n<2><7>two\n"


def test_a_value_cannot_forge_a_field(log: io.StringIO) -> None:
    log_event("vm-online", vm='web1" life="4711', other=r"a\" b")
    assert log.getvalue().endswith(r'vm="web1\" life=\"4711" other="a\\\" b"' + "\n")


def test_repeated_lines_are_counted(log: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now_s)
    for _ in range(100):
        log_event("session-lost", vm="a")
    log_event("session-lost", vm="b")
    log_event("vm-online", vm="a")
    assert log.getvalue().count("session-lost vm=a") == 3
    assert log.getvalue().count("session-lost vm=b") == 1
    assert log.getvalue().count("vm-online vm=a") == 1
    now_s += 61
    log_event("session-lost", vm="a")
    assert log.getvalue().splitlines()[-1].endswith("session-lost vm=a withheld=97")
    now_s += 61
    log_event("session-lost", vm="a")
    assert log.getvalue().splitlines()[-1].endswith("session-lost vm=a")


def test_the_last_state_is_logged(log: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now_s)
    for word in ("ok", "stale", "ok", "stale", "ok"):
        log_event("health", "as seen", vm="a", now=word)
    log_withheld()
    assert log.getvalue().splitlines()[-1].endswith("health vm=a now=ok: as seen")
    assert log.getvalue().count("health") == 3
    now_s += 61
    log_withheld()
    assert log.getvalue().splitlines()[-1].endswith("health vm=a now=ok late=61s withheld=1: as seen")
    now_s += 61
    log_withheld()
    assert log.getvalue().count("health") == 4


def test_a_line_that_was_withheld_has_its_own_time(log: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    passed_s = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: 5.0 + passed_s)
    monkeypatch.setattr(time, "time", lambda: 1_700_000_000.25 + passed_s)  # 22:13:20.250
    for _ in range(4):
        log_event("broker-connected", url="a")
    passed_s = 6.0
    for _ in range(4):
        log_event("broker-lost", url="a")
    passed_s = 66.5
    log_withheld()
    assert log.getvalue().splitlines()[-2:] == [
        "2023-11-14T22:13:20.250Z INFO broker-connected url=a late=66s",
        "2023-11-14T22:13:26.250Z INFO broker-lost url=a late=60s",
    ]


def test_a_single_line_after_a_withheld_one_is_logged_at_once(
    log: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now_s)
    for _ in range(4):
        log_event("broker-lost", url="a", level=logging.WARNING)
    now_s += 61
    log_withheld()
    assert log.getvalue().count("broker-lost") == 4
    now_s += 5
    log_event("broker-lost", "again", url="a", level=logging.WARNING)
    assert log.getvalue().splitlines()[-1].endswith("broker-lost url=a: again")


def test_an_endless_repeat_is_logged_three_times_a_minute(
    log: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now_s)
    for _ in range(600):
        now_s += 1
        log_event("session-lost", vm="a")
        log_withheld()
    assert log.getvalue().count("session-lost") <= 3 * (600 // 60 + 1)


def test_what_may_need_a_person_is_never_withheld(log: io.StringIO) -> None:
    for number in range(20):
        log_event("target", vm="a", now=f"{number} MiB", why="give")
        log_always("target", vm="a", now=f"{number} MiB", why="emergency")
        log_event("alarm", f"floors {number}", level=logging.ERROR)
    lines = log.getvalue().splitlines()
    assert sum("why=emergency" in line for line in lines) == 20
    assert sum(" alarm: floors" in line for line in lines) == 20
    assert sum("why=give" in line for line in lines) == 3
    assert sum(int(found[1]) for line in lines if (found := re.search(r"withheld=(\d+)", line))) == 17


def test_frequent_lines_do_not_hide_a_warning_of_the_same_word(log: io.StringIO) -> None:
    for _ in range(10):
        log_event("health", vm="a", now="ok")
        log_event("health", vm="a", now="stale", level=logging.WARNING)
    log_event("health", vm="a", now="offline", level=logging.WARNING)
    lines = log.getvalue().splitlines()
    assert sum("now=stale" in line for line in lines) == 3
    assert "now=offline" in lines[-1]


def test_warnings_with_ever_new_reasons_are_bounded(log: io.StringIO) -> None:
    for number in range(1000):
        log_event("refused", vm="a", why=f"reason {number}", level=logging.WARNING)
    assert len(log.getvalue().splitlines()) <= log_module._MOST_REASONS + log_module._REPEATS
    log_withheld(now=True)
    lines = log.getvalue().splitlines()
    withheld = sum(int(found[1]) for line in lines if (found := re.search(r"withheld=(\d+)", line)))
    assert len(lines) + withheld == 1000
    log_withheld(now=True)
    assert log.getvalue().splitlines() == lines


def a_line() -> log_module._Line:
    return log_module._Line(logging.INFO, "", "word", "", time.time(), time.monotonic())


def test_withheld_lines_are_counted_when_others_take_their_place(log: io.StringIO) -> None:
    for _ in range(6):
        log_event("session-lost", vm="a")
    for number in range(log_module._MOST_KEYS):
        log_module._repeats.of("word", str(number), a_line())
    assert log.getvalue().splitlines()[-1].endswith("session-lost vm=a withheld=2")


def test_the_memory_for_repeats_is_bounded(log: io.StringIO) -> None:
    for number in range(log_module._MOST_KEYS + 50):
        log_module._repeats.of("word", str(number), a_line())
    assert len(log_module._repeats._seen) == log_module._MOST_KEYS
    assert log.getvalue() == ""


def test_debug_lines_are_logged_when_verbose(log: io.StringIO) -> None:
    log_event("detail", level=logging.DEBUG)
    assert log.getvalue() == ""
    set_up(verbose=True, stream=log)
    log_event("detail", level=logging.DEBUG)
    assert "DEBUG detail" in log.getvalue()
