"""Requests of every kind over a real broker: one answer each, and a refused one moves nothing."""

from __future__ import annotations

import asyncio
import json
import socket
from typing import Any

import aiomqtt
import msgpack  # type: ignore[import-untyped]
from agent_process import PATIENCE_S, ROOT, AgentWatch, StartAgent, error_word, until

from qmpballoon.lab.broker import HOST, LabBroker
from qmpballoon.lab.lab import Lab
from qmpballoon.units import MIB

LONG = "x" * 300
BAD_REQUESTS: list[tuple[str, str, Any, str]] = [
    ("vm/web", "set-target", {}, "malformed"),
    ("vm/web", "set-target", {"target": None}, "malformed"),
    ("vm/web", "set-target", {"target": "512M"}, "malformed"),
    ("vm/web", "set-target", {"target": "much"}, "malformed"),
    ("vm/web", "set-target", {"target": True}, "malformed"),
    ("vm/web", "set-target", {"target": [96]}, "malformed"),
    ("vm/web", "set-target", {"target": "９６MiB"}, "malformed"),
    ("vm/web", "set-target", {"target": "96MiB", "wait": 3}, "malformed"),
    ("vm/web", "set-target", {"target": "96MiB", "wait_s": "3"}, "malformed"),
    ("vm/web", "set-target", {"target": "96MiB", "wait_s": 601}, "out-of-range"),
    ("vm/web", "set-target", {"target": "96MiB", "wait_s": -1}, "out-of-range"),
    ("vm/web", "set-target", {"target": 0}, "out-of-range"),
    ("vm/web", "set-target", {"target": -100663296}, "out-of-range"),
    ("vm/web", "set-target", {"target": 2**53 + 2}, "out-of-range"),
    ("vm/web", "set-target", {"target": "129MiB"}, "out-of-range"),
    ("vm/web", "set-target", {"target": "1MiB"}, "out-of-range"),
    ("vm/web", "set-mode", {"mode": "of-war"}, "malformed"),
    ("vm/web", "set-mode", {}, "malformed"),
    ("vm/web", "set-mode", {"mode": "manual", "for_s": 0}, "out-of-range"),
    ("vm/web", "set-limits", {}, "malformed"),
    ("vm/web", "set-limits", {"floor": "1MiB"}, "out-of-range"),
    ("vm/web", "set-limits", {"ceiling": "200%"}, "out-of-range"),
    ("vm/web", "set-limits", {"floor": "100MiB", "ceiling": "90MiB"}, "out-of-range"),
    ("vm/web", "set-limits", {"shares": 0}, "out-of-range"),
    ("vm/web", "set-limits", {"shares": 1.5}, "malformed"),
    ("vm/web", "get", {"much": 1}, "malformed"),
    ("vm/web", "list", {}, "unknown-verb"),
    ("vm/web", "explode", {}, "unknown-verb"),
    ("vm/nobody", "set-target", {"target": "96MiB"}, "unknown-vm"),
    ("", "explode", {}, "unknown-verb"),
    ("", "set-target", {"target": "96MiB"}, "unknown-verb"),
]
BAD_PAYLOADS: list[bytes] = [
    b"{",
    b"[1, 2]",
    b"null",
    b"\xff\xfe\x00",
    b'{"target": "96MiB", "target": "97MiB"',
    b'{"target": NaN}',
    b'{"target": "96MiB", "transaction": "' + LONG.encode() + b'"}',
    b"[" * 5000,
    b'{"target": "96MiB", "pad": "' + b"x" * 65536 + b'"}',
    b"\x81\xa6target\xa5",
    b"\x80",
]


async def test_every_bad_request_has_one_answer_and_moves_nothing(
    lab: Lab, broker: LabBroker, watch: AgentWatch, start_agent: StartAgent
) -> None:
    guest = await lab.guest("web")
    start_agent(broker)
    await watch.until_health("web", "ok")

    for place, verb, arguments, word in BAD_REQUESTS:
        vm = place.partition("/")[2] or None
        transaction = await watch.send(vm, verb, **arguments)
        answer = await watch.answer(transaction)
        assert (error_word(answer), answer["vm"], answer["verb"]) == (word, vm, verb), (arguments, answer)

    for payload in BAD_PAYLOADS:
        start = watch.now
        await watch.send_raw("web", "request/set-target", payload)
        topic = f"{ROOT}/vm/web/response/set-target"
        raw = (await watch.listener.on(topic, start=start)).payload
        answer = msgpack.unpackb(raw) if raw[:1] != b"{" else watch.all_answers(start)[0]
        assert error_word(answer) == "malformed", payload[:40]

    for payload in (b"96MiB", b'{"transaction": "kept", "target": "96MiB"}'):
        start = watch.now
        await watch.send_raw("web", "target/set", payload, retain=True)
        await until(lambda start=start: watch.all_answers(start), what="a refusal")  # type: ignore[misc]
        assert error_word(watch.all_answers(start)[0]) == "retained"
        await watch.send_raw("web", "target/set", b"", retain=True)  # clears it, and is not a request

    await watch.do("web", "get")  # all requests before it are answered
    responses = [one for one in watch.listener.messages if "/response/" in one.topic.value]
    assert len(responses) == len(BAD_REQUESTS) + len(BAD_PAYLOADS) + 2 + 1
    assert not watch.events("web", "decision")
    assert await guest.monitor.actual() == guest.memory
    state = watch.state("web")
    assert (state["target"], state["mode"], state["overridden"]) == (None, "manual", [])


async def test_one_transaction_has_one_effect_and_seventeen_are_too_many(
    lab: Lab, broker: LabBroker, watch: AgentWatch, start_agent: StartAgent
) -> None:
    web, _ = await asyncio.gather(lab.guest("web"), lab.guest("bare", driver=False))
    # none of eighteen requests times out before the last is received
    start_agent(broker, vm={"qmp_timeout_s": 8})
    await watch.until_health("web", "ok")
    await watch.until_health("bare", "starting", "no-driver")

    request = {"transaction": {"by": "two", "n": 1}, "target": "112MiB", "wait_s": 40}
    await asyncio.gather(*(watch.send_raw("web", "request/set-target", request) for _ in range(2)))
    await until(lambda: len(watch.answers(request["transaction"])) == 2, what="both are answered")
    await watch.send_raw("web", "request/set-target", request)
    await until(lambda: len(watch.answers(request["transaction"])) == 3, what="a late one is answered too")
    same = [answer["result"] for answer in watch.answers(request["transaction"])]
    assert same == [same[0]] * 3
    await web.monitor.until_actual((112 * MIB).__eq__, timeout_s=PATIENCE_S, what="the balloon takes 16 MiB")
    await watch.until_events("web", "decision")
    assert len(watch.events("web", "decision")) == 1

    targets = [f"{size}MiB" for size in range(100, 116)]
    waiting = [await watch.send("bare", "set-target", target=target, wait_s=600) for target in targets]
    for transaction in waiting[:-1]:  # each is superseded by the next, and waits no longer
        assert error_word(await watch.answer(transaction)) == "superseded"
    assert not watch.answers(waiting[-1])
    assert (await watch.do("bare", "get"))["target"] == 115 * MIB

    web.stop()  # a process that does not answer: all requests to it wait
    gets = await asyncio.gather(*(watch.send("web", "get") for _ in range(18)))
    words = [error_word(answer) for answer in await asyncio.gather(*(watch.answer(one) for one in gets))]
    await watch.until_health("web", "unresponsive")
    web.cont()
    assert words.count("busy") == 2
    assert words.count("offline") == 16
    await watch.until_health("web", "ok")
    await watch.do("web", "get")


async def test_properties_of_mqtt_5_are_honoured(
    lab: Lab, broker: LabBroker, watch: AgentWatch, start_agent: StartAgent
) -> None:
    guest = await lab.guest("web")
    start_agent(broker)
    await watch.until_health("web", "ok")
    topic = f"{ROOT}/vm/web/request/set-target"

    await watch.listener.send(
        topic,
        {"transaction": 7, "target": "112MiB", "wait_s": 40},
        ResponseTopic="replies/here",
        CorrelationData=b"\x00\x01",
    )
    message = await watch.listener.on("replies/here")
    assert message.properties is not None
    assert message.properties.CorrelationData == b"\x00\x01"  # type: ignore[attr-defined]
    assert message.properties.ContentType == "application/json"  # type: ignore[attr-defined]
    assert not watch.received("vm/web/response/set-target")

    # a response topic within the base would let a request write the agent's own topics
    await watch.listener.send(topic, {"transaction": 8, "target": "1MiB"}, ResponseTopic=f"{ROOT}/status")
    assert error_word(await watch.answer(8)) == "out-of-range"
    assert watch.received("status") == [b"online"]

    await watch.listener.send(
        topic,
        msgpack.packb({"transaction": b"bytes?", "target": "100MiB", "wait_s": 40}),
        ContentType="application/msgpack",
        ResponseTopic="replies/packed",
    )
    message = await watch.listener.on("replies/packed")
    assert msgpack.unpackb(message.payload)["error"]["code"] == "malformed"  # JSON has no such transaction
    assert message.properties.ContentType == "application/msgpack"  # type: ignore[union-attr]

    await watch.listener.send(
        topic,
        msgpack.packb({"transaction": 9, "target": "96MiB", "wait_s": 40}),
        ResponseTopic="replies/known-by-its-first-byte",
    )
    answer = msgpack.unpackb((await watch.listener.on("replies/known-by-its-first-byte")).payload)
    assert answer["result"]["reached"] is True
    await guest.monitor.until_actual((96 * MIB).__eq__, timeout_s=PATIENCE_S, what="the last of 32 MiB")


async def test_an_agent_uses_mqtt_3_and_msgpack(lab: Lab, broker: LabBroker, start_agent: StartAgent) -> None:
    guest = await lab.guest("web")
    start_agent(broker, mqtt={"protocol": "3.1.1", "payload": "msgpack"})
    async with aiomqtt.Client(
        HOST,
        broker.port,
        protocol=aiomqtt.ProtocolVersion.V311,
        socket_options=[(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)],
    ) as client:
        await client.subscribe(f"{ROOT}/#", qos=1)

        async def answer_of(transaction: object) -> dict[str, Any]:
            async for message in client.messages:
                if message.topic.value == f"{ROOT}/vm/web/response/set-target":
                    is_json = message.payload[:1] == b"{"
                    answer = json.loads(message.payload) if is_json else msgpack.unpackb(message.payload)
                    assert answer["transaction"] == transaction
                    assert is_json is (transaction == 1)
                    return dict(answer)
            raise AssertionError("the broker closed the connection")

        async with asyncio.timeout(PATIENCE_S):
            async for message in client.messages:
                if (
                    message.topic.value == f"{ROOT}/vm/web/state"
                    and msgpack.unpackb(message.payload)["health"] == "ok"
                ):
                    break
            topic = f"{ROOT}/vm/web/request/set-target"
            await client.publish(topic, '{"transaction": 1, "target": "112MiB", "wait_s": 40}', qos=1)
            assert (await answer_of(1))["result"]["reached"] is True
            packed = msgpack.packb({"transaction": 2, "target": "120MiB", "wait_s": 40})
            await client.publish(topic, packed, qos=1)
            assert (await answer_of(2))["result"]["reached"] is True
    await guest.monitor.until_actual((120 * MIB).__eq__, timeout_s=PATIENCE_S, what="the last of 8 MiB")
