"""File locks that the kernel gives back when their holder dies."""

import contextlib
import errno
import fcntl
import os
from pathlib import Path

# A file system without locks (some parallel ones are mounted so): the file itself must do.
_NO_LOCKS_HERE = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def take(path: Path, *, wait: bool) -> int | None:
    """Lock a file, made if need be; return its descriptor, or None if another process has it. Raises OSError.

    The lock holds until `give_back`, or until the process ends, however it ends.
    """
    while True:
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError as error:
            if error.errno not in _NO_LOCKS_HERE:
                os.close(descriptor)
                raise
        except BaseException:  # Ctrl-C while waiting
            os.close(descriptor)
            raise
        if _is_still(descriptor, path):
            return descriptor
        os.close(descriptor)  # its last holder deleted it while we waited: this one locks nothing


def give_back(descriptor: int, path: Path, *, delete: bool = True) -> None:
    """Unlock a file, and delete it unless its content is another's."""
    if delete and _is_still(descriptor, path):
        with contextlib.suppress(OSError):
            path.unlink()
    os.close(descriptor)


def _is_still(descriptor: int, path: Path) -> bool:
    try:
        found, ours = os.stat(path), os.fstat(descriptor)
    except OSError:
        return False
    return (found.st_dev, found.st_ino) == (ours.st_dev, ours.st_ino)
