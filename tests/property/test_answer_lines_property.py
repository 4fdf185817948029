"""Whatever an agent answers, its lines can be printed: one line each, without control characters."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from qmpballoon import terminal
from qmpballoon.cli.answer_lines import lines_of
from qmpballoon.cli.why_lines import lines_of as why_lines_of
from qmpballoon.doctor.report import examination_of, summary
from qmpballoon.policy.decided import FIGURES
from qmpballoon.policy.reasons import WORDS

_STAMPS = st.sampled_from(["0001-01-01T00:00:00+23:59", "9999-12-31T23:59:59-23:59", "0001-01-01", "x"])
_PLAIN = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8)
    | st.sampled_from([10**400, -(10**400), *WORDS])
    | _STAMPS
)
_KEYS = st.sampled_from(
    [
        *("why", "why_since", "decisions", "figures", "ts", "outcome", "to", "name", "mode", "health"),
        *("findings", "severity", "word", "seen", "run_state", "guest", "available", "gave", "took_s"),
        *FIGURES,
    ]
)
_JSON = st.recursive(
    _PLAIN,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_KEYS, inner, max_size=6),
    max_leaves=12,
)


@given(_JSON)
def test_any_answer_is_printed(answer: object) -> None:
    assert all(terminal.clean(line) for line in lines_of(answer) if line)
    assert summary(examination_of(answer))


@given(st.dictionaries(_KEYS, _JSON, max_size=8))
def test_any_answer_to_why_is_printed(answer: dict[str, object]) -> None:
    assert all(line == terminal.clean(line) for line in why_lines_of(answer))
