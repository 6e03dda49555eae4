"""Networks, selectors, policies, methods and splits of the user's own that are wrong: one line each."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.in_process import TINY, Bad, assert_refused, attempt, check_refused, note, own, run_case
from tests.support.launching import ENVIRONMENT, write_config


def split(value: str, *says: str, **options: Any) -> Bad:
    return Bad(("model.split", *says), (f"--model.split={value}",), **options)


SPLITS = {
    "split: names no module": split("[conv1, layer7]", "no module 'layer7'", "blocks can begin at: conv1, layer1"),
    "split: the same twice": split("[layer1, layer1]", "'layer1' is named 2 times"),
    "split: one place twice": split("[layer2, layer2.0]", "begin at the same place; drop one"),
    "split: not a list": split("layer1", "'layer1'", "a list, as in [a, b]"),
    "split: a list of numbers": split("[1, 2]", "model.split: 1", "valid string"),
    "split: empty list": split("[]", "[]", "at least 1 item"),
    "split: inside a block": split("[conv1, layer1.0.conv2]", "no block can begin at 'layer1.0.conv2'"),
    "split: the classifier": split("[conv1, fc]", "no block can begin at 'fc'"),
    "split: the pooling": split("[conv1, pool]", "no block can begin at 'pool'"),
}

NETWORK = "a=nn.Conv2d(in_channels, 4, 3, padding=1), pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten()"


def factory(body: str, *says: str, **options: Any) -> Bad:
    """Return a case of a factory with this body; `model.factory` must be named unless it says otherwise."""
    source = f"\ndef make(num_classes, in_channels, image_size):\n    {body}\n"
    given = own(source, model={"factory": "mine:make", "split": ["a"]})
    return Bad(says, **given, **options)


def module(text: str, *says: str, name: str = "mine:make", **options: Any) -> Bad:
    given = own(text, model={"factory": name, "split": ["a"]})
    return Bad(("model.factory", *says), **given, **options)


FACTORIES = {
    "factory: without split": Bad(
        ("model.split is needed with model.factory", "they can begin at: a, b", "plan CONFIG --cut"),
        **own("", model={"split": None}),
    ),
    "factory: module not found": module("", "module none is not found; looked in", name="none:make"),
    "factory: function not found": module("", "mine has no make; it has:", "tiny"),
    "factory: a path for a module": module(
        "", "'mine.py/x:make' is not of the form package.module:name", name="mine.py/x:make"
    ),
    "factory: not callable": module("make = 3\n", "mine:make is a int, not a function"),
    "factory: raises": factory(
        "raise OSError('no weights\\nhere')", "mine:make raised OSError: no weights here", "mine.py:"
    ),
    "factory: returns a list": factory("return [nn.Linear(1, 1)]", "mine:make returned a list, not a torch.nn.Module"),
    "factory: returns nothing": factory("return None", "mine:make returned a NoneType"),
    "factory: returns a class": factory("return nn.Linear", "mine:make returned a type"),
    "factory: for other shapes": factory(
        "return tiny(num_classes, 3, image_size)", "a fails on images of 1x8x8", "RuntimeError"
    ),
    "factory: wrong number of outputs": factory(
        "return tiny(7, in_channels, image_size)", "maps 2 images of 1x8x8 to 2x7, not to 2x10"
    ),
    "factory: half precision": factory(
        "return tiny(num_classes, in_channels, image_size).half()",
        "parameter a.weight is torch.float16",
        "float32",
    ),
    "factory: no parameter with gradients": factory(
        "return tiny(num_classes, in_channels, image_size).requires_grad_(False)",
        "no parameter of mine:make requires gradients, so there is nothing to train",
    ),
    "factory: a block of which nothing trains": factory(
        "network = tiny(num_classes, in_channels, image_size)\n    network.b.requires_grad_(False)\n"
        "    network.a.requires_grad_(False)\n    return network",
        "before its classifier the network has nothing to train",
    ),
    "factory: two tensors over the same memory": factory(
        "network = tiny(num_classes, in_channels, image_size)\n    network.c = nn.Conv2d(in_channels, 4, 3)\n"
        "    network.c.weight.data = network.a.weight.data\n    return network",
        "a.weight and c.weight share memory",
        "the same nn.Parameter",
    ),
    "factory: random numbers from elsewhere": factory(
        "class Layer(nn.Conv2d):\n        def forward(self, x):\n            import random\n"
        "            return super().forward(x) * random.random()\n"
        "    network = tiny(num_classes, in_channels, image_size)\n"
        "    network.a = Layer(in_channels, 4, 3, padding=1)\n"
        "    return network",
        "two passes of Sequential from the same weights and seed differ",
    ),
    "factory: a buffer that is not saved": factory(
        "class Layer(nn.Conv2d):\n        def forward(self, x):\n            self.seen += 1\n"
        "            return super().forward(x)\n"
        "    network = tiny(num_classes, in_channels, image_size)\n"
        "    network.a = Layer(in_channels, 4, 3, padding=1)\n"
        "    network.a.register_buffer('seen', torch.zeros(1), persistent=False)\n"
        "    return network",
        "its buffer a.seen changes in training and is not saved",
    ),
    "factory: takes no keywords": module(
        "def make():\n    return 1\n",
        "mine:make: got an unexpected keyword argument",
        "it is called with the keywords num_classes",
    ),
    "factory: unknown option": Bad(
        ("model.factory: mine:tiny: got an unexpected keyword argument 'depth'", "model.options"),
        **own("", model={"options": {"depth": 3}}),
    ),
    "factory: syntax error": module("def make(:\n    pass\n", "importing mine failed: SyntaxError", "(mine.py:"),
    "factory: import raises": module("raise ValueError('not today')\n", "importing mine failed: ValueError: not today"),
    "factory: imports what is not there": module("import nonesuch\n", "mine imports nonesuch is not found"),
    "factory: import ends the program": module(
        "import sys\nsys.exit(0)\n",
        "importing mine",
        "SystemExit",
    ),
    "factory: ends the program": factory(
        "raise SystemExit(0)",
        "mine:make",
        "SystemExit",
    ),
    "factory: a bytes file": Bad(
        ("model.factory: importing mine failed",), sections=own("")["sections"], files={"mine.py": b"\0\xff\xfe"}
    ),
    "factory: NaN weights": factory(
        "network = tiny(num_classes, in_channels, image_size)\n    network.a.weight.data.fill_(float('nan'))\n"
        "    return network",
        "model",
        "not a number",
    ),
    "factory: no classifier": factory(
        f"return nn.Sequential(OrderedDict({NETWORK}, last=nn.Conv1d(4, 10, 1)))", "model"
    ),
    "factory: nothing to train": factory("return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))", "nothing to train"),
    "factory: fails in training mode only": factory(
        "class Layer(nn.Conv2d):\n        def forward(self, x):\n            assert not self.training, 'oh no'\n"
        "            return super().forward(x)\n"
        "    network = tiny(num_classes, in_channels, image_size)\n"
        "    network.a = Layer(in_channels, 4, 3, padding=1)\n"
        "    return network",
        "model: a in training mode fails on images of 1x8x8 (channels x height x width): AssertionError: oh no",
    ),
    "factory: compiled by torch.jit": factory(
        "network = tiny(num_classes, in_channels, image_size)\n"
        "    import warnings\n"
        "    with warnings.catch_warnings(action='ignore'):  # that it is going to be taken out of torch\n"
        "        network.b = torch.jit.script(network.b)\n"
        "    return network",
        "model.factory: b is compiled by torch.jit",
    ),
    "factory: further outputs in training": factory(
        "class Two(nn.Sequential):\n        def forward(self, x):\n            out = super().forward(x)\n"
        "            return (out, out) if self.training else out\n"
        "    return Two(*tiny(num_classes, in_channels, image_size))",
        "model: the network returns a tuple in training mode, not one tensor, the logits",
    ),
    "factory: reads values of the image": factory(
        "class Layer(nn.Conv2d):\n        def forward(self, x):\n            return super().forward(x) if x.sum() > 0 "
        "else x\n"
        "    network = tiny(num_classes, in_channels, image_size)\n"
        "    network.a = Layer(in_channels, 4, 3, padding=1)\n"
        "    return network",
        "model",
    ),
}


def hidden(name: str, *says: str, file: str | None = None, section: str = "model", key: str = "factory") -> Bad:
    """Return a case of a module of the user's own, in `file`, that is called like one that is found before it."""
    file = file or f"{name.replace('.', '/')}.py"
    owned = {"model": {"split": ["a"]}} if section == "model" else {}
    sections = {**owned, section: {**owned.get(section, {}), key: f"{name}:make"}}
    return Bad((f"{section}.{key}: {name} is ", file, *says), sections=sections, files={file: TINY})


HIDDEN = {
    "factory: called like a package": hidden("datasets", "datasets/__init__.py, which is found before your own"),
    "factory: called like a module of Python": hidden("random", "random.py, which is found before your own"),
    "factory: called like a part of Python": hidden("time", "a part of Python, which is found before your own"),
    "factory: below a folder called like a package": hidden("yaml.nets", "yaml/__init__.py, which is found before"),
    "factory: a package called like a package": hidden("yaml", "found before", file="yaml/__init__.py"),
    "selector: called like a module of Python": hidden("secrets", "found before", section="select", key="name"),
    "factory: imports what a package hides": Bad(
        ("model.factory: mine imports yaml.own is ", "yaml/__init__.py, which is found before your own", "yaml/own.py"),
        sections=own("")["sections"],
        files={"mine.py": "import yaml.own\n", "yaml/own.py": ""},
    ),
}

SELECTOR = """
from fedfreeze.select import Selector
class Own(Selector):
    def select(self, round_number, candidates, count):
        {select}
    {more}
"""


def selector(select: str = "return list(candidates)[:count]", *says: str, more: str = "", **options: Any) -> Bad:
    given = own(SELECTOR.format(select=select, more=more), select={"name": "mine:Own"})
    return Bad(("select.name", "mine:Own", *says), **given, **options)


def owned(section: str, key: str, source: str, *says: str, **options: Any) -> Bad:
    return Bad((f"{section}.{key}", *says), **own(source, **{section: {key: "mine:Own"}}), **options)


POLICY = """
from fedfreeze.server.pace import PacePolicy, PaceDecision
class Own(PacePolicy):
    def decision_after(self, seen):
        {decision}
    {more}
"""

METHOD = """
from fedfreeze.methods import SmartFreeze
class Own(SmartFreeze):
    {more}
"""

PLUGINS = {
    "selector: no such class": Bad(("select.name: mine has no Own",), **own("", select={"name": "mine:Own"})),
    "selector: not of the form": Bad(
        ("select.name: 'mine.Own' is not allowed", "package.module:Class"), ("--select.name=mine.Own",)
    ),
    "selector: is no Selector": owned(
        "select", "name", "class Own: pass\n", "mine:Own is no subclass of fedfreeze.select.base.Selector"
    ),
    "selector: is a function": owned("select", "name", "def Own(config): pass\n", "mine:Own is no subclass"),
    "selector: lacks select": owned(
        "select",
        "name",
        "from fedfreeze.select import Selector\nclass Own(Selector): pass\n",
        "mine:Own lacks select, which Selector asks for",
    ),
    "selector: raises in __init__": selector(
        "pass", "raised KeyError: 'speed'", more="def __init__(self, config):\n        config.select.options['speed']"
    ),
    "pace policy: abstract": owned(
        "pace",
        "policy",
        "from fedfreeze.server.pace import PacePolicy\nclass Own(PacePolicy): pass\n",
        "lacks decision_after",
    ),
    "pace policy: raises in __init__": owned(
        "pace",
        "policy",
        POLICY.format(decision="pass", more="def __init__(self, *args):\n        1 / 0"),
        "mine:Own raised ZeroDivisionError",
    ),
    "method: abstract": owned(
        "method",
        "name",
        "from fedfreeze.methods import Method\nclass Own(Method): pass\n",
        "mine:Own lacks begin_stage, deployed, enter_stage, state_modules",
    ),
    "method: raises in __init__": owned(
        "method",
        "name",
        METHOD.format(more="def __init__(self, *args):\n        1 / 0"),
        "mine:Own raised ZeroDivisionError",
    ),
    "method: raises in enter_stage": owned(
        "method",
        "name",
        METHOD.format(more="def enter_stage(self, *args):\n        1 / 0"),
        "mine:Own raised ZeroDivisionError",
    ),
    "method: raises in enter_stage, network shipped": Bad(
        ("method.name", "mine:Own raised ZeroDivisionError"),
        ("--method.name=mine:Own",),
        files={"mine.py": METHOD.format(more="def enter_stage(self, *args):\n        1 / 0")},
    ),
    "method: import ends the program": Bad(
        ("method.name", "importing mine", "SystemExit"),
        ("--method.name=mine:Own",),
        files={"mine.py": "raise SystemExit(3)\n"},
    ),
}

# In these a run has begun when the mistake shows, so that its folder stays and says what was wrong.
LATE = {
    "selector: raises in round 2": selector(
        "assert round_number < 2, 'no more'\n        return list(candidates)[:1]", "raised AssertionError: no more"
    ),
    "selector: no candidates": selector("return [99]", "returned [99] in round 1", "1 to 3 different devices"),
    "selector: a negative device": selector("return [-1]", "returned [-1] in round 1"),
    "selector: duplicates": selector("return [candidates[0]] * 2", "returned [0, 0] in round 1"),
    "selector: too many": selector("return list(candidates)", "returned [0, 1, 2, 3] in round 1"),
    "selector: nothing": selector("return []", "returned [] in round 1"),
    "selector: None": selector("return None", "returned None in round 1", "different devices of the"),
    "selector: text": selector("return 'all'", "raised ValueError"),
    "selector: raises in observe": selector(
        "return list(candidates)[:1]",
        "raised ZeroDivisionError",
        more="def observe(self, reports):\n        1 / 0",
    ),
    "selector: a state that is no JSON": selector(
        "return list(candidates)[:1]",
        more="def state_dict(self):\n        return {'seen': {1, 2}}",
    ),
    "selector: raises in state_dict": selector(
        "return list(candidates)[:1]",
        "raised ZeroDivisionError",
        more="def state_dict(self):\n        return 1 / 0",
    ),
    "selector: ends the program": selector(
        "raise SystemExit(0)",
        "SystemExit",
    ),
    "pace policy: raises": owned(
        "pace", "policy", POLICY.format(decision="1 / 0", more=""), "mine:Own raised ZeroDivisionError", "mine.py:"
    ),
    "pace policy: returns nothing": owned(
        "pace", "policy", POLICY.format(decision="return None", more=""), "mine:Own raised AttributeError"
    ),
    "pace policy: a state that is no JSON": owned(
        "pace",
        "policy",
        POLICY.format(decision="return PaceDecision(False)", more="def state_dict(self):\n        return {'x': {1}}"),
        "mine:Own",
    ),
    "method: raises in begin_stage": owned(
        "method",
        "name",
        METHOD.format(more="def begin_stage(self, index):\n        1 / 0"),
        "mine:Own raised ZeroDivisionError",
    ),
    "method: raises in merge": owned(
        "method",
        "name",
        METHOD.format(more="def merge(self, *args):\n        1 / 0"),
        "mine:Own raised ZeroDivisionError",
    ),
}

BEFORE = SPLITS | FACTORIES | PLUGINS | HIDDEN


@pytest.mark.parametrize("name", BEFORE)
def test_refused_with_one_line_and_nothing_left(name: str, tmp_path: Path) -> None:
    check_refused(name, BEFORE[name], tmp_path)


@pytest.mark.parametrize("name", LATE)
def test_what_shows_in_a_round_is_one_line_and_the_folder_says_so(name: str, tmp_path: Path) -> None:
    case = LATE[name]
    outcome = run_case(case, tmp_path)
    note(name, case.shown, outcome.code, outcome.err)
    left = [path for path in outcome.changed if Path(path).name.startswith(".") or path.endswith(("lock", ".tmp"))]
    assert left == []
    summary = json.loads((tmp_path / "deep" / "run" / "summary.json").read_text())
    assert (summary["status"], summary["exit_code"]) == ("failed", case.code)
    assert_refused(outcome.__class__(outcome.code, outcome.out, outcome.err, []), case.code, *case.says)


def test_what_torch_logs_of_fake_tensors_is_not_told(tmp_path: Path) -> None:
    """By a launch, for torch keeps the stderr that it finds when it is imported."""
    body = "network = tiny(num_classes, in_channels, image_size)\n    network.fc = nn.Linear(7, num_classes)"
    (tmp_path / "mine.py").write_text(
        TINY + f"\ndef make(num_classes, in_channels, image_size):\n    {body}\n    return network\n"
    )
    write_config(tmp_path, **own("", model={"factory": "mine:make", "split": ["a"]})["sections"])
    command = [sys.executable, "-m", "fedfreeze", "run", "small.yaml", "--run-dir", "run"]
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
    note("factory: a classifier for other features", "--model.factory=mine:make", done.returncode, done.stderr)
    assert done.returncode == 64
    assert "fedfreeze: error: model: fc fails on images of 1x8x8" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_factory_may_convert_its_network(tmp_path: Path) -> None:
    """No bad input, so no error. By a launch: in a process that has made other networks it works now and then."""
    body = "return tiny(num_classes, in_channels, image_size).float()"
    for name in ("datasets", "random", "torch", "sklearn", "safetensors", "rich"):  # nor do the files beside it matter
        (tmp_path / f"{name}.py").write_text(f"raise RuntimeError('the user's {name}')\n")
    (tmp_path / "mine.py").write_text(TINY + f"\ndef make(num_classes, in_channels, image_size):\n    {body}\n")
    write_config(tmp_path, **own("", model={"factory": "mine:make", "split": ["a"]})["sections"])
    command = [sys.executable, "-m", "fedfreeze", "run", "small.yaml", "--run-dir", "run"]
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
    note("(no bad input) factory: .float()", "--model.factory=mine:make", done.returncode, done.stderr)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_copy_of_an_installed_module_is_not_hidden_by_it(tmp_path: Path) -> None:
    import yaml

    shutil.copytree(Path(yaml.__file__).parent, tmp_path / "yaml", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    sections = own("")["sections"] | {"model": {"factory": "yaml:SafeLoader", "split": ["a"]}}
    outcome = run_case(Bad((), sections=sections), tmp_path)
    assert "found before" not in outcome.err
    (tmp_path / "yaml" / "nodes.py").write_text("")
    assert "yaml/__init__.py, which is found before your own" in run_case(Bad((), sections=sections), tmp_path).err


def test_options_that_are_no_number_do_not_lock_the_run_out(tmp_path: Path) -> None:
    """Refused at once, or taken as the same when the run goes on."""
    source = "\ndef make(level, **keywords):\n    return tiny(**keywords)\n"
    case = Bad((), ("--model.options={level: .nan}",), **own(source, model={"factory": "mine:make", "split": ["a"]}))
    first = run_case(case, tmp_path)
    again = attempt(tmp_path, "run", "small.yaml", "--run-dir", "deep/run", *case.options)
    note("NaN in options", "--model.options={level: .nan}", first.code, again.err)
    assert first.code == 64 or again.code == 0
