"""The lab's kernel, on made-up package lists and directories."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from qmpballoon.lab.kernel import kernel_packages, kernel_under
from qmpballoon.lab.require import LabError

CLOUD = "linux-image-cloud-amd64"
ONE_PACKAGE = {
    "linux-image-cloud-amd64": "Version: 6.1.9-1\nDepends: linux-image-6.1.0-50-cloud-amd64 (= 6.1.9-1)\n",
    "linux-image-6.1.0-50-cloud-amd64": "Version: 6.1.9-1\nDepends: kmod, linux-base (>= 4), dracut | tiny\n",
}
MANY_PACKAGES = {
    "linux-image-cloud-amd64": """
Source: linux-signed-amd64 (7.3.4+1)
Version: 7.3.4-1~bpo13+1
Depends: linux-base-cloud-amd64 (= 7.3.4-1~bpo13+1), linux-image-7.3.4-cloud-amd64 (= 7.3.4-1~bpo13+1)
Suggests: linux-doc (= 7.3.4-1~bpo13+1)
""",
    "linux-base-cloud-amd64": "Version: 7.3.4-1~bpo13+1\nDepends: zero (=7.3.4-1~bpo13+1)\n",
    "linux-image-7.3.4-cloud-amd64": """
Version: 7.3.4-1~bpo13+1
Pre-Depends: linux-base (>= 4.17~), first:any (= 7.3.4-1~bpo13+1)
Depends: dracut | initramfs-tools (>= 0.120+deb8u2), other (= 1.0), second (= 7.3.4-1~bpo13+1)
""",
    "zero": "Version: 7.3.4-1~bpo13+1\n",
    "first": "Version: 7.3.4-1~bpo13+1\n",
    "second": "Version: 7.3.4-1~bpo13+1\nDepends: first (= 7.3.4-1~bpo13+1)\n\nVersion: 1\n",
}


def lists(packages: dict[str, str]) -> Callable[[str], str]:
    """Return what tells of these packages; nothing of others."""
    return lambda package: packages.get(package.split("=")[0], "")


def test_a_kernel_in_one_package() -> None:
    assert kernel_packages(CLOUD, lists(ONE_PACKAGE)) == [
        "linux-image-cloud-amd64=6.1.9-1",
        "linux-image-6.1.0-50-cloud-amd64=6.1.9-1",
    ]


def test_a_kernel_in_packages_of_any_name_and_nothing_that_is_not_of_its_build() -> None:
    names = [
        package.removesuffix("=7.3.4-1~bpo13+1") for package in kernel_packages(CLOUD, lists(MANY_PACKAGES))
    ]
    assert sorted(names) == sorted(MANY_PACKAGES)


@pytest.mark.parametrize(
    ("packages", "sentence"),
    [
        ({}, "do not know linux-image-cloud-amd64"),
        ({"linux-image-cloud-amd64": "Depends: nothing\n"}, "do not know linux-image-cloud-amd64"),
        (
            MANY_PACKAGES | {"second": ""},
            "lack second=7.3.4-1~bpo13[+]1, which linux-image-cloud-amd64 needs",
        ),
        (MANY_PACKAGES | {"second": "Version: 1\n"}, "lack second="),
    ],
)
def test_lists_that_lack_a_package_are_told(packages: dict[str, str], sentence: str) -> None:
    with pytest.raises(LabError, match=sentence):
        kernel_packages(CLOUD, lists(packages))


def a_kernel(root: Path, release: str, file: str, modules: str = "lib/modules") -> Path:
    """Make the files of a kernel; return the directory of its modules."""
    directory = root / modules / release
    (directory / "kernel").mkdir(parents=True)
    (directory / "kernel" / "virtio_balloon.ko.xz").touch()
    (root / file).parent.mkdir(parents=True, exist_ok=True)
    (root / file).touch()
    return directory


@pytest.mark.parametrize(
    ("file", "modules"),
    [
        ("boot/vmlinuz-6.1.0-50-cloud-amd64", "lib/modules"),
        ("boot/vmlinuz-6.1.0-50-cloud-amd64", "usr/lib/modules"),
        ("usr/lib/modules/6.1.0-50-cloud-amd64/vmlinuz", "usr/lib/modules"),
    ],
)
def test_a_kernel_is_found_in_boot_or_beside_its_modules(tmp_path: Path, file: str, modules: str) -> None:
    directory = a_kernel(tmp_path, "6.1.0-50-cloud-amd64", file, modules)
    found = kernel_under(tmp_path)
    assert (found.release, found.file, found.modules) == ("6.1.0-50-cloud-amd64", tmp_path / file, directory)


def test_the_newest_kernel_that_is_whole_is_taken(tmp_path: Path) -> None:
    a_kernel(tmp_path, "6.9.1-amd64", "boot/vmlinuz-6.9.1-amd64")
    a_kernel(tmp_path, "6.12.3-amd64", "boot/vmlinuz-6.12.3-amd64")
    a_kernel(tmp_path, "7.1.0-amd64", "boot/another")
    (tmp_path / "lib/modules/7.2.0-amd64").mkdir()
    (tmp_path / "boot/vmlinuz-7.2.0-amd64").touch()
    assert kernel_under(tmp_path).release == "6.12.3-amd64"


def test_a_directory_without_a_kernel_is_told(tmp_path: Path) -> None:
    with pytest.raises(LabError, match="no readable kernel with its modules under"):
        kernel_under(tmp_path)
