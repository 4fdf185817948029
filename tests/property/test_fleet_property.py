"""Whatever arrives on a fleet's topics, a reader of the fleet returns."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from qmpballoon.fleet import Fleet
from qmpballoon.mqtt.topics import FleetTopics

_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
_KEYS = st.sampled_from(
    ["ts", "heartbeat_s", "size", "actual", "guest", "age_s", "name", "event", "data", "health", "rss"]
)
_TOPICS = st.sampled_from(["status", "host", "event", "vm/a/state", "vm/a/availability", "vm/a/event", "vms"])


@given(
    _TOPICS,
    st.binary(max_size=40)
    | st.dictionaries(_KEYS, _JSON | st.dictionaries(_KEYS, _JSON, max_size=3)).map(
        lambda value: json.dumps(value).encode()
    ),
    st.booleans(),
)
def test_nothing_that_arrives_breaks_a_reader(topic: str, payload: bytes, retained: bool) -> None:
    fleet = Fleet(FleetTopics("qmpballoon"))
    fleet.take("qmpballoon/edge-7/status", b"online", retained=True)
    fleet.take(f"qmpballoon/edge-7/{topic}", payload, retained=retained)
    assert all(isinstance(host.online, bool) for host in fleet.hosts.values())
    assert all(isinstance(vm.online, bool) for vm in fleet.vms.values())
