"""The processes of a run: who am I, on which device, and the few things that ranks say to one
another.

Host-side messages travel over a gloo group of their own, so that agreeing on something (a batch's
target count, whether to stop) never waits for the GPU.
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

TIMEOUT = timedelta(minutes=10)  # of a collective: a rank that hangs ends the run after this
POLL_SECONDS = 0.02  # between two looks into the launcher's store


@dataclass(frozen=True)
class World:
    """This process among the others. `control` is the gloo group for host-side messages (None when
    alone)."""

    rank: int
    local_rank: int
    size: int
    local_size: int
    device: torch.device
    control: Any = None

    @property
    def main(self) -> bool:
        return self.rank == 0


def start(device: str) -> World:
    """Join torchrun's processes (or be the only one) on `device`: auto, cpu, cuda or mps."""
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
    has written to.

    torchrun keeps one store over all its restarts (pytorch#135712). Ranks that were restarted would read in it the
    addresses of the ranks that died, and wait for those. Empty where the ranks make a store of
    their own.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return {}
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, size, is_master=False, timeout=TIMEOUT)
    fresh = dist.PrefixStore(rendezvous(store, rank, size, TIMEOUT.total_seconds()), store)
    return {"store": fresh, "rank": rank, "world_size": size}


def rendezvous(store: dist.Store, rank: int, size: int, seconds: float) -> str:
    """Agree on a name with the `size` ranks that run now, in a store that may hold what dead ranks
    wrote.

    Each rank writes a random name of its own. Rank 0 invites the names that it finds; a rank
    accepts an invitation that lists its name, and rank 0 opens the one that all have accepted. The
    dead accept nothing, so no rank can go on with what they left. Raises TimeoutError after
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
    """The value of a key, "" where it has none: `Store.get` would wait for it."""
    return store.get(key).decode() if store.check([key]) else ""


def _wait(deadline: float, whom: str) -> None:
    if time.monotonic() > deadline:
        raise TimeoutError(
            f"{whom} did not come to torchrun's store at MASTER_ADDR:MASTER_PORT in time"
        )
    time.sleep(POLL_SECONDS)


def launcher() -> str | None:
    """Names the torchrun that started this process, the same in all its restarts; None where there
    is none."""
    return f"{platform.node()} {os.getppid()}" if "TORCHELASTIC_RUN_ID" in os.environ else None


def restart_advice() -> str | None:
    """What a user of torchrun must set so that ranks can start again after a node has joined or
    left.

    torchrun's agents then disagree about whose store it is, and no rank can mend that. None where
    no node can join.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    several = int(os.environ.get("GROUP_WORLD_SIZE", "1")) > 1
    if not _nodes_may_join() and not (
        several and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
    ):
        return None
    return (
        "note: if a node joins or leaves this run, its ranks can only start again where the "
        "environment of torchrun has TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 on every node; restarts "
        "on the same nodes need nothing"
    )


def _nodes_may_join() -> bool:
    """Whether this process's launcher was told --nnodes MIN:MAX."""
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
    """`function(*args)`, where torchrun shows the traceback of a rank that fails, but none for the
    user's mistake."""
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
    """Leave the group; only after a run that ended alike on every rank."""
    if world.size > 1:
        dist.destroy_process_group()


def threads_per_rank(local_size: int) -> int:
    """CPU threads of one rank: this machine's cores, shared.

    torchrun sets OMP_NUM_THREADS=1, which leaves cores idle; any other value is the user's and
    stands.
    """
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked.isdigit() and (asked != "1" or "TORCHELASTIC_RUN_ID" not in os.environ):
        return max(1, int(asked))
    return max(1, machine.cores() // local_size)


def use_device(device: torch.device) -> None:
    """Let the calling thread work on this rank's GPU; nothing for other devices."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def choose_device(device: str, local_rank: int = 0) -> torch.device:
    """The device that `--device` means for a rank. Raises UserError for one that is not there."""
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
    """Every rank's value, by rank, on every rank (host side, pickled)."""
    if world.size == 1:
        return [value]
    values: list[Any] = [None] * world.size
    dist.all_gather_object(values, value, group=world.control)
    return values


def on_main(world: World, function: Callable[[], Any]) -> Any:
    """What rank 0's `function` returns, on every rank; its UserError is every rank's."""
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
    """Rank 0 runs the block before the others do, however long it takes: they find its work done,
    and it speaks."""
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
    """Sums of host numbers, in fp64. Ranks may lack keys that others have; sums run in rank
    order."""
    total: dict[str, float] = {}
    for of_rank in gather(world, values):
        for key, value in of_rank.items():
            total[key] = total.get(key, 0.0) + value
    return total


def all_reduce_sum(world: World, tensor: Tensor) -> None:
    """Sum a device tensor over ranks, in place."""
    if world.size > 1:
        dist.all_reduce(tensor)


def device_name(device: torch.device) -> str:
    """What the hardware calls itself: "NVIDIA H200", "AMD EPYC"."""
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
    """Peak memory so far: allocated on a GPU, resident in a CPU process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return machine.peak_resident_bytes()


def available_memory(device: torch.device, local_size: int) -> int:
    """Bytes that one rank may still take: free on its GPU, or its share of what the machine has
    free."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    share, left = machine.available_bytes() // local_size, machine.address_space_left()
    return share if left is None else min(share, left)


class StopSignal:
    """SIGTERM, SIGINT and SIGHUP, turned into an agreement of all ranks to stop at the same point.

    Until `defer()` a signal ends the process at once (there is nothing to save yet); from then on
    it only raises a flag, however often it comes. `agreed()` is called by every rank at the same
    points: each call starts a tiny asynchronous all-reduce of the flags and returns the result of
    the one that the call before started, so all ranks see the same answer at the same point, and
    none waits.
    """

    def __init__(self, world: World):
        self.world = world
        self.flag = 0
        self.deferred = False
        self.pending: tuple[Tensor, Any] | None = None
        self.before: dict[int, Any] = {}  # handlers, by signal

    def install(self) -> None:
        # the last: the terminal has closed; Windows lacks it
        for name in ("SIGTERM", "SIGINT", "SIGHUP"):
            number = getattr(signal, name, None)
            # nohup
            if number is not None and (
                name != "SIGHUP" or signal.getsignal(number) is not signal.SIG_IGN
            ):
                self.before[number] = signal.signal(number, self._received)

    def remove(self) -> None:
        """Give the signals back: what follows the run is ended by them at once."""
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def defer(self) -> None:
        self.deferred = True

    def _received(self, number: int, frame: FrameType | None) -> None:
        note_signal(number)
        if not self.deferred:
            raise SystemExit(128 + number)
        self.flag = self.flag or number

    def agreed(self) -> int:
        """The signal that some rank had received by the last call, on every rank alike; 0 for
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
