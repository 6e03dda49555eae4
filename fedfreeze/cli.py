"""The command line: `fedfreeze run`, `plan`, `doctor`, `fetch`, `compare` and `sync`."""

import argparse
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import fedfreeze
from fedfreeze.config import Config
from fedfreeze.config_file import load_config, shipped_experiments
from fedfreeze.errors import (
    ConfigError,
    ExitCode,
    FedfreezeError,
    PreemptedError,
    exit_code_help,
    one_line,
    out_of_memory,
)
from fedfreeze.launcher import Launch, check_job, detect_launch
from fedfreeze.local_ranks import interrupt_once, run_local_ranks
from fedfreeze.preempt import Preemption
from fedfreeze.reference import section_keys, top_level_keys


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code. A user's mistake is one line on stderr."""
    # a Ctrl-C during imports just ends the process: caught there, it can leave modules half imported
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    try:
        code = int(options.command(options, rest))
        sys.stdout.flush()  # here, where its failure can still be told
        return code
    except FedfreezeError as error:
        if _speaks_for_all():
            kind = "notice" if isinstance(error, PreemptedError) else "error"
            print(f"fedfreeze: {kind}: {one_line(error)}", file=sys.stderr, flush=True)
        else:
            time.sleep(1.0)  # torchrun ends all ranks when the first leaves: let rank 0 speak
        return int(error.exit_code)
    except KeyboardInterrupt:
        return int(ExitCode.INTERRUPTED)
    except BrokenPipeError:  # `fedfreeze plan --json | head`
        _drop_output()
        return int(ExitCode.DONE)
    except OSError as error:
        _drop_output()
        print(f"fedfreeze: error: cannot write the output: {error.strerror}", file=sys.stderr, flush=True)
        return int(ExitCode.STORAGE)
    except Exception as error:
        too_large = out_of_memory(error)
        if too_large is not None:
            print(f"fedfreeze: error: {too_large}", file=sys.stderr, flush=True)
            return int(too_large.exit_code)
        print(f"fedfreeze: internal error, please report it:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        return int(ExitCode.INTERNAL)


def _with_config(command: Callable[[Config, argparse.Namespace], int]) -> Callable[..., int]:
    """Have a command take the configuration that CONFIG and the overrides give."""
    return lambda options, rest: command(load_config(options.config, _overrides(rest)), options)


def _run(config: Config, options: argparse.Namespace) -> int:
    launch, nproc = _launch(config, options.nproc)
    run_dir = Path(options.run_dir or Path("runs") / config.name)
    preemption = Preemption(config.checkpoint, os.environ)
    preemption.install()
    # or torch's own lines, stack traces among them, come before ours where ranks do not find each other
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        from fedfreeze.session import note_exit_code, run_rank  # here: a mistake is told without importing torch

        signal.signal(signal.SIGINT, interrupt_once())
        if nproc > 1:
            code = run_local_ranks(nproc, lambda local: run_rank(config, run_dir, local, preemption))
            note_exit_code(run_dir, code)
            return code
        return run_rank(config, run_dir, launch, preemption)
    finally:
        preemption.uninstall()


def _launch(config: Config, nproc: int | None) -> tuple[Launch, int]:
    """Return who this process is and how many ranks it shall start itself. Raises ConfigError where both start some."""
    launch = detect_launch(os.environ, os.getppid())
    if (nproc or 1) > 1 and launch.launcher == "srun" and launch.world_size == 1:
        launch = Launch("none")  # as in an interactive step
    if (nproc or 1) > 1 and launch.launcher != "none":
        raise ConfigError(f"--nproc {nproc} under {launch.launcher}, which starts the ranks itself; drop it")
    if (nproc or 1) > 1 and config.comm.transport == "mpi":
        raise ConfigError("--nproc starts ranks that MPI knows nothing of; use mpirun, or comm.transport=torch")
    if launch.launcher == "none" and nproc is None:
        check_job(os.environ)
    return launch, nproc or 1


def _doctor(options: argparse.Namespace, rest: Sequence[str]) -> int:
    config = load_config(options.config, _overrides(rest))
    launch, nproc = _launch(config, options.nproc)
    from fedfreeze.doctor import Request, run_doctor

    run_dir = Path(options.run_dir or Path("runs") / config.name)
    request = Request(config, run_dir, options.config is not None, options.ranks, options.json)
    signal.signal(signal.SIGINT, interrupt_once())
    if nproc > 1:
        return run_local_ranks(nproc, lambda local: run_doctor(request, local))
    return run_doctor(request, launch)


def _plan(config: Config, options: argparse.Namespace) -> int:
    if options.calibrate and options.cut:
        raise ConfigError("--calibrate and --cut are two questions; ask one at a time")
    from fedfreeze.plan import plan, plan_calibrated, plan_cut

    signal.signal(signal.SIGINT, signal.default_int_handler)
    if options.calibrate:
        plan_calibrated(config, as_json=options.json)
    elif options.cut:
        plan_cut(config, share=options.share, write=options.write, as_json=options.json)
    else:
        plan(config, as_json=options.json, partition_picture=options.partition_picture)
    return ExitCode.DONE


def _fetch(config: Config, options: argparse.Namespace) -> int:
    from fedfreeze.data.store import open_store, prepare

    signal.signal(signal.SIGINT, signal.default_int_handler)
    folder = prepare(config.data)
    data = open_store(folder)
    size = "x".join(str(length) for length in data.image_shape)
    name = config.data.path or config.data.name
    counts = f"{len(data.train)} training and {len(data.test)} test images of {size}, {data.num_classes} classes"
    print(f"{name}: {counts}, in {folder}")
    return ExitCode.DONE


def _compare(options: argparse.Namespace, rest: Sequence[str]) -> int:
    unknown = next((item for item in rest if item.startswith("-")), None)
    if unknown is not None:
        raise ConfigError(f"compare has no option {unknown}; it takes run folders, --target, --out, --markdown, --json")
    from fedfreeze.compare import compare

    signal.signal(signal.SIGINT, signal.default_int_handler)
    runs = [*options.runs, *rest]  # argparse leaves the folders that stand after an option
    compare(runs, target_accuracy=options.target, out=options.out, style=options.style)
    return ExitCode.DONE


def _sync(options: argparse.Namespace, rest: Sequence[str]) -> int:
    unknown = next((item for item in rest if item.startswith("-")), None)
    if unknown is not None:
        raise ConfigError(
            f"sync has no option {unknown}; it takes run folders, --offline, --project, --entity, --force, --json"
        )
    from fedfreeze.sync import sync

    signal.signal(signal.SIGINT, signal.default_int_handler)
    return sync(
        [*options.runs, *rest],  # argparse leaves the folders that stand after an option
        offline=options.offline,
        project=options.project,
        entity=options.entity,
        force=options.force,
        as_json=options.json,
    )


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="fedfreeze",
        description="Federated learning under enforced memory caps: a model trained and frozen block by block.",
        epilog=exit_code_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"fedfreeze {fedfreeze.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)
    run = _add_command(commands, "run", _run, "train, or go on where the run folder's checkpoint is")
    run.add_argument("--run-dir", metavar="DIR", help="run folder (default: runs/NAME)")
    run.add_argument("--nproc", type=_positive, metavar="N", help="start N ranks on this machine (default 1)")
    plan = _add_command(commands, "plan", _plan, "what each stage needs and which devices can join; nothing is trained")
    plan.add_argument("--json", action="store_true", help="print JSON instead of a table")
    plan.add_argument(
        "--partition-picture", type=Path, metavar="FILE", help="draw the labels of each device (.png, .svg or .pdf)"
    )
    plan.add_argument(
        "--cut",
        action="store_true",
        help="propose the fewest blocks with which --share of the devices join all stages",
    )
    plan.add_argument(
        "--share", type=_share, default=0.9, metavar="S", help="share of the devices, 0 to 1 (default 0.9), for --cut"
    )
    plan.add_argument(
        "--calibrate",
        action="store_true",
        help="time a few real training steps of each stage here: which fleet.speed_gflops this machine has",
    )
    plan.add_argument("--write", type=Path, metavar="FILE", help="write the configuration with the proposed cut")
    _add_command(
        commands,
        "fetch",
        _fetch,
        "download and decode the data into data.cache_dir, for nodes without a network",
        sections=("data",),
    )
    _add_doctor(commands)
    _add_compare(commands)
    _add_sync(commands)
    return parser


def _add_command(
    commands: Any, name: str, function: Any, summary: str, sections: Sequence[str] = (), config: str | None = None
) -> argparse.ArgumentParser:
    """Add a command that takes a configuration, or with `config` "?" none; its help has the keys of `sections`."""
    command: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=f"{_config_help(sections)}\n\n{exit_code_help()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    shipped = ", ".join(shipped_experiments())
    command.add_argument(
        "config", metavar="CONFIG", nargs=config, help=f"a YAML file, or a shipped experiment: {shipped}"
    )
    command.set_defaults(command=_with_config(function))
    return command


def _add_doctor(commands: Any) -> None:
    """Add the command that takes a configuration or none."""
    summary = "try out this machine or allocation in under a minute; start it as you start `run`"
    doctor = _add_command(commands, "doctor", None, summary, ("train", "comm", "track"), config="?")
    doctor.add_argument("--run-dir", metavar="DIR", help="run folder to try (default: runs/NAME)")
    doctor.add_argument("--ranks", type=_positive, metavar="N", help="the ranks there should be; another number fails")
    doctor.add_argument("--nproc", type=_positive, metavar="N", help="start N ranks on this machine (default 1)")
    doctor.add_argument("--json", action="store_true", help="print JSON instead of a table")
    doctor.set_defaults(command=_doctor)


def _add_compare(commands: Any) -> None:
    """Add the command that takes run folders and no configuration."""
    summary = "runs beside each other: tables, pictures, a page"
    compare = commands.add_parser(
        "compare",
        help=summary,
        description=f"{summary.capitalize()}. Runs that differ in nothing but the seed are one row, mean and spread.",
        epilog=exit_code_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    compare.add_argument("runs", nargs="+", metavar="RUN", help="a run folder, such as runs/digits")
    compare.add_argument(
        "--target",
        type=_accuracy,
        metavar="ACCURACY",
        help="accuracy, 0 to 1, to which rounds and time are taken (default: 95%% of the lowest best accuracy)",
    )
    compare.add_argument(
        "--out", type=Path, metavar="DIR", help="write report.html, pictures, table.md and compare.json there"
    )
    style = compare.add_mutually_exclusive_group()
    style.add_argument("--markdown", dest="style", action="store_const", const="markdown", help="print a GitHub table")
    style.add_argument("--json", dest="style", action="store_const", const="json", help="print JSON, in plain units")
    compare.set_defaults(command=_compare, style="terminal")


def _add_sync(commands: Any) -> None:
    """Add the command that brings run folders to Weights & Biases."""
    summary = "one continuous Weights & Biases run for each run folder, however often it was requeued"
    sync = commands.add_parser(
        "sync",
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}. Does nothing where nothing is new.",
        epilog=exit_code_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    sync.add_argument("runs", nargs="+", metavar="RUN", help="a run folder, such as runs/digits")
    sync.add_argument(
        "--offline", action="store_true", help="write one offline run to RUN/wandb/sync, without key and network"
    )
    sync.add_argument("--project", metavar="P", help="project (default: track.project of the run)")
    sync.add_argument("--entity", metavar="E", help="user or team (default: track.entity of the run)")
    sync.add_argument("--force", action="store_true", help="also where there is nothing new")
    sync.add_argument("--json", action="store_true", help="print what became of each run as JSON")
    sync.set_defaults(command=_sync)


class _Parser(argparse.ArgumentParser):
    """argparse with our exit code and one-line errors."""

    def error(self, message: str) -> Any:
        if _speaks_for_all():
            print(f"fedfreeze: error: {message}; see {self.prog} --help", file=sys.stderr, flush=True)
        sys.exit(ExitCode.BAD_CONFIG)


def _positive(text: str) -> int:
    if not re.fullmatch("[0-9]{1,6}", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share, a number over 0 and up to 1")
    return share


def _accuracy(text: str) -> float:
    try:
        accuracy = float(text)
    except ValueError:
        accuracy = -1.0
    if not 0 < accuracy < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not an accuracy, a number between 0 and 1")
    return accuracy


def _overrides(rest: Sequence[str]) -> list[str]:
    """Take `--a.b=c` and `--a.b c` from what argparse does not know. Raises ConfigError for anything else."""
    found: list[str] = []
    items = iter(rest)
    for item in items:
        if not item.startswith("--") or item == "--":
            raise ConfigError(f"unexpected argument {item!r}; overrides are written --section.field=value")
        if "=" not in item:
            value = next(items, None)
            if value is None:
                raise ConfigError(f"{item} needs a value, as in {item}=VALUE")
            item = f"{item}={value}"
        found.append(item)
    return found


def _drop_output() -> None:
    """Have what is still buffered go nowhere, or the interpreter would complain of it at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _speaks_for_all() -> bool:
    """Under a launcher every rank meets the same mistake; rank 0 tells it, once."""
    try:
        return detect_launch(os.environ, os.getppid()).rank == 0
    except ConfigError:
        names = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID")
        return next((os.environ[name] for name in names if name in os.environ), "0") == "0"


def _config_help(sections: Sequence[str] = ()) -> str:
    """Return every key (of some sections) with its default and description, from the dataclasses themselves."""
    lines = ["configuration keys (--section.field=value; defaults shown, a shipped experiment sets its own):"]
    keys = [*top_level_keys(), *(key for _, _, keys in section_keys() for key in keys)]
    if sections:
        keys = [key for key in keys if key.name.partition(".")[0] in sections]
    for key in keys:
        choices = f" [{' | '.join(key.choices)}]" if key.choices else ""
        lines.append(f"  --{key.name}={key.default}{choices}\n      {key.meaning.replace('%', '%%')}")
    return "\n".join(lines)
