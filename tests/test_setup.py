"""The house: set-up files agree, modules keep their size and their floor, and the documents name what is there."""

import ast
import configparser
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "fedfreeze"
MODULES = sorted(PACKAGE.rglob("*.py"))
CONDA_NAMES = {"torch": "pytorch"}

# Ground floor first: a module imports only from its own floor or those below it.
FLOORS = [
    {"errors", "lock", "seeds", "config", "aggregate", "flat", "reports", "launcher", "cap", "quiet_wandb", "slurm"},
    {"local_ranks", "preempt"},
    {"device_classes", "fleet_csv", "compute"},
    {"config_file", "plugins", "chain", "models", "fleet", "comm"},
    {"blocks", "data", "stage", "checkpoint", "select", "pace", "probe"},
    {"output_modules", "run_folder", "partition_summary"},
    {"methods"},
    {"cost", "train", "deploy"},
    {"clock"},
    {"coordinator"},
    {"round"},
    {"track"},
    {"summary", "report"},
    {"cut", "plan", "calibrate", "compare", "sync"},
    {"experiment", "doctor"},
    {"session"},
    {"reference", "cli", "__main__"},
]


def requirements() -> dict[str, str]:
    """Name and floor of every package that setup.cfg installs."""
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    lines = parser["options"]["install_requires"].split() + parser["options.extras_require"]["plot"].split()
    lines += parser["options.extras_require"]["wandb"].split() + parser["options.extras_require"]["mpi"].split()
    return dict(re.split(r">=", line.lower()) for line in lines)


def test_environment_yml_holds_the_same_floors_as_setup_cfg() -> None:
    listed = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    by_pip = next(entry["pip"] for entry in listed if isinstance(entry, dict))
    conda = dict(entry.split(">=") for entry in [*listed, *by_pip] if isinstance(entry, str) and ">=" in entry)
    python = conda.pop("python")
    assert f"python_requires = >={python}" in (ROOT / "setup.cfg").read_text()
    assert conda == {CONDA_NAMES.get(name, name): floor for name, floor in requirements().items()}


def test_constraints_pin_every_requirement() -> None:
    lines = (ROOT / "constraints-cpu.txt").read_text().splitlines()
    pinned = {line.split("==")[0].lower() for line in lines if "==" in line}
    assert set(requirements()) <= pinned
    assert "torch==2.13.0" in lines


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_module_says_what_it_is_and_fits_a_room(module: Path) -> None:
    text = module.read_text()
    assert ast.get_docstring(ast.parse(text)), "the first line must say what the file is"
    assert len(text.splitlines()) <= 500


def test_no_test_file_outgrows_a_room_either() -> None:
    for path in [*(ROOT / "tests").glob("*.py"), *(ROOT / "benchmarks").glob("*.py")]:
        assert len(path.read_text().splitlines()) <= 500, path


def floor_of(name: str) -> int:
    return next(number for number, floor in enumerate(FLOORS) if name.split(".")[0] in floor)


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_module_imports_only_from_its_floor_or_below(module: Path) -> None:
    name = module.relative_to(PACKAGE).with_suffix("").parts[0]
    if name == "__init__":
        return
    for node in ast.parse(module.read_text()).body:  # at the top: imports inside functions are late on purpose
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("fedfreeze."):
            imported = node.module.removeprefix("fedfreeze.")
            assert floor_of(imported) <= floor_of(name), f"{name} imports {imported} from above"


def test_only_comm_knows_collectives_and_each_says_who_must_call_it() -> None:
    for module in MODULES:
        tree = ast.parse(module.read_text())
        if module.parent.name != "comm":
            for node in ast.walk(tree):
                names = [alias.name for alias in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
                names.append(getattr(node, "module", None) or "")
                assert not any(name.startswith("torch.distributed") for name in names), module
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and calls_a_collective(node):
                docstring = ast.get_docstring(node) or ""
                assert docstring.startswith("Collective: every rank must call this."), f"{module.name}:{node.name}"


def calls_a_collective(function: ast.FunctionDef) -> bool:
    """Whether a function calls `dist.x` or a collective of `ranks`."""
    names = {"share", "all_gather", "all_reduce", "broadcast", "decide", "together"}
    for node in ast.walk(function):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = ast.unparse(node.func.value)
            if owner == "dist" and node.func.attr.islower() and not node.func.attr.startswith(("is_", "init_")):
                return True
            if owner in ("ranks", "self.ranks", "self.transport", "self") and node.func.attr in names:
                return True
    return False


def test_importing_makes_no_process_group_and_no_threads() -> None:
    code = (
        "import threading, fedfreeze.experiment, fedfreeze.cli, torch.distributed as dist\n"
        "assert not dist.is_initialized() and threading.active_count() == 1"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_readme_names_every_module_and_every_link_leads_somewhere() -> None:
    readme = (ROOT / "README.md").read_text()
    tree = readme[readme.index("    fedfreeze/\n") :]
    for path in PACKAGE.iterdir():
        if path.suffix == ".py" and not path.name.startswith("__"):
            assert re.search(rf"^ +{re.escape(path.name)} ", tree, re.MULTILINE), f"{path.name} is not in the tree"
        elif path.is_dir() and path.name != "__pycache__":
            assert f"{path.name}/" in tree
    for document in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"


def test_scripts_are_executable_and_parse() -> None:
    for script in ("launch/quickstart.sh", "launch/environment.sh", "tests/run.sh", ".ci/run"):
        subprocess.run(["bash", "-n", str(ROOT / script)], check=True)
    for script in ("launch/quickstart.sh", "tests/run.sh", ".ci/run"):
        assert (ROOT / script).stat().st_mode & 0o111
