"""The steps of the demo, and what each of them prints."""

from __future__ import annotations

import asyncio
import contextlib
import shlex
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Final

import aiomqtt

from qmpballoon import terminal
from qmpballoon.lab.broker import HOST
from qmpballoon.lab.demo.measurement import Outcome, compared, play, rest
from qmpballoon.lab.demo.output import Printer, showing
from qmpballoon.lab.demo.testbed import BASE, Message, Observer, Testbed, ended, observing
from qmpballoon.lab.demo.workload import BUDGET, EQUAL_PART, NAMES, PLAYED_S, SIZE
from qmpballoon.lab.image import guest_image
from qmpballoon.lab.require import LabError
from qmpballoon.lab.waiting import eventually
from qmpballoon.model.tolerance import is_reached
from qmpballoon.units import MIB, format_size

BrokerGone = aiomqtt.MqttError

_MANUAL_VM: Final = "build"  # it had much memory, and has been idle for a while
_EXAMPLE_VM: Final = "test"  # always idle
_TARGET: Final = 100 * MIB
_IDLE_HELD: Final = 80 * MIB  # an idle guest holds less: 66 MiB, most of it in its kernel
_BOOT_S: Final = 120.0
_PUBLISHED_S: Final = 60.0  # on a busy machine
_SETTLE_S: Final = 90.0  # the same; a few seconds on an idle one
_NOT_READY: Final = ("starting", "no-driver", "no-stats", "offline")
_REST_S: Final = 5.0
_SAMPLE_EVERY_S: Final = 0.01  # between two samples of the second monitors while the agent is down


async def run_demo(stay_s: float | None, *, played_s: float = PLAYED_S) -> None:
    """Run and print the steps; stay ``stay_s`` seconds after them (None: not at all).

    The guests work for ``played_s`` under each policy.

    Raises:
        LabError: a process does not start, or did not respond in time.
        BrokerGone: the connection to the broker is lost.
    """
    printer = Printer()
    print("qmpballoon demo: real guests, a real broker and the agent; all are stopped at the end")
    async with Testbed() as testbed:
        await _start_guests(testbed, printer)
        async with observing(testbed.broker.port) as observer:
            steps = _Steps(testbed, observer, printer)
            await steps.start_agent()
            moved = await steps.measure_fairshare(played_s)
            fixed = await steps.measure_fixed(played_s)
            printer.heading("The difference")
            printer.line(compared(moved, fixed))
            await steps.set_target()
            await steps.refuse_target()
            await steps.kill_agent()
            await steps.kill_qemu()
            again = "" if stay_s else ": qmpballoon demo --for 300 keeps running and prints its own port"
            printer.heading(f"Try it yourself, in another terminal{again}")
            _print_commands(testbed, printer)
            if stay_s is not None:
                await steps.keep_running(stay_s)
    printer.heading("Done: guests, broker and agent are stopped and their files are removed.")


def _progress(text: str) -> contextlib.AbstractAsyncContextManager[None]:
    async def line(elapsed_s: float) -> str:
        return f"{elapsed_s:6.0f} s  {text} ..."

    return terminal.progress(line)


async def _start_guests(testbed: Testbed, printer: Printer) -> None:
    printer.heading(
        f"{len(NAMES)} guests, and memory for {round(BUDGET / SIZE / len(NAMES) * 100)} % of their sizes"
    )
    await testbed.start_broker()
    printer.line(f"mosquitto listens on {HOST}:{testbed.broker.port}")
    async with _progress("preparing the guest image"):
        await asyncio.to_thread(guest_image, printer.line)
    booting_s = time.monotonic()
    await testbed.start_guests()
    printer.line(
        f"{len(NAMES)} QEMUs run, emulated: {', '.join(NAMES)}, {format_size(SIZE)} each; "
        f"monitors {testbed.directory}/NAME.qmp"
    )
    async with _progress("the guests boot"):
        for guest in testbed.guests.values():
            await guest.booted(timeout_s=_BOOT_S)
        await rest(testbed)
    printer.line(f"booted in {time.monotonic() - booting_s:.1f} s")


class _Steps:
    """The steps, in their order."""

    def __init__(self, testbed: Testbed, observer: Observer, printer: Printer) -> None:
        self._testbed = testbed
        self._observer = observer
        self._printer = printer

    async def start_agent(self) -> None:
        self._printer.heading("The agent starts; every VM appears on MQTT, and idle memory is taken back")
        self._printer.line(f"$ {shlex.join(self._testbed.agent_command)}")
        self._printer.line(
            f"its budget is {BUDGET // MIB} MiB for guests of {SIZE * len(NAMES) // MIB} MiB; "
            "policy fairshare, mode auto"
        )
        began_s = time.monotonic()
        async with self._agent_watched("the agent attaches to the guests"):
            self._testbed.start_agent()
            await self._until_published("status", "online", began_s)
            states = [await self._until_figures(name, began_s) for name in NAMES]
        self._printer.line(f"online, with all VMs, after {time.monotonic() - began_s:.1f} s; one of them:")
        self._printer.line(f"{BASE}/vm/{NAMES[0]}/state  {_described(states[0].payload)}")
        async with self._agent_watched("the guests give what they do not use"):
            total = await self._until_actuals(
                lambda actuals: sum(actuals) <= BUDGET * 1.005, what="all within the budget"
            )
        self._printer.line(
            f"within the budget after {time.monotonic() - began_s:.1f} s: "
            f"second monitors read {format_size(sum(total))} in all"
        )

    async def measure_fairshare(self, played_s: float) -> Outcome:
        """Run the minute with the agent moving memory by itself."""
        self._printer.heading(f"{played_s:.0f} s of changing needs: the agent moves memory by itself")
        return await self._play("policy fairshare: memory goes where it is needed", played_s)

    async def measure_fixed(self, played_s: float) -> Outcome:
        """Run the same minute with an equal part for each guest."""
        self._printer.heading("The same again under a static split: an equal part for each")
        await self._until_idle()
        self._printer.line(f'> {BASE}/request/set-policy  {{"name": "fixed", "mode": "auto"}}')
        await self._set_policy("fixed", "auto")
        async with self._agent_watched("the budget is split"):
            await self._until_actuals(
                lambda actuals: all(is_reached(actual, EQUAL_PART, SIZE) for actual in actuals),
                what=f"{EQUAL_PART // MIB} MiB for each",
            )
        self._printer.line(f"second monitors read {format_size(EQUAL_PART)} for each guest")
        return await self._play("policy fixed: an equal part for each", played_s)

    async def _play(self, title: str, played_s: float) -> Outcome:
        hint = (
            f"the guests' needs change; {len(NAMES)} x {SIZE // MIB} MiB on {BUDGET // MIB} MiB; Ctrl-C ends"
        )
        with showing(title, played_s, self._observer, self._printer, hint) as display:
            outcome = await play(self._testbed, self._observer, display, seconds=played_s)
        self._printer.line(outcome.sentence())
        return outcome

    async def _set_policy(self, name: str, mode: str) -> None:
        answer = await self._observer.request(None, "set-policy", name=name, mode=mode)
        if answer["status"] != "ok":
            raise LabError(f"set-policy was answered with {answer.payload}")

    async def _until_actuals(self, condition: Callable[[list[int]], bool], *, what: str) -> list[int]:
        async def actuals() -> list[int]:
            return [await guest.monitor.actual() for guest in self._testbed.guests.values()]

        return await eventually(actuals, condition, timeout_s=_SETTLE_S, what=what, interval_s=0.1)

    async def keep_running(self, stay_s: float) -> None:
        """Let the guests work and the agent move memory while the user tries commands."""
        self._printer.heading(f"Running for {stay_s:g} s more with policy fairshare; Ctrl-C ends it")
        await self._set_policy("fairshare", "auto")
        await self._observer.request(_MANUAL_VM, "set-mode", mode="auto")
        hint = f"mosquitto_sub -h {HOST} -p {self._testbed.broker.port} -v -t '{BASE}/#'; Ctrl-C ends"
        with showing("policy fairshare", stay_s, self._observer, self._printer, hint) as display:
            await play(self._testbed, self._observer, display, seconds=stay_s)

    async def set_target(self) -> None:
        self._printer.heading("Manual control: a request over MQTT moves a balloon")
        self._printer.line(f'> {BASE}/request/set-policy  {{"name": "fairshare", "mode": "manual"}}')
        await self._set_policy("fairshare", "manual")
        await self._until_idle()
        before = await self._get(_MANUAL_VM)
        self._printer.line(
            f'> {BASE}/vm/{_MANUAL_VM}/request/set-target  {{"target": "{_TARGET // MIB}MiB", "wait_s": 20}}'
        )
        asked_s = time.monotonic()
        async with self._agent_watched(f"{_MANUAL_VM} shrinks"):
            answer = await self._observer.request(
                _MANUAL_VM,
                "set-target",
                target=f"{_TARGET // MIB}MiB",
                wait_s=20,
                timeout_s=_PUBLISHED_S + 20,
            )
        took_s = answer.at_s - asked_s
        result = answer["result"]
        if answer["status"] != "ok" or not isinstance(result, Mapping):
            raise LabError(f"set-target was answered with {answer.payload}")
        after = await self._get(_MANUAL_VM)
        measured = await self._testbed.guests[_MANUAL_VM].monitor.until_actual(
            _TARGET.__eq__, timeout_s=_PUBLISHED_S, what="the target"
        )
        self._printer.line(
            f"< ok, reached in {took_s:.2f} s: {format_size(_number(before, 'actual'))} -> "
            f"{format_size(_number(result, 'actual'))}; its second monitor reads {format_size(measured)}"
        )
        self._printer.line(
            f"available in the guest {format_size(_guest(before, 'available'))} -> "
            f"{format_size(_guest(after, 'available'))}; memory of its QEMU on this host "
            f"{format_size(_number(before, 'rss'))} -> {format_size(_number(after, 'rss'))}"
        )

    async def refuse_target(self) -> None:
        self._printer.heading("A request that would harm the guest is refused")
        self._printer.line(f'> {BASE}/vm/{_MANUAL_VM}/request/set-target  {{"target": "8MiB"}}')
        answer = await self._observer.request(_MANUAL_VM, "set-target", target="8MiB")
        error = answer["error"]
        if answer["status"] != "error" or not isinstance(error, Mapping):
            raise LabError(f"a target of 8MiB was answered with {answer.payload}")
        self._printer.line(f"< {error.get('code')}: {error.get('message')}")

    async def kill_qemu(self) -> None:
        self._printer.heading("A QEMU is killed, and started again")
        guest = self._testbed.guests["db"]
        killed_s = time.monotonic()
        await guest.kill()
        offline = await self._until_published("vm/db/availability", "offline", killed_s)
        self._printer.line(f"kill -9 of db's QEMU; offline on MQTT {_ms(offline.at_s - killed_s)} later")
        started_s = time.monotonic()
        async with self._agent_watched("db boots again"):
            await guest.start()
            online = await self._until_published("vm/db/availability", "online", started_s)
            await guest.booted(timeout_s=_BOOT_S)
            state = await self._until_figures("db", started_s)
        self._printer.line(
            f"started again; online on MQTT {_ms(online.at_s - started_s)} later, "
            f"booted and {state['health']} after {state.at_s - started_s:.1f} s"
        )

    async def kill_agent(self) -> None:
        self._printer.heading("The agent is killed and started again, in mode auto: no balloon moves")
        self._printer.line(f'> {BASE}/request/set-policy  {{"name": "fairshare", "mode": "auto"}}')
        await self._set_policy("fairshare", "auto")
        async with self._agent_watched("the balloons come to rest"):
            await self._until_at_rest()
        sampler = _BalloonSampler()
        sampling = asyncio.create_task(sampler.run(self._testbed), name="second monitors")
        try:
            killed_s = time.monotonic()
            self._testbed.kill_agent()
            offline = await self._until_published("status", "offline", killed_s)
            self._printer.line(
                f"kill -9 of the agent; its last will came {_ms(offline.at_s - killed_s)} later"
            )
            started_s = time.monotonic()
            async with self._agent_watched("the agent attaches again"):
                self._testbed.start_agent()
                await self._until_published("status", "online", started_s)
                states = [await self._until_figures(name, started_s) for name in NAMES]
        finally:
            await ended(sampling)
        target = format_size(_number(states[NAMES.index(_MANUAL_VM)].payload, "target"))
        self._printer.line(
            f"started again; online with all VMs after {time.monotonic() - started_s:.1f} s, "
            f"{_MANUAL_VM}'s target is still {target}"
        )
        self._printer.line(
            f"second monitors were read {sampler.count} times; the largest change of a balloon was "
            f"{format_size(sampler.largest_change)}"
        )

    # ---- conditions that the steps wait for ----

    async def _until_published(self, topic: str, payload: str, since_s: float) -> Message:
        return await self._observer.until(
            topic,
            lambda message: message.payload == payload,
            since_s=since_s,
            timeout_s=_PUBLISHED_S,
            what=payload,
        )

    async def _until_figures(self, name: str, since_s: float) -> Message:
        """Wait for a state of the VM that has its guest's figures, and return it."""
        return await self._observer.until(
            f"vm/{name}/state",
            lambda message: (
                message["health"] not in _NOT_READY and _guest(message.payload, "available") is not None
            ),
            since_s=since_s,
            timeout_s=_PUBLISHED_S,
            what=f"the figures of {name}",
        )

    async def _until_idle(self) -> None:
        """Let all guests release their memory, and wait until the agent has published it."""
        await rest(self._testbed)
        for name in NAMES:
            await self._observer.until(
                f"vm/{name}/state",
                lambda message: _held(message.payload) < _IDLE_HELD,
                timeout_s=_PUBLISHED_S,
                what=f"{name} is idle",
            )

    async def _until_at_rest(self) -> None:
        """Wait until no balloon has moved for some seconds."""
        last: list[int] = []
        since_s = time.monotonic()

        def is_at_rest(actuals: list[int]) -> bool:
            nonlocal last, since_s
            if actuals != last:
                last, since_s = actuals, time.monotonic()
            return time.monotonic() - since_s > _REST_S

        await self._until_actuals(is_at_rest, what=f"no balloon moves for {_REST_S:g} s")

    async def _get(self, name: str) -> object:
        """Return the VM object, freshly polled."""
        answer = await self._observer.request(name, "get")
        if answer["status"] != "ok":
            raise LabError(f"get was answered with {answer.payload}")
        return answer["result"]

    @contextlib.asynccontextmanager
    async def _agent_watched(self, text: str) -> AsyncIterator[None]:
        """Show progress; the error of a failed wait contains the agent's last log lines."""
        try:
            async with _progress(text):
                yield
        except LabError as error:
            if self._testbed.agent is None:
                raise
            raise LabError(self._testbed.agent.failure(f"did not respond as expected: {error}")) from error


class _BalloonSampler:
    """Samples every balloon through the second monitors repeatedly."""

    def __init__(self) -> None:
        self.count = 0
        self.largest_change = 0

    async def run(self, testbed: Testbed) -> None:
        """Sample until cancelled."""
        first: dict[str, int] = {}
        while True:
            for name, guest in testbed.guests.items():
                actual = await guest.monitor.actual()
                self.count += 1
                self.largest_change = max(self.largest_change, abs(actual - first.setdefault(name, actual)))
            await asyncio.sleep(_SAMPLE_EVERY_S)


def _print_commands(testbed: Testbed, printer: Printer) -> None:
    at = f"-h {HOST} -p {testbed.broker.port}"
    topic = f"{BASE}/vm/{_EXAMPLE_VM}"
    for line in (
        f"mosquitto_sub {at} -v -t '{BASE}/#'",
        f"mosquitto_pub {at} -t {topic}/target/set -m 160MiB",
        f'mosquitto_pub {at} -t {topic}/request/set-target -m \'{{"target": "70%", "wait_s": 10}}\'',
        f"mosquitto_pub {at} -t {topic}/request/get -m '{{\"transaction\": 1}}'",
    ):
        printer.line(f"$ {line}")


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
