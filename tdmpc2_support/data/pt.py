"""The .pt format without PyTorch: reads what torch.save writes, and writes datasets as torch.save would.

    weights = load_pt("walker.pt")["model"]              # a checkpoint, as numpy arrays
    episodes = load_pt("chunk_0.pt", in_place=True)      # a dataset, left in the file

Such a file is a zip: `data.pkl`, a pickle of containers and of instructions to rebuild tensors, and a member
`data/KEY` for the numbers of each storage. Pickles are programs, and files come from strangers, so this one is not run
by `pickle`: a small machine below knows only the opcodes that torch.save writes and the dozen names that tensors and
TensorDicts need. It calls no function that a file names, sets no attribute, and counts memory before it takes it.
"""

from __future__ import annotations

import io
import math
import mmap
import os
import pickletools
import struct
import warnings
import zipfile
import zlib
from collections.abc import Sequence
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np

from tdmpc2_support.errors import UserError, one_line

# What a file may cost: all of it together stays below twice the file + 64 MB. Checkpoints of TD-MPC2 have pickles of
# 10 kB that take 3000 steps, and directories of 100 members.
_MAX_PICKLE = 4 * 2**20  # bytes of data.pkl
_MAX_STEPS = 200_000  # opcodes in it; each makes at most one object, of up to 200 bytes
_MAX_DIRECTORY = 2**20  # bytes of the zip's list of members, which takes 15 times as much when it is read
_MAX_ARRAYS = 16 * 2**20  # bytes of all arrays beyond twice the file: one may need more than in the file
_MAX_KEY = 100_000  # whole numbers as keys of a dictionary: colliding ones cannot be made of these

_KNOWN = """
    PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINUNICODE
    EMPTY_DICT SETITEM SETITEMS EMPTY_LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3
    BINPUT LONG_BINPUT MEMOIZE BINGET LONG_BINGET GLOBAL STACK_GLOBAL REDUCE NEWOBJ BUILD BINPERSID
""".split()  # what torch.save writes, with any protocol
_OPCODES = {opcode.code.encode("latin-1"): opcode for opcode in pickletools.opcodes}
_STORAGES = {
    "torch.FloatStorage": "<f4", "torch.DoubleStorage": "<f8", "torch.HalfStorage": "<f2",
    "torch.BFloat16Storage": "<u2",  # the upper halves of float32
    "torch.LongStorage": "<i8", "torch.IntStorage": "<i4", "torch.ShortStorage": "<i2", "torch.CharStorage": "|i1",
    "torch.ByteStorage": "|u1", "torch.BoolStorage": "|b1", "torch.QInt8Storage": "|i1", "torch.QUInt8Storage": "|u1",
}  # fmt: skip
_DICTS = {"collections.OrderedDict", "tensordict.utils._StringOnlyDict"}
_SETS = {"__builtin__.set", "builtins.set"}
_TENSORDICTS = {"tensordict.tensordict.TensorDict", "tensordict._td.TensorDict"}  # up to version 0.2, and from 0.3 on
_NAMES = {*_STORAGES, *_DICTS, *_SETS, *_TENSORDICTS} | {
    "torch.Size", "torch.device", "torch.per_tensor_affine", "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_parameter", "torch._utils._rebuild_qtensor", "tensordict._reductions._make_td",
}  # fmt: skip


def load_pt(path: str | os.PathLike, in_place: bool = False) -> Any:
    """Reads a file written by torch.save (the zip format, PyTorch 1.6 or later) without PyTorch.

    Only tensors and plain containers are read; a pickle that names anything else is refused, and nothing is run. A file
    costs at most twice its size and 64 MB of memory, whatever it holds. It must not change while it is read.

    Args:
        path: the file.
        in_place: leave the numbers in the file and map them into memory, read-only: costs no memory of the process, and
            checks no checksum. The file must not change while the arrays are in use.

    Returns:
        What was saved, with numpy arrays for tensors: `load_pt(path)["model"]["_encoder.state.0.weight"]`, and dicts
        for TensorDicts. float16 stays float16; bfloat16 becomes float32, and per-tensor quantised tensors their
        float32 values (with a warning if their scale is 1.0: the original's int8 files, in which little is left).

    Raises:
        UserError: the file is missing, damaged, no PyTorch file, or holds something else than tensors.
    """
    try:
        archive = _Archive(path)
        pickles = [name for name in archive.members if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise UserError("a zip file, but not one that PyTorch wrote")
        machine = _Machine(archive, pickles[0].removesuffix("data.pkl"), in_place)
        value = machine.run()
    except UserError as error:
        raise UserError(f"{path}: {one_line(error)}") from None
    except Exception as error:  # files can go wrong in as many ways as there are bytes
        raise _unreadable(path, error) from None
    if machine.rounded:
        warnings.warn(f"{path}: its int8 weights have scale 1.0, so they are useless", stacklevel=2)
    return value


def check_pt(path: str | os.PathLike) -> None:
    """Reads a whole file and compares its checksums; UserError if it is damaged."""
    try:
        archive = _Archive(path)
        for name in archive.members:
            archive.read(name)
    except UserError as error:
        raise UserError(f"{path}: {one_line(error)}") from None
    except Exception as error:  # as above
        raise _unreadable(path, error) from None


def _unreadable(path: str | os.PathLike, error: Exception) -> UserError:
    if isinstance(error, FileNotFoundError):
        return UserError(f"{path} does not exist")
    if isinstance(error, IsADirectoryError):
        return UserError(f"{path} is a folder, not a PyTorch file")
    if isinstance(error, OSError):
        return UserError(f"{path} cannot be read ({one_line(error.strerror or error)})")
    return UserError(f"{path} is damaged or no PyTorch file ({one_line(error) or type(error).__name__})")


# ----------------------------------------------------------------------------------------------------------------------
# The zip file
# ----------------------------------------------------------------------------------------------------------------------


class _Map(mmap.mmap):
    """A file in memory that `zipfile` can read the list of members from, if that is not too long."""

    def read(self, n: int | None = None) -> bytes:
        if n is not None and n > _MAX_DIRECTORY:
            raise UserError("refused, its list of members is longer than any of PyTorch")
        return super().read(n)


class _Archive:
    """A zip file mapped into memory.

    Attributes:
        size: bytes of the file.
        members: {name: where it is}, from the zip's directory.
    """

    def __init__(self, path: str | os.PathLike):
        with open(path, "rb") as file:
            self._map = _Map(file.fileno(), 0, access=mmap.ACCESS_READ)
        with zipfile.ZipFile(cast(BinaryIO, self._map)) as archive:
            members = archive.infolist()
        self.size = len(self._map)
        self._unread = self.size
        self.members = {member.filename: member for member in members}
        if len(self.members) < len(members):
            raise UserError("refused, two of its members have the same name")

    def read(self, name: str, checksum: bool = True) -> memoryview:
        """The bytes of a member, in place. Each is to be read once: together they cannot be larger than the file."""
        if name not in self.members:
            raise UserError(f"damaged, its member {name} is missing")
        member = self.members[name]
        if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
            raise UserError("refused, it is compressed or encrypted, which PyTorch never does")
        header = self._map[max(member.header_offset, 0) : member.header_offset + 30]
        if header[:4] != b"PK\3\4" or len(header) < 30:
            raise UserError(f"damaged, its member {name} is not where its directory says")
        name_length, extra_length = struct.unpack("<26x2H", header)  # the directory's may differ
        start = member.header_offset + 30 + name_length + extra_length
        self._unread -= member.file_size
        if member.file_size != member.compress_size or self._unread < 0 or start + member.file_size > self.size:
            raise UserError(f"damaged, its member {name} has a wrong size")
        content = memoryview(self._map)[start : start + member.file_size]
        if checksum and zlib.crc32(content) != member.CRC:
            raise zipfile.BadZipFile(f"checksum of {name}")
        return content


# ----------------------------------------------------------------------------------------------------------------------
# The pickle
# ----------------------------------------------------------------------------------------------------------------------


class _Name(NamedTuple):
    """A function or class that the pickle names; it is looked at, never looked up."""

    name: str


class _Storage(NamedTuple):
    """Numbers of a file; only `_Machine._storage` makes one."""

    content: memoryview
    dtype: np.dtype
    length: int
    name: str


class _TensorDict(dict):
    """tensordict.TensorDict: a dict of tensors, pickled as the state of an object."""

    __slots__ = ()


class _Machine:
    """Runs a pickle of torch.save: a stack, a memo, and the opcodes for tensors and plain containers.

    Attributes:
        rounded: whether there was an int8 tensor of scale 1.0.
    """

    def __init__(self, archive: _Archive, prefix: str, in_place: bool):
        self._archive = archive
        self._prefix = prefix
        self._in_place = in_place
        self._stack = []
        self._marks = []
        self._memo = []
        self._storages = {}
        self._left = 2 * archive.size + _MAX_ARRAYS
        self.rounded = False

    def run(self) -> Any:
        """The value that the pickle builds, with arrays for tensors."""
        order = f"{self._prefix}byteorder"
        if order in self._archive.members and self._archive.read(order) == b"big":
            raise UserError("it was written on a machine of another byte order")
        if self._archive.members[f"{self._prefix}data.pkl"].file_size > _MAX_PICKLE:
            raise UserError("refused, its pickle is larger than any of a model")
        program = io.BytesIO(self._archive.read(f"{self._prefix}data.pkl"))
        for _ in range(_MAX_STEPS):
            opcode = _OPCODES.get(program.read(1))
            if opcode is None or opcode.name not in _KNOWN:
                wrong = opcode.name if opcode else "no end, or an opcode"
                raise UserError(f"refused, its pickle has {wrong}, which torch.save does not write")
            if opcode.name == "STOP":
                return self._stack.pop()
            self._step(opcode.name, opcode.arg.reader(program) if opcode.arg else None)
        raise UserError("refused, its pickle has more objects than any of a model")

    def _step(self, opcode: str, argument: Any) -> None:
        stack = self._stack
        match opcode:
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE" | "SHORT_BINUNICODE":
                stack.append(argument)
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode])
            case "EMPTY_DICT" | "EMPTY_LIST" | "EMPTY_TUPLE":
                stack.append({"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}[opcode]())
            case "MARK":
                self._marks.append(len(stack))
            case "TUPLE":
                stack.append(tuple(self._pop_marked()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(self._pop(int(opcode[-1]))))
            case "APPEND" | "APPENDS":
                items = self._pop(1) if opcode == "APPEND" else self._pop_marked()
                _expect(type(stack[-1]) is list)
                stack[-1].extend(items)
            case "SETITEM" | "SETITEMS":
                items = self._pop(2) if opcode == "SETITEM" else self._pop_marked()
                _expect(type(stack[-1]) is dict)
                stack[-1].update(zip(_checked_keys(items[::2]), items[1::2], strict=True))
            case "BINPUT" | "LONG_BINPUT" | "MEMOIZE":  # numbered as they come
                _expect(argument in (None, len(self._memo)))
                self._memo.append(stack[-1])
            case "BINGET" | "LONG_BINGET":
                stack.append(self._memo[argument])
            case "GLOBAL" | "STACK_GLOBAL":
                names = argument.split(" ", 1) if opcode == "GLOBAL" else self._pop(2)
                stack.append(_named(*names))
            case "REDUCE" | "NEWOBJ":
                stack.append(self._call(*self._pop(2)))
            case "BUILD":
                target, state = self._pop(2)
                stack.append(self._set_state(target, state))
            case "BINPERSID":
                stack.append(self._storage(*self._pop(1)[0]))
            case "PROTO" | "FRAME":
                pass

    def _pop(self, count: int) -> list:
        items = self._stack[-count:]
        _expect(len(items) == count)
        del self._stack[-count:]
        return items

    def _pop_marked(self) -> list:
        mark = self._marks.pop()
        items = self._stack[mark:]
        del self._stack[mark:]
        return items

    def _spend(self, size: int) -> None:
        """Counts memory that is about to be taken."""
        self._left -= size
        if self._left < 0:
            raise UserError("refused, its tensors are larger than the file")

    def _call(self, function: _Name, arguments: tuple) -> Any:
        _expect(type(function) is _Name and type(arguments) is tuple)
        name = function.name
        if name == "torch._utils._rebuild_tensor_v2":
            return self._tensor(*arguments[:4])
        if name == "torch._utils._rebuild_qtensor":
            return self._quantised(*arguments[:5])
        if name == "torch._utils._rebuild_parameter":
            _expect(isinstance(arguments[0], np.ndarray))
            return arguments[0]
        if name in _DICTS and not arguments:
            return {}
        if name in _TENSORDICTS and not arguments:
            return _TensorDict()
        if name == "tensordict._reductions._make_td":
            kind, state = arguments
            _expect(type(kind) is _Name and kind.name in _TENSORDICTS)
            return self._set_state(_TensorDict(), state)
        if name == "torch.Size":
            (size,) = arguments
            _expect(type(size) is tuple)
            return size
        if name == "torch.device":
            _expect(all(type(x) in (str, int) and len(str(x)) < 20 for x in arguments))
            return ":".join(map(str, arguments))
        _expect(name in _SETS)
        (items,) = arguments
        _expect(type(items) is list)
        self._spend(200 * len(items))
        return set(_checked_keys(items))

    def _set_state(self, target: Any, state: Any) -> Any:
        """The TensorDict `target` with its tensors. What Module.state_dict() notes beside a dict is passed over."""
        _expect(type(state) is dict)
        if type(target) is dict and state.keys() == {"_metadata"}:
            return target
        tensors = state.get("_tensordict")
        if type(target) is not _TensorDict or type(tensors) not in (dict, _TensorDict):
            raise UserError("refused, its pickle sets the state of something else than a TensorDict")
        self._spend(200 * len(tensors))
        target.update(tensors)
        return target

    def _storage(self, tag: str, kind: _Name, key: str, _device: str, length: int) -> _Storage:
        _expect(tag == "storage" and type(kind) is _Name and type(key) is str and type(length) is int)
        if kind.name not in _STORAGES:
            raise UserError(f"refused, numbers of type {kind.name} are not read")
        if key not in self._storages:
            content = self._archive.read(f"{self._prefix}data/{key}", checksum=not self._in_place)
            self._storages[key] = _Storage(content, np.dtype(_STORAGES[kind.name]), length, kind.name)
        storage = self._storages[key]
        if (storage.length, storage.name) != (length, kind.name):
            raise UserError(f"damaged, its storage {key} is said to be of two kinds")
        if storage.length * storage.dtype.itemsize != len(storage.content):
            raise UserError(f"damaged, its storage {key} is of another size than its pickle says")
        return storage

    def _tensor(self, storage: _Storage, offset: int, size: tuple, stride: tuple) -> np.ndarray:
        view = _view(storage, offset, size, stride)
        widen = storage.name == "torch.BFloat16Storage"
        copied = view.size * (4 if widen else view.itemsize)
        self._spend(300 + 16 * view.ndim + (copied if widen or not self._in_place else 0))
        if widen:
            wide = np.array(view, np.uint32, order="C")
            wide = np.left_shift(wide, 16, out=wide).view(np.float32)
            wide.flags.writeable = not self._in_place
            return wide
        return view if self._in_place else np.array(view, order="C")  # writable, and the storage is let go

    def _quantised(self, storage: _Storage, offset: int, size: tuple, stride: tuple, quantiser: tuple) -> np.ndarray:
        view = _view(storage, offset, size, stride)
        _expect(type(quantiser) is tuple and len(quantiser) == 3)
        scheme, scale, zero_point = quantiser
        _expect(scheme == _Name("torch.per_tensor_affine") and type(scale) is float and type(zero_point) is int)
        _expect(0 < scale < 1e30 and -128 <= zero_point <= 255)
        self.rounded |= scale == 1.0
        self._spend(300 + 16 * view.ndim + 4 * view.size)
        tensor = np.array(view, np.float32, order="C")
        tensor -= np.float32(zero_point)
        tensor *= np.float32(scale)
        return tensor


def _expect(condition: bool) -> None:
    if not condition:
        raise UserError("damaged, its pickle makes no sense")


def _checked_keys(keys: list) -> list:
    """The same list, if a dictionary can take these keys quickly: text, and whole numbers as optimisers have them."""
    for key in keys:
        if type(key) is not str and not (type(key) is int and 0 <= key < _MAX_KEY):
            raise UserError("refused, keys of a dictionary are neither text nor small whole numbers")
    return keys


def _named(module: str, name: str) -> _Name:
    _expect(type(module) is str and type(name) is str)
    known = f"{module}.{name}"
    if known not in _NAMES:
        known = f"{one_line(module, 80)}.{one_line(name, 80)}"
        raise UserError(f"refused, since it would run {known}; only tensors and plain containers are read")
    return _Name(known)


def _view(storage: _Storage, offset: int, size: tuple, stride: tuple) -> np.ndarray:
    """The tensor [*size] where its numbers lie; positions are compared as Python's integers, which do not overflow."""
    _expect(type(storage) is _Storage and type(size) is tuple and type(stride) is tuple)
    _expect(len(size) == len(stride) <= 32 and all(type(n) is int for n in (offset, *size, *stride)))
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if min((offset, *size, *stride)) < 0 or (0 not in size and last >= storage.length):
        raise UserError("damaged, a tensor reaches beyond its storage")
    if math.prod(size) > storage.length:
        raise UserError("refused, a tensor has more numbers than its storage")
    if 0 in size:
        return np.ndarray(size, storage.dtype, b"")
    itemsize = storage.dtype.itemsize
    return np.ndarray(size, storage.dtype, storage.content, offset * itemsize, [step * itemsize for step in stride])


# ----------------------------------------------------------------------------------------------------------------------
# Writing
# ----------------------------------------------------------------------------------------------------------------------


def save_tensordict(path: str | os.PathLike, tensors: dict[str, np.ndarray]) -> None:
    """Writes arrays that share their first two axes as torch.save would write them in a TensorDict, without PyTorch.

    The pickle names the class as tensordict 0.1 and 0.2 do, where later versions find it, too.
    """
    arrays = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", _pickled(arrays))
        archive.writestr("archive/byteorder", "little")
        for key, array in enumerate(arrays.values()):
            info = zipfile.ZipInfo(f"archive/data/{key}")
            padding = -(archive.fp.tell() + 30 + len(info.filename) + 4) % 64  # aligned when they are mapped
            info.extra = struct.pack("<HH", 0x4246, padding) + bytes(padding)
            little = array.astype(array.dtype.newbyteorder("<"), copy=False)
            archive.writestr(info, little.reshape(-1).view(np.uint8).data)
        archive.writestr("archive/version", "3\n")


def _pickled(arrays: dict[str, np.ndarray]) -> bytes:
    """The pickle of a TensorDict of these arrays; their numbers are in the members archive/data/0, 1, …"""
    members = b"".join(_text(name) + _pickled_tensor(key, array) for key, (name, array) in enumerate(arrays.items()))
    batch_size = next(iter(arrays.values())).shape[:2]
    state = _text("_tensordict") + b"}(" + members + b"u"
    state += _text("_batch_size") + b"ctorch\nSize\n" + _tuple(batch_size) + b"\x85R"
    for name in ("_is_shared", "_is_memmap", "_is_locked"):
        state += _text(name) + b"\x89"  # False
    for name in ("_device", "_names"):
        state += _text(name) + b"N"  # None
    return b"\x80\x02ctensordict.tensordict\nTensorDict\n)\x81}(" + state + b"ub."


def _pickled_tensor(key: int, array: np.ndarray) -> bytes:
    kinds = {"f4": "FloatStorage", "f2": "HalfStorage", "i8": "LongStorage", "u1": "ByteStorage"}
    kind = kinds[array.dtype.str[1:]]
    strides = [stride // array.itemsize for stride in array.strides]
    storage = b"(" + _text("storage") + f"ctorch\n{kind}\n".encode() + _text(str(key)) + _text("cpu")
    storage += _whole_number(array.size) + b"tQ"
    arguments = storage + _whole_number(0) + _tuple(array.shape) + _tuple(strides)
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"\x89ccollections\nOrderedDict\n)RtR"


def _text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def _whole_number(value: int) -> bytes:
    return b"\x8a\x08" + struct.pack("<q", value)


def _tuple(values: Sequence[int]) -> bytes:
    return b"(" + b"".join(_whole_number(value) for value in values) + b"t"
