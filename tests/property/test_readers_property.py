"""Readers: any value is accepted in its range, or refused with one short, printable sentence."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from qmpballoon import readers
from qmpballoon.readers import Reader, Wrong

ANY = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=10**30)
    | st.floats()
    | st.text()
    | st.text(min_size=40).map(lambda text: text * 9)
    | st.from_regex(r"-?[0-9]{1,6}(\.[0-9])?(B|KiB|M|MiB|%)?", fullmatch=True),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=3,
)
READERS = {
    "flag": readers.flag,
    "number": readers.number(0.5, 600, "seconds", or_zero=True),
    "whole": readers.whole(-3, 2**53),
    "word": readers.word("auto", "manual", quote='"'),
    "text": readers.text(20),
    "amount": readers.amount,
}


def outcome(read: Reader, value: object) -> tuple[object, str]:
    """Return the value, or the reason of the refusal."""
    try:
        return read(value), ""
    except Wrong as wrong:
        return None, wrong.reason


@given(st.sampled_from(sorted(READERS)), ANY)
@example("amount", 1.0)
@example("amount", "0" * 17 + "\x1f" * 6 + "\U0001123f" * 17)  # ten characters each, in quotes
def test_any_value_is_read_or_refused_in_one_short_sentence(name: str, value: object) -> None:
    checked, reason = outcome(READERS[name], value)
    assert (checked is None) != (reason == "")
    assert reason.isprintable()
    assert len(reason) < 250
    if checked is not None:
        assert outcome(READERS[name], checked if name != "amount" else str(checked)) == (checked, "")
