"""The processes of a run: this process's rank and device, and the messages between ranks.

Messages that are not on the GPU use a gloo group of their own. Ranks therefore agree on
something (a batch's target count, whether to stop) without waiting for the GPU.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import signal
import time
import uuid
from collections.abc import Callable, Generator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from base import machine
from base.signals import note_signal
from config import UserError

TIMEOUT = timedelta(minutes=10)  # of a collective: if a rank hangs for so long, the run ends
POLL_SECONDS = 0.02  # between two reads of the launcher's store


@dataclass(frozen=True)
class World:
    """This process's place among the processes of the run. `control` is the gloo group for messages
    that are not on the GPU, None for a single process."""

    rank: int
    local_rank: int
    size: int
    local_size: int
    device: torch.device
    control: Any = None

    @property
    def main(self) -> bool:
        """Whether this is rank 0, which prints and writes the files."""
        return self.rank == 0


def start(device: str) -> World:
    """Join torchrun's processes, if there are any, on `device`: auto, cpu, cuda or mps."""
    rank, local_rank, size, local_size = (
        int(os.environ.get(name, default))
        for name, default in (
            ("RANK", "0"),
            ("LOCAL_RANK", "0"),
            ("WORLD_SIZE", "1"),
            ("LOCAL_WORLD_SIZE", "1"),
        )
    )
    chosen = choose_device(device, local_rank)
    use_device(chosen)
    if chosen.type != "cuda":
        torch.set_num_threads(threads_per_rank(local_size))
    control = None
    if size > 1:
        if not dist.is_initialized():  # tools.verify has joined before the loop does
            backend = "nccl" if chosen.type == "cuda" else "gloo"
            dist.init_process_group(
                backend,
                timeout=TIMEOUT,
                device_id=chosen if backend == "nccl" else None,
                **_launcher_store(rank, size),
            )
        control = dist.new_group(backend="gloo", timeout=TIMEOUT)
    return World(rank, local_rank, size, local_size, chosen, control)


def _launcher_store(rank: int, size: int) -> dict[str, Any]:
    """Arguments that make init_process_group use a part of torchrun's store that no earlier start
    has written to. Empty if the ranks make a store of their own.

    torchrun keeps one store over all its restarts (pytorch#135712). Restarted ranks would read the
    addresses of dead ranks in it, and wait for those.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return {}
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, size, is_master=False, timeout=TIMEOUT)
    fresh = dist.PrefixStore(rendezvous(store, rank, size, TIMEOUT.total_seconds()), store)
    return {"store": fresh, "rank": rank, "world_size": size}


def rendezvous(store: dist.Store, rank: int, size: int, seconds: float) -> str:
    """Agree on a random name with the `size` ranks that run now, through a store that may still
    hold what dead ranks wrote.

    Each rank writes a random name of its own. Rank 0 invites the names that it finds. A rank
    accepts an invitation that lists its name, and rank 0 opens the meeting when all have accepted.
    Dead ranks accept nothing, so nobody can continue with what they left. Raises TimeoutError after
    `seconds`, naming the ranks that did not come.
    """
    store = dist.PrefixStore("meeting", store)
    deadline = time.monotonic() + seconds
    own = uuid.uuid4().hex
    store.set(f"name of {rank}", own)
    return _invite(store, size, deadline) if rank == 0 else _accept(store, rank, own, deadline)


def _invite(store: dist.Store, size: int, deadline: float) -> str:
    invited: list[str] = []
    meeting = ""
    while True:
        names = [_read(store, f"name of {rank}") for rank in range(size)]
        if "" not in names and names != invited:
            invited, meeting = names, uuid.uuid4().hex
            store.set(f"accepted {meeting} 0", "yes")
            store.set("invitation", " ".join([meeting, *names]))
        absent = [
            rank
            for rank in range(size)
            if not (meeting and _read(store, f"accepted {meeting} {rank}"))
        ]
        if not absent:
            store.set(f"opened {meeting}", "yes")
            return meeting
        _wait(deadline, f"ranks {absent}")


def _accept(store: dist.Store, rank: int, own: str, deadline: float) -> str:
    while True:
        meeting, *names = _read(store, "invitation").split() or [""]
        if own in names:
            store.set(f"accepted {meeting} {rank}", "yes")
            if _read(store, f"opened {meeting}"):
                return meeting
        _wait(deadline, "rank 0")


def _read(store: dist.Store, key: str) -> str:
    """The value of a key, or "". `Store.get` alone would wait until there is one."""
    return store.get(key).decode() if store.check([key]) else ""


def _wait(deadline: float, whom: str) -> None:
    if time.monotonic() > deadline:
        raise TimeoutError(
            f"{whom} did not come to torchrun's store at MASTER_ADDR:MASTER_PORT in time"
        )
    time.sleep(POLL_SECONDS)


def launcher() -> str | None:
    """A name for the torchrun that started this process, the same after its restarts. None without
    torchrun."""
    return f"{platform.node()} {os.getppid()}" if "TORCHELASTIC_RUN_ID" in os.environ else None


def restart_advice() -> str | None:
    """What a user of torchrun must set so that ranks can restart after a node has joined or left.
    None if no node can do so.

    Without the setting torchrun's agents then disagree about which of them hosts the store, and no
    rank can repair that.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    several = int(os.environ.get("GROUP_WORLD_SIZE", "1")) > 1
    if not _nodes_may_join() and not (
        several and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
    ):
        return None
    return (
        "note: if a node joins or leaves this run, its ranks can only restart if torchrun's "
        "environment has TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 on every node; restarts on the same "
        "nodes do not need it"
    )


def _nodes_may_join() -> bool:
    """Whether torchrun was started with --nnodes MIN:MAX."""
    try:
        words = (
            Path(f"/proc/{os.getppid()}/cmdline")
            .read_text(encoding="utf-8", errors="replace")
            .split("\0")
        )
    except OSError:
        words = []
    options = " ".join([f"--nnodes {os.environ.get('PET_NNODES', '')}", *words])
    return any(low != high for low, high in re.findall(r"--nnodes[= ](\d+):(\d+)", options))


def record_failures(function: Callable[..., Any], *args: Any) -> Any:
    """Call `function(*args)` and let torchrun show the traceback if it fails, except for a
    UserError, which is the user's mistake."""
    from torch.distributed.elastic.multiprocessing.errors import record

    def attempt() -> Any:
        try:
            return function(*args)
        except UserError as error:
            return error

    result = record(attempt)()
    if isinstance(result, UserError):
        raise result
    return result


def finish(world: World) -> None:
    """Leave the process group. Every rank must call this, after a run that ended normally."""
    if world.size > 1:
        dist.destroy_process_group()


def threads_per_rank(local_size: int) -> int:
    """CPU threads of one rank: an equal share of this machine's cores.

    torchrun sets OMP_NUM_THREADS=1, which leaves cores idle, so that is ignored. Any other value is
    the user's and is used.
    """
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked.isdigit() and (asked != "1" or "TORCHELASTIC_RUN_ID" not in os.environ):
        return max(1, int(asked))
    return max(1, machine.cores() // local_size)


def use_device(device: torch.device) -> None:
    """Make the calling thread use this rank's GPU. Does nothing for other devices."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def choose_device(device: str, local_rank: int = 0) -> torch.device:
    """The device that `--device` means for a rank. Raises UserError if it does not exist."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if device == "auto":
        device = "cuda" if cuda else "mps" if mps else "cpu"
    if (device == "cuda" and not cuda) or (device == "mps" and not mps):
        raise UserError(
            f"--device {device}: this machine (or this build of PyTorch) has none; use --device cpu"
        )
    if device == "cuda" and local_rank >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise UserError(f"more processes than GPUs: use torchrun --nproc_per_node={count}")
    return torch.device(device, local_rank) if device == "cuda" else torch.device(device)


def gather(world: World, value: Any) -> list[Any]:
    """Every rank's value, in the order of ranks, on every rank. Values are pickled."""
    if world.size == 1:
        return [value]
    values: list[Any] = [None] * world.size
    dist.all_gather_object(values, value, group=world.control)
    return values


def on_main(world: World, function: Callable[[], Any]) -> Any:
    """Call `function` on rank 0, and return its result, or raise its UserError, on every rank."""
    result: Any = None
    if world.main:
        try:
            result = function()
        except UserError as error:
            result = error
    result = gather(world, result)[0]
    if isinstance(result, UserError):
        raise result
    return result


@contextlib.contextmanager
def main_first(world: World) -> Generator[None]:
    """Run the block on rank 0 first, however long it takes, then on the others. The others then
    find its files, and only rank 0 prints its progress."""
    if world.size == 1:
        yield
        return
    group = dist.new_group(backend="gloo", timeout=timedelta(days=7))
    if not world.main:
        dist.barrier(group)
    try:
        yield
    finally:
        if world.main:
            dist.barrier(group)


def sum_over_ranks(world: World, values: dict[str, float]) -> dict[str, float]:
    """Add up numbers by key over ranks, in fp64 and in the order of ranks. Not every rank needs to
    have every key."""
    total: dict[str, float] = {}
    for part in gather(world, values):
        for key, value in part.items():
            total[key] = total.get(key, 0.0) + value
    return total


def all_reduce_sum(world: World, tensor: Tensor) -> None:
    """Sum a device tensor over ranks, in place."""
    if world.size > 1:
        dist.all_reduce(tensor)


def device_name(device: torch.device) -> str:
    """The hardware's own name, such as "NVIDIA H200" or "AMD EPYC"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = (
                line.partition(":")[2].strip() for line in file if line.startswith("model name")
            )
            return next(names)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def memory_bytes(device: torch.device) -> int:
    """Peak memory so far in bytes: allocated on the GPU, or resident on other devices."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return machine.peak_resident_bytes()


def available_memory(device: torch.device, local_size: int) -> int:
    """Bytes that one rank may still use: the free memory of its GPU, or its share of the machine's
    free memory."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    share, left = machine.available_bytes() // local_size, machine.address_space_left()
    return share if left is None else min(share, left)


class StopSignal:
    """Turns SIGTERM, SIGINT and SIGHUP into an agreement of all ranks to stop at the same point.

    Before `defer()` a signal ends the process at once, because there is nothing to save yet.
    Afterwards it only sets a flag, however often it comes. Every rank calls `agreed()` at the same
    points. Each call starts a tiny asynchronous all-reduce of the flags and returns the result of
    the previous call's, so all ranks get the same answer at the same point and hardly wait.
    """

    def __init__(self, world: World):
        self.world = world
        self.flag = 0
        self.deferred = False
        self.pending: tuple[Tensor, Any] | None = None
        self.before: dict[int, Any] = {}  # handlers, by signal

    def install(self) -> None:
        """Handle the signals. SIGHUP stays ignored if nohup has set that."""
        for name in ("SIGTERM", "SIGINT", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            if number is not None and (
                name != "SIGHUP" or signal.getsignal(number) is not signal.SIG_IGN
            ):
                self.before[number] = signal.signal(number, self._received)

    def remove(self) -> None:
        """Restore the previous handlers."""
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def defer(self) -> None:
        """From now on let a signal only set the flag."""
        self.deferred = True

    def _received(self, number: int, frame: FrameType | None) -> None:
        note_signal(number)
        if not self.deferred:
            raise SystemExit(128 + number)
        self.flag = self.flag or number

    def agreed(self) -> int:
        """The signal that some rank had received by the previous call, the same on every rank; 0:
        none."""
        if self.world.size == 1:
            return self.flag
        result = 0
        if self.pending is not None:
            flags, work = self.pending
            work.wait()
            result = int(flags.item())
        flags = torch.tensor([self.flag])
        self.pending = (
            flags,
            dist.all_reduce(flags, dist.ReduceOp.MAX, group=self.world.control, async_op=True),
        )
        return result
