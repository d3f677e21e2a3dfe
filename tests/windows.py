"""Makes a Linux process behave like Windows where this project could notice it.

What differs, and is imitated: modules, functions and signals that Windows does not have; folders,
which cannot be opened; open and mapped files, which cannot be deleted, renamed or replaced; a
descriptor opened for reading alone, which cannot be flushed. Paths stay those of Linux.
"""

from __future__ import annotations

import builtins
import errno
import os
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import psutil

from docs.packages import modules

MODULES = ("fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "readline", "syslog")
FUNCTIONS = (
    *("fork", "forkpty", "killpg", "setsid", "getpgid", "setpgid", "getppid", "getuid", "geteuid"),
    *("getgid", "sched_getaffinity", "sched_setaffinity", "sysconf", "getloadavg"),
    *("mkfifo", "fchmod", "chown", "uname", "posix_fadvise", "nice", "pread", "pwrite", "sync"),
    *("O_DIRECTORY", "O_NOFOLLOW", "O_CLOEXEC", "set_blocking", "wait3", "wait4"),
)
SIGNALS = ("SIGKILL", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGCHLD", "SIGALRM", "SIGPIPE", "SIGTSTP")


real_import = builtins.__import__


class FakeMsvcrt(types.ModuleType):
    """A fake of msvcrt's locks: a byte of an open file is locked for one descriptor at a time."""

    LK_NBLCK = 2

    def __init__(self) -> None:
        super().__init__("msvcrt")
        self.held: dict[int, int] = {}  # inode number to the descriptor that holds the lock

    def locking(self, file: int, mode: int, n_bytes: int) -> None:
        assert mode == self.LK_NBLCK and n_bytes == 1 and os.lseek(file, 0, os.SEEK_CUR) == 0
        open_files = {os.fstat(f).st_ino for f in self.held.values() if _is_open(f)}
        number = os.fstat(file).st_ino
        if number in self.held and number in open_files and self.held[number] != file:
            raise PermissionError(13, "Permission denied")
        self.held[number] = file


def _is_open(file: int) -> bool:
    try:
        os.fstat(file)
    except OSError:
        return False
    return True


def become() -> None:
    """Turn this process into one on Windows, before it imports modules of this project."""
    used = psutil.Process().memory_info()
    memory = types.SimpleNamespace(rss=used.rss, vms=used.vms, peak_wset=used.rss)
    for name in modules():
        sys.modules.pop(name, None)
    sys.modules["msvcrt"] = FakeMsvcrt()
    for owner, name, value in (
        (builtins, "__import__", _import),
        (sys, "platform", "win32"),
        (os, "open", _checked(os.open, _refuse_folder)),
        (os, "fsync", _checked(os.fsync, _refuse_read_only)),
        (os, "unlink", _checked(os.unlink, _refuse_open_files)),
        (os, "remove", _checked(os.remove, _refuse_open_files)),
        (os, "rename", _checked(os.rename, _refuse_open_files, _refuse_existing)),
        (os, "replace", _checked(os.replace, _refuse_open_files)),
        (psutil.Process, "memory_info", lambda process: memory),
        # The standard library takes the ways that it takes on Windows.
        (shutil, "_use_fd_functions", False),
        (tempfile, "TemporaryFile", tempfile.NamedTemporaryFile),
        (subprocess.Popen, "kill", lambda process: process.send_signal(9)),
        (subprocess.Popen, "terminate", lambda process: process.send_signal(15)),
    ):
        mock.patch.object(owner, name, value).start()
    for owner, names in ((os, FUNCTIONS), (signal, SIGNALS)):
        for name in names:
            if hasattr(owner, name):
                delattr(owner, name)


def _import(name: str, globals: Any = None, *rest: Any, **named: Any) -> Any:
    """Other packages have been installed for Linux, and may import what is there."""
    importer = (globals or {}).get("__name__")
    if name in MODULES and (importer == "__main__" or importer in modules()):
        raise ModuleNotFoundError(f"Windows has no module {name}", name=name)
    return real_import(name, globals, *rest, **named)


def _checked(function: Callable[..., Any], *checks: Callable[..., None]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        for check in checks:
            check(*args)
        return function(*args, **kwargs)

    return call


def _refuse_folder(path: Any, *_: Any) -> None:
    if os.path.isdir(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))


def _refuse_read_only(file: int) -> None:
    flags = Path(f"/proc/self/fdinfo/{file}").read_text().splitlines()[1].split()[1]
    if int(flags, 8) & os.O_ACCMODE == os.O_RDONLY:
        raise OSError(errno.EBADF, "Bad file descriptor")


def _refuse_existing(old: Any, new: Any) -> None:
    if os.path.exists(new):
        raise FileExistsError(errno.EEXIST, "File exists", str(new))


def _refuse_open_files(*paths: Any) -> None:
    """Refuse to delete, rename or replace a file, or a folder with one, that this process has
    open or mapped."""
    maps = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    used = {line.split(maxsplit=5)[-1] for line in maps}
    for number in os.listdir("/proc/self/fd"):
        if os.path.exists(link := f"/proc/self/fd/{number}"):
            used.add(os.readlink(link))
    for path in paths:
        real = os.path.realpath(path)
        if held := [file for file in used if file == real or file.startswith(real + os.sep)]:
            raise PermissionError(errno.EACCES, f"another process uses {held[0]}", str(path))


if __name__ == "__main__":
    for line in sys.argv[1:]:
        program, *sys.argv[1:] = shlex.split(line)
        try:
            runpy.run_module(program, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            if end.code:
                print(f"{line}: {end.code}", file=sys.stderr)
                raise
