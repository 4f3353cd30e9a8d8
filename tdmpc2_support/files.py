"""Files that are whole or absent at any moment, whatever stops the process that writes them."""

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


def write_atomically(path: str | os.PathLike, content: str | bytes) -> None:
    """Replaces a file's content: after a crash or a power cut it is the old one or the new one, whole."""
    data = content.encode() if isinstance(content, str) else content
    with new_file(path) as temporary:
        temporary.write_bytes(data)


@contextlib.contextmanager
def new_file(path: str | os.PathLike, overwrite: bool = True) -> Iterator[Path]:
    """Yields a temporary path in the same folder, to be written to. What was written becomes `path` when the context is
    left, replacing what was there; if an exception leaves it, it is removed. No other process, of this host or of
    another one, has the same temporary name.

    Args:
        overwrite: False keeps a file that has the name already, even one that another process writes meanwhile.

    Raises:
        FileExistsError: there is such a file, and it is not to be overwritten.
        OSError: the folder does not exist, or cannot be written to.
    """
    path = Path(path)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)  # the only way to read it
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp's files are for this user alone
        sync(temporary)
        if overwrite:
            os.replace(temporary, path)
        else:
            _rename_new(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def _rename_new(temporary: Path, path: Path) -> None:
    """Renames a file, unless the name is taken: of two processes that want a name, one has it."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links, where nothing better than a look is possible
        if path.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
        os.replace(temporary, path)


def sync(path: Path) -> None:
    """Waits until a file's content, or a folder's list of files, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems cannot
            os.fsync(handle)
    finally:
        os.close(handle)
