"""Payloads as bytes: encoding and decoding of JSON and msgpack. Pure.

Input is untrusted. It is refused if it has more than 64 KiB or 16 levels, holds anything but JSON values
(NaN, a msgpack extension, a key that is not text), or names a key twice, because parsers disagree on
which value counts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal, NoReturn, TypeAlias

from qmpballoon.errors import RequestRefused

try:
    import msgpack  # type: ignore[import-untyped]
except ImportError:  # no wheel for this machine (armv7l): JSON only
    msgpack = None

HAS_MSGPACK: Final = msgpack is not None

Format: TypeAlias = Literal["json", "msgpack"]

CONTENT_TYPES: Final[Mapping[Format, str]] = MappingProxyType(
    {"json": "application/json", "msgpack": "application/msgpack"}
)
LARGEST_REQUEST: Final = 64 * 1024
LARGEST_OBJECT: Final = 1024 * 1024
LARGEST_TRANSACTION: Final = 256  # bytes, encoded as compact JSON
DEEPEST: Final = 16
_LONGEST_BARE: Final = 256
_MSGPACK_TYPES: Final = frozenset(
    {"application/msgpack", "application/x-msgpack", "application/vnd.msgpack", "application/vnd-msgpack"}
)
_MAP_BYTES: Final = frozenset({*range(0x80, 0x90), 0xDE, 0xDF})  # a msgpack map's first byte


@dataclass(frozen=True, slots=True)
class Content:
    """A decoded request payload: an object's arguments, or one bare value (then no transaction)."""

    transaction: object = None
    arguments: Mapping[str, object] | None = None
    bare: str | int | float | None = None


def encode(value: object, payload_format: Format) -> bytes:
    """Return an object as compact JSON or as msgpack, with the same values.

    JSON is written in ASCII, because a name from QEMU may hold characters that UTF-8 cannot encode.

    Raises:
        TypeError, ValueError: the value is not made of JSON values; a bug of the caller.
    """
    if payload_format == "msgpack":
        packed: bytes = msgpack.packb(value, default=_plain, unicode_errors="replace")
        return packed
    return _JSON.encode(value).encode("ascii")


def request_format(payload: bytes, content_type: str | None) -> Format:
    """Return the format of a request and of its answer: by content type, else by the first byte."""
    media_type = (content_type or "").partition(";")[0].strip().lower()
    if not HAS_MSGPACK:
        return "json"
    if media_type in _MSGPACK_TYPES:
        return "msgpack"
    if media_type != "application/json" and payload and payload[0] in _MAP_BYTES:
        return "msgpack"
    return "json"


def decode_request(payload: bytes, content_type: str | None = None) -> Content:
    """Read a request: an object, or one bare size, number or word; an empty payload is an empty object.

    Raises:
        RequestRefused: ``malformed``.
    """
    if not payload:
        return Content(arguments=MappingProxyType({}))
    if len(payload) > LARGEST_REQUEST:
        raise _malformed(f"a request is at most {LARGEST_REQUEST} bytes")
    payload_format = request_format(payload, content_type)
    value = _from_msgpack(payload) if payload_format == "msgpack" else _from_json(payload)
    match value:
        case dict():
            _check(value, 1)
            transaction = value.pop("transaction", None)
            if len(_JSON.encode(transaction)) > LARGEST_TRANSACTION:
                raise _malformed(f"a transaction is at most {LARGEST_TRANSACTION} bytes of JSON")
            return Content(transaction, arguments=MappingProxyType(value))
        case bool():
            pass
        case int() | float():
            _check(value, 1)
            return Content(bare=value)
        case str() if 0 < len(value.strip()) <= _LONGEST_BARE:
            return Content(bare=value.strip())
    raise _malformed("a request is an object with named arguments, or one bare size or word")


def decode_object(payload: bytes, content_type: str | None = None) -> Mapping[str, object]:
    """Read a published object or an answer, of at most LARGEST_OBJECT bytes.

    Raises:
        RequestRefused: ``malformed``, it is no such object.
    """
    if len(payload) > LARGEST_OBJECT:
        raise _malformed(f"an object is at most {LARGEST_OBJECT} bytes")
    payload_format = request_format(payload, content_type)
    value = _from_msgpack(payload) if payload_format == "msgpack" else _from_json(payload)
    if not isinstance(value, dict):
        raise _malformed("it is no object")
    _check(value, 1)
    return MappingProxyType(value)


def _from_json(payload: bytes) -> object:
    try:
        text = payload.decode("utf-8-sig")  # with or without a byte order mark
    except UnicodeDecodeError:
        hint = "" if HAS_MSGPACK else "; msgpack is not installed where the agent runs: send JSON"
        raise _malformed(f"the payload is neither UTF-8 nor msgpack{hint}") from None
    try:
        value: object = json.loads(text, object_pairs_hook=_object, parse_constant=_no_constant)
    except RecursionError:
        raise _malformed(f"nested deeper than {DEEPEST}") from None
    except ValueError as error:
        bare = text.strip()
        if bare[:1] in ("{", "[", '"') or len(bare) > _LONGEST_BARE or not bare.isprintable():
            raise _malformed(f"no valid JSON: {error}") from None
        return bare
    return value


def _from_msgpack(payload: bytes) -> object:
    try:
        value: object = msgpack.unpackb(
            payload, raw=False, strict_map_key=True, object_pairs_hook=_object, ext_hook=_no_extension
        )
    except RecursionError:
        raise _malformed(f"nested deeper than {DEEPEST}") from None
    except (ValueError, msgpack.UnpackException) as error:
        raise _malformed(f"no valid msgpack: {error}") from None
    return value


def _object(pairs: list[tuple[object, object]]) -> dict[object, object]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise _malformed("an object has a key twice")
    return value


def _no_constant(name: str) -> NoReturn:
    raise _malformed(f"{name} is no JSON value")


def _no_extension(code: int, _content: bytes) -> NoReturn:
    raise _malformed(f"msgpack extension type {code} is not supported")


def _check(value: object, depth: int) -> None:
    """Refuse values that JSON cannot represent, and nesting that is too deep."""
    if depth > DEEPEST:
        raise _malformed(f"nested deeper than {DEEPEST}")
    match value:
        case None | bool() | int() | str():
            return
        case float():
            if not math.isfinite(value):
                raise _malformed("a number must be finite")
        case list():
            for item in value:
                _check(item, depth + 1)
        case dict():
            for key, item in value.items():
                if not isinstance(key, str):
                    raise _malformed("keys are text")
                _check(item, depth + 1)
        case _:
            raise _malformed(f"{type(value).__name__} is no JSON value")


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} is no JSON value")


def _malformed(reason: str) -> RequestRefused:
    return RequestRefused("malformed", reason)


_JSON: Final = json.JSONEncoder(separators=(",", ":"), allow_nan=False, default=_plain)
