"""The processes of one run: who this one is, and how all of them agree. Launchers set RANK, WORLD_SIZE and LOCAL_RANK.

How weights and work are spread over them stands in `parallel`. A run of one process never imports torch.distributed.
"""

import atexit
import os
import select
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from pickle import dumps, loads
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor

from radlads.errors import RadladsError, fail

T = TypeVar("T")
# Rank 0 may tokenise a corpus or write a model while the others wait; a training step has the watchdog's limit instead.
PATIENCE = timedelta(hours=24)
# How long processes wait for one that does not arrive at the start.
JOIN = timedelta(minutes=10)
# Seconds between signs of life of each process, and after how many without one a process counts as gone.
BEAT, GONE = 2.0, 45.0
# Bytes from which a tensor is worth a collective of its own.
LARGE = 4 * 2**20
# What a collective raises when the process at its other end is gone.
LOST = ("connection closed", "connection reset", "connection refused", "socket", "remote process", "timed out", "nccl", "gloo")


class World:
    """One process among `size`; `rank` 0 is the one that prints, logs and writes single files."""

    def __init__(self, rank: int = 0, size: int = 1, device: torch.device | None = None) -> None:
        self.rank, self.size = rank, size
        self.device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._control: Any = None
        self._saving: Any = None
        self._meeting: Any = None
        self._looks = 0
        self._leaving = threading.Event()
        self._outside: subprocess.Popen[bytes] | None = None
        self._meshes: dict[str, Any] = {}
        # Copies of the weights, each sharded over neighbours.
        self.copies = 1

    def keep_copies(self, copies: int) -> None:
        """Shard within groups of size / copies neighbours, each of which has all weights. R102 where that is no whole number."""
        if self.size > 1 and copies != self.copies:
            if self.size % copies:
                why = f"{self.size} processes do not make {copies} equal groups"
                raise fail("R102", where="parallel.copies", why=why, fix="Use a divisor of the number of processes")
            self.copies = copies
            self._meshes.clear()

    @property
    def shards(self) -> int:
        """Processes over which a tensor is sharded."""
        return self.size // self.copies

    @property
    def first(self) -> bool:
        """Whether this is the process that speaks."""
        return self.rank == 0

    @property
    def mesh(self) -> Any:
        """All processes as a DeviceMesh, over which FSDP shards: (shards,), or (copies, shards) where there are copies."""
        return self.mesh_of(self.device.type)

    @property
    def host_mesh(self) -> Any:
        """The same for tensors in the CPU's memory: a DTensor of the other mesh would move them to its devices."""
        return self.mesh_of("cpu")

    def mesh_of(self, kind: str) -> Any:
        """All processes as a mesh of devices of one kind, made when it is first asked for, which all processes must do."""
        if kind not in self._meshes:
            from torch.distributed.device_mesh import init_device_mesh

            shape, names = ((self.size,), ("shard",)) if self.copies == 1 else ((self.copies, self.shards), ("copy", "shard"))
            self._meshes[kind] = init_device_mesh(kind, shape, mesh_dim_names=names)
        return self._meshes[kind]

    @property
    def saving(self) -> Any:
        """The gloo group over which checkpoints are written beside training; None for one process."""
        return self._saving

    def connect(self) -> "World":
        """Join the other processes at MASTER_ADDR and MASTER_PORT. R406 where one of them does not come."""
        self.meet()
        try:
            self.make_groups()
        except RuntimeError as error:
            self.lost(error)
        return self

    def meet(self) -> None:
        """Wait for all processes; from then on one that is gone is noticed, whatever the others wait for."""
        from torch.distributed.rendezvous import rendezvous

        try:
            self._meeting, *_ = next(iter(rendezvous("env://", timeout=JOIN)))
            self.look_out()
        except RuntimeError as error:
            why = f"not all of them came within {JOIN.total_seconds():.0f} s ({str(error).partition('. ')[0][:160]})"
            fix = "See why the others ended, and run the same command again"
            raise fail("R406", where=f"rank {self.rank} of {self.size}", why=why, fix=fix) from error
        self._meeting.set_timeout(PATIENCE)

    def make_groups(self) -> None:
        """The groups over which processes train, agree and save."""
        import torch.distributed as dist

        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.set_device(self.device)
        backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
        # device_id makes NCCL connect at once, where errors are still readable.
        options: dict[str, Any] = {"store": self._meeting, "rank": self.rank, "world_size": self.size}
        dist.init_process_group(backend, timeout=PATIENCE, device_id=self.device if on_gpu else None, **options)
        self._control = dist.new_group(backend="gloo", timeout=PATIENCE)
        # A thread talks over it while training goes on: on one group the two would mix.
        self._saving = dist.new_group(backend="gloo", timeout=PATIENCE)

    def look_out(self, gone: float = GONE) -> None:
        """Watch the other processes from a thread: a collective on GPUs waits for ever for one that was killed."""
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        host = os.environ.get("MASTER_ADDR", "127.0.0.1")
        self._looks += 1
        place = f"lookout-{self._looks}"
        store = TCPStore(host, 0, is_master=True, wait_for_workers=False) if self.first else None
        if store is not None:
            self._meeting.set(place, str(store.port))
        port = int(self._meeting.get(place))
        store = store or TCPStore(host, port, is_master=False, wait_for_workers=False)
        store.set(f"beat-{self.rank}", "0")
        store.set(f"process-{self.rank}", f"{machine()} {os.getpid()}")
        store.wait([f"process-{rank}" for rank in range(self.size)], JOIN)
        self.stop_looking_out()
        self._leaving = threading.Event()
        neighbours = self.neighbours(store)
        self._outside = self.outside(neighbours)
        arguments = (store, self._leaving, gone, neighbours)
        threading.Thread(target=self.watch, args=arguments, name="lookout", daemon=True).start()

    def stop_looking_out(self) -> None:
        """The others may end from now on."""
        self._leaving.set()
        if self._outside is not None:
            self._outside.kill()
            self._outside.wait()
            self._outside = None

    def watch(self, store: Any, leaving: threading.Event, gone: float, neighbours: dict[int, int]) -> None:
        """Give a sign of life every now and then, and end this process when another one is gone or has given none for too long.

        Of a process on the same machine the kernel says at once that it is gone, before a launcher ends those that are left.
        """
        heard: dict[int, tuple[bytes, float]] = {}
        handles: dict[int, int] = {}
        for rank, pid in neighbours.items():
            with suppress(OSError):  # gone already: its signs of life tell
                handles[rank] = os.pidfd_open(pid)
        count = 0
        while not leaving.wait(BEAT):
            count += 1
            for rank in (rank for rank, handle in handles.items() if has_ended(handle)):
                # A moment for this process to see it by itself, and to say it better.
                if not leaving.wait(BEAT * 3):
                    self.end(leaving, f"rank {rank} is gone")
            try:
                store.set(f"beat-{self.rank}", str(count))
                for rank in range(self.size):
                    beat, now = store.get(f"beat-{rank}"), time.monotonic()
                    if heard.get(rank, (b"", 0.0))[0] != beat:
                        heard[rank] = beat, now
                    elif now - heard[rank][1] > gone:
                        self.end(leaving, f"rank {rank} has given no sign of life for {gone:.0f} s")
            except RuntimeError:
                # The store is rank 0's.
                if not leaving.wait(BEAT * 5):
                    self.end(leaving, "rank 0 is gone")
        for handle in handles.values():
            os.close(handle)

    def neighbours(self, store: Any) -> dict[int, int]:
        """Process ids of the others on this machine, by rank; none where the kernel cannot be asked about them."""
        if sys.platform != "linux" or not hasattr(os, "pidfd_open"):
            return {}
        places = (store.get(f"process-{rank}").decode().rpartition(" ") for rank in range(self.size))
        return {rank: int(pid) for rank, (where, _, pid) in enumerate(places) if rank != self.rank and where == machine()}

    def outside(self, neighbours: dict[int, int]) -> "subprocess.Popen[bytes] | None":
        """A process that ends this one when a neighbour is gone and this one cannot see it (see `lookout`)."""
        if not neighbours:
            return None
        others = [f"{rank}:{pid}" for rank, pid in neighbours.items()]
        program, message = str(Path(__file__).with_name("lookout.py")), self.gone_text("rank RANK is gone")
        command = [sys.executable, "-I", "-S", program, str(os.getpid()), message, *others]
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)

    def gone_text(self, why: str) -> str:
        """What is said when another process is gone."""
        fix = "Run the same command again: it goes on from the last checkpoint"
        return f"error: {fail('R406', where=f'rank {self.rank} of {self.size}', why=why, fix=fix)}"

    def end(self, leaving: threading.Event, why: str) -> None:
        """Say what happened and end this process, whatever it is waiting for."""
        if not leaving.is_set():
            print(self.gone_text(why), file=sys.stderr, flush=True)
            os._exit(1)

    def leave(self) -> None:
        """Let go of the other processes."""
        if self._control is not None:
            import torch.distributed as dist

            self.stop_looking_out()
            self.barrier()  # nobody takes down the store while another still looks
            dist.destroy_process_group()
            self._control = self._saving = self._meeting = None
            self._meshes.clear()

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set in any process."""
        if self.size == 1:
            return flag
        import torch.distributed as dist

        votes = torch.tensor([int(flag)])
        dist.all_reduce(votes, dist.ReduceOp.MAX, group=self._control)
        return bool(votes)

    def sum(self, count: int) -> int:
        """Sum over the processes of a whole number."""
        if self.size == 1:
            return count
        import torch.distributed as dist

        counts = torch.tensor([count])
        dist.all_reduce(counts, group=self._control)
        return int(counts)

    def sum_of_shards(self, value: Tensor) -> Tensor:
        """Sum over the processes that hold shards of one copy, in place."""
        if self.shards > 1:
            import torch.distributed as dist

            dist.all_reduce(value, group=None if self.copies == 1 else self.mesh.get_group("shard"))
        return value

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Sum tensors over the processes, in place: large ones where they lie, the small ones of each dtype as one."""
        if self.size == 1:
            return
        import torch.distributed as dist

        working = [dist.all_reduce(tensor, async_op=True) for tensor in tensors if tensor.nbytes >= LARGE]
        small: dict[torch.dtype, list[Tensor]] = defaultdict(list)
        for tensor in tensors:
            if tensor.nbytes < LARGE:
                small[tensor.dtype].append(tensor)
        joined = [torch.cat([tensor.flatten() for tensor in some]) for some in small.values()]
        working += [dist.all_reduce(tensor, async_op=True) for tensor in joined]
        for work in working:
            work.wait()
        for some, whole in zip(small.values(), joined, strict=True):
            parts = whole.split([tensor.numel() for tensor in some])
            torch._foreach_copy_(some, [part.view_as(tensor) for part, tensor in zip(parts, some, strict=True)])

    def share(self, value: T) -> T:
        """The value that rank 0 has, in every process."""
        if self.size == 1:
            return value
        import torch.distributed as dist

        box = [value if self.first else None]
        dist.broadcast_object_list(box, src=0, group=self._control)
        return box[0]  # type: ignore[return-value]

    def once(self, action: Callable[[], T]) -> T:
        """What `action` gives in rank 0, in every process (it must be picklable); its error is raised in all of them."""
        if self.size == 1:
            return action()
        found: tuple[bytes, RadladsError | None] = (b"", None)
        surprise: BaseException | None = None
        if self.first:
            try:
                found = dumps(action()), None
            except RadladsError as error:
                found = b"", error
            except BaseException as error:
                surprise = error
                found = b"", fail("R406", where="rank 0", why=f"{type(error).__name__}: {error}", fix="See its message")
        data, problem = self.share(found)
        if surprise is not None:
            raise surprise
        if problem is not None:
            raise problem
        return loads(data)  # made by rank 0 of this very run, sent over the run's own group

    def barrier(self) -> None:
        """Wait for all processes."""
        self.any(False)

    def lost(self, error: RuntimeError) -> NoReturn:
        """Raise R406 for a collective that failed because another process is gone, and any other error as it is."""
        text = str(error).lower()
        if self.size > 1 and any(sign in text for sign in LOST):
            why = f"another process of the run is gone ({str(error).partition('. ')[0][:160]})"
            fix = "Run the same command again: it goes on from the last checkpoint"
            leave_at_once()
            raise fail("R406", where=f"rank {self.rank} of {self.size}", why=why, fix=fix) from error
        raise error


def machine() -> str:
    """What two processes have in common that can see one another: the start of the kernel, and the table of processes."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as boot:
            return f"{boot.read().strip()} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


def has_ended(handle: int) -> bool:
    """Whether the process of a handle has ended, be it that nobody has asked for its status yet."""
    poll = select.poll()
    poll.register(handle, select.POLLIN)
    return bool(poll.poll(0))


def leave_at_once() -> None:
    """Make this process, which ends with an error, take nothing down: that would wait for GPUs that wait for other processes."""

    def end() -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)

    atexit.register(end)


def join_world(device: str | None = None) -> World:
    """The processes this one was started with; alone without a launcher. R101 for a launcher's variables that do not fit."""
    if int_of("WORLD_SIZE", 1) == 1:
        return World(device=None if device is None else torch.device(device))
    rank, size, local = int_of("RANK"), int_of("WORLD_SIZE"), int_of("LOCAL_RANK", 0)
    cuda = torch.cuda.is_available() and device != "cpu"
    if cuda and local >= torch.cuda.device_count():
        why = f"process {local} of this machine finds {torch.cuda.device_count()} GPUs"
        raise fail("R405", where="LOCAL_RANK", why=why, fix="Start one process a GPU")
    return World(rank, size, torch.device("cuda", local) if cuda else torch.device("cpu")).connect()


def int_of(name: str, default: int | None = None) -> int:
    """A whole number of the environment; R101 when it is missing or is none."""
    text = os.environ.get(name, "" if default is None else str(default))
    if not text.isascii() or not text.isdigit():
        fix = "Start the run with torchrun or `radlads launch`"
        raise fail("R101", where=f"environment variable {name}", why=f"it is {text!r}, no whole number", fix=fix)
    return int(text)
