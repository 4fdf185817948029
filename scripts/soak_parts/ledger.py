"""Each request and its answers: exactly one, unless somebody was away meanwhile."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

from soak_parts.journal import AGENT, BROKER, Journal

ANSWER_S: Final = 30.0  # beyond what the request itself waits for; milliseconds on an idle machine
_USUAL_S: Final = 10.0  # an answer that is not there by then was not prevented by a later absence
_LATE_S: Final = 20.0  # how long a second answer is waited for
_AROUND_S: Final = 2.0  # an absence may begin before it is noticed, and end before all is connected again


@dataclass(slots=True)
class Sent:
    """A request that was sent, and when it was answered."""

    client: str
    what: str
    at_s: float
    wait_s: float
    answers: list[tuple[float, str]] = field(default_factory=list)


class Ledger:
    """Matches answers to requests by their correlation data, which a malformed payload does not affect."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._sent: dict[bytes, Sent] = {}
        self._answer = asyncio.Event()
        self.slowest_s = 0.0  # of the answers to requests during which nobody was away

    def sent(self, correlation: bytes, client: str, what: str, *, wait_s: float) -> None:
        """Record a request before it is published."""
        self._sent[correlation] = Sent(client, what, self._journal.clock(), wait_s)

    def unsent(self, correlation: bytes) -> None:
        """Forget a request of which it is not known whether the broker has it."""
        self._sent.pop(correlation, None)
        self._journal.count("requests not confirmed by the broker")

    def answered(self, correlation: bytes | None, status: str) -> None:
        """Record an answer."""
        sent = self._sent.get(correlation or b"")
        if sent is None:
            self._journal.count("answers to requests that were not confirmed")
        else:
            sent.answers.append((self._journal.clock(), status))
            self._answer.set()

    def judge(self, *, last: bool = False) -> None:
        """Judge the requests whose time is over; with ``last``, every request."""
        now_s = self._journal.clock()
        for correlation, sent in tuple(self._sent.items()):
            over_s = sent.at_s + sent.wait_s + (_LATE_S if sent.answers else ANSWER_S)
            if now_s >= over_s or (last and sent.answers):
                del self._sent[correlation]
                self._judge(sent, now_s)

    async def until_answered(self, since_s: float, *, timeout_s: float) -> None:
        """Wait until each request that was sent since then has an answer; at most this long."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while any(not sent.answers and sent.at_s >= since_s for sent in self._sent.values()):
                    self._answer.clear()
                    await self._answer.wait()

    def _judge(self, sent: Sent, now_s: float) -> None:
        until_s = sent.answers[-1][0] if sent.answers else sent.at_s + sent.wait_s + _USUAL_S
        away = [
            who
            for who in (AGENT, BROKER, sent.client)
            if self._journal.absences.any(who, sent.at_s - _AROUND_S, until_s + _AROUND_S)
        ]
        self._journal.count("requests")
        if len(sent.answers) == 1:
            at_s, status = sent.answers[0]
            self._journal.count(f"answered {status}")
            if not away:
                self.slowest_s = max(self.slowest_s, at_s - sent.at_s - sent.wait_s)
            return
        text = f"{sent.what}: {len(sent.answers)} answers"
        if away:
            self._journal.count(f"{'two answers' if sent.answers else 'no answer'} while {away[0]} was away")
        else:
            self._journal.violation("one answer", f"{text}, sent {now_s - sent.at_s:.1f} s ago")
