"""A real SLURM of emulated nodes on this machine, for tests and developers; needs neither root, systemd nor cgroups.

    python -m tests.support.local_slurm start [--nodes 2]     # then, in the same shell:
    eval "$(python -m tests.support.local_slurm env)"         # sbatch, srun and squeue now speak to it
    python -m tests.support.local_slurm status
    python -m tests.support.local_slurm stop

Nodes n1, n2, ... are slurmd processes on ports of their own, partitions are `main` (default, preemptible) and `urgent`.
FEDFREEZE_LOCAL_SLURM is its folder (default: fedfreeze-slurm-UID in the folder of temporary files).
"""

import argparse
import contextlib
import ctypes
import getpass
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.support.launching import ENVIRONMENT

PACKAGES = {
    "munged": "munge",
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "sbatch": "slurm-client",
}
SEARCH = os.pathsep.join([ENVIRONMENT.get("PATH", os.defpath), "/usr/sbin", "/sbin"])

CONFIGURATION = """\
ClusterName=local
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
# a key and a socket of its own: no system service is touched. SLURM lets a requeued job wait until its former
# credential has expired; 120 s is the default
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=10
CredType=cred/munge
StateSaveLocation={folder}/state
# %n: several nodes on one host need folders of their own, PMIx's sockets in TmpFS too
SlurmdSpoolDir={folder}/spool.%n
TmpFS={folder}/tmp.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
# the signal of `sbatch --signal` is sent at preemption too, as sites that preempt with requeue have it
SlurmctldParameters=preempt_send_user_signal
# believe the CPUs below, not those of the host: eight ranks on two cores wait for one another, but they run
SlurmdParameters=config_overrides
# by parentage instead of cgroups, which an ordinary user may not make
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
# one line for each life of a job, as there is no database for sacct
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/jobcomp.log
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
# look for work every second: the defaults of up to 60 s are for clusters of thousands of jobs
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=0
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
ReturnToService=2
# seconds from SIGTERM to SIGKILL; 30 is the default
KillWait=5
# ended jobs stay in `scontrol show job` for so long
MinJobAge=3600
InactiveLimit=0
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
DefMemPerCPU=500
# GPUs that are counted and given out, but do not exist: gres.conf names empty files
GresTypes=gpu
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


def missing_packages() -> list[str]:
    """Return the Debian packages without which no cluster can be started here."""
    return [package for program, package in PACKAGES.items() if shutil.which(program, path=SEARCH) is None]


class LocalSlurm:
    """A cluster in a folder: its daemons and how to speak to it."""

    def __init__(self, folder: Path, nodes: int = 2, cpus: int = 8, memory_mib: int = 64000, gpus: int = 4):
        self.folder = folder
        self.gpus = gpus
        self.nodes, self.cpus, self.memory_mib = nodes, cpus, memory_mib
        self.configuration = folder / "slurm.conf"
        # not this process's own: a test that runs inside a SLURM job must not ask its cluster
        outside = {
            name: value for name, value in ENVIRONMENT.items() if not name.startswith(("SLURM_", "SBATCH_", "SRUN_"))
        }
        self.environment = outside | {"PATH": SEARCH, "SLURM_CONF": str(self.configuration)}
        self._mark = f"FEDFREEZE_LOCAL_SLURM_DAEMON={folder}"
        self._children: list[subprocess.Popen[bytes]] = []
        self._logs: dict[str, Path] = {}

    def start(self, *, die_with_us: bool) -> None:
        """Start the daemons and wait until all nodes are idle. Raises RuntimeError with the end of the logs."""
        if missing := missing_packages():
            raise RuntimeError(f"there is no SLURM here; on Debian: apt-get install {' '.join(missing)}")
        self._write()
        folder = self.folder
        munged = ["munged", "--foreground", "--force", f"--key-file={folder}/key", f"--socket={folder}/munge.socket"]
        munged += [f"--pid-file={folder}/munged.pid", f"--log-file={folder}/munged.log", f"--seed-file={folder}/seed"]
        try:
            # in the foreground: their pids are known at once, and they can be made to die with a test session
            self._daemon(munged, die_with_us)
            self._until(lambda: (folder / "munge.socket").exists(), 10, "munged opens its socket")
            self._daemon(["slurmctld", "-D", "-c", "-f", str(self.configuration)], die_with_us)
            for number in range(1, self.nodes + 1):
                self._daemon(["slurmd", "-D", "-N", f"n{number}", "-f", str(self.configuration)], die_with_us)
            self._until(lambda: len(self._idle_nodes()) == self.nodes, 60, "all nodes are idle")
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Cancel all jobs, end the daemons by their recorded pids, and whatever a job has left behind."""
        pids = self._recorded()
        if any(self._ours(pid) for pid in pids):
            with contextlib.suppress(subprocess.SubprocessError, OSError):
                self.call("scancel", f"--user={getpass.getuser()}", timeout_s=10)
                self._until(lambda: not self.call("squeue", "--noheader"), 10, "the queue is empty")
        # the controller and the nodes before munged, through which they speak
        for pid in reversed(pids):
            self._end(pid)
        for child in self._children:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(timeout=10)
        self._children.clear()
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        (self.folder / "pids").unlink(missing_ok=True)

    def processes(self) -> list[int]:
        """Return every process of the cluster and of its jobs, all have its configuration in their environment."""
        found = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
        return [pid for pid in found if pid != os.getpid() and (self._ours(pid) or self._of_a_job(pid))]

    def running(self) -> bool:
        """Whether every daemon that was started lives."""
        pids = self._recorded()
        return bool(pids) and all(self._ours(pid) for pid in pids)

    def _write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o755)  # munged refuses a socket that others could not reach
        ports = free_ports(self.nodes + 1)
        (self.folder / "state").mkdir(exist_ok=True)
        lines = []
        for number, port in enumerate(ports[1:], start=1):
            (self.folder / f"spool.n{number}").mkdir(exist_ok=True)
            (self.folder / f"tmp.n{number}").mkdir(exist_ok=True)
            lines.append(
                f"NodeName=n{number} NodeHostname={short_hostname()} NodeAddr=127.0.0.1 Port={port} CPUs={self.cpus} "
                f"RealMemory={self.memory_mib} Gres=gpu:{self.gpus} State=UNKNOWN"
            )
        for number in range(self.gpus):
            (self.folder / f"gpu{number}").touch()
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/gpu[0-{self.gpus - 1}]\n")
        key = self.folder / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        self.configuration.write_text(
            CONFIGURATION.format(
                host=short_hostname(), port=ports[0], user=getpass.getuser(), folder=self.folder, nodes="\n".join(lines)
            )
        )

    def _daemon(self, command: list[str], die_with_us: bool) -> None:
        with open(self.folder / "daemons.log", "ab") as log:
            child = subprocess.Popen(
                command,
                env=self.environment | dict([self._mark.split("=", 1)]),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=_die_with_parent if die_with_us else None,
            )
        self._children.append(child)
        with open(self.folder / "pids", "a") as file:
            file.write(f"{child.pid}\n")

    def _recorded(self) -> list[int]:
        path = self.folder / "pids"
        return [int(line) for line in path.read_text().split()] if path.exists() else []

    def _ours(self, pid: int) -> bool:
        """Whether a process lives and is a daemon of this cluster: pids are used again."""
        return self._mark in environment_of(pid)

    def _of_a_job(self, pid: int) -> bool:
        """Whether a process belongs to a job here; the shell of a developer has SLURM_CONF, but no job."""
        words = environment_of(pid)
        return f"SLURM_CONF={self.configuration}" in words and any(word.startswith("SLURM_JOB_ID=") for word in words)

    def _end(self, pid: int) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            if self._ours(pid):
                with contextlib.suppress(ProcessLookupError, RuntimeError):
                    os.kill(pid, number)
                    self._until(lambda: not self._ours(pid), 5, f"process {pid} ends")

    def _idle_nodes(self) -> list[str]:
        try:
            return self.call("sinfo", "-h", "-N", "-p", "main", "-t", "idle", "-o", "%N").split()
        except subprocess.SubprocessError:  # the controller does not answer yet
            return []

    def _until(self, reached: Callable[[], bool], seconds: float, what: str) -> None:
        deadline = time.monotonic() + seconds
        while not reached():
            if time.monotonic() > deadline:
                logs = [*sorted(self.folder.glob("*.log"))]
                ends = "\n".join(f"{log.name}: {' | '.join(log.read_text().splitlines()[-3:])}" for log in logs)
                raise RuntimeError(f"waited {seconds:.0f} s in vain until {what}\n{ends}")
            time.sleep(0.1)

    def call(self, *command: str, timeout_s: float = 30) -> str:
        """Run a command of SLURM and return what it prints. Raises SubprocessError, with stderr as a note."""
        try:
            return subprocess.run(
                command, env=self.environment, check=True, capture_output=True, text=True, timeout=timeout_s
            ).stdout.strip()
        except subprocess.CalledProcessError as error:
            error.add_note(error.stderr)
            raise


def environment_of(pid: int) -> list[str]:
    """Return the environment with which a process was started; nothing if it is gone."""
    try:
        return Path(f"/proc/{pid}/environ").read_text(errors="replace").split("\0")
    except OSError:
        return []


def free_ports(number: int) -> list[int]:
    """Return TCP ports that nobody listens on, all different."""
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(number)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def short_hostname() -> str:
    """Return what slurmd takes this host's name for."""
    return socket.gethostname().split(".")[0]


def _die_with_parent() -> None:
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def main() -> int:
    """Start, stop or ask about the cluster of this user."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["start", "stop", "env", "status", "guard"])
    parser.add_argument("--nodes", type=int, default=2, help="emulated nodes (default 2)")
    options = parser.parse_args()
    default = Path(tempfile.gettempdir()) / f"fedfreeze-slurm-{os.getuid()}"
    cluster = LocalSlurm(Path(os.environ.get("FEDFREEZE_LOCAL_SLURM", default)), options.nodes)
    if options.command == "env":
        print(f"export SLURM_CONF={cluster.configuration}")
    elif options.command in ("stop", "guard"):
        if options.command == "guard":  # a test session holds the other end: stop when it is gone, however it went
            sys.stdin.read()
            if cluster.folder.exists():
                time.sleep(1)  # the daemons die with the session; until then they would be asked in vain
        cluster.stop()
        shutil.rmtree(cluster.folder, ignore_errors=True)
    elif options.command == "start" and not cluster.running():
        cluster.stop()
        shutil.rmtree(cluster.folder, ignore_errors=True)  # job ids begin at 1, no state of an earlier cluster is met
        cluster.start(die_with_us=False)
    if options.command in ("start", "status"):
        print(json.dumps({"running": cluster.running()}) if not cluster.running() else cluster.call("sinfo"))
        return 0 if cluster.running() else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
