"""What the agent logs: one line for each thing that happened, with a stable word first.

::

    vm-online vm=web1 life=4711-889123 qemu=7.2.22: the monitor answers

Under systemd the line bears its priority (``<4>``, sd-daemon(3)) and no stamp, as the journal has
its own. A thing that happens again and again is said a few times, then counted.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from typing import Final, TextIO

LOG: Final = logging.getLogger("qmpballoon")

_REPEATS: Final = 3  # of one word about one VM ...
_WINDOW_S: Final = 60.0  # ... in so long; the rest is counted and told with the next line
_MOST_KEYS: Final = 4096
_PRIORITIES: Final = {
    logging.DEBUG: 7,
    logging.INFO: 6,
    logging.WARNING: 4,
    logging.ERROR: 3,
    logging.CRITICAL: 2,
}


class _Repeats:
    def __init__(self) -> None:
        self._seen: dict[tuple[str, str], tuple[float, int]] = {}

    def told(self, word: str, about: str) -> int | None:
        """Return how many lines were withheld before this one, None to withhold this one too."""
        now_s = time.monotonic()
        began_s, count = self._seen.pop((word, about), (now_s, 0))
        if now_s - began_s > _WINDOW_S:
            self._seen[word, about] = (now_s, 1)
            return max(0, count - _REPEATS)
        self._seen[word, about] = (began_s, count + 1)
        if len(self._seen) > _MOST_KEYS:
            self._seen.pop(next(iter(self._seen)))
        return 0 if count < _REPEATS else None


_repeats: Final = _Repeats()


def say(word: str, sentence: str = "", *, level: int = logging.INFO, **fields: object) -> None:
    """Log ``word key=value ...: sentence``; fields that are None are left out.

    The same word about the same VM is said three times a minute, the rest is counted.
    """
    if not LOG.isEnabledFor(level):
        return
    withheld = _repeats.told(word, str(fields.get("vm") or fields.get("socket") or ""))
    if withheld is None:
        return
    if withheld:
        fields["withheld"] = withheld
    parts = [word, *(f"{key}={_quoted(value)}" for key, value in fields.items() if value is not None)]
    LOG.log(level, "%s%s", " ".join(parts), f": {sentence}" if sentence else "")


def set_up(*, verbose: bool = False, stream: TextIO | None = None) -> None:
    """Send what is logged to stderr, in the form that suits its reader."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(_Priorities() if "JOURNAL_STREAM" in os.environ else _Stamps())
    LOG.handlers[:] = [handler]
    LOG.propagate = False
    LOG.setLevel(logging.DEBUG if verbose else logging.INFO)


class _Priorities(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return f"<{_PRIORITIES.get(record.levelno, 6)}>{super().format(record)}"


class _Stamps(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s.%(msecs)03dZ %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S")
        self.converter = time.gmtime


def _quoted(value: object) -> str:
    text = "".join(character if character.isprintable() else "?" for character in str(value))
    return f'"{text}"' if " " in text or not text else text
