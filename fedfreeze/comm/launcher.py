"""Which launcher started this process, and who it is among the ranks."""

import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace

from fedfreeze.comm.slurm import first_node, node_address
from fedfreeze.errors import ConfigError

# Steps of SLURM that are no steps of the user's: the batch script, an interactive shell, and the like.
_FIRST_SPECIAL_STEP = 4_294_967_280

_FIRST_PORT, _PORTS = 20_000, 20_000


@dataclass(frozen=True)
class Launch:
    """Who this process is among the ranks, and where they meet."""

    launcher: str
    """none | nproc | torchrun | srun | mpirun."""
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    master_address: str | None = None
    """Address of rank 0's host; none: not known, or this host."""
    master_port: int | None = None
    attempt: int = 0
    """How often torchrun has started its workers again."""
    store_served: bool = False
    """Whether the launcher itself serves the store where the ranks meet (torchrun's agent)."""
    store_file: str | None = None
    """A file where they meet instead (nproc)."""


def detect_launch(environment: Mapping[str, str], parent: int = 0) -> Launch:
    """Read who this process is from what its launcher set. Raises ConfigError where that cannot be right.

    `parent` is the number of the parent process. MASTER_ADDR and MASTER_PORT, where the user has set them, say where
    the ranks meet.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return _by_torchrun(environment)
    if "OMPI_COMM_WORLD_RANK" in environment:
        names = tuple(f"OMPI_COMM_WORLD_{what}" for what in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"))
        launch = _numbered(environment, "mpirun", names)
        return _placed(launch, environment, environment.get("PMIX_NAMESPACE", environment.get("PMIX_ID", "")))
    if "PMI_RANK" in environment and "MPI_LOCALRANKID" in environment:  # Hydra: MPICH, Intel MPI
        names = ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")
        return _placed(_numbered(environment, "mpirun", names), environment, str(parent))  # its daemon on this host
    if _in_step(environment):
        return _by_srun(environment)
    return Launch("none")


def check_job(environment: Mapping[str, str]) -> None:
    """Raise ConfigError for a process that stands alone in a SLURM job of several tasks: srun was forgotten."""
    tasks = environment.get("SLURM_NTASKS", "1")
    if "SLURM_JOB_ID" in environment and tasks.isdigit() and int(tasks) > 1:
        raise ConfigError(
            f"this SLURM job has {tasks} tasks, but fedfreeze was started once; use `srun fedfreeze run ...`, or "
            "--nproc N for N ranks on this node"
        )


def launch_here(nproc: int | None, transport: str, environment: Mapping[str, str], parent: int) -> tuple[Launch, int]:
    """Return who this process is, and how many ranks it shall start itself (`nproc`, if the user asked for some).

    Raises ConfigError where both a launcher and this process would start ranks, or neither does and one should.
    """
    launch = detect_launch(environment, parent)
    count = nproc or 1
    if count > 1 and launch.launcher == "srun" and launch.world_size == 1:
        launch = Launch("none")  # as in an interactive step
    if count > 1 and launch.launcher != "none":
        raise ConfigError(f"--nproc {count} under {launch.launcher}, which starts the ranks itself; drop it")
    if count > 1 and transport == "mpi":
        raise ConfigError("--nproc starts ranks that MPI knows nothing of; use mpirun, or comm.transport=torch")
    if launch.launcher == "none" and nproc is None:
        check_job(environment)
    return launch, count


def speaks_for_all(environment: Mapping[str, str], parent: int) -> bool:
    """Return whether this process tells a mistake that every rank meets: rank 0 does, also where nothing else fits."""
    try:
        return detect_launch(environment, parent).rank == 0
    except ConfigError:
        names = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID")
        return next((environment[name] for name in names if name in environment), "0") == "0"


def _by_torchrun(environment: Mapping[str, str]) -> Launch:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    launch = _numbered(environment, "torchrun", names)
    agents = environment.get("GROUP_WORLD_SIZE", "")
    outer, name = ("srun", "SLURM_STEP_NUM_TASKS") if _in_step(environment) else ("mpirun", "OMPI_COMM_WORLD_SIZE")
    if name in environment:
        started = environment[name]
        if agents.isdigit() and started.isdigit() and int(started) != int(agents):
            raise ConfigError(
                f"{outer} started {started} tasks, but torchrun's group has {agents} agent(s); start "
                f"one torchrun a node and give all of them --nnodes={started} and one --rdzv-endpoint, or let {outer} "
                "start fedfreeze itself"
            )
    launch = _placed(launch, environment, "")
    restarts = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
    return replace(
        launch,
        attempt=int(restarts) if restarts.isdigit() else 0,
        store_served=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
    )


def _by_srun(environment: Mapping[str, str]) -> Launch:
    counts = environment.get("SLURM_STEP_TASKS_PER_NODE", environment.get("SLURM_TASKS_PER_NODE", ""))
    here = {"tasks on this node": str(_tasks_of_node(counts, environment.get("SLURM_NODEID", "")))}
    names = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "tasks on this node")
    return _placed(_numbered({**environment, **here}, "srun", names), environment, "")


def _in_step(environment: Mapping[str, str]) -> bool:
    step = environment.get("SLURM_STEP_ID", "")
    return step.isdigit() and int(step) < _FIRST_SPECIAL_STEP


def _numbered(environment: Mapping[str, str], launcher: str, names: tuple[str, ...]) -> Launch:
    numbers = []
    for name in names:
        text = environment.get(name, "")
        if not text.isdecimal():
            raise ConfigError(
                f"{launcher} set {names[0]}={environment.get(names[0])!r}, but {name} is {environment.get(name)!r}; "
                "start the ranks with torchrun, srun, mpirun or --nproc"
            )
        numbers.append(int(text))
    rank, world_size, local_rank, local_world_size = numbers
    if not (rank < world_size and local_rank < local_world_size <= world_size):
        raise ConfigError(
            f"{names[0]} is {rank} of {names[1]} {world_size}, {names[2]} {local_rank} of {names[3]} "
            f"{local_world_size}, which cannot be; start the ranks with torchrun, srun, mpirun or --nproc"
        )
    return Launch(launcher, rank, world_size, local_rank, local_world_size)


def _placed(launch: Launch, environment: Mapping[str, str], job: str) -> Launch:
    """Add where the ranks meet: what the user or torchrun says, else the first node of the SLURM step, else here."""
    address, port = environment.get("MASTER_ADDR"), environment.get("MASTER_PORT", "")
    if port and not (port.isdecimal() and 0 < int(port) < 65_536):
        raise ConfigError(f"MASTER_PORT is {port!r}; it must be a port, 1 to 65535")
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST")
    if launch.launcher == "mpirun":  # the step that holds it, if any, is that of its own daemons
        nodes = environment.get("SLURM_JOB_NODELIST")
    if not address and launch.local_world_size < launch.world_size and nodes:
        address = node_address(first_node(nodes))
    return replace(launch, master_address=address, master_port=int(port) if port else job_port(environment, job))


def need_address(launch: Launch) -> None:
    """Raise ConfigError where ranks on several hosts do not know where to meet, which MPI knows by itself."""
    if launch.local_world_size < launch.world_size and launch.master_address is None:
        raise ConfigError(
            f"{launch.launcher} started {launch.world_size} ranks on several hosts, and none knows where rank 0 is; "
            "set MASTER_ADDR to its host (mpirun -x MASTER_ADDR=...), or use comm.transport=mpi"
        )


def job_port(environment: Mapping[str, str], job: str) -> int:
    """Return a port that the ranks of a job agree on and others hardly have: from the job's number, the same on all."""
    number, step = environment.get("SLURM_JOB_ID", ""), environment.get("SLURM_STEP_ID", "0")
    if number.isdecimal() and step.isdecimal():
        return _FIRST_PORT + (int(number) * 31 + int(step) + zlib.crc32(job.encode())) % _PORTS
    return _FIRST_PORT + zlib.crc32(job.encode()) % _PORTS


def _tasks_of_node(counts: str, node: str) -> int | None:
    """Return how many tasks a node has, by SLURM's `2(x3),1`."""
    tasks: list[int] = []
    for part in counts.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if found is None:
            return None
        tasks += [int(found[1])] * int(found[2] or 1)
    return tasks[int(node)] if node.isdecimal() and int(node) < len(tasks) else None
