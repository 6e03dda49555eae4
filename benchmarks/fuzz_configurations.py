"""Throws random configuration files and overrides at the command line and looks for what no user should ever see.

    python benchmarks/fuzz_configurations.py [--minutes 60] [--seed 0] [--out FOLDER]

Each case is a YAML file made from the schema (mostly allowed values, some at the edge, some junk; now and then with
damaged text) and a few overrides, given to `plan` or to `run` of two rounds, in a process of its own. Wrong are: an
exit code that is not a user's mistake, a traceback, more or less than one line on stderr, a run folder
left behind by a run that never began, and a case that takes longer than --limit seconds. What is wrong is kept in --out
as a folder with the file, the command and what was printed.
"""

import argparse
import json
import os
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import yaml

from fedfreeze.cli import main
from fedfreeze.config.schema import Config, OwnObject

ALLOWED_CODES = (0, 64, 65, 69, 74)
WORDS = ["", "x", "digits", "synthetic", "fixed", "resnet8", "off", "a b", "é", "1e3", "../x", "math:sqrt", "os:getcwd"]
JUNK = [
    None,
    True,
    -1,
    0,
    1,
    3.5,
    -0.0,
    1e-300,
    1e300,
    10**30,
    float("nan"),
    float("inf"),
    [],
    [1],
    ["x"],
    {},
    {"a": 1},
]
JUNK += ["", "x" * 300, "uniform(1, 2", "uniform(2, 1)", "normal(0, 0)", "x.csv", [0.1, -1.0], [[1]], "\x00", "\n"]
CAPS = [0.5, 3.0, 1e6, "uniform(0.1, 4)", "loguniform(0.5, 50)", "normal(2, 1)", [0.2, 1.0, 5.0], "uniform(1,1)"]


def random_value(draw: random.Random, key: str, annotation: Any, junk: float) -> Any:
    """Return a value for a key: of its type, or with the chance `junk` anything."""
    if draw.random() < junk:
        return draw.choice(JUNK)
    if key == "memory_cap_mib":
        return draw.choice(CAPS)
    if key == "synthetic_shape":
        return [draw.choice([1, 2, 3, 4]), draw.choice([1, 2, 7, 8, 16]), draw.choice([1, 3, 8, 17])]
    if key == "options":
        return {} if draw.random() < 0.97 else {"a": 1}
    if key == "split" and draw.random() < 0.7:
        return None
    if key == "split":
        return draw.sample(
            ["conv1", "layer1", "layer2", "layer1.0", "group2", "layer3", "embed", "fc", "x"], k=draw.randint(1, 3)
        )
    if key == "threads_per_rank":
        return draw.choice([1, 1, 2])  # more than there are cores is slow, not wrong
    if key == "synthetic_samples":
        return draw.choice([10, 11, 40, 200])
    origin, members = get_origin(annotation), get_args(annotation)
    if OwnObject in members and draw.random() < 0.97:  # a class of one's own: seldom, for there is none
        return random_value(draw, key, members[0], junk) if type(None) not in members else None
    if origin is Literal:
        return draw.choice(members)
    if origin in (UnionType, Union):
        return random_value(draw, key, draw.choice(members), junk)
    if origin is dict:
        return draw.choice([{}, {}, {"a": 1}])
    if origin is list:
        return [random_value(draw, key, members[0], junk) for _ in range(draw.randint(0, 3))]
    if hasattr(annotation, "__metadata__"):
        return random_value(draw, key, annotation.__origin__, junk)
    if annotation is bool:
        return draw.random() < 0.5
    if annotation is int:
        return draw.choice([1, 1, 2, 2, 3, 4, 5, 8, 10, 16, 31, 64])
    if annotation is float:
        return draw.choice([1e-8, 0.01, 0.05, 0.3, 0.5, 0.9, 1.0, 2.0, 7, 1e4])
    if annotation is type(None):
        return None
    return draw.choice(WORDS) if junk else "word"


def random_configuration(draw: random.Random) -> dict[str, Any]:
    """Return nested values, some keys of some sections."""
    values: dict[str, Any] = {}
    junk = draw.choice([0, 0, 0, 0.02, 0.1])
    for section in fields(Config):
        if not is_dataclass(section.type):
            if draw.random() < 0.2:
                values[section.name] = random_value(draw, section.name, section.type, junk)
            continue
        if draw.random() < junk / 2:
            values[section.name] = draw.choice(JUNK)
            continue
        keys = section.type.__pydantic_fields__  # type: ignore[union-attr]
        chosen = [name for name in keys if draw.random() < 0.3]
        values[section.name] = {name: random_value(draw, name, keys[name].annotation, junk) for name in chosen}
        if draw.random() < junk / 2:
            values[section.name][draw.choice(["roundz", "", "name "])] = 1
    data = values.get("data")
    if isinstance(data, dict) and draw.random() < 0.9:
        for key in ("path", "subset", "revision", "image_column", "label_column"):
            data.pop(key, None)
        data["name"] = draw.choice(["digits", "synthetic"])
        data.setdefault("synthetic_samples", 100)
        if data["name"] == "synthetic":
            data.pop("image_size", None)
    return values


def damaged(draw: random.Random, text: str) -> str:
    """Return the text with a few characters dropped, doubled or replaced."""
    for _ in range(draw.randint(1, 4)):
        if not text:
            break
        place = draw.randrange(len(text))
        text = (
            text[:place]
            + draw.choice(["", "", text[place] * 2, ":", "{", "'", "\t", "- ", "#", "\n"])
            + text[place + 1 :]
        )
    return text


def random_case(draw: random.Random) -> tuple[str, list[str]]:
    """Return the text of a file and the arguments after CONFIG."""
    text = yaml.safe_dump(random_configuration(draw), sort_keys=False, allow_unicode=True)
    if draw.random() < 0.15:
        text = damaged(draw, text)
    overrides = []
    for _ in range(draw.choice([0, 0, 1, 2])):
        section = draw.choice([f for f in fields(Config) if is_dataclass(f.type)])
        keys = section.type.__pydantic_fields__  # type: ignore[union-attr]
        name = draw.choice(list(keys))
        overrides.append(f"--{section.name}.{name}={json.dumps(random_value(draw, name, keys[name].annotation, 0.1))}")
    if draw.random() < 0.5:
        overrides += ["--train.rounds=2", "--fleet.devices=10", "--train.participants=3", "--eval.every_rounds=2"]
    return text, overrides


def run_case(
    text: str, arguments: list[str], command: str, folder: Path, limit_s: float
) -> tuple[int, str, str, float]:
    """Run one case in a process of its own; return exit code (-9: over the limit), stdout, stderr and seconds."""
    (folder / "case.yaml").write_text(text, encoding="utf-8", errors="surrogateescape")
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        code = 99
        try:
            os.chdir(folder)
            for name, number in (("out", 1), ("err", 2)):
                os.dup2(os.open(folder / name, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
            sys.stdout = os.fdopen(1, "w", closefd=False)
            sys.stderr = os.fdopen(2, "w", closefd=False)
            resource.setrlimit(resource.RLIMIT_AS, (12 * 2**30, 12 * 2**30))
            code = main([command, "case.yaml", *arguments])
        except SystemExit as error:
            code = int(error.code or 0)
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    while time.monotonic() - started < limit_s:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.005)
    else:
        os.kill(child, 9)
        os.waitpid(child, 0)
        status = 9
    read = [(folder / name).read_text(errors="replace") if (folder / name).exists() else "" for name in ("out", "err")]
    return os.waitstatus_to_exitcode(status), read[0], read[1], time.monotonic() - started


def what_is_wrong(code: int, err: str, folder: Path) -> str | None:
    """Return what a user should not see, or None."""
    if code == -9:
        return "over the time limit"
    if code not in ALLOWED_CODES:
        return f"exit code {code}"
    if "Traceback" in err:
        return "a traceback"
    lines = err.splitlines()
    if code != 0 and (len(lines) != 1 or not lines[0].startswith("fedfreeze: error: ")):
        return f"{len(lines)} lines on stderr"
    if code == 0 and err:
        return "words on stderr"
    runs = list((folder / "runs").glob("*")) if (folder / "runs").exists() else []
    if code != 0 and (folder / "runs").exists() and not any((run / "metrics.jsonl").exists() for run in runs):
        return "a run folder left behind"
    return None


def fuzz() -> int:
    """Run cases until the time is over; return 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=120, help="seconds a case may take")
    parser.add_argument("--out", type=Path, default=Path("fuzz-findings"))
    options = parser.parse_args()
    deadline = time.monotonic() + 60 * options.minutes
    codes: Counter[str] = Counter()
    found: Counter[str] = Counter()
    number = 0
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="fuzz-cache-")
    while time.monotonic() < deadline:
        draw = random.Random(f"{options.seed}/{number}")
        text, arguments = random_case(draw)
        command = "run" if "--train.rounds=2" in arguments and draw.random() < 0.6 else "plan"
        folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
        code, _, err, seconds = run_case(text, arguments, command, folder, options.limit)
        codes[f"{command} {code}"] += 1
        wrong = what_is_wrong(code, err, folder)
        if wrong is not None:
            last = (err.strip().splitlines() or [""])[-1][:160]
            found[f"{wrong}: {last}"] += 1
            kept = options.out / f"{options.seed}-{number}"
            shutil.copytree(folder, kept, dirs_exist_ok=True, ignore=shutil.ignore_patterns("runs"))
            (kept / "command").write_text(
                f"fedfreeze {command} case.yaml " + " ".join(arguments) + f"\n{wrong}\n{seconds:.1f} s\n"
            )
            print(f"case {number} ({seconds:.1f} s): {wrong}: {last}", flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        number += 1
    shutil.rmtree(os.environ["XDG_CACHE_HOME"], ignore_errors=True)
    print(f"{number} cases in {options.minutes:g} minutes; exit codes: {dict(sorted(codes.items()))}")
    for what, times in found.most_common():
        print(f"{times:5} x {what}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(fuzz())
