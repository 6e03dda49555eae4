"""The same experiment under every launcher and either transport: one result, bit for bit."""

import importlib.util
from pathlib import Path

import pytest

from tests.support.checks import assert_one_line
from tests.support.launching import (
    command,
    metrics,
    needs_mpirun,
    run,
    sha256,
    summary,
    without_wall_time,
)
from tests.support.slurm_fixture import SlurmJobs

MPI = "--comm.transport=mpi"
needs_mpi4py = pytest.mark.skipif(importlib.util.find_spec("mpi4py") is None, reason="mpi4py is not installed")


@pytest.fixture
def config(small_run: tuple[Path, Path]) -> Path:
    return small_run[0]


@pytest.fixture
def one(small_run: tuple[Path, Path]) -> Path:
    """The run of one rank without a launcher, with which all others must agree."""
    return small_run[1]


def check(one: Path, run_dir: Path, launcher: str, world_size: int, transport: str = "torch") -> None:
    assert sha256(run_dir) == sha256(one)
    assert without_wall_time(metrics(run_dir)) == without_wall_time(metrics(one))
    found = summary(run_dir)
    backend = "mpi" if transport == "mpi" else "gloo"
    assert [found[key] for key in ("launcher", "world_size", "transport", "backend")] == [
        launcher,
        world_size,
        transport,
        backend,
    ]


# the first two are also in test_ranks and in tests/launch
@pytest.mark.parametrize(
    "by",
    [
        pytest.param("nproc", marks=pytest.mark.slow),
        pytest.param("torchrun", marks=pytest.mark.slow),
        pytest.param("mpirun", marks=needs_mpirun),
    ],
)
def test_on_this_machine(by: str, config: Path, one: Path, tmp_path: Path) -> None:
    result = run(command(config, tmp_path / "run", ranks=2, by=by))
    assert result.returncode == 0, result.stderr
    assert "\x1b" not in result.stdout  # no bar in what is no terminal, though mpirun gives its ranks one
    check(one, tmp_path / "run", by, 2)


@needs_mpirun
@needs_mpi4py
@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_transport_mpi_under_mpirun(ranks: int, config: Path, one: Path, tmp_path: Path) -> None:
    result = run(command(config, tmp_path / "run", MPI, ranks=ranks, by="mpirun"))
    assert result.returncode == 0, result.stderr
    check(one, tmp_path / "run", "mpirun", ranks, "mpi")
    assert result.stderr == ""  # MPI must be ended in order


@pytest.mark.parametrize(("by", "ranks"), [pytest.param("srun 1", 2, marks=pytest.mark.slow), ("srun 2", 3)])
def test_srun_on_one_node_and_on_two(
    by: str, ranks: int, config: Path, one: Path, tmp_path: Path, slurm: SlurmJobs
) -> None:
    result = run(command(config, tmp_path / "run", ranks=ranks, by=by), environment=slurm.environment)
    assert result.returncode == 0, result.stderr
    check(one, tmp_path / "run", "srun", ranks)


@pytest.mark.slow
@needs_mpi4py
def test_transport_mpi_under_srun_on_two_nodes(config: Path, one: Path, tmp_path: Path, slurm: SlurmJobs) -> None:
    result = run(command(config, tmp_path / "run", MPI, ranks=2, by="srun 2"), environment=slurm.environment)
    assert result.returncode == 0, result.stderr
    check(one, tmp_path / "run", "srun", 2, "mpi")


@pytest.mark.slow
def test_torchrun_with_an_agent_a_node(config: Path, one: Path, tmp_path: Path, slurm: SlurmJobs) -> None:
    """As slurm/train_torchrun.sbatch starts it: srun one torchrun a node, all of one group."""
    program = command(config, tmp_path / "run", ranks=1, by="torchrun")
    group = ["--nnodes=2", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:29543", "--rdzv-id=7"]
    agent = [*program[:3], *group, "--nproc-per-node=1", *program[5:]]
    result = run(["srun", "--nodes=2", "--ntasks=2", *agent], environment=slurm.environment)
    assert result.returncode == 0, result.stderr
    check(one, tmp_path / "run", "torchrun", 2)


@needs_mpi4py
def test_mpi_that_srun_knows_nothing_of(config: Path, tmp_path: Path, slurm: SlurmJobs) -> None:
    arguments = command(config, tmp_path / "run", MPI, ranks=2, by="srun 2")
    arguments.remove("--mpi=pmix")
    result = run(arguments, environment=slurm.environment)
    assert result.returncode == 64
    ours = "".join(line for line in result.stderr.splitlines() if line.startswith("fedfreeze"))
    assert_one_line(ours, "srun started 2 tasks that MPI knows nothing of; use srun --mpi=pmix")


@needs_mpirun
@needs_mpi4py
def test_mpi_that_counts_otherwise_than_its_launcher(config: Path, tmp_path: Path) -> None:
    """As when mpi4py loads another MPI than the mpirun's: every rank would train alone, in one folder."""
    tail = command(config, tmp_path / "run", MPI)[:-2]
    alone = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"}
    alone |= {"OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
    from tests.support.launching import ENVIRONMENT

    result = run(tail, environment=ENVIRONMENT | alone)
    assert result.returncode == 64, result.stderr
    assert "mpirun started rank 0 of 2, but MPI counts rank 0 of 1" in result.stderr
    assert not (tmp_path / "run").exists()
