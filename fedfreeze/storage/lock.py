"""File locks that the kernel gives back when their holder dies."""

import contextlib
import errno
import fcntl
import os
import time
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


def is_locked(descriptor: int) -> bool:
    """Tell whether the kernel keeps the lock that `take` gave; False on a file system without locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # again: nothing changes where it has it
    except OSError:
        return False
    return True


def boot_id() -> str | None:
    """Return what names this start of this machine's kernel, the same in all its containers; None if nothing does.

    Processes of one kernel see each other's locks, whatever their hosts are called.
    """
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip() or None
    except (OSError, ValueError):
        return None


def booted_at_s() -> float:
    """Return when this machine's kernel was started, in seconds since the epoch; 0 if nothing tells."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return time.time() - float(Path("/proc/uptime").read_text(encoding="ascii").split()[0])
    return 0.0


def _is_still(descriptor: int, path: Path) -> bool:
    try:
        found, ours = os.stat(path), os.fstat(descriptor)
    except OSError:
        return False
    return (found.st_dev, found.st_ino) == (ours.st_dev, ours.st_ino)
