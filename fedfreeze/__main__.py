"""`python -m fedfreeze`, and what the console script calls."""

import signal
import sys


def main() -> int:
    """Run the command line and return the exit code."""
    # a Ctrl-C during imports just ends the process: caught there, it can leave modules half imported
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from fedfreeze.cli import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
