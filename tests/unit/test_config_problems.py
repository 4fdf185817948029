"""Invalid configurations: all problems at once, each with its line, key and what is valid."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from qmpballoon import config
from qmpballoon.agent.usable import findings
from qmpballoon.config import Surroundings
from qmpballoon.config.tree import TABLES, keys
from qmpballoon.errors import ConfigurationError, Problem

HERE = Surroundings(host="edge-7", state_dir="/var/lib/qmpballoon", sockets=("/run/qmpballoon/*.qmp",))


def problems(text: str) -> tuple[Problem, ...]:
    with pytest.raises(ConfigurationError) as caught:
        config.parse(text, "agent.toml", surroundings=HERE)
    assert caught.value.source == "agent.toml"
    assert str(caught.value).splitlines() == [f"agent.toml: {each}" for each in caught.value.problems]
    return caught.value.problems


def only_problem(text: str) -> Problem:
    (problem,) = problems(text)
    return problem


def test_all_problems_are_reported_at_once_in_the_order_of_the_lines() -> None:
    found = problems(
        '[vm]\nfloor = "512M"\nshares = "many"\n[agent]\nflor = 1\n[mqtt]\n'
        'url = "localhost"\nheartbeat_s = 0\n\n[[vm.match]]\nname = "a"\nceiling = "0%"\n[polcy]\n'
    )
    assert [(each.line, each.key) for each in found] == [
        (2, "vm.floor"),
        (3, "vm.shares"),
        (5, "agent.flor"),
        (7, "mqtt.url"),
        (8, "mqtt.heartbeat_s"),
        (12, "vm.match[0].ceiling"),
        (13, "polcy"),
    ]


def test_check_config_prints_file_line_key_and_reason() -> None:
    with pytest.raises(ConfigurationError) as caught:
        config.parse('\n[vm]\nfloor = "512M"', "/etc/qmpballoon.toml", surroundings=HERE)
    assert str(caught.value) == (
        "/etc/qmpballoon.toml: line 3: vm.floor: "
        "the text '512M' is no size: write 512MiB (1024s) or 512MB (1000s)"
    )


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ("[agent]\nhost = ", 2, "not TOML: "),
        ("a = 1\na = 2\n", 2, "not TOML: "),
        ("a = 1\nb = [1,\n\n", 3, "not TOML: "),
        ("x = 3.1.1", 1, "not TOML: "),
        ("a = 1" + "0" * 5000, None, "too many digits"),
        ("a = " + "[" * 100_000, None, "nested too deeply"),
        ("# one\n[" + "a." * 20_000 + "a]", 2, "a dotted key has more than 32 parts"),
        ("b = {" + "a." * 20_000 + "a = 1}", 1, "a dotted key has more than 32 parts"),
        ("\ufeffa = 1", 1, "not TOML: "),
    ],
)
def test_text_that_is_not_toml_is_reported_with_its_line(text: str, line: int | None, reason: str) -> None:
    problem = only_problem(text)
    assert (problem.line, problem.key) == (line, "")
    assert reason in problem.reason


@pytest.mark.parametrize(
    ("text", "key", "reason"),
    [
        ("[agent]\nhots = 1", "agent.hots", 'unknown key; did you mean "host"?'),
        ("[mqtt]\nHeartbeat_s = 1", "mqtt.Heartbeat_s", 'unknown key; did you mean "heartbeat_s"?'),
        ("[agent]\nfloor = 1", "agent.floor", "unknown key here: it belongs in [vm]"),
        ("[agent]\nflor = 1", "agent.flor", 'unknown key here; did you mean "floor" in [vm]?'),
        ("[host]\nname = 1", "host.name", "unknown key here: it belongs in [policy]"),
        ("[discovry]", "discovry", 'unknown table; did you mean "discovery"?'),
        ("sockets = []", "sockets", "unknown key here: it belongs in [discovery]"),
        ("[policy]\nzzzzzz = 1", "policy.zzzzzz", "unknown key; known are name, mode, overload"),
        ("[[vm.match]]\nname = '*'\nshare = 1", "vm.match[0].share", 'unknown key; did you mean "shares"?'),
        ('[agent]\n"a\\nb" = 1', "agent.'a\\nb'", "unknown key; known are host, state_dir, control, on_exit"),
    ],
)
def test_unknown_names_are_reported_with_a_suggestion(text: str, key: str, reason: str) -> None:
    problem = only_problem(text)
    assert (problem.key, problem.reason) == (key, reason)


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("value", ["true", "[true]", "{a = 1}", "1979-05-27", "nan", "-1", '""', '"\\u0000"'])
def test_no_key_accepts_a_value_of_a_wrong_type_or_range(table: str, value: str) -> None:
    valid = (
        ('""', "control"),
        ('""', "state_dir"),
        *(("true", flag) for flag in ("samples", "home_assistant", "allow_remote")),
    )
    record = [name for name in keys(TABLES[table]) if (value, name) not in valid]
    text = f"[{table}]\n" + "".join(f"{name} = {value}\n" for name in record)
    found = problems(text)
    assert {each.key.split("[")[0] for each in found} == {f"{table}.{name}" for name in record}
    assert all(each.line is not None for each in found)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[agent]\nhost = 5", "must be text in quotes, not the number 5"),
        ('[agent]\nhost = " "', "must not be empty"),
        (
            '[agent]\ncontrol = "agent.sock"',
            "must be an absolute path that starts with /, not the text 'agent.sock'",
        ),
        (f'[agent]\ncontrol = "/{"x" * 107}"', "is too long for a unix socket: at most 107 bytes"),
        ('[agent]\nhost = "a\\u0007b"', "must not have control characters or line ends"),
        (
            '[agent]\nstate_dir = "var/lib"',
            "must be an absolute path that starts with /, not the text 'var/lib'",
        ),
        (
            '[agent]\non_exit = "kep"',
            'must be one of "keep", "release", not the text \'kep\'; did you mean "keep"?',
        ),
        ("[mqtt]\nprotocol = 5", 'must be text: write "5" in quotes'),
        ('[mqtt]\nsamples = "yes"', "must be true or false, not the text 'yes'"),
        ("[mqtt]\nheartbeat_s = true", "must be a number from 1 to 3600, not true"),
        ("[mqtt]\nheartbeat_s = 3601", "must be a number from 1 to 3600, not the number 3601"),
        ("[mqtt]\nheartbeat_s = inf", "must be a number from 1 to 3600, not the number inf"),
        (
            f"[mqtt]\nheartbeat_s = 0x{'f' * 5000}",
            "must be a number from 1 to 3600, not a number of many digits",
        ),
        ("[vm]\nstats_interval_s = 0.5", "must be a whole number from 1 to 3600, not the number 0.5"),
        ("[vm]\nstats_interval_s = 1.5", "must be a whole number from 1 to 3600, not the number 1.5"),
        ("[vm]\nfast_interval_s = 0.01", "must be 0 or a number from 0.05 to 3600, not the number 0.01"),
        ("[vm]\nshares = 0", "must be a whole number from 1 to 1000000, not the number 0"),
        ('[vm]\nfloor = "120%"', "must be from 0.1% to 100%, not the text '120%'"),
        (
            "[vm]\nfloor = 512",
            'must be at least 1MiB, not the number 512: a bare number is bytes, write "512MiB"',
        ),
        ("[vm]\nfloor = 2026-01-01", 'must be a size like "512MiB" or "50%", not a date'),
        ('[host]\nreserve = "0"', "must be more than zero and at most 2**53 bytes, not the text '0'"),
        ('[mqtt]\nbase_topic = "a/#"', "must not have spaces or the wildcards + and #"),
        ('[mqtt]\nbase_topic = "/a"', "must not start or end with /, nor have two in a row"),
        ('[mqtt]\nbase_topic = "$SYS"', "must not start with $: those topics belong to the broker"),
        (
            '[mqtt]\nresponse_topics = "replies/#"',
            "must be an array of MQTT filters, not the text 'replies/#'",
        ),
        ('[mqtt]\nresponse_topics = ["a/#/b"]', "# stands alone and at the end, as in a/b/#"),
        ('[mqtt]\nresponse_topics = ["a#"]', "# stands alone and at the end, as in a/b/#"),
        ('[mqtt]\nresponse_topics = ["a/b+"]', "+ stands for a whole level, as in replies/+/x"),
        (
            '[mqtt]\nresponse_topics = ["$SYS/#"]',
            "is never honoured: other programs have their own topics below $SYS",
        ),
        (
            '[mqtt]\nresponse_topics = ["homeassistant/#"]',
            "is never honoured: other programs have their own topics below homeassistant",
        ),
        (
            "[discovery]\nsockets = '/run/*.qmp'",
            "must be an array of globs of absolute paths, not the text '/run/*.qmp'",
        ),
        ("agent = 1", "must be a table: write [agent]"),
        ("[vm.match]\nname = '*'", "must be an array of tables: write [[vm.match]] in double brackets"),
        ("[vm]\nmatch = [1]", "must be an array of tables: write [[vm.match]] in double brackets"),
        ("[[vm.match]]\nfloor = '1GiB'", "says no VM: give name, socket or owner"),
        (
            "[[vm.match]]\nname = 'a[b'",
            "the [ is never closed in the text 'a[b'; [[] stands for the character itself",
        ),
        ("[[vm.match]]\nsocket = 'a.qmp'", 'is held against absolute paths: start with / or write "*/a.qmp"'),
    ],
)
def test_an_invalid_value_is_reported_with_what_is_valid(text: str, reason: str) -> None:
    assert only_problem(text).reason == reason


@pytest.mark.parametrize(
    ("word", "text"),
    [
        ("fairshare", '[policy]\nname = "fair-share"'),
        ("observe", '[policy]\nmode = "observ"'),
        ("guests", '[policy]\noverload = "guest"'),
        ("msgpack", '[mqtt]\npayload = "messagepack"'),
        ("3.1.1", '[mqtt]\nprotocol = "3.1"'),
        ("manual", '[[vm.match]]\nname = "*"\nmode = "Manual"'),
    ],
)
def test_an_unknown_word_is_reported_with_the_nearest_one(word: str, text: str) -> None:
    assert only_problem(text).reason.endswith(f'did you mean "{word}"?')


@pytest.mark.parametrize("pattern", ["[]]", "[!]]x", "a[b]c[d]", "[[]", "*?", "]"])
def test_a_valid_glob_is_accepted(pattern: str) -> None:
    found = config.parse(f"[[vm.match]]\nname = '{pattern}'", surroundings=HERE)
    assert found.matches[0].name == pattern


@pytest.mark.parametrize("pattern", ["", "[", "[]", "[!]", "a[b]c[d", "a**", "a\\u0000"])
def test_an_invalid_glob_is_refused(pattern: str) -> None:
    assert only_problem(f'[[vm.match]]\nname = "{pattern}"').key == "vm.match[0].name"


def test_each_invalid_element_of_an_array_has_its_line() -> None:
    found = problems('[discovery]\nsockets = [\n  "/ok/*.qmp",\n  "run/*.qmp",  # relative\n  5,\n]')
    assert [(each.line, each.key) for each in found] == [
        (4, "discovery.sockets[1]"),
        (5, "discovery.sockets[2]"),
    ]


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("localhost", 'the scheme is missing: write "mqtt://localhost" or "mqtts://localhost"'),
        (
            "localhost:1883",
            'the scheme is missing: write "mqtt://localhost:1883" or "mqtts://localhost:1883"',
        ),
        ("mqt://h", "the scheme must be mqtt, mqtts, ws or wss, not the text 'mqt'; did you mean \"mqtt\"?"),
        ("tcp://h", "the scheme must be mqtt, mqtts, ws or wss, not the text 'tcp'"),
        ("mqtt://h:0", "the port must be from 1 to 65535, not 0"),
        ("mqtt://h:65536", "the port must be from 1 to 65535, not 65536"),
        ("mqtt://h/path", "a path belongs only to ws and wss URLs"),
        ("ws://h/a#b", "a URL of a broker has no part after #"),
        ("mqtt://[::g]", "what stands in brackets must be an IPv6 address"),
        ("mqtt://[]", "what stands in brackets must be an IPv6 address"),
    ],
)
def test_an_invalid_url_is_reported_with_what_is_valid(url: str, reason: str) -> None:
    assert only_problem(f'[mqtt]\nurl = "{url}"').reason == reason


@pytest.mark.parametrize(
    "url", ["mqtt://", "mqtt:///x", "mqtt://h:", "mqtt://a b", "mqtt://::1", "mqtt://h:99999999", "://h"]
)
def test_text_that_is_no_url_is_reported_with_an_example(url: str) -> None:
    assert only_problem(f'[mqtt]\nurl = "{url}"').reason.startswith('must be a URL like "mqtt://localhost"')


@pytest.mark.parametrize("url", ["mqtt://::1:1883", "mqtt://::1", "wss://2001:db8::7:9001/mqtt"])
def test_an_ipv6_address_without_brackets_is_explained(url: str) -> None:
    assert only_problem(f'[mqtt]\nurl = "{url}"').reason.endswith("; an IPv6 address stands in brackets")


def test_a_password_in_the_url_is_refused_with_where_it_belongs() -> None:
    assert "password_file" in only_problem('[mqtt]\nurl = "mqtt://user:sesame@broker"').reason


@pytest.mark.parametrize(
    "url",
    [
        "mqtt://user:sesame@broker",
        "mqtt:/user:sesame@broker",
        "user:sesame@broker",
        "mqtt://user:sesame",
        "mqtt://user:sesame%40broker",
        "mqtt://broker?sesame",
        "mqtt://broker#sesame",
        "mqtt://broker/sesame",
        "http://broker/sesame",
        "ws://broker?token=sesame",
        "ws://broker/mqtt#sesame",
        "ws://broker:port/sesame",
        "ws://broker:99999/sesame",
        "ws://[::1]x/sesame",
        "ws//broker/sesame",
        "ws:broker/sesame",
        " ws://broker/sesame",
        "ws://broker/sesame\u00e9",
        "ws://broker/sesame sesame",
        "ws://broker/" + "sesame" * 1000,
    ],
)
def test_a_secret_in_a_url_that_is_refused_is_not_printed(url: str) -> None:
    assert "sesame" not in str(only_problem(f'[mqtt]\nurl = "{url}"'))


@pytest.mark.parametrize(
    ("text", "line", "key", "reason"),
    [
        ('[vm]\nceiling = "50%"\nfloor = "60%"', 3, "vm.floor", "floor 60% is above ceiling 50%"),
        ('[vm]\nfloor = "2GiB"\nceiling = "1GiB"', 2, "vm.floor", "floor 2GiB is above ceiling 1GiB"),
        ('[vm]\nceiling = "20%"', 2, "vm.ceiling", "floor 25% is above ceiling 20%"),
        (
            '[vm]\nfloor = "50%"\n[[vm.match]]\nname = "*"\nceiling = "40%"',
            5,
            "vm.match[0].ceiling",
            "floor 50% is above ceiling 40%",
        ),
        (
            "[vm]\nstats_interval_s = 2\nfast_interval_s = 5",
            3,
            "vm.fast_interval_s",
            "fast_interval_s 5.0 is above stats_interval_s 2",
        ),
        (
            "[mqtt]\nusername = 'a'",
            2,
            "mqtt.username",
            "needs a password: set password_file, or pass the systemd credential mqtt-password "
            "($CREDENTIALS_DIRECTORY, which has none here)",
        ),
        (
            "[mqtt]\nbase_topic = 'site/a'\nresponse_topics = ['b/#', 'site/a/replies']",
            3,
            "mqtt.response_topics",
            "site/a/replies is never honoured: below base_topic agents have their own topics",
        ),
        ("[mqtt]\npassword_file = '/a'", 2, "mqtt.password_file", "needs a username"),
        ("[mqtt]\nkey_file = '/a'", 2, "mqtt.key_file", "needs a cert_file"),
        (
            "[mqtt]\nurl = 'mqtt://a'\nca_file = '/a'",
            3,
            "mqtt.ca_file",
            "means an encrypted connection, and no url is mqtts or wss",
        ),
        (
            "[mqtt]\nmin_interval_s = 90",
            2,
            "mqtt.min_interval_s",
            "min_interval_s of 90 s is more than heartbeat_s, 60 s",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(text: str, line: int, key: str, reason: str) -> None:
    assert only_problem(text) == Problem(line, key, reason)


def test_a_share_and_a_size_are_not_compared() -> None:
    found = config.parse('[vm]\nfloor = "4GiB"\nceiling = "10%"', surroundings=HERE)
    assert str(found.vm.floor) == "4GiB"


def test_a_match_may_rely_on_another_match_for_the_other_limit() -> None:
    text = (
        '[vm]\nceiling = "50%"\n'
        '[[vm.match]]\nname = "a*"\nceiling = "100%"\n'
        '[[vm.match]]\nname = "ab"\nfloor = "60%"'
    )
    found = config.parse(text, surroundings=HERE)
    assert str(config.vm_settings(found, config.Claim("ab", "/x")).floor) == "60%"


def test_an_invalid_value_is_not_reported_again_as_a_contradiction() -> None:
    assert only_problem('[vm]\nceiling = "10%"\nfloor = "5O%"').key == "vm.floor"
    assert only_problem('[mqtt]\nusername = "a"\npassword_file = 5').key == "mqtt.password_file"


def test_a_missing_file_is_reported_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError) as caught:
        config.load(tmp_path / "none.toml", surroundings=HERE)
    assert str(caught.value) == f"{tmp_path}/none.toml: cannot be read: No such file or directory"


def test_a_file_that_is_no_text_or_too_long_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "agent.toml"
    file.write_bytes(b"# one\n# \xff\n")
    with pytest.raises(ConfigurationError, match=r": line 2: is not UTF-8 text$"):
        config.load(file, surroundings=HERE)
    file.write_bytes(b"#" * 300_000)
    with pytest.raises(ConfigurationError, match="is longer than 262144 bytes"):
        config.load(file, surroundings=HERE)
    with pytest.raises(ConfigurationError, match="cannot be read: Is a directory"):
        config.load(tmp_path, surroundings=HERE)


def test_a_file_with_a_byte_order_mark_and_dos_line_ends_is_read(tmp_path: Path) -> None:
    file = tmp_path / "agent.toml"
    file.write_bytes(b"\xef\xbb\xbf[agent]\r\nhost = 'a'\r\n")
    assert config.load(file, surroundings=HERE).agent.host == "a"
    file.write_bytes(b"[agent]\r\nhost = 'a'\r\non_exit = 1\r\n")
    with pytest.raises(ConfigurationError, match=r"line 3: agent\.on_exit"):
        config.load(file, surroundings=HERE)


BASE = config.parse("", surroundings=HERE)


def test_the_command_line_overrides_the_file() -> None:
    found = config.override(
        BASE,
        host="b",
        state_dir="/s",
        control="/c.sock",
        sockets=["/x/*.qmp"],
        broker="mqtts://broker",
        username="u",
        password_file="/p",
        ca_file="/c",
        base_topic="site/a",
        policy="mom",
        mode="observe",
        budget="4GiB",
        reserve="1GiB",
    )
    assert (found.agent.host, found.agent.state_dir, found.client_id) == ("b", "/s", "qmpballoon-b")
    assert (found.control_path, config.override(found, control="").control_path) == ("/c.sock", "")
    assert (found.discovery.sockets, str(found.mqtt.url[0])) == (("/x/*.qmp",), "mqtts://broker:8883")
    assert (found.mqtt.username, found.mqtt.password_file, found.mqtt.ca_file) == ("u", "/p", "/c")
    assert (found.mqtt.base_topic, found.policy.name, found.policy.mode) == ("site/a", "mom", "observe")
    assert (str(found.host.budget), str(found.host.reserve)) == ("4GiB", "1GiB")
    assert (found.policy.overload, found.vm) == (BASE.policy.overload, BASE.vm)


def test_the_payload_option_is_checked_like_the_key() -> None:
    assert config.override(BASE, payload="msgpack").mqtt.payload == "msgpack"
    with pytest.raises(ConfigurationError, match="--payload: must be one of"):
        config.override(BASE, payload="xml")


@pytest.mark.parametrize(
    ("keys", "announces"),
    [
        ("", True),
        ("home_assistant = false", False),
        ("home_assistant = true", True),
        ('payload = "msgpack"', False),
        ('payload = "msgpack"\nhome_assistant = false', False),
    ],
)
def test_home_assistant_is_told_unless_the_payload_is_msgpack(keys: str, announces: bool) -> None:
    assert config.parse(f"[mqtt]\n{keys}", surroundings=HERE).mqtt.announces is announces


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ('payload = "msgpack"\nhome_assistant = true', 3, 'needs payload = "json"'),
        ('discovery_prefix = "a/#"', 2, "must not have"),
        ('base_topic = "a"\ndiscovery_prefix = "a/b"', 3, "where agents have their own topics"),
        ('discovery_prefix = "ha"\nresponse_topics = ["ha/x"]', 3, "below discovery_prefix"),
    ],
)
def test_settings_of_home_assistant_that_cannot_work(text: str, line: int, reason: str) -> None:
    problem = only_problem(f"[mqtt]\n{text}")
    assert problem.line == line
    assert reason in problem.reason


def test_without_options_nothing_changes() -> None:
    assert config.override(BASE, sockets=[], broker=()) == BASE


def test_relative_paths_are_relative_to_the_current_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = config.override(BASE, sockets=["a/*.qmp"], state_dir="s")
    assert found.discovery.sockets == (f"{tmp_path}/a/*.qmp",)
    assert found.agent.state_dir == f"{tmp_path}/s"


def test_all_problems_of_the_command_line_are_reported_with_their_options() -> None:
    with pytest.raises(ConfigurationError) as caught:
        config.override(BASE, host="", sockets=["/a["], broker="x", policy="fair", budget="5G", username="u")
    assert caught.value.source == "command line"
    expected = ["--host", "SOCKET_OR_GLOB", "--broker", "--policy", "--budget", "--username"]
    assert [problem.key for problem in caught.value.problems] == expected


def test_a_file_with_tls_may_be_overridden_with_a_plain_broker() -> None:
    with_tls = replace(BASE, mqtt=replace(BASE.mqtt, ca_file="/ca.pem"))
    assert config.override(with_tls, broker="mqtt://localhost").mqtt.ca_file == "/ca.pem"
    with pytest.raises(ConfigurationError, match="--ca-file: means an encrypted connection"):
        config.override(BASE, broker="mqtt://localhost", ca_file="/ca.pem")


def with_password(path: os.PathLike[str] | str) -> config.MqttSettings:
    return replace(BASE.mqtt, username="u", password_file=os.fspath(path))


@pytest.mark.parametrize(
    ("content", "password"),
    [
        (b"sesame", "sesame"),
        (b"sesame\n", "sesame"),
        (b"sesame\r\n", "sesame"),
        (b" a b \n\n", " a b \n"),
        ("ü\n".encode(), "ü"),
    ],
)
def test_a_password_is_the_file_without_one_line_end(tmp_path: Path, content: bytes, password: str) -> None:
    (tmp_path / "p").write_bytes(content)
    assert config.read_password(with_password(tmp_path / "p")) == password


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the file has no password in it"),
        (b"\n", "the file has no password in it"),
        (b"\xff\n", "the password is not UTF-8 text"),
        (b"x" * 65536, "the password has more than 65535 bytes"),
        (b"x" * 99999, "is longer than 65537 bytes"),
        (None, "cannot be read: No such file or directory"),
    ],
)
def test_an_unusable_password_file_is_reported(tmp_path: Path, content: bytes | None, reason: str) -> None:
    file = tmp_path / "p"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigurationError) as caught:
        config.read_password(with_password(file))
    assert str(caught.value) == f"{file}: mqtt.password_file: {reason}"


def test_without_a_user_name_no_password_is_read() -> None:
    assert config.read_password(replace(BASE.mqtt, password_file="/does/not/exist")) is None


@pytest.mark.parametrize(
    ("listen", "reason"),
    [
        ("9188", 'must be "127.0.0.1:9188" or "unix:/run/qmpballoon/http.sock", not the text \'9188\''),
        ("unix:http.sock", "must have an absolute path"),
        ("unix:/" + "x" * 200, "is too long for a unix socket"),
        ("example.org:9188", "must be an IP address or localhost, and a port"),
        ("300.0.0.1:9188", "must be an IP address or localhost, and a port"),
        ("[127.0.0.x]:9188", 'must be "127.0.0.1:9188" or'),
        ("127.0.0.1:0", "the port must be from 1 to 65535"),
        ("127.0.0.1:65536", "the port must be from 1 to 65535"),
        (
            "0.0.0.0:9188",
            "other machines can reach 0.0.0.0:9188, and there is neither a password nor encryption",
        ),
        ("[::]:9188", "other machines can reach [::]:9188"),
        ("10.1.2.3:9188", "use 127.0.0.1, or set allow_remote = true"),
    ],
)
def test_http_is_served_at_an_address_of_this_machine_alone(listen: str, reason: str) -> None:
    problem = only_problem(f'[http]\nlisten = "{listen}"')
    assert (problem.key, problem.line) == ("http.listen", 2)
    assert reason in problem.reason


def test_http_is_served_to_other_machines_where_that_is_allowed() -> None:
    allowed = '[http]\nlisten = "0.0.0.0:9188"\nallow_remote = '
    found = config.parse(allowed + "true", surroundings=HERE).http
    assert (str(found.listen), found.allow_remote) == ("0.0.0.0:9188", True)
    assert only_problem(allowed + "false").key == "http.listen"


@pytest.mark.parametrize(
    "listen",
    ["127.0.0.1:9188", "127.3.2.1:1", "[::1]:9188", "localhost:65535", "unix:/run/qmpballoon/http.sock"],
)
def test_http_may_be_served_on_this_machine(listen: str) -> None:
    found = config.parse(f'[http]\nlisten = "{listen}"', surroundings=HERE).http.listen
    assert str(found) == listen


def test_without_prometheus_client_metrics_are_a_configuration_error(monkeypatch: pytest.MonkeyPatch) -> None:
    found = config.parse('[http]\nlisten = "127.0.0.1:9188"', surroundings=HERE)
    assert not [each for each in findings(found) if each.path == ("http", "listen")]
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    (finding,) = (each for each in findings(found) if each.path == ("http", "listen"))
    assert finding.is_error
    assert f"{sys.executable} -m pip install 'qmpballoon[metrics]'" in finding.reason
