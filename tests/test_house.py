"""The house: set-up files agree, modules keep their size and their floor, and the documents name what is there."""

import ast
import configparser
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import fedfreeze
from tests.support.checks import ROOT

PACKAGE = ROOT / "fedfreeze"
MODULES = sorted(PACKAGE.rglob("*.py"))
CONDA_NAMES = {"torch": "pytorch"}

# Ground floor first: a room, or a module at the root, imports from floors below its own alone, wherever in its code.
FLOORS = [
    {"errors", "seeds", "units", "messages"},
    {"config", "plugins", "compute"},
    {"network", "select", "fleet", "comm"},
    {"methods", "storage"},
    {"data", "track", "compare"},
    {"device"},
    {"server"},
    {"run"},
    {"plan", "doctor"},
    {"cli"},
    {"__main__"},
]
MOST_AT_THE_ROOT = 9

MODEL_FILES = ("resnet", "vgg", "vit")

# Modules whose tests are not in tests/ROOM/test_MODULE*.py: what tests them instead.
TESTED_IN = {
    "__main__.py": ("test_cli.py",),
    "errors.py": ("test_cli.py", "test_bad_inputs.py"),
    "units.py": ("plan/test_cut.py", "device/test_cost.py"),
    **{f"{room}/command.py": ("test_cli.py",) for room in ("run", "plan", "data", "doctor", "compare", "track")},
    "comm/local_ranks.py": ("comm/test_ranks.py", "run/test_resume.py", "run/test_interrupts.py"),
    "compare/curves.py": ("compare/test_program.py",),
    "compare/figures_of.py": ("compare/test_program.py",),
    "compare/pictures.py": ("compare/test_program.py", "compare/test_page.py"),
    "compare/read.py": ("compare/test_bad_runs.py",),
    "compare/settings.py": ("compare/test_program.py", "compare/test_bad_runs.py"),
    "compare/table.py": ("compare/test_program.py",),
    "config/command_line.py": ("test_cli.py", "test_bad_inputs.py"),
    "config/reference.py": ("test_documents.py",),
    "config/schema.py": ("config/test_file.py", "config/test_file_properties.py"),
    "data/huggingface.py": ("data/test_sources.py",),
    "doctor/findings.py": ("doctor/test_doctor.py",),
    "doctor/judge.py": ("doctor/test_doctor.py",),
    "doctor/probes.py": ("doctor/test_doctor.py",),
    "doctor/program.py": ("doctor/test_doctor.py",),
    "fleet/csv_file.py": ("fleet/test_devices.py",),
    "methods/allsmall.py": ("methods/test_levels.py", "methods/test_every_method.py"),
    "methods/base.py": ("methods/test_merges.py", "test_extending.py"),
    "methods/depthfl.py": ("methods/test_levels.py", "methods/test_merges.py"),
    "methods/exclusivefl.py": ("methods/test_levels.py", "methods/test_every_method.py"),
    "methods/fedavg.py": ("methods/test_every_method.py", "network/test_recompute.py"),
    "methods/fedrolex.py": ("methods/test_levels.py", "methods/test_merges.py"),
    "methods/heterofl.py": ("methods/test_levels.py", "methods/test_merges.py"),
    "methods/widths.py": ("methods/test_levels.py", "methods/test_merges.py"),
    "network/output_modules.py": ("network/test_stage.py", "network/test_blocks.py"),
    **{f"network/models/{name}.py": ("network/test_models.py", "network/test_blocks.py") for name in MODEL_FILES},
    "network/modes.py": ("network/test_following.py",),
    "network/probing.py": ("network/test_blocks.py",),
    "network/pieces.py": ("network/test_start.py",),
    "network/program.py": ("network/test_following.py",),
    "network/recording.py": ("network/test_following.py", "network/test_chain.py"),
    "network/state.py": ("network/test_following.py", "network/test_recompute.py"),
    "network/verify.py": ("network/test_following.py", "test_plugins.py"),
    "plan/table.py": ("plan/test_cut_table.py", "plan/test_calibrate.py", "test_cli.py"),
    "run/deploy.py": ("comm/test_ranks.py", "storage/test_torn_checkpoints.py", "methods/test_every_method.py"),
    "run/experiment.py": ("comm/test_ranks.py", "run/test_resume.py", "run/test_preempted_runs.py"),
    "run/history.py": ("comm/test_ranks.py", "run/test_resume.py", "device/test_emulator.py"),
    "run/reporter.py": ("test_cli.py", "device/test_emulator.py"),
    "run/round.py": ("comm/test_ranks.py", "run/test_resume.py"),
    "run/session.py": ("run/test_interrupts.py", "comm/test_lost_ranks.py"),
    "select/base.py": ("select/test_every_selector.py",),
    "select/dealing.py": ("select/test_smartfreeze.py",),
    "select/uniform.py": ("select/test_every_selector.py",),
    "storage/files.py": ("storage/test_run_folder.py", "compare/test_bad_runs.py"),
    "storage/lock.py": ("storage/test_run_folder.py", "data/test_store.py"),
    "track/metrics.py": ("track/test_sync.py",),
    "track/quiet_wandb.py": ("track/test_live.py",),
}


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
    for path in [*(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")]:
        assert len(path.read_text().splitlines()) <= 500, path


def room_of(module: Path) -> str:
    """Return the room that a module of the package lies in; a module at the root is one of its own."""
    return module.relative_to(PACKAGE).with_suffix("").parts[0]


def imports_from_above(room: str, source: str) -> list[str]:
    """Return what a source text of a room imports from the package and may not."""
    floor_of = {name: number for number, floor in enumerate(FLOORS) for name in floor}
    found = []
    for node in ast.walk(ast.parse(source)):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for name in names:
            other = name.removeprefix("fedfreeze.").split(".")[0]
            if name.startswith("fedfreeze.") and other != room and floor_of[other] >= floor_of[room]:
                found.append(name)
    return found


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_from_rooms_below_it_alone(module: Path) -> None:
    if room_of(module) != "__init__":  # the face of the package: it hands on load_model
        assert imports_from_above(room_of(module), module.read_text()) == []


def test_an_import_from_above_is_found() -> None:
    assert imports_from_above("select", "from fedfreeze.device.cost import Costs\n") == ["fedfreeze.device.cost"]
    assert imports_from_above("select", "def f():\n    import fedfreeze.comm.ranks\n") == ["fedfreeze.comm.ranks"]
    assert imports_from_above("select", "from fedfreeze.select.base import Selector\n") == []


def test_the_root_holds_only_what_all_rooms_share_and_the_door() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= MOST_AT_THE_ROOT
    rooms = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    assert rooms | modules == set().union(*FLOORS)


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_whoever_changes_a_module_finds_its_tests(module: Path) -> None:
    name = str(module.relative_to(PACKAGE))
    folder = ROOT / "tests" / module.relative_to(PACKAGE).parent
    own = module.stem == "__init__" or any(folder.glob(f"test_{module.stem}*.py"))
    assert own != (name in TESTED_IN), f"{name} needs {folder.name}/test_{module.stem}.py, or a line in TESTED_IN"
    for path in TESTED_IN.get(name, ()):
        assert (ROOT / "tests" / path).exists(), path


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
        "import threading, fedfreeze.run.session, fedfreeze.cli, torch.distributed as dist\n"
        "assert not dist.is_initialized() and threading.active_count() == 1"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_readme_names_every_module_and_every_link_leads_somewhere() -> None:
    readme = (ROOT / "README.md").read_text()
    tree = readme[readme.index("    fedfreeze/  ") : readme.index("    launch/ ")]
    for module in MODULES:
        if not module.stem.startswith("__"):
            room = module.relative_to(PACKAGE).parts[0]
            told = re.search(rf"^      {re.escape(room)}/? .*(\n {{9,}}.*)*", tree, re.MULTILINE)
            assert told is not None, f"{room} is not in the tree"
            if room != module.name and module.stem != "command":  # each command of the command line has its own
                assert re.search(rf"\b{module.stem}\b", told[0]), f"{room}/{module.name} is not in the tree"
    for document in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "slurm").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
            if not target.startswith("https://"):
                assert (document.parent / target).exists(), f"{document.name} links to {target}"


def test_pre_commit_runs_what_the_test_script_runs() -> None:
    lines = (ROOT / "tests" / "run.sh").read_text().splitlines()
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    assert [hook["entry"] for hook in hooks] == [
        line.partition(" >")[0] for line in lines if line.startswith(("ruff", "mypy"))
    ]


def test_the_citation_names_this_version_and_the_paper() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["version"] == fedfreeze.__version__
    assert f"## {fedfreeze.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    assert cited["references"][0]["url"].endswith("2408.09101")


def test_scripts_are_executable_and_parse() -> None:
    for script in ("launch/quickstart.sh", "launch/environment.sh", "tests/run.sh", ".ci/run", "benchmarks/gpu.sh"):
        subprocess.run(["bash", "-n", str(ROOT / script)], check=True)
    for script in ("launch/quickstart.sh", "tests/run.sh", ".ci/run"):
        assert (ROOT / script).stat().st_mode & 0o111
