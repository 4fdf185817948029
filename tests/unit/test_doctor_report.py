"""Findings as JSON and as text for a terminal."""

from __future__ import annotations

import json

import pytest

from qmpballoon.doctor.facts import ExaminedHost, ExaminedVm
from qmpballoon.doctor.findings import Finding, finding_of
from qmpballoon.doctor.report import (
    Examination,
    capabilities,
    examination_of,
    host_result,
    lines_of,
    merged,
    of_vm,
    summary,
    vm_result,
)

MONITOR = "`-qmp unix:/run/qmpballoon/NAME.qmp,server=on,wait=off`"
ERROR = Finding("monitor-busy", "error", "held by socat (pid 9)", "It serves one client.", f"give: {MONITOR}")
WARNING = Finding("psi-off", "warning", "it is off", "Stall is not known.", "`psi=1`")
NOTE = Finding("paused", "note", "the VM is paused", "It does not run.", "continue it")


def text_of(examination: Examination, *, width: int = 80, explained: set[str] | None = None) -> list[str]:
    told = set() if explained is None else explained
    return [line for _, line in lines_of("web", "/run/web.qmp", examination, width=width, explained=told)]


def test_a_finding_survives_json() -> None:
    assert finding_of(json.loads(json.dumps(ERROR.as_json()))) == ERROR


@pytest.mark.parametrize(
    "value", [None, [], {}, {**ERROR.as_json(), "severity": "bad"}, {**ERROR.as_json(), "seen": 3}]
)
def test_what_is_no_finding_is_left_out(value: object) -> None:
    assert finding_of(value) is None
    assert examination_of({"findings": [value, NOTE.as_json()]}).findings == [NOTE]


def test_an_answer_of_an_agent_is_sorted_and_made_harmless() -> None:
    answer = {"findings": [NOTE.as_json(), {**ERROR.as_json(), "seen": "\x1b[2J"}], "not_told": ["a\nb"]}
    examination = examination_of(answer)
    assert [finding.word for finding in examination.findings] == ["monitor-busy", "paused"]
    assert examination.findings[0].seen == "?[2J"
    assert examination.not_told == ["a?b"]
    assert examination_of("nonsense") == Examination([], {}, [], None)


def test_the_result_of_a_request_has_all_keys() -> None:
    assert set(vm_result(ExaminedVm("web", "/w", "busy"))) == {"findings", "can", "not_told", "qemu"}
    assert set(host_result(ExaminedHost())) == {"findings", "not_told"}


def test_errors_and_warnings_fail_and_notes_do_not() -> None:
    assert Examination([ERROR]).fails
    assert Examination([WARNING, NOTE]).fails
    assert not Examination([NOTE]).fails
    assert not Examination([]).fails
    assert [Examination(each).rank for each in ([ERROR, NOTE], [WARNING], [NOTE], [])] == [0, 1, 2, 3]


def test_findings_of_several_agents_are_told_once() -> None:
    both = merged([Examination([NOTE, WARNING], {}, ["x"]), Examination([ERROR, WARNING], {}, ["x", "y"])])
    assert both.findings == [ERROR, WARNING, NOTE]
    assert both.not_told == ["x", "y"]


def test_a_summary_counts() -> None:
    assert summary(Examination([ERROR, NOTE, NOTE])) == "1 error, 2 notes"
    assert summary(Examination([])) == "no findings"


def test_capabilities_are_words() -> None:
    can = {"driver": True, "statistics": False, "deflate_on_oom": "refused", "free_page_reporting": None}
    assert capabilities(can) == "driver up, no statistics, deflate-on-oom refused by the guest"
    assert capabilities({"driver": False, "frees": False}) == "no driver, frees no host memory"
    assert capabilities({"deflate_on_oom": ["\x1b"], "driver": "\x1b"}) == ""


def test_text_fits_and_what_must_be_typed_is_on_one_line() -> None:
    lines = text_of(Examination([ERROR], {"driver": True}, ["a sentence " * 12]))
    assert lines[0] == "web: 1 error  (/run/web.qmp)"
    assert lines[1] == "  driver up"
    assert lines[2] == "  ERROR   monitor-busy: held by socat (pid 9)"
    assert all(len(line) <= 80 for line in lines)
    assert [line for line in lines if MONITOR.strip("`") in line]
    assert "`" not in "".join(lines)


def test_what_a_word_means_is_told_once() -> None:
    explained: set[str] = set()
    first = text_of(Examination([NOTE]), explained=explained)
    again = text_of(Examination([NOTE]), explained=explained)
    assert [line for line in first if line not in again] == ["          It does not run."]


def test_a_vm_without_findings_is_one_line_and_its_abilities() -> None:
    assert text_of(of_vm(ExaminedVm("web", "/w", "busy")))[0] == "web: 1 error  (/run/web.qmp)"
    assert text_of(Examination([])) == ["web: no findings  (/run/web.qmp)"]
