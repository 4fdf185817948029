"""``ctl``: asks VMs or hosts over MQTT, one request each, and prints the answers as they come."""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Final

from qmpballoon import terminal
from qmpballoon.cli.answer_lines import lines_of
from qmpballoon.cli.broker import ABOUT, add_broker_arguments, broker_access
from qmpballoon.cli.outcomes import error_object
from qmpballoon.cli.program import CANNOT_REACH, DONE, exit_code
from qmpballoon.errors import ConnectionLost, QmpBalloonError, RequestRefused, Unreachable
from qmpballoon.model.names import safe_name
from qmpballoon.protocol.verbs import VERBS, Scope, bare_argument, read_asked
from qmpballoon.readers import did_you_mean

if TYPE_CHECKING:
    from qmpballoon.client import Client

_MOST_AT_ONCE: Final = 64  # requests
_MOST_NAMED: Final = 8
_WIDTH: Final = 78


def _verbs_listed() -> Iterator[str]:
    for kinds, title in ((VERBS["vm"], "a VM:"), (VERBS["host"], "a host:")):
        yield f"  asked of {title}"
        for kind in kinds.values():
            words = [each.name if each.default is MISSING else f"[{each.name}]" for each in fields(kind)]
            yield f"    {kind.VERB} {' '.join(words)}".rstrip()[:_WIDTH]


_VERB_LINES: Final = "\n".join(_verbs_listed())
EXAMPLES: Final = f"""\
examples:
  qmpballoon ctl edge-7/web1 get --broker mqtt://localhost
  qmpballoon ctl edge-7/web1 set-target target=256MiB wait_s=30
  qmpballoon ctl edge-7/web1 set-target 50%       target needs no key
  qmpballoon ctl edge-7/web1 set-limits floor=128MiB shares=null
  qmpballoon ctl 'edge-7/*' set-mode auto         each VM of a host
  qmpballoon ctl '*/*' get --json | jq .result.actual
  qmpballoon ctl edge-7 reclaim size=2GiB deadline_s=60
  qmpballoon ctl '*' list
  qmpballoon ctl '*' room size=2GiB               where a new VM fits

TARGET is HOST/VM, or HOST for what a host is asked. Either part may be a quoted glob: it is matched with
the names that are retained on the broker.

verbs, and their arguments ([]: may be left out):
{_VERB_LINES}

Arguments are checked before anything is sent. null takes a limit back.

Answers are printed as they come, errors on stderr; those to room when all have come, most room first.
The exit code is that of the worst answer: 2 a bad argument, 3 no answer or a VM that is offline, 4 not
reached in time, 1 another error.

{ABOUT}"""


@dataclass(frozen=True, slots=True)
class Question:
    """What every target is asked; ``arguments`` are JSON values."""

    verb: str
    arguments: Mapping[str, Any]


class _Suggested(tuple[str, ...]):
    """Words for the shell's completion; others are taken as well, and refused with a better reason."""

    __slots__ = ()

    def __contains__(self, word: object) -> bool:
        return True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    words = _Suggested(dict.fromkeys(verb for verbs in VERBS.values() for verb in verbs))
    parser.add_argument("target", metavar="TARGET", type=_target, help="HOST/VM, HOST, or a quoted glob")
    parser.add_argument("request", metavar="REQUEST", choices=words, help="the verb that is asked")
    parser.add_argument(
        "words", nargs="*", metavar="KEY=VALUE", help="its arguments; its main one needs no key"
    )
    parser.add_argument("--json", action="store_true", help="print one object for each answer")
    add_broker_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the verb and return the exit code."""
    host, vm = arguments.target
    question = read_question(arguments.request, "host" if vm is None else "vm", arguments.words)
    is_glob = _is_glob(host) or _is_glob(vm or "")
    access = broker_access(arguments, fleet=is_glob)
    return asyncio.run(_ask(access.client, host, vm, question, is_glob=is_glob, as_json=arguments.json))


def read_question(verb: str, scope: Scope, words: Sequence[str]) -> Question:
    """Return what typed words ask: ``key=value`` each; the value of one argument may stand without a key.

    A value is a JSON number, ``true``, ``false`` or ``null``, else text.

    Raises:
        RequestRefused: ``unknown-verb``, ``malformed`` or ``out-of-range``: the agent would refuse it.
    """
    from qmpballoon.protocol.payloads import Content  # imports msgpack: not for --help

    kind = VERBS[scope].get(verb)
    given: dict[str, object] = {}
    bare = None if kind is None else bare_argument(kind)
    for word in words if kind is not None else ():
        key, is_named, value = word.partition("=")
        if not is_named and bare is None:
            raise RequestRefused("malformed", f"{word!r} is no KEY=VALUE")
        name, typed = (key, value) if is_named else (str(bare), word)
        if name in given:
            raise RequestRefused("malformed", f"{name} is given twice")
        given[name] = _value(typed)
    if kind is None and any(verb in verbs for verbs in VERBS.values()):
        of, name = (
            ("a VM, not of the host", "HOST/VM") if scope == "host" else ("the host, not of a VM", "HOST")
        )
        raise RequestRefused("unknown-verb", f"{verb} is asked of {of}: name it as {name}")
    read_asked(verb, scope, Content(arguments=given))
    return Question(verb, given)


def _value(text: str) -> object:
    try:
        value: object = json.loads(text, parse_constant=str)
    except (ValueError, RecursionError):
        return text
    return text if isinstance(value, str | list | dict) else value


async def _ask(
    client: Client, host: str, vm: str | None, question: Question, *, is_glob: bool, as_json: bool
) -> int:
    async with client:
        if not is_glob:
            targets, code = [safe_name(host) if vm is None else f"{safe_name(host)}/{safe_name(vm)}"], DONE
        else:
            targets, code = _matching(client, host, vm)
        places = asyncio.Semaphore(_MOST_AT_ONCE)
        output = _Output(question.verb, as_json=as_json, width=max(map(len, targets), default=0))

        async def ask(target: str) -> int:
            async with places:
                try:
                    result = await client.request(target, question.verb, **question.arguments)
                except ConnectionLost:
                    raise
                except QmpBalloonError as error:
                    output.failed(target, error)
                    return exit_code(error)
            output.answered(target, result)
            return DONE

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(ask(target), name=f"ask {target}") for target in targets]
        except* ConnectionLost as lost:
            raise _first(lost) from None
        output.end()
        return max([code, *(task.result() for task in tasks)])


def _matching(client: Client, host: str, vm: str | None) -> tuple[list[str], int]:
    """Return the targets that match globs, and the exit code if a host that matches is offline.

    Raises:
        Unreachable: nothing matches.
    """
    hosts = sorted(name for name in client.hosts if fnmatchcase(name, host))
    if not hosts:
        hint = did_you_mean(host, client.hosts) or f"; hosts are {_named(client.hosts)}"
        raise Unreachable(
            f"no host {host!r} is known to the broker{hint if client.hosts else '; it knows none'}"
        )
    offline = [name for name in hosts if not client.hosts[name].online]
    for name in offline:
        terminal.print_error(terminal.clean(f"{name}: offline: its agent is not connected to the broker"))
    asked = [name for name in hosts if name not in offline]
    code = CANNOT_REACH if offline else DONE
    if vm is None:
        return asked, code
    matching = sorted(
        each.id for each in client.vms.values() if each.host in asked and fnmatchcase(each.vm, vm)
    )
    if not matching and asked:
        raise Unreachable(f"no VM {vm!r} on {_named(asked)}")
    return matching, code


class _Output:
    """Prints answers: as lines, or as JSON objects; those to ``room`` at the end, the most room first."""

    def __init__(self, verb: str, *, as_json: bool, width: int) -> None:
        self._verb = verb
        self._as_json = as_json
        self._width = width
        self._rooms: list[tuple[str, Mapping[str, Any]]] = []  # by target

    def answered(self, target: str, result: object) -> None:
        if self._verb == "room" and isinstance(result, Mapping):
            self._rooms.append((target, result))
        else:
            self._print(target, result)

    def end(self) -> None:
        for target, result in sorted(self._rooms, key=lambda each: (-_room(each[1]), each[0])):
            self._print(target, result)

    def _print(self, target: str, result: object) -> None:
        if self._as_json:
            self._print_json(target, "ok", result, None)
            return
        for line in lines_of(result) or ["done"]:
            print(terminal.clean(f"{target.ljust(self._width)}  {line}".rstrip()), flush=True)

    def failed(self, target: str, error: QmpBalloonError) -> None:
        if self._as_json:
            self._print_json(target, "error", None, error_object(error))
            return
        reason = str(error).removeprefix(f"{target}: ")
        terminal.print_error(terminal.clean(f"{target}: {error.code}: {reason}"))

    def _print_json(self, target: str, status: str, result: object, error: object) -> None:
        terminal.print_json(
            {"target": target, "verb": self._verb, "status": status, "result": result, "error": error}
        )


def _room(result: Mapping[str, Any]) -> int:
    room = result.get("room")
    return room if isinstance(room, int) else 0


def _named(names: Iterable[str]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:_MOST_NAMED]) + (", ..." if len(listed) > _MOST_NAMED else "")


def _is_glob(text: str) -> bool:
    return any(character in text for character in "*?[")


def _target(text: str) -> tuple[str, str | None]:
    host, slash, vm = text.partition("/")
    if not host or (slash and not vm) or "/" in vm:
        raise argparse.ArgumentTypeError(f"{text!r} is neither HOST nor HOST/VM")
    return host, vm if slash else None


def _first(group: BaseExceptionGroup[ConnectionLost]) -> ConnectionLost:
    error = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error
