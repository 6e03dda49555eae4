"""Every bad input is one line on stderr with the right exit code, and leaves nothing behind.

`python -m tests.test_bad_inputs` prints all cases, of the other files of bad things too, as a table in Markdown.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.support.checks import ROOT
from tests.support.in_process import (
    TINY,
    Bad,
    assert_refused,
    attempt,
    check_refused,
    image_folder,
    note,
    own,
    parquet,
    png,
    run_case,
)
from tests.support.launching import ENVIRONMENT, write_config

DATA = ("--data.path=data", "--data.cache_dir=cache")
OWN_PATH = {"data": {"path": "data", "cache_dir": "cache"}}


def unreadable(folder: Path) -> None:
    """Root may read everything but what is no file."""
    (folder / "small.yaml").unlink()
    (folder / "small.yaml").mkdir()


def images(change: Any) -> Any:
    """Return a `prepare` that writes a good image folder and then spoils it."""

    def prepare(folder: Path) -> None:
        image_folder(folder)
        change(folder / "data")

    return prepare


def tables(train: list[Any], test: list[Any] | None = None, change: Any = None, **options: Any) -> Any:
    """Return a `prepare` that writes Parquet files with these labels and then spoils them."""

    def prepare(folder: Path) -> None:
        file = parquet(folder, "train", train, **options)
        if test is not None:
            parquet(folder, "test", test, **options)
        if change is not None:
            change(file)

    return prepare


def text_config(text: str | bytes, *says: str, **options: Any) -> Bad:
    return Bad(says, config="bad.yaml", files={"bad.yaml": text}, **options)


def without(folder: Path, *names: str) -> None:
    import shutil

    for name in names:
        shutil.rmtree(folder / name)


CONFIGURATIONS = {
    # keys that contradict each other
    "participants > devices": Bad(
        ("train.participants: 25", "fleet.devices (24)", "lower the one or raise the other"),
        ("--train.participants=25",),
    ),
    "max_rounds < min_rounds": Bad(
        ("pace.max_rounds: 3 is less than pace.min_rounds (5)",), ("--pace.max_rounds=3", "--pace.min_rounds=5")
    ),
    "subset with path": Bad(
        ("data.subset=small: data.path=data is no data set of the hub", "leave data.subset out"),
        (*DATA, "--data.subset=small"),
        prepare=image_folder,
    ),
    "subset with digits": Bad(
        ("data.subset=small: data.name=digits has none", "leave data.subset out"), ("--data.subset=small",)
    ),
    "columns with an image folder": Bad(
        ("data.image_column=img", "image folders, which have no columns", "leave data.image_column out"),
        (*DATA, "--data.image_column=img"),
        prepare=image_folder,
    ),
    "options for a built-in selector": Bad(("select.options: 'uniform' takes none",), ("--select.options={a: 1}",)),
    "options for a built-in policy": Bad(("pace.options: 'perturbation' takes none",), ("--pace.options={a: 1}",)),
    "options for a built-in method": Bad(("method.options: 'smartfreeze' takes none",), ("--method.options={a: 1}",)),
    "options for a built-in network": Bad(("model.options: 'resnet8' takes none",), ("--model.options={a: 1}",)),
    "image_size with synthetic": Bad(
        ("data.image_size=8", "data.synthetic_shape decides", "leave data.image_size out"),
        ("--data.name=synthetic", "--data.image_size=8"),
    ),
    "fewer synthetic samples than classes": Bad(
        ("data.synthetic_samples=10", "data.synthetic_classes=11", "at least one sample a class"),
        ("--data.name=synthetic", "--data.synthetic_samples=10", "--data.synthetic_classes=11"),
    ),
    "fixed policy with fewer rounds than stages": Bad(
        ("train.rounds: 2 is less than the 3 stages", "pace.policy fixed"), ("--train.rounds=2", "--pace.policy=fixed")
    ),
    "more devices than samples": Bad(
        ("fleet.devices: 2000 is more than the 1437 training samples of digits", "lower it to 1437 or less"),
        ("--fleet.devices=2000",),
    ),
    "negative speed": Bad(
        ("fleet.speed_gflops: device 0 has -1.0 GFLOP/s", "more than 0"), ("--fleet.speed_gflops=-1",)
    ),
    "unknown profile": Bad(("'phone' is no profile; did you mean phones?",), ("--fleet.profile=phone",)),
    "segments where features are stored": Bad(
        ("fleet.accounting: cuda_segments counts devices", "train.prefix=recomputed"),
        ("--train.prefix=stored", "--fleet.accounting=cuda_segments"),
    ),
    "deadline that nobody meets": Bad(
        ("train.deadline_s: 1e-06 s is too short for stage", "fastest device"), ("--train.deadline_s=1e-6",)
    ),
    "widths of a ViT": Bad(
        ("heterofl scales the channels of ResNets and VGGs, and model.name is vit",),
        ("--method.name=heterofl", "--model.name=vit", "--model.width=32"),
    ),
    "no width fits the smallest cap": Bad(
        ("no width of resnet8 fits the smallest cap", "width 1 needs"),
        ("--method.name=allsmall", "--fleet.memory_cap_mib=0.001"),
    ),
    "--nproc under torchrun": Bad(
        ("--nproc 2 under torchrun, which starts the ranks itself; drop it",),
        ("--nproc", "2"),
        environment={"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"},
    ),
    "srun without tasks": Bad(
        ("SLURM_PROCID is None", "srun, mpirun"),
        environment={"SLURM_STEP_ID": "0", "SLURM_NTASKS": "4"},
    ),
    "a job of 4 tasks without srun": Bad(
        ("4 tasks, but fedfreeze was started once; use `srun fedfreeze run",),
        environment={"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4"},
    ),
    "torchrun in each task of srun": Bad(
        ("srun started 4 tasks, but torchrun's group has 1 agent(s)", "--nnodes=4"),
        environment={"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "GROUP_WORLD_SIZE": "1", "RANK": "0"}
        | {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"},
    ),
    "transport mpi under torchrun": Bad(
        ("comm.transport is mpi, but the ranks were started by torchrun", "mpirun or srun --mpi=pmix"),
        ("--comm.transport=mpi",),
        environment={"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"},
    ),
    "transport mpi by --nproc": Bad(
        ("--nproc starts ranks that MPI knows nothing of",), ("--nproc", "2", "--comm.transport=mpi")
    ),
    "ranks on several hosts that cannot meet": Bad(
        ("2 ranks on several hosts, and none knows where rank 0 is; set MASTER_ADDR",),
        environment={
            f"OMPI_COMM_WORLD_{name}": value
            for name, value in {"RANK": "0", "SIZE": "2", "LOCAL_RANK": "0", "LOCAL_SIZE": "1"}.items()
        },
    ),
    "MASTER_PORT that is no port": Bad(
        ("MASTER_PORT is 'high'; it must be a port, 1 to 65535",),
        environment={"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_PORT": "high"},
    ),
    "RANK without LOCAL_RANK": Bad(
        ("LOCAL_RANK is None", "torchrun, srun, mpirun or --nproc"), environment={"RANK": "0", "WORLD_SIZE": "2"}
    ),
    "WORLD_SIZE that is no number": Bad(
        ("WORLD_SIZE is 'two'",), environment={"RANK": "0", "WORLD_SIZE": "two", "LOCAL_RANK": "0"}
    ),
    "WORLD_SIZE=0": Bad(
        ("WORLD_SIZE",),
        environment={"RANK": "0", "WORLD_SIZE": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"},
    ),
    # names, sections, types
    "unknown key": Bad(("unknown key train.round; did you mean train.rounds?",), ("--train.round=3",)),
    "unknown section": Bad(("unknown section fleat; did you mean fleet?",), ("--fleat.devices=3",)),
    "unknown key at the top": Bad(("unknown key sed; did you mean seed?",), ("--sed=3",)),
    "unknown key in the file": text_config("fleet: {device: 3}\n", "unknown key fleet.device; did you mean"),
    "unknown experiment": Bad(("called 'digit'; did you mean digits?", "needs its .yaml ending"), config="digit"),
    "unknown network": Bad(
        ("model.name: 'resnet9' is not allowed; did you mean resnet", "allowed: resnet8"), ("--model.name=resnet9",)
    ),
    "unknown policy": Bad(
        ("pace.policy: 'plateu' is not allowed; did you mean plateau?", "package.module:Class"),
        ("--pace.policy=plateu",),
    ),
    "text for a number": Bad(("train.rounds: 'ten'", "valid integer"), ("--train.rounds=ten",)),
    "a fraction for a count": Bad(("train.rounds: 2.5", "integer"), ("--train.rounds=2.5",)),
    "a truth value for a count": Bad(("train.rounds: True", "integer"), ("--train.rounds=true",)),
    "a list for a number": Bad(("train.rounds: [1, 2]", "integer"), ("--train.rounds=[1, 2]",)),
    "nothing for a number": Bad(("train.rounds: None", "integer"), ("--train.rounds=null",)),
    "no rounds": Bad(("train.rounds: 0", "greater than or equal to 1"), ("--train.rounds=0",)),
    "NaN": Bad(("train.learning_rate", "nan", "finite number"), ("--train.learning_rate=.nan",)),
    "infinity": Bad(("train.learning_rate", "inf", "finite number"), ("--train.learning_rate=.inf",)),
    "a negative seed": Bad(("seed: -1", "greater than or equal to 0"), ("--seed=-1",)),
    "a name that leads out of runs/": Bad(("name: '../../etc'", "names a folder"), ("--name=../../etc",)),
    "an override without a value": Bad(("--train.rounds needs a value",), ("--train.rounds",)),
    "a section as an override": Bad(("train is a section; write --train.field=value",), ("--train=3",)),
    "half a number of ranks": Bad(("'1.5' is not a positive whole number", "fedfreeze run --help"), ("--nproc", "1.5")),
    "a digit of another alphabet": Bad(
        ("'²' is not a positive whole number",),
        ("--nproc", "²"),
    ),
    "an unknown command": Bad(("invalid choice: 'rum'", "--help"), arguments=("rum", "digits")),
    "no configuration": Bad(("CONFIG", "fedfreeze run --help"), arguments=("run",)),
    # files
    "YAML that does not parse": text_config("train: [1, 2\n", "bad.yaml is not YAML", "line 2"),
    "a tab in YAML": text_config("train:\n\trounds: 3\n", "bad.yaml is not YAML", "line 2"),
    "YAML that is a list": text_config("- 1\n- 2\n", "bad.yaml must hold sections (key: value), not list"),
    "YAML that is a word": text_config("rounds", "bad.yaml must hold sections (key: value), not str"),
    "a key twice": text_config("seed: 1\nseed: 2\n", "key 'seed' is given twice", "line 2"),
    "a key twice in a section": text_config("train:\n  rounds: 1\n  rounds: 2\n", "key 'rounds' is given twice"),
    "two documents": text_config("seed: 1\n---\nseed: 2\n", "bad.yaml is not YAML"),
    "a tag of Python": text_config("name: !!python/object/apply:os.mkdir [made]\n", "bad.yaml is not YAML"),
    "a section that is a list": text_config("train: [1]\n", "train: must be a section with keys, not [1]"),
    "a value within itself": text_config("train: &a {rounds: *a}\n", "train.rounds", "it holds itself"),
    "a binary file": text_config(bytes(range(256)), "bad.yaml is not YAML"),
    "a directory": Bad(("small.yaml does not exist",), prepare=unreadable),
    "no such file": Bad(("configuration file none.yaml does not exist",), config="none.yaml"),
    "a file without its ending": Bad(
        ("no shipped experiment is called 'conf'", "a file needs its .yaml ending"),
        config="conf",
        files={"conf": "seed: 1\n"},
    ),
    "a file name of 300 letters": Bad(("cannot be read: File name too long",), config="x" * 300 + ".yaml"),
}


def csv(text: str | bytes, *says: str) -> Bad:
    return Bad(
        ("fleet.memory_cap_mib: fleet.csv", *says), ("--fleet.memory_cap_mib=fleet.csv",), files={"fleet.csv": text}
    )


ROWS = "".join(f"{device},2\n" for device in range(24))
HEAD = "device,memory_cap_mib\n"
FLEETS = {
    "CSV: missing column": csv(f"device,cap\n{ROWS}", "line 2 has no memory_cap_mib", "must name the columns"),
    "CSV: no header": csv(ROWS, "line 2 has no device"),
    "CSV: negative cap": Bad(
        ("fleet.memory_cap_mib: device 11 has -2.0 MiB; a cap must be more than 0",),
        ("--fleet.memory_cap_mib=fleet.csv",),
        files={"fleet.csv": HEAD + ROWS.replace("11,2", "11,-2")},
    ),
    "CSV: duplicate device": csv(f"{HEAD}{ROWS}3,2\n", "line 26 gives device 3 a second time"),
    "CSV: missing device": csv(HEAD + ROWS.replace("7,2\n", ""), "device 7 is missing", "fleet.devices is 24"),
    "CSV: a device too many": csv(f"{HEAD}{ROWS}24,2\n", "it lists 25 devices", "numbered 0 to 23"),
    "CSV: text for a number": csv(HEAD + ROWS.replace("5,2", "5,much"), "line 7 is not a device number and a cap"),
    "CSV: unit in the cell": csv(HEAD + ROWS.replace("5,2", "5,2 MiB"), "line 7 is not a device number and a cap"),
    "CSV: semicolons": csv((HEAD + ROWS).replace(",", ";"), "line 2 has no device"),
    "CSV: empty file": csv("", "device 0 is missing"),
    "CSV: UTF-16": csv((HEAD + ROWS).encode("utf-16"), "cannot be read", "codec can't decode"),
    "CSV: binary": csv(bytes(range(256)), "cannot be read"),
    "CSV: a NUL": csv(HEAD + ROWS.replace("5,2", "5,\0"), "line"),
    "CSV: absent file": Bad(
        ("fleet.memory_cap_mib: none.csv cannot be read: No such file",), ("--fleet.memory_cap_mib=none.csv",)
    ),
    "CSV: a folder": Bad(
        ("fleet.memory_cap_mib: is.csv cannot be read: Is a directory",),
        ("--fleet.memory_cap_mib=is.csv",),
        prepare=lambda folder: (folder / "is.csv").mkdir(),
    ),
    "caps that hold no stage": Bad(
        ("no device holds stage", "the largest cap is 0.2 MiB", "the smallest cap that holds every stage is 0."),
        ("--fleet.memory_cap_mib=0.2",),
    ),
    "caps that hold the first stage alone": Bad(
        ("no device holds stage", "the smallest cap that holds every stage is 0.", "raise fleet.memory_cap_mib"),
        ("--fleet.memory_cap_mib=[0.25, 0.3]", "--train.batch_size=14"),
    ),
    "an empty list of caps": Bad(("fleet.memory_cap_mib: the list is empty",), ("--fleet.memory_cap_mib=[]",)),
    "a negative cap": Bad(("device 0 has -3.0 MiB; a cap must be more than 0",), ("--fleet.memory_cap_mib=-3",)),
    "a cap in words": Bad(("'100 MiB' is not a cap; allowed: a number",), ("--fleet.memory_cap_mib=100 MiB",)),
    "more memory than there are numbers": Bad(("must be more than 0 and finite",), ("--fleet.memory_cap_mib=1e308",)),
}


def data(prepare: Any, *says: str, options: tuple[str, ...] = (), code: int = 65, **others: Any) -> Bad:
    return Bad(("data", *says), (*DATA, *options), code=code, prepare=prepare, **others)


TWO = [0, 1] * 4
DATA_SETS = {
    "no such folder": data(None, "data.path data is not a folder"),
    "a file for a folder": data(lambda folder: (folder / "data").touch(), "data.path data is not a folder"),
    "an empty folder": data(lambda folder: (folder / "data").mkdir(), "data.path data", "train/CLASS/*.png"),
    "labels that are negative": data(tables([0, 1, -1], TWO), "split train, row 3: label -1 is negative"),
    "labels out of range": data(tables([0, 1, 100_000], TWO), "split train, row 3: label 100000 is over 99999"),
    "labels of 64 bits": data(tables([0, 1, 2**62], TWO), "split train, row 3: label"),
    "labels that are missing": data(tables([0, 1, None], TWO), "split train, row 3: label None: it is missing"),
    "labels that are text": data(tables(["cat", "dog"], ["cat"]), "split train, row 1: label 'cat'", "number the"),
    "labels that are fractions": data(tables([0.5, 1.0], [1.0]), "split train, row 1: label 0.5"),
    "labels with a gap": data(tables([0, 2, 3], TWO), "no sample of class 1", "renumber the labels 0 to 2"),
    "a single class": data(tables([0, 0, 0], [0]), "a single class; at least two are needed"),
    "more classes in test": data(tables(TWO, [0, 1, 2]), "split test has label 2", "check the splits"),
    "no test split": data(tables(TWO), "no test split (found: train)", "name the files test-*.parquet"),
    "an empty split": data(
        tables(TWO, []),
        "split test holds no samples",
    ),
    "corrupt Parquet": data(
        tables(TWO, TWO, lambda file: file.write_bytes(file.read_bytes()[:-30])), "data: it cannot be read"
    ),
    "an empty Parquet file": data(tables(TWO, TWO, lambda file: file.write_bytes(b"")), "data: it cannot be read"),
    "Parquet without images": data(tables(TWO, TWO, column="text"), "no image column", "data.image_column"),
    "Parquet without the column asked for": data(
        tables(TWO, TWO), "no label column 'kind'; found: img, label", options=("--data.label_column=kind",)
    ),
    "Parquet with broken bytes": data(
        tables([0, 1], [0, 1], images=[png(seed=1), png(seed=2)[:60]]), "split train, row 2", "check or fetch"
    ),
    "Parquet with images of mixed sizes": data(
        tables([0, 1], [0, 1], images=[png(1), png(1, size=(9, 8))]), "split train, row 2", "data.image_size=PIXELS"
    ),
    "images of mixed sizes": data(
        images(lambda folder: (folder / "train/class1/2.png").write_bytes(png(1, size=(4, 9)))),
        "train/class1/2.png: image of (1, 4, 9)",
        "data.image_size=PIXELS",
    ),
    "an image with broken bytes": data(
        images(lambda folder: (folder / "test/class1/2.png").write_bytes(png(seed=1)[:70])),
        "test/class1/2.png",
        "check or fetch the file again",
    ),
    "a text file called .png": data(
        images(lambda folder: (folder / "train/class0/note.png").write_text("hello")),
        "train/class0/note.png: it is no image of a known format",
    ),
    "an image of no bytes": data(
        images(lambda folder: (folder / "train/class0/0.png").write_bytes(b"")), "train/class0/0.png"
    ),
    "an empty class folder": data(
        images(lambda folder: (folder / "train/class2").mkdir()),
        "the class folder train/class2 holds no image; fill or remove it",
    ),
    "one image only": data(
        lambda folder: image_folder(folder, classes=1, each=1), "train holds a single class, class0"
    ),
    "an image folder without test": data(
        images(lambda folder: without(folder, "test")), "no test folder (found: train)", "train/CLASS/*.png"
    ),
    "a class in test alone": data(
        images(lambda folder: (folder / "test/class0").rename(folder / "test/other")), "the class other, which train"
    ),
    "a hub name without a network": Bad(
        ("data someone/flowers: it cannot be read", "without a network give --data.path=FOLDER of Parquet files"),
        ("--data.name=someone/flowers", "--data.cache_dir=cache"),
        code=65,
        environment={"HF_HUB_OFFLINE": "1"},
    ),
    "a misspelt embedded name": Bad(
        ("data digit: it cannot be read", "--data.path=FOLDER"),
        ("--data.name=digit", "--data.cache_dir=cache"),
        code=65,
    ),
    "an empty data name": Bad(("data",), ("--data.name=", "--data.cache_dir=cache"), code=65),
    "an empty data path": Bad(("data.path",), ("--data.path=", "--data.cache_dir=cache"), code=65),
    "cache_dir is a file": Bad(
        ("cannot write decoded data to file", "Not a directory", "choose another folder"),
        ("--data.cache_dir=file/cache",),
        code=74,
        files={"file": ""},
    ),
    "fetch of what is not there": Bad(
        ("data.path nowhere is not a folder",), code=65, arguments=("fetch", "small.yaml", "--data.path=nowhere")
    ),
    "plan of what is not there": Bad(
        ("data.path nowhere is not a folder",), code=65, arguments=("plan", "small.yaml", "--data.path=nowhere")
    ),
    "plan --share=0": Bad(("'0' is not a share",), arguments=("plan", "small.yaml", "--cut", "--share=0")),
    "plan --write to a folder that is not there": Bad(
        ("cannot write none/new.yaml", "No such file or directory"),
        code=74,
        **own(""),
        arguments=("plan", "small.yaml", "--cut", "--share=0.1", "--write=none/new.yaml"),
    ),
}


FILES = ("bad_inputs", "bad_code", "bad_devices", "bad_places", "bad_checkpoints", "interrupts")
BEFORE = CONFIGURATIONS | FLEETS | DATA_SETS


@pytest.mark.parametrize("name", BEFORE)
def test_refused_with_one_line_and_nothing_left(name: str, tmp_path: Path) -> None:
    check_refused(name, BEFORE[name], tmp_path)


def test_the_smallest_cap_that_is_named_would_do(tmp_path: Path) -> None:
    case = Bad((), ("--fleet.memory_cap_mib=0.1",), sections=own("")["sections"], files={"mine.py": TINY})
    said = run_case(case, tmp_path).err
    smallest = float(said.split("the smallest cap that holds every stage is ")[1].split(" MiB")[0])
    caps = {cap: f"--fleet.memory_cap_mib={cap}" for cap in (smallest, round(smallest - 0.01, 2))}
    codes = [attempt(tmp_path, "run", "small.yaml", "--run-dir", "run", option).code for option in caps.values()]
    assert codes == [0, 64]


def test_an_empty_file_means_all_defaults(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("")
    outcome = attempt(tmp_path, "fetch", "empty.yaml")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.startswith("digits: 1437 training")


def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    """As another user, for root may read everything."""
    if os.getuid() != 0:
        pytest.skip("only root can become another user")
    config = write_config(tmp_path)
    config.chmod(0)
    code = (
        "import os, sys; from fedfreeze.cli import main; from fedfreeze.config.file import shipped_experiments; "
        "os.chdir(sys.argv[1]); "
        "shipped_experiments(); os.setuid(65534); "
        "sys.exit(main(['run', 'small.yaml']))"
    )
    tmp_path.chmod(0o755)
    for parent in list(tmp_path.parents)[:2]:
        parent.chmod(0o755)
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60)
    note("a file that may not be read", "small.yaml", done.returncode, done.stderr)
    assert done.returncode == 64
    assert done.stderr == "fedfreeze: error: small.yaml cannot be read: Permission denied\n"


@pytest.mark.parametrize(("key", "code"), [("data.cache_dir", 74), ("data.path", 65), ("name", 74)])
def test_a_name_that_is_too_long_for_a_file(key: str, code: int, tmp_path: Path) -> None:
    """Found by benchmarks/fuzz_configurations.py."""
    outcome = attempt(tmp_path, "run", "digits", f"--{key}={'x' * 300}")
    note("a name too long for a file", f"--{key}=xxx...", outcome.code, outcome.err[:160])
    assert_refused(outcome, code, "x" * 100)


def test_an_alias_bomb(tmp_path: Path) -> None:
    lines = ["fleet:", "  memory_cap_mib:", "  - &l0 [1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"  - &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]" for i in range(1, 10)]
    (tmp_path / "bomb.yaml").write_text("\n".join(lines))
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (1 * 10**9,) * 2); "
        "from fedfreeze.cli import main; sys.exit(main(['run', 'bomb.yaml']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=60
    )
    note("an alias bomb", "bomb.yaml", done.returncode, done.stderr)
    assert done.returncode == 64
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == [tmp_path / "bomb.yaml"]


NOTED_IN = (
    "test_bad_inputs.py",
    "test_plugins.py",
    "device/test_emulator.py",
    "storage/test_bad_places.py",
    "storage/test_torn_checkpoints.py",
    "run/test_interrupts.py",
)


def as_markdown(rows: list[list[str]]) -> str:
    """Return the rows as a table, each once."""
    lines = ["| case | command line or file | exit code | message |", "|---|---|---|---|"]
    for row in sorted(rows, key=rows.index):
        cells = (cell.replace("|", "\\|")[:400] for cell in row)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(dict.fromkeys(lines))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        table = Path(place) / "table.jsonl"
        files = [str(ROOT / "tests" / name) for name in NOTED_IN]
        environment = os.environ | {"BAD_INPUTS_TABLE": str(table)}
        code = subprocess.call([sys.executable, "-m", "pytest", "-q", *files], env=environment, stdout=sys.stderr)
        print(as_markdown([json.loads(line) for line in table.read_text().splitlines()]))
    sys.exit(code)
