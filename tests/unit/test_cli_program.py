"""The command line as a whole: verbs, help, errors, exit codes, completion."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qmpballoon import __version__
from qmpballoon.cli import main
from qmpballoon.cli.program import exit_code
from qmpballoon.errors import (
    AnotherAgentRuns,
    ConfigurationError,
    ConnectionLost,
    InvalidSize,
    MonitorBusy,
    NoAnswer,
    NoBalloon,
    NotReached,
    NotReady,
    OutOfRange,
    QmpBalloonError,
    QmpError,
    RequestRefused,
    Unreachable,
)
from qmpballoon.model.records import VmState

VERBS = (
    *("agent", "status", "set", "watch", "top", "doctor", "wait", "pulse", "why", "ctl", "forget"),
    *("simulate", "check-config", "demo"),
)
HEAVY = ("aiomqtt", "paho", "uvloop", "msgpack", "shtab", "qmpballoon.lab", "qmpballoon.agent.app")


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_every_verb_has_a_sentence_and_examples(
    verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([verb, "--help"]) == 0
    output = capsys.readouterr().out
    assert output.startswith(f"usage: qmpballoon {verb}")
    assert f"\n  qmpballoon {verb}" in output.partition("examples:")[2]


def test_the_help_names_every_verb_and_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    output = capsys.readouterr().out
    assert all(f"\n    {verb} " in output for verb in VERBS)
    assert all(f"{code} " in output.partition("exit codes:")[2] for code in (0, 1, 2, 3, 4, 130))


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"qmpballoon {__version__}\n"


def test_no_help_imports_mqtt_or_another_heavy_module() -> None:
    code = (
        "import sys; from qmpballoon.cli import main\n"
        f"for verb in {VERBS!r}: main([verb, '--help'])\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert done.stderr == "[]\n"
    assert done.stdout.count("usage: ") == len(VERBS)


@pytest.mark.parametrize(
    ("argv", "output"),
    [
        ([], "say what to do: agent, status"),
        (["stauts"], "there is no verb 'stauts'; did you mean status?"),
        (["xyz"], "there is no verb 'xyz'; there are agent, status"),
        (["set", "a.qmp"], "arguments are required: SIZE"),
        (["set", "a.qmp", "512M"], "'512M' is no size: write 512MiB"),
        (["set", "a.qmp", "0"], "must be more than zero"),
        (["set", "a.qmp", "1GiB", "--wait=soon"], "'soon' is no time; write seconds"),
        (["status", "--timeout", "-1"], "--timeout"),
        (["watch", "--interval", "nan"], "'nan' is no time"),
        (["agent", "--mode", "x"], "invalid choice: 'x'"),
        (["agent", "--bugdet", "1GiB"], "--bugdet; did you mean --budget? (see qmpballoon agent --help)"),
        (["set", "a", "1GiB", "b"], "'b' is one word too many (see qmpballoon set --help)"),
        (["agent", "--vm", "a.qmp", "--vm", "b.qmp"], "is the agent of one VM"),
        (["agent", "--vm", "*.qmp"], "takes the socket of one VM, and no glob: *.qmp"),
        (["agent", "/"], "command line: SOCKET: / is a directory"),
        (["set", "", "128MiB"], "is empty: name a socket"),
        (["wait", "a.qmp", "available"], "compare it with a size, such as 'available>200MiB'"),
        (["forget", "r*"], "'r*' is a glob"),
        (["ctl", "web", "get"], "get is asked of a VM, not of the host: name it as HOST/VM"),
    ],
)
def test_a_mistyped_command_is_one_line_on_stderr_and_exit_2(
    argv: list[str], output: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("qmpballoon: ")
    assert captured.err.count("\n") == 1
    assert output in captured.err


_STATE = VmState("running", 2, 1, None, None)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (QmpBalloonError("x"), 1),
        (NoBalloon("x"), 1),
        (QmpError("stop", "GenericError", "no"), 1),
        (ConfigurationError("file", []), 2),
        (InvalidSize("x", "y"), 2),
        (OutOfRange("x"), 2),
        (AnotherAgentRuns("host", "dir"), 2),
        (Unreachable("x"), 3),
        (MonitorBusy("x"), 3),
        (ConnectionLost("x"), 3),
        (NoAnswer("x"), 3),
        (RequestRefused("unknown-verb", "x"), 2),
        (NotReached(1, _STATE, 1.0), 4),
        (NotReady("x"), 4),
    ],
)
def test_every_error_has_its_exit_code(error: QmpBalloonError, code: int) -> None:
    assert exit_code(error) == code


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish", "tcsh"])
def test_the_completion_has_every_verb(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--print-completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(verb in script for verb in VERBS)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_shell_can_read_its_completion(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    main(["--print-completion", shell])
    script = capsys.readouterr().out
    done = subprocess.run(
        [shell, "-n"], input=script, text=True, capture_output=True, check=False, timeout=30
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(shutil.which("fish") is None, reason="fish is not installed")
@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("stat", {"status"}),
        ("agent --mode ", {"auto", "manual", "observe"}),
        ("set --fo", {"--force"}),
        ("status --fo", set()),  # an option of another verb
        ("check-config {}/a", {"{}/agent.toml"}),
        ("agent --state-dir {}/s", {"{}/state/"}),
        ("agent --budget {}/a", set()),  # a size is no file
    ],
)
def test_fish_offers_what_fits(
    typed: str, offered: set[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "agent.toml").touch()
    (tmp_path / "state").mkdir()
    main(["--print-completion", "fish"])
    (tmp_path / "completion").write_text(capsys.readouterr().out, encoding="utf-8")
    code = f"source {tmp_path}/completion; complete -C 'qmpballoon {typed.format(tmp_path)}'"
    environment = {**os.environ, "HOME": str(tmp_path)}
    done = subprocess.run(
        ["fish", "--no-config", "-c", code],
        text=True,
        capture_output=True,
        env=environment,
        timeout=30,
        check=True,
    )
    words = {line.split("\t")[0] for line in done.stdout.splitlines()}
    assert words == {word.format(tmp_path) for word in offered}


def test_the_bash_completion_completes_sockets_and_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["--print-completion", "bash"])
    script = capsys.readouterr().out
    for argument in ("status_pos_0", "set_pos_0", "watch_pos_0", "check_config_pos_0", "agent___config"):
        assert f"_shtab_qmpballoon_{argument}_COMPGEN=_shtab_compgen_files" in script
    assert "_shtab_qmpballoon_agent___state_dir_COMPGEN=_shtab_compgen_dirs" in script
    checked = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True, timeout=30)
    assert (checked.returncode, checked.stderr) == (0, "")


def test_a_closed_stdout_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "qmpballoon", "agent", "--print-default-config"],
        stdout=writing,
        stderr=subprocess.PIPE,
        timeout=30,
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize(
    "typed", [("agent", "--print-default-config"), ("--help",), ("simulate", "--help"), ("why", "--help")]
)
def test_output_that_cannot_be_written_is_one_line_and_exit_1(typed: tuple[str, ...]) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "qmpballoon", *typed], stdout=full, stderr=subprocess.PIPE, timeout=30
        )
    assert done.returncode == 1
    assert done.stderr == b"qmpballoon: cannot write the output: No space left on device\n"


def test_another_error_is_not_taken_for_one_of_the_output(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object, **__: object) -> None:
        raise ExceptionGroup("two", [OSError(errno.ENOSPC, "no space"), ValueError("another")])

    monkeypatch.setattr("qmpballoon.cli.check_config.load", failing)
    with pytest.raises(ExceptionGroup):
        main(["check-config", "x.toml"])


def test_an_interruption_while_the_program_is_loaded_prints_no_traceback() -> None:
    interrupted = """
import sys
class Finder:
    def find_spec(self, name, *_):
        if name == "qmpballoon.cli.program":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Finder())
from qmpballoon.cli import main
sys.exit(main(["status"]))
"""
    done = subprocess.run([sys.executable, "-c", interrupted], capture_output=True, timeout=30)
    assert (done.returncode, done.stderr) == (130, b"")


def test_an_interruption_is_exit_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("qmpballoon.cli.check_config.load", interrupted)
    assert main(["check-config", "x.toml"]) == 130


def test_a_demo_without_its_programs_names_the_packages(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    assert main(["demo"]) == 1
    output = capsys.readouterr().err
    assert output.startswith("qmpballoon: not installed: ")
    assert "apt-get install" in output
    assert output.count("\n") == 1


@pytest.mark.parametrize(
    "argv",
    [
        ["status", "/nowhere/a\nqmpballoon: all is well\x1b[2J"],
        ["set", "/nowhere/a\nqmpballoon: all is well\x1b[2J", "1GiB"],
        ["check-config", "/nowhere/a\nqmpballoon: all is well\x1b[2J"],
        ["simulate", "/nowhere/a\nqmpballoon: all is well\x1b[2J"],
    ],
)
def test_untrusted_text_cannot_forge_a_second_error_line(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) != 0
    output = capsys.readouterr().err
    assert len(output.splitlines()) == 1
    assert "a?qmpballoon: all is well?[2J" in output


@pytest.mark.parametrize("columns", [None, "40", "80", "300"])
@pytest.mark.parametrize("verb", [(), *((verb,) for verb in VERBS)])
def test_every_help_page_fits_80_columns(
    verb: tuple[str, ...],
    columns: str | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns is not None:
        monkeypatch.setenv("COLUMNS", columns)
    assert main([*verb, "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 5
    assert [line for line in lines if len(line) > 80] == []


@pytest.mark.parametrize(
    ("typed", "reason"),
    [
        (["set", "a.qmp", "-64MiB"], "argument SIZE: out of range: the size '-64MiB' must be more than zero"),
        (["set", "a.qmp", "-5%"], "argument SIZE: out of range: the size '-5%' must be more than zero"),
        (["set", "a.qmp", "0"], "argument SIZE: out of range: the size '0' must be more than zero"),
        (["set", "a.qmp", "1GiB", "--wait", "-3"], "argument --wait: '-3' is no time"),
        (["forget", "a/"], "argument HOST[/VM]: 'a/' is neither HOST nor HOST/VM"),
        (["forget", "/a"], "argument HOST[/VM]: '/a' is neither HOST nor HOST/VM"),
        (["agent", "--budget", "-64MiB"], "command line: --budget: must be more than zero"),
        (["agent", "--reserve", "-1.5GiB"], "command line: --reserve: must be more than zero"),
    ],
)
def test_a_wrong_value_is_named_and_a_negative_one_is_no_option(
    typed: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(typed) == 2
    assert capsys.readouterr().err.startswith(f"qmpballoon: {reason}")
