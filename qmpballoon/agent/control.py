"""The agent's local control socket: the same requests, answers and events as over MQTT, without a broker.

A client sends one JSON object a line::

    {"verb": "get", "vm": "web1", "transaction": 1}
    {"verb": "reclaim", "size": "1GiB"}

``vm`` absent or null: a request of the host. The other keys are those of the request object. Each line
gets one response object. Two verbs exist only here: ``agent`` tells who this is and lists the VMs with the
paths of their sockets; after ``subscribe`` (`_subscribe`) event objects come between the answers, and VM
objects and the figures of the host object if they are asked for. A response object has ``verb``, an event
object ``event``, a VM object ``run_state``, the host's ``level``.

Who may open the socket may do all that the agent can: its mode is 0660, its group that of the agent.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import count
from typing import Final

from qmpballoon import __version__
from qmpballoon.agent.feed import Feed
from qmpballoon.agent.subscription import Subscription
from qmpballoon.errors import RequestRefused
from qmpballoon.log import log_event
from qmpballoon.model.names import mirrored
from qmpballoon.model.records import VmStatus, utc_now
from qmpballoon.protocol.objects import response_object
from qmpballoon.protocol.payloads import LARGEST_REQUEST, Content, decode_request, encode
from qmpballoon.protocol.requests import Arrival, Handle, NoteAnswer, Requests
from qmpballoon.unix_listener import listen_at, remove

MOST_CLIENTS: Final = 64
FAREWELL_S: Final = 1.0  # for the last answers to a client that is slow to read
_MOST_UNSENT: Final = 256 * 1024  # bytes; then no more lines are read from that client


class ControlSocket:
    """Serves the control socket at ``path``; `run` it in a task.

    ``handle`` carries out a request (see `Handle`); ``vm_exists`` returns whether there is a VM of that name;
    ``statuses`` returns all VMs, ``unidentified`` the sockets without one; ``clock`` is monotonic;
    ``note_answer`` counts answers.
    """

    def __init__(
        self,
        path: str,
        handle: Handle,
        feed: Feed,
        *,
        host: str,
        vm_exists: Callable[[str], bool],
        statuses: Callable[[], Iterable[VmStatus]],
        unidentified: Callable[[], Iterable[str]] = tuple,
        clock: Callable[[], float],
        note_answer: NoteAnswer = lambda verb, outcome: None,
    ) -> None:
        self._path = path
        self._feed = feed
        self._host = host
        self._vm_exists = vm_exists
        self._statuses = statuses
        self._unidentified = unidentified
        self.pid = os.getpid()
        self._requests = Requests(handle, vm_exists, clock, note_answer)
        self.clients: set[asyncio.StreamWriter] = set()  # that are connected
        self._numbers = count(1)

    async def run(self) -> None:
        """Serve until cancelled; then answer pending requests, close all connections, remove the socket.

        Where the socket cannot be made, that is logged, and the agent runs without it.
        """
        try:
            listener = listen_at(self._path, "another agent listens there")
        except OSError as error:
            reason = error.strerror or str(error)
            log_event(
                "control-unavailable",
                f"no control socket for the command line: {reason}; name another place: [agent] control",
                level=logging.WARNING,
                socket=self._path,
            )
            await asyncio.Event().wait()
            return
        made = os.stat(self._path).st_ino
        clients: tuple[asyncio.StreamWriter, ...] = ()
        try:
            async with asyncio.TaskGroup() as group:
                self._requests.open(group)
                server = await asyncio.start_unix_server(
                    lambda reader, writer: self._accept(reader, writer, group),
                    sock=listener,
                    limit=LARGEST_REQUEST,
                )
                try:
                    await asyncio.Event().wait()
                finally:
                    server.close()
                    self._requests.stop()
                    clients = tuple(self.clients)
        finally:
            await _close(clients)
            remove(self._path, made)

    def _accept(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, group: asyncio.TaskGroup
    ) -> None:
        writer.transport.set_write_buffer_limits(high=_MOST_UNSENT)
        number = next(self._numbers)
        group.create_task(self._serve(reader, writer, number), name=f"control client {number}")

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        if len(self.clients) >= MOST_CLIENTS:
            error = RequestRefused("busy", f"{MOST_CLIENTS} clients are connected: close one")
            _write(writer, response_object(None, None, "", utc_now(), error=error))
            writer.close()
            return
        self.clients.add(writer)
        subscription: Subscription | None = None
        try:
            while line := await reader.readline():
                subscription = self._take(line, writer, f"control {number}", subscription)
                await writer.drain()
        except ValueError:
            _write(writer, _refusal("", f"a line has at most {LARGEST_REQUEST} bytes"))
        except ConnectionError:
            pass  # the client has gone
        finally:
            if subscription is not None:
                subscription.end()
            self.clients.discard(writer)
            self._requests.abandon(f"control {number}")
            writer.close()

    def _take(
        self, line: bytes, writer: asyncio.StreamWriter, asker: str, subscription: Subscription | None
    ) -> Subscription | None:
        """Answer one line, or start its request; return the connection's subscription from now on."""

        def reply(response: Mapping[str, object]) -> None:
            _write(writer, response)

        try:
            content = decode_request(line)
        except RequestRefused as error:
            reply(response_object(None, None, "", utc_now(), error=error))
            return subscription
        arguments = dict(content.arguments or {})
        vm, verb = arguments.pop("vm", None), arguments.pop("verb", None)
        if not isinstance(verb, str) or not (vm is None or isinstance(vm, str)):
            reply(_refusal("", 'a request is an object such as {"verb": "get", "vm": "web1"}', content))
        elif verb == "agent":
            reply(response_object(content.transaction, None, verb, utc_now(), result=self._agent()))
        elif verb == "subscribe":
            try:
                new = self._subscribe(vm, arguments, writer)
            except RequestRefused as error:
                reply(response_object(content.transaction, None, verb, utc_now(), error=error))
                return subscription
            if subscription is not None:
                subscription.end()
            reply(response_object(content.transaction, vm, verb, utc_now(), result={}))
            new.begin(self._sorted_statuses())
            return new
        else:
            asked = Content(content.transaction, arguments)
            channel = f"{asker} {mirrored(vm or '')} {mirrored(verb)}"
            self._requests.receive(Arrival(channel, vm, verb, asked, reply, asker=asker))
        return subscription

    def _agent(self) -> Mapping[str, object]:
        """Return the result of the verb ``agent``."""
        return {
            "host": self._host,
            "version": __version__,
            "pid": self.pid,
            "vms": [
                {"vm": vm.id, "name": vm.name, "socket": vm.socket, "health": vm.health}
                for vm in self._sorted_statuses()
            ],
            "unidentified": list(self._unidentified()),
        }

    def _sorted_statuses(self) -> list[VmStatus]:
        return sorted(self._statuses(), key=lambda vm: vm.id)

    def _subscribe(
        self, vm: str | None, arguments: Mapping[str, object], writer: asyncio.StreamWriter
    ) -> Subscription:
        """Return the subscription that a client asks for.

        ``vm`` null: all VMs and the host. ``states_s``: VM objects, too, at once and when they change, but
        at most one of a VM in so many seconds, and so the host's figures; null: events alone.
        """
        unknown = [key for key in arguments if key != "states_s"]
        states_s = arguments.get("states_s")
        if unknown:
            raise RequestRefused("malformed", f"subscribe takes vm and states_s, not {mirrored(unknown[0])}")
        if vm is not None and not self._vm_exists(vm):
            raise RequestRefused("unknown-vm", f"no VM {mirrored(vm)!r} here")
        if states_s is not None and (
            isinstance(states_s, bool) or not isinstance(states_s, int | float) or not 0 < states_s <= 3600
        ):
            raise RequestRefused("malformed", "states_s: must be seconds, more than 0, at most 3600")
        interval_s = None if states_s is None else float(states_s)
        return Subscription(self._feed, self._host, vm, interval_s, writer, encode_line=_line)


async def _close(clients: Sequence[asyncio.StreamWriter]) -> None:
    """Close the connections when their last answers are sent, or after FAREWELL_S."""
    for writer in clients:
        writer.close()
    waits = [asyncio.ensure_future(writer.wait_closed()) for writer in clients]
    if waits:
        await asyncio.wait(waits, timeout=FAREWELL_S)
        for writer in clients:
            writer.transport.abort()
        await asyncio.gather(*waits, return_exceptions=True)


def _write(writer: asyncio.StreamWriter, value: Mapping[str, object]) -> None:
    """Send an object, unless the client has gone: uvloop raises RuntimeError for writes then."""
    if not writer.is_closing():
        writer.write(_line(value))


def _line(value: Mapping[str, object]) -> bytes:
    return encode(value, "json") + b"\n"


def _refusal(verb: str, reason: str, content: Content | None = None) -> Mapping[str, object]:
    transaction = None if content is None else content.transaction
    error = RequestRefused("malformed", reason)
    return response_object(transaction, None, verb, utc_now(), error=error)
