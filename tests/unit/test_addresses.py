"""Addresses of monitors, as they are typed."""

from __future__ import annotations

import pytest

from qmpballoon.addresses import (
    TcpAddress,
    is_file,
    is_tcp,
    name_from,
    refused_address,
    tcp_address,
    unix_address,
)


@pytest.mark.parametrize(
    ("text", "host", "port", "is_loopback"),
    [
        ("tcp:127.0.0.1:4444", "127.0.0.1", 4444, True),
        ("tcp:127.9.9.9:1", "127.9.9.9", 1, True),
        ("tcp:[::1]:65535", "::1", 65535, True),
        ("tcp:localhost:4444", "localhost", 4444, True),
        ("tcp:LocalHost:4444", "LocalHost", 4444, True),
        ("tcp:localhost.example.org:4444", "localhost.example.org", 4444, False),
        ("tcp:0.0.0.0:4444", "0.0.0.0", 4444, False),
        ("tcp:10.0.0.1:4444", "10.0.0.1", 4444, False),
        ("tcp:[fe80::1]:4444", "fe80::1", 4444, False),
        ("tcp:vm-7.example.org:4444", "vm-7.example.org", 4444, False),
    ],
)
def test_an_address_has_a_host_and_a_port(text: str, host: str, port: int, is_loopback: bool) -> None:
    assert tcp_address(text) == TcpAddress(host, port)
    assert tcp_address(text).is_loopback == is_loopback
    assert (refused_address(text) is None) == is_loopback
    assert refused_address(text, allow_remote=True) is None


@pytest.mark.parametrize(
    "text",
    [
        "tcp:",
        "tcp:4444",
        "tcp::4444",
        "tcp:h:0",
        "tcp:h:65536",
        "tcp:h:-1",
        "tcp:h:٣",
        "tcp:h:1\n",
        "tcp:a b:1",
    ],
)
def test_what_is_no_address_is_refused_with_what_is_valid(text: str) -> None:
    with pytest.raises(ValueError, match=r"tcp:127\.0\.0\.1:4444"):
        tcp_address(text)
    assert refused_address(text, allow_remote=True) is not None


def test_a_remote_monitor_is_refused_with_what_permits_it() -> None:
    reason = refused_address("tcp:10.0.0.1:4444")
    assert reason is not None
    assert "--allow-remote" in reason
    assert "allow_remote = true" in reason


@pytest.mark.parametrize("text", ["@web", "@/run/web.qmp", "@web 1"])
def test_an_abstract_socket_has_no_file(text: str) -> None:
    assert refused_address(text) is None
    assert not is_file(text)
    assert is_file(f"./{text}")
    assert unix_address(text) == f"\0{text[1:]}"
    assert unix_address(f"./{text}") == f"./{text}"


@pytest.mark.parametrize("text", ["@", "@web,server=on", "@web*", "@a\0"])
def test_the_name_of_an_abstract_socket_is_alone(text: str) -> None:
    assert "must be @ and the name of an abstract socket" in (refused_address(text) or "")


def test_a_vm_is_named_after_its_file_or_its_address() -> None:
    assert name_from("/run/vms/web1.qmp") == "web1"
    assert name_from("tcp:127.0.0.1:4444") == "127.0.0.1:4444"
    assert name_from("@web1.qmp") == "web1"
    assert not is_tcp("./tcp:127.0.0.1:4444")
    assert name_from("./tcp:127.0.0.1:4444") == "tcp:127.0.0"
