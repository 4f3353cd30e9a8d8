"""Checkpoints of our own, by Orbax: written whole or not at all, read back only if every number is what was written.

A checkpoint is a folder `.../checkpoints/STEP` with an item `meta` (JSON: the script, its arguments, counters, sizes,
and checksums) and an item for each pytree of arrays. Those written before there were checksums are read as they are.
"""

import contextlib
import errno
import json
import logging
import os
import shutil
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from tdmpc2_support.devices import shapes_on
from tdmpc2_support.errors import UserError, writing

if TYPE_CHECKING:
    from tdmpc2_support.run.folder import RunFolder

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
UNWRITABLE = (*FULL, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ESTALE, errno.ENOTDIR, errno.ENAMETOOLONG)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Orbax logs at length what it raises, too: here none of it."""
    log = logging.getLogger("absl")
    before = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(before)


class Checkpoints:
    """The checkpoints of a run that is trained: a context manager that writes and reads them.

    Args:
        folder: the run's.
        script: name of the script, which its checkpoints carry.
    """

    def __init__(self, folder: "RunFolder", script: str):
        self.folder = folder.path
        self.settings = folder.settings
        self.primary = folder.primary
        self.script = script
        self._manager: ocp.CheckpointManager | None = None

    def __enter__(self) -> "Checkpoints":
        return self

    @quiet()
    def __exit__(self, kind: Any, value: Any, trace: Any) -> None:
        if self._manager is not None:
            self._manager.close()

    def read_meta(self) -> dict[str, Any] | None:
        """What the newest checkpoint that can be read records beside arrays; None if there is none."""
        for checkpoint in complete_checkpoints(self.folder):
            with contextlib.suppress(UserError):  # `restore` tells
                return read_meta(checkpoint, self.script)
        return None

    def restore(self, **like: Any) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """What the newest whole checkpoint records (`read_meta`), and the items named, in the structure, shapes and
        places of `like`; None if there is none. A damaged one is renamed, with a sentence, for the one before it.

        Raises:
            UserError: there are only damaged ones.
        """
        problems = []
        for checkpoint in complete_checkpoints(self.folder):
            try:
                meta = read_meta(checkpoint, self.script)
                items = read_checkpoint(checkpoint, meta, **like)
            except UserError as error:
                problems.append((checkpoint, error))
                continue
            for damaged, error in problems if self.primary else ():
                name = f"damaged-{damaged.name}-{int(time.time())}"
                damaged.rename(self.folder / name)
                print(f"{error}; it is kept as {name}, the run goes on from {checkpoint}", file=sys.stderr)
            return meta, items
        if problems:
            raise UserError("; ".join(str(error) for _, error in problems))
        return None

    def restore_or_make(
        self, count: dict[str, Any], devices: dict[str, jax.Device] | None = None, **make: Callable[[], Any]
    ) -> list[Any]:
        """The items of these names in the last whole checkpoint, whose counters go to `count`, or what the functions
        return; on the first device or where `devices` has another for an item."""
        places = dict.fromkeys(make, jax.devices()[0]) | (devices or {})
        like = {}
        for name, function in make.items():
            like[name] = shapes_on(jax.sharding.SingleDeviceSharding(places[name]), function)
        if restored := self.restore(**like):
            meta, items = restored
            count |= meta["count"]
            return [items[name] for name in make]
        items = []
        for name, function in make.items():
            with jax.default_device(places[name]):
                items.append(jax.device_put(function(), places[name]))  # committed, as what jitted functions return
        return items

    @quiet()
    def save(self, step: int, count: dict[str, Any], meta: dict[str, Any] | None = None, **items: Any) -> None:
        """Writes pytrees of arrays as the checkpoint of a step, and keeps the one before it.

        Args:
            step: of the run.
            count: the run's counters.
            meta: what else the checkpoint records, as JSON; its `args` take the place of the settings.
            items: pytrees by their names.

        Raises:
            UserError: the disk is full; what was written of it is removed, and the checkpoints before it are kept.
        """
        if self._manager is None:
            options = ocp.CheckpointManagerOptions(
                max_to_keep=2,
                enable_async_checkpointing=False,
                cleanup_tmp_directories=True,  # of a save that was cut off
            )
            folder = (self.folder / "checkpoints").absolute()
            with writing(folder):
                self._manager = ocp.CheckpointManager(folder, options=options)
        meta = {"script": self.script, "args": self.settings, "count": count} | (meta or {})
        write_checkpoint(self._manager, step, meta, **items)


# ------------------------------------------------------------------------------------------------ Files of checkpoints
def complete_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints in a run's folder that were written to their end, the newest first."""
    folder = Path(folder, "checkpoints")
    if not os.path.isdir(folder):  # Path.is_dir raises where it may not look
        return []
    found = ocp.step.standard_name_format().find_all(folder)
    return [Path(step.path) for step in sorted(found, key=lambda step: -step.step)]


def find_checkpoint(path: str | Path) -> Path:
    """The newest complete checkpoint of a run's folder or of its checkpoints/, or the checkpoint's folder itself.

    Raises:
        UserError: there is none.
    """
    path = Path(path)
    if path.name.isdigit() and os.path.isdir(path / "meta"):
        return path
    found = complete_checkpoints(path) or complete_checkpoints(path.parent if path.name == "checkpoints" else path)
    if not found:
        reason = "holds no checkpoint of this project" if os.path.exists(path) else "does not exist or may not be read"
        raise UserError(f"{path} {reason}")
    return found[0]


def read_meta(checkpoint: Path, *scripts: str) -> dict[str, Any]:
    """What a checkpoint records beside arrays: its script, arguments, counters, sizes and checksums.

    Raises:
        UserError: it is damaged, or of none of `scripts`, if any are named.
    """
    try:
        meta = json.loads((checkpoint / "meta" / "metadata").read_text())
        script = meta["script"]
        whole = meta.get("checksum") in (None, _text_sum(meta))
    except (OSError, ValueError, KeyError, TypeError):
        kind = f"a checkpoint of {scripts[0]}.py" if scripts else "one of this project"
        raise _damaged(checkpoint, f"or not {kind}") from None
    if not whole:
        raise _damaged(checkpoint, "meta has another checksum")
    if scripts and script not in scripts:
        raise UserError(f"{checkpoint} is a checkpoint of {script}.py, not of {scripts[0]}.py")
    return meta


@quiet()
def write_checkpoint(manager: ocp.CheckpointManager, step: int, meta: dict[str, Any], **items: Any) -> None:
    """Writes pytrees of arrays as the checkpoint of a step. It is there when it is complete; older ones go after that.

    Raises:
        UserError: the disk is full, or cannot be written to; what was written of it is removed, and the checkpoints
            before it are kept.
    """
    items = {name: jax.tree.map(_stand_in, item) for name, item in items.items()}
    meta = meta | {"checksums": checksums(items)}
    meta["checksum"] = _text_sum(meta)
    saved = {name: ocp.args.StandardSave(item) for name, item in items.items()}
    try:
        manager.save(step, args=ocp.args.Composite(meta=ocp.args.JsonSave(meta), **saved), force=True)
    except Exception as error:  # Orbax wraps what its storage library says, as a text only
        number = getattr(error, "errno", None)
        found = [code for code in UNWRITABLE if code == number or os.strerror(code) in str(error)]
        if not found and number is None:
            raise
        folder = Path(manager.directory)
        for remains in folder.glob(f"{step}*"):
            shutil.rmtree(remains, ignore_errors=True)
        kept = complete_checkpoints(folder.parent)
        kept = f"{kept[0]} is kept" if kept else "there was none before"
        problem = f"a checkpoint at step {step} cannot be written ({os.strerror(found[0] if found else number)})"
        if {*found} & {*FULL}:
            problem = f"no space is left for a checkpoint at step {step}"
        raise UserError(f"{problem}: its remains are removed, {kept}") from error


@quiet()
def read_checkpoint(checkpoint: Path, meta: dict[str, Any], **like: Any) -> dict[str, Any]:
    """Items of a checkpoint, each in the structure, shapes and places of `like` (arrays, or `jax.ShapeDtypeStruct`).

    Raises:
        UserError: it is damaged, or of other shapes.
    """
    items = {}
    for name, tree in like.items():
        try:
            with ocp.StandardCheckpointer() as reader:
                items[name] = reader.restore(checkpoint.absolute() / name, jax.tree.map(_stand_in, tree))
            if any(x.dtype != y.dtype for x, y in zip(*map(jax.tree.leaves, (items[name], tree)), strict=True)):
                raise TypeError("an array is of another type")  # a key whose description is gone is read as numbers
        except Exception as error:  # Orbax raises a different type for every way in which a file can be wrong
            raise _damaged(checkpoint, f"or of another size; {name}: {_first_line(error)}") from error
    items = _compared(checkpoint, meta, items)
    return {name: jax.tree.map(_as_it_was, item, like[name]) for name, item in items.items()}


def _stand_in(x: Any) -> Any:
    """An array, or its shape; of one without numbers, which Orbax does not write, one zero."""
    if np.prod(x.shape):
        return x
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct((1,), x.dtype, sharding=x.sharding)
    return jax.device_put(jnp.zeros(1, x.dtype), x.sharding)


def _as_it_was(x: jax.Array, like: Any) -> jax.Array:
    """What `_stand_in` has made of an array turned back into it."""
    return x if np.prod(like.shape) else jax.device_put(jnp.zeros(like.shape, like.dtype), x.sharding)


@quiet()
def read_agent(
    checkpoint: Path, meta: dict[str, Any], names: Sequence[str], parts: Sequence[str] = ()
) -> dict[str, Any]:
    """What of a run's learning state makes its agent, by these names, or only `parts` of its `params`, on one device,
    whatever devices have written the checkpoint and whatever else it holds.

    Raises:
        UserError: it is damaged.
    """
    path, here = checkpoint.absolute() / "state", jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    try:
        with ocp.PyTreeCheckpointer() as reader:
            there = reader.metadata(path).item_metadata.tree
            inner = there.get("train", there)  # an online run's checkpoint holds the key of the acting beside it
            wanted = {name: inner[name] for name in names}
            wanted = {"params": {name: inner["params"][name] for name in parts}} if parts else wanted
            like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), wanted)
            like = {"train": like} if "train" in there else like
            options = {"restore_args": ocp.checkpoint_utils.construct_restore_args(like), "partial_restore": True}
            state = reader.restore(path, args=ocp.args.PyTreeRestore(like, **options))
    except Exception as error:  # as above
        raise _damaged(checkpoint, _first_line(error)) from error
    state = _compared(checkpoint, meta, {"state": state})["state"]
    return state.get("train", state)


def checksums(items: dict[str, Any]) -> dict[str, int]:
    """A 32-bit number for each array of some pytrees, by its path: any flipped bit of an array changes its number."""
    sums = {}
    for name, item in items.items():  # one may lie on another device than the others
        leaves, _ = jax.tree_util.tree_flatten_with_path(item)
        names = [f"{name}/{jax.tree_util.keystr(path, simple=True, separator='/')}" for path, _ in leaves]
        numbers = jax.device_get(_array_sums([leaf for _, leaf in leaves]))
        sums |= dict(zip(names, map(int, numbers), strict=True))
    return sums


@jax.jit  # one program, which is kept for the next start
def _array_sums(arrays: list[jax.Array]) -> list[jax.Array]:
    return [_array_sum(x) for x in arrays]


@jax.jit  # traced once for all arrays of a shape
def _array_sum(x: jax.Array) -> jax.Array:
    """The sum of an array's words, each times an odd number of its own (modulo 2^32), computed where the array lies."""
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if x.dtype != jnp.bool_:
        x = jax.lax.bitcast_convert_type(x, f"uint{8 * min(x.dtype.itemsize, 4)}")  # of 8 bytes: two words
    place, stride = jnp.zeros(x.shape, jnp.uint32), 1
    for axis in reversed(range(x.ndim)):
        place += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= x.shape[axis]
    return (x.astype(jnp.uint32) * (2 * place + 1)).sum(dtype=jnp.uint32)


def _compared(checkpoint: Path, meta: dict[str, Any], items: dict[str, Any]) -> dict[str, Any]:
    """The items, if their checksums are those that were written."""
    written = meta.get("checksums", {})
    wrong = [name for name, number in checksums(items).items() if written.get(name, number) != number]
    if wrong:
        raise _damaged(checkpoint, f"{wrong[0]} has another checksum")
    return items


def _text_sum(meta: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps({k: v for k, v in meta.items() if k != "checksum"}, sort_keys=True).encode())


def _damaged(checkpoint: Path, reason: str) -> UserError:
    others = [other for other in complete_checkpoints(checkpoint.parent.parent) if other.name != checkpoint.name]
    way_on = f"; there is also {others[0]}" if others else ""
    return UserError(f"{checkpoint} is damaged {reason if reason.startswith('or ') else f'({reason})'}{way_on}")


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
