"""Trace files: parsing, defaults, and errors of invalid files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qmpballoon.errors import ConfigurationError
from qmpballoon.policy.registry import simulated
from qmpballoon.sim.guest import Behaviour
from qmpballoon.sim.host import play
from qmpballoon.sim.trace import Demand, Trace, parse_trace, read_trace
from qmpballoon.sim.traces import BUILT_IN, built_in
from qmpballoon.units import MIB

EXAMPLES = Path(__file__).parents[2] / "examples" / "traces"


def a_document(**changes: object) -> dict[str, object]:
    return {
        "schema": 1,
        "name": "burst",
        "about": "one sentence",
        "duration_s": 600,
        "host": {"mem_total": 8589934592, "budget": 6442450944},
        "vms": [a_vm()],
    } | changes


def a_vm(**changes: object) -> dict[str, object]:
    return {
        "name": "a",
        "size": 1073741824,
        "floor": 268435456,
        "ceiling": 1073741824,
        "shares": 1000,
        "base": 57671680,
        "deflate_on_oom": False,
        "inflate_bytes_per_s": 134217728,
        "deflate_bytes_per_s": 268435456,
        "stats_interval_s": 2,
        "behaviour": "ideal",
        "limit": None,
        "boots_at_s": 0,
        "resets_at_s": [],
        "demand": [[0, 104857600, 20971520], [60, 629145600, 0]],
    } | changes


def parsed(document: object) -> Trace:
    return parse_trace(json.dumps(document).encode(), source="burst.json")


def problems(content: bytes) -> list[str]:
    with pytest.raises(ConfigurationError) as caught:
        parse_trace(content, source="trace.json")
    return [str(problem) for problem in caught.value.problems]


def test_a_trace_is_read_as_it_is_documented() -> None:
    trace = parsed(a_document())
    assert (trace.name, trace.duration_s, trace.budget, trace.unknown) == ("burst", 600.0, 6442450944, ())
    vm = trace.vms[0]
    assert (vm.floor, vm.base, vm.behaviour, vm.limit) == (268435456, 57671680, Behaviour.IDEAL, None)
    assert vm.demand == (Demand(0.0, 104857600, 20971520), Demand(60.0, 629145600, 0))


def test_optional_keys_have_defaults() -> None:
    trace = parsed(
        {
            "duration_s": 10,
            "host": {"budget": 6442450944},
            "vms": [{"name": "a", "size": 1073741824, "demand": [[0, 0, 0]]}],
        }
    )
    vm = trace.vms[0]
    assert (trace.name, trace.mem_total) == ("burst", 6442450944)
    assert (vm.floor, vm.ceiling, vm.shares, vm.base) == (268435456, 1073741824, 1000, 55 * MIB)


@pytest.mark.parametrize(
    ("document", "place"),
    [
        (a_document(schema=2), "schema: this program reads schema 1"),
        (a_document(duration_s=0), "duration_s: must be a number from 0.1"),
        (a_document(duration_s="10"), "duration_s: must be a number"),
        (a_document(host={"budget": 1.5}), "host.budget: must be a whole number"),
        (a_document(host=[]), "host: must be an object with mem_total, budget"),
        (a_document(host=None), "host: must be an object with mem_total, budget"),
        (a_document(vms=[]), "vms: must be a list of 1 to 10000 VMs"),
        (a_document(vms=[a_vm(), a_vm()]), "vms: the name 'a' is given to more than one VM"),
        (a_document(vms=[a_vm(name="")]), "vms[0].name: must be text"),
        (a_document(vms=[a_vm(size="1GiB")]), "vms[0].size: must be a whole number of bytes"),
        (a_document(vms=[a_vm(size=True)]), "vms[0].size: must be a whole number of bytes"),
        (a_document(vms=[a_vm(size=-5)]), "vms[0].size: must be a whole number of bytes from 1"),
        (
            a_document(vms=[a_vm(size=10**30)]),
            "vms[0].size: must be a whole number of bytes from 1 to 9007199254740992, not",
        ),
        (a_document(vms=[a_vm(floor=2**30 + 1)]), "vms[0]: floor 1073741825 <= ceiling"),
        (a_document(vms=[a_vm(base=2**30)]), "vms[0].base: must be less than the size"),
        (a_document(vms=[a_vm(behaviour="lazy")]), "vms[0].behaviour: must be one of ideal, slow"),
        (a_document(vms=[a_vm(behaviour="limited")]), "vms[0].limit: a limited VM needs one"),
        (a_document(vms=[a_vm(deflate_on_oom=1)]), "vms[0].deflate_on_oom: must be true or false"),
        (a_document(vms=[a_vm(resets_at_s=[5, 3])]), "vms[0].resets_at_s[1]: its time 3 is before"),
        (a_document(vms=[a_vm(resets_at_s=["x"])]), "vms[0].resets_at_s[0]: must be a number"),
        (a_document(vms=[a_vm(demand=[])]), "vms[0].demand: must be a list of rows"),
        (a_document(vms=[a_vm(demand=[[0, 1]])]), "vms[0].demand[0]: must be [time, anonymous"),
        (
            a_document(vms=[a_vm(demand=[[0, -1, 0]])]),
            "vms[0].demand[0].anonymous: must be a whole number of bytes from 0",
        ),
        (a_document(vms=[a_vm(demand=[[5, 1, 0], [4, 1, 0]])]), "vms[0].demand[1]: its time 4 is before"),
        ([], "must be an object with schema, name"),
        (a_document(vms=[7]), "vms[0]: must be an object with name, size"),
    ],
)
def test_an_error_is_reported_with_its_path(document: object, place: str) -> None:
    found = problems(json.dumps(document).encode())
    assert [text for text in found if text.startswith(place)], found


def test_all_errors_are_reported_at_once() -> None:
    document = a_document(duration_s=-1, vms=[a_vm(size=None), a_vm(name="b", shares=0)])
    found = problems(json.dumps(document).encode())
    assert {text.partition(":")[0] for text in found} >= {"duration_s", "vms[0].size", "vms[1].shares"}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"{",
        b"[" * 100_000,
        b'{"duration_s": NaN}',
        b'{"duration_s": Infinity}',
        b'{"duration_s": 1e999}',
        b'{"duration_s": ' + b"9" * 5000 + b"}",
        b'{"name": "a", "name": "b"}',
        b"null",
    ],
)
def test_content_that_is_no_trace_is_refused(content: bytes) -> None:
    assert problems(content)


def test_broken_json_is_reported_with_its_line() -> None:
    assert problems(b'{\n "name": "a",\n oops\n}')[0].startswith("line 3: no JSON")


def test_an_unknown_key_is_ignored_and_reported_with_a_suggestion() -> None:
    trace = parsed(a_document(vms=[a_vm(celing=5)]))
    assert [str(problem) for problem in trace.unknown] == [
        "vms[0].celing: is not known and ignored; did you mean ceiling?"
    ]


def test_a_missing_file_is_an_error_with_a_reason(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot be read: No such file"):
        read_trace(tmp_path / "none.json")


@pytest.mark.parametrize("kind", BUILT_IN)
def test_a_built_in_trace_is_a_valid_file_and_the_same_for_the_same_seed(kind: str) -> None:
    trace = built_in(kind, 5)
    assert parsed(trace.document()) == trace
    assert built_in(kind, 5) == trace
    assert built_in(kind, 6).vms != trace.vms


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.json")), ids=lambda path: path.stem)
def test_an_example_trace_can_be_played(path: Path) -> None:
    trace = read_trace(path)
    run = play(trace, simulated("fixed"))
    assert trace.about
    assert trace.unknown == ()
    assert run.figures.trace == trace.name
    assert run.figures.shortfall_percent >= 0
