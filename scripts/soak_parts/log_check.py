"""Reads the agent's log while it is written: bugs, unexpected levels, and the targets that it names."""

from __future__ import annotations

import re
from collections import defaultdict, deque
from pathlib import Path
from typing import Final

from soak_parts.journal import AGENT, BROKER, Journal

DISK: Final = "disk"
FILE: Final = "file"
PRESSURE: Final = "pressure"

_LINE: Final = re.compile(r"\d{4}-\d\d-\d\dT[\d:.]+Z (?P<level>[A-Z]+) (?P<word>[^\s:]+)(?P<rest>.*)")
_FIELD: Final = re.compile(r'(\w+)=("(?:[^"\\]|\\.)*"|\S+)')
_KEPT_TARGETS: Final = 50  # lines of one VM
_TAIL: Final = 60

_WARNINGS: Final = frozenset(
    {
        "broker-lost",
        "broker-unreachable",
        "budget-unlimited",
        "claim-refuted",
        "health",
        "level",
        "manual-target-refused",
        "monitor-busy",
        "problem",
        "sampling-late",
        "session-lost",
        "socket-not-qmp",
        "socket-refused",
        "target",
        "target-not-sent",
    }
)
_WARNINGS_OF_FAULTS: Final = frozenset(
    {"name-claimed", "qemu-stopped", "session-excess"}
)  # expected after a fault of the VM
_ERRORS: Final = {
    "alarm": (),  # the guests together may need more than the budget
    "broker-acl": (BROKER, AGENT),
    "reload-refused": (FILE,),
    "state-not-saved": (DISK,),
}
"""Errors that are expected, and after what: one of these was away within the last _AFTER_S."""
_AFTER_S: Final = 60.0
_LONG_STALE_S: Final = 10.0  # after a start no VM can have been silent for as long as `long-stale` needs


class LogCheck:
    """Follows a log file; the agent's runs append to it."""

    def __init__(self, log: Path, journal: Journal) -> None:
        self.tail: deque[str] = deque(maxlen=_TAIL)
        self.targets: dict[str, deque[tuple[float, str]]] = defaultdict(lambda: deque(maxlen=_KEPT_TARGETS))
        self.not_sent: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=_KEPT_TARGETS))
        self._log = log
        self._journal = journal
        self._offset = 0
        self._rest = b""
        self._started_at_s = 0.0
        self._bug: list[str] | None = None  # the lines of a traceback so far

    def read(self) -> None:
        """Judge the lines that were written since the last call."""
        try:
            with self._log.open("rb") as log:
                log.seek(self._offset)
                received = log.read()
        except FileNotFoundError:
            return
        self._offset += len(received)
        *lines, self._rest = (self._rest + received).split(b"\n")
        for line in lines:
            self._judge(line.decode(errors="replace"))

    def finish(self) -> None:
        """Judge the rest: no line follows."""
        self.read()
        self._end_bug()

    def _judge(self, line: str) -> None:
        self.tail.append(line)
        match = _LINE.fullmatch(line)
        if match is None:
            if self._bug is None:
                self._bug = []
            self._bug.append(line)
            return
        self._end_bug()
        self._journal.count("log lines")
        level, word = match["level"], match["word"]
        fields = {key: value.strip('"') for key, value in _FIELD.findall(match["rest"].partition(": ")[0])}
        now_s, vm = self._journal.clock(), fields.get("vm", "")
        if level not in ("INFO", "DEBUG"):
            self._judge_level(level, word, vm, line)
        if word == "target":
            self.targets[vm].append((now_s, fields.get("now", "")))
            if fields.get("why") == "long-stale" and now_s - self._started_at_s < _LONG_STALE_S:
                self._journal.violation("no move after a restart", line)
        elif word == "target-not-sent":
            self.not_sent[vm].append(now_s)
        elif word == "agent-started":
            self._started_at_s = now_s

    def _judge_level(self, level: str, word: str, vm: str, line: str) -> None:
        self._journal.count(f"log {level} {word}")
        if level == "WARNING" and word in _WARNINGS:
            return
        now_s = self._journal.clock()
        causes: tuple[str, ...] | None = None
        if level == "ERROR":
            causes = _ERRORS.get(word)
        elif level == "WARNING" and word in _WARNINGS_OF_FAULTS:
            causes = (vm,)
        if causes == () or any(
            self._journal.absences.any(cause, now_s - _AFTER_S, now_s) for cause in causes or ()
        ):
            return
        self._journal.violation("expected log lines", line)

    def _end_bug(self) -> None:
        if self._bug is not None:
            self._journal.violation("no bug", "\n    ".join(self._bug))
            self._bug = None
