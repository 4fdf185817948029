"""The QMP commands and events of one simulated QEMU, over a simulated guest. No I/O, no clock.

Replies, errors and events have the text and the order of keys that QEMU 7.2 sent, or those of the version
that it simulates (see `dialect`). The contract tests compare them with recordings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, TypeAlias

from qmpballoon.sim.guest import NOT_REPORTED, SimulatedGuest
from qmpballoon.sim.qemu.dialect import VirtioStatus, dialect_of
from qmpballoon.units import MIB

Json: TypeAlias = object  # anything that json.dumps takes
Arguments: TypeAlias = Mapping[str, object]

EVENT_INTERVAL_S: Final = 1.0  # QEMU's limit for BALLOON_CHANGE
SECOND_RESET_AFTER_S: Final = 0.04  # the firmware of a running machine resets once more
_FIRST_DIMM_ADDRESS: Final = 4 * 1024 * MIB
_NO_UUID: Final = "00000000-0000-0000-0000-000000000000"

_ACKNOWLEDGED: Final = (
    "VIRTIO_CONFIG_S_ACKNOWLEDGE: Valid virtio device found",
    "VIRTIO_CONFIG_S_DRIVER: Guest OS compatible with device",
    "VIRTIO_CONFIG_S_FEATURES_OK: Feature negotiation complete",
    "VIRTIO_CONFIG_S_DRIVER_OK: Driver setup and ready",
)
_TAKEN_TRANSPORTS: Final = (
    "VIRTIO_RING_F_EVENT_IDX: Used & avail. event fields enabled",
    "VIRTIO_F_VERSION_1: Device compliant for v1 spec (legacy)",
)
_UNKNOWN_OFFERED: Final = 1100585369600
_UNKNOWN_TAKEN: Final = 1099511627776


class CommandError(Exception):
    """QEMU's error reply to a command."""

    def __init__(self, error_class: str, description: str) -> None:
        self.error_class = error_class
        self.description = description
        super().__init__(f"{error_class}: {description}")


class Aborted(Exception):
    """QEMU ended during a command, by SIGABRT."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineSpec:
    """The options of a simulated QEMU; sizes in bytes."""

    name: str | None = None  # None: started without -name
    uuid: str = _NO_UUID
    device: str | None = "virtio-balloon-pci"  # -ccw, -device, -pci-transitional; None: no balloon
    device_id: str | None = "balloon0"  # None: it is device[1] in /machine/peripheral-anon
    dimms: tuple[int, ...] = ()  # part of the guest's size
    nvdimms: tuple[int, ...] = ()  # not part of it
    version: tuple[int, int, int] = (7, 2, 22)  # selects the dialect, too
    package: str = "simulated"
    no_reboot: bool = False
    stopped: bool = False  # -S
    shared: bool = False  # all memory
    preallocated: bool = False
    devices: tuple[tuple[str, str], ...] = ()  # further ones: id and type
    processors_stopped_as: str = "paused"  # the run state after ``stop``


class SimulatedMachine:
    """Executes QMP commands and collects events. Advance it to now before any other call."""

    def __init__(self, guest: SimulatedGuest, spec: MachineSpec | None = None) -> None:
        self.guest = guest
        self.spec = spec or MachineSpec()
        self.dialect = dialect_of(self.spec.version)
        self.run_state = "prelaunch" if self.spec.stopped else "running"
        self.migration: Mapping[str, object] = {}  # the reply to query-migrate
        self.dimms = self.spec.dimms
        self.exited = False
        self._base_memory = guest.size - sum(self.dimms)
        self._events: list[dict[str, Json]] = []
        self._seen_actual = guest.actual
        self._change_waits = False
        self._changed_at_s = 0.0
        self._quiet_until_s = 0.0
        self._second_reset_s: float | None = None
        self._commands: Mapping[str, tuple[Callable[[Arguments], Json], Mapping[str, type[object]]]] = {
            "query-version": (self._version, {}),
            "query-name": (lambda _: {"name": self.spec.name} if self.spec.name is not None else {}, {}),
            "query-uuid": (lambda _: {"UUID": self.spec.uuid}, {}),
            "query-status": (self._status, {}),
            "query-balloon": (self._query_balloon, {}),
            "balloon": (self._balloon, {"value": int}),
            "query-memory-size-summary": (self._memory_size, {}),
            "query-memory-devices": (self._memory_devices, {}),
            "query-memdev": (self._memory_backends, {}),
            "query-migrate": (lambda _: dict(self.migration), {}),
            "query-commands": (lambda _: [{"name": name} for name in self._commands], {}),
            "qom-list": (self._list, {"path": str}),
            "qom-get": (self._get, {"path": str, "property": str}),
            "qom-set": (self._set, {"path": str, "property": str, "value": object}),
            "stop": (self._stop, {}),
            "cont": (self._continue, {}),
            "system_reset": (self._reset, {}),
            "quit": (lambda _: self.shut_down("host-qmp-quit"), {}),
        }
        if self.dialect.virtio_status is not VirtioStatus.UNKNOWN:
            self._commands = {
                **self._commands,
                "x-query-virtio-status": (self._virtio_status, {"path": str}),
                "x-query-virtio-queue-status": (self._queue_status, {"path": str, "queue": int}),
            }
        if self.spec.stopped:
            guest.pause()

    @property
    def device_path(self) -> str | None:
        """The balloon's path in QEMU's object tree; None without a balloon."""
        if self.spec.device is None:
            return None
        if self.spec.device_id is None:
            return "/machine/peripheral-anon/device[1]"
        return f"/machine/peripheral/{self.spec.device_id}"

    def greeting(self) -> dict[str, Json]:
        """Return the greeting for a client that QEMU accepts."""
        return {"QMP": {"version": self._version({}), "capabilities": ["oob"]}}

    def advance(self, now_s: float) -> None:
        """Advance the guest to ``now_s`` and collect the events that are due."""
        self.guest.advance(now_s)
        if self.guest.actual != self._seen_actual:
            self._seen_actual, self._changed_at_s = self.guest.actual, self.guest.wall_s()
            self._change_waits = True
        if self._change_waits and now_s >= self._quiet_until_s and self.spec.device:
            self._change_waits = False
            self._quiet_until_s = now_s + EVENT_INTERVAL_S
            self._emit("BALLOON_CHANGE", {"actual": self._seen_actual}, at_s=self._changed_at_s)
        if self._second_reset_s is not None and now_s >= self._second_reset_s:
            self._second_reset_s = None
            self._emit("RESET", {"guest": True, "reason": "guest-reset"})

    def next_due_s(self) -> float | None:
        """Return when the next event is due without further commands; None: never."""
        times_s = [] if self._second_reset_s is None else [self._second_reset_s]
        if self._change_waits:
            times_s.append(self._quiet_until_s)
        elif (step_s := self.guest.next_step_s()) is not None:
            times_s.append(max(step_s, self._quiet_until_s))
        return min(times_s, default=None)

    def take_events(self) -> list[dict[str, Json]]:
        """Return the events since the last call, oldest first."""
        events, self._events = self._events, []
        return events

    def execute(self, command: str, arguments: Arguments) -> Json:
        """Carry out one command after negotiation.

        Raises:
            CommandError: QEMU would reply with this error.
            Aborted: QEMU aborts on it.
        """
        if command == "qmp_capabilities":
            raise CommandError(
                "CommandNotFound", "Capabilities negotiation is already complete, command ignored"
            )
        if command not in self._commands:
            raise CommandError("CommandNotFound", f"The command {command} has not been found")
        run, parameters = self._commands[command]
        for name, kind in parameters.items():
            if name not in arguments:
                raise _refused(f"Parameter '{name}' is missing")
            _check(name, arguments[name], kind)
        for name in arguments:
            if name not in parameters:
                raise _refused(f"Parameter '{name}' is unexpected")
        return run(arguments)

    def shut_down(self, reason: str) -> Json:
        """Exit, as on ``quit`` or SIGTERM (reason ``host-signal``)."""
        self._emit("SHUTDOWN", {"guest": False, "reason": reason})
        self.exited = True
        return {}

    def plug(self, size: int) -> None:
        """Hot-plug a DIMM; QEMU sends no BALLOON_CHANGE for it."""
        self.dimms += (size,)
        self.guest.plug(size)
        self._seen_actual = self.guest.actual

    def load_state(self, actual: int) -> None:
        """Load a saved state as loadvm does; QEMU sends no BALLOON_CHANGE for it."""
        self._emit("STOP")
        self.guest.load_balloon(actual)
        self._seen_actual = self.guest.actual
        self._emit("RESUME")

    def _emit(self, event: str, details: Mapping[str, Json] | None = None, at_s: float | None = None) -> None:
        seconds, microseconds = divmod(round((at_s or self.guest.wall_s()) * 1_000_000), 1_000_000)
        stamp = {"seconds": seconds, "microseconds": microseconds}
        self._events.append(
            {"timestamp": stamp, "event": event, **({"data": details} if details is not None else {})}
        )

    def _version(self, _: Arguments) -> Json:
        major, minor, micro = self.spec.version
        return {"qemu": {"micro": micro, "minor": minor, "major": major}, "package": self.spec.package}

    def _status(self, _: Arguments) -> Json:
        singlestep = {"singlestep": False} if self.dialect.has_singlestep else {}
        return {"status": self.run_state, **singlestep, "running": self.run_state == "running"}

    def _need_balloon(self) -> None:
        if self.spec.device is None:
            raise CommandError("DeviceNotActive", "No balloon device has been activated")

    def _query_balloon(self, _: Arguments) -> Json:
        self._need_balloon()
        return {"actual": self.guest.actual}

    def _balloon(self, arguments: Arguments) -> Json:
        self._need_balloon()
        value = arguments["value"]
        if not isinstance(value, int) or value <= 0:
            raise _refused(f"Parameter '{self.dialect.refused_size}' expects a size")
        self.guest.set_target(value)
        return {}

    def _memory_size(self, _: Arguments) -> Json:
        plugged = sum(self.dimms) + sum(self.spec.nvdimms)
        return {"base-memory": self._base_memory, "plugged-memory": plugged}

    def _memory_devices(self, _: Arguments) -> Json:
        address = _FIRST_DIMM_ADDRESS
        devices = []
        sizes = [("dimm", size) for size in self.dimms] + [("nvdimm", size) for size in self.spec.nvdimms]
        for slot, (kind, size) in enumerate(sizes):
            details = {
                "memdev": f"/objects/m{slot}",
                "hotplugged": slot >= len(self.spec.dimms) and kind == "dimm",
                "addr": address,
                "hotpluggable": True,
                "size": size,
                "slot": slot,
                "node": 0,
                "id": f"{kind}{slot}",
            }
            devices.append({"type": kind, "data": details})
            address += size
        return devices

    def _memory_backends(self, _: Arguments) -> Json:
        sizes = {"pc.ram": self._base_memory}
        sizes |= {f"m{slot}": size for slot, size in enumerate((*self.dimms, *self.spec.nvdimms))}
        tells = {"share": self.spec.shared, "reserve": True} if self.dialect.tells_shared else {}
        return [
            {
                **tells,
                "prealloc": self.spec.preallocated,
                "host-nodes": [],
                "size": size,
                "merge": True,
                "dump": True,
                "policy": "default",
                "id": name,
            }
            for name, size in sizes.items()
        ]

    def _list(self, arguments: Arguments) -> Json:
        path = arguments["path"]
        children: list[tuple[str, str]]
        if path == "/machine/peripheral":
            kinds = ["pc-dimm"] * len(self.dimms) + ["nvdimm"] * len(self.spec.nvdimms)
            children = [(f"{kind.removeprefix('pc-')}{slot}", kind) for slot, kind in enumerate(kinds)][::-1]
            if self.spec.device is not None and self.spec.device_id is not None:
                children.append((self.spec.device_id, self.spec.device))
            children += self.spec.devices
        elif path == "/machine/peripheral-anon":
            children = []
            if self.spec.device is not None and self.spec.device_id is None:
                children = [("device[0]", "virtio-serial-pci"), ("device[1]", self.spec.device)]
        elif path == "/objects":
            children = [("pc.ram", "memory-backend-ram")]
        elif path == self.device_path:
            return [{"name": name, "type": kind} for name, kind in _PROPERTIES]
        else:
            raise _no_device(path)
        listed = [{"name": name, "type": f"child<{kind}>"} for name, kind in children]
        return [{"name": "type", "type": "string"}, *listed]

    def _need_property(self, arguments: Arguments) -> str:
        if arguments["path"] == "/objects/pc.ram":
            raise _refused(f"Property 'memory-backend-ram.{arguments['property']}' not found")
        if arguments["path"] != self.device_path or self.device_path is None:
            raise _no_device(arguments["path"])
        name = str(arguments["property"])
        if name not in dict(_PROPERTIES):
            raise _refused(f"Property '{self.spec.device}.{name}' not found")
        return name

    def _get(self, arguments: Arguments) -> Json:
        match self._need_property(arguments):
            case "guest-stats":
                reported = self.guest.statistics
                statistics = {name: reported.get(name, NOT_REPORTED) for name in self.dialect.statistics}
                return {"stats": statistics, "last-update": self.guest.last_update}
            case "guest-stats-polling-interval":
                return self.guest.polling_interval_s
            case "deflate-on-oom":
                return self.guest.spec.deflate_on_oom
            case "free-page-reporting":
                return self.guest.spec.free_page_reporting
            case _:
                return self.spec.device

    def _set(self, arguments: Arguments) -> Json:
        name, value = self._need_property(arguments), arguments["value"]
        if name == "guest-stats-polling-interval":
            _check(name, value, int)
            if not isinstance(value, int) or value < 0:
                raise _refused("timer value must be greater than zero")
            if value >= 2**32:
                raise _refused("timer value is too big")
            self.guest.set_polling_interval(value)
            return {}
        if name == "type":
            raise _refused(f"Property '{self.spec.device}.type' is not writable")
        if name == "guest-stats":
            raise _refused(self.dialect.statistics_read_only)
        raise _refused(
            f"Attempt to set property '{name}' on anonymous device (type 'virtio-balloon-device')"
            " after it was realized"
        )

    def _check_backend(self, path: object) -> None:
        backend = self.device_path
        if backend is not None and self.spec.device != "virtio-balloon-device":
            backend += "/virtio-backend"  # a child of the bus's proxy device
        if backend is None or path != backend:
            raise _refused(f"Path {path} is not a {self.dialect.virtio_device}")

    def _queue_status(self, arguments: Arguments) -> Json:
        """Answer for the queue of statistics, the only one that is asked about."""
        self._check_backend(arguments["path"])
        taken = self.guest.reports % 2**16
        return {
            "name": "virtio-balloon",
            "queue-index": arguments["queue"],
            "inuse": 1 if taken else 0,
            "last-avail-idx": taken,
            "shadow-avail-idx": taken,
            "used-idx": max(0, taken - 1),
        }

    def _virtio_status(self, arguments: Arguments) -> Json:
        self._check_backend(arguments["path"])
        if self.dialect.virtio_status is VirtioStatus.ABORTS:
            self.exited = True
            raise Aborted
        up, guest = self.guest.driver_loaded, self.guest.spec
        reporting = ["VIRTIO_BALLOON_F_REPORTING: Page reporting VQ enabled"] * guest.free_page_reporting
        deflating = ["VIRTIO_BALLOON_F_DEFLATE_ON_OOM: Deflate balloon when guest OOM"] * guest.deflate_on_oom
        poison = ["VIRTIO_BALLOON_F_PAGE_POISON: Guest page poisoning enabled"]
        statistics = ["VIRTIO_BALLOON_F_STATS_VQ: Guest memory stats VQ available"]
        taken: dict[str, Json] = {"dev-features": [], "transports": []}
        if up:
            taken = {
                "unknown-dev-features": _UNKNOWN_TAKEN,
                "dev-features": reporting + deflating + statistics * guest.statistics,
                "transports": list(_TAKEN_TRANSPORTS),
            }
        return {
            "device-endian": "little",
            "bus-name": "",
            "disable-legacy-check": False,
            "name": "virtio-balloon",
            "started": up,
            "device-id": 5,
            "backend-features": {"dev-features": [], "transports": []},
            "start-on-kick": False,
            "isr": 0,
            "broken": False,
            "status": {"statuses": list(_ACKNOWLEDGED) if up else []},
            "num-vqs": 3 + guest.free_page_reporting,
            "guest-features": taken,
            "host-features": {
                "unknown-dev-features": _UNKNOWN_OFFERED,
                "dev-features": reporting + poison + deflating + statistics,
                "transports": list(self.dialect.offered_transports),
            },
            "use-guest-notifier-mask": True,
            "vm-running": self.run_state == "running",
            "queue-sel": 2 if up else 0,
            "disabled": False,
            "vhost-started": False,
            "use-started": True,
        }

    def _stop(self, _: Arguments) -> Json:
        if self.run_state == "running":
            self.run_state = self.spec.processors_stopped_as
            self.guest.pause()
            self._emit("STOP")
        return {}

    def _continue(self, _: Arguments) -> Json:
        if self.run_state != "running":
            self.run_state = "running"
            self.guest.resume()
            self._emit("RESUME")
        return {}

    def _reset(self, _: Arguments) -> Json:
        if self.spec.no_reboot:
            return self.shut_down("host-qmp-system-reset")
        self._emit("RESET", {"guest": False, "reason": "host-qmp-system-reset"})
        self.guest.reset()
        if self.run_state == "running":
            self._second_reset_s = self.guest.now_s + SECOND_RESET_AFTER_S
        return {}


_PROPERTIES: Final = (
    ("type", "string"),
    ("deflate-on-oom", "bool"),
    ("free-page-reporting", "bool"),
    ("guest-stats-polling-interval", "int"),
    ("guest-stats", "guest statistics"),
)


def _refused(description: str) -> CommandError:
    return CommandError("GenericError", description)


def _no_device(path: object) -> CommandError:
    return CommandError("DeviceNotFound", f"Device '{path}' not found")


def _check(name: str, value: object, kind: type[object]) -> None:
    fits = isinstance(value, kind)
    if kind is int and isinstance(value, int):
        fits = not isinstance(value, bool) and -(2**63) <= value < 2**63
    if not fits:
        expected = "integer" if kind is int else "string"
        raise _refused(f"Invalid parameter type for '{name}', expected: {expected}")
