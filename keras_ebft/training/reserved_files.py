"""Files whose room on the disk is taken before HDF5 writes to them.

HDF5 does not survive a disk that fills up while it writes: what it could not flush
stays behind in the process, and a later attempt ends the process.
"""

import contextlib
import errno
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py

# Of file systems that cannot reserve.
CANNOT = (errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)


class ReservedFile(io.BytesIO):
    """A file on disk that Keras and h5py take as they take one in memory.

    Nothing of it is held in memory. Keras takes an open file for weights if it is a
    `BytesIO` and says a name of the right ending.

    Args:
        path: path of the file, which is written anew.
        size: int, bytes to reserve.

    Raises:
        OSError: if there is no room.
    """

    def __init__(self, path: Path, size: int) -> None:
        super().__init__()
        self._path = path
        # What was written; the file itself is longer until it is closed.
        self._size = 0
        self._file = io.FileIO(path, "w+")
        try:
            _reserve(self._file.fileno(), size)
        except OSError as error:
            self._file.close()
            raise OSError(
                error.errno,
                f"Expected room for a file of {size} bytes. Received: "
                f"{error.strerror}. What was written before is whole. Make room, and "
                "go on",
                str(path),
            ) from error

    def __str__(self) -> str:
        return str(self._path)

    def close(self) -> None:
        """Gives back what was reserved and not written."""
        if not self._file.closed:
            try:
                self._file.truncate(self._size)
            finally:
                self._file.close()
        super().close()

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """Goes to a place, from the end of what was written where asked to."""
        if whence == os.SEEK_END:
            return self._file.seek(self._size + offset)
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        """The place that is read or written next."""
        return self._file.tell()

    def readinto(self, buffer: Any, /) -> int:
        """Fills a buffer with what was written, and says how much that is."""
        view = memoryview(buffer).cast("B")
        view = view[: max(self._size - self.tell(), 0)]
        done = 0
        while done < len(view):
            done += self._file.readinto(view[done:])
        return done

    def read(self, size: int | None = -1, /) -> bytes:
        """The next bytes that were written."""
        left = max(self._size - self.tell(), 0)
        buffer = bytearray(left if size is None or size < 0 else min(size, left))
        self.readinto(buffer)
        return bytes(buffer)

    def write(self, buffer: Any, /) -> int:
        """Writes all of a buffer."""
        view = memoryview(buffer).cast("B")
        done = 0
        while done < len(view):
            done += self._file.write(view[done:])
        self._size = max(self._size, self.tell())
        return done

    def truncate(self, size: int | None = None, /) -> int:
        """Sets how much counts as written; what is reserved stays so."""
        self._size = self.tell() if size is None else size
        return self._size


@contextlib.contextmanager
def reserved(path: Path, size: int) -> Iterator[ReservedFile]:
    """Context with a `ReservedFile`, which HDF5 has let go of at its end."""
    with ReservedFile(path, size) as file:
        try:
            yield file
        finally:
            _let_go(file)


def _let_go(file: ReservedFile) -> None:
    """Closes what HDF5 has open of a file, which it must not outlive.

    After an exception frames of Keras still hold it.
    """
    # Under which name h5py opens what is no path.
    name = repr(file).encode("ascii", "replace")
    for found in h5py.h5f.get_obj_ids(h5py.h5f.OBJ_ALL, h5py.h5f.OBJ_FILE):
        if found.name == name:
            h5py.File(found).close()


def _reserve(descriptor: int, size: int) -> None:
    # macOS and Windows have no such call.
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in CANNOT:
            raise
