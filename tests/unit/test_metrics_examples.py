"""The dashboard, the alerts and the page about metrics name metrics that there are."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from doc_pages import ROOT, text_of

from qmpballoon.metrics.families import VM_ROWS, Reading, families
from qmpballoon.metrics.tally import Tally
from qmpballoon.model.records import HostStatus

HOST = HostStatus("ok", "fairshare", "auto", 10, 2, 3, 7, 100, 50, 0.5, 0.1, 0, 0, (), 4, 5)
DASHBOARD = ROOT / "examples/grafana-dashboard.json"
ALERTS = ROOT / "examples/prometheus-alerts.yml"
LABELS = {"instance", "vm", "health", "level", "why", "outcome", "verb", "le", "job", "name", "mode"}


def exported() -> dict[str, str]:
    """Return the type of each metric by the name that Prometheus shows."""
    tally = Tally(lambda: 0.0)
    tally.host_changed(HOST)
    names = {f"qmpballoon_{row.name}": "counter" if row.is_counter else "gauge" for row in VM_ROWS}
    for family in families(Reading((), tally, True, 0.0)):
        suffix = {"counter": "_total", "info": "_info"}.get(family.type, "")
        names[family.name + suffix] = family.type
    return names


EXPORTED = exported()
SERIES = set(EXPORTED) | {
    name + suffix
    for name, kind in EXPORTED.items()
    if kind == "histogram"
    for suffix in ("_bucket", "_sum", "_count")
}


def names_in(text: str) -> set[str]:
    return set(re.findall(r"\b(?:qmpballoon|process)_[a-z_]+\b", text))


def panels() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
    return found


def expressions() -> Iterator[str]:
    for panel in panels():
        for target in panel.get("targets", ()):
            yield target["expr"]


@pytest.mark.parametrize("expression", [*expressions(), *re.findall(r"expr: (.+)", ALERTS.read_text())])
def test_an_expression_uses_metrics_and_labels_that_there_are(expression: str) -> None:
    names = names_in(expression)
    assert names or expression == 'up{job="qmpballoon"} == 0'
    assert names <= SERIES
    labels = set(re.findall(r"[{,]\s*(\w+)\s*[=!]", expression))
    labels |= {
        word for group in re.findall(r"(?:by|on) \(([^)]*)\)", expression) for word in group.split(", ")
    }
    assert labels <= LABELS
    for name in names:
        if name.endswith("_total"):
            assert re.search(rf"(rate|increase)\({name}\b", expression), "a counter alone says nothing"


def test_the_dashboard_is_what_grafana_imports() -> None:
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    assert {"title", "uid", "panels", "templating", "schemaVersion"} <= set(dashboard)
    assert len({panel["id"] for panel in panels()}) == len(panels())
    places: set[tuple[int, int]] = set()
    for panel in panels():
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        covers = {
            (x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])
        }
        assert not covers & places, f"{panel['title']} lies on another panel"
        places |= covers
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(panels()))) - {"__rate_interval"}
    assert used == variables
    queries = [
        variable["definition"] for variable in dashboard["templating"]["list"] if "definition" in variable
    ]
    assert names_in(" ".join(queries)) <= SERIES


def test_most_metrics_of_a_vm_and_of_the_host_are_on_the_dashboard() -> None:
    shown = {name for expression in expressions() for name in names_in(expression)}
    assert {"qmpballoon_vm_actual_bytes", "qmpballoon_vm_held_bytes", "qmpballoon_host_used_bytes"} <= shown
    assert len(shown) >= 20


def test_the_page_names_every_metric_and_no_other() -> None:
    text = text_of("metrics.md")
    assert names_in(text) - {"process_"} == {name for name in EXPORTED if not name.startswith("process_")}
    (number,) = re.findall(r"bounded: (\d+) for each VM", text)
    assert int(number) == len(VM_ROWS)
