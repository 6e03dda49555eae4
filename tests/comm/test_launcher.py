"""Who a process is among the ranks, from what each launcher sets; and where the ranks meet."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedfreeze.comm import launcher
from fedfreeze.comm.launcher import Launch, check_job, detect_launch, job_port, need_address
from fedfreeze.errors import ConfigError

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_WORLD_SIZE": "2",
    "MASTER_ADDR": "n1",
    "MASTER_PORT": "1234",
    "TORCHELASTIC_RESTART_COUNT": "2",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}
STEP = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "1",
    "SLURM_PROCID": "2",
    "SLURM_NTASKS": "3",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_STEP_TASKS_PER_NODE": "2,1",
    "SLURM_STEP_NODELIST": "n[1-2]",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_NAMESPACE": "1776943105",
}
HYDRA = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}


@pytest.fixture(autouse=True)
def addresses(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Have no SLURM asked; return the nodes whose address was wanted."""
    asked: list[str] = []
    monkeypatch.setattr(launcher, "node_address", lambda name: asked.append(name) or f"address-of-{name}")
    return asked


def test_nothing_around() -> None:
    assert detect_launch({}) == Launch("none")


def test_torchrun() -> None:
    found = detect_launch(TORCHRUN)
    assert found == Launch("torchrun", 3, 4, 1, 2, "n1", 1234, attempt=2, store_served=True)


def test_srun_over_two_nodes() -> None:
    found = detect_launch(STEP)
    assert (found.launcher, found.rank, found.world_size) == ("srun", 2, 3)
    assert (found.local_rank, found.local_world_size) == (0, 1)
    assert found.master_address == "address-of-n1"
    assert found.master_port == 20_000 + (77 * 31 + 1) % 20_000


def test_srun_on_one_node_needs_no_address(addresses: list[str]) -> None:
    one = {"SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_NODEID": "0"}
    found = detect_launch(STEP | one | {"SLURM_STEP_TASKS_PER_NODE": "2"})
    assert (found.rank, found.local_world_size, found.master_address) == (1, 2, None)
    assert addresses == []


@pytest.mark.parametrize("step", ["4294967291", "4294967290", "batch"])
def test_the_batch_script_and_an_interactive_shell_are_no_steps_of_ours(step: str) -> None:
    assert detect_launch(STEP | {"SLURM_STEP_ID": step}) == Launch("none")


def test_open_mpi_and_its_daemons_step() -> None:
    """Inside a job, Open MPI starts its daemons by a step of their own: its variables must not win."""
    for around in ({}, STEP):
        found = detect_launch(OPEN_MPI | around)
        assert (found.launcher, found.rank, found.world_size, found.local_rank) == ("mpirun", 1, 2, 1)
    over_nodes = {"SLURM_JOB_NODELIST": "a[7-8]", "SLURM_JOB_ID": "5", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}
    found = detect_launch(OPEN_MPI | over_nodes | {"OMPI_COMM_WORLD_LOCAL_RANK": "0"})
    assert found.master_address == "address-of-a7"


def test_hydra_meets_where_its_daemon_says() -> None:
    found = detect_launch(HYDRA, parent=4711)
    assert (found.launcher, found.rank, found.local_world_size) == ("mpirun", 1, 2)
    assert (
        found.master_port == detect_launch(HYDRA | {"PMI_RANK": "0", "MPI_LOCALRANKID": "0"}, parent=4711).master_port
    )
    assert found.master_port != detect_launch(HYDRA, parent=4712).master_port


def test_what_the_user_sets_wins() -> None:
    ours = {"MASTER_ADDR": "gateway", "MASTER_PORT": "999"}
    for environment in (STEP, OPEN_MPI, HYDRA):
        found = detect_launch(environment | ours)
        assert (found.master_address, found.master_port) == ("gateway", 999)


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        (TORCHRUN | {"RANK": "4"}, "RANK is 4 of WORLD_SIZE 4"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "5"}, "LOCAL_WORLD_SIZE 5, which cannot be"),
        (TORCHRUN | {"LOCAL_RANK": "-1"}, "LOCAL_RANK is '-1'"),
        (TORCHRUN | {"MASTER_PORT": "70000"}, "MASTER_PORT is '70000'; it must be a port"),
        (TORCHRUN | {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4"}, "srun started 4 tasks, but torchrun's group"),
        (TORCHRUN | {"OMPI_COMM_WORLD_SIZE": "4"}, "mpirun started 4 tasks, but torchrun's group has 2 agent(s)"),
        (STEP | {"SLURM_PROCID": ""}, "SLURM_PROCID is ''"),
        (STEP | {"SLURM_STEP_TASKS_PER_NODE": "a lot"}, "tasks on this node is 'None'"),
        (OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "x"}, "OMPI_COMM_WORLD_LOCAL_SIZE is 'x'"),
        (HYDRA | {"PMI_SIZE": "1"}, "PMI_RANK is 1 of PMI_SIZE 1"),
    ],
)
def test_what_cannot_be_is_one_line(environment: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        detect_launch(environment)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert any(word in str(caught.value) for word in ("start", "must be"))


def test_one_torchrun_a_node_is_fine() -> None:
    around = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"}
    assert detect_launch(TORCHRUN | around).launcher == "torchrun"


def test_srun_that_was_forgotten() -> None:
    job = {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4"}
    with pytest.raises(ConfigError, match="4 tasks, but fedfreeze was started once"):
        check_job(job)
    for fine in ({}, job | {"SLURM_NTASKS": "1"}, {"SLURM_NTASKS": "4"}):
        check_job(fine)


def test_ranks_on_several_hosts_need_an_address() -> None:
    apart = detect_launch(OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0"})
    with pytest.raises(ConfigError, match="set MASTER_ADDR"):
        need_address(apart)
    need_address(detect_launch(OPEN_MPI))
    need_address(detect_launch(STEP))


@given(job=st.integers(1, 2**31), step=st.integers(0, 100), text=st.text())
def test_ports_are_above_the_wellknown_and_below_the_ephemeral(job: int, step: int, text: str) -> None:
    environment = {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)}
    assert 20_000 <= job_port(environment, "") < 40_000
    assert 20_000 <= job_port({}, text) < 40_000
    assert job_port(environment, "") != job_port(environment | {"SLURM_STEP_ID": str(step + 1)}, "")
