"""Valid configuration files: defaults, values, matches, the printed file."""

from __future__ import annotations

import re
from dataclasses import FrozenInstanceError, fields, is_dataclass, replace
from pathlib import Path

import pytest

from qmpballoon import config
from qmpballoon.config import BrokerUrl, CgroupBudget, Configuration, Surroundings
from qmpballoon.config.tree import TABLES, VmMatch, keys
from qmpballoon.errors import ConfigurationError
from qmpballoon.units import GIB, MIB, parse_amount

HERE = Surroundings(host="edge-7", state_dir="/var/lib/qmpballoon", sockets=("/run/qmpballoon/*.qmp",))
EXAMPLE = Path(__file__).parents[2] / "examples" / "agent.toml"


def read(text: str, here: Surroundings = HERE) -> Configuration:
    return config.parse(text, surroundings=here)


def test_an_empty_file_gives_the_documented_defaults() -> None:
    found = read("")
    assert (found.agent.host, found.agent.state_dir, found.agent.on_exit) == (
        "edge-7",
        "/var/lib/qmpballoon",
        "keep",
    )
    assert found.discovery.sockets == ("/run/qmpballoon/*.qmp",)
    assert found.discovery.forget_after_s == 86400
    mqtt = found.mqtt
    assert (mqtt.url, mqtt.enabled, mqtt.protocol, found.client_id) == (
        (),
        False,
        "auto",
        "qmpballoon-edge-7",
    )
    assert (mqtt.username, mqtt.password_file, mqtt.ca_file, mqtt.cert_file, mqtt.key_file) == (None,) * 5
    assert (mqtt.base_topic, mqtt.payload, mqtt.heartbeat_s, mqtt.min_interval_s) == (
        "qmpballoon",
        "json",
        60,
        1,
    )
    assert (mqtt.samples, mqtt.response_topics) == (False, ("#",))
    assert (str(found.host.budget), str(found.host.reserve)) == ("80%", "512MiB")
    assert (found.policy.name, found.policy.mode, found.policy.overload) == ("fairshare", "auto", "guests")
    vm = found.vm
    assert (str(vm.floor), str(vm.ceiling), vm.shares, vm.stats_interval_s) == ("25%", "100%", 1000, 2)
    assert (vm.fast_interval_s, vm.qmp_timeout_s, vm.grace_s, vm.mode) == (0.2, 2, 3, None)
    assert found.matches == ()


def test_the_defaults_have_their_declared_types() -> None:
    found = read("")
    assert type(found.mqtt.heartbeat_s) is float
    assert type(found.vm.grace_s) is float
    assert type(found.vm.stats_interval_s) is int
    assert type(found.vm.shares) is int


def test_every_default_is_accepted_by_its_reader() -> None:
    found = read("")
    checked = 0
    for table, record in TABLES.items():
        for name, key in keys(record).items():
            value = getattr(getattr(found, table), name)
            if key.example is None:
                written = str(value) if is_dataclass(value) else value
                assert key.read(written) == value, name
                checked += 1
    assert checked > 20


def test_the_tree_cannot_be_changed() -> None:
    found = read("")
    with pytest.raises(FrozenInstanceError):
        found.agent.host = "other"  # type: ignore[misc]
    assert hash(found) == hash(read(""))


def test_the_example_file_has_the_values_of_its_comments() -> None:
    found = config.load(EXAMPLE, surroundings=replace(HERE, host="other"))
    assert found.source == str(EXAMPLE)
    assert found.agent.host == "edge-7"
    assert found.mqtt.url == (
        BrokerUrl("mqtts", "broker-a.example.org", 8883),
        BrokerUrl("mqtts", "broker-b.example.org", 8884),
    )
    assert found.host.budget == parse_amount("75%")
    archive = config.vm_settings(found, config.Claim("db-archive", "/run/db/archive.qmp"))
    assert (str(archive.floor), archive.shares, archive.mode) == ("1GiB", 2000, "manual")
    web = config.vm_settings(found, config.Claim("web1", "/run/qmpballoon/web1.qmp"))
    assert (str(web.floor), web.shares, web.mode) == ("30%", 1000, None)
    assert config.rename_for(found, config.Claim("guest", "/run/qmpballoon/shop-frontend.qmp")) == "shop"


@pytest.mark.parametrize(
    ("written", "url"),
    [
        ("mqtt://localhost", BrokerUrl("mqtt", "localhost", 1883)),
        ("mqtts://broker/", BrokerUrl("mqtts", "broker", 8883)),
        ("ws://broker", BrokerUrl("ws", "broker", 80, "")),
        ("wss://broker.example.org/mqtt?a=b", BrokerUrl("wss", "broker.example.org", 443, "/mqtt?a=b")),
        ("MQTT://10.0.0.1:11883", BrokerUrl("mqtt", "10.0.0.1", 11883)),
        ("mqtt://[::1]", BrokerUrl("mqtt", "::1", 1883)),
        ("wss://[2001:db8::7]:9001/mqtt", BrokerUrl("wss", "2001:db8::7", 9001, "/mqtt")),
        ("mqtt://my_broker", BrokerUrl("mqtt", "my_broker", 1883)),
    ],
)
def test_broker_urls_have_their_usual_ports(written: str, url: BrokerUrl) -> None:
    assert read(f'[mqtt]\nurl = "{written}"').mqtt.url == (url,)
    assert read(f'[mqtt]\nurl = "{str(url).removesuffix("...")}"').mqtt.url == (
        replace(url, path=url.path[:1]),
    )
    assert str(url).endswith("/..." if url.path else f":{url.port}")  # a path may hold a secret
    assert url.tls == (url.scheme in ("mqtts", "wss"))
    assert url.websocket == (url.scheme in ("ws", "wss"))


def test_several_brokers_keep_their_order_without_duplicates() -> None:
    urls = read('[mqtt]\nurl = ["mqtt://b", "mqtt://a", "mqtt://b:1883"]').mqtt.url
    assert [url.host for url in urls] == ["b", "a"]


def test_integers_are_accepted_as_numbers_and_whole_decimals_as_integers() -> None:
    vm = read("[vm]\ngrace_s = 5\nstats_interval_s = 4.0\nfast_interval_s = 0").vm
    assert (vm.grace_s, vm.stats_interval_s, vm.fast_interval_s) == (5.0, 4, 0.0)
    assert (type(vm.grace_s), type(vm.stats_interval_s)) == (float, int)


@pytest.mark.parametrize(
    ("written", "budget"),
    [
        ('"60%"', parse_amount("60%")),
        ('"6GiB"', parse_amount("6GiB")),
        ("6442450944", parse_amount(6442450944)),
        ('"cgroup:"', CgroupBudget("")),
        ('"cgroup:/machine.slice"', CgroupBudget("/machine.slice")),
        ('"cgroup:/sys/fs/cgroup/a/machine.slice"', CgroupBudget("/a/machine.slice")),
    ],
)
def test_a_budget_is_a_share_a_size_or_a_cgroup(written: str, budget: config.Budget) -> None:
    found = read(f"[host]\nbudget = {written}").host.budget
    assert found == budget
    assert str(found) in written.replace("/sys/fs/cgroup", "")


def test_a_systemd_credential_is_the_password_if_no_file_is_named() -> None:
    here = replace(HERE, password_file="/run/credentials/x/mqtt-password")
    assert read('[mqtt]\nusername = "a"', here).mqtt.password_file == "/run/credentials/x/mqtt-password"
    assert read('[mqtt]\nusername = "a"\npassword_file = "/b"', here).mqtt.password_file == "/b"
    assert read("", here).mqtt.username is None


MATCHES = read(
    """
    [vm]
    shares = 500
    grace_s = 7
    [[vm.match]]
    name = "db-*"
    shares = 2000
    floor = "1GiB"
    [[vm.match]]
    socket = "/run/db/*.qmp"
    rename = "first"
    shares = 3000
    [[vm.match]]
    name = "db-[12]"
    socket = "/run/db/?.qmp"
    rename = "second"
    mode = "observe"
    """
)


def test_all_matches_that_fit_apply_in_file_order() -> None:
    both = config.vm_settings(MATCHES, config.Claim("db-1", "/run/db/1.qmp"))
    assert (both.shares, str(both.floor), both.mode, both.grace_s) == (3000, "1GiB", "observe", 7)
    by_name = config.vm_settings(MATCHES, config.Claim("db-1", "/run/other/1.qmp"))
    assert (by_name.shares, str(by_name.floor), by_name.mode) == (2000, "1GiB", None)
    by_socket = config.vm_settings(MATCHES, config.Claim("web", "/run/db/1.qmp"))
    assert (by_socket.shares, str(by_socket.floor), by_socket.mode) == (3000, "25%", None)


def test_a_vm_without_a_match_has_the_settings_of_vm() -> None:
    assert config.vm_settings(MATCHES, config.Claim("DB-1", "/run/x.qmp")) == MATCHES.vm


def test_the_first_match_with_a_rename_names_the_vm() -> None:
    assert config.rename_for(MATCHES, config.Claim("db-1", "/run/db/1.qmp")) == "first"
    assert config.rename_for(MATCHES, config.Claim("db-1", "/run/x/1.qmp")) is None


def test_limits_are_ordered_and_never_above_the_size_of_the_vm() -> None:
    vm = read('[vm]\nfloor = "1GiB"\nceiling = "50%"').vm
    assert vm.limits(4 * GIB) == (GIB, 2 * GIB)
    assert vm.limits(512 * MIB) == (256 * MIB, 256 * MIB)
    assert read('[vm]\nceiling = "1TiB"').vm.limits(GIB) == (256 * MIB, GIB)
    assert read('[vm]\nfloor = "0.1%"').vm.limits(MIB) == (1049, MIB)


def test_the_printed_file_has_the_defaults_with_and_without_comment_characters() -> None:
    for here in (HERE, replace(HERE, password_file="/run/credentials/x/mqtt-password")):
        printed = config.default_text(here)
        uncommented = re.sub(r"^#(?=\S)", "", printed, flags=re.MULTILINE)
        assert uncommented != printed
        assert read(printed, here) == read("", here)
        elsewhere = Surroundings("x", "/x", (), here.password_file)
        assert read(uncommented, elsewhere) == read("", here)


def test_the_printed_file_has_every_key_of_the_tree_in_its_table() -> None:
    printed = config.default_text(HERE)
    for table, record in TABLES.items():
        section = re.split(r"^\[", printed.partition(f"[{table}]\n")[2], flags=re.MULTILINE)[0]
        for entry in fields(record):
            assert re.search(rf"^# ?{entry.name} = ", section, flags=re.MULTILINE), (table, entry.name)
    for name in keys(VmMatch):
        assert re.search(rf"^# {name} = ", printed, flags=re.MULTILINE), name


def test_the_examples_in_the_printed_file_are_valid() -> None:
    printed = config.default_text(HERE)
    found = read(re.sub(r"^# ?(?=[a-z_]+ = |\[\[)", "", printed, flags=re.MULTILINE))
    assert found.mqtt.username == "edge-7"
    assert found.matches[0].rename == "db1"
    assert str(config.vm_settings(found, config.Claim("db-1", "/run/db/1.qmp", 0)).floor) == "1GiB"


def test_a_reload_names_the_keys_that_need_a_restart_and_keeps_their_values() -> None:
    old = read("")
    new = read('[agent]\nhost = "b"\n[mqtt]\nbase_topic = "x"\nheartbeat_s = 5\n[vm]\nshares = 7')
    assert config.restart_needed(old, old) == ()
    assert config.restart_needed(old, new) == ("agent.host", "mqtt.base_topic")
    merged = config.reloaded(old, new)
    assert (merged.agent.host, merged.mqtt.base_topic) == ("edge-7", "qmpballoon")
    assert (merged.mqtt.heartbeat_s, merged.vm.shares) == (5, 7)
    assert config.restart_needed(old, merged) == ()


# ── names that are claimed ───────────────────────────────────────────────────────────────────────

OWNED = config.parse(
    """
    [[vm.match]]
    name = "db.*"
    owner = 107
    shares = 7
    [[vm.match]]
    name = "web"
    socket = "/run/web/"
    rename = "shop"
    [[vm.match]]
    name = "*"
    socket = "/run/test/*"
    shares = 8
    """,
    surroundings=HERE,
)


@pytest.mark.parametrize(
    ("claim", "base", "right"),
    [
        (config.Claim("db.1", "/run/a.qmp", 107), "db_1", True),
        (config.Claim("db.1", "/run/a.qmp", 108), "db_1", False),
        (config.Claim("db.1", "/run/a.qmp"), "db_1", False),  # of nobody knows whom
        (config.Claim("db_1", "/run/a.qmp", 108), "db_1", False),  # another name, the same in topics
        (config.Claim("web", "/run/web/a.qmp", 1), "shop", True),
        (config.Claim("web", "/run/web/sub/a.qmp", 1), "web", False),
        (config.Claim("shop", "/run/a.qmp", 1), "shop", False),  # the name that the match gives
        (config.Claim("other", "/run/a.qmp", 1), "other", None),  # * reserves nothing
    ],
)
def test_a_name_with_an_owner_or_a_socket_is_reserved(
    claim: config.Claim, base: str, right: bool | None
) -> None:
    assert config.right_to(OWNED, claim, base) is right


def test_all_keys_of_a_match_must_fit() -> None:
    assert config.vm_settings(OWNED, config.Claim("db.1", "/run/a.qmp", 107)).shares == 7
    assert config.vm_settings(OWNED, config.Claim("db.1", "/run/a.qmp", 108)).shares == 1000
    assert config.vm_settings(OWNED, config.Claim("db.1", "/run/a.qmp", None)).shares == 1000


def test_an_owner_is_a_user_of_this_host() -> None:
    found = config.parse('[[vm.match]]\nowner = "root"', surroundings=HERE)
    assert found.matches[0].owner == 0
    for owner in ('"no such user"', "-1", "true", "4294967295", '""'):
        with pytest.raises(ConfigurationError, match=r"line 2: vm\.match\[0\]\.owner"):
            config.parse(f"[[vm.match]]\nowner = {owner}", surroundings=HERE)
