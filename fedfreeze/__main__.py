"""`python -m fedfreeze`, and what the console script calls."""

import sys

if __name__ == "__main__" and not sys.flags.safe_path:
    # `python -m` searches the working folder before anything else, so that a user's datasets.py or random.py would
    # stand for the package of that name; the console script does not. Modules of the user's own are found last, by
    # plugins.py.
    del sys.path[0]

import contextlib
import os
import signal


def main() -> int:
    """Run the command line and return the exit code."""
    # a Ctrl-C during imports just ends the process: caught there, it can leave modules half imported
    _end_at_ctrl_c()
    from fedfreeze.cli import main as run

    code = run()
    # and so it does while the interpreter ends, which would tell of it with a traceback
    _end_at_ctrl_c()
    if code:
        # not through the exit handlers of torch and MPI, which would wait for a collective that never ends
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(code)
    return code


def _end_at_ctrl_c() -> None:
    with contextlib.suppress(ValueError):  # no main thread, so no handlers
        signal.signal(signal.SIGINT, signal.SIG_DFL)


if __name__ == "__main__":
    sys.exit(main())
