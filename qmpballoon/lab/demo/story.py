"""The scenes of the demo, and what each of them prints."""

from __future__ import annotations

import asyncio
import contextlib
import shlex
import signal
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Final

import aiomqtt

from qmpballoon import terminal
from qmpballoon.lab.broker import HOST
from qmpballoon.lab.demo.minute import Outcome, compared, play, rest
from qmpballoon.lab.demo.show import Teller, showing
from qmpballoon.lab.demo.stage import BASE, Onlooker, Seen, Stage, ended, looking_on
from qmpballoon.lab.demo.workload import BUDGET, EQUAL_PART, NAMES, PLAYED_S, SIZE
from qmpballoon.lab.image import guest_image
from qmpballoon.lab.require import LabError
from qmpballoon.lab.waiting import eventually
from qmpballoon.model.tolerance import is_reached
from qmpballoon.units import MIB, format_size

BrokerGone = aiomqtt.MqttError

_BY_HAND: Final = "build"  # it had much memory, and has been idle for a while
_TO_PLAY_WITH: Final = "test"  # always idle
_TARGET: Final = 100 * MIB
_AT_EASE: Final = 80 * MIB  # an idle guest holds less: 66 MiB, most of it in its kernel
_BOOT_S: Final = 120.0
_SEEN_S: Final = 60.0  # on a busy machine
_SETTLE_S: Final = 90.0  # the same; a few seconds on an idle one
_UNDER_WAY: Final = ("starting", "no-driver", "no-stats", "offline")
_LOOK_S: Final = 0.01  # between two samples of the second monitors while the agent is down


async def tell_story(stay_s: float | None, *, played_s: float = PLAYED_S) -> None:
    """Run and print the scenes; stay ``stay_s`` seconds after them (None: not at all).

    The guests work for ``played_s`` under each policy. SIGTERM cancels it.

    Raises:
        LabError: a process does not start, or did not respond in time.
        BrokerGone: the connection to the broker broke.
    """
    demo = asyncio.current_task()
    assert demo is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, demo.cancel)
    teller = Teller()
    print("qmpballoon demo: real guests, a real broker and the agent, here; all of it ends with the demo")
    async with Stage() as stage:
        await _raise_curtain(stage, teller)
        async with looking_on(stage.broker.port) as onlooker:
            story = _Story(stage, onlooker, teller)
            await story.agent_starts()
            moved = await story.memory_moves(played_s)
            fixed = await story.memory_stays(played_s)
            teller.head("The difference")
            teller.tell(compared(moved, fixed))
            await story.balloon_moves()
            await story.request_is_refused()
            await story.agent_dies()
            await story.qemu_dies()
            again = "" if stay_s else ": qmpballoon demo --for 300 stays and tells its own port"
            teller.head(f"Try it yourself, in another terminal{again}")
            _tell_how(stage, teller)
            if stay_s is not None:
                await story.goes_on(stay_s)
    teller.head("The end: guests, broker and agent are stopped, their files removed.")


def _patience(text: str) -> contextlib.AbstractAsyncContextManager[None]:
    async def line(elapsed_s: float) -> str:
        return f"{elapsed_s:6.0f} s  {text} ..."

    return terminal.progress(line)


async def _raise_curtain(stage: Stage, teller: Teller) -> None:
    teller.head(
        f"{len(NAMES)} guests, and memory for {round(BUDGET / SIZE / len(NAMES) * 100)} % of their sizes"
    )
    await stage.start_broker()
    teller.tell(f"mosquitto listens on {HOST}:{stage.broker.port}")
    async with _patience("preparing the guest image"):
        await asyncio.to_thread(guest_image, teller.tell)
    booting_s = time.monotonic()
    await stage.start_guests()
    teller.tell(
        f"{len(NAMES)} QEMUs run, emulated: {', '.join(NAMES)}, {format_size(SIZE)} each; "
        f"monitors {stage.directory}/NAME.qmp"
    )
    async with _patience("the guests boot"):
        for guest in stage.guests.values():
            await guest.booted(timeout_s=_BOOT_S)
        await rest(stage)
    teller.tell(f"they have booted in {time.monotonic() - booting_s:.1f} s")


class _Story:
    """The scenes, in their order."""

    def __init__(self, stage: Stage, onlooker: Onlooker, teller: Teller) -> None:
        self._stage = stage
        self._onlooker = onlooker
        self._teller = teller

    async def agent_starts(self) -> None:
        self._teller.head("The agent starts; every VM appears on MQTT, and idle memory is taken back")
        self._teller.tell(f"$ {shlex.join(self._stage.agent_command)}")
        self._teller.tell(
            f"in it: the budget, {BUDGET // MIB} MiB for guests of {SIZE * len(NAMES) // MIB} MiB; "
            "policy fairshare, mode auto"
        )
        began_s = time.monotonic()
        async with self._agent_watched("the agent attaches to the guests"):
            self._stage.start_agent()
            await self._seen("status", "online", began_s)
            states = [await self._settled(name, began_s) for name in NAMES]
        self._teller.tell(f"online, with all VMs, after {time.monotonic() - began_s:.1f} s; one of them:")
        self._teller.tell(f"{BASE}/vm/{NAMES[0]}/state  {_described(states[0].payload)}")
        async with self._agent_watched("the guests give what they do not use"):
            total = await self._until_actuals(
                lambda actuals: sum(actuals) <= BUDGET * 1.005, what="all within the budget"
            )
        self._teller.tell(
            f"within the budget after {time.monotonic() - began_s:.1f} s: "
            f"second monitors say {format_size(sum(total))} in all"
        )

    async def memory_moves(self, played_s: float) -> Outcome:
        """Run the minute with the agent moving memory by itself."""
        self._teller.head(f"{played_s:.0f} s of changing needs: the agent moves memory by itself")
        return await self._play("policy fairshare: memory goes where it is needed", played_s)

    async def memory_stays(self, played_s: float) -> Outcome:
        """Run the same minute with an equal part for each guest."""
        self._teller.head("The same again under a static split: an equal part for each")
        await self._at_ease()
        self._teller.tell(f'> {BASE}/request/set-policy  {{"name": "fixed", "mode": "auto"}}')
        await self._rule("fixed", "auto")
        async with self._agent_watched("the budget is split"):
            await self._until_actuals(
                lambda actuals: all(is_reached(actual, EQUAL_PART, SIZE) for actual in actuals),
                what=f"{EQUAL_PART // MIB} MiB for each",
            )
        self._teller.tell(f"second monitors say {format_size(EQUAL_PART)} for each of them")
        return await self._play("policy fixed: an equal part for each", played_s)

    async def _play(self, title: str, played_s: float) -> Outcome:
        hint = (
            f"the guests' needs change; {len(NAMES)} x {SIZE // MIB} MiB on {BUDGET // MIB} MiB; Ctrl-C ends"
        )
        with showing(title, played_s, self._onlooker, self._teller, hint) as show:
            outcome = await play(self._stage, self._onlooker, show, seconds=played_s)
        self._teller.tell(outcome.told())
        return outcome

    async def _rule(self, name: str, mode: str) -> None:
        answer = await self._onlooker.request(None, "set-policy", name=name, mode=mode)
        if answer["status"] != "ok":
            raise LabError(f"set-policy was answered with {answer.payload}")

    async def _until_actuals(self, condition: Callable[[list[int]], bool], *, what: str) -> list[int]:
        async def actuals() -> list[int]:
            return [await guest.monitor.actual() for guest in self._stage.guests.values()]

        return await eventually(actuals, condition, timeout_s=_SETTLE_S, what=what, interval_s=0.1)

    async def goes_on(self, stay_s: float) -> None:
        """Let the guests work and the agent move memory while the user tries commands."""
        self._teller.head(f"Here for {stay_s:g} s more, the agent moving memory again; Ctrl-C ends it")
        await self._rule("fairshare", "auto")
        await self._onlooker.request(_BY_HAND, "set-mode", mode="auto")
        hint = f"mosquitto_sub -h {HOST} -p {self._stage.broker.port} -v -t '{BASE}/#'; Ctrl-C ends"
        with showing("policy fairshare, to play with", stay_s, self._onlooker, self._teller, hint) as show:
            await play(self._stage, self._onlooker, show, seconds=stay_s)

    async def balloon_moves(self) -> None:
        self._teller.head("By hand: a request over MQTT moves a balloon")
        self._teller.tell(f'> {BASE}/request/set-policy  {{"name": "fairshare", "mode": "manual"}}')
        await self._rule("fairshare", "manual")
        await self._at_ease()
        before = await self._get(_BY_HAND)
        self._teller.tell(
            f'> {BASE}/vm/{_BY_HAND}/request/set-target  {{"target": "{_TARGET // MIB}MiB", "wait_s": 20}}'
        )
        asked_s = time.monotonic()
        async with self._agent_watched(f"{_BY_HAND} shrinks"):
            answer = await self._onlooker.request(
                _BY_HAND, "set-target", target=f"{_TARGET // MIB}MiB", wait_s=20, timeout_s=_SEEN_S + 20
            )
        took_s = answer.at_s - asked_s
        result = answer["result"]
        if answer["status"] != "ok" or not isinstance(result, Mapping):
            raise LabError(f"set-target was answered with {answer.payload}")
        after = await self._get(_BY_HAND)
        true = await self._stage.guests[_BY_HAND].monitor.until_actual(
            _TARGET.__eq__, timeout_s=_SEEN_S, what="the last of it"
        )
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
        self._teller.head("A request that would harm the guest is refused")
        self._teller.tell(f'> {BASE}/vm/{_BY_HAND}/request/set-target  {{"target": "8MiB"}}')
        answer = await self._onlooker.request(_BY_HAND, "set-target", target="8MiB")
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
                states = [await self._settled(name, started_s) for name in NAMES]
        finally:
            await ended(looking)
        target = format_size(_number(states[NAMES.index(_BY_HAND)].payload, "target"))
        self._teller.tell(
            f"started again; online with all VMs after {time.monotonic() - started_s:.1f} s, "
            f"{_BY_HAND}'s target is still {target}"
        )
        self._teller.tell(
            f"the second monitors were asked {looks.count} times meanwhile: the largest change of a balloon "
            f"was {format_size(looks.largest_change)}"
        )

    # ---- conditions that the scenes wait for ----

    async def _seen(self, topic: str, payload: str, since_s: float) -> Seen:
        return await self._onlooker.until(
            topic,
            lambda seen: seen.payload == payload,
            since_s=since_s,
            timeout_s=_SEEN_S,
            what=payload,
        )

    async def _settled(self, name: str, since_s: float) -> Seen:
        """Return a state of the VM that has its guest's figures."""
        return await self._onlooker.until(
            f"vm/{name}/state",
            lambda seen: seen["health"] not in _UNDER_WAY and _guest(seen.payload, "available") is not None,
            since_s=since_s,
            timeout_s=_SEEN_S,
            what=f"the figures of {name}",
        )

    async def _at_ease(self) -> None:
        """Let all guests release their memory, and wait until the agent has seen it."""
        await rest(self._stage)
        for name in NAMES:
            await self._onlooker.until(
                f"vm/{name}/state",
                lambda seen: _held(seen.payload) < _AT_EASE,
                timeout_s=_SEEN_S,
                what=f"{name} is calm",
            )

    async def _get(self, name: str) -> object:
        """Return the VM object, freshly polled."""
        answer = await self._onlooker.request(name, "get")
        if answer["status"] != "ok":
            raise LabError(f"get was answered with {answer.payload}")
        return answer["result"]

    @contextlib.asynccontextmanager
    async def _agent_watched(self, text: str) -> AsyncIterator[None]:
        """Show progress; the error of a failed wait contains the agent's last log lines."""
        try:
            async with _patience(text):
                yield
        except LabError as error:
            if self._stage.agent is None:
                raise
            raise LabError(self._stage.agent.complaint(f"did not do its part: {error}")) from error


class _Looks:
    """Samples every balloon through the second monitors repeatedly."""

    def __init__(self) -> None:
        self.count = 0
        self.largest_change = 0

    async def go_on(self, stage: Stage) -> None:
        """Look until cancelled."""
        first: dict[str, int] = {}
        while True:
            for name, guest in stage.guests.items():
                actual = await guest.monitor.actual()
                self.count += 1
                self.largest_change = max(self.largest_change, abs(actual - first.setdefault(name, actual)))
            await asyncio.sleep(_LOOK_S)


def _tell_how(stage: Stage, teller: Teller) -> None:
    at = f"-h {HOST} -p {stage.broker.port}"
    topic = f"{BASE}/vm/{_TO_PLAY_WITH}"
    for line in (
        f"mosquitto_sub {at} -v -t '{BASE}/#'",
        f"mosquitto_pub {at} -t {topic}/target/set -m 160MiB",
        f'mosquitto_pub {at} -t {topic}/request/set-target -m \'{{"target": "70%", "wait_s": 10}}\'',
        f"mosquitto_pub {at} -t {topic}/request/get -m '{{\"transaction\": 1}}'",
    ):
        teller.tell(f"$ {line}")


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


def _held(state: object) -> float:
    """Return what a guest cannot give without reclaim, in bytes; infinite if it is not known."""
    held = _number(state, "held")
    return float("inf") if held is None else held


def _ms(duration_s: float) -> str:
    return f"{duration_s * 1000:.0f} ms"
