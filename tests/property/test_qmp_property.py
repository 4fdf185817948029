"""Any reply of a monitor and any file of the kernel is a value of the right type or a documented error."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from typing import Any, cast

from hypothesis import given, settings
from hypothesis import strategies as st
from schema_checks import check_event

from qmpballoon.doctor.report import vm_result
from qmpballoon.doctor.vm import examine
from qmpballoon.errors import ConnectionLost, NoBalloon, QmpError
from qmpballoon.model.names import VmId
from qmpballoon.model.records import STATISTICS
from qmpballoon.procfs import parse_meminfo, parse_pressure, parse_process_stat
from qmpballoon.protocol.event_kinds import VM_EVENTS
from qmpballoon.protocol.objects import event_object
from qmpballoon.qmp import balloon, statistics
from qmpballoon.qmp.asked import Asked
from qmpballoon.qmp.client import Session
from qmpballoon.qmp.events import translated
from qmpballoon.qmp.monitor import OpenMonitor

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=10,
)


def shaped(**parts: Any) -> st.SearchStrategy[Any]:
    return st.fixed_dictionaries({}, optional={key.replace("_", "-"): part for key, part in parts.items()})


# ── the bytes of a monitor ───────────────────────────────────────────────────────────────────────

MESSAGES = st.binary(max_size=60) | st.one_of(
    JSON,
    shaped(id=st.integers(0, 3) | JSON, **{"return": JSON}),
    shaped(id=st.integers(0, 3) | JSON, error=JSON | shaped(**{"class": JSON, "desc": JSON})),
    shaped(event=st.text() | JSON, data=st.dictionaries(st.text(), JSON) | JSON),
).map(lambda message: json.dumps(message).encode())


def session_reading(events: list[tuple[str, Mapping[str, object]]]) -> Session:
    monitor = OpenMonitor("/run/a.qmp", cast("Any", None), None)
    session = Session(monitor, lambda name, details: events.append((name, details)), request_timeout_s=1)
    session._reader = asyncio.StreamReader(limit=1000)
    session._reader.feed_eof()
    session._intake.greeted(session.take)
    return session


@settings(max_examples=50)
@given(st.lists(MESSAGES, max_size=6))
def test_any_bytes_are_messages_or_end_the_session(messages: list[bytes]) -> None:
    async def read() -> None:
        events: list[tuple[str, Mapping[str, object]]] = []
        session = session_reading(events)
        session._waiting.add([Asked("query-name"), Asked("query-uuid")])
        session._waiting.abandon([2])
        with suppress(ConnectionLost, EOFError):
            session._intake.received(b"\r\n".join([*messages, b""]))
            await session._bh_recv_message()
        for name, details in events:
            assert type(name) is str
            assert type(details) is dict
            assert isinstance(translated(name, details).event, str)

    asyncio.run(read())


QMP_EVENTS = {"stopped": "STOP", "resumed": "RESUME"}
DETAILS = shaped(guest=JSON, reason=JSON, action=JSON, actual=JSON) | st.dictionaries(st.text(), JSON)


@given(st.sampled_from([kind.word for kind in VM_EVENTS if kind.is_open]), DETAILS, st.integers(0, 2**53))
def test_an_event_of_any_details_is_published_as_documented(
    word: str, details: dict[str, object], actual: int
) -> None:
    if word == "balloon-change":
        details["actual"] = actual  # the agent takes it from no other event
    event = translated(QMP_EVENTS.get(word, word.upper().replace("-", "_")), details)
    check_event(event_object(VmId("a"), event))
    assert {key: details[key] for key in event.data} == event.data


# ── the answers of a monitor ─────────────────────────────────────────────────────────────────────


class Answers:
    """A session that answers each request with the next of the given values."""

    path = "/run/a.qmp"
    version = "7.2.22"
    is_pretty = False

    def __init__(self, answers: list[object]) -> None:
        self._answers = answers

    async def request(self, command: str, arguments: object = None) -> object:
        if not self._answers:
            raise QmpError(command, "GenericError", "no answer left")
        return self._answers.pop(0)

    async def request_all(self, *asked: Asked) -> list[object | QmpError]:
        answers: list[object | QmpError] = []
        for command, arguments in asked:
            try:
                answers.append(await self.request(command, arguments))
            except QmpError as error:
                answers.append(error)
        return answers


DEVICE = balloon.BalloonDevice("/machine/peripheral/balloon0", "virtio-balloon-pci")


async def sample(session: Session) -> object:
    sampler = statistics.Sampler(session, DEVICE)
    await sampler.start(1)
    await sampler.poll()
    return sampler.sample


async def judged(session: Session) -> object:
    examined = await examine(session, name="a", pid=None, is_fresh=False)
    return json.loads(json.dumps(vm_result(examined)))


async def is_migrating(session: Session) -> object:
    return balloon.parse_migrating(session, await session.request(*balloon.MIGRATION))


ASKED: list[tuple[Callable[[Session], Coroutine[Any, Any, object]], object]] = [
    (balloon.find_balloon, balloon.BalloonDevice),
    (balloon.memory_size, int),
    (balloon.query_actual, int),
    (balloon.query_run_state, str),
    (is_migrating, bool),
    (lambda session: balloon.query_driver(session, DEVICE), (balloon.DriverStatus, type(None))),
    (sample, object),
    (lambda session: judged(session), dict),
]
ANSWERS = st.one_of(
    JSON,
    st.lists(shaped(name=JSON, type=st.just("child<virtio-balloon-pci>") | JSON, data=shaped(size=JSON))),
    st.lists(shaped(id=st.text() | JSON, size=st.integers() | JSON, share=JSON, prealloc=JSON)),
    shaped(actual=JSON, status=JSON, base_memory=st.integers(0, 2**40) | JSON),
    shaped(last_update=st.integers(0, 9) | JSON, stats=st.dictionaries(st.text(), JSON)),
    shaped(status=shaped(statuses=st.lists(JSON)), guest_features=shaped(dev_features=st.lists(JSON) | JSON)),
)


@settings(max_examples=70)
@given(st.sampled_from(ASKED), st.lists(ANSWERS, max_size=5))
def test_any_answers_are_a_result_or_a_documented_error(
    asked: tuple[Any, Any], answers: list[object]
) -> None:
    ask, kind = asked
    outcome: object = None
    try:
        ask(cast("Session", Answers(answers))).send(None)  # it never waits, so it ends at the first step
    except StopIteration as done:
        outcome = done.value
        documented = isinstance(outcome, kind)
    except (ConnectionLost, NoBalloon, QmpError) as error:
        outcome = error
        documented = len(str(error)) < 700
    assert documented, outcome


@settings(max_examples=30)
@given(st.dictionaries(st.sampled_from(list(statistics._STATISTICS.values())) | st.text(), JSON))
def test_any_statistics_are_figures_that_json_represents_exactly(stats: Mapping[str, object]) -> None:
    figures = statistics.parse_stats(stats)
    for name in STATISTICS:
        value = getattr(figures, name)
        assert value is None or (type(value) is int and 0 <= value <= 2**53)


# ── the files of the kernel ──────────────────────────────────────────────────────────────────────


@given(
    st.text()
    | st.lists(st.sampled_from(["some avg10=", "1.5", "²", ".", " ", "\n", "full", "="])).map("".join)
)
def test_any_pressure_is_percentages(text: str) -> None:
    assert all(value >= 0 for value in parse_pressure(text).values())


@given(st.text() | st.from_regex(r"[A-Z]+: *[0-9]{1,20} kB\n?", fullmatch=True))
def test_any_meminfo_is_sizes(text: str) -> None:
    assert all(size >= 0 for size in parse_meminfo(text).values())


@given(st.text(), st.text(alphabet="0123456789 ²SRT", max_size=60))
def test_any_process_is_a_state_and_a_start_or_none(name: str, rest: str) -> None:
    stat = parse_process_stat(f"1 ({name}) {rest}")
    assert stat is None or stat.started >= 0
