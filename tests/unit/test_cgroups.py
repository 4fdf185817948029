"""Control groups of both versions, as trees of files that stand for /sys/fs/cgroup."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from qmpballoon.cgroups import (
    CgroupLevel,
    CgroupMemory,
    is_within,
    parse_limit,
    parse_membership,
    parse_reclaimable,
    read_cgroup,
    read_own_cgroup,
)
from qmpballoon.units import MIB

NONE_OF_V1 = "9223372036854771712"


def written(root: Path, path: str, files: dict[str, object]) -> None:
    directory = root / path.strip("/")
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (directory / name).write_text(f"{content}\n")


def v2(root: Path, path: str, limit: int | str, current: int = 0, cache: int = 0, **more: object) -> None:
    """Write a group of version 2; sizes in MiB."""
    files: dict[str, object] = {
        "memory.max": limit * MIB if isinstance(limit, int) else limit,
        "memory.current": current * MIB,
        "memory.stat": f"anon 5\ninactive_file {cache * MIB}",
    }
    written(root, path, files | {f"memory.{name}": content for name, content in more.items()})


def v1(root: Path, path: str, limit: int | None, current: int = 0, cache: int = 0) -> None:
    """Write a group of version 1; sizes in MiB."""
    files: dict[str, object] = {
        "memory.limit_in_bytes": NONE_OF_V1 if limit is None else limit * MIB,
        "memory.usage_in_bytes": current * MIB,
        "memory.stat": f"inactive_file 1\ntotal_inactive_file {cache * MIB}\ntotal_dirty 0",
    }
    written(root, f"memory/{path}", files)


def figures(memory: CgroupMemory | None) -> list[tuple[str, int, int]]:
    assert memory is not None
    return [(level.path, level.limit // MIB, level.used // MIB) for level in memory.levels]


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("0::/user.slice\n", "/user.slice"),
        ("4:memory:/a\n3:cpu:/b\n0::/\n", "/a"),
        ("0::/\n4:cpu,memory:/a:b\n", "/a:b"),
        ("4:cpu:/a\n", None),
        ("0::a\n", None),
        ("nonsense\n::\n", None),
        ("", None),
    ],
)
def test_the_group_for_memory_is_that_of_the_controller(text: str, path: str | None) -> None:
    assert parse_membership(text) == path


@pytest.mark.parametrize(("text", "limit"), [("max\n", None), ("4096\n", 4096), (NONE_OF_V1, None)])
def test_a_limit_is_bytes_or_none(text: str, limit: int | None) -> None:
    assert parse_limit(text) == limit


@pytest.mark.parametrize("text", ["", "-1", "1.5", "²", "12 34", "9" * 5000, "\x1b[2J"])
def test_what_is_no_limit_is_an_error_that_can_be_logged(text: str) -> None:
    with pytest.raises(ValueError, match="is no size") as error:
        parse_limit(text)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 300


def test_page_cache_counts_as_far_as_it_can_be_dropped() -> None:
    stat = "file 900\nshmem 500\ninactive_file 100\nactive_file 60\nslab_reclaimable 40\nfile_dirty 30\n"
    assert parse_reclaimable(stat) == 100 + 30 + 20
    assert parse_reclaimable(stat, unwritten=("file_dirty",)) == 100 + 30 - 30 + 20
    assert parse_reclaimable("inactive_file 5\nfile_dirty 9\n", unwritten=("file_dirty",)) == 0
    assert parse_reclaimable("inactive_file x\nactive_file\n\nactive_file -4\n") == 0


def test_a_group_of_version_two_is_read(tmp_path: Path) -> None:
    v2(tmp_path, "a", 600, 500, 50, pressure="some avg10=3.00 avg60=1\nfull avg10=2.00 avg60=1")
    memory = read_cgroup("/a", str(tmp_path))
    assert figures(memory) == [("/a", 600, 450)]
    assert memory is not None
    assert (memory.psi_some_avg10, memory.psi_full_avg10) == (3.0, 2.0)


def test_a_group_of_version_one_is_read_with_its_descendants(tmp_path: Path) -> None:
    v1(tmp_path, "", None)
    v1(tmp_path, "a", 600, 500, 50)
    memory = read_cgroup("/a/", str(tmp_path))
    assert figures(memory) == [("/a", 600, 450)]
    assert memory is not None
    assert memory.psi_full_avg10 is None


@pytest.mark.parametrize("write", [v1, v2])
def test_the_tightest_level_counts(write: Callable[..., None], tmp_path: Path) -> None:
    if write is v1:
        v1(tmp_path, "", None)
    write(tmp_path, "a", 1000, 900)
    write(tmp_path, "a/b", None if write is v1 else "max", 700)
    write(tmp_path, "a/b/c", 800, 400)
    memory = read_cgroup("/a/b/c", str(tmp_path))
    assert figures(memory) == [("/a/b/c", 800, 400), ("/a", 1000, 900)]
    assert memory is not None
    assert (memory.limit, memory.left) == (800 * MIB, 100 * MIB)
    assert memory.for_guests(300 * MIB) == 400 * MIB  # 600 of the 1000 MiB are not the guests'


def test_the_limit_above_which_processes_stall_counts_too(tmp_path: Path) -> None:
    v2(tmp_path, "a", 600, high=500 * MIB)
    v2(tmp_path, "b", "max", high=400 * MIB)
    assert figures(read_cgroup("/a", str(tmp_path))) == [("/a", 500, 0)]
    assert figures(read_cgroup("/b", str(tmp_path))) == [("/b", 400, 0)]


def test_guests_may_hold_what_others_do_not_use() -> None:
    memory = CgroupMemory((CgroupLevel("/a", 560, 420),))
    assert memory.for_guests(300) == 440
    assert memory.for_guests(500) == 560
    assert CgroupMemory((CgroupLevel("/a", 100, 300),)).for_guests(50) == 0


def test_a_group_without_any_limit_is_none(tmp_path: Path) -> None:
    v2(tmp_path, "a", "max", 500)
    assert read_cgroup("/a", str(tmp_path)) is None
    assert read_cgroup("/", str(tmp_path)) is None  # the root has no such file


@pytest.mark.parametrize(
    ("files", "why"),
    [
        ({}, "has no memory.max that can be read"),
        ({"memory.max": ""}, "memory.max: holds"),
        ({"memory.max": "10M"}, "memory.max: holds '10M"),
        ({"memory.max": "4096"}, "memory.current: holds ''"),
        ({"memory.max": "4096", "memory.current": "max"}, "memory.current: holds 'max'"),
        ({"memory.max": "max", "memory.high": "-1"}, "memory.high: holds '-1'"),
    ],
)
def test_what_cannot_be_read_is_named(files: dict[str, object], why: str, tmp_path: Path) -> None:
    written(tmp_path, "a", files)
    with pytest.raises(ValueError, match=why):
        read_cgroup("/a", str(tmp_path))


def test_a_group_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no cgroup .*/a/b"):
        read_cgroup("/a/b", str(tmp_path))


def own(tmp_path: Path, membership: str) -> CgroupMemory | None:
    written(tmp_path, "proc/self", {"cgroup": membership})
    return read_own_cgroup(str(tmp_path / "proc"), str(tmp_path / "sys"))


def test_the_own_group_is_read(tmp_path: Path) -> None:
    v2(tmp_path / "sys", "pod/agent", 600, 500)
    v2(tmp_path / "sys", "pod", 900, 800)
    assert figures(own(tmp_path, "0::/pod/agent")) == [("/pod/agent", 600, 500), ("/pod", 900, 800)]


@pytest.mark.parametrize("membership", ["0::/", "0::/docker/4711", "0::/../../elsewhere"])
def test_a_container_that_sees_its_group_as_the_root_reads_that(membership: str, tmp_path: Path) -> None:
    v2(tmp_path / "sys", "", 600, 500)
    assert figures(own(tmp_path, membership)) == [("/", 600, 500)]


def test_no_group_or_none_with_a_limit_is_none(tmp_path: Path) -> None:
    assert read_own_cgroup(str(tmp_path / "proc"), str(tmp_path / "sys")) is None
    v2(tmp_path / "sys", "a", "max", 500)
    assert own(tmp_path, "0::/a") is None


def test_a_group_is_within_itself_and_those_above_it() -> None:
    assert is_within("/a/b", "/a/b")
    assert is_within("/a/b", "/a")
    assert is_within("/a", "/")
    assert not is_within("/ab", "/a")
    assert not is_within(None, "/")
