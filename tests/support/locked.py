"""Run folders that a run has begun or holds, for the tests of the lock and of what a folder accepts."""

import json
import os
import socket
from pathlib import Path
from typing import Any

from fedfreeze.config.file import make_config
from fedfreeze.config.schema import Config

HOST = socket.gethostname()
NO_PID = 2**22 + 1  # above the largest that Linux gives


def config(**values: Any) -> Config:
    return make_config({"name": "trial", **values})


def start_of(pid: int) -> str:
    """When a process started: field 22 of its stat; its name, which may hold anything, ends at the last bracket."""
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[22 - 3]


def lock(path: Path, **holder: Any) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    facts = {"host": HOST, "pid": os.getpid(), "started": start_of(os.getpid()), "job": None} | holder
    (path / "lock").write_text(json.dumps(facts))
    return path / "lock"
