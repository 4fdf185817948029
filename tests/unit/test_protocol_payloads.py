"""Payloads: encoding in both formats, decoding of untrusted input."""

from __future__ import annotations

import json

import msgpack  # type: ignore[import-untyped]
import pytest

from qmpballoon.errors import RequestRefused
from qmpballoon.protocol.payloads import (
    LARGEST_OBJECT,
    Content,
    decode_object,
    decode_request,
    encode,
    request_format,
)


def test_json_is_compact_and_msgpack_holds_the_same() -> None:
    value = {"a": [1, None, 0.5], "b": {"c": "ü"}}
    assert encode(value, "json") == b'{"a":[1,null,0.5],"b":{"c":"\\u00fc"}}'
    assert msgpack.unpackb(encode(value, "msgpack")) == value


def test_without_msgpack_json_is_used_and_a_msgpack_request_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("qmpballoon.protocol.payloads.HAS_MSGPACK", False)
    assert request_format(b"\x80", "application/msgpack") == "json"
    with pytest.raises(RequestRefused, match="send JSON") as refused:
        decode_request(b"\x81\xa6target\xa8\xff", "application/msgpack")
    assert refused.value.code == "malformed"
    assert decode_request(b"256").bare == 256


def test_text_that_utf_8_cannot_encode_is_published() -> None:
    assert json.loads(encode({"name": "\ud800"}, "json")) == {"name": "\ud800"}
    assert msgpack.unpackb(encode({"name": "\ud800"}, "msgpack")) == {"name": "?"}


@pytest.mark.parametrize(
    ("payload", "content_type", "found"),
    [
        (b"{}", None, "json"),
        (b"\x80", None, "msgpack"),
        (b"\xde\0\0", None, "msgpack"),
        (b"\xdf", "text/plain", "msgpack"),
        (b"{}", "application/msgpack", "msgpack"),
        (b"\x80", "application/json; charset=utf-8", "json"),
        (b"\xa4auto", None, "json"),
        (b"", None, "json"),
    ],
)
def test_the_format_comes_from_the_content_type_else_from_the_first_byte(
    payload: bytes, content_type: str | None, found: str
) -> None:
    assert request_format(payload, content_type) == found


def test_the_transaction_is_separated_from_the_arguments() -> None:
    content = decode_request(b'{"transaction": [1, {"a": null}], "target": "1GiB"}')
    assert content == Content([1, {"a": None}], {"target": "1GiB"})
    assert decode_request(b'\xef\xbb\xbf{"transaction": 1}') == Content(1, {})
    packed = decode_request(msgpack.packb({"transaction": 7, "target": 5}))
    assert packed == Content(7, {"target": 5})


@pytest.mark.parametrize(
    ("payload", "bare"),
    [
        (b"256MiB", "256MiB"),
        (b"\xef\xbb\xbf256MiB", "256MiB"),  # a byte order mark
        (b" auto\n", "auto"),
        (b'"256MiB"', "256MiB"),
        (b"268435456", 268435456),
        (b"50%", "50%"),
        (b"256.0", 256.0),
        (b"-5", -5),
    ],
)
def test_one_bare_value_is_accepted(payload: bytes, bare: object) -> None:
    assert decode_request(payload) == Content(bare=bare)  # type: ignore[arg-type]


def test_a_bare_value_in_msgpack_needs_the_content_type() -> None:
    assert decode_request(msgpack.packb("256MiB"), "application/msgpack") == Content(bare="256MiB")


@pytest.mark.parametrize(
    "payload",
    [
        b"{",
        b"[1]",
        b"true",
        b"null",
        b"NaN",
        b"-Infinity",
        b"1e999",
        b'""',
        b'"  "',
        b'"x',
        b"\xff\xfe",
        b"a\0b",
        b"two\nlines",
        b"x" * 300,
        b'{"a": NaN}',
        b'{"a": 1, "a": 2}',
        b'{"a": {"b": 1, "b": 2}}',
        b'{"a": 1e999}',
        b"[" * 60_000,
        b'{"a":' * 17 + b"1" + b"}" * 17,
        b'{"a": ' + b"9" * 5000 + b"}",
        b'{"transaction": "' + b"x" * 255 + b'"}',
        b" " * (64 * 1024 + 1),
        b"\x81",
        b"\x80\x80",
        msgpack.packb({1: 2}),
        msgpack.packb({b"a": 2}),
        msgpack.packb({"a": b"bytes"}),
        msgpack.packb({"a": float("nan")}),
        msgpack.packb({"a": msgpack.ExtType(5, b"x")}),
        msgpack.packb({"a": msgpack.Timestamp(1)}),
        b"\x82\xa1a\x01\xa1a\x02",
        b"\x81\xa1a" + b"\x91" * 5000 + b"\x01",
        b"\x81\xa1a\xc1",
    ],
)
def test_a_bad_payload_is_malformed(payload: bytes) -> None:
    with pytest.raises(RequestRefused) as refused:
        decode_request(payload)
    assert refused.value.code == "malformed"
    assert str(refused.value)


def test_the_largest_transaction_is_accepted() -> None:
    transaction = "x" * 254
    assert decode_request(json.dumps({"transaction": transaction}).encode()).transaction == transaction


@pytest.mark.parametrize("payload", [b'{"a": [1, null]}', msgpack.packb({"a": [1, None]})])
def test_a_published_object_is_read_in_both_formats(payload: bytes) -> None:
    assert decode_object(payload) == {"a": [1, None]}


@pytest.mark.parametrize(
    "payload",
    [
        *(b"", b"[]", b"5", b"online", b"{", b"\xff", b"\xc1", b'{"a": NaN}'),
        pytest.param(b'{"a":' * 20 + b"1" + b"}" * 20, id="deep"),
        pytest.param(b'{"a": "' + b"x" * LARGEST_OBJECT + b'"}', id="large"),
    ],
)
def test_what_is_no_published_object_is_refused(payload: bytes) -> None:
    with pytest.raises(RequestRefused):
        decode_object(payload)
