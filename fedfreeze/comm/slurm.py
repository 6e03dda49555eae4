"""What SLURM answers when it is asked: a node's address, when a job ends, whether it is still there."""

import math
import os
import re
import subprocess
import time
from collections.abc import Mapping

from fedfreeze.errors import ConfigError


def first_node(nodes: str) -> str:
    """Return the first name of a node list such as `n[08-11,20],login1`. Raises ConfigError if there is none."""
    first = re.match(r"([^\[,]+)(?:\[(\w+)[^\]]*\])?([^,]*)", nodes.strip())
    if first is None:
        raise ConfigError(f"SLURM's node list is {nodes!r}, which names no node; set MASTER_ADDR to rank 0's host")
    return first[1] + (first[2] or "") + first[3]


def node_address(name: str) -> str:
    """Return SLURM's address of a node; its name where SLURM's commands are missing, as in containers."""
    address = re.search(r"\bNodeAddr=(\S+)", _ask("scontrol", "-o", "show", "node", name) or "")
    return address[1] if address else name


def seconds_left(environment: Mapping[str, str]) -> float:
    """Return how long the job around this process may still run, in seconds; infinity where nothing tells."""
    ends = environment.get("SLURM_JOB_END_TIME", "")
    if not ends.isdecimal() and environment.get("SLURM_JOB_ID", "").isdecimal():
        ends = (_ask("squeue", "-h", "-j", environment["SLURM_JOB_ID"], "-o", "%e") or "").strip()
    return float(ends) - time.time() if ends.isdecimal() else math.inf


def job_has_ended(job: object) -> bool:
    """Return whether SLURM knows for sure that a job runs no more."""
    if not str(job).isdecimal():
        return False
    states = _ask("squeue", "-h", "-j", str(job), "-t", "all", "-o", "%T", unknown="Invalid job id")
    return states is not None and not {"RUNNING", "COMPLETING", "SUSPENDED", "STOPPED"} & set(states.split())


def _ask(*command: str, unknown: str | None = None) -> str | None:
    """Return what a command prints, times as seconds since 1970; None if it fails, but nothing if it says `unknown`."""
    clock = {**os.environ, "SLURM_TIME_FORMAT": "%s"}
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20, env=clock)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if found.returncode:
        return "" if unknown is not None and unknown in found.stderr else None
    return found.stdout
