"""The messages that announce a host and its VMs to Home Assistant."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

import pytest

from qmpballoon.model.names import VmId
from qmpballoon.model.records import HEALTH_WORDS, LEVELS, MODES, POLICIES, Limits, VmStatus
from qmpballoon.mqtt.commands import Message, arrival_of
from qmpballoon.mqtt.home_assistant import HomeAssistant, announced_facts
from qmpballoon.mqtt.topics import Topics
from qmpballoon.policy.reasons import WORDS
from qmpballoon.protocol.objects import Agent
from qmpballoon.protocol.payloads import decode_request
from qmpballoon.protocol.verbs import SetTarget, read_asked
from qmpballoon.units import MIB

TOPICS = Topics("qmpballoon", "edge-7")
AGENT = Agent("edge-7", "Edge 7", "0.1.0", "f00", 60.0)
LIMITS = Limits(48 * MIB, 192 * MIB, 1000)
VM = VmStatus(VmId("web1"), "web 1", "/run/web1.qmp", "ok", size=192 * MIB, limits=LIMITS, qemu="7.2.22")
MAKER = HomeAssistant(TOPICS, AGENT)


def message_of(record: VmStatus | None, maker: HomeAssistant = MAKER) -> dict[str, Any]:
    text = maker.host_message() if record is None else maker.vm_message(record)
    message: dict[str, Any] = json.loads(text)
    return message


def components_of(record: VmStatus | None) -> dict[str, dict[str, Any]]:
    components: dict[str, dict[str, Any]] = message_of(record)["components"]
    return components


def with_limits(floor: int | None, ceiling: int | None) -> VmStatus:
    return dataclasses.replace(VM, limits=Limits(floor, ceiling, 1000))


def test_a_vm_is_a_device_of_its_host() -> None:
    message = message_of(VM)
    assert MAKER.topic("web1") == "homeassistant/device/qmpballoon_edge-7_web1/config"
    assert message["device"] == {
        "identifiers": ["qmpballoon_edge-7_web1"],
        "name": "web 1",
        "manufacturer": "QEMU",
        "model": "Virtual machine",
        "via_device": "qmpballoon_edge-7",
        "sw_version": "QEMU 7.2.22",
    }
    assert message["availability"] == [
        {"topic": "qmpballoon/edge-7/status"},
        {"topic": "qmpballoon/edge-7/vm/web1/availability"},
    ]
    assert message["availability_mode"] == "all"
    assert message["state_topic"] == "qmpballoon/edge-7/vm/web1/state"


def test_a_host_is_a_device_that_its_own_status_makes_available() -> None:
    message = message_of(None)
    assert MAKER.topic(None) == "homeassistant/device/qmpballoon_edge-7/config"
    assert message["device"]["identifiers"] == ["qmpballoon_edge-7"]
    assert message["device"]["name"] == "Edge 7"
    assert message["device"]["sw_version"] == "0.1.0"
    assert message["availability"] == [{"topic": "qmpballoon/edge-7/status"}]
    assert message["state_topic"] == "qmpballoon/edge-7/host"


def test_what_people_ask_for_is_there() -> None:
    platforms = {key: one["platform"] for key, one in components_of(VM).items()}
    assert platforms["target"] == "number"
    assert platforms["mode"] == "select"
    assert platforms["problem"] == "binary_sensor"
    sensors = {"actual", "balloon", "held", "guest_available", "rss", "health", "why"}
    assert {platforms[key] for key in sensors} == {"sensor"}
    platforms = {key: one["platform"] for key, one in components_of(None).items()}
    assert {platforms[key] for key in ("mode", "policy")} == {"select"}
    assert platforms["problem"] == "binary_sensor"
    sensors = {"level", "budget", "used", "budget_used_percent", "mem_available", "room"}
    assert {platforms[key] for key in sensors} == {"sensor"}


@pytest.mark.parametrize("record", [VM, None])
def test_every_component_is_complete(record: VmStatus | None) -> None:
    components = components_of(record)
    ids = [one["unique_id"] for one in components.values()]
    assert len(set(ids)) == len(ids)
    for key, one in components.items():
        assert one["qos"] == 1
        assert one["name"]
        assert one["default_entity_id"].startswith(f"{one['platform']}.edge_7_")
        assert re.fullmatch(r"[a-z_]+\.[a-z0-9_]*[a-z0-9]", one["default_entity_id"])
        assert one.get("entity_category") in (None, "config", "diagnostic")
        assert "value_json" in one["value_template"], key


def test_every_list_of_words_is_complete() -> None:
    vm, host = components_of(VM), components_of(None)
    assert vm["health"]["options"] == list(HEALTH_WORDS)
    assert vm["why"]["options"] == list(WORDS)
    assert vm["mode"]["options"] == host["mode"]["options"] == list(MODES)
    assert host["policy"]["options"] == list(POLICIES)
    assert host["level"]["options"] == list(LEVELS)


def test_sizes_are_in_mib_with_their_classes() -> None:
    for key in ("actual", "balloon", "held", "guest_available", "rss"):
        sensor = components_of(VM)[key]
        assert sensor["device_class"] == "data_size"
        assert sensor["unit_of_measurement"] == "MiB"
        assert sensor["state_class"] == "measurement"
        assert "1048576" in sensor["value_template"]


def test_the_target_is_a_slider_between_floor_and_ceiling() -> None:
    target = components_of(VM)["target"]
    assert (target["min"], target["max"], target["mode"]) == (48, 192, "slider")
    assert (target["device_class"], target["unit_of_measurement"]) == ("data_size", "MiB")
    assert target["command_topic"] == "qmpballoon/edge-7/vm/web1/target/set"
    exact = components_of(with_limits(48 * MIB + 4096, 192 * MIB - 4096))["target"]
    assert (exact["min"] * MIB, exact["max"] * MIB) == (48 * MIB + 4096, 192 * MIB - 4096)


@pytest.mark.parametrize("limits", [(None, None), (MIB, None), (64 * MIB, 64 * MIB)])
def test_without_a_choice_the_target_is_removed(limits: tuple[int | None, int | None]) -> None:
    components = components_of(with_limits(*limits))
    assert components["target"] == {"platform": "number"}
    assert list(components) == list(components_of(VM))  # one that is left out would stay


@pytest.mark.parametrize("value", ["256", "256.0", "64.5"])
def test_what_the_slider_sends_is_a_target_in_mib(value: str) -> None:
    target = components_of(VM)["target"]
    payload = target["command_template"].replace("{{ value }}", value).encode()
    message = Message(target["command_topic"], payload)
    arrival = arrival_of(message, TOPICS, lambda answer: None, lambda: 0.0)
    assert arrival is not None
    assert isinstance(arrival.payload, bytes)
    asked = read_asked(arrival.verb, "vm", decode_request(arrival.payload))
    assert isinstance(asked, SetTarget)
    assert asked.target.of(1024 * MIB) == float(value) * MIB


@pytest.mark.parametrize(("key", "argument"), [("mode", "mode"), ("policy", "name")])
def test_the_selects_of_the_host_send_one_argument_each(key: str, argument: str) -> None:
    select = components_of(None)[key]
    assert select["command_topic"] == "qmpballoon/edge-7/request/set-policy"
    for word in select["options"]:
        sent = select["command_template"].replace("{{ value }}", word).encode()
        asked = read_asked("set-policy", "host", decode_request(sent))
        assert getattr(asked, argument) == word


def test_the_mode_of_a_vm_is_sent_bare() -> None:
    select = components_of(VM)["mode"]
    assert select["command_topic"] == "qmpballoon/edge-7/vm/web1/request/set-mode"
    assert "command_template" not in select


@pytest.mark.parametrize("name", ["{{ 1/0 }}", "a\x1b[31m\nb", '"},{"', "\ud800", "x" * 10_000, "\x00", ""])
def test_a_hostile_name_is_a_device_name_and_nothing_else(name: str) -> None:
    before, after = message_of(VM), message_of(dataclasses.replace(VM, name=name))
    written = after["device"].pop("name")
    del before["device"]["name"]
    assert after == before
    assert written
    assert len(written) <= 100
    assert written.isprintable()
    written.encode()


def test_the_message_changes_with_the_announced_facts_alone() -> None:
    changed = dataclasses.replace(VM, actual=1, target=2, why="grow", mode="manual", health="stuck", rss=4)
    assert announced_facts(changed) == announced_facts(VM)
    assert MAKER.vm_message(changed) == MAKER.vm_message(VM)
    for other in (
        with_limits(MIB, 192 * MIB),
        with_limits(48 * MIB, 64 * MIB),
        dataclasses.replace(VM, name="x"),
        dataclasses.replace(VM, qemu=None),
    ):
        assert announced_facts(other) != announced_facts(VM)
        assert MAKER.vm_message(other) != MAKER.vm_message(VM)


def test_names_that_have_no_letter_still_make_entity_ids() -> None:
    maker = HomeAssistant(Topics("base", "_"), dataclasses.replace(AGENT, host="_"))
    message = message_of(dataclasses.replace(VM, id=VmId("__")), maker)
    assert message["components"]["actual"]["default_entity_id"] == "sensor.x_x_actual"


def test_the_discovery_prefix_may_have_levels() -> None:
    topics = Topics("qmpballoon", "edge-7", discovery_prefix="site/ha")
    assert topics.device("web1") == "site/ha/device/qmpballoon_edge-7_web1/config"
    assert topics.birth == "site/ha/status"
    assert topics.device_of(topics.device("web1")) == "qmpballoon_edge-7_web1"
    for other in (TOPICS.device("web1"), "site/ha/device/a/b/config", "site/ha/device/config", "x"):
        assert topics.device_of(other) is None
