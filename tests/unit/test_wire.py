"""Received bytes become messages, however they are cut on the way."""

from __future__ import annotations

import asyncio
import socket
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpballoon.errors import ConnectionLost
from qmpballoon.qmp.wire import Splitter, decoded, patient_timeout

LINES = (b'{"return": {}, "id": 1}\r\n', b'{"event": "STOP"}\n', b"\r\n", b"\n", b"no JSON\n")
PRETTY = (b'{\r\n    "return": {\r\n    },\r\n    "id": 1\r\n}\r\n', b'{\n    "event": "STOP"\n}\n')
MESSAGES = st.lists(st.sampled_from(LINES + PRETTY), max_size=8)


def cut(stream: bytes, places: list[int]) -> list[bytes]:
    edges = sorted({0, len(stream), *(place % (len(stream) + 1) for place in places)})
    return [stream[start:end] for start, end in pairwise(edges)]


@given(
    MESSAGES, st.lists(st.integers(0, 10_000), max_size=12), st.sampled_from([b"", b'{"re', b'{\r\n  "a"'])
)
def test_any_cuts_give_the_same_messages_and_count_the_rest(
    messages: list[bytes], places: list[int], rest: bytes
) -> None:
    splitter = Splitter()
    found = [message for part in cut(b"".join(messages) + rest, places) for message in splitter.feed(part)]
    assert found == messages
    assert splitter.rest == len(rest)


def test_a_long_message_in_single_bytes_is_one_message() -> None:
    splitter = Splitter()
    message = b'{"return": "' + b"a" * 100_000 + b'"}\n'
    parts = [splitter.feed(message[at : at + 1]) for at in range(len(message))]
    assert parts[-1] == [message]
    assert not any(parts[:-1])


@pytest.mark.parametrize("raw", [b"[]\n", b"1\n", b"{\n", b"\xff\n", b'{"a": 1} x\n'])
def test_what_is_no_object_is_a_loss(raw: bytes) -> None:
    with pytest.raises(ConnectionLost, match=r"a\.qmp: this is not QMP"):
        decoded("a.qmp", raw)


async def test_a_timeout_that_is_noticed_late_waits_for_what_was_received_meanwhile() -> None:
    loop = asyncio.get_running_loop()
    reader, writer = socket.socketpair()
    reader.setblocking(False)
    received: asyncio.Future[bytes] = loop.create_future()
    loop.add_reader(reader, lambda: received.set_result(reader.recv(10)))
    try:
        async with asyncio.timeout(60), patient_timeout(0.01):
            writer.send(b"reply")
            end_s = loop.time() + 0.05
            while loop.time() < end_s:  # the loop is busy until the time-out is over
                pass
            assert await received == b"reply"
        with pytest.raises(TimeoutError):
            async with patient_timeout(0.01):
                await asyncio.Event().wait()
    finally:
        loop.remove_reader(reader)
        reader.close()
        writer.close()
