"""Packages for a GPU machine without a network:

make wheels, carry the folder there,  make gpu-check WHEELS=FOLDER

`download` fetches the wheels that a Python with only torch lacks. `install` puts the missing ones
into a folder for PYTHONPATH and changes nothing else. Both run before anything is installed, so
they need only Python and its pip.

The trade-off: packages of one machine are mixed with wheels from another, and the mix may not work.
So an installed package stays, unless a wheel needs another version of it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from email.parser import HeaderParser
from pathlib import Path
from typing import Any

from config import UserError

try:
    from pip._vendor.packaging.markers import default_environment
    from pip._vendor.packaging.requirements import Requirement
    from pip._vendor.packaging.tags import sys_tags
    from pip._vendor.packaging.utils import canonicalize_name, parse_wheel_filename
except ImportError:
    print(
        f"error: {sys.executable} has no pip, which installs the wheels; use another PYTHON",
        file=sys.stderr,
    )
    sys.exit(2)

LOCK = Path(__file__).resolve().parent.parent / "constraints.txt"
# What the engine, the GPU tests and the benchmarks import. matplotlib (charts) and datasets (hub
# data) are left out: they are larger than all of this together, and no GPU check needs them.
WANTED = (
    "numpy",
    "safetensors",
    "tokenizers",
    "rich",
    "psutil",
    "tiktoken",
    "pytest",
    "pytest-timeout",
    "hypothesis",
    "transformers",
    "liger-kernel==0.8.5",
    "cut-cross-entropy==25.1.1",
    "nvmath-python==1.0.0",
    "cuda-core==1.2.2",  # nvmath-python needs it
    "litgpt==0.5.13",
)
# Not fetched: the parts of torch, because another version breaks it and they are too large to
# carry, and packages that only download from a hub.
NOT_WANTED = re.compile(
    r"torch|triton|nvidia-.*|cuda-(?!core).*|setuptools|hf-xet|pytorch-lightning"
)
GLIBC = range(5, 40)  # minor versions of glibc 2 whose manylinux wheels are accepted
MEBIBYTE = 1 << 20


@dataclass(frozen=True)
class Wheel:
    """A wheel file. `fits` is whether this Python can install it."""

    path: Path
    name: str
    version: Any
    fits: bool

    def needs(self, environment: dict[str, str] | None = None) -> list[Requirement]:
        """The packages that it requires, without any extras."""
        with zipfile.ZipFile(self.path) as file:
            (metadata,) = (
                name for name in file.namelist() if re.fullmatch(r"[^/]*\.dist-info/METADATA", name)
            )
            lines = (
                HeaderParser().parsestr(file.read(metadata).decode()).get_all("Requires-Dist") or []
            )
        here = {**default_environment(), **(environment or {}), "extra": ""}
        return [
            need
            for need in map(Requirement, lines)
            if need.marker is None or need.marker.evaluate(here)
        ]


def wheels_of(folder: Path) -> list[Wheel]:
    """All wheels in a folder, sorted so that the newest version of a package is last. Raises
    UserError if there are none."""
    tags, found = set(sys_tags()), []
    for path in folder.glob("*.whl"):
        try:
            name, version, _, its = parse_wheel_filename(path.name)
        except ValueError:
            print(f"{path.name} is not the name of a wheel; it is left out")
            continue
        found.append(Wheel(path, name, version, not tags.isdisjoint(its)))
    if not found:
        raise UserError(f"{folder} holds no wheels; make some with: make wheels WHEELS={folder}")
    return sorted(found, key=lambda wheel: (wheel.name, wheel.version))


def pip(*words: str | Path) -> subprocess.CompletedProcess[str]:
    """Run this Python's pip and capture its output."""
    command = [
        sys.executable,
        "-m",
        "pip",
        *map(str, words),
        "--disable-pip-version-check",
        "--no-input",
    ]
    return subprocess.run(command, capture_output=True, text=True)


# --- on a machine with a network


def download(folder: Path, python: str) -> None:
    """Fill `folder` with WANTED and everything it needs, for Python `python` on x86-64 Linux.
    Raises UserError."""
    target = {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "platform_machine": "x86_64",
    }
    target |= {
        "sys_platform": "linux",
        "platform_system": "Linux",
        "implementation_name": "cpython",
        "os_name": "posix",
    }
    lock = dict(re.findall(r"^([\w.-]+)==(\S+)", LOCK.read_text(encoding="utf-8"), re.MULTILINE))
    todo, seen = {canonicalize_name(need.name): need for need in map(Requirement, WANTED)}, set()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as new:
        while todo:
            fetch([pinned(need, lock) for need in todo.values()], Path(new), python)
            seen |= todo.keys()
            needs = [need for wheel in wheels_of(Path(new)) for need in wheel.needs(target)]
            todo = {
                name: need for need in needs if (name := canonicalize_name(need.name)) not in seen
            }
            todo = {name: need for name, need in todo.items() if not NOT_WANTED.fullmatch(name)}
        # remove older wheels of the new packages, because install takes one version of each
        for old in folder.glob("*.whl"):
            if old.name.partition("-")[0] in {
                path.name.partition("-")[0] for path in Path(new).iterdir()
            }:
                old.unlink()
        for path in Path(new).iterdir():
            shutil.move(path, folder)
    sizes = [path.stat().st_size for path in folder.glob("*.whl")]
    print(f"{folder}: {len(sizes)} wheels, {sum(sizes) / MEBIBYTE:.1f} MiB")


def pinned(need: Requirement, lock: dict[str, str]) -> str:
    """The requirement with the lock's version if it has one, because that version was tested. It
    overrides what the requiring package says."""
    version = lock.get(canonicalize_name(need.name))
    return f"{need.name}=={version}" if version else f"{need.name}{need.specifier}"


def fetch(requirements: Sequence[str], folder: Path, python: str) -> None:
    """Download exactly these wheels, without what they need. Raises UserError with pip's reason."""
    names = ["manylinux1_x86_64", "manylinux2010_x86_64", "manylinux2014_x86_64"]
    names += [f"manylinux_2_{minor}_x86_64" for minor in GLIBC]
    platforms = [word for name in names for word in ("--platform", name)]
    target = ("--python-version", python, "--implementation", "cp", *platforms)
    done = pip(
        "download", "-q", "--no-deps", "--only-binary=:all:", *target, "-d", folder, *requirements
    )
    if done.returncode:
        raise UserError(f"pip download failed: {last_line(done.stderr)}")


def last_line(text: str) -> str:
    """pip's last error line, or else its last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")]
    return (errors or lines or ["it said nothing"])[-1]


# --- on the GPU machine


def install(folder: Path, site: Path) -> None:
    """Put the packages that this Python lacks into `site`. A wheel that cannot be installed is
    reported, and the others are installed."""
    wheels = wheels_of(folder)
    fitting = {wheel.name: wheel for wheel in wheels if wheel.fits}  # the newer of two versions
    for name in sorted({wheel.name for wheel in wheels} - fitting.keys()):
        print(f"{name} is left out: its wheel is for another Python or system")
    chosen = missing(fitting)
    site.mkdir(parents=True, exist_ok=True)
    if chosen and into(site, chosen):  # some wheel is broken, so install them one by one to find it
        for wheel in chosen:
            if reason := into(site, [wheel]):
                print(f"{wheel.name} is left out: {reason}")
    print(
        f"{len(chosen)} of {len(fitting)} packages come from {folder}, the others are installed "
        "already"
    )


def missing(wheels: dict[str, Wheel]) -> list[Wheel]:
    """The wheels of packages that this Python lacks, or that it has in a version which another
    chosen wheel does not accept."""
    chosen = [wheel for wheel in wheels.values() if installed(wheel.name) is None]
    for wheel in chosen:  # the list grows during the loop
        for need in needs_of(wheel):
            other = wheels.get(canonicalize_name(need.name))
            if (
                other is None
                or other in chosen
                or need.specifier.contains(installed(other.name) or "0", prereleases=True)
            ):
                continue
            if need.specifier.contains(other.version, prereleases=True):
                chosen.append(other)
    return chosen


def needs_of(wheel: Wheel) -> list[Requirement]:
    """The wheel's requirements. Empty if the file is broken, which its installation will report."""
    try:
        return wheel.needs()
    except (OSError, ValueError, zipfile.BadZipFile):
        return []


def installed(name: str) -> str | None:
    """The installed version of a package, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def into(site: Path, wheels: Sequence[Wheel]) -> str | None:
    """Install wheels without their requirements. Returns None, or the reason why it failed."""
    options = (
        "--isolated",
        "--no-index",
        "--no-deps",
        "--no-compile",
        "--no-cache-dir",
        "--upgrade",
        "--target",
        site,
    )
    done = pip("install", "-q", *options, *(wheel.path for wheel in wheels))
    return last_line(done.stderr) if done.returncode else None


def main(argv: Sequence[str]) -> None:
    """Run the command. Raises UserError for a failed download or a folder without wheels."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.wheels", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    of_download = commands.add_parser(
        "download", help="fetch the wheels that a Python with only torch lacks"
    )
    of_download.add_argument("folder", type=Path)
    of_download.add_argument(
        "--python", default="3.12", help="version of Python that will install them"
    )
    of_install = commands.add_parser(
        "install", help="put what this Python lacks into a folder for PYTHONPATH"
    )
    of_install.add_argument("folder", type=Path)
    of_install.add_argument("site", type=Path)
    options = parser.parse_args(argv)
    if options.command == "download":
        download(options.folder, options.python)
    else:
        install(options.folder, options.site)


if __name__ == "__main__":
    os.environ["PIP_CONFIG_FILE"] = (
        os.environ.get("PIP_CONFIG_FILE", "") if "download" in sys.argv else os.devnull
    )
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
