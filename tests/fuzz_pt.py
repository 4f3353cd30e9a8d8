"""Mutated PyTorch files: `load_pt` may read them or refuse them with one sentence, and nothing else.

    python tests/fuzz_pt.py --json benchmarks/results/fuzz_pt.json
    python tests/fuzz_pt.py --seed 1 --count 10000

Files are made of recorded ones and of small ones with every kind of tensor: flipped bits, cuts, zips whose headers lie,
pickles with opcodes exchanged, positions that overflow, storages that are not there, and programs that were written to
harm. File i of a seed is always the same. Each is loaded copied and in place by a child process whose address space is
limited, so that a crash or an allocation beyond twice the file + 64 MB shows; so do an exception that is no UserError,
an array beyond its storage, and whatever Python's audit hooks see of code being run. Exits with 1 if anything shows.
"""

import dataclasses
import json
import os
import pickletools
import platform
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import time
import tracemalloc
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tyro

from tdmpc2_support.data import pt
from tdmpc2_support.errors import UserError

ROOT = Path(__file__).parent.parent
ALLOWED = 64 * 2**20  # bytes beyond twice the file
SECONDS = 60  # for one file
MEMORY = "/dev/shm"  # files are written there, if it is there


@dataclasses.dataclass(frozen=True)
class Args:
    count: int = 150_000  # files
    processes: int = 2  # child processes at a time
    seed: int = 0  # of the mutations
    json: str | None = None  # also write the results to this file


class Parts(NamedTuple):
    """What a PyTorch file is made of."""

    program: bytes  # data.pkl
    members: dict[str, bytes]  # data/0, …


# ----------------------------------------------------------------------------------------------------------- Good files
def text(value: bytes) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value


def number(value: int) -> bytes:
    if 0 <= value < 256:
        return b"K" + bytes([value])
    content = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(content)]) + content


def pid(kind: bytes, key: bytes, length: int) -> bytes:
    return b"(" + text(b"storage") + b"ctorch\n" + kind + b"\n" + text(key) + text(b"cpu") + number(length) + b"tQ"


def rebuild(storage: bytes, offset: bytes, size: list[bytes], stride: list[bytes]) -> bytes:
    positions = offset + b"(" + b"".join(size) + b"t(" + b"".join(stride) + b"t"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + positions + b"\x89ccollections\nOrderedDict\n)RtR"


KINDS = {
    b"FloatStorage": 4, b"HalfStorage": 2, b"BFloat16Storage": 2, b"LongStorage": 8, b"BoolStorage": 1,
    b"DoubleStorage": 8,
}  # fmt: skip


def every_kind_of_tensor() -> Parts:
    """A small checkpoint."""
    items, members = b"", {}
    for key, (kind, itemsize) in enumerate(KINDS.items()):
        members[f"data/{key}"] = bytes(i % 2 for i in range(24 * itemsize))
        storage = pid(kind, b"%d" % key, 24)
        whole = rebuild(storage, number(0), [number(4), number(6)], [number(6), number(1)])
        view = rebuild(storage, number(3), [number(3), number(4)], [number(1), number(5)])
        items += text(b"w%d" % key) + whole + text(b"v%d" % key) + view
    parameter = b"ctorch._utils\n_rebuild_parameter\n(" + whole + b"\x88ccollections\nOrderedDict\n)RtR"
    quantiser = b"ctorch\nper_tensor_affine\nG" + struct.pack(">d", 0.1) + number(3) + b"\x87"
    quantised = rebuild(pid(b"QInt8Storage", b"9", 24), number(0), [number(24)], [number(1)])
    quantised = quantised.replace(b"_rebuild_tensor_v2", b"_rebuild_qtensor").replace(b"\x89c", quantiser + b"\x89c")
    members["data/9"] = bytes(range(24))
    nested = b"ctensordict._reductions\n_make_td\nctensordict._td\nTensorDict\n}" + text(b"_tensordict")
    nested += b"}(" + items + b"us\x86R"
    state = b"ccollections\nOrderedDict\n)R(" + items + b"u}" + text(b"_metadata") + b"}sb"
    optimiser = b"}(" + b"".join(number(i) + b"}" + text(b"step") + b"G" + bytes(8) + b"s" for i in range(20)) + b"u"
    program = b"\x80\x02}(" + text(b"model") + state + text(b"td") + nested + text(b"p") + parameter
    program += text(b"q") + quantised + text(b"opt") + optimiser + text(b"l") + b"](K\x01K\x02NG" + bytes(8) + b"e"
    return Parts(program + text(b"size") + b"ctorch\nSize\n(K\x02K\x03t\x85Ru.", members)


def recorded(path: Path) -> Parts:
    """A file of real PyTorch."""
    archive = pt._Archive(path)
    members = {name.split("/", 1)[1]: bytes(archive.read(name)) for name in archive.members}
    return Parts(members.pop("data.pkl"), members)


def good_files() -> list[Parts]:
    own = [every_kind_of_tensor()]
    paths = sorted((ROOT / "tests" / "golden").glob("chunk_*.pt")) + [ROOT / "tests/golden/two_q_released_layout.pt"]
    return own * 4 + [recorded(path) for path in paths]


# ------------------------------------------------------------------------------------------------------------------ Zip
EDGES = [0, 1, 2, 7, 30, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1]
LOCAL = struct.Struct("<4s5H3I2H")  # … method 3, … checksum 6, packed 7, size 8, name 9, extra 10
CENTRAL = struct.Struct("<4s6H3I5H2I")  # … flags 3, method 4, … checksum 7, packed 8, size 9, … offset 16
END = struct.Struct("<4s4H2IH")  # … counts 3 and 4, size of the directory 5, its offset 6, comment 7


def pack(members: list[tuple[str, bytes]], lie: Callable[[str, list], None] = lambda what, fields: None) -> bytes:
    """A zip file of these members as PyTorch lays it out; `lie` may change the fields of every header."""
    content, directory = bytearray(), bytearray()
    for name, data in members:
        crc, size, encoded = zlib.crc32(data), len(data), name.encode("utf-8", "surrogatepass")
        local = [b"PK\3\4", 20, 0, 0, 0, 0, crc, size, size, len(encoded), 0]
        central = [b"PK\1\2", 20, 20, 0, 0, 0, 0, crc, size, size, len(encoded), 0, 0, 0, 0, 0, len(content)]
        lie("local", local)
        lie("central", central)
        content += LOCAL.pack(*local) + encoded + data
        directory += CENTRAL.pack(*central) + encoded
    end = [b"PK\5\6", 0, 0, len(members), len(members), len(directory), len(content), 0]
    lie("end", end)
    return bytes(content + directory) + END.pack(*end)


def members_of(parts: Parts) -> list[tuple[str, bytes]]:
    return [("archive/data.pkl", parts.program)] + [(f"archive/{name}", data) for name, data in parts.members.items()]


def lying_headers(rng: np.random.Generator, parts: Parts) -> bytes:
    """One to three fields of the headers hold something else."""
    widths = {"local": LOCAL, "central": CENTRAL, "end": END}
    left = int(rng.integers(1, 4))

    def lie(what, fields):
        nonlocal left
        if left and rng.random() < 0.3:
            left -= 1
            i = int(rng.integers(1, len(fields)))
            near = [fields[i] + 1, max(fields[i] - 1, 0), fields[i] * 2]
            value = int(rng.choice(EDGES + near))
            sizes = [size for size in widths[what].format.replace("4s", "s")[1:]]
            letters = "".join(letter * int(count or 1) for count, letter in _runs("".join(sizes)))
            fields[i] = value % (2**16 if letters[i] == "H" else 2**32)

    return pack(members_of(parts), lie)


def _runs(layout: str) -> Iterator[tuple[str, str]]:
    count = ""
    for letter in layout:
        if letter.isdigit():
            count += letter
        else:
            yield count, letter
            count = ""


BOMB = zlib.compress(bytes(2**26), 9, -15)


def strange_members(rng: np.random.Generator, parts: Parts) -> bytes:
    """Members that stand twice, lie in one place, are compressed, missing, renamed, exchanged, or far too many."""
    members, way = members_of(parts), int(rng.integers(7))
    i, j = (int(k) for k in rng.integers(len(members), size=2))
    if way == 0:
        members.insert(j, members[i])
    elif way == 1:
        del members[i]
    elif way == 2:
        names = [
            "archive/data.pkl",
            "b/data.pkl",
            "archive/../data/0",
            "\0",
            "x" * 60000,
            "\ud800",
            "archive/byteorder",
        ]
        members[i] = (str(rng.choice(names)), members[i][1])
    elif way == 3:
        members[i], members[j] = (members[i][0], members[j][1]), (members[j][0], members[i][1])
    elif way == 4:
        count = int(rng.choice([100, 1000, 30_000], p=[0.5, 0.45, 0.05]))
        members += [(f"archive/data/{k}", b"") for k in range(100, 100 + count)]
    elif way == 5:  # compressed, and much larger than it looks
        packed = bool(rng.integers(2)) or i
        members[i] = (members[i][0], BOMB if packed else zlib.compress(members[i][1], 9, -15))

        def compressed(what, fields):
            if what != "end" and fields[7 if what == "local" else 8] == len(members[i][1]):
                fields[3 if what == "local" else 4] = 8
                fields[8 if what == "local" else 9] = 2**26

        return pack(members, compressed)
    else:
        place = int(rng.integers(2**10))
        return pack(members, lambda what, fields: fields.__setitem__(16, place) if what == "central" else None)
    return pack(members)


# --------------------------------------------------------------------------------------------------------------- Pickle
INTEGERS = ("BININT", "BININT1", "BININT2", "LONG1")
ARRAY = rebuild(pid(b"LongStorage", b"3", 24), number(0), [], [])
NUMBERS = [
    number(n) for n in (-1, 0, 1, 2, 24, 25, 2**31, 2**32, 2**61 - 1, 2**62 + 1, 2**63 - 1, 2**63, 2**64, -(2**63))
]
FEW = [number(n) for n in (0, 1, 2, 3, 4, 5, 6, 23, 24)]
NUMBERS += [
    b"\x88",
    b"\x89",
    b"N",
    b"G" + struct.pack(">d", float("nan")),
    ARRAY,
    b"(K\x01t",
    text(b"1"),
    number(2**2000),
]
SNIPPETS = [
    *NUMBERS, b"(", b"t", b"R", b"b", b"\x81", b"}", b"]", b")", b"u", b"s", b"a", b"e", b"Q", b"0", b"1", b"2", b".",
    b"\x94", b"q\x00", b"q\x05", b"r\xff\xff\xff\x0f", b"h\x00", b"h\x07", b"j\xff\xff\xff\x7f", b"\x85", b"\x86",
    b"\x87", b"d", b"l", b"o", b"(i__builtin__\neval\n", b"\x82\x01", b"\x92", b"\x93", b"\x8f", b"\x90", b"\x91",
    b"C\x03abc", b"V\\u1234\n", b"Phello\n", b"I1" + b"0" * 5000 + b"\n", b"F1e999\n", b"X\xff\xff\xff\xff",
    b"\x8b\xff\xff\xff\x7f", b"\x95" + bytes(8), b"cos\nsystem\n" + text(b"false") + b"\x85R", b"cbuiltins\neval\n",
    b"cbuiltins\ngetattr\n", b"cnumpy\nload\n", b"ctorch\nload\n", b"ctorch\nSize\n",
    b"ctorch\ndevice\n" + text(b"cpu") + b"\x85R", b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"ccollections\nOrderedDict\n", b"ctensordict._td\nTensorDict\n)\x81", b"c__builtin__\nset\n](K\x01e\x85R",
    text(b"x" * 70_000), text(b"\x1b[31m\r"), text("\U0001f600".encode() * 50), text(b"\xed\xa0\x80"),
]  # fmt: skip


def split(program: bytes) -> list[tuple[str, bytes]]:
    """A pickle's opcodes: name and bytes."""
    opcodes = list(pickletools.genops(program))
    ends = [place for _, _, place in opcodes[1:]] + [len(program)]
    return [(opcode.name, program[place:end]) for (opcode, _, place), end in zip(opcodes, ends, strict=True)]


def exchanged_opcodes(rng: np.random.Generator, parts: Parts, other: Parts) -> bytes:
    """One to four opcodes left out, doubled, swapped, put in, or taken from another file."""
    opcodes, others = split(parts.program), split(other.program)
    for _ in range(rng.integers(1, 5)):
        i, j, way = (int(k) for k in rng.integers([len(opcodes), len(opcodes), 5]))
        if way == 0 and len(opcodes) > 1:
            del opcodes[i : i + int(rng.integers(1, 4))]
        elif way == 1:
            opcodes[i:i] = [opcodes[i]] * int(rng.choice([1, 2, 100]))
        elif way == 2:
            opcodes[i], opcodes[j] = opcodes[j], opcodes[i]
        elif way == 3:
            opcodes[i:i] = [("", SNIPPETS[rng.integers(len(SNIPPETS))])]
        else:
            start = int(rng.integers(len(others)))
            opcodes[i:i] = others[start : start + int(rng.integers(1, 60))]
    if rng.integers(2):  # the memo is numbered anew, so that the machine goes on
        puts, memo = iter(range(len(opcodes))), ("BINPUT", "LONG_BINPUT")
        opcodes = [(name, b"r" + struct.pack("<I", next(puts)) if name in memo else code) for name, code in opcodes]
    return pack(members_of(parts._replace(program=b"".join(code for _, code in opcodes) or b".")))


def replaced(rng: np.random.Generator, parts: Parts, names: tuple[str, ...], values: list[bytes]) -> bytes:
    """One to four opcodes of these names replaced by these values, everything else as it was."""
    opcodes = split(parts.program)
    places = [i for i, (name, _) in enumerate(opcodes) if name in names]
    for i in rng.choice(places, size=min(len(places), int(rng.integers(1, 4))), replace=False):
        opcodes[i] = ("", values[rng.integers(len(values))])
    return pack(members_of(parts._replace(program=b"".join(code for _, code in opcodes))))


def lying_storages(rng: np.random.Generator, parts: Parts) -> bytes:
    """Persistent ids that are no storages, or others than the members."""
    kinds = [
        b"FloatStorage",
        b"DoubleStorage",
        b"ByteStorage",
        b"BFloat16Storage",
        b"QInt8Storage",
        b"ComplexFloatStorage",
    ]
    lies = [pid(kinds[rng.integers(6)], b"%d" % rng.integers(12), n) for n in (0, 1, 6, 24, 48, 96, 192, 2**62)]
    lies += [pid(b"FloatStorage", key, 24) for key in (b"", b"../0", b"\0", b"x" * 10_000, b"../byteorder")]
    lies += [
        b"NQ",
        b")Q",
        b"(NNNNNtQ",
        text(b"abcde") + b"Q",
        b"}Q",
        ARRAY + b"Q",
        ARRAY,
        b"N",
        b"ctorch\nFloatStorage\n",
    ]
    fields = [text(b"storage"), text(b"data"), b"ctorch\nFloatStorage\n", b"ctorch\nSize\n", *lies[-4:], *FEW, *NUMBERS]
    opcodes = split(parts.program)
    places = [i for i, (name, _) in enumerate(opcodes) if name == "BINPERSID"]
    for end in rng.choice(places, size=min(len(places), int(rng.integers(1, 4))), replace=False):
        start = max(i for i in range(end) if opcodes[i][0] == "MARK")
        if any("PUT" in name for name, _ in opcodes[start:end]):  # which would number the memo anew
            inside = [i for i in range(start, end) if opcodes[i][0] in ("BINUNICODE", "GLOBAL", "BINGET", *INTEGERS)]
            opcodes[inside[rng.integers(len(inside))]] = ("", fields[rng.integers(len(fields))])
        else:
            opcodes[start : end + 1] = [("", b"")] * (end - start) + [("", lies[rng.integers(len(lies))])]
    return pack(members_of(parts._replace(program=b"".join(code for _, code in opcodes))))


def attack(rng: np.random.Generator, parts: Parts) -> bytes:
    """A program written to harm: to run code, to take memory or time, or to reach beyond a storage."""
    n = int(rng.choice([10, 1000, 20_000, 300_000], p=[0.4, 0.5, 0.08, 0.02]))
    storage, few = pid(b"FloatStorage", b"0", 24), min(n, 20_000)
    pairs = b"".join(text(b"%d" % i) + b"N" for i in range(few))
    step = int(rng.choice([2**61 - 1, 2**20, 2**40, 3]))
    calls = b"os.system posix.system builtins.exec subprocess.Popen shutil.rmtree functools.partial numpy.load"
    calls = [b"c" + call.replace(b".", b"\n") + b"\n" for call in calls.split()]
    target = [
        b"ctorch._utils\n_rebuild_tensor_v2\n",
        b"ccollections\nOrderedDict\n",
        b"ctorch\nSize\n",
        ARRAY,
        storage,
        b"]",
    ]
    sizes = [NUMBERS[i] for i in rng.integers(len(NUMBERS), size=6)]
    large = rebuild(storage, number(0), [number(4), number(6)], [number(6), number(1)]) + b"q\x00"
    tensordict = b"ctensordict._td\nTensorDict\nq\x00}(" + text(b"_tensordict") + b"}(" + pairs + b"uuq\x01"
    programs = [
        calls[rng.integers(len(calls))] + text(b"touch harmed") + b"\x85R",
        target[rng.integers(len(target))] + b"}" + text(b"__defaults__") + b")sb",
        target[rng.integers(len(target))] + b"N}" + text(b"__class__") + b"Ns\x86b",
        b"N" + b"r" + struct.pack("<I", int(rng.integers(2**32))),
        rebuild(storage, sizes[0], sizes[1:3], sizes[3:5]),
        rebuild(rebuild(storage, number(0), [number(24)], [number(0)]), number(0), sizes[:1], sizes[1:2]),
        rebuild(rebuild(storage, number(0), [number(10**9), number(0)], [b"K\0K\0"]), number(0), [number(n)], [b"K\1"]),
        rebuild(storage, number(0), [number(n * 10**6)], [number(0)]),
        b"(" + large + b"h\x00" * n + b"t",
        b"}(" + b"".join(number(i * step) + b"N" for i in range(few)) + b"u",
        b"c__builtin__\nset\n](" + b"".join(number(i * step) for i in range(few)) + b"e\x85R",
        bytes(rng.choice([b"}", b"]", b"(", b"N", b"K\1\x85", b")"])) * n,
        b"(" + tensordict + b"h\x00)\x81h\x01b" * few + b"t",
        tensordict + b"0ctensordict._reductions\n_make_td\nh\x00h\x01\x86R",
        b"]q\x00h\x00a" + b"h\x00\x85" * few,
        b"ctorch\n" + b"\x1b[2J" * few + b"\n",
        text("\U0001f600".encode() + b"a" * 10 * few) + b"q\x00}h\x00h\x00s",
        b"ctorch\ndevice\n" + text(b"x" * few) + b"\x85R",
        b"N\x85" * few + b"\x85" * few,
    ]
    program = b"\x80\x02" + programs[rng.integers(len(programs))] + b"."
    return pack(members_of(parts._replace(program=program)))


# ------------------------------------------------------------------------------------------------------------ Mutations
def flipped(rng: np.random.Generator, content: bytes, most: int = 16) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.integers(1, most + 1)):
        changed[rng.integers(len(changed))] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def cut(rng: np.random.Generator, content: bytes) -> bytes:
    """Truncated, with a piece missing or doubled, or with something before or behind it."""
    i, j = sorted(int(k) for k in rng.integers(len(content) + 1, size=2))
    junk = rng.bytes(int(rng.integers(1, 200)))
    ways = [
        content[:i],
        content[:i] + content[j:],
        content[:j] + content[i:],
        junk + content,
        content + junk,
        content[i:],
    ]
    return ways[rng.integers(len(ways))]


MUTATIONS = {
    "flipped bits": lambda rng, parts, other: flipped(rng, pack(members_of(parts))),
    "cuts": lambda rng, parts, other: cut(rng, pack(members_of(parts))),
    "zip headers": lambda rng, parts, other: lying_headers(rng, parts),
    "zip members": lambda rng, parts, other: strange_members(rng, parts),
    "pickle bits": lambda rng, parts, other: pack(
        members_of(parts._replace(program=flipped(rng, parts.program, most=4)))
    ),
    "pickle opcodes": lambda rng, parts, other: exchanged_opcodes(rng, parts, other),
    "numbers": lambda rng, parts, other: replaced(rng, parts, INTEGERS, FEW if rng.integers(2) else NUMBERS),
    "storages": lambda rng, parts, other: lying_storages(rng, parts),
    "attacks": lambda rng, parts, other: attack(rng, parts),
}


def mutated(seed: int, i: int, files: list[Parts]) -> tuple[str, bytes]:
    """File i of this seed: the name of its mutation, and its bytes."""
    rng = np.random.default_rng((seed, i))
    kind = list(MUTATIONS)[i % len(MUTATIONS)]
    parts, other = (files[k] for k in rng.integers(len(files), size=2))
    return kind, MUTATIONS[kind](rng, parts, other)


# --------------------------------------------------------------------------------------------------------------- Checks
HARMLESS = {"open", "mmap.__new__", "sys._getframe", "object.__getattr__"}  # what reading a file may be seen to do
SEEN: list[str] | None = None  # audit events, while a file is loaded


def watch(event: str, arguments: tuple) -> None:
    if SEEN is not None and event not in HARMLESS:
        SEEN.append(f"{event} {arguments!r:.80}")


def arrays_in(value: Any) -> Iterator[np.ndarray]:
    """All arrays of what was loaded; anything that is neither an array nor plain is an error."""
    seen, todo = set(), [value]
    while todo:
        value = todo.pop()
        if isinstance(value, np.ndarray):
            yield value
        elif isinstance(value, (dict, list, tuple, set)) and not isinstance(value, pt._Storage):
            if id(value) not in seen:
                seen.add(id(value))
                todo += [*value, *value.values()] if isinstance(value, dict) else value
        elif not isinstance(value, (str, int, float, type(None), pt._Storage)):
            raise TypeError(f"a {type(value).__name__} was handed out")


def check_array(array: np.ndarray) -> None:
    """Its numbers are its own, or lie in the member that it was made of; reads them all."""
    base = array.base
    if base is not None:
        whole = base if isinstance(base, np.ndarray) else np.frombuffer(base, np.uint8)
        low, high = np.lib.array_utils.byte_bounds(array)
        start, end = np.lib.array_utils.byte_bounds(whole)
        if array.size and not start <= low <= high <= end:
            raise ValueError("an array reaches beyond its storage")
    array.tobytes()


def load(path: Path, in_place: bool) -> tuple[bool, str | None]:
    """Whether the file was read, and what was wrong about the way in which it was read or refused."""
    global SEEN
    SEEN, fault, value = [], None, None
    try:
        value = pt.load_pt(path, in_place)
    except UserError as error:
        if isinstance(error.__context__, MemoryError):
            fault = "memory beyond twice the file + 64 MB"
        elif not str(error).startswith(str(path)) or not str(error).isprintable() or len(str(error)) > 500:
            fault = f"the sentence {error!r:.80}"
        value, read = None, False
    except BaseException as error:
        return False, f"{type(error).__name__}: {error!s:.80}"
    else:
        read = True
    finally:
        seen, SEEN = SEEN, None
    if seen:
        return read, f"audit events {seen[:3]}"
    try:
        for array in arrays_in(value):
            check_array(array)
    except Exception as error:
        return read, f"{type(error).__name__}: {error!s:.80}"
    return read, fault


def child(seed: int, first: int, count: int, folder: str) -> None:
    """Loads files first … first + count; writes a line of JSON for each, after its number alone before it is loaded."""
    warnings.simplefilter("ignore")
    files, path = good_files(), Path(folder, "mutated.pt")
    for parts in files:
        path.write_bytes(pack(members_of(parts)))
        pt.load_pt(path), pt.load_pt(path, in_place=True)
    bytes(range(128, 256)).decode("cp437")  # as zip files name members: the codec is loaded on first use
    sys.addaudithook(watch)
    space = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    for i in range(first, first + count):
        kind, content = mutated(seed, i, files)
        path.write_bytes(content)
        print(json.dumps({"file": i, "kind": kind}), flush=True)
        size, traced, began = len(content), i % 11 == 0, time.perf_counter()
        signal.alarm(SECONDS)
        if traced:
            tracemalloc.start()
        else:
            resource.setrlimit(resource.RLIMIT_AS, (space + 2 * size + ALLOWED, resource.RLIM_INFINITY))
        outcomes = [load(path, in_place) for in_place in (False, True)]
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        peak = tracemalloc.get_traced_memory()[1] if traced else None
        tracemalloc.stop()
        signal.alarm(0)
        faults = [fault for _, fault in outcomes if fault]
        if traced and peak > 2 * size + ALLOWED:
            faults.append(f"{peak / 2**20:.0f} MB for a file of {size} bytes")
        read = [read for read, _ in outcomes]
        line = {"file": i, "read": read, "faults": faults, "seconds": time.perf_counter() - began}
        print(json.dumps(line | ({"extra": peak - 2 * size} if traced else {})), flush=True)


# ---------------------------------------------------------------------------------------------------------------- Total
@dataclasses.dataclass
class Total:
    """What happened to the files, per mutation."""

    read: Counter = dataclasses.field(default_factory=Counter)  # copied, in place, or both ways
    refused: Counter = dataclasses.field(default_factory=Counter)
    faults: list[str] = dataclasses.field(default_factory=list)
    seconds: float = 0.0  # the longest for one file, both ways
    extra: int = -(2**62)  # the most memory beyond twice the file


def fuzz(seed: int, first: int, count: int) -> Total:
    """Files first … first + count of a seed, in a child process, and in another one from where it crashed."""
    total, end = Total(), first + count
    while first < end:
        with tempfile.TemporaryDirectory(dir=MEMORY if Path(MEMORY).is_dir() else None) as folder:
            code = f"import fuzz_pt; fuzz_pt.child({seed}, {first}, {end - first}, {folder!r})"
            environment = os.environ | {"PYTHONPATH": f"{ROOT / 'tests'}{os.pathsep}{ROOT}"}
            process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
            last, kind = None, None
            with process:
                for line in map(json.loads, process.stdout):
                    last, kind = line["file"], _count(total, line, kind)
        if process.returncode:
            total.faults.append(f"file {last}, {kind}: the process ended with {process.returncode}")
        if last is None:  # it could not even begin
            break
        first = last + 1
    return total


def _count(total: Total, line: dict[str, Any], kind: str | None) -> str:
    if "kind" in line:
        return line["kind"]
    (total.read if any(line["read"]) else total.refused)[kind] += 1
    total.faults += [f"file {line['file']}, {kind}: {fault}" for fault in line["faults"]]
    total.seconds, total.extra = max(total.seconds, line["seconds"]), max(total.extra, line.get("extra", total.extra))
    return kind


def main(args: Args) -> int:
    began, share = time.time(), -(-args.count // args.processes)
    with ThreadPoolExecutor(args.processes) as pool:
        starts = range(0, args.count, share)
        totals = list(pool.map(lambda first: fuzz(args.seed, first, min(share, args.count - first)), starts))
    rows = {kind: {"read": sum(t.read[kind] for t in totals), "refused": sum(t.refused[kind] for t in totals)}
            for kind in MUTATIONS}  # fmt: skip
    faults = [fault for total in totals for fault in total.faults]
    print(f"{'mutation':<16}{'files':>8}{'read':>8}{'refused':>9}{'faults':>8}")
    for kind, row in rows.items():
        row["faults"] = sum(f", {kind}: " in fault for fault in faults)
        print(f"{kind:<16}{row['read'] + row['refused']:>8}{row['read']:>8}{row['refused']:>9}{row['faults']:>8}")
    results = {
        "seed": args.seed, "files": sum(row["read"] + row["refused"] for row in rows.values()), "mutations": rows,
        "faults": faults[:50], "longest_seconds": max(t.seconds for t in totals),
        "most_megabytes_beyond_twice_the_file": max(t.extra for t in totals) / 2**20,
        "python": platform.python_version(), "numpy": np.__version__, "minutes": (time.time() - began) / 60,
    }  # fmt: skip
    print(f"{results['files']} files, each loaded copied and in place; longest {results['longest_seconds']:.2f} s;")
    print(
        f"most memory beyond twice the file {results['most_megabytes_beyond_twice_the_file']:.1f} MB (1 in 11 traced)"
    )
    print("\n".join(faults[:50]) or "no faults")
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=2) + "\n")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args)))
