"""`python -m fedfreeze`."""

import sys

from fedfreeze.cli import main

sys.exit(main())
