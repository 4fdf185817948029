"""The stream of requests, split at any byte."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpballoon.sim.qemu.stream import Broken, Request, RequestStream

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
OBJECTS = st.dictionaries(st.text(), JSON, max_size=4)


def cut(text: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({0, len(text), *(place % (len(text) + 1) for place in cuts)})
    return [text[start:end] for start, end in pairwise(places)]


def fed(chunks: list[bytes]) -> list[Request | Broken]:
    stream = RequestStream()
    return [value for chunk in chunks for value in stream.feed(chunk)]


@given(
    st.lists(OBJECTS, max_size=5),
    st.sampled_from(["", " ", "\n", "\r\n"]),
    st.booleans(),
    st.lists(st.integers(0)),
)
def test_requests_are_complete_at_any_split_of_the_input(
    objects: list[dict[str, object]], between: str, ascii_only: bool, cuts: list[int]
) -> None:
    text = between.join(json.dumps(each, ensure_ascii=ascii_only) for each in objects)
    encoded = text.encode("utf-8", "surrogatepass")
    assert fed(cut(encoded, cuts)) == fed([encoded])
    if ascii_only:
        assert fed([encoded]) == [Request(each) for each in objects]


@given(st.binary(max_size=200), st.lists(st.integers(0)))
def test_any_bytes_give_values_or_error_messages_and_nothing_else(junk: bytes, cuts: list[int]) -> None:
    whole = fed([junk])
    assert fed(cut(junk, cuts)) == whole
    assert all(isinstance(value, Request) or value.description for value in whole)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (b"}", "JSON parse error, expecting value"),
        (b'{"execute": bad}', "JSON parse error, invalid keyword 'bad'"),
        (b"\xff", "JSON parse error, stray '\N{REPLACEMENT CHARACTER}'"),
        (b"[NaN]", "JSON parse error, invalid keyword 'NaN'"),
        (b'{"a":"\xff"}', "JSON parse error, expecting value"),
        (b"[" * 5000 + b"]" * 5000, "JSON nesting depth limit exceeded"),
        (b"[" * 1025 + b"]" * 1025, "JSON nesting depth limit exceeded"),
        (b"[" * 10**6 + b"]" * 10**6, "JSON nesting depth limit exceeded"),
    ],
)
def test_an_invalid_value_is_reported_once_and_the_next_is_read(text: bytes, sentence: str) -> None:
    assert fed([text, b'{"execute":"stop"}']) == [Broken(sentence), Request({"execute": "stop"})]


@pytest.mark.parametrize(
    ("texts", "sentences"),  # seen with QEMU 11.1.3
    [
        ([b"}", b"\n}", b"  }"], ["1:1: {}", "2:1: {}", "2:4: {}"]),
        ([b'{"execute":"stop"}}', b"\n{} }"], ["1:19: {}", "2:4: {}"]),
        ([b'{"a":\n\n  1} ', b"}"], ["3:6: {}"]),
    ],
)
def test_a_syntax_error_has_its_line_and_column_in_the_whole_input(
    texts: list[bytes], sentences: list[str]
) -> None:
    stream = RequestStream(positions=True)
    found = [value for text in texts for value in stream.feed(text)]
    broken = [value.description for value in found if isinstance(value, Broken)]
    assert broken == [sentence.format("JSON parse error, expecting value") for sentence in sentences]


def test_a_bad_keyword_has_its_position_in_the_value() -> None:
    stream = RequestStream(positions=True)
    assert stream.feed(b'\n{"execute": \n  bad}') == [Broken("3:3: JSON parse error, invalid keyword 'bad'")]
    assert stream.feed(b"[" * 5000 + b"]" * 5000) == [Broken("JSON nesting depth limit exceeded")]


def test_a_request_needs_no_end_of_line() -> None:
    stream = RequestStream()
    assert stream.feed(b'{"execute":"stop"') == []
    assert stream.feed(b"}") == [Request({"execute": "stop"})]
