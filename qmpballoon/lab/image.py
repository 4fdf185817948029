"""The guest image: a Debian kernel and an initramfs of one small program, built once and cached.

The kernel is that of Debian's ``linux-image-cloud-*`` (see `qmpballoon.lab.kernel`), downloaded but not
installed; an installed one is the fall-back. ``guest_init.c`` is compiled by tcc, which is downloaded the
same way (a compiler on the PATH is its fall-back). Neither needs root. For guests of another processor (see
`qmpballoon.lab.architecture`) the cross compiler of gcc has to be installed. The cache is
``$QMPBALLOON_CACHE``, else ``$XDG_CACHE_HOME/qmpballoon``, else ``~/.cache/qmpballoon``. It may be deleted at
any time.

``python -m qmpballoon.lab.image`` builds the image and prints where it is.
"""

from __future__ import annotations

import contextlib
import fcntl
import gzip
import hashlib
import lzma
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TextIO

from qmpballoon.lab.architecture import ARCHITECTURE
from qmpballoon.lab.kernel import Kernel, kernel_packages, kernel_under
from qmpballoon.lab.require import LabError, find_program, require_programs

_MODULES: Final = (
    "virtio_pci",
    "virtio_mmio",
    "virtio_blk",
    "virtio_balloon",
)  # in this order, each after its needs
_INIT_SOURCE: Final = Path(__file__).with_name("guest_init.c")
_RECIPE: Final = (_INIT_SOURCE, Path(__file__), Path(__file__).with_name("kernel.py"))
_DOWNLOAD_S: Final = 300.0  # 27 MB (Linux 6.1) to 38 MB (7.2), on a slow line
_COMMAND_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class GuestImage:
    """What QEMU boots: ``kernel`` and ``initramfs`` files, in a directory named by the recipe."""

    kernel: Path
    initramfs: Path

    @classmethod
    def inside(cls, directory: Path) -> GuestImage:
        """Return the image of ``directory``; its files need not exist yet."""
        return cls(directory / "vmlinuz", directory / "initramfs")

    @property
    def release(self) -> str:
        """The kernel's release, such as ``6.1.0-50-cloud-amd64``."""
        return _release_file(self).read_text().strip()


def cache_directory() -> Path:
    """Return the cache directory; create it if it does not exist."""
    chosen = os.environ.get("QMPBALLOON_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    directory = Path(chosen) if chosen else Path(base) / "qmpballoon"
    directory = directory.expanduser().absolute()
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def guest_image(progress: Callable[[str], None] = lambda line: None) -> GuestImage:
    """Return the guest image; build it, which takes seconds, if the cache does not have it.

    The recipe is the source of the init program, of this module and of `qmpballoon.lab.kernel`. The kernel is
    Debian's at the time of building: a check for a newer one at every start would take seconds and need the
    network. ``progress`` gets a line for each step that takes long.

    Raises:
        LabError: something cannot be downloaded, compiled or found; the message says what to install.
    """
    recipe = hashlib.sha256(b"".join(source.read_bytes() for source in _RECIPE)).hexdigest()[:12]
    cache = cache_directory()
    directory = cache / f"image-{ARCHITECTURE.debian}-{recipe}"
    image = GuestImage.inside(directory)
    if directory.is_dir():
        os.utime(directory)
        return image
    with _locked(cache / "lock"):
        if directory.is_dir():  # built by the process that had the lock
            return image
        _tidy(cache)
        with tempfile.TemporaryDirectory(prefix="building-", dir=cache) as building:
            product = Path(building) / "image"
            product.mkdir()
            _build(GuestImage.inside(product), Path(building), progress)
            product.rename(directory)
    return image


def _tidy(cache: Path) -> None:
    """Remove unfinished builds (the lock is held) and images that were not used for a week."""
    oldest = time.time() - 7 * 86400
    for directory in [*cache.glob("building-*"), *cache.glob("image-*")]:
        if directory.name.startswith("building-") or directory.stat().st_mtime < oldest:
            shutil.rmtree(directory)


def blank_disk(size: int) -> Path:
    """Return a sparse file of ``size`` zero bytes; all guests may share it."""
    path = cache_directory() / f"disk-{size}"
    with path.open("ab") as file:
        file.truncate(size)
    return path


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock file; wait for another holder. The kernel releases it when that process ends."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(image: GuestImage, work: Path, progress: Callable[[str], None]) -> None:
    kernel, compiler = _materials(work, progress)
    init = work / "init"
    try:
        _run([compiler, "-nostdlib", "-static", "-fno-builtin", "-o", str(init), str(_INIT_SOURCE)])
    except LabError as error:
        raise LabError(f"cannot compile the guest's init program: {error}") from error
    image.initramfs.write_bytes(initramfs_of(kernel, _MODULES, {"init": init.read_bytes()}))
    shutil.copyfile(kernel.file, image.kernel)
    _release_file(image).write_text(f"{kernel.release}\n")


def initramfs_of(kernel: Kernel, modules: Sequence[str], programs: Mapping[str, bytes]) -> bytes:
    """Return an archive of programs, and of modules in ``/modules``, whose order ``/modules/order`` has.

    Raises:
        LabError: the kernel has no such module.
    """
    files = _module_files(kernel.modules)
    order = _load_order(modules, files, kernel.modules)
    directories = dict.fromkeys(("proc", "sys", "dev", "modules"))
    directories |= {os.path.dirname(name): None for name in programs if "/" in name}
    entries = [_Entry(name, stat.S_IFDIR | 0o755) for name in directories]
    entries.append(_Entry("dev/console", stat.S_IFCHR | 0o600, device=(5, 1)))
    entries += [_Entry(name, stat.S_IFREG | 0o755, content) for name, content in programs.items()]
    entries += [_Entry(f"modules/{name}.ko", stat.S_IFREG | 0o644, _contents(files[name])) for name in order]
    listing = "".join(f"/modules/{name}.ko\n" for name in order)
    entries.append(_Entry("modules/order", stat.S_IFREG | 0o644, listing.encode()))
    return _newc(entries)


def _release_file(image: GuestImage) -> Path:
    return image.kernel.with_name("release")


# ---- sources of the parts ----


def _materials(work: Path, progress: Callable[[str], None]) -> tuple[Kernel, str]:
    """Return the kernel and a C compiler."""
    if not ARCHITECTURE.is_this_machine:
        cross = find_program(f"{ARCHITECTURE.name}-linux-gnu-gcc")
        return kernel_under(_download(work, progress)), cross
    try:
        root = _download(work, progress)
        return kernel_under(root), str(root / "usr/bin/tcc")
    except LabError as error:
        try:
            kernel = kernel_under(Path("/"))
        except LabError:
            raise LabError(
                f"no kernel for the guests: {error}. "
                f"Run `apt-get update` as root, or install {ARCHITECTURE.kernel_package} and tcc"
            ) from error
        compiler = shutil.which("tcc") or shutil.which("gcc") or shutil.which("cc")
        if compiler is None:
            raise LabError(f"no C compiler for the guest's init program: {error}. Install tcc") from error
        progress(f"not downloaded ({error}): using the installed {kernel.file}")
        return kernel, compiler


def _download(work: Path, progress: Callable[[str], None]) -> Path:
    require_programs("apt-get", "apt-cache", "dpkg-deb")
    packages, root = work / "packages", work / "root"
    packages.mkdir()
    progress(f"downloading {ARCHITECTURE.kernel_package} and tcc (some 30 MB) for the guest image")
    try:
        _download_packages(packages)
    except LabError:
        if os.geteuid() != 0:
            raise
        progress("Debian's package lists are missing or too old: fetching them")
        _run(["apt-get", *_apt_options(), "-qq", "update"], timeout_s=_DOWNLOAD_S)
        _download_packages(packages)
    for package in packages.glob("*.deb"):
        _run(["dpkg-deb", "-x", str(package), str(root)])
    return root


def _download_packages(directory: Path) -> None:
    options = _apt_options()

    def describe(package: str) -> str:
        return _run(["apt-cache", *options, "show", "--no-all-versions", package])

    packages = [*kernel_packages(ARCHITECTURE.kernel_package, describe), "tcc"]
    _run(["apt-get", *options, "-qq", "download", *packages], directory=directory, timeout_s=_DOWNLOAD_S)


def _apt_options() -> list[str]:
    """Return what makes apt take packages of the guests' architecture, and keep this machine's lists."""
    if ARCHITECTURE.is_this_machine:
        return []
    here = _run(["dpkg", "--print-architecture"]).strip()
    settings = (
        f"APT::Architecture={ARCHITECTURE.debian}",
        f"APT::Architectures::={ARCHITECTURE.debian}",
        f"APT::Architectures::={here}",
    )
    return [word for setting in settings for word in ("-o", setting)]


def _run(arguments: list[str], *, directory: Path | None = None, timeout_s: float = _COMMAND_S) -> str:
    try:
        done = subprocess.run(
            arguments,
            cwd=directory,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LabError(f"{arguments[0]}: {error}") from error
    if done.returncode != 0:
        raise LabError(f"`{' '.join(arguments)}` failed: {(done.stderr or done.stdout).strip()[-600:]}")
    return done.stdout


# ---- modules ----


def _module_files(modules: Path) -> dict[str, Path]:
    """Return every module by its name, with underscores as in the kernel."""
    files = (path for path in modules.rglob("*.ko*") if path.name.endswith((".ko", ".ko.xz", ".ko.gz")))
    return {path.name.split(".ko")[0].replace("-", "_"): path for path in files}


def _contents(module: Path) -> bytes:
    openers: dict[str, Callable[[bytes], bytes]] = {".xz": lzma.decompress, ".gz": gzip.decompress}
    return openers.get(module.suffix, bytes)(module.read_bytes())


def _load_order(wanted: Sequence[str], files: dict[str, Path], modules: Path) -> list[str]:
    """Return the wanted modules, each after those that its own ``depends=`` names."""
    listing = modules / "modules.builtin"
    paths = listing.read_text().split() if listing.exists() else []
    builtin = {Path(path).name.split(".ko")[0].replace("-", "_") for path in paths}
    order: list[str] = []

    def add(name: str) -> None:
        if name in order or name in builtin:
            return
        if name not in files:
            raise LabError(f"the kernel under {modules} has no module {name}")
        needs = re.search(rb"\0depends=([^\0]*)\0", _contents(files[name]))
        for needed in needs[1].decode().split(",") if needs and needs[1] else []:
            add(needed.replace("-", "_"))
        order.append(name)

    for name in wanted:
        add(name)
    return order


# ---- the archive ----


@dataclass(frozen=True, slots=True)
class _Entry:
    name: str
    mode: int
    contents: bytes = b""
    device: tuple[int, int] = (0, 0)


def _newc(entries: Iterable[_Entry]) -> bytes:
    """Return a cpio archive in the "newc" format that the kernel unpacks.

    Source: Documentation/driver-api/early-userspace/buffer-format.rst of Linux. It is not compressed: it has
    0.4 MB, and unpacking is slow under TCG.
    """
    archive = bytearray()
    for inode, entry in enumerate([*entries, _Entry("TRAILER!!!", 0)], start=1):
        name = entry.name.encode() + b"\0"
        #        inode mode uid gid links mtime size device(2) special(2) name checksum
        fields = (inode, entry.mode, 0, 0, 1, 0, len(entry.contents), 0, 0, *entry.device, len(name), 0)
        archive += b"070701" + b"".join(b"%08X" % field for field in fields) + name
        archive += b"\0" * (-len(archive) % 4)
        archive += entry.contents
        archive += b"\0" * (-len(archive) % 4)
    return bytes(archive)


def main() -> int:
    """Build the image if it is not there; print its directory, or what is missing (exit status 1)."""
    started = time.monotonic()
    try:
        image = guest_image(lambda line: _print(f"{line} ...", sys.stderr))
    except LabError as error:
        _print(str(error), sys.stderr)
        return 1
    _print(f"guest image: {image.kernel.parent} ({time.monotonic() - started:.1f} s)", sys.stdout)
    return 0


def _print(line: str, stream: TextIO) -> None:
    stream.write(f"{line}\n")
    stream.flush()


if __name__ == "__main__":
    sys.exit(main())
