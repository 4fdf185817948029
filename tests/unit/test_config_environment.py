"""The defaults that depend on the machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qmpballoon import config
from qmpballoon.config import Surroundings


def surroundings(
    environment: dict[str, str], *, is_root: bool = False, there: str = "", host: str = "h"
) -> Surroundings:
    return config.surroundings_from(
        environment, host=host, home="/home/a", is_root=is_root, exists=lambda path: path == there
    )


@pytest.mark.parametrize(
    ("environment", "state_dir"),
    [
        ({"STATE_DIRECTORY": "/var/lib/a:/var/lib/b", "XDG_STATE_HOME": "/x"}, "/var/lib/a"),
        ({"STATE_DIRECTORY": "", "XDG_STATE_HOME": "/x"}, "/x/qmpballoon"),
        ({"STATE_DIRECTORY": "relative", "XDG_STATE_HOME": "relative"}, "/home/a/.local/state/qmpballoon"),
        ({}, "/home/a/.local/state/qmpballoon"),
    ],
)
def test_the_state_directory_comes_from_systemd_else_xdg_else_home(
    environment: dict[str, str], state_dir: str
) -> None:
    assert surroundings(environment).state_dir == state_dir


def test_a_user_also_has_sockets_in_the_runtime_directory() -> None:
    environment = {"XDG_RUNTIME_DIR": "/run/user/[7]"}
    assert surroundings(environment).sockets == ("/run/qmpballoon/*.qmp", "/run/user/[[]7]/qmpballoon/*.qmp")
    assert surroundings(environment, is_root=True).sockets == ("/run/qmpballoon/*.qmp",)
    assert surroundings({"XDG_RUNTIME_DIR": "relative"}).sockets == ("/run/qmpballoon/*.qmp",)


def test_the_systemd_credential_is_used_only_if_it_exists() -> None:
    environment = {"CREDENTIALS_DIRECTORY": "/run/credentials/q"}
    assert surroundings(environment).password_file is None
    path = "/run/credentials/q/mqtt-password"
    assert surroundings(environment, there=path).password_file == path
    assert surroundings({}, there="mqtt-password").password_file is None


def test_a_machine_without_a_name_is_localhost() -> None:
    assert surroundings({}, host="").host == "localhost"


def test_a_file_read_here_has_the_defaults_of_this_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STATE_DIRECTORY", str(tmp_path))
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    (tmp_path / "mqtt-password").write_text("sesame\n")
    (tmp_path / "agent.toml").write_text('[mqtt]\nusername = "a"\n')
    found = config.load(tmp_path / "agent.toml")
    assert found.agent.host == (os.uname().nodename or "localhost")
    assert found.agent.state_dir == str(tmp_path)
    assert config.read_password(found.mqtt) == "sesame"
    assert config.defaults().agent == found.agent
    assert str(tmp_path) in config.default_text()


def test_a_changed_mqtt_file_is_detected_by_its_content(tmp_path: Path) -> None:
    password = tmp_path / "password"
    password.write_text("sesame")
    text = f"[mqtt]\nurl = 'mqtt://b'\nusername = 'u'\npassword_file = '{password}'"
    mqtt = config.parse(text, surroundings=surroundings({})).mqtt
    before = config.read_mqtt_files(mqtt)
    assert "sesame" not in repr(before)
    password.write_text("sesame\n")
    assert config.read_mqtt_files(mqtt) == before
    password.write_text("thyme")
    assert config.read_mqtt_files(mqtt) != before


def test_files_for_tls_are_ignored_without_tls() -> None:
    mqtt = config.override(
        config.parse("[mqtt]\nurl = 'mqtts://b'\nca_file = '/no/ca'", surroundings=surroundings({})),
        broker="mqtt://b",
    ).mqtt
    assert config.read_mqtt_files(mqtt) == config.MqttFiles()
    assert list(config.unusable_files(mqtt)) == []
