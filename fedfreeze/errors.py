"""Exit codes, and the one family of errors that a user can cause."""

import os
import re
import socket
from enum import IntEnum


class ExitCode(IntEnum):
    """What the process tells the shell. These are fedfreeze's own; launchers may replace them (see `help_text`)."""

    DONE = 0
    BAD_CONFIG = 64
    BAD_DATA = 65
    UNAVAILABLE = 69
    INTERNAL = 70
    STORAGE = 74
    RUN_AGAIN = 75
    RANK_LOST = 76
    INTERRUPTED = 130

    @property
    def help_text(self) -> str:
        """One line that says what this code means."""
        return _HELP[self]


_HELP = {
    ExitCode.DONE: "done (also when the run was done already)",
    ExitCode.BAD_CONFIG: "bad configuration, caps that hold no stage, a run folder in use or of another configuration",
    ExitCode.BAD_DATA: "data missing or bad",
    ExitCode.UNAVAILABLE: "a program, package or device that is needed is missing",
    ExitCode.INTERNAL: "our fault: please report it with the traceback",
    ExitCode.STORAGE: "disk full or not writable",
    ExitCode.RUN_AGAIN: "checkpointed, run me again",
    ExitCode.RANK_LOST: "a rank was lost; run again to go on from the last checkpoint",
    ExitCode.INTERRUPTED: "interrupted (Ctrl-C)",
}


def exit_code_help() -> str:
    """Return the table of exit codes as it stands in `--help`."""
    rows = "\n".join(f"  {code.value:>3}  {code.help_text}" for code in ExitCode)
    return (
        f"exit codes:\n{rows}\n"
        "torchrun turns any failure into 1 and srun reports the highest code of its tasks;\n"
        "summary.json in the run folder always has status and exit_code."
    )


class FedfreezeError(Exception):
    """An error with a one-line message for the user and an exit code; never shown as a traceback."""

    exit_code = ExitCode.INTERNAL


class ConfigError(FedfreezeError):
    """A key, value or combination that cannot be run."""

    exit_code = ExitCode.BAD_CONFIG


class DataError(FedfreezeError):
    """Data that is missing, torn or not what was promised."""

    exit_code = ExitCode.BAD_DATA


class UnavailableError(FedfreezeError):
    """A program, package or device that the configuration needs and this machine lacks."""

    exit_code = ExitCode.UNAVAILABLE


class StorageError(FedfreezeError):
    """A disk that is full or a folder that cannot be written."""

    exit_code = ExitCode.STORAGE


class RankLostError(FedfreezeError):
    """A collective failed because another rank is gone or silent."""

    exit_code = ExitCode.RANK_LOST


class PreemptedError(FedfreezeError):
    """The run was told to leave before its end, by a signal, the job's end or a file; its checkpoint stands."""

    exit_code = ExitCode.RUN_AGAIN


def one_line(error: BaseException) -> str:
    """Return the message of `error` on one line; its type's name where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def error_of(exit_code: int, message: str) -> FedfreezeError:
    """Rebuild an error that another rank reported, from its exit code and message."""
    for kind in (ConfigError, DataError, UnavailableError, StorageError, RankLostError, PreemptedError):
        if kind.exit_code == exit_code:
            return kind(message)
    return FedfreezeError(message)


def out_of_memory(error: BaseException) -> UnavailableError | None:
    """Return the one-line error for what does not fit this machine's own memory; None if that is not what happened."""
    asked = str(error)
    if not isinstance(error, MemoryError) and "can't allocate memory" not in asked:
        return None
    size = re.search(r"(?:allocate|Unable to allocate) ([\d.]+ \w+)", asked)
    return UnavailableError(
        f"the memory of {socket.gethostname()} is not enough{f' ({size[1]} were asked for)' if size else ''}; use a "
        "machine with more, or lower model.width, train.batch_size, fleet.devices or the number of ranks"
    )


def storage_error(
    action: str, path: object, error: OSError, remedy: str = "free space or choose another folder"
) -> StorageError:
    """Turn an OSError met while writing into the one-line error that names the path and the next action."""
    reason = os.strerror(error.errno) if error.errno else one_line(error)
    return StorageError(f"cannot {action} {path} on {socket.gethostname()}: {reason}; {remedy}")
