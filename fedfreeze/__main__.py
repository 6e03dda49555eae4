"""`python -m fedfreeze`, and what the console script calls."""

import contextlib
import os
import signal
import sys


def main() -> int:
    """Run the command line and return the exit code."""
    # a Ctrl-C during imports just ends the process: caught there, it can leave modules half imported
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from fedfreeze.cli import main as run

    code = run()
    if code:
        # not through the exit handlers of torch and MPI, which would wait for a collective that never ends
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(code)
    return code


if __name__ == "__main__":
    sys.exit(main())
