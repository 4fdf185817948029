"""The control socket: requests, answers and events beside a running agent, and hostile clients of it."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import stat
import time
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path

import pytest
import uvloop
from agent_harness import PATIENCE_S, AgentHarness, qemus_in, running_agent
from served_control import command, control_of, served

from qmpballoon.agent import control as control_module
from qmpballoon.agent.control import ControlSocket
from qmpballoon.agent.feed import Feed
from qmpballoon.cli import watch
from qmpballoon.cli.vms import choose
from qmpballoon.control import ControlClient, connected_to, find_agents
from qmpballoon.errors import ConnectionLost, RequestRefused, Unreachable
from qmpballoon.model.records import Event, utc_now
from qmpballoon.protocol.requests import Request
from qmpballoon.units import MIB


@pytest.fixture
async def harness(sockets_dir: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[AgentHarness]:
    """An agent in which the VMs ``a`` and ``b`` are ok."""
    async with qemus_in(sockets_dir) as qemus:
        await qemus.start("a")
        await qemus.start("b")
        async with running_agent(sockets_dir, monkeypatch) as ready:
            await ready.until(lambda: len(ready.ids) == 2)
            await ready.until_health("a", "ok")
            await ready.until_health("b", "ok")
            yield ready


async def exchanged(path: Path, sent: bytes, *, lines: int = 1) -> list[Mapping[str, object]]:
    """Send bytes as they are and return the answers."""
    reader, writer = await asyncio.open_unix_connection(path)
    try:
        writer.write(sent)
        async with asyncio.timeout(PATIENCE_S):
            return [json.loads(await reader.readline()) for _ in range(lines)]
    finally:
        writer.close()
        await writer.wait_closed()


def code_of(answer: Mapping[str, object]) -> object:
    error = answer["error"]
    return error["code"] if isinstance(error, dict) else None


async def next_of(client: ControlClient, key: str, value: object) -> Mapping[str, object]:
    async with asyncio.timeout(PATIENCE_S):
        while (received := await client.receive()).get(key) != value:
            pass
    return received


async def test_requests_and_answers_are_those_of_mqtt(harness: AgentHarness) -> None:
    async with served(harness) as path, connected_to(str(path)) as client:
        got = await client.request("get", "a")
        assert isinstance(got, dict)
        assert (got["vm"], got["health"], got["actual"]) == ("a", "ok", 256 * MIB)
        listed = await client.request("list")
        assert isinstance(listed, list)
        assert [row["vm"] for row in listed] == ["a", "b"]
        moved = await client.request("set-target", "a", target="200MiB", wait_s=PATIENCE_S)
        assert moved == {"target": 200 * MIB, "actual": 200 * MIB, "reached": True}
        with pytest.raises(RequestRefused) as refused:
            await client.request("get", "nobody")
        assert refused.value.code == "unknown-vm"


@pytest.mark.parametrize(
    ("line", "word"),
    [
        (b"{\n", "malformed"),
        (b"\xff\xfe\n", "malformed"),
        (b"[1]\n", "malformed"),
        (b"{}\n", "malformed"),
        (b'{"verb": 7}\n', "malformed"),
        (b'{"verb": "get", "vm": ["a"]}\n', "malformed"),
        (b'{"verb": "get", "vm": "a", "colour": 1}\n', "malformed"),
        (b'{"verb": "explode", "vm": "a"}\n', "unknown-verb"),
        (b'{"verb": "set-target", "vm": "a", "target": "1TiB"}\n', "out-of-range"),
        (b'{"verb": "subscribe", "vm": "nobody"}\n', "unknown-vm"),
        (b'{"verb": "subscribe", "states_s": 0}\n', "malformed"),
        (b'{"verb": "subscribe", "states_s": true}\n', "malformed"),
        (b'{"verb": "subscribe", "colour": 1}\n', "malformed"),
        (b'{"verb": "get", "vm": "' + b"x" * 70_000 + b'"}\n', "malformed"),
    ],
)
async def test_a_bad_line_gets_one_answer_and_harms_no_one(
    harness: AgentHarness, line: bytes, word: str
) -> None:
    async with served(harness) as path:
        answer = (await exchanged(path, line))[0]
        assert code_of(answer) == word
        async with connected_to(str(path)) as client:
            assert await client.request("get", "b")


async def test_each_line_of_a_burst_gets_one_answer(harness: AgentHarness) -> None:
    sent = b"".join(
        json.dumps({"verb": "get", "vm": "a", "transaction": number}).encode() + b"\n" for number in range(40)
    )
    async with served(harness) as path:
        answers = await exchanged(path, sent, lines=40)
    assert sorted(answer["transaction"] for answer in answers) == list(range(40))  # type: ignore[type-var]
    assert {code_of(answer) for answer in answers} == {None, "busy"}


async def test_a_subscriber_gets_states_and_events_of_the_vms_it_asked_for(harness: AgentHarness) -> None:
    async with served(harness) as path, connected_to(str(path)) as client:
        await client.request("subscribe", "a", states_s=0.01)
        first = await client.receive()
        assert (first["vm"], first["health"]) == ("a", "ok")
        async with connected_to(str(path)) as other:
            await other.request("set-target", "b", target="128MiB")
            await other.request("set-target", "a", target="200MiB")
        decision = await next_of(client, "event", "decision")
        assert decision["vm"] == "a"
        state = await next_of(client, "actual", 200 * MIB)
        assert state["vm"] == "a"


async def test_a_subscriber_to_states_of_all_gets_the_figures_of_the_host(harness: AgentHarness) -> None:
    async with served(harness) as path, connected_to(str(path)) as client:
        await client.request("subscribe", states_s=0.01)
        harness.context.feed.host_changed(harness.governor.host())
        figures = await next_of(client, "level", "ok")
        assert (figures["host"], figures["policy"]) == ("edge-7", "fairshare")
        assert "vm" not in figures
        assert "event" not in figures


async def test_a_slow_subscriber_is_told_how_many_events_it_missed(harness: AgentHarness) -> None:
    event = Event("alarm", utc_now(), {"reason": "x" * 20_000, "budget": 1, "lent": 0})
    async with served(harness) as path, connected_to(str(path)) as client:
        await client.request("subscribe")
        for _ in range(400):
            harness.context.feed.host_event(event)
        received = 0
        while received < 1:
            received += (await client.receive())["event"] == "alarm"
        async with asyncio.timeout(PATIENCE_S):
            while True:  # until the agent can write again
                harness.context.feed.host_event(event)
                line = await client.receive()
                if line["event"] == "lagged":
                    break
                received += 1
    missed = line["data"]["missed"]  # type: ignore[index]
    assert missed > 0
    assert received < 400


async def test_a_pending_request_is_answered_when_the_agent_stops(
    harness: AgentHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = asyncio.Event()

    async def never(request: Request) -> object:
        started.set()
        await asyncio.Event().wait()
        return None

    monkeypatch.setattr(harness.service, "handle", never)
    async with served(harness) as path:
        reader, writer = await asyncio.open_unix_connection(path)
        writer.write(b'{"verb": "get", "vm": "a"}\n')
        await started.wait()
    assert code_of(json.loads(await reader.readline())) == "offline"
    assert await reader.read() == b""
    writer.close()
    await writer.wait_closed()


async def test_only_owner_and_group_may_open_it(harness: AgentHarness) -> None:
    async with served(harness) as path:
        assert stat.S_IMODE(path.stat().st_mode) == 0o660


async def test_the_socket_of_a_killed_agent_is_replaced(harness: AgentHarness) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(harness.directory / "agent.sock"))
    async with served(harness) as path, asyncio.timeout(PATIENCE_S):
        while True:
            try:
                async with connected_to(str(path)) as client:
                    assert await client.request("list")
                    return
            except Unreachable:
                await asyncio.sleep(0)


@pytest.mark.parametrize("taken", ["agent", "file"])
async def test_what_another_one_has_there_is_left_alone(
    harness: AgentHarness, caplog: pytest.LogCaptureFixture, taken: str
) -> None:
    caplog.set_level(logging.INFO, "qmpballoon")
    path = harness.directory / "agent.sock"
    with socket.socket(socket.AF_UNIX) as other:
        if taken == "agent":
            other.bind(str(path))
            other.listen()
        else:
            path.write_text("kept")
        task = asyncio.create_task(control_of(harness, path).run(), name="control")
        await harness.until(lambda: "control-unavailable" in caplog.text)
        task.cancel()
        await asyncio.wait((task,))
    assert path.exists()


async def test_more_clients_than_allowed_are_answered_and_closed(
    harness: AgentHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control_module, "MOST_CLIENTS", 1)
    async with served(harness) as path, connected_to(str(path)) as first:
        assert await first.request("list")
        async with connected_to(str(path)) as second:
            answer = await second.receive()
            assert code_of(answer) == "busy"
            with pytest.raises(ConnectionLost):
                await second.receive()
        assert await first.request("list")


async def test_an_agent_is_found_by_its_listening_socket(harness: AgentHarness) -> None:
    async with served(harness) as path:
        found = await find_agents()
        assert str(path) in [agent.path for agent in found.running] or os.getpid() in [
            agent.pid for agent in found.running
        ]
        named = await find_agents(str(path))
        assert [vm.id for vm in named.running[0].vms] == ["a", "b"]
    with pytest.raises(Unreachable, match="no agent listens there"):
        await find_agents(str(path))


# ── the command line ─────────────────────────────────────────────────────────────────────────────


async def test_status_and_set_go_through_the_agent(
    harness: AgentHarness, capsys: pytest.CaptureFixture[str]
) -> None:
    async with served(harness) as path:
        control = f"--control={path}"
        assert await command("status", control) == 0
        printed = capsys.readouterr().out
        assert [line.split()[0] for line in printed.splitlines()] == ["NAME", "a", "b", "2"]
        assert "through the agent edge-7" in printed
        assert await command("status", control, "--json", f"{harness.directory}/a.qmp") == 0
        row = json.loads(capsys.readouterr().out)[0]
        assert (row["name"], row["health"], row["agent"], row["error"]) == ("a", "ok", "edge-7", None)
        assert row["actual"] == 256 * MIB
        assert row["guest"]["available"] > 0
        assert await command("set", control, "a", "200MiB", "--wait") == 0
        assert "through the agent edge-7; the mode is manual now" in capsys.readouterr().out
        assert harness.record("a").target == 200 * MIB
        assert await command("set", control, "b", "8MiB") == 1
        assert "not set: 8 MiB is too little" in capsys.readouterr().err
        assert await command("set", control, "b", "8MiB", "--force") == 2
        assert "outside b's floor" in capsys.readouterr().err
        assert harness.record("b").target is None
        assert await command("set", control, "aa", "200MiB") == 3
        assert "did you mean a?" in capsys.readouterr().err


async def test_a_vm_is_given_back_to_the_policy(
    harness: AgentHarness, capsys: pytest.CaptureFixture[str]
) -> None:
    async with served(harness) as path:
        control = f"--control={path}"
        assert await command("set", control, "a", "200MiB") == 0
        assert "the mode is manual now, qmpballoon set a auto ends it)" in capsys.readouterr().out
        assert await command("status", control) == 0
        a, b = capsys.readouterr().out.splitlines()[1:3]
        assert (a.endswith("  ok, manual"), b.endswith("  ok")) == (True, True)
        assert await command("set", control, "a", "auto") == 0
        assert (
            "a: the mode is auto now: the policy decides (through the agent edge-7)"
            in capsys.readouterr().out
        )
        assert harness.record("a").mode == "auto"
        await harness.ask(None, "set-policy", mode="observe")
        assert await command("set", control, "a", "auto", "--json") == 0
        (done,) = json.loads(capsys.readouterr().out)
        assert (done["mode"], done["target"], done["error"]) == ("observe", None, None)


async def test_watch_names_the_agent_that_was_started_again(
    harness: AgentHarness, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = ""

    def says(text: str) -> bool:
        nonlocal printed
        printed += capsys.readouterr().out
        return text in printed

    async with served(harness, pid=1001) as path:
        vms = (await choose(["a"], str(path))).vms
        watching = asyncio.create_task(watch._watch_all(vms, 1.0, as_json=False))
        await harness.until(lambda: says("through the agent edge-7 (pid 1001)"))
    await harness.until(lambda: says("offline"))
    async with served(harness, pid=1002):
        await harness.until(lambda: says("through the agent edge-7 (pid 1002)"))
    watching.cancel()
    await asyncio.wait((watching,), timeout=PATIENCE_S)


async def test_without_an_agent_at_the_named_place_the_verb_says_so(
    sockets_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert await command("status", f"--control={sockets_dir}/agent.sock") == 3
    assert "no agent listens there" in capsys.readouterr().err


@pytest.mark.parametrize("loop_factory", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_a_client_that_does_not_wait_for_its_answer_harms_no_one(
    loop_factory: Callable[[], asyncio.AbstractEventLoop], sockets_dir: Path
) -> None:
    path = sockets_dir / "agent.sock"

    async def hang_up() -> None:
        asked, answered = asyncio.Event(), asyncio.Event()

        async def handle(request: Request) -> object:
            if request.verb == "get":
                asked.set()
                await answered.wait()
            return {}

        control = ControlSocket(
            str(path),
            handle,
            Feed(),
            host="edge-7",
            vm_exists=lambda vm: True,
            statuses=list,
            clock=time.monotonic,
        )
        task = asyncio.create_task(control.run(), name="control")
        async with asyncio.timeout(PATIENCE_S):
            while not path.exists():
                await asyncio.sleep(0.001)
            _, writer = await asyncio.open_unix_connection(path)
            writer.write(b'{"verb": "get", "vm": "a"}\n')
            await asked.wait()
            writer.close()
            await writer.wait_closed()
            while control.clients:
                await asyncio.sleep(0.001)
            answered.set()
            async with connected_to(str(path)) as client:
                assert await client.request("list") == {}
        task.cancel()
        await asyncio.wait((task,), timeout=PATIENCE_S)
        assert task.cancelled()

    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(hang_up())
