"""Cgroup files with any content are read or refused."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from hypothesis import given
from hypothesis import strategies as st

from qmpballoon.cgroups import parse_membership, parse_reclaimable, read_cgroup
from qmpballoon.procfs import huge_page_pool, parse_arc, parse_meminfo

SIZES = st.one_of(st.integers(-1, 2**70).map(str), st.sampled_from(["max", "", "9" * 5000, "1e9", "\udc80"]))
FILES = st.one_of(SIZES, st.text(max_size=40)).map(lambda text: text.encode("utf-8", "surrogateescape"))
ROWS = st.lists(
    st.tuples(
        st.sampled_from(
            ["inactive_file", "file_dirty", "size", "c_min", "HugePages_Total:", "Hugetlb:", "x"]
        ),
        st.one_of(SIZES, st.text(max_size=5)),
        st.sampled_from(["", " kB", " 4 7"]),
    )
).map(lambda rows: "\n".join(f"{key} {value}{rest}" for key, value, rest in rows))


@given(st.lists(FILES, min_size=4, max_size=4))
def test_a_cgroup_is_read_or_refused(contents: list[bytes]) -> None:
    with TemporaryDirectory() as root:
        group = Path(root, "a")
        group.mkdir()
        for name, content in zip(("max", "high", "current", "stat"), contents, strict=True):
            (group / f"memory.{name}").write_bytes(content)
        memory = None
        with suppress(ValueError):
            memory = read_cgroup("/a", root)
    assert memory is None or 0 <= memory.for_guests(0) <= memory.limit


@given(st.one_of(ROWS, st.text()))
def test_any_text_is_parsed_as_a_table_of_figures(text: str) -> None:
    assert parse_reclaimable(text, unwritten=("file_dirty",)) >= 0
    assert parse_arc(text) >= 0
    assert huge_page_pool(text) >= 0
    assert all(size >= 0 for size in parse_meminfo(text).values())
    path = parse_membership(text)
    assert path is None or path.startswith("/")
