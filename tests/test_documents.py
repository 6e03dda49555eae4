"""Every command and every piece of Python in the documents works as it is written."""

import contextlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fedfreeze.config.reference import configuration_reference
from tests.support.checks import ROOT
from tests.support.documents import DOCUMENTS, EXTENDING, blocks_of, commands_of
from tests.support.launching import run
from tests.support.preloaded import command_for_shells

SHORT = ["--train.rounds=3", "--train.local_epochs=1", "--pace.policy=fixed"]
FEW = ["--train.rounds=1", "--model.width=4"]

# Command, exactly as it is written -> what is appended, to shorten it or to keep it off the network.
APPENDED = {
    "fedfreeze run digits": SHORT,
    "fedfreeze run digits --nproc 4": SHORT,
    "torchrun --nproc-per-node=4 -m fedfreeze run digits --run-dir runs/torchrun": SHORT,
    "fedfreeze run cifar10 --nproc 2 --data.path=FOLDER": FEW,
    "fedfreeze run digits --name=fedavg --method.name=fedavg --fleet.enforce=false --train.rounds=35": SHORT,
    "fedfreeze run digits-cut.yaml --name=digits-cut": SHORT,
    "fedfreeze run cifar10 --name=parquet --data.path=FOLDER": FEW,
    "fedfreeze run cifar10 --name=images --data.path=IMAGES --data.image_size=32": FEW,
    "fedfreeze fetch cifar10 --data.cache_dir=CACHE": ["--data.path=FOLDER"],
    "fedfreeze run cifar10 --name=hub --data.cache_dir=CACHE": [*FEW, "--data.path=FOLDER"],
    "fedfreeze run digits --name=ranks --nproc 2": SHORT,
    "torchrun --nproc-per-node=2 -m fedfreeze run digits --name=under-torchrun": SHORT,
    "fedfreeze run digits --name=tracked --track.wandb=offline": SHORT,
    "fedfreeze run digits --name=digits-seed1 --seed=1": SHORT,
    "fedfreeze run digits --name=selected --select.name=smartfreeze": SHORT,
    "fedfreeze run digits --name=oort --select.name=oort": SHORT,
    "fedfreeze doctor digits --nproc 2": SHORT,
    "bash launch/torchrun.sh 2 digits": [*SHORT, "--name=by-torchrun"],
}

FEDAVG = "fedfreeze run digits --name=fedavg --method.name=fedavg --fleet.enforce=false --train.rounds=35"

# Command -> the command that must come before it.
NEEDS = {
    "fedfreeze run digits --name=digits-seed1 --seed=1": "fedfreeze run digits",
    FEDAVG: "fedfreeze run digits --name=digits-seed1 --seed=1",
    "fedfreeze compare runs/digits runs/digits-seed1 runs/fedavg --out report": FEDAVG,
    "fedfreeze compare runs/digits runs/fedavg --target 0.98": FEDAVG,
    "fedfreeze compare runs/digits runs/fedavg --markdown": FEDAVG,
    "fedfreeze compare runs/digits runs/fedavg --json": FEDAVG,
    "fedfreeze compare runs/digits runs/fedavg --out report": FEDAVG,
    "python -m json.tool runs/digits/summary.json": "fedfreeze run digits",
    "fedfreeze run digits --nproc 4": "fedfreeze run digits",
    "fedfreeze run digits-cut.yaml --name=digits-cut": (
        "fedfreeze plan digits --cut --share=0.7 --write=digits-cut.yaml"
    ),
    "fedfreeze run cifar10 --name=hub --data.cache_dir=CACHE": "fedfreeze fetch cifar10 --data.cache_dir=CACHE",
    "fedfreeze sync --offline runs/tracked": "fedfreeze run digits --name=tracked --track.wandb=offline",
    "fedfreeze sync --offline runs/digits": "fedfreeze run digits",
}

INSTALLS = "it installs packages from the network"
NEEDS_SLURM = "it needs SLURM; tests/slurm/test_jobs.py runs it"
NOT_RUN = {
    "bash launch/quickstart.sh": INSTALLS,
    "bash tests/run.sh": "it installs packages from the network, and runs these very tests",
    "python3 -m venv .venv": "the next commands would install into it from the network",
    ". .venv/bin/activate": "the environment of the tests is the one to test",
    "pip install -c constraints-cpu.txt -e '.[test]'": INSTALLS,
    "pip install 'wandb>=0.20'": INSTALLS,
    "pip install -e '.[wandb,mpi]'": INSTALLS,
    "pip install -c constraints-cpu.txt -e '.[wandb,mpi]'": INSTALLS,
    "MPICC=mpicc pip install --no-cache-dir --no-binary=mpi4py --force-reinstall mpi4py": INSTALLS,
    'python -c "from mpi4py import MPI; print(MPI.Get_library_version())"': "it needs MPI",
    "fedfreeze sync runs/digits": "it needs an account and the network",
    "fedfreeze sync runs/tracked": "it needs an account and the network",
    "wandb sync runs/tracked/wandb/sync/offline-run-*": "it needs an account and the network",
    "python benchmarks/sweep.py digits benchmarks/tables/methods_and_selectors.txt OUT --train.rounds=50": (
        "42 runs; tests/benchmarks/test_sweep.py runs it over small tables"
    ),
    "fedfreeze compare OUT/*/ --target 0.97 --out report": "it compares those 42 runs",
    "mpirun -n 4 fedfreeze doctor digits --comm.transport=mpi": "it needs MPI; tests/doctor/test_doctor.py runs it",
    "srun fedfreeze doctor digits --ranks 8": "it needs SLURM; tests/doctor/test_doctor.py runs it",
    "srun --nodes=2 --ntasks-per-node=2 --time=5 fedfreeze doctor digits --ranks 4": (
        "it needs SLURM; tests/doctor/test_doctor.py runs it"
    ),
    "sbatch slurm/cpu.sbatch digits": NEEDS_SLURM,
    "sbatch --nodes=2 --ntasks-per-node=1 slurm/cpu.sbatch digits --track.wandb=offline --data.cache_dir=CACHE": (
        NEEDS_SLURM
    ),
    "fedfreeze compare runs/seeds/seed0 runs/seeds/seed1": "it compares the runs of a job array",
    "bash launch/mpirun.sh 2 digits --comm.transport=mpi --checkpoint.time_limit_s=14000": (
        "it needs MPI; tests/launch/test_scripts.py runs it with a stand-in for mpirun"
    ),
}

# What takes more than a few seconds and is not the first thing that a reader types.
SLOW = {
    "fedfreeze run cifar10 --name=parquet --data.path=FOLDER",
    "fedfreeze plan digits --cut --share=0.7",
    "torchrun --nproc-per-node=4 -m fedfreeze doctor",
    "torchrun --nproc-per-node=4 -m fedfreeze run digits --run-dir runs/torchrun",
    "fedfreeze run cifar10 --nproc 2 --data.path=FOLDER",
    "fedfreeze plan digits --fleet.devices=50 --fleet.memory_cap_mib='loguniform(2, 8)'",
    "fedfreeze plan digits --calibrate",
    "fedfreeze run digits --name=selected --select.name=smartfreeze",
    "fedfreeze run digits --name=oort --select.name=oort",
    "fedfreeze plan digits --model.name=vgg11 --model.width=8",
    "fedfreeze plan digits --cut --share=0.7 --write=digits-cut.yaml",
    "fedfreeze run digits-cut.yaml --name=digits-cut",
    "fedfreeze plan digits --data.alpha=0.1 --partition-picture=labels.png",
    "fedfreeze run cifar10 --name=images --data.path=IMAGES --data.image_size=32",
    "fedfreeze run cifar10 --name=hub --data.cache_dir=CACHE",
    "fedfreeze run digits --name=ranks --nproc 2",
    "torchrun --nproc-per-node=2 -m fedfreeze run digits --name=under-torchrun",
    "fedfreeze run digits --name=tracked --track.wandb=offline",
    "fedfreeze sync --offline runs/tracked",
    "fedfreeze sync --offline runs/digits",
    "bash launch/torchrun.sh 2 digits",
}


COMMANDS = list(dict.fromkeys(c for document in DOCUMENTS if document != EXTENDING for c in commands_of(document)))
PIECES = [
    (document.name, block.text)
    for document in DOCUMENTS
    if document != EXTENDING
    for block in blocks_of(document)
    if block.is_python
]


class Workplace:
    """A folder in which the documents' commands work, as a reader has it who typed the ones before."""

    def __init__(self, folder: Path, placeholders: dict[str, Path]):
        self.folder = folder
        self.placeholders = placeholders
        self.done: dict[str, subprocess.CompletedProcess[str]] = {}
        (folder / "programs").mkdir()
        self.programs = command_for_shells(folder / "programs")

    def run(self, command: str) -> subprocess.CompletedProcess[str]:
        """Run a command and what it needs, each once."""
        if command in NEEDS:
            assert self.run(NEEDS[command]).returncode == 0
        if command not in self.done:
            line = " ".join([command, *APPENDED.get(command, [])])
            for placeholder, path in self.placeholders.items():
                line = re.sub(rf"\b{placeholder}\b", str(path), line)
            self.done[command] = self.shell(line)
        return self.done[command]

    def shell(self, line: str) -> subprocess.CompletedProcess[str]:
        """Run a line in bash, with the programs of this environment; what fedfreeze imports is there already."""
        environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        programs = f"{self.programs}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
        environment |= {"PATH": programs, "XDG_CACHE_HOME": str(self.folder / "cache")}
        return subprocess.run(
            ["bash", "-c", line], cwd=self.folder, env=environment, capture_output=True, text=True, timeout=300
        )


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, write_parquet: Callable[..., Path]) -> Workplace:
    folder = tmp_path_factory.mktemp("workplace")
    for name in ("launch", "benchmarks"):
        shutil.copytree(ROOT / name, folder / name)
    data = folder / "data"
    generator = np.random.default_rng(0)
    for split, count in (("train", 240), ("test", 24)):
        pictures = [generator.integers(0, 256, (16, 16, 3), np.uint8) for _ in range(count)]
        labels = [i % 4 for i in range(count)]
        write_parquet(data / "parquet" / f"{split}-00000.parquet", pictures, labels)
        write_images(data / "images" / split, pictures, labels)
    placeholders = {"FOLDER": data / "parquet", "IMAGES": data / "images", "CACHE": folder / "decoded"}
    return Workplace(folder, placeholders)


def write_images(folder: Path, pictures: list[np.ndarray], labels: list[int]) -> None:
    """Write an image folder of two sizes: data.image_size is there for that."""
    from PIL import Image

    for i, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        path = folder / f"class{label}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).resize((20 + i % 2, 24)).save(path)


def parameters() -> list[object]:
    marks = {command: [pytest.mark.slow] if command in SLOW else [] for command in COMMANDS}
    return [pytest.param(command, marks=marks[command]) for command in COMMANDS if command not in NOT_RUN]


@pytest.mark.parametrize("command", parameters())
def test_command_works_as_written(command: str, workplace: Workplace) -> None:
    done = workplace.run(command)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("document", "piece"), PIECES, ids=[f"{name}-{i}" for i, (name, _) in enumerate(PIECES)])
def test_python_works_as_written(document: str, piece: str, workplace: Workplace) -> None:
    assert workplace.run("fedfreeze run digits").returncode == 0
    (workplace.folder / "piece.py").write_text(piece)
    with contextlib.chdir(workplace.folder):
        done = run([sys.executable, "piece.py"])
    assert done.returncode == 0, f"{document}\n{piece}\n{done.stderr}"


def test_tables_name_only_commands_that_are_written_somewhere() -> None:
    for table in (APPENDED, NEEDS, NOT_RUN, SLOW):
        assert sorted(set(table) - set(COMMANDS)) == []
    assert sorted(set(NEEDS.values()) - set(COMMANDS)) == []
    assert sorted(set(NOT_RUN) & {*APPENDED, *SLOW, *NEEDS}) == []


def test_finds_commands_and_python(tmp_path: Path) -> None:
    document = tmp_path / "text.md"
    document.write_text(
        "Text\n    fedfreeze run not-a-block\n\n    fedfreeze run a   # why\n    fedfreeze/\n    A=1 python b.py \\\n"
        "      --c\n    output of it\n\n```python\nprint(1)\n```\n\n```\n$ bash d.sh\n```\n\n    import e\n"
    )
    assert commands_of(document) == ["fedfreeze run a", "A=1 python b.py --c", "bash d.sh"]
    assert [block.text for block in blocks_of(document) if block.is_python] == ["print(1)\n", "import e\n"]
    assert len(COMMANDS) > 15
    assert len(PIECES) >= 2


def test_configuration_reference_is_what_the_generator_gives_now() -> None:
    written = (ROOT / "docs" / "configuration.md").read_text()
    assert written == configuration_reference(), "run: python -m fedfreeze.config.reference > docs/configuration.md"


def test_every_document_is_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    for document in DOCUMENTS[1:]:
        assert document.name == "README.md" or f"({document.name})" in index
