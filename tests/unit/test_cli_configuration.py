"""`check-config`, and the configuration of `agent` from a file and options."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import pytest

import qmpballoon.agent.app
from qmpballoon.agent.usable import check_usable
from qmpballoon.cli import agent, main
from qmpballoon.config import Configuration, load, parse
from qmpballoon.errors import AnotherAgentRuns, ConfigurationError

Capture = pytest.CaptureFixture[str]

BAD = '[agent]\nhots = "a"\n[vm]\nfloor = "512M"\n'
GOOD = """\
[agent]
host = "edge-7"
[mqtt]
url = "mqtt://b"
[policy]
mode = "observe"
[[vm.match]]
name = "db-*"
floor = "1GiB"
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "qmpballoon.toml"
    path.write_text(GOOD)
    return path


def typed(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    agent.add_arguments(parser)
    return parser.parse_args(argv)


def test_a_valid_file_is_ok_and_its_settings_are_shown(file: Path, capsys: Capture) -> None:
    assert main(["check-config", str(file)]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(f"{file}: ok\n")
    for output in ("edge-7", "mqtt://b:1883", "mode observe", "db-*: floor 1GiB"):
        assert output in captured.out
    assert captured.err == ""


def test_unusable_mqtt_files_are_errors_all_at_once(file: Path, capsys: Capture, tmp_path: Path) -> None:
    junk = tmp_path / "junk.pem"
    junk.write_text("no PEM")
    lines = ["url = 'mqtts://b'", "username = 'u'", "password_file = '/no/password'"]
    file.write_text("\n".join(["[mqtt]", *lines, "ca_file = '/no/ca'", f"cert_file = '{junk}'"]))
    assert main(["check-config", str(file)]) == 2
    reason = "cannot be read: No such file or directory"
    assert capsys.readouterr().err.splitlines() == [
        f"qmpballoon: /no/password: mqtt.password_file: {reason} ({file}: line 4)",
        f"qmpballoon: /no/ca: mqtt.ca_file: {reason} ({file}: line 5)",
    ]
    assert main(["check-config", str(file), "--json"]) == 2
    document = json.loads(capsys.readouterr().out)
    assert document["problems"][1] == {"line": 5, "key": "mqtt.ca_file", "reason": f"/no/ca: {reason}"}
    file.write_text("\n".join(["[mqtt]", lines[0], f"ca_file = '{junk}'"]))
    assert main(["check-config", str(file)]) == 2
    assert f"{junk}: mqtt.ca_file: cannot be used: no certificate" in capsys.readouterr().err


def test_all_errors_of_a_file_are_printed_with_line_and_key(file: Path, capsys: Capture) -> None:
    file.write_text(BAD)
    assert main(["check-config", str(file)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    first, second = captured.err.splitlines()
    assert first.startswith(f"qmpballoon: {file}: line 2: agent.hots: unknown key; did you mean")
    assert second.startswith(f"qmpballoon: {file}: line 4: vm.floor: ")


def test_check_config_as_json_is_one_document_either_way(file: Path, capsys: Capture) -> None:
    assert main(["check-config", "--json", str(file)]) == 0
    assert json.loads(capsys.readouterr().out) == {"file": str(file), "ok": True, "problems": []}
    file.write_text(BAD)
    assert main(["check-config", "--json", str(file)]) == 2
    document = json.loads(capsys.readouterr().out)
    assert [(problem["line"], problem["key"]) for problem in document["problems"]] == [
        (2, "agent.hots"),
        (4, "vm.floor"),
    ]


UNUSABLE = {
    "no password file": (
        "[mqtt]\nurl='mqtt://b'\nusername='u'\npassword_file='{dir}/no'",
        "cannot be read",
    ),
    "an empty password": ("[mqtt]\nurl='mqtt://b'\nusername='u'\npassword_file='{empty}'", "has no password"),
    "a password that all may write": (
        "[mqtt]\nurl='mqtt://b'\nusername='u'\npassword_file='{open}'",
        "others than its owner may write it (mode 0622): chmod go-w {open}",
    ),
    "a CA that all may write": ("[mqtt]\nurl='mqtts://b'\nca_file='{open}'", "chmod go-w {open}"),
    "no cgroup": ("[host]\nbudget='cgroup:/no/such/group'", "there is no cgroup"),
    "a directory as a socket": ("[discovery]\nsockets=['{dir}']", "is a directory; name its sockets"),
    "the state directory is a file": ("[agent]\nstate_dir='{empty}'", "Not a directory"),
    "the state directory is below a file": ("[agent]\nstate_dir='{empty}/state'", "Not a directory"),
    "others may write in the state directory": (
        "[agent]\nstate_dir='{shared}'",
        "others may write in it (chmod go-w {shared})",
    ),
    "two VMs of one name": (
        "[[vm.match]]\nname='a'\nrename='web 1'\n[[vm.match]]\nname='b'\nrename='web.1'",
        "line 8: vm.match[1].rename: web.1 is the name that vm.match[0] gives",
    ),
    "an unknown policy": ("[policy]\nname='fair'", "did you mean"),
}


@pytest.mark.parametrize(("text", "reason"), UNUSABLE.values(), ids=UNUSABLE)
def test_check_config_refuses_what_the_agent_refuses(
    text: str, reason: str, file: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qmpballoon.log.set_up", lambda **_: None)
    empty, opened = tmp_path / "empty", tmp_path / "open"
    empty.touch()
    opened.write_text("sesame")
    opened.chmod(0o622)
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    place = {"dir": tmp_path, "empty": empty, "open": opened, "shared": shared}
    state = "" if "state_dir" in text else f"[agent]\nstate_dir='{tmp_path}/state'\n"
    file.write_text(state + text.format(**place))
    assert main(["check-config", str(file)]) == 2
    checked = capsys.readouterr().err
    assert reason.format(**place) in checked
    assert main(["agent", "-c", str(file)]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("qmpballoon: ")]
    assert said == checked.splitlines()
    assert not (tmp_path / "state").exists()


DOUBTFUL = {
    "no sockets": ("[discovery]\nsockets=[]", "line 4: discovery.sockets: no VM can be found"),
    "a budget above the host's memory": ("[host]\nbudget='1000TiB'", "host.budget: 1000TiB is more than"),
    "all of the memory and a reserve": ("[host]\nbudget='100%'", "100% with the reserve of 512MiB is more"),
    "a reserve of all": ("[host]\nreserve='1000TiB'", "host.reserve: 1000TiB is all of this machine's"),
    "a floor above the budget": (
        "[vm]\nfloor='1000TiB'\nceiling='1000TiB'",
        "line 4: vm.floor: 1000TiB for",
    ),
    "a password that all may read": (
        "[mqtt]\nurl='mqtt://b'\nusername='u'\npassword_file='{secret}'",
        "every user may read it (mode 0644): chmod o-r {secret}",
    ),
}


@pytest.mark.parametrize(("text", "reason"), DOUBTFUL.values(), ids=DOUBTFUL)
def test_what_the_agent_only_logs_is_a_warning(
    text: str,
    reason: str,
    file: Path,
    tmp_path: Path,
    capsys: Capture,
    caplog: pytest.LogCaptureFixture,
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("sesame")
    secret.chmod(0o644)
    file.write_text(f"[agent]\nstate_dir='{tmp_path}/state'\n" + text.format(secret=secret))
    assert main(["check-config", str(file)]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(f"{file}: ok, with 1 warning\n")
    assert "qmpballoon: warning: " in captured.err
    assert reason.format(secret=secret) in captured.err
    check_usable(load(file))
    (logged,) = [line for line in caplog.messages if line.startswith("configuration ")]
    assert logged.partition(": ")[2] in captured.err


def test_a_file_that_all_may_write_is_doubtful(file: Path, capsys: Capture) -> None:
    file.chmod(0o666)
    assert main(["check-config", str(file)]) == 0
    assert f"{file}: : " not in (error := capsys.readouterr().err)
    assert f"warning: {file}: others than its owner may write it" in error


def test_the_default_file_can_be_used(capsys: Capture) -> None:
    assert main(["agent", "--print-default-config"]) == 0
    assert parse(capsys.readouterr().out).policy.mode == "auto"


def test_options_override_the_file(file: Path, tmp_path: Path) -> None:
    words = ["-c", str(file), "/run/a/*.qmp", "--host", "edge-8", "--mode", "manual", "--budget", "2GiB"]
    words += ["--broker", "mqtt://x", "--broker", "mqtts://y", "--state-dir", str(tmp_path)]
    configuration = agent.configured(typed(*words))
    assert configuration.agent.host == "edge-8"
    assert configuration.agent.state_dir == str(tmp_path)
    assert configuration.discovery.sockets == ("/run/a/*.qmp",)
    assert configuration.policy.mode == "manual"
    assert str(configuration.host.budget) == "2GiB"
    assert [str(url) for url in configuration.mqtt.url] == ["mqtt://x:1883", "mqtts://y:8883"]
    assert configuration.matches, "other settings stay as in the file"


def test_without_an_option_the_setting_of_the_file_stays(file: Path) -> None:
    assert agent.configured(typed("-c", str(file))).policy.mode == "observe"


def test_the_payload_is_an_option() -> None:
    assert agent.configured(typed("--broker", "mqtt://x", "--payload", "msgpack")).mqtt.payload == "msgpack"
    assert agent.configured(typed("--broker", "mqtt://x")).mqtt.payload == "json"


def test_all_errors_of_the_command_line_are_printed_at_once(capsys: Capture) -> None:
    assert main(["agent", "--broker", "x", "--budget", "12M"]) == 2
    output = capsys.readouterr().err
    assert "--broker: " in output
    assert "--budget: " in output


def test_the_agent_runs_with_the_configuration_and_reloads_it(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Configuration] = []

    async def run(configuration: Configuration, *, reload: Callable[[], Configuration]) -> int:
        given.append(configuration)
        file.write_text(GOOD.replace("observe", "manual"))
        given.append(reload())
        file.write_text(BAD)
        with pytest.raises(ConfigurationError):
            reload()
        return 0

    monkeypatch.setattr(qmpballoon.agent.app, "run", run)
    monkeypatch.setattr("qmpballoon.log.set_up", lambda **_: None)
    assert main(["agent", "-c", str(file), "--host", "typed"]) == 0
    assert [configuration.policy.mode for configuration in given] == ["observe", "manual"]
    assert [configuration.agent.host for configuration in given] == ["typed", "typed"]


def test_a_second_agent_of_the_same_name_is_exit_2(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    async def run(configuration: Configuration, *, reload: object) -> int:
        raise AnotherAgentRuns("edge-7", "/var/lib/qmpballoon")

    monkeypatch.setattr(qmpballoon.agent.app, "run", run)
    monkeypatch.setattr("qmpballoon.log.set_up", lambda **_: None)
    assert main(["agent"]) == 2
    assert "another agent named 'edge-7' runs" in capsys.readouterr().err


def test_an_agent_does_not_start_with_a_missing_cgroup() -> None:
    configuration = agent.configured(typed("--budget", "cgroup:/no/such/group"))
    with pytest.raises(ConfigurationError, match=r"host.budget: there is no cgroup .*/no/such/group"):
        check_usable(configuration)
