"""``ctl``: what typed words ask, and how answers are printed."""

from __future__ import annotations

import pytest

from qmpballoon.cli import main
from qmpballoon.cli.answer_lines import lines_of
from qmpballoon.cli.ctl import read_question
from qmpballoon.errors import RequestRefused
from qmpballoon.protocol.verbs import Scope
from qmpballoon.units import MIB


@pytest.mark.parametrize(
    ("verb", "scope", "words", "arguments"),
    [
        ("get", "vm", [], {}),
        ("set-target", "vm", ["target=256MiB", "wait_s=10"], {"target": "256MiB", "wait_s": 10}),
        ("set-target", "vm", ["50%"], {"target": "50%"}),
        ("set-target", "vm", ["50%", "wait_s=3"], {"target": "50%", "wait_s": 3}),
        ("set-target", "vm", ["268435456"], {"target": 268435456}),
        ("set-limits", "vm", ["floor=null", "shares=2000"], {"floor": None, "shares": 2000}),
        ("set-mode", "vm", ["mode=manual", "for_s=0.5e1"], {"mode": "manual", "for_s": 5.0}),
        ("release", "host", ["hold-1"], {"hold": "hold-1"}),
        ("room", "host", ["2GiB"], {"size": "2GiB"}),
        ("reclaim", "host", ["1.5GiB"], {"size": "1.5GiB"}),
    ],
)
def test_words_become_arguments(
    verb: str, scope: Scope, words: list[str], arguments: dict[str, object]
) -> None:
    question = read_question(verb, scope, words)
    assert (question.verb, question.arguments) == (verb, arguments)


@pytest.mark.parametrize(
    ("typed", "reason"),
    [
        ("a/b set-targt 5MiB", "no verb 'set-targt'; did you mean set-target?"),
        ("a/b set-target targt=5MiB", "targt: unknown argument; did you mean target?"),
        ("a/b set-target target=5M", "target: the text '5M' is no size: write 5MiB (1024s) or 5MB (1000s)"),
        ("a/b set-target target=-5MiB", "target: must be more than zero"),
        ("a/b set-target 5MiB 6MiB", "target is given twice"),
        ("a/b set-target target=5MiB target=6MiB", "target is given twice"),
        ("a/b set-target", "set-target needs target"),
        ("a/b set-target target=NaN", "target: the text 'NaN' is no size"),
        ("a/b get x", "'x' is no KEY=VALUE"),
        ("a/b reclaim 5MiB", "reclaim is asked of the host, not of a VM"),
        ("a set-mode auto", "set-mode is asked of a VM, not of the host"),
        ("a/ get", "argument TARGET: 'a/' is neither HOST nor HOST/VM"),
        ("a/b/c get", "argument TARGET: 'a/b/c' is neither HOST nor HOST/VM"),
    ],
)
def test_what_the_agent_would_refuse_is_refused_before_a_broker_is_needed(
    typed: str, reason: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("QMPBALLOON_BROKER", raising=False)
    assert main(["ctl", *typed.split()]) == 2
    assert capsys.readouterr().err.startswith(f"qmpballoon: {reason}")


def test_a_text_that_is_json_of_many_values_stays_a_text() -> None:
    with pytest.raises(RequestRefused, match="must be one of"):
        read_question("set-mode", "vm", ['mode=["auto"]'])


def test_every_verb_stands_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ctl", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "    set-target target [wait_s]\n" in shown
    assert "    reclaim size [deadline_s] [hold_s]\n" in shown


def test_results_are_lines_with_units() -> None:
    assert lines_of({"target": 256 * MIB, "actual": 200 * MIB, "reached": False}) == [
        "target 256 MiB  actual 200 MiB  reached no"
    ]
    assert lines_of({"mode": "auto", "for_s": None}) == ["mode auto"]
    assert lines_of({"freed": MIB, "hold": "hold-1", "gave": {"web1": MIB}, "refused": {"db": "thin"}}) == [
        "freed 1 MiB  hold hold-1  gave web1 1 MiB  refused db thin"
    ]
    assert lines_of({"reloaded": True, "restart_needed": []}) == ["reloaded yes  restart_needed none"]
    assert lines_of([{"vm": "a", "size": MIB}, {"vm": "b", "size": None}]) == ["vm a  size 1 MiB", "vm b"]
    assert lines_of({}) == []
    assert lines_of(None) == []


def test_each_finding_is_a_line() -> None:
    finding = {"word": "no-driver", "severity": "error", "seen": "no driver is up", "means": "x", "mend": "y"}
    assert lines_of({"findings": [finding], "not_told": ["z"]}) == ["error  no-driver: no driver is up"]
    assert lines_of({"findings": [], "not_told": []}) == ["no findings"]


def test_a_vm_object_becomes_its_main_figures() -> None:
    vm = {
        "run_state": "running", "guest": {"available": 64 * MIB, "free": 1}, "health": "ok", "mode": "auto",
        "size": 256 * MIB, "actual": 128 * MIB, "why": "give", "uuid": "x", "rss": None,
    }  # fmt: skip
    assert lines_of(vm) == ["health ok  mode auto  size 256 MiB  actual 128 MiB  why give  available 64 MiB"]
