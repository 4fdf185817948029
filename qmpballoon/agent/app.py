"""The composition root: builds the agent's parts, runs them in one TaskGroup, and ends them in order.

::

    Supervisor, ManagedVm ──► Feed ──► Publisher ──► Bridge ──► broker
        ▲                                              │
    Actuator ◄── Governor, Service ◄───────────────────┘
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from qmpballoon import __version__, descriptors
from qmpballoon.agent import systemd
from qmpballoon.agent.actuator import Actuator
from qmpballoon.agent.companion import until_qemu_ended
from qmpballoon.agent.context import Context
from qmpballoon.agent.control import ControlSocket
from qmpballoon.agent.ending import until_ended
from qmpballoon.agent.governor import Governor
from qmpballoon.agent.registry import Registry
from qmpballoon.agent.service import Service
from qmpballoon.agent.stop import Stop
from qmpballoon.agent.store import Store
from qmpballoon.agent.supervisor import Supervisor
from qmpballoon.agent.usable import check_usable
from qmpballoon.agent.vm import ManagedVm
from qmpballoon.config import Configuration, MqttFiles, reloaded, restart_needed
from qmpballoon.errors import ConnectionLost, NoBalloon, QmpBalloonError, QmpError, RequestRefused
from qmpballoon.log import log_event, log_withheld
from qmpballoon.metrics.tally import Tally
from qmpballoon.model.names import VmId, safe_name
from qmpballoon.protocol.objects import Agent as Publishes

if TYPE_CHECKING:
    from qmpballoon.mqtt.bridge import Bridge, BridgeSettings

PART_ENDS_WITHIN_S: Final = 4.0  # MQTT needs 3 s for a broker that hangs; less than STOP_WITHIN_S in all
RELEASE_WITHIN_S: Final = 4.0
DISK_WITHIN_S: Final = 1.0

Reload = Callable[[], Configuration]


async def run(
    configuration: Configuration, *, reload: Reload | None = None, ends_with_qemu: bool = False
) -> int:
    """Run the agent until SIGTERM or SIGINT; return its exit code: 0, or 130 if it was interrupted.

    ``ends_with_qemu``: it serves one socket, and ends with 0 when the QEMU there has ended.
    ``reload`` re-reads the configuration on SIGHUP; a bad one is refused and the old one stays.

    Raises:
        AnotherAgentRuns: an agent of this host name runs already.
        StateUnusable: the state directory cannot be used.
        ConfigurationError: this machine cannot run it.
    """
    files = check_usable(configuration)
    descriptors.keep_reserve()
    store = Store(configuration.agent.state_dir, safe_name(configuration.agent.host))
    try:
        return await Agent(configuration, store, files, reload, ends_with_qemu).run()
    finally:
        await store.close()


class Agent:
    """All parts of a running agent."""

    def __init__(
        self,
        configuration: Configuration,
        store: Store,
        files: MqttFiles,
        reload: Reload | None,
        ends_with_qemu: bool,
    ) -> None:
        self._context = context = Context(configuration, store)
        self._mqtt_files = files
        self._reload_from = reload
        self._ends_with_qemu = ends_with_qemu
        self._host = safe_name(configuration.agent.host)
        self._mqtt_renewed = asyncio.Event()
        self._instance = secrets.token_hex(4)
        self._tally = Tally(context.clock)
        if configuration.http.listen is not None:
            context.feed.add(self._tally)
        self._bridge: Bridge | None = None  # None: MQTT is off
        self._registry = registry = Registry(context)
        self._supervisor = Supervisor(context, registry)
        self._actuator = actuator = Actuator(context.feed)
        self._governor = Governor(context, registry, self._supervisor, actuator)
        self._service = Service(
            context, registry, self._governor, actuator, host=self._host, reload=self._reload_for_request
        )

    @property
    def configuration(self) -> Configuration:
        """The configuration in force."""
        return self._context.configuration

    async def run(self) -> int:
        """Run until SIGTERM or SIGINT; return the exit code."""
        stop = Stop()
        self._supervisor.remember()
        with stop.on_signals(self._reload_for_signal):
            log_event(
                "agent-started",
                host=self._host,
                version=__version__,
                mode=self.configuration.policy.mode,
                policy=self.configuration.policy.name,
                sockets=",".join(self.configuration.discovery.sockets),
            )
            async with asyncio.TaskGroup() as parts:
                tasks = {
                    name: parts.create_task(part, name=name)
                    for name, part in {
                        "store": self._context.store.run(),
                        "supervisor": self._supervisor.run(),
                        "governor": self._governor.run(),
                        "mqtt": self._mqtt(),
                        "control": self._control(),
                        "http": self._http(),
                        "watchdog": systemd.feed_watchdog(),
                        "companion": self._companion(stop),
                    }.items()
                }
                systemd.notify("READY=1", f"STATUS={self._host}: watching")
                await stop.asked_for.wait()
                log_event("agent-stopping", host=self._host)
                systemd.notify("STOPPING=1")
                # Answer pending requests and publish offline first, then stop deciding.
                for name in ("mqtt", "control", "governor"):
                    tasks[name].cancel()
                    await asyncio.wait((tasks[name],), timeout=PART_ENDS_WITHIN_S)
                if self.configuration.agent.on_exit == "release":
                    await self._release()
                self._registry.retire()
                for task in tasks.values():
                    task.cancel()
        log_withheld(now=True)
        log_event("agent-stopped", host=self._host)
        return stop.exit_code

    async def _companion(self, stop: Stop) -> None:
        """Ask for a stop when the one QEMU that this agent serves has ended."""
        if self._ends_with_qemu:
            await until_qemu_ended(self._registry)
            stop.ask()

    async def _release(self) -> None:
        """Grow the automatic VMs by what the host can spare."""
        sends = {
            asyncio.create_task(self._give_back(vm, target), name=f"release of {vm.id}"): vm
            for vm, target in self._governor.release_all().items()
        }
        if not sends:
            return
        _, late = await asyncio.wait(sends, timeout=RELEASE_WITHIN_S)
        for send in late:
            log_event("target-not-sent", "no answer in time", level=logging.WARNING, vm=sends[send].id)
            send.cancel()
        await until_ended(*sends)
        for send in sends.keys() - late:
            send.result()

    async def _give_back(self, vm: ManagedVm, target: int) -> None:
        try:
            await self._actuator.send(vm, target, why="on-exit")
        except (ConnectionLost, NoBalloon, QmpError) as error:
            log_event("target-not-sent", str(error), level=logging.WARNING, vm=vm.id)

    async def _control(self) -> None:
        """Serve the local control socket, if there is one."""
        path = self.configuration.control_path
        if not path:
            await asyncio.Event().wait()
        await ControlSocket(
            path,
            self._service.handle,
            self._context.feed,
            host=self._host,
            vm_exists=lambda vm: self._registry.get(VmId(vm)) is not None,
            statuses=lambda: (vm.status for vm in self._registry),
            unidentified=lambda: (path for path, _ in self._supervisor.unidentified),
            clock=time.monotonic,
            note_answer=self._tally.note_answer,
        ).run()

    async def _http(self) -> None:
        """Serve metrics and health, if they are configured."""
        listen = self.configuration.http.listen
        if listen is None:
            await asyncio.Event().wait()
            return
        from qmpballoon.metrics.endpoint import Endpoint  # imports prometheus-client, an extra

        await Endpoint(
            listen,
            self._tally,
            statuses=lambda: (vm.status for vm in self._registry),
            broker_connected=self._broker_connected,
            clock=self._context.clock,
        ).run()

    def _broker_connected(self) -> bool | None:
        """Tell whether the broker is connected; None if none is configured."""
        if not self.configuration.mqtt.enabled:
            return None
        return self._bridge is not None and self._bridge.connected

    # ── MQTT, one listener of the feed ───────────────────────────────────────────────────────────

    async def _mqtt(self) -> None:
        """Run the MQTT side, and restart it whenever its configuration changes."""
        while True:
            self._mqtt_renewed.clear()
            renewed = asyncio.create_task(self._mqtt_renewed.wait(), name="mqtt renewed")
            side = asyncio.create_task(self._mqtt_side(), name="mqtt side")
            try:
                await asyncio.wait((renewed, side), return_when=asyncio.FIRST_COMPLETED)
            finally:
                renewed.cancel()
                side.cancel()
                await until_ended(renewed, side)
                if not side.cancelled():
                    side.result()

    async def _keep_announced(self, topics: frozenset[str]) -> None:
        self._context.store.announce(sorted(topics))
        with suppress(TimeoutError):  # state is published also where the disk hangs
            async with asyncio.timeout(DISK_WITHIN_S):
                await self._context.store.saved()

    async def _mqtt_side(self) -> None:
        configuration = self.configuration
        if not configuration.mqtt.enabled:
            await asyncio.Event().wait()
        from qmpballoon.mqtt.bridge import Bridge  # 3 MiB, which an agent without a broker does not need
        from qmpballoon.mqtt.publisher import Publisher

        bridge = self._bridge = Bridge(
            self._bridge_settings(configuration),
            self._service.handle,
            vm_exists=lambda vm: self._registry.get(VmId(vm)) is not None,
            announced_before=self._context.store.announced,
            on_announced=self._keep_announced,
            note_answer=self._tally.note_answer,
        )
        agent = Publishes(
            host=self._host,
            name=configuration.agent.host,
            version=__version__,
            instance=self._instance,
            heartbeat_s=configuration.mqtt.heartbeat_s,
        )
        publisher = Publisher(
            bridge,
            agent,
            min_interval_s=configuration.mqtt.min_interval_s,
            samples=configuration.mqtt.samples,
            home_assistant=configuration.mqtt.announces,
        )
        publisher.host_changed(self._governor.host())
        for vm in self._registry:
            publisher.vm_changed(vm.status)
        bridge.clear_leftovers()
        self._context.feed.add(publisher)
        try:
            async with asyncio.TaskGroup() as side:
                side.create_task(bridge.run(), name="mqtt bridge")
                side.create_task(publisher.run(), name="mqtt publisher")
        finally:
            self._context.feed.remove(publisher)
            self._bridge = None

    def _bridge_settings(self, configuration: Configuration) -> BridgeSettings:
        from qmpballoon.mqtt.bridge import BridgeSettings
        from qmpballoon.mqtt.connection import Broker

        mqtt = configuration.mqtt
        return BridgeSettings(
            brokers=tuple(Broker(url.scheme, url.host, url.port, url.path) for url in mqtt.url),
            client_id=configuration.client_id,
            host=configuration.agent.host,
            base_topic=mqtt.base_topic,
            protocol=mqtt.protocol,
            username=mqtt.username,
            password=self._mqtt_files.password,
            ca_file=mqtt.ca_file,
            cert_file=mqtt.cert_file,
            key_file=mqtt.key_file,
            payload=mqtt.payload,
            heartbeat_s=mqtt.heartbeat_s,
            min_interval_s=mqtt.min_interval_s,
            samples=mqtt.samples,
            response_topics=mqtt.response_topics,
            discovery_prefix=mqtt.discovery_prefix,
        )

    # ── re-reading the configuration ─────────────────────────────────────────────────────────────

    def _reload_for_signal(self) -> None:
        systemd.reloading()
        try:
            self._reload()
        except QmpBalloonError as error:
            reason = str(error).replace("\n", "; ")  # a configuration may have more than one problem
            log_event("reload-refused", f"the old one stays: {reason}", level=logging.ERROR)
        finally:
            systemd.notify("READY=1")

    def _reload_for_request(self) -> Mapping[str, object]:
        return {"reloaded": True, "restart_needed": list(self._reload())}

    def _reload(self) -> tuple[str, ...]:
        if self._reload_from is None:
            raise RequestRefused("not-allowed", "this agent was started without a configuration to re-read")
        before, new = self.configuration, self._reload_from()
        files = check_usable(new)
        later = restart_needed(before, new)
        taken = reloaded(before, new)
        self._context.configuration = taken
        self._supervisor.reconfigure()
        self._governor.renew()
        if taken.mqtt != before.mqtt or files != self._mqtt_files:
            self._mqtt_files = files
            self._mqtt_renewed.set()
        log_event("reloaded", restart_needed=",".join(later) or None)
        return later
