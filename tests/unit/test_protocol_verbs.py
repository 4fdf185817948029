"""The table of verbs: types, ranges, bare values, hints."""

from __future__ import annotations

from typing import Any

import pytest

from qmpballoon.errors import RequestRefused
from qmpballoon.protocol.payloads import Content
from qmpballoon.protocol.verbs import (
    TAKE_BACK,
    Asked,
    Doctor,
    Get,
    HostDoctor,
    List,
    Reclaim,
    Release,
    Reload,
    Room,
    Scope,
    SetLimits,
    SetMode,
    SetPolicy,
    SetTarget,
    read_asked,
)
from qmpballoon.units import parse_amount


def given(**arguments: Any) -> Content:
    return Content(arguments=arguments)


@pytest.mark.parametrize(
    ("scope", "verb", "content", "read"),
    [
        ("vm", "set-target", given(target="50%"), SetTarget(target=parse_amount("50%"))),
        ("vm", "set-target", given(target=5, wait_s=600), SetTarget(target=parse_amount(5), wait_s=600.0)),
        ("vm", "set-target", given(target="1GiB", wait_s=None), SetTarget(target=parse_amount("1GiB"))),
        ("vm", "set-target", Content(bare="256MiB"), SetTarget(target=parse_amount("256MiB"))),
        ("vm", "set-mode", Content(bare="manual"), SetMode(mode="manual")),
        ("vm", "set-mode", given(mode="auto", for_s=60), SetMode(mode="auto", for_s=60.0)),
        ("vm", "set-limits", given(floor=None, shares=2), SetLimits(floor=TAKE_BACK, shares=2)),
        ("vm", "get", given(), Get()),
        ("vm", "doctor", given(), Doctor()),
        ("host", "doctor", given(), HostDoctor()),
        ("host", "list", given(), List()),
        ("host", "reload", given(), Reload()),
        ("host", "room", Content(bare="2GiB"), Room(size=parse_amount("2GiB"))),
        ("host", "reclaim", Content(bare="1GiB"), Reclaim(size=parse_amount("1GiB"))),
        ("host", "release", Content(bare=3), Release(hold="3")),
        ("host", "set-policy", Content(bare="mom"), SetPolicy(name="mom")),
        ("host", "set-policy", given(mode="observe"), SetPolicy(mode="observe")),
    ],
)
def test_good_arguments_are_read(scope: Scope, verb: str, content: Content, read: Asked) -> None:
    assert read_asked(verb, scope, content) == read


@pytest.mark.parametrize(
    ("scope", "verb", "content", "code", "part"),
    [
        ("vm", "fly", given(), "unknown-verb", "there are set-target"),
        ("vm", "doctr", given(), "unknown-verb", "did you mean doctor?"),
        ("vm", "doctor", given(strict=True), "malformed", "takes no arguments"),
        ("vm", "set-targt", given(), "unknown-verb", "did you mean set-target?"),
        ("vm", "list", given(), "unknown-verb", "asked of the host, not of a VM"),
        ("host", "get", given(), "unknown-verb", "asked of a VM, not of the host"),
        ("vm", "set-target", given(), "malformed", "needs target"),
        ("vm", "set-target", given(target=None), "malformed", "needs target"),
        ("vm", "set-target", given(target="1GiB", wait=3), "malformed", "did you mean wait_s?"),
        ("vm", "set-target", given(target="512M"), "malformed", "512MiB"),
        ("vm", "set-target", Content(bare="AUTO"), "malformed", "on target/set the word is auto, in small"),
        ("vm", "set-target", given(target="auto"), "malformed", "request set-mode with auto"),
        ("vm", "set-target", Content(bare="manual"), "malformed", "request set-mode with manual"),
        ("vm", "set-target", given(target=True), "malformed", "a size"),
        ("vm", "set-target", given(target=[1]), "malformed", "a size"),
        ("vm", "set-target", given(target=0), "out-of-range", "more than zero"),
        ("vm", "set-target", given(target=2**60), "out-of-range", "2**53"),
        ("vm", "set-target", given(target=1, wait_s=601), "out-of-range", "0 to 600"),
        ("vm", "set-target", given(target=1, wait_s=-1), "out-of-range", "0 to 600"),
        ("vm", "set-target", given(target=1, wait_s="3"), "malformed", "number of seconds"),
        ("vm", "set-target", given(target=1, wait_s=True), "malformed", "number of seconds"),
        ("vm", "set-mode", Content(bare="Auto"), "malformed", "one of auto, manual, observe"),
        ("vm", "set-mode", given(mode="auto", for_s=0), "out-of-range", "for_s"),
        ("vm", "set-limits", given(), "malformed", "at least one of"),
        ("vm", "set-limits", Content(bare="1GiB"), "malformed", "floor, ceiling, shares"),
        ("vm", "set-limits", given(shares=0), "out-of-range", "shares"),
        ("vm", "set-limits", given(shares=1.5), "malformed", "whole number"),
        ("vm", "get", Content(bare="now"), "malformed", "no arguments"),
        ("host", "release", given(hold=""), "malformed", "hold"),
        ("host", "set-policy", given(), "malformed", "at least one of"),
        ("host", "set-policy", Content(bare="fairshar"), "malformed", "did you mean fairshare?"),
    ],
)
def test_bad_arguments_are_refused_with_a_reason(
    scope: Scope, verb: str, content: Content, code: str, part: str
) -> None:
    with pytest.raises(RequestRefused) as refused:
        read_asked(verb, scope, content)
    assert refused.value.code == code
    assert part in str(refused.value)
