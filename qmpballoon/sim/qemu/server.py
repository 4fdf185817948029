"""A simulated QEMU on real unix sockets: one client at a time, events, and faults on demand.

An idle QEMU needs only its sockets: there is one timer per QEMU, and only while an event is due.

``python -m qmpballoon.sim.qemu`` runs them in separate processes (see `command`).
"""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import random
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, cast

from qmpballoon.sim.guest import Behaviour, GuestSpec, SimulatedGuest
from qmpballoon.sim.qemu.dialect import Dialect
from qmpballoon.sim.qemu.faults import Babble, Faults, concerns
from qmpballoon.sim.qemu.machine import Aborted, CommandError, Json, MachineSpec, SimulatedMachine
from qmpballoon.sim.qemu.messages import encode, error_message, flood_event, parse_request, unplug_event
from qmpballoon.sim.qemu.process import BACKLOG, bind, map_memory
from qmpballoon.sim.qemu.stream import Broken, RequestStream

_CLOSE_TIMEOUT_S: Final = 5.0
_SHORTEST_DELAY_S: Final = 0.001  # some event loops have timers of millisecond resolution
_WITHOUT_CAPABILITIES: Final = "Expecting capabilities negotiation with 'qmp_capabilities'"


class SimulatedQemu:
    """A simulated QEMU with one or more monitors; it runs inside ``async with``.

    ``faults`` may be changed at any time. They affect the first monitor only, so that a second one can be
    used to check the state. Each monitor also has the command ``x-simulate`` with any of the arguments
    ``demand`` ([anonymous, cache] in bytes), ``behaviour``, ``faults`` (a list of words) and ``plug``
    (bytes), for use from another process.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *more_paths: str | os.PathLike[str],
        guest: GuestSpec | None = None,
        machine: MachineSpec | None = None,
        faults: Faults | None = None,
        booted: bool = True,
        listeners: Sequence[socket.socket] = (),
    ) -> None:
        """Store the settings. ``booted``: the driver is up at the start, else the guest boots first.

        ``listeners``: the paths' sockets, if another process listens and maps the memory (see `fleet`).
        """
        self.paths = tuple(Path(each) for each in (path, *more_paths))
        self.faults = faults or Faults()
        self.exited = asyncio.Event()
        self.aborted = False  # ended by a failed assertion in QEMU
        now_s = time.monotonic()
        simulated = SimulatedGuest(guest, now_s=now_s, epoch_s=time.time() - now_s, booted=booted)
        self._machine = SimulatedMachine(simulated, machine)
        self._listeners = list(listeners)
        self._accepting: list[asyncio.Task[None]] = []
        self._connections: set[_Connection] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._memory: list[mmap.mmap] = []  # mapped as in QEMU, and never touched

    @property
    def path(self) -> Path:
        """The first monitor's socket."""
        return self.paths[0]

    @property
    def dialect(self) -> Dialect:
        """The dialect of its version."""
        return self._machine.dialect

    @property
    def machine(self) -> SimulatedMachine:
        """The machine as of now, read only; change it with the methods of this class."""
        self._machine.advance(time.monotonic())
        return self._machine

    @property
    def guest(self) -> SimulatedGuest:
        """The guest as of now, read only; change it with the methods of this class."""
        return self.machine.guest

    async def __aenter__(self) -> SimulatedQemu:
        if not self._listeners:
            self._memory.append(map_memory(self._machine.guest.size))
            for path in self.paths:
                self._listeners.append(bind(path))
                self._listeners[-1].listen(BACKLOG)
        for number, listener in enumerate(self._listeners):
            accepting = self._accept(listener, first=number == 0)
            self._accepting.append(asyncio.create_task(accepting, name=f"accept {self.paths[number]}"))
        return self

    async def __aexit__(self, *_: object) -> None:
        self.die(unlink=True)
        async with asyncio.timeout(_CLOSE_TIMEOUT_S):
            for connection in tuple(self._connections):
                await connection.closed.wait()
            for task in self._accepting:
                with contextlib.suppress(asyncio.CancelledError):
                    await task

    def die(self, *, unlink: bool = False) -> None:
        """End at once, as by SIGKILL: connections are aborted, the socket files stay unless ``unlink``."""
        self._machine.exited = True
        for connection in tuple(self._connections):
            connection.abort()
        self._close(unlink=unlink)

    def terminate(self) -> None:
        """End as on SIGTERM: SHUTDOWN is sent, the socket files are removed."""
        self.machine.shut_down("host-signal")
        self.settle()
        self.end_if_exited()

    def set_demand(self, anonymous: int, cache: int = 0) -> None:
        """Set the demand of the guest's workload in bytes, from now on."""
        self.guest.set_demand(anonymous, cache)
        self.settle()

    def set_behaviour(self, behaviour: Behaviour) -> None:
        """Change how the guest's driver responds to targets."""
        self.guest.set_behaviour(behaviour)
        self.settle()

    def set_migration(self, status: str | None, run_state: str | None = None) -> None:
        """Report a migration in this status (``active`` …); None: no migration."""
        self.machine.migration = {} if status is None else {"status": status}
        if run_state is not None:
            self._machine.run_state = run_state

    def plug(self, size: int) -> None:
        """Hot-plug a DIMM of this size in bytes."""
        self.machine.plug(size)
        self._memory.append(map_memory(size))
        self.settle()

    def load_state(self, actual: int) -> None:
        """Load a saved state in which the guest has reached a target of ``actual`` bytes."""
        self.machine.load_state(actual)
        self.settle()

    def drop_clients(self) -> None:
        """Abort all connections and continue to run."""
        for connection in tuple(self._connections):
            connection.abort()

    def settle(self) -> None:
        """Advance the machine to now, send due events, and set the timer for the next one."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        machine = self.machine
        negotiated = [connection for connection in self._connections if connection.negotiated]
        for event in machine.take_events():
            for connection in negotiated:
                connection.send(encode(event))
        due_s = machine.next_due_s()
        if due_s is not None and negotiated and not machine.exited:
            delay_s = max(due_s - time.monotonic(), _SHORTEST_DELAY_S)
            self._timer = asyncio.get_running_loop().call_later(delay_s, self.settle)

    def execute(self, command: str, arguments: Mapping[str, object]) -> Json:
        """Execute a command and send the events that it causes, except those that follow its reply.

        Raises:
            CommandError: QEMU would reply with this error.
            Aborted: QEMU aborts on it.
        """
        if command == "x-simulate":
            return self._simulate(arguments)
        result = self.machine.execute(command, arguments)
        if command not in self.dialect.events_after_reply:
            self.settle()
        return result

    def end_if_exited(self) -> None:
        """Close all connections after their last reply, if the machine has exited."""
        if self._machine.exited and not self.exited.is_set():
            for connection in tuple(self._connections):
                connection.finish()
            self._close(unlink=True)

    def add(self, connection: _Connection) -> None:
        """Add a connection."""
        self._connections.add(connection)

    def remove(self, connection: _Connection) -> None:
        """Remove a connection."""
        self._connections.discard(connection)

    async def _accept(self, listener: socket.socket, *, first: bool) -> None:
        while True:
            accepted, _ = await asyncio.get_running_loop().sock_accept(listener)
            await self._serve(accepted, _Connection(self, first=first))

    async def _serve(self, accepted: socket.socket, connection: _Connection) -> None:
        await asyncio.get_running_loop().connect_accepted_socket(lambda: connection, accepted)
        await connection.closed.wait()

    def _close(self, *, unlink: bool) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for task, listener in zip(self._accepting, self._listeners, strict=True):
            # Refuses clients from now on. asyncio lets go of the descriptor only when the task ends; closed
            # before, its number may be that of a new connection, which asyncio then would not read.
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            task.add_done_callback(lambda _, listener=listener: listener.close())  # type: ignore[misc]
            task.cancel()
        for memory in self._memory:
            memory.close()
        self._memory.clear()
        if unlink and not self.exited.is_set():
            for path in self.paths:
                path.unlink(missing_ok=True)
        self.exited.set()

    def _simulate(self, arguments: Mapping[str, object]) -> Json:
        try:
            for name, value in arguments.items():
                match name, value:
                    case "demand", [int(anonymous), int(cache)]:
                        self.set_demand(anonymous, cache)
                    case "behaviour", str(word):
                        self.set_behaviour(Behaviour(word))
                    case "faults", [*words]:
                        self.faults = Faults.parse(str(word) for word in words)
                    case "plug", int(size):
                        self.plug(size)
                    case _:
                        raise ValueError(f"x-simulate does not take {name}={value!r}")
        except ValueError as error:
            raise CommandError("GenericError", str(error)) from None
        return {}


class _Connection(asyncio.Protocol):
    """One client: its requests, its negotiated capabilities, and the faults of its connection."""

    def __init__(self, qemu: SimulatedQemu, *, first: bool) -> None:
        self.qemu = qemu
        self.first = first
        self.negotiated = False
        self.closed = asyncio.Event()
        self.transport: asyncio.Transport | None = None
        self._requests = RequestStream(positions=qemu.dialect.error_positions)
        self._replies = 0
        self._sent = 0
        self._hung_up = False

    @property
    def faults(self) -> Faults:
        return self.qemu.faults if self.first else _NO_FAULTS

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # uvloop's class does not derive from it
        self.qemu.add(self)
        if not self.faults.silent_greeting:
            self._write(encode(self.qemu.machine.greeting()))

    def connection_lost(self, error: Exception | None) -> None:
        self.transport = None
        self.negotiated = False
        self.qemu.remove(self)
        self.closed.set()

    def data_received(self, received: bytes) -> None:
        for request in self._requests.feed(received):
            if isinstance(request, Broken):
                self._reply("", error_message("GenericError", request.description))
            else:
                self._answer(request.value)

    def send(self, line: bytes) -> None:
        """Send now, or after the delay of ``faults``."""
        if self.faults.reply_delay_s:
            asyncio.get_running_loop().call_later(self.faults.reply_delay_s, self._write, line)
        else:
            self._write(line)

    def finish(self) -> None:
        """Close after all pending data is sent."""
        if self.transport is not None:
            self.transport.close()

    def abort(self) -> None:
        """Close at once."""
        if self.transport is not None:
            self.transport.abort()

    def _answer(self, request: object) -> None:
        if self.faults.silent_greeting or self._hung_up:
            return
        command = ""
        reply: dict[str, Json]
        try:
            command, arguments = parse_request(request)
            if not self.negotiated:
                reply = {"return": self._negotiate(command, arguments)}
            elif concerns(self.faults.refuse, command):
                raise CommandError("GenericError", f"The command {command} was refused on purpose")
            else:
                reply = {"return": self.qemu.execute(command, arguments)}
        except CommandError as error:
            reply = error_message(error.error_class, error.description)
        except Aborted:
            self.qemu.aborted = True
            self.qemu.die()
            return
        if isinstance(request, dict) and "id" in request:
            reply = {"id": request["id"], **reply} if "error" in reply else {**reply, "id": request["id"]}
        self._reply(command, reply)
        if command in self.qemu.dialect.events_after_reply:
            self.qemu.settle()
        self.qemu.end_if_exited()

    def _negotiate(self, command: str, arguments: Mapping[str, object]) -> Json:
        if command != "qmp_capabilities":
            raise CommandError("CommandNotFound", _WITHOUT_CAPABILITIES)
        for name in arguments:
            if name != "enable":
                raise CommandError("GenericError", f"Parameter '{name}' is unexpected")
        wanted = arguments.get("enable", [])
        if not isinstance(wanted, list):
            raise CommandError("GenericError", "Invalid parameter type for 'enable', expected: array")
        for capability in wanted:
            if capability != "oob":
                sentence = self.qemu.dialect.unknown_capability
                raise CommandError("GenericError", sentence.format(capability))
        self.qemu.machine.take_events()  # no client received them
        self.negotiated = True
        self.qemu.settle()
        return {}

    def _reply(self, command: str, reply: dict[str, Json]) -> None:
        faults = self.faults
        if faults.silent_after_replies is not None and self._replies >= faults.silent_after_replies:
            return
        self._replies += 1
        if command == "qmp_capabilities":
            self.send(encode(reply))
            return
        if concerns(faults.silent_to, command):
            return
        for number in range(faults.event_flood):
            self.send(encode(flood_event(number)))
        line = encode(reply)
        match faults.babble:
            case Babble.RANDOM_BYTES:
                self.send(random.Random(self._replies).randbytes(64).replace(b"\n", b"") + b"\r\n")
            case Babble.NOT_AN_OBJECT:
                self.send(b'["no", "object"]\r\n')
            case Babble.UNKNOWN_ID:
                self.send(encode({"return": {}, "id": "never asked"}))
            case Babble.ID_TWICE:
                self.send(line)
            case Babble.NO_ID:
                line = encode({key: value for key, value in reply.items() if key != "id"})
        if faults.reply_padding:
            line = b"{" + b" " * faults.reply_padding + line[1:]
        if concerns(faults.half_reply_to, command):
            self._write(line[: len(line) // 2])
            self._hang_up()
            return
        if concerns(faults.unplugged_after, command):
            line += encode(unplug_event(self.qemu.machine.device_path))
        self.send(line)

    def _write(self, line: bytes) -> None:
        if self.transport is None or self.transport.is_closing() or self._hung_up:
            return
        limit = self.faults.cut_after_bytes
        if limit is not None and self._sent + len(line) >= limit:
            self.transport.write(line[: max(0, limit - self._sent)])
            self._hang_up()
            return
        self._sent += len(line)
        self.transport.write(line)

    def _hang_up(self) -> None:
        # Closing with unread requests would reset the connection; the fault needs an orderly end.
        if self.transport is not None and not self._hung_up:
            self._hung_up = True
            self.transport.write_eof()


_NO_FAULTS: Final = Faults()
