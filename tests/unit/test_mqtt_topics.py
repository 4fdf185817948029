"""Topics: their names, which are commands, where answers go."""

from __future__ import annotations

import pytest
from paho.mqtt.client import topic_matches_sub

from qmpballoon.model.names import safe_name
from qmpballoon.mqtt.topics import Command, FleetTopics, Published, Topics, is_publishable

TOPICS = Topics("qmpballoon", "edge 7.lan")


@pytest.mark.parametrize(
    ("name", "level"),
    [
        ("web1", "web1"),
        ("a b.c/d#+", "a_b_c_d__"),
        ("", "_"),
        ("ü", "_"),
        ("x" * 80, "x" * 64),
        ("a-b_C", "a-b_C"),
    ],
)
def test_a_name_becomes_one_safe_level(name: str, level: str) -> None:
    assert safe_name(name) == level


def test_every_topic_is_below_the_safe_host() -> None:
    assert TOPICS.status == "qmpballoon/edge_7_lan/status"
    assert TOPICS.host_object == "qmpballoon/edge_7_lan/host"
    assert TOPICS.vms == "qmpballoon/edge_7_lan/vms"
    assert TOPICS.samples == "qmpballoon/edge_7_lan/samples"
    assert TOPICS.event(None) == "qmpballoon/edge_7_lan/event"
    assert TOPICS.event("web1") == "qmpballoon/edge_7_lan/vm/web1/event"
    assert TOPICS.state("web1") == "qmpballoon/edge_7_lan/vm/web1/state"
    assert TOPICS.availability("web1") == "qmpballoon/edge_7_lan/vm/web1/availability"
    assert TOPICS.response("web1", "get") == "qmpballoon/edge_7_lan/vm/web1/response/get"
    assert TOPICS.response(None, "list") == "qmpballoon/edge_7_lan/response/list"


@pytest.mark.parametrize("base", ["", "/a", "a/", "a/+/b", "#", "$SYS", "a\0"])
def test_a_base_that_cannot_be_published_under_is_refused(base: str) -> None:
    with pytest.raises(ValueError, match="base of topics"):
        Topics(base, "edge-7")


def test_only_command_topics_are_commands() -> None:
    root = TOPICS.root
    assert TOPICS.parse(f"{root}/vm/web1/target/set") == Command("web1", "set-target", bare=True)
    assert TOPICS.parse(f"{root}/vm/web1/request/get") == Command("web1", "get")
    assert TOPICS.parse(f"{root}/request/list") == Command(None, "list")
    for other in (
        "status",
        "vm/web1/state",
        "vm/web1/response/get",
        "vm/web1/request/a/b",
        "request/a/b",
        "vm/x",
    ):
        assert TOPICS.parse(f"{root}/{other}") is None
    assert TOPICS.parse("qmpballoon/other/request/list") is None


@pytest.mark.parametrize("asked", ["replies/me", "qmpballooned/x", "/x"])
def test_a_response_topic_outside_the_base_is_used(asked: str) -> None:
    assert TOPICS.response("web1", "get", asked) == asked


@pytest.mark.parametrize(
    ("filters", "asked", "is_used"),
    [
        (["replies/#"], "replies/a/b", True),
        (["replies/#"], "replies", True),
        (["replies/#"], "repliesx", False),
        (["replies/+"], "replies/a", True),
        (["replies/+"], "replies/a/b", False),
        (["a", "+/mine"], "b/mine", True),
        (["+/status"], "homeassistant/status", False),
        (["#"], "$SYS/x", False),
        ([], "replies/a", False),
    ],
)
def test_a_response_topic_is_used_where_the_filters_allow_it(
    filters: list[str], asked: str, is_used: bool
) -> None:
    topics = Topics("qmpballoon", "edge-7", filters)
    assert topics.response("web1", "get", asked) == (asked if is_used else topics.response("web1", "get"))


def test_an_agent_with_another_base_sends_nothing_to_agents_with_the_default_base() -> None:
    topics = Topics("site/a", "edge-7")
    for asked in ("qmpballoon/edge-7/vm/web1/target/set", "site/a/other/request/reload"):
        assert topics.response(None, "list", asked) == "site/a/edge-7/response/list"


@pytest.mark.parametrize(
    "asked",
    [
        "",
        "a/+",
        "a/#",
        "a\0b",
        "x" * 65536,
        "\ud800",
        "$SYS/x",
        "qmpballoon",
        "qmpballoon/other/vm/x/target/set",
        "homeassistant",
        "homeassistant/device/qmpballoon_edge-7/config",
    ],
)
def test_a_forbidden_response_topic_is_not_used(asked: str) -> None:
    assert TOPICS.response("web1", "get", asked) == TOPICS.response("web1", "get")


def test_unsafe_vm_names_are_made_safe_in_response_topics() -> None:
    assert TOPICS.response("web.1", "fly") == f"{TOPICS.root}/vm/web.1/response/fly"
    assert TOPICS.response("a b", "x" * 70_000) == f"{TOPICS.root}/vm/a_b/response/{'x' * 64}"
    assert is_publishable(TOPICS.response("\x01", ""))


@pytest.mark.parametrize(
    ("topic", "published"),
    [
        ("base/a/status", Published("a", None, "status")),
        ("base/a/host", Published("a", None, "host")),
        ("base/a/event", Published("a", None, "event")),
        ("base/a/vm/web1/state", Published("a", "web1", "state")),
        ("base/a/vm/web1/availability", Published("a", "web1", "availability")),
        ("base/a/vm/web1/event", Published("a", "web1", "event")),
        ("base/a/vm/status", None),
        ("base/a/vms", None),
        ("base/a/vm/web1/status", None),
        ("base/a/vm/web1/response/get", None),
        ("base/status", None),
        ("other/a/status", None),
        ("based/a/status", None),
    ],
)
def test_a_reader_tells_what_is_published(topic: str, published: Published | None) -> None:
    topics = FleetTopics("base")
    assert topics.parse(topic) == published
    assert any(topic_matches_sub(one, topic) for one in topics.filters) == (published is not None)


@pytest.mark.parametrize("name", ["e 7", "\x1b[2J", "\xe9", "", "x" * 65])
def test_no_agent_publishes_under_a_name_that_is_not_safe(name: str) -> None:
    topics = FleetTopics("base")
    assert topics.parse(f"base/{name}/status") is None
    assert topics.parse(f"base/a/vm/{name}/state") is None


def test_a_client_takes_answers_where_the_agent_gives_them() -> None:
    reader, agent = FleetTopics("base"), Topics("base", "a")
    for vm in (None, "web1"):
        assert topic_matches_sub(reader.responses("a", vm, "get"), agent.response(vm, "get"))
        own = reader.replies("client")
        assert agent.response(vm, "get", own) == own
    assert topic_matches_sub(agent.subscriptions()[1], agent.request("web1", "get"))
    assert agent.parse(agent.request(None, "list")) == Command(None, "list")
