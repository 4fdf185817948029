"""The lab names missing programs, and needs none of them once its image is built."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qmpballoon.lab import image, kernel, require


def test_a_missing_program_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(require, "_find", lambda name: None)
    with pytest.raises(
        require.MissingPrograms, match=r"not installed: mosquitto, qemu.* mosquitto qemu-system-x86$"
    ):
        require.require_programs("mosquitto", "qemu-system-x86_64")


def test_a_built_image_is_found_without_any_program(
    guest_image: image.GuestImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    assert image.guest_image() == guest_image
    assert guest_image.kernel.exists()
    assert guest_image.release.endswith("-amd64")


def test_without_any_kernel_the_error_names_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def offline(directory: Path) -> None:
        raise require.LabError("no network")

    def nowhere(root: Path) -> kernel.Kernel:
        raise require.LabError("no kernel")

    monkeypatch.setenv("QMPBALLOON_CACHE", str(tmp_path))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(image, "_download_packages", offline)
    monkeypatch.setattr(image, "kernel_under", nowhere)
    with pytest.raises(
        require.LabError, match=r"no network.*apt-get update.*linux-image-cloud-amd64 and tcc"
    ):
        image.guest_image()
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]
