"""Devices: programs kept between starts, memory that is free, and arrays spread over devices and processes."""

import contextlib
import ctypes
import hashlib
import os
import platform
import re
import sys
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tdmpc2_support.backend import graph_options
from tdmpc2_support.errors import UserError, one_line

T = TypeVar("T")

# Options of mallopt, from glibc's malloc.h
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
M_ARENA_MAX = -8

ELSEWHERE = "another process could not go on"


# Settings of JAX that the programs here are written for, whatever the shell has set for others
NEEDED = {
    "jax_enable_x64": False,
    "jax_numpy_dtype_promotion": "standard",
    "jax_numpy_rank_promotion": "allow",
    "jax_transfer_guard": "allow",
}


def set_up_jax(compile_cache: bool, distributed: bool = False) -> None:
    """Sets JAX to what the programs here are written for, with a sentence where the shell has something else, and keeps
    compiled programs if that is wanted.

    Raises:
        UserError: there is no device. If this process is to join others, that must come before such a look.
    """
    for name, value in NEEDED.items():
        found = getattr(jax.config, name)
        if found not in (None, value):
            jax.config.update(name, value)
            print(f"{name.upper()}={found} is not for this program, which sets it to {value}", file=sys.stderr)
    use_compile_cache(compile_cache)
    if distributed:
        return
    try:
        jax.devices()
    except (AssertionError, RuntimeError) as error:  # of a platform that is not there; the former without a word
        reason = one_line(" ".join(str(error).split()) or "it is not installed")
        named = os.environ.get("JAX_PLATFORMS")
        raise UserError(f"JAX finds no device here (JAX_PLATFORMS={named}): {reason}") from error


def use_compile_cache(wanted: bool) -> None:
    """Keeps compiled programs in the user's cache folder, one for each kind of processor, unless JAX was told another
    (JAX_COMPILATION_CACHE_DIR): the second start of a script does not compile again."""
    if not wanted or jax.config.jax_compilation_cache_dir:
        return
    with contextlib.suppress(OSError, RuntimeError):  # without a home that can be written to there is no cache
        caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(caches, "tdmpc2-jax", processor_kind())
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            return
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def processor_kind() -> str:
    """A short name of what this processor can do: programs compiled for another may not run on it."""
    described = Path("/proc/cpuinfo")
    text = described.read_text() if described.exists() else platform.processor()
    features = {*re.findall("(?m)^(?:flags|Features).*", text)}
    return hashlib.sha256("".join(sorted(features)).encode()).hexdigest()[:12]


def keep_freed_memory(root: Path = Path("/")) -> bool:
    """Tells the C library's allocator to keep memory that was freed for what is allocated next; whether it did.

    XLA allocates the temporary memory of a program anew at every call (89 MB for an update of the 1M model). Unless it
    is kept the system takes it back each time, and clears each page at its next first use: 22,000 page faults, about
    a third of an update's time on a CPU. Blocks of 1 GiB or more are still given back, as a large replay's copy for a
    checkpoint. One arena serves all threads: those of later threads cannot hold a block above 64 MB.

    Call it where a program starts: threads that have allocated before keep their arenas. It does nothing beside an
    accelerator, without glibc, or if the user has said how to allocate (GLIBC_TUNABLES=glibc.malloc..., MALLOC_...).
    root is the folder that holds dev/.
    """
    accelerators = [path for kind in ("nvidia[0-9]*", "accel*", "kfd") for path in (root / "dev").glob(kind)]
    told = "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    told = told or any(name.startswith("MALLOC_") for name in os.environ)
    if told or platform.libc_ver()[0] != "glibc" or (accelerators and os.environ.get("JAX_PLATFORMS") != "cpu"):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    if not mallopt(M_MMAP_THRESHOLD, 2**30):  # old versions allow 32 MiB, too little
        return False
    return bool(mallopt(M_TRIM_THRESHOLD, 2**30) and mallopt(M_ARENA_MAX, 1))


def shapes_on(sharding: jax.sharding.Sharding, make: Callable, *args: Any) -> Any:
    """Shapes and types of the arrays that make(*args) would return, all with this sharding: what a checkpoint is read
    into, whatever device has written it."""
    shapes = jax.eval_shape(make, *args)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)


def bytes_of(shapes: Any) -> int:
    """Bytes on one device of arrays, or of shapes with types and places."""
    return sum(np.prod(x.sharding.shard_shape(x.shape), dtype=int) * x.dtype.itemsize for x in jax.tree.leaves(shapes))


def available_bytes(device: jax.Device | None = None, root: Path = Path("/")) -> int:
    """Memory that may still be used: what an accelerator says of its own, or what is free of the machine's (of a CPU,
    or without a device) within the limits of this process's control groups. root is the folder that holds proc/."""
    stats = device.memory_stats() if device and device.platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError):  # only Linux says what is free of it
        lines = (root / "proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    for folder in control_groups(root):
        limits = numbers_in(folder, "memory.max", "memory.high", "memory.limit_in_bytes")
        if limits:
            free = min(free, min(limits) - used_bytes(folder))
    return max(0, free)


def control_groups(root: Path) -> list[Path]:
    """Folders of the control groups that count this process's memory: its own and, as their limits hold for it, too,
    those above it. Containers, SLURM jobs and systemd units are such groups. Both versions may be there at once."""
    folders = []
    with contextlib.suppress(OSError, ValueError):  # only Linux has them
        group_of = {}
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            if "memory" in controllers.split(","):
                group_of["cgroup"] = group
            elif not controllers:  # version 2 has one tree for everything
                group_of["cgroup2"] = group
        for line in (root / "proc/self/mountinfo").read_text().splitlines():
            mount, _, filesystem = line.partition(" - ")
            top, point = mount.split()[3:5]
            kind = filesystem.split()[0]
            if kind not in group_of or (kind == "cgroup" and "memory" not in filesystem.split()[-1].split(",")):
                continue
            group = Path(group_of[kind])
            below = group.relative_to(top) if group.is_relative_to(top) else Path()  # a container sees a part of it
            folders += [root / point[1:] / folder for folder in (below, *below.parents)]
    return folders


def used_bytes(folder: Path) -> int:
    """Memory that a control group uses, without the files that the kernel has cached for it: these give way. Files in
    /dev/shm do not, although they are counted as cached files, too: the two lists of files are without them."""
    used = sum(numbers_in(folder, "memory.current", "memory.usage_in_bytes"))
    with contextlib.suppress(OSError, ValueError):
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        for name in ("inactive_file", "active_file"):  # version 1 counts the groups below under total_
            used -= int(stat.get(f"total_{name}", stat.get(name, 0)))
    return used


def numbers_in(folder: Path, *names: str) -> list[int]:
    """The numbers in those of the files that exist; no limit is the word max."""
    found = []
    for name in names:
        with contextlib.suppress(OSError, ValueError):
            found.append(int((folder / name).read_text()))
    return found


def place_replay(make: Callable[[], Any], storage: str, buffer_size: int, total_timesteps: int) -> jax.Device:
    """The device in whose memory the replay that make() returns lies: the one that learns or, if that is too small or
    storage is "host", the CPU. Says which and why.

    Raises:
        UserError: it does not fit, beside the copies of it in the machine's memory that a checkpoint takes; names the
            buffer_size that does.
    """
    device = jax.devices()[0]
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(make)))
    fits = size < 0.7 * available_bytes(device)  # the rest is for learning
    if storage != "auto":
        reason = f"--storage {storage}"
    else:
        reason = "there is room" if fits else "the device's is too small"
    if storage == "host" or (storage == "auto" and not fits):
        device = host_device()
    place = "the machine's memory" if device.platform == "cpu" else "device memory"
    check_replay_fits(size, device, place, buffer_size, total_timesteps)
    print(f"replay of {buffer_size} decisions: {size / 1e9:.1f} GB in {place} ({reason})", flush=True)
    return device


def check_memory(
    make: Callable[[], Any],
    buffer_size: int,
    total_timesteps: int,
    make_other: Callable[[], Any] = tuple,
    shares: int = 1,
) -> None:
    """Refuses the replay that make() returns if it does not fit into the memory of the device that learns, with its
    copies; UserError names the buffer_size that does.

    Args:
        make_other: returns what is in that memory, too, and is not saved.
        shares: number of devices, of which each has an equal share of both.
    """
    device = jax.local_devices()[0]
    shapes = [jax.tree.leaves(jax.eval_shape(function)) for function in (make, make_other)]
    size, other = (sum(x.size * x.dtype.itemsize for x in each) for each in shapes)
    place = "the machine's memory" if device.platform == "cpu" else "device memory"
    check_replay_fits(size, device, place, buffer_size, total_timesteps, other, shares)


def host_device() -> jax.Device:
    """The CPU as JAX sees it.

    Raises:
        UserError: JAX_PLATFORMS leaves it out.
    """
    try:
        return jax.devices("cpu")[0]
    except RuntimeError as error:
        what = "a replay in the machine's memory needs JAX's CPU backend, too: add it to JAX_PLATFORMS"
        raise UserError(what) from error


def check_replay_fits(
    size: int,
    device: jax.Device,
    place: str,
    buffer_size: int,
    total_timesteps: int,
    other: int = 0,
    shares: int = 1,
) -> None:
    """Refuses a replay of `size` bytes that does not fit into a device's memory, named `place`, with its copies and
    beside `other` bytes. shares: see `check_memory`."""
    on_host = device.platform == "cpu"
    with_accelerator = jax.default_backend() != "cpu"
    copies = on_host + 1 + with_accelerator  # beside accelerators, checkpoints pass through pinned memory
    free_there = available_bytes(device) * (1 if on_host else shares)  # devices of a CPU have one memory
    largest = 0.9 * min(free_there - other, (available_bytes() - on_host * other) / copies)
    if size <= largest:
        return
    takes = f"takes {size / 1e9:.1f} GB of {place}, and "
    if with_accelerator:
        takes += "twice "
    takes += "as much again" if on_host else "as much of the machine's"
    enough = max(0, int(largest / size * buffer_size))
    free = f"{available_bytes() / 1e9:.1f} GB are free, enough for --buffer-size {enough}"
    if not on_host:
        free = f"{free_there / 1e9:.1f} GB and {free}"
    if other:
        free += f" beside {other / 1e9:.1f} GB of demonstrations"
    if total_timesteps < buffer_size:
        free += f"; --total-timesteps is {total_timesteps}"
    raise UserError(f"--buffer-size {buffer_size} {takes} whenever a checkpoint is written; {free}")


def groups_that_fit(items: Sequence[T], bytes_each: int) -> list[Sequence[T]]:
    """The items in their order, in groups of as many as a third of the memory that is free has space for, and one at
    least."""
    size = max(1, available_bytes() // 3 // bytes_each)
    return [items[i : i + size] for i in range(0, len(items), size)]


def committed(tree: Any) -> Any:
    """The same arrays, placed on the device that learns.

    An array is committed to a device if it was put there, or if a jitted function with such an argument returned it;
    what jnp.zeros(...) or jax.random.key(...) return is not. JAX compiles a program for each pattern of committed
    arguments: a loop with a committed replay and other arguments that are not compiles again in its second round.
    """
    return jax.device_put(tree, jax.devices()[0])


# ---------------------------------------------------------------------------------------- Several devices and processes
def least_available_bytes() -> int:
    """Memory that each device may use, of several processes the least, so that all decide alike; CPU devices share."""
    device = jax.local_devices()[0]
    free = available_bytes(device)
    if device.platform == "cpu":
        free //= jax.local_device_count()
    if jax.process_count() == 1:
        return free
    return int(multihost_utils.process_allgather(np.float64(free)).min())


def replicated(mesh: Mesh) -> NamedSharding:
    """A copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def split(mesh: Mesh, axis: int) -> NamedSharding:
    """The axis with this number is split over the devices."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, "devices"))


def placed(shapes: Any, mesh: Mesh, spread: str) -> Any:
    """The same shapes and types with places.

    Args:
        spread: "no": a copy on every device; "yes": each array is split over the devices along its longest axis that
            can be; "auto": so only if copies would take more than half of a device's free memory.
    """

    def place(x: jax.ShapeDtypeStruct | np.ndarray) -> jax.ShapeDtypeStruct:
        axes = [i for i in range(x.ndim) if x.shape[i] % mesh.size == 0] if spread == "yes" else []
        sharding = split(mesh, max(axes, key=lambda i: x.shape[i])) if axes else replicated(mesh)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    if spread == "auto":
        too_large = mesh.size > 1 and 2 * bytes_of(placed(shapes, mesh, "no")) > least_available_bytes()
        return placed(shapes, mesh, "yes" if too_large else "no")
    return jax.tree.map(place, shapes)


def columns_split(shapes: Any, mesh: Mesh) -> Any:
    """The shapes and types of a replay with places: its columns (axis 1) are split over the devices if they can be
    evenly; else, and of what has none, there is a copy on every device."""

    def place(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        even = x.ndim > 1 and x.shape[1] % mesh.size == 0
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split(mesh, 1) if even else replicated(mesh))

    return jax.tree.map(place, shapes)


def compile_within_memory(
    function: Callable, inputs: Sequence[Any], parts: dict[str, int], ways: str, **options: Any
) -> Callable:
    """The function compiled for inputs of these shapes, types and places. Prints what memory of each device it takes.

    Args:
        parts: bytes of the inputs on each device, by what they are called; "activations", if it is one of them: what
            they take at least.
        ways: to take less, for the sentence.
        options: of jax.jit.

    Raises:
        UserError: it does not fit; without compiling, if the parts do not.
    """
    free = least_available_bytes()
    program = None
    if sum(parts.values()) <= free:
        program = jax.jit(function, compiler_options=graph_options(), **options).lower(*inputs).compile()
        parts = parts | {"activations": program.memory_analysis().temp_size_in_bytes}
    text = ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in parts.items())
    if jax.process_index() == 0:
        print(f"memory of each device: {text}; {free / 1e9:.2f} GB are free", flush=True)
    if program is None or sum(parts.values()) > free:
        raise UserError(f"{sum(parts.values()) / 1e9:.2f} GB do not fit into {free / 1e9:.2f} GB ({ways})")
    return program


def global_arrays(values: Any, sharding: NamedSharding) -> Any:
    """Arrays of this process, equal in all processes if the sharding is replicated, as arrays of all devices."""
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), values)


def local_replica(params: Any, mesh: Mesh) -> Any:
    """The parameters whole on this process's first device; all processes must ask at the same time."""
    if not all(x.is_fully_replicated for x in jax.tree.leaves(params)):
        params = jax.jit(lambda x: x, out_shardings=replicated(mesh))(params)
    return jax.tree.map(lambda x: x.addressable_data(0), params)


def any_process(flag: Any) -> bool:
    """Whether the flag is set in any process; all processes must ask at the same time."""
    if jax.process_count() == 1:
        return bool(flag)
    return bool(multihost_utils.process_allgather(np.array(bool(flag))).any())


def on_all_processes(do: Callable[[], T]) -> T:
    """What do() returns in this process. If it raises an exception in any process, it ends all of them: that one with
    the exception, the others with a sentence. While others do it, do() must not wait for them."""
    if jax.process_count() == 1:
        return do()
    try:
        result = do()
    except Exception:
        any_process(True)
        raise
    if any_process(False):
        raise UserError(ELSEWHERE)
    return result


def require_same(what: str, *values: Any) -> None:
    """Refuses processes in which these values, called `what` in the sentence, have not the same text."""
    if jax.process_count() == 1:
        return
    numbers = multihost_utils.process_allgather(np.uint32(zlib.crc32(repr(values).encode())))
    if (numbers != numbers[0]).any():
        raise UserError(f"--distributed: the processes do not see the same {what}")


def copies(values: Any, sharding: NamedSharding) -> Any:
    """Arrays that are equal in all processes, with this sharding, which is to be a copy on every device."""
    if jax.process_count() == 1:
        return jax.device_put(values, sharding)
    return jax.jit(lambda x: x, out_shardings=sharding)(values)  # device_put takes no keys to another process


def gather_rows(values: Any) -> Any:
    """NumPy arrays [n / P, ...] of each of P processes as the arrays [n, ...] of all, the same in each: row i is one of
    process i modulo P."""
    arrays, structure = jax.tree.flatten(values)
    rows = len(arrays[0])
    packed = [np.ascontiguousarray(x).view(np.uint8).reshape(rows, -1) for x in arrays]  # JAX would round 8 bytes to 4
    gathered = multihost_utils.process_allgather(np.concatenate(packed, axis=1))  # [P, n / P, bytes]
    gathered = np.concatenate(gathered.swapaxes(0, 1))
    ends = np.cumsum([x.shape[1] for x in packed])
    parts = np.split(gathered, ends[:-1], axis=1)
    parts = [
        np.ascontiguousarray(part).view(x.dtype).reshape(-1, *x.shape[1:])
        for part, x in zip(parts, arrays, strict=True)
    ]
    return jax.tree.unflatten(structure, parts)


class EnvsOfAllProcesses:
    """A vector environment whose environments are shared out among processes: each steps its own, and is told what all
    return. An exception in one ends all. They draw no frames.

    Args:
        make: called with share=(k, P), makes the k-th of P shares: environments k, k + P, ... of all.
    """

    def __init__(self, make: Callable[..., Any]):
        share = jax.process_index(), jax.process_count()
        self._mine = slice(share[0], None, share[1])
        self._envs = on_all_processes(lambda: make(share=share))
        self.num_envs = self._envs.num_envs * share[1]

    def reset(self, *, seed: int | Sequence[int]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """An episode begins in every environment → obs [n, ...], infos."""
        obs, info = on_all_processes(lambda: self._envs.reset(seed=seed))
        zeros, no = np.zeros(len(obs)), np.zeros(len(obs), bool)
        self._last = obs, zeros, no, no, info
        return gather_rows((obs, info))

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        """One decision in every environment, actions [n, A] → obs, rewards, terminated, truncated, infos, of all."""
        problem = None
        try:
            self._last = self._envs.step(actions[self._mine])
        except Exception as error:  # told to the others with the results: they would wait for this process
            problem = error
        result, failed = gather_rows((self._last, np.full(self._envs.num_envs, problem is not None)))
        if failed.any():
            raise problem or UserError(ELSEWHERE)
        return result

    def close(self) -> None:
        """Frees the simulators of this process."""
        self._envs.close()


def check_shares(batch_size: int, num_envs: int = 0) -> None:
    """Refuses a batch or environments of which devices or processes cannot have equal shares."""
    number = jax.device_count()
    if batch_size % number:
        raise UserError(f"--batch-size {batch_size} cannot be split over {number} devices evenly")
    if num_envs % jax.process_count():
        uneven = f"{num_envs} environments cannot be shared out among {jax.process_count()} processes evenly"
        raise UserError(f"{uneven}: give another --num-envs")


def start_distributed(args: Any) -> None:
    """Joins the other processes, as SLURM or args.coordinator, args.num_processes and args.process_id describe them.

    Raises:
        UserError: they cannot be joined, or one of them does not see args.checkpoint.
    """
    jax.config.update("jax_enable_preemption_service", False)  # it would catch SIGTERM before we do
    try:
        jax.distributed.initialize(args.coordinator, args.num_processes, args.process_id)
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        ways = "start it under SLURM, or give --coordinator, --num-processes and --process-id"
        raise UserError(f"--distributed: {reason} ({ways})") from error
    if args.checkpoint:
        require_same(f"{args.checkpoint}", Path(args.checkpoint).exists())
