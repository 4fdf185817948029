"""The error tree: its classes, words and messages."""

from __future__ import annotations

import asyncio
import copy
import pickle
import re

import pytest

from qmpballoon import errors
from qmpballoon.cli.set import Refused
from qmpballoon.lab.waiting import eventually
from qmpballoon.model.records import GuestStats, VmState


def all_errors() -> list[type[errors.QmpBalloonError]]:
    found: list[type[errors.QmpBalloonError]] = []
    waiting = [errors.QmpBalloonError]
    while waiting:
        kind = waiting.pop()
        found.append(kind)
        waiting += kind.__subclasses__()
    return found


@pytest.mark.parametrize("kind", all_errors())
def test_every_error_has_a_stable_word_of_the_list(kind: type[errors.QmpBalloonError]) -> None:
    assert kind.code in errors.ERROR_WORDS


@pytest.mark.parametrize(
    "kind",
    [
        kind
        for kind in all_errors()
        if kind is not errors.QmpBalloonError and kind.__module__ == "qmpballoon.errors"
    ],
)
def test_every_error_stands_in_the_drawn_tree_with_its_bases(kind: type[errors.QmpBalloonError]) -> None:
    assert errors.__doc__ is not None
    outside = [base.__name__ for base in kind.__bases__ if base is not errors.QmpBalloonError]
    drawn = kind.__name__ + (f"({outside[0]})" if outside else "")
    assert re.search(rf"[├└] {re.escape(drawn)}\s", errors.__doc__)


@pytest.mark.parametrize(
    ("kind", "base"),
    [
        (errors.Unreachable, OSError),
        (errors.OutOfRange, ValueError),
        (errors.InvalidSize, ValueError),
        (errors.NotReady, TimeoutError),
        (errors.NotReached, TimeoutError),
    ],
)
def test_errors_can_be_caught_as_the_builtin_that_fits(kind: type, base: type) -> None:
    assert issubclass(kind, base)
    assert issubclass(kind, errors.QmpBalloonError)


@pytest.mark.parametrize(
    "kind", [errors.Unreachable, errors.MonitorBusy, errors.ConnectionLost, errors.NoBalloon]
)
def test_a_plain_error_has_the_message_it_was_given(kind: type[errors.QmpBalloonError]) -> None:
    assert str(kind("the socket /run/a.qmp is not there")) == "the socket /run/a.qmp is not there"


def test_an_error_of_qemu_keeps_its_facts() -> None:
    error = errors.QmpError("balloon", "GenericError", "Parameter 'target' expects a size")
    assert (error.command, error.error_class) == ("balloon", "GenericError")
    assert error.description == "Parameter 'target' expects a size"
    assert str(error) == "QEMU refused balloon: Parameter 'target' expects a size (GenericError)"


def test_not_reached_names_target_and_actual() -> None:
    state = VmState(run_state="running", size=300, actual=200, target=100, guest=None)
    error = errors.NotReached(100, state, 2.5)
    assert (error.target, error.state) == (100, state)
    assert all(fact in str(error) for fact in ("200 bytes", "100", "2.5 s"))


def test_a_refused_request_has_the_word_it_was_given() -> None:
    error = errors.RequestRefused("superseded", "a newer target came")
    assert (error.code, str(error)) == ("superseded", "a newer target came")
    assert errors.RequestRefused.code == "internal"


@pytest.mark.parametrize(
    ("problem", "sentence"),
    [
        (errors.Problem(3, "vm.floor", "is wrong"), "line 3: vm.floor: is wrong"),
        (errors.Problem(3, "", "is wrong"), "line 3: is wrong"),
        (errors.Problem(None, "--budget", "is wrong"), "--budget: is wrong"),
        (errors.Problem(None, "", "is wrong"), "is wrong"),
    ],
)
def test_a_problem_names_its_place_as_far_as_it_is_known(problem: errors.Problem, sentence: str) -> None:
    assert str(problem) == sentence


def test_a_configuration_error_is_one_line_per_problem() -> None:
    problems = [errors.Problem(1, "a", "x"), errors.Problem(None, "b", "y")]
    error = errors.ConfigurationError("agent.toml", problems)
    assert (error.source, error.problems) == ("agent.toml", tuple(problems))
    assert str(error) == "agent.toml: line 1: a: x\nagent.toml: b: y"


STATE = VmState("running", 300, 200, 100, GuestStats(available=5, age_s=0.5))
EXAMPLES: list[errors.QmpBalloonError] = [
    errors.QmpBalloonError("plain"),
    errors.Unreachable("the socket /run/a.qmp is not there"),
    errors.MonitorBusy("held"),
    errors.ConnectionLost("gone"),
    errors.QmpError("balloon", "GenericError", "no"),
    errors.NoBalloon("none"),
    errors.OutOfRange("too much"),
    errors.InvalidSize("512M", "write 512MiB"),
    errors.NotReady("no driver"),
    errors.NotReached(100, STATE, 2.5),
    errors.NoAnswer("nobody"),
    errors.RequestRefused("superseded", "a newer target came"),
    errors.ConfigurationError("a.toml", [errors.Problem(1, "a", "x"), errors.Problem(None, "", "y")]),
    errors.AnotherAgentRuns("edge-7", "/var/lib/qmpballoon"),
    errors.StateUnusable("/var/lib/qmpballoon", OSError(28, "No space left on device")),
    Refused(5, "too little"),
]


def test_there_is_an_example_of_every_error() -> None:
    assert {type(error) for error in EXAMPLES} >= {
        kind for kind in all_errors() if kind.__module__ in ("qmpballoon.errors", "qmpballoon.cli.set")
    }


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("way", ["copied", "pickled"])
def test_an_error_is_copied_and_pickled_completely(error: errors.QmpBalloonError, way: str) -> None:
    # Exception.__reduce__ passes the message to a constructor that takes facts: TypeError.
    other = copy.copy(error) if way == "copied" else pickle.loads(pickle.dumps(error))
    assert type(other) is type(error)
    assert (str(other), other.args, other.code) == (str(error), error.args, error.code)
    assert vars(other) == vars(error)
    assert repr(other) == repr(error)


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_the_message_is_the_only_argument_even_of_an_oserror(
    error: errors.QmpBalloonError,
) -> None:
    # OSError takes two or three arguments as errno, strerror and a file name, and prints those.
    assert error.args == (str(error),)
    if isinstance(error, OSError):
        assert (error.errno, error.strerror, error.filename) == (None, None, None)


async def test_not_reached_is_not_caught_as_a_timeout() -> None:
    # NotReached is a TimeoutError: raised late by the probe, it must not be reported as an expired wait.
    late = errors.NotReached(100, STATE, 2.5)

    async def probe() -> bool:
        await asyncio.sleep(0)
        clock.now_s += 1000
        raise late

    class Clock:
        now_s = 0.0

        def monotonic(self) -> float:
            return self.now_s

    clock = Clock()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("time.monotonic", clock.monotonic)
        with pytest.raises(errors.NotReached):
            await eventually(probe, bool, timeout_s=100, what="it is there")


def test_an_invalid_size_keeps_text_and_hint() -> None:
    error = errors.InvalidSize("512M", "write 512MiB")
    assert (error.text, error.hint, str(error)) == ("512M", "write 512MiB", "'512M' is no size: write 512MiB")


@pytest.mark.parametrize("word", errors.ERROR_WORDS)
def test_an_answered_word_becomes_an_error_of_that_word(word: str) -> None:
    error = errors.answered_error(word, "why")
    assert (error.code, str(error)) == (word, "why")


def test_an_answered_word_can_be_caught_as_the_failure_that_it_is() -> None:
    kinds = {
        "offline": errors.Unreachable,
        "no-balloon": errors.NoBalloon,
        "out-of-range": errors.OutOfRange,
        "no-driver": errors.NotReady,
        "busy": errors.RequestRefused,
    }
    assert {word: type(errors.answered_error(word, "why")) for word in kinds} == kinds
