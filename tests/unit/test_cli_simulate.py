"""``simulate``: the table, the JSON, the reasons and the drawing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import pytest

from qmpballoon.cli import main
from qmpballoon.policy.registry import simulated
from qmpballoon.sim.drawing import MOST_PANELS, draw
from qmpballoon.sim.host import play
from qmpballoon.sim.traces import built_in
from qmpballoon.units import MIB

KEYS = [
    "trace",
    "policy",
    "oom_kills",
    "vms_killed",
    "starved_vm_s",
    "over_budget_mib_s",
    "shortfall_percent",
    "lent_mib",
    "regret_mib",
    "moves_per_vm_h",
    "reversals_per_vm_h",
    "relief_p50_s",
    "relief_max_s",
]
PATIENCE_S = 30.0
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def trace(tmp_path: Path) -> str:
    """A minute in which b needs more than its part of the budget."""
    vms = [
        {"name": "a", "size": 512 * MIB, "demand": [[0, 50 * MIB, 0]]},
        {"name": "b", "size": 512 * MIB, "demand": [[0, 50 * MIB, 0], [10, 50 * MIB, 0], [50, 300 * MIB, 0]]},
    ]
    document = {"duration_s": 60, "host": {"budget": 600 * MIB}, "vms": vms}
    path = tmp_path / "tight.json"
    path.write_text(json.dumps(document))
    return str(path)


def test_the_json_has_one_entry_per_trace_and_policy(trace: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", trace, "--policy", "fixed", "--policy", "qubes", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [list(entry) for entry in found] == [KEYS, KEYS]
    fixed, qubes = found
    assert (fixed["trace"], fixed["policy"], qubes["policy"]) == ("tight", "fixed", "qubes")
    assert fixed["oom_kills"] > 0
    assert qubes["oom_kills"] == 0
    assert qubes["lent_mib"] > fixed["lent_mib"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_and_the_processes_that_play(number: signal.Signals) -> None:
    typed = [sys.executable, "-m", "qmpballoon", "simulate", "all"]
    running = subprocess.Popen(typed, stderr=subprocess.PIPE, start_new_session=True)
    try:
        children = f"/proc/{running.pid}/task/{running.pid}/children"
        ends_s = time.monotonic() + PATIENCE_S
        while not (workers := Path(children).read_text().split()):
            assert time.monotonic() < ends_s
            time.sleep(0.01)
        if number == signal.SIGINT:
            os.killpg(running.pid, number)  # as a terminal does
        else:
            running.send_signal(number)
        _, err = running.communicate(timeout=PATIENCE_S)
        assert (running.returncode, err) == (128 + number, b"")
        assert not [pid for pid in workers if Path(f"/proc/{pid}").exists()]
    finally:
        if running.returncode is None:
            os.killpg(running.pid, signal.SIGKILL)
            running.wait()


def test_a_built_in_trace_is_played_with_each_seed(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["simulate", "equilibrium", "--policy", "proxmox", "--seed", "1", "--seed", "7", "--json"]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert [entry["trace"] for entry in found] == ["equilibrium-1", "equilibrium-7"]


def test_the_table_adds_up_the_seeds_and_has_units(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "equilibrium", "--policy", "fixed", "--seed", "1", "--seed", "2"]) == 0
    header, units, *rows = capsys.readouterr().out.splitlines()
    assert header.split()[:3] == ["trace", "policy", "kills"]
    assert "MiB·s" in units
    assert len(rows) == 1
    assert rows[0].split()[:2] == ["equilibrium", "fixed"]


def test_several_traces_end_in_a_row_for_all(trace: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", trace, "leak", "--policy", "fixed", "--seed", "1"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[:2] for row in rows] == [["tight", "fixed"], ["leak", "fixed"], ["all", "fixed"]]
    assert int(rows[2][2]) == int(rows[0][2]) + int(rows[1][2])


def test_why_prints_the_decisions_about_a_vm_line_by_line(
    trace: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["simulate", trace, "--policy", "qubes", "--policy", "fixed", "--why", "b"]) == 0
    output = capsys.readouterr().out
    assert "b in tight under qubes" in output
    assert " s  grow " in output
    assert "below-preference" in output
    assert "MiB available 0.0 s before)" in output
    assert "killed: the guest's kernel ran out of memory" in output.partition("under fixed")[2]


def test_why_of_an_unknown_vm_names_the_known_ones(trace: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", trace, "--why", "c"]) == 2
    assert "tight has no VM 'c'; it has a, b" in capsys.readouterr().err


def test_a_drawing_has_title_legend_and_figures(trace: str, tmp_path: Path) -> None:
    path = tmp_path / "out.svg"
    assert main(["simulate", trace, "--policy", "fixed", "--plot", str(path)]) == 0
    root = ElementTree.fromstring(path.read_text())
    texts = [element.text for element in root.iter(f"{SVG}text")]
    assert "tight under fixed" in texts
    assert {"size", "actual: what the VM has", "demand, with page cache", "kill", "grow", "shrink"} <= set(
        texts
    )
    assert "budget 600 MiB" in texts
    assert "a: 0 kills, 0 moves" in texts
    kills = [element for element in root.iter(f"{SVG}path") if element.get("class") == "kill"]
    assert len(kills) >= 2  # the legend's, and those of b


def test_drawings_of_several_runs_have_different_names(trace: str, tmp_path: Path) -> None:
    path = tmp_path / "out.svg"
    assert main(["simulate", trace, "--policy", "fixed", "--policy", "mom", "--plot", str(path)]) == 0
    assert {entry.name for entry in tmp_path.glob("*.svg")} == {"out-tight-fixed.svg", "out-tight-mom.svg"}


def test_a_drawing_that_cannot_be_written_is_an_error_message(
    trace: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["simulate", trace, "--policy", "fixed", "--plot", str(tmp_path / "no" / "out.svg")]) == 1
    assert "cannot write" in capsys.readouterr().err


def test_a_drawing_of_many_vms_shows_those_with_problems_and_states_it() -> None:
    trace = replace(built_in("many", 1), duration_s=5.0)
    run = play(trace, simulated("proxmox"), record=True)
    texts = [element.text or "" for element in ElementTree.fromstring(draw(run)).iter(f"{SVG}text")]
    assert sum(" kill" in text and text.startswith("vm") for text in texts) == MOST_PANELS
    assert any("76 quieter VMs are not drawn" in text for text in texts)


@pytest.mark.parametrize(
    ("words", "output"),
    [
        (["nonsense"], "no file, and no built-in trace: these are equilibrium"),
        (["./nonsense.json"], "cannot be read: No such file"),
        (["bursts", "--policy", "best"], "there is no policy 'best'; there are fairshare"),
        (["bursts", "--seed", "x"], "'x' is no seed"),
        (["bursts", "--seed", "-1"], "seed"),
        ([], "the following arguments are required: TRACE"),
    ],
)
def test_wrong_usage_is_a_readable_error(
    words: list[str], output: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["simulate", *words]) == 2
    assert output in capsys.readouterr().err


def test_a_broken_trace_file_is_wrong_usage_with_each_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "broken.json"
    path.write_text('{"duration_s": -1, "host": {"budget": "1GiB"}, "vms": [{"name": "a"}]}')
    assert main(["simulate", str(path)]) == 2
    output = capsys.readouterr().err
    assert "duration_s: must be a number from" in output
    assert "host.budget: must be a whole number of bytes" in output
    assert "vms[0].size: is missing" in output


def test_an_unknown_key_is_reported_and_ignored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vm = {"name": "a", "size": 512 * MIB, "flor": 1, "demand": [[0, MIB, 0]]}
    path = tmp_path / "odd.json"
    path.write_text(json.dumps({"duration_s": 5, "host": {"budget": 600 * MIB}, "vms": [vm]}))
    assert main(["simulate", str(path), "--policy", "fixed", "--json"]) == 0
    assert "vms[0].flor: is not known and ignored; did you mean floor?" in capsys.readouterr().err


def test_unsafe_names_are_drawn_and_make_no_paths(trace: str, tmp_path: Path) -> None:
    document = json.loads(Path(trace).read_text()) | {"name": "../a\x00\ud800", "duration_s": 1}
    document["vms"][0]["name"] = "<x>\x07/\ud800"
    Path(trace).write_text(json.dumps(document))
    drawn = str(tmp_path / "out.svg")
    assert main(["simulate", trace, "--policy", "fixed", "--policy", "mom", "--plot", drawn]) == 0
    paths = list(tmp_path.glob("*.svg"))
    assert {path.name for path in paths} == {"out-.._a__-fixed.svg", "out-.._a__-mom.svg"}
    texts = [element.text for element in ElementTree.fromstring(paths[0].read_text()).iter(f"{SVG}text")]
    assert any(text is not None and text.startswith("<x>\ufffd/\ufffd: ") for text in texts)


def test_control_characters_in_a_trace_name_are_removed(
    trace: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = json.loads(Path(trace).read_text())
    (tmp_path / "bad.json").write_text(json.dumps({**document, "name": "a\x1b[2J\nall 0", "of": "no key"}))
    assert main(["simulate", str(tmp_path / "bad.json"), "--policy", "fixed"]) == 0
    output = capsys.readouterr()
    assert "\x1b" not in output.out + output.err
    assert "a?[2J?all 0" in output.out
    assert len(output.err.splitlines()) == 1


@pytest.mark.parametrize("name", ["x.png", "x", "x.svg.gz", ".svg"])
def test_a_drawing_is_svg(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "bursts", "--plot", str(tmp_path / name)]) == 2
    assert f"a drawing is SVG: write FILE.svg, not '{tmp_path}/{name}'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
