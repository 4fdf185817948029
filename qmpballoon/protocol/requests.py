"""Answers each request exactly once, even an invalid one; a slow request does not delay others.

The transport (MQTT or another one) passes each request as an `Arrival`, with the function that sends its
answer back.

A valid request runs in its own task. If the same transaction arrives again on the same channel, it
joins the running request or gets the stored answer, and has no second effect. At most 16 requests of one VM,
or of the host, run at a time, and one more of each asker who has none of these: nobody can take all places.
"""

from __future__ import annotations

import asyncio
import json
import zlib
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, TypeAlias

from qmpballoon.errors import QmpBalloonError, RequestRefused
from qmpballoon.model.names import VmId, mirrored
from qmpballoon.model.records import utc_now
from qmpballoon.protocol.objects import response_object
from qmpballoon.protocol.payloads import Content, decode_request, encode
from qmpballoon.protocol.verbs import Asked, read_asked

MOST_WAITING: Final = 16  # requests of one VM, or of the host
MOST_WAITING_IN_ALL: Final = 32  # beyond MOST_WAITING only one of each asker, of those that have none
MOST_REMEMBERED: Final = 4000  # answers: a few for each of 1000 VMs
MOST_REMEMBERED_BYTES: Final = 4 * 1024 * 1024  # of compressed answers; `list` has a row per VM
REMEMBERED_S: Final = 60.0  # from the answer on


Reply: TypeAlias = Callable[[Mapping[str, object]], None]
"""Sends the response object to the requester, in the format of the request; must not wait."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request as the transport received it.

    ``vm`` None: a request of the host. ``channel`` is where it arrived, such as a topic. Transactions are
    compared only within one channel. ``asker`` tells requesters apart, as far as the transport can.
    ``payload`` is what arrived, or its content if the transport had to read it. ``refused`` is an error
    that the transport found; it is the answer.
    """

    channel: str
    vm: str | None
    verb: str
    payload: bytes | Content
    reply: Reply
    content_type: str | None = None
    expiry_s: float | None = None
    refused: RequestRefused | None = None
    asker: str = ""


@dataclass(frozen=True, slots=True)
class Request:
    """A valid request: ``asked`` is one of the records in `verbs`.

    ``vm`` None: a request of the host. ``expires_at_s`` is on the monotonic clock; a request that has to wait
    longer than that is refused as ``expired``.
    """

    vm: VmId | None
    asked: Asked
    transaction: object = None
    expires_at_s: float | None = None

    @property
    def verb(self) -> str:
        """The verb, as it is spelled in a request."""
        return self.asked.VERB

    def refuse_if_expired(self, now_s: float) -> None:
        """Raise RequestRefused (``expired``) if the request's expiry has passed."""
        if self.expires_at_s is not None and now_s > self.expires_at_s:
            raise RequestRefused("expired", f"{self.verb} was not started before the message expired")


Handle: TypeAlias = Callable[[Request], Awaitable[object]]
"""Carries out a request and returns the result, of JSON values; raises a QmpBalloonError on failure."""

NoteAnswer: TypeAlias = Callable[[str, str], None]
"""Takes the verb of a request and the outcome of its answer, ``ok`` or an error word; must not wait."""

_Key: TypeAlias = tuple[str, bytes]  # channel, transaction


@dataclass(slots=True, eq=False)
class _Running:
    request: Request
    key: _Key | None
    replies: list[Reply]
    asker: str = ""
    task: asyncio.Task[None] | None = None
    answered: bool = False


@dataclass(slots=True)
class Requests:
    """Takes requests and gives each one answer.

    ``handle`` carries one out; ``vm_exists`` returns whether there is a VM of that name; ``clock`` is
    monotonic. ``note_answer`` is called once for each request; a transaction that comes again is not counted.
    """

    handle: Handle
    vm_exists: Callable[[str], bool]
    clock: Callable[[], float]
    note_answer: NoteAnswer = lambda verb, outcome: None
    _group: asyncio.TaskGroup | None = None
    _running: dict[str | None, list[_Running]] = field(default_factory=dict)
    _joinable: dict[_Key, _Running] = field(default_factory=dict)
    _remembered: OrderedDict[_Key, tuple[float, bytes]] = field(default_factory=OrderedDict)
    _remembered_bytes: int = 0

    def open(self, group: asyncio.TaskGroup) -> None:
        """Run requests in ``group`` from now on; a bug in the handler ends the group."""
        self._group = group

    def receive(self, arrival: Arrival) -> None:
        """Take one request: answer it at once or start it."""
        vm, verb, content = arrival.vm, arrival.verb, Content()
        try:
            content = _content(arrival)
            asked = self._validated(arrival, content)
        except RequestRefused as refused:
            self.note_answer(verb, refused.code)
            arrival.reply(self._response(vm, verb, content.transaction, error=refused))
            return
        expires_at_s = None if arrival.expiry_s is None else self.clock() + arrival.expiry_s
        request = Request(None if vm is None else VmId(vm), asked, content.transaction, expires_at_s)
        self._start(request, arrival)

    def stop(self) -> None:
        """Answer all running requests with ``offline``, cancel their tasks and start no more."""
        self._group = None
        for running in [one for some in self._running.values() for one in some]:
            error = RequestRefused("offline", "the agent stops")
            self._finish(running, self._respond(running.request, error=error))
            if running.task is not None:
                running.task.cancel()

    def abandon(self, asker: str) -> None:
        """Cancel the requests of an asker who is gone, as far as their verbs end with it."""
        for running in [one for some in self._running.values() for one in some]:
            if running.asker == asker and running.request.asked.ENDS_WITH_ASKER and running.task is not None:
                running.task.cancel()

    def _validated(self, arrival: Arrival, content: Content) -> Asked:
        vm = arrival.vm
        if arrival.refused is not None:
            raise arrival.refused
        if vm is not None and not self.vm_exists(vm):
            raise RequestRefused("unknown-vm", f"no VM {mirrored(vm)!r} here")
        return read_asked(arrival.verb, "host" if vm is None else "vm", content)

    def _start(self, request: Request, arrival: Arrival) -> None:
        transaction, reply = request.transaction, arrival.reply
        key = None if transaction is None else (arrival.channel, encode(transaction, "json"))
        if key is not None:
            self._forget_old()
            if key in self._remembered:
                reply(_unpacked(self._remembered[key][1]))
                return
        joined = None if key is None else self._joinable.get(key)
        waiting = self._running.setdefault(request.vm, [])
        if self._group is None:
            self.note_answer(request.verb, "offline")
            reply(self._respond(request, error=RequestRefused("offline", "the agent stops")))
        elif not _has_room(waiting, arrival.asker) if joined is None else len(joined.replies) >= MOST_WAITING:
            error = RequestRefused("busy", f"{MOST_WAITING} requests wait already: send fewer at a time")
            self.note_answer(request.verb, error.code)
            reply(self._respond(request, error=error))
        elif joined is not None:
            joined.replies.append(reply)
        else:
            running = _Running(request, key, [reply], arrival.asker)
            waiting.append(running)
            if key is not None:
                self._joinable[key] = running
            running.task = self._group.create_task(self._run(running), name=f"request {request.verb}")
        if not waiting:
            del self._running[request.vm]

    async def _run(self, running: _Running) -> None:
        request = running.request
        response = self._respond(request, error=RequestRefused("internal", "a bug in the agent: see its log"))
        try:
            request.refuse_if_expired(self.clock())
            response = self._respond(request, result=await self.handle(request))
        except QmpBalloonError as error:
            response = self._respond(request, error=error)
        except asyncio.CancelledError:
            response = self._respond(request, error=RequestRefused("offline", "the agent stops"))
            raise
        finally:
            self._finish(running, response)

    def _finish(self, running: _Running, response: Mapping[str, object]) -> None:
        if running.answered:
            return
        running.answered = True
        waiting = self._running[running.request.vm]
        waiting.remove(running)
        if not waiting:
            del self._running[running.request.vm]
        if running.key is not None:
            del self._joinable[running.key]
        self.note_answer(running.request.verb, _outcome(response))
        for reply in running.replies:
            reply(response)
        if running.key is not None:
            self._remember(running.key, response)

    def _remember(self, key: _Key, response: Mapping[str, object]) -> None:
        packed = _packed(response)
        self._remembered[key] = (self.clock(), packed)
        self._remembered_bytes += len(packed)
        while len(self._remembered) > MOST_REMEMBERED or self._remembered_bytes > MOST_REMEMBERED_BYTES:
            self._forget_oldest()

    def _forget_oldest(self) -> None:
        _, (_, packed) = self._remembered.popitem(last=False)
        self._remembered_bytes -= len(packed)

    def _forget_old(self) -> None:
        oldest_kept_s = self.clock() - REMEMBERED_S
        while self._remembered:
            answered_at_s, _ = next(iter(self._remembered.values()))
            if answered_at_s >= oldest_kept_s:
                return
            self._forget_oldest()

    def _respond(
        self, request: Request, *, result: object = None, error: QmpBalloonError | None = None
    ) -> Mapping[str, object]:
        return self._response(request.vm, request.verb, request.transaction, result=result, error=error)

    def _response(
        self,
        vm: str | None,
        verb: str,
        transaction: object,
        *,
        result: object = None,
        error: QmpBalloonError | None = None,
    ) -> Mapping[str, object]:
        vm = None if vm is None else mirrored(vm)
        return response_object(transaction, vm, mirrored(verb), utc_now(), result=result, error=error)


def _content(arrival: Arrival) -> Content:
    payload = arrival.payload
    return payload if isinstance(payload, Content) else decode_request(payload, arrival.content_type)


def _has_room(running: list[_Running], asker: str) -> bool:
    """Tell whether one more request may run."""
    if len(running) < MOST_WAITING:
        return True
    return len(running) < MOST_WAITING_IN_ALL and all(one.asker != asker for one in running)


def _outcome(response: Mapping[str, object]) -> str:
    error = response["error"]
    return str(error["code"]) if isinstance(error, Mapping) else "ok"


def _packed(response: Mapping[str, object]) -> bytes:
    return zlib.compress(encode(response, "json"), level=1)


def _unpacked(packed: bytes) -> Mapping[str, object]:
    response: Mapping[str, object] = json.loads(zlib.decompress(packed))
    return response
