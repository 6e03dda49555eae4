"""The door: `fedfreeze COMMAND`. Puts the commands of the rooms together and turns errors into exit codes."""

import argparse
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from typing import Any

import fedfreeze
from fedfreeze.comm.launcher import speaks_for_all
from fedfreeze.comm.signals import handler_kept, set_handler
from fedfreeze.compare import command as compare
from fedfreeze.data import command as fetch
from fedfreeze.doctor import command as doctor
from fedfreeze.errors import ExitCode, FedfreezeError, PreemptedError, exit_code_help, one_line, out_of_memory
from fedfreeze.plan import command as plan
from fedfreeze.run import command as run
from fedfreeze.track import command as sync

# In the order of `fedfreeze --help`.
_COMMANDS = (run, plan, fetch, doctor, compare, sync)

_ALONE = threading.RLock()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code. A user's mistake is one line on stderr.

    With `arguments` it can be called from Python, from any thread: handlers of signals are those of before when it
    returns, and in a thread that is not the main one none are set. Of several threads one runs at a time, as torch's
    global generator is one for all.
    """
    if arguments is None:
        # a Ctrl-C during imports just ends the process: caught there, it can leave modules half imported
        set_handler(signal.SIGINT, signal.SIG_DFL)
        return _run(None)
    if not _ALONE.acquire(blocking=False):
        print("fedfreeze: notice: another thread of this process is at work: waiting for it", file=sys.stderr)
        _ALONE.acquire()
    try:
        with handler_kept(signal.SIGINT):
            return _run(arguments)
    finally:
        _ALONE.release()


def _run(arguments: Sequence[str] | None) -> int:
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    try:
        code = int(options.command(options, rest))
        sys.stdout.flush()  # here, where its failure can still be told
        return code
    except FedfreezeError as error:
        if _is_spokesman():
            kind = "notice" if isinstance(error, PreemptedError) else "error"
            print(f"fedfreeze: {kind}: {one_line(error)}", file=sys.stderr, flush=True)
        else:
            time.sleep(1.0)  # torchrun ends all ranks when the first leaves: let rank 0 speak
        return int(error.exit_code)
    except KeyboardInterrupt:
        return int(ExitCode.INTERRUPTED)
    except BrokenPipeError:  # `fedfreeze plan --json | head`
        _drop_output()
        return int(ExitCode.DONE)
    except OSError as error:
        _drop_output()
        print(f"fedfreeze: error: cannot write the output: {error.strerror}", file=sys.stderr, flush=True)
        return int(ExitCode.STORAGE)
    except Exception as error:
        too_large = out_of_memory(error)
        if too_large is not None:
            print(f"fedfreeze: error: {too_large}", file=sys.stderr, flush=True)
            return int(too_large.exit_code)
        print(f"fedfreeze: internal error, please report it:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        return int(ExitCode.INTERNAL)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="fedfreeze",
        description="Federated learning under enforced memory caps: a model trained and frozen block by block.",
        epilog=exit_code_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"fedfreeze {fedfreeze.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)
    for command in _COMMANDS:
        command.add_command(commands)
    return parser


class _Parser(argparse.ArgumentParser):
    """argparse with our exit code and one-line errors."""

    def error(self, message: str) -> Any:
        if _is_spokesman():
            print(f"fedfreeze: error: {message}; see {self.prog} --help", file=sys.stderr, flush=True)
        sys.exit(ExitCode.BAD_CONFIG)


def _is_spokesman() -> bool:
    return speaks_for_all(os.environ, os.getppid())


def _drop_output() -> None:
    """Have what is still buffered go nowhere, or the interpreter would complain of it at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
