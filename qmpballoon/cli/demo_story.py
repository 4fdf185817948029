"""The scenes of the demo, and what each of them prints."""

from __future__ import annotations

import asyncio
import contextlib
import shlex
import signal
import time
from collections.abc import AsyncIterator, Mapping
from typing import Final

import aiomqtt

from qmpballoon.cli import terminal
from qmpballoon.cli.demo_stage import BASE, GUESTS, Onlooker, Seen, Stage, ended, looking_on
from qmpballoon.lab.broker import HOST
from qmpballoon.lab.image import guest_image
from qmpballoon.lab.require import LabError
from qmpballoon.units import MIB, format_size

BrokerGone = aiomqtt.MqttError

_HOLD: Final = {"web": 50, "db": 40, "mail": 30}  # MiB that a process in each guest holds
_ONCE_HELD: Final = 150  # by web's: what a guest has touched stays with its QEMU until a balloon takes it
_TARGET: Final = 152 * MIB
_BOOT_S: Final = 120.0
_SEEN_S: Final = 20.0
_UNDER_WAY: Final = ("starting", "no-driver", "no-stats", "offline")
_LOOK_S: Final = 0.01  # between two looks of the second monitors while the agent is away


async def tell_story(stay_s: float | None) -> None:
    """Play and print the story; stay ``stay_s`` seconds after it (None: not at all).

    SIGTERM cancels it.

    Raises:
        LabError: something of the stage does not start, or did not do its part in time.
        BrokerGone: the connection to the broker broke.
    """
    demo = asyncio.current_task()
    assert demo is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, demo.cancel)
    teller = _Teller()
    print("qmpballoon demo: real guests, a real broker and the agent, here; all of it ends with the demo")
    async with Stage() as stage:
        await _raise_curtain(stage, teller)
        async with looking_on(stage.broker.port) as onlooker:
            story = _Story(stage, onlooker, teller)
            await story.agent_starts()
            await story.balloon_moves()
            await story.request_is_refused()
            await story.qemu_dies()
            await story.agent_dies()
            again = "" if stay_s else ": qmpballoon demo --for 300 stays and tells its own port"
            teller.head(f"Try it yourself, in another terminal{again}")
            _tell_how(stage, teller)
            if stay_s is not None:
                await _stay(onlooker, teller, stay_s)
    teller.head("The end: guests, broker and agent are stopped, their files removed.")


class _Teller:
    """Prints the story, each line with the seconds since it began."""

    def __init__(self) -> None:
        self._began_s = time.monotonic()

    def head(self, text: str) -> None:
        print(f"\n{terminal.coloured(terminal.clean(text), 'bold')}", flush=True)

    def tell(self, text: str) -> None:
        terminal.clear_progress()
        stamp = terminal.coloured(f"{time.monotonic() - self._began_s:6.1f} s", "dim")
        print(f"{stamp}  {terminal.clean(text)}", flush=True)


def _patience(text: str) -> contextlib.AbstractAsyncContextManager[None]:
    async def line(elapsed_s: float) -> str:
        return f"{elapsed_s:6.0f} s  {text} ..."

    return terminal.progress(line)


async def _raise_curtain(stage: Stage, teller: _Teller) -> None:
    teller.head("Three guests and a broker")
    await stage.start_broker()
    teller.tell(f"mosquitto listens on {HOST}:{stage.broker.port}")
    async with _patience("preparing the guest image"):
        await asyncio.to_thread(guest_image, teller.tell)
    booting_s = time.monotonic()
    await stage.start_guests()
    sizes = ", ".join(f"{name} with {format_size(memory)}" for name, memory in GUESTS.items())
    teller.tell(f"three QEMUs run, emulated: {sizes}; monitors {stage.directory}/NAME.qmp")
    async with _patience("the guests boot"):
        for guest in stage.guests.values():
            await guest.booted(timeout_s=_BOOT_S)
        await stage.guests["web"].command(f"hold {_ONCE_HELD}")
        for name, guest in stage.guests.items():
            await guest.command(f"hold {_HOLD[name]}")
    held = ", ".join(f"{name} holds {hold} MiB" for name, hold in _HOLD.items())
    held = held.replace(",", f" after it had {_ONCE_HELD} MiB,", 1)
    teller.tell(f"they have booted in {time.monotonic() - booting_s:.1f} s and work: {held}")


class _Story:
    """The scenes, in their order."""

    def __init__(self, stage: Stage, onlooker: Onlooker, teller: _Teller) -> None:
        self._stage = stage
        self._onlooker = onlooker
        self._teller = teller

    async def agent_starts(self) -> None:
        self._teller.head("The agent starts, and every VM appears on MQTT")
        self._teller.tell(f"$ {shlex.join(self._stage.agent_command)}")
        began_s = time.monotonic()
        async with self._agent_watched("the agent attaches to the guests"):
            self._stage.start_agent()
            await self._seen("status", "online", began_s)
            states = [await self._settled(name, began_s) for name in GUESTS]
        self._teller.tell(f"online, with all VMs, after {time.monotonic() - began_s:.1f} s")
        for name, state in zip(GUESTS, states, strict=True):
            self._teller.tell(f"{BASE}/vm/{name + '/state':<10}  {_described(state.payload)}")

    async def balloon_moves(self) -> None:
        self._teller.head("A request over MQTT moves a balloon")
        before = await self._get("web")
        self._teller.tell(
            f'> {BASE}/vm/web/request/set-target  {{"target": "{_TARGET // MIB}MiB", "wait_s": 20}}'
        )
        asked_s = time.monotonic()
        async with self._agent_watched("web shrinks"):
            answer = await self._onlooker.request(
                "web", "set-target", target=f"{_TARGET // MIB}MiB", wait_s=20, timeout_s=_SEEN_S + 20
            )
        took_s = answer.at_s - asked_s
        result = answer["result"]
        if answer["status"] != "ok" or not isinstance(result, Mapping):
            raise LabError(f"set-target was answered with {answer.payload}")
        after = await self._get("web")
        true = await self._stage.guests["web"].truth.actual()
        self._teller.tell(
            f"< ok, reached in {took_s:.2f} s: {format_size(_number(before, 'actual'))} -> "
            f"{format_size(_number(result, 'actual'))}; a second monitor of its QEMU says {format_size(true)}"
        )
        self._teller.tell(
            f"available in the guest {format_size(_guest(before, 'available'))} -> "
            f"{format_size(_guest(after, 'available'))}; memory of its QEMU on this host "
            f"{format_size(_number(before, 'rss'))} -> {format_size(_number(after, 'rss'))}"
        )

    async def request_is_refused(self) -> None:
        self._teller.head("A request that would hurt is refused")
        self._teller.tell(f'> {BASE}/vm/web/request/set-target  {{"target": "8MiB"}}')
        answer = await self._onlooker.request("web", "set-target", target="8MiB")
        error = answer["error"]
        if answer["status"] != "error" or not isinstance(error, Mapping):
            raise LabError(f"a target of 8MiB was answered with {answer.payload}")
        self._teller.tell(f"< {error.get('code')}: {error.get('message')}")

    async def qemu_dies(self) -> None:
        self._teller.head("A QEMU is killed, and started again")
        guest = self._stage.guests["db"]
        killed_s = time.monotonic()
        await guest.kill()
        gone = await self._seen("vm/db/availability", "offline", killed_s)
        self._teller.tell(f"kill -9 of db's QEMU; offline on MQTT {_ms(gone.at_s - killed_s)} later")
        started_s = time.monotonic()
        async with self._agent_watched("db boots again"):
            await guest.start()
            back = await self._seen("vm/db/availability", "online", started_s)
            await guest.booted(timeout_s=_BOOT_S)
            state = await self._settled("db", started_s)
        self._teller.tell(
            f"started again; online on MQTT {_ms(back.at_s - started_s)} later, "
            f"booted and {state['health']} after {state.at_s - started_s:.1f} s"
        )

    async def agent_dies(self) -> None:
        self._teller.head("The agent is killed and started again: no balloon moves")
        looks = _Looks()
        looking = asyncio.create_task(looks.go_on(self._stage), name="second monitors")
        try:
            killed_s = time.monotonic()
            self._stage.kill_agent()
            gone = await self._seen("status", "offline", killed_s)
            self._teller.tell(f"kill -9 of the agent; its last will came {_ms(gone.at_s - killed_s)} later")
            started_s = time.monotonic()
            async with self._agent_watched("the agent attaches again"):
                self._stage.start_agent()
                await self._seen("status", "online", started_s)
                states = [await self._settled(name, started_s) for name in GUESTS]
        finally:
            await ended(looking)
        target = format_size(_number(states[0].payload, "target"))
        self._teller.tell(
            f"started again; online with all VMs after {time.monotonic() - started_s:.1f} s, "
            f"web's target is still {target}"
        )
        self._teller.tell(
            f"the second monitors were asked {looks.count} times meanwhile: the largest change of a balloon "
            f"was {format_size(looks.largest_change)}"
        )

    # ---- what the scenes wait for ----

    async def _seen(self, topic: str, payload: str, since_s: float) -> Seen:
        return await self._onlooker.until(
            topic,
            lambda seen: seen.payload == payload,
            since_s=since_s,
            timeout_s=_SEEN_S,
            what=payload,
        )

    async def _settled(self, name: str, since_s: float) -> Seen:
        """Return a state of the VM in which its guest's figures are there."""
        return await self._onlooker.until(
            f"vm/{name}/state",
            lambda seen: seen["health"] not in _UNDER_WAY and _guest(seen.payload, "available") is not None,
            since_s=since_s,
            timeout_s=_SEEN_S,
            what=f"the figures of {name}",
        )

    async def _get(self, name: str) -> object:
        """Return the VM object, freshly polled."""
        answer = await self._onlooker.request(name, "get")
        if answer["status"] != "ok":
            raise LabError(f"get was answered with {answer.payload}")
        return answer["result"]

    @contextlib.asynccontextmanager
    async def _agent_watched(self, text: str) -> AsyncIterator[None]:
        """Show progress; a wait that fails also tells the agent's last words."""
        try:
            async with _patience(text):
                yield
        except LabError as error:
            if self._stage.agent is None:
                raise
            raise LabError(self._stage.agent.complaint(f"did not do its part: {error}")) from error


class _Looks:
    """Looks at every balloon through the second monitors, again and again."""

    def __init__(self) -> None:
        self.count = 0
        self.largest_change = 0

    async def go_on(self, stage: Stage) -> None:
        """Look until cancelled."""
        first: dict[str, int] = {}
        while True:
            for name, guest in stage.guests.items():
                actual = await guest.truth.actual()
                self.count += 1
                self.largest_change = max(self.largest_change, abs(actual - first.setdefault(name, actual)))
            await asyncio.sleep(_LOOK_S)


def _tell_how(stage: Stage, teller: _Teller) -> None:
    at = f"-h {HOST} -p {stage.broker.port}"
    topic = f"{BASE}/vm/web"
    for line in (
        f"mosquitto_sub {at} -v -t '{BASE}/#'",
        f"mosquitto_pub {at} -t {topic}/target/set -m 200MiB",
        f'mosquitto_pub {at} -t {topic}/request/set-target -m \'{{"target": "70%", "wait_s": 10}}\'',
        f"mosquitto_pub {at} -t {topic}/request/get -m '{{\"transaction\": 1}}'",
    ):
        teller.tell(f"$ {line}")


async def _stay(onlooker: Onlooker, teller: _Teller, stay_s: float) -> None:
    teller.head(f"Here for {stay_s:g} s more; Ctrl-C ends it. What changes:")
    told = {topic: _change(seen) for topic, seen in onlooker.latest.items()}
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(stay_s):
            async for seen in onlooker.changes():
                change = _change(seen)
                if change and (change != told.get(seen.topic) or "/state" not in seen.topic):
                    told[seen.topic] = change
                    teller.tell(f"{seen.topic.removeprefix(BASE + '/')}  {change}")


def _change(seen: Seen) -> str | None:
    """Return what a message says in a line, but for what changes all the time; None: not worth a line."""
    match seen.topic.removeprefix(f"{BASE}/").split("/"):
        case ["vm", _, "state"]:
            actual, size = (
                format_size(_number(seen.payload, "actual")),
                format_size(_number(seen.payload, "size")),
            )
            target = format_size(_number(seen.payload, "target"))
            return f"{seen['health']}, actual {actual} of {size}, target {target}, mode {seen['mode']}"
        case ["vm", _, "event"] | ["event"]:
            details = seen["data"] if isinstance(seen["data"], Mapping) else {}
            return " ".join((str(seen["event"]), *terminal.phrases(details)))
        case ["vm", _, "response", _] | ["response", _]:
            error = seen["error"]
            return (
                f"error {error.get('code')}: {error.get('message')}" if isinstance(error, Mapping) else "ok"
            )
        case ["vm", _, "availability"] | ["status"]:
            return str(seen.payload)
        case _:
            return None


def _described(state: object) -> str:
    """Return a VM object as a line."""
    health = state.get("health") if isinstance(state, Mapping) else None
    return (
        f"{health}, {format_size(_number(state, 'actual'))} of {format_size(_number(state, 'size'))}, "
        f"{format_size(_guest(state, 'available'))} available, RSS {format_size(_number(state, 'rss'))}"
    )


def _number(values: object, key: str) -> int | None:
    value = values.get(key) if isinstance(values, Mapping) else None
    return value if isinstance(value, int) else None


def _guest(state: object, key: str) -> int | None:
    return _number(state.get("guest"), key) if isinstance(state, Mapping) else None


def _ms(duration_s: float) -> str:
    return f"{duration_s * 1000:.0f} ms"
