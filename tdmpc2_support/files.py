"""Files that are whole or absent at any moment, whatever stops the process that writes them."""

import contextlib
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
def new_file(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary path in the same folder, to be written to. What was written becomes `path` when the context is
    left, replacing what was there; if an exception leaves it, it is removed. No other process, of this host or of
    another one, has the same temporary name."""
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
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def sync(path: Path) -> None:
    """Waits until a file's content, or a folder's list of files, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems cannot
            os.fsync(handle)
    finally:
        os.close(handle)
