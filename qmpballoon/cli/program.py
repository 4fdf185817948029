"""The parser, the choice of the verb, and errors: one line on stderr and an exit code."""

from __future__ import annotations

import argparse
import errno
import importlib
import io
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from itertools import groupby
from typing import Any, Final, NoReturn, Protocol, cast

from qmpballoon.cli.signals import Ended, ended_as_by_ctrl_c
from qmpballoon.descriptors import open_standard
from qmpballoon.errors import (
    AnotherAgentRuns,
    ConfigurationError,
    ConnectionLost,
    InvalidSize,
    MonitorBusy,
    NoAnswer,
    NotReached,
    NotReady,
    OutOfRange,
    QmpBalloonError,
    RequestRefused,
    Unreachable,
)
from qmpballoon.readers import did_you_mean
from qmpballoon.terminal import clean, print_error

DONE: Final = 0
FAILED: Final = 1
WRONG_USAGE: Final = 2  # or a wrong configuration, or another agent of this name runs
CANNOT_REACH: Final = 3
NOT_IN_TIME: Final = 4
INTERRUPTED: Final = 130  # 128 + SIGINT, as shells have it
_SIGNALLED: Final = 128
_CANNOT_WRITE: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)

_CODES: Final = {  # of an agent's answers
    "malformed": WRONG_USAGE,
    "unknown-verb": WRONG_USAGE,
    "out-of-range": WRONG_USAGE,
    "offline": CANNOT_REACH,
    "busy": CANNOT_REACH,
    "unknown-vm": CANNOT_REACH,
    "not-reached": NOT_IN_TIME,
    "no-driver": NOT_IN_TIME,
}
_WIDEST: Final = 80
_NARROWEST: Final = 40
_NEGATIVE: Final = re.compile(r"-\.?[0-9]")

_VERBS: Final = {
    "agent": "Control this host's VMs, with state and requests over MQTT.",
    "status": "Show the size of each VM and the statistics of its guest.",
    "set": "Set the balloon target of a VM.",
    "watch": "Stream the events and figures of VMs until interrupted.",
    "top": "Show every host and VM on a broker, or of this machine, live.",
    "doctor": "Tell what each VM's balloon can and cannot do, and what mends it.",
    "ctl": "Ask VMs or hosts over MQTT, and print their agents' answers.",
    "wait": "Wait until a VM is ready, at its target, or a figure of it has some size.",
    "pulse": "Take what an idle guest can spare, and give all of it back.",
    "why": "Explain the last decisions about a VM, with the figures of each.",
    "forget": "Clear what a host or VM that is gone has left on the broker.",
    "simulate": "Run policies on workload traces in the simulator: figures, reasons, a drawing.",
    "check-config": "Check a configuration file, or show what it puts in force.",
    "demo": "Demonstrate everything with real guests and a real broker.",
}
_EPILOG: Final = """\
examples:
  qmpballoon status                          the VMs under /run/qmpballoon
  qmpballoon set /run/qmpballoon/web1.qmp 256MiB --wait
  qmpballoon agent --broker mqtt://localhost
  qmpballoon demo                            a demonstration with real guests

A VM is reached through a QMP socket; give QEMU one for this program alone:
  -device virtio-balloon-pci,deflate-on-oom=on,free-page-reporting=on
  -qmp unix:/run/qmpballoon/NAME.qmp,server=on,wait=off

Sizes are 512MiB, 1.5GiB, 500MB (1000s), 50% (of the VM's size) or bytes.

exit codes:
  0 done    1 failed    3 cannot reach the VM or the broker
  2 wrong usage or configuration, or another agent of this name runs
  4 not reached in time    130 interrupted    143 ended by SIGTERM

shell completion:
  qmpballoon --print-completion bash \\
    > ~/.local/share/bash-completion/completions/qmpballoon
"""


class Verb(Protocol):
    """The interface of a verb's module."""

    EXAMPLES: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the verb's arguments."""

    def run(self, arguments: argparse.Namespace) -> int:
        """Run the verb and return the exit code."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (None: that of this process) and return its exit code."""
    typed = sys.argv[1:] if argv is None else list(argv)
    try:
        open_standard()
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")  # names of VMs may have any characters
        code = _run(typed)
        sys.stdout.flush()
    except (OSError, BaseExceptionGroup) as error:
        return _output_failed(error)
    except Ended as ended:
        return _SIGNALLED + ended.number
    except KeyboardInterrupt:
        return INTERRUPTED
    return code


def exit_code(error: QmpBalloonError) -> int:
    """Return the exit code of an error."""
    match error:
        case ConfigurationError() | InvalidSize() | OutOfRange() | AnotherAgentRuns():
            return WRONG_USAGE
        case Unreachable() | MonitorBusy() | ConnectionLost() | NoAnswer():
            return CANNOT_REACH
        case NotReached() | NotReady():
            return NOT_IN_TIME
        case RequestRefused(code=word):
            return _CODES.get(word, FAILED)
        case _:
            return FAILED


def complete_parser() -> argparse.ArgumentParser:
    """Return the parser with all verbs and their arguments; making it imports each verb's module."""
    return _parser(with_arguments=tuple(_VERBS))


def verbs_of(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Return the parser of each verb."""
    found = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return dict(found.choices)


def _run(typed: list[str]) -> int:
    verb = next((word for word in typed if not word.startswith("-")), None)
    try:
        parser = _parser(with_arguments=(verb,) if verb in _VERBS else ())
        arguments, unknown = parser.parse_known_args(typed)
        if unknown:
            verbs_of(parser)[arguments.verb].error(_unknown(unknown[0], verbs_of(parser)[arguments.verb]))
    except SystemExit as ended:  # raised by argparse after --help or an error
        sys.stdout.flush()
        return ended.code if isinstance(ended.code, int) else FAILED
    has_its_own = arguments.verb == "agent"
    signals: AbstractContextManager[None] = nullcontext() if has_its_own else ended_as_by_ctrl_c()
    try:
        with signals:
            return _module(arguments.verb).run(arguments)
    except ConfigurationError as error:
        print_error("\n".join(clean(line) for line in error.lines))
        return exit_code(error)
    except QmpBalloonError as error:
        print_error(clean(error))
        return exit_code(error)


def _unknown(word: str, parser: argparse.ArgumentParser) -> str:
    """Return what is wrong with a word that a verb does not take."""
    if not word.startswith("-"):
        return f"{word!r} is one word too many"
    option = word.partition("=")[0]
    return f"there is no option {option}{did_you_mean(option, parser._option_string_actions)}"


def _module(verb: str) -> Verb:
    return cast(Verb, importlib.import_module(f"qmpballoon.cli.{verb.replace('-', '_')}"))


def _parser(*, with_arguments: Sequence[str | None]) -> argparse.ArgumentParser:
    """Return the parser with all verbs; only those in ``with_arguments`` have their arguments."""
    parser = _Parser(
        prog="qmpballoon",
        description="Moves memory between QEMU guests over their monitors; state and requests over MQTT.",
        epilog=_EPILOG,
        formatter_class=_Help,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    parser.add_argument(
        "--print-completion",
        action=_PrintCompletion,
        choices=("bash", "zsh", "fish", "tcsh"),
        metavar="SHELL",
        help="print completion for bash, zsh, fish or tcsh and exit",
    )
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", title="verbs", required=True)
    for verb, sentence in _VERBS.items():
        module = _module(verb) if verb in with_arguments else None
        below = verbs.add_parser(
            verb,
            help=sentence[0].lower() + sentence[1:].rstrip("."),
            description=sentence,
            epilog=module.EXAMPLES if module else None,
            formatter_class=_Help,
        )
        if module:
            module.add_arguments(below)
    return parser


class _Help(argparse.RawDescriptionHelpFormatter):
    """Fills paragraphs to the width of the terminal, at most 80 columns; indented lines stay as they are."""

    def __init__(self, prog: str) -> None:
        width = max(_NARROWEST, min(_WIDEST, shutil.get_terminal_size().columns - 2))
        super().__init__(prog, max_help_position=30, width=width)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        lines: list[str] = []
        for is_filled, group in groupby(text.splitlines(), key=lambda line: line[:1].strip() != ""):
            same = list(group)
            lines += textwrap.wrap(" ".join(same), width, break_on_hyphens=False) if is_filled else same
        return "\n".join(lines)


class _Parser(argparse.ArgumentParser):
    """Prints an error on one line, and takes ``-64MiB`` for a value, which is out of range, and no option."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self._negative_number_matcher = _NEGATIVE

    def _print_message(self, message: str, file: Any = None) -> None:
        """Print help, and do not ignore that it cannot be written, as argparse does."""
        (file or sys.stderr).write(message)

    def error(self, message: str) -> NoReturn:
        if message.startswith("the following arguments are required: VERB"):
            message = f"say what to do: {', '.join(_VERBS)}"
        elif message.startswith("argument VERB: invalid choice: "):
            word = message.split("'")[1]
            meant = did_you_mean(word, _VERBS) or f"; there are {', '.join(_VERBS)}"
            message = f"there is no verb {word!r}{meant}"
        print_error(f"{clean(message)} (see {self.prog} --help)")
        sys.exit(WRONG_USAGE)


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from qmpballoon import __version__

        print(f"qmpballoon {__version__}")
        sys.exit(DONE)


class _PrintCompletion(argparse.Action):
    def __call__(
        self, parser: argparse.ArgumentParser, namespace: object, shell: object, option: object = None
    ) -> NoReturn:
        complete = complete_parser()
        if shell == "fish":
            from qmpballoon.cli.fish import fish_completion

            print(fish_completion(complete, verbs_of(complete)))
            sys.exit(DONE)
        import shtab

        for action in _actions(complete):
            if "SOCKET" in str(action.metavar) or "FILE" in str(action.metavar):
                action.complete = shtab.FILE  # type: ignore[attr-defined]
            elif "DIR" in str(action.metavar):
                action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
        print(shtab.complete(complete, str(shell)))
        sys.exit(DONE)


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from _actions(below)


def _output_failed(error: OSError | BaseExceptionGroup) -> int:
    """Return the exit code if nothing but the output failed: a reader that closed it is no error.

    Raises:
        OSError, BaseExceptionGroup: ``error``, if it is another one.
    """
    leaves = list(_leaves(error))
    is_closed = all(isinstance(leaf, BrokenPipeError) for leaf in leaves)
    if not is_closed and not all(_is_of_output(leaf) for leaf in leaves):
        raise error
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)  # for the interpreter's last flush
    os.close(null)
    if is_closed:
        return DONE
    with suppress(OSError):
        print_error(f"cannot write the output: {getattr(leaves[0], 'strerror', '')}")
    return FAILED


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for each in error.exceptions:
            yield from _leaves(each)
    else:
        yield error


def _is_of_output(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.filename is None and error.errno in _CANNOT_WRITE
