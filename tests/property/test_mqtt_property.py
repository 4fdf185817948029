"""Any input gives a value or a documented error, nothing else."""

from __future__ import annotations

import json
import re

from hypothesis import given
from hypothesis import strategies as st

from qmpballoon.errors import ERROR_WORDS, RequestRefused
from qmpballoon.model.names import safe_name
from qmpballoon.mqtt.answers import Answer
from qmpballoon.mqtt.commands import Message, arrival_of
from qmpballoon.mqtt.topics import Topics, is_publishable
from qmpballoon.protocol.payloads import DEEPEST, Content, decode_request, encode, request_format
from qmpballoon.protocol.requests import Request, Requests
from qmpballoon.protocol.verbs import VERBS, Asked, Scope, arguments_of, read_asked

TOPICS = Topics("qmpballoon", "edge-7")
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False)
    | st.text(max_size=8)
)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)
CONTENT_TYPES = (
    st.sampled_from([None, "", "application/json", "application/msgpack", "text/plain"]) | st.text()
)
VERB_NAMES = sorted({verb for verbs in VERBS.values() for verb in verbs})
ARGUMENT_NAMES = sorted(
    {name for verbs in VERBS.values() for verb in verbs.values() for name in arguments_of(verb)}
)


@given(st.text())
def test_a_safe_level_is_one_level_of_safe_characters(name: str) -> None:
    level = safe_name(name)
    assert re.fullmatch(r"[A-Za-z0-9_-]{1,64}", level)
    assert safe_name(level) == level


@given(st.text(max_size=200))
def test_any_topic_is_a_command_or_none_and_can_be_answered(rest: str) -> None:
    for topic in (rest, f"{TOPICS.root}/{rest}", f"{TOPICS.root}/vm/{rest}/request/get"):
        command = TOPICS.parse(topic)
        if command is not None:
            assert is_publishable(TOPICS.response(command.vm, command.verb))


LEVELS = st.sampled_from(
    [
        "qmpballoon",
        "homeassistant",
        "$SYS",
        "site",
        "a",
        "edge-7",
        "vm",
        "web1",
        "request",
        "reload",
        "status",
    ]
)
TOPIC_NAMES = st.text() | st.lists(LEVELS, max_size=5).map("/".join)
FILTERS = st.just("#") | st.lists(LEVELS | st.just("+"), min_size=1, max_size=4).map("/".join).flatmap(
    lambda levels: st.sampled_from([levels, f"{levels}/#"])
)


@given(st.sampled_from(["qmpballoon", "site", "site/a"]), st.lists(FILTERS, max_size=3), TOPIC_NAMES)
def test_no_answer_goes_to_a_forbidden_topic_whatever_is_asked_and_allowed(
    base: str, filters: list[str], requested: str
) -> None:
    topics = Topics(base, "edge-7", filters)
    topic = topics.response("web1", "get", requested)
    assert is_publishable(topic)
    forbidden = ("$", f"{base}/", "qmpballoon/", "homeassistant/")
    assert topic == topics.response("web1", "get") or (
        topic == requested and filters and not f"{topic}/".startswith(forbidden)
    )


@given(st.text())
def test_an_answer_never_goes_below_the_base_but_to_its_own_place(requested: str) -> None:
    topic = TOPICS.response("web1", "get", requested)
    assert is_publishable(topic)
    assert topic == TOPICS.response("web1", "get") or not topic.startswith("qmpballoon/")


@given(
    st.binary(max_size=300) | st.text(max_size=300).map(lambda text: text.encode("utf-8", "replace")),
    CONTENT_TYPES,
)
def test_any_payload_is_content_or_malformed(payload: bytes, content_type: str | None) -> None:
    code, content = "", Content(arguments={})
    try:
        content = decode_request(payload, content_type)
    except RequestRefused as refused:
        code = refused.code
    assert code in ("", "malformed")
    assert (content.arguments is None) != (content.bare is None)
    assert encode(content.transaction, request_format(payload, content_type))


def depth(value: object) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max((depth(item) for item in inner), default=0)


@given(st.dictionaries(st.text(max_size=8).filter(lambda key: key != "transaction"), JSON, max_size=4))
def test_any_object_comes_back_as_it_was_sent(arguments: dict[str, object]) -> None:
    if depth(arguments) > DEEPEST or any(number == float("inf") for number in _numbers(arguments)):
        return
    assert decode_request(encode(arguments, "json")) == Content(None, arguments)


def _numbers(value: object) -> list[float]:
    if isinstance(value, float):
        return [abs(value)]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [number for item in inner for number in _numbers(item)]


@given(
    st.sampled_from(VERB_NAMES) | st.text(),
    st.sampled_from(["vm", "host"]),
    st.dictionaries(st.sampled_from(ARGUMENT_NAMES) | st.text(max_size=5), JSON, max_size=4),
)
def test_any_arguments_are_read_or_refused_with_a_stable_word(
    verb: str, scope: Scope, arguments: dict[str, object]
) -> None:
    read: Asked | None = None
    try:
        read = read_asked(verb, scope, Content(arguments=arguments))
    except RequestRefused as refused:
        code = refused.code if str(refused) else "no sentence"
    else:
        code = ""
    assert code in ("", "unknown-verb", "malformed", "out-of-range")
    assert read is None or type(read) is VERBS[scope][verb]


async def _never(request: Request) -> object:
    raise AssertionError(f"{request} was begun without a group")


@given(
    st.sampled_from(["vm/web1/target/set", "request/list", "request/reclaim"])
    | st.tuples(st.text(max_size=5), st.sampled_from(VERB_NAMES) | st.text(max_size=5)).map(
        "vm/{0[0]}/request/{0[1]}".format
    ),
    st.binary(min_size=1, max_size=80) | JSON.map(lambda value: json.dumps(value).encode()),
    st.booleans(),
    CONTENT_TYPES,
    st.none() | st.text(),
)
def test_any_message_on_a_command_topic_gets_exactly_one_answer_that_can_be_sent(
    rest: str, payload: bytes, retain: bool, content_type: str | None, response_topic: str | None
) -> None:
    answers: list[Answer] = []
    message = Message(f"{TOPICS.root}/{rest}", payload, retain, content_type, response_topic)
    arrival = arrival_of(message, TOPICS, answers.append, lambda: 0.0)
    if arrival is None:
        return
    Requests(_never, lambda vm: vm == "web1", lambda: 0.0).receive(arrival)
    (answer,) = answers
    assert is_publishable(answer.topic)
    assert encode(answer.value, answer.payload_format)
    assert isinstance(answer.value, dict)
    assert answer.value["error"]["code"] in ERROR_WORDS
