"""Reads a configuration: shipped name or YAML file, then dotted overrides; every mistake is one line."""

import difflib
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields, is_dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

import fedfreeze
from fedfreeze.config.schema import BEFORE, CACHE_MAY_DIFFER, RESUME_MAY_DIFFER, WHERE_DATA_LIES, Config
from fedfreeze.config.ways import ways_of
from fedfreeze.errors import ConfigError, one_line

_SECTIONS = {field.name: field.type for field in fields(Config) if is_dataclass(field.type)}
_MOST_VALUES = 2_000_000  # in one key; a list of caps may have a value for each of a million devices
_TOP_LEVEL = [field.name for field in fields(Config)]
_WRITTEN_BY = "# written by fedfreeze"


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-3 is a number (YAML 1.1 wants 1.0e-3) and a key given twice is a mistake."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be plain text", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes what the loader above would take for a number, such as a run called 1e3."""


for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
        list("-+.0123456789"),
    )

# What PyYAML and json raise, beside their own errors, for values that refer to themselves or are nested too deep.
_UNREADABLE = (yaml.YAMLError, ValueError, TypeError, RecursionError, OverflowError)


def shipped_experiments() -> dict[str, Path]:
    """Return the experiments that come with the package, by bare name."""
    folder = Path(str(resources.files("fedfreeze") / "experiments"))
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def load_config(source: str | None, overrides: Sequence[str] = ()) -> Config:
    """Read `source` (a path or the bare name of a shipped experiment) and apply overrides (`section.field=value`).

    Without a source the overrides apply to the defaults.

    Raises ConfigError, on one line, for anything that is not exactly a configuration.
    """
    values: dict[str, Any] = {}
    path = None
    if source is not None:
        path = _find(source)
        values = read_yaml(path)
        values.setdefault("name", Path(source).stem)
    for override in overrides:
        _apply_override(values, override)
    with told_of_writer(path):
        return make_config(values)


def make_config(values: dict[str, Any]) -> Config:
    """Check plain values against the schema and the rules between keys. Raises ConfigError."""
    _check_replaced(values)
    _check_known_keys(values)
    track = values.get("track")
    if track and track.get("wandb") is False:  # YAML's own reading of `off`
        values = values | {"track": track | {"wandb": "off"}}
    try:
        # as JSON: there, strict still takes a mapping for a section and a whole number for a float
        text = json.dumps(values, default=str)
    except _UNREADABLE as error:
        raise ConfigError(f"the configuration holds a value that is none: {one_line(error)[:120]}") from None
    try:
        config = TypeAdapter(Config).validate_json(text)
    except ValidationError as error:
        raise ConfigError(_explain(error)) from None
    _check_rules(config)
    return config


def config_values(config: Config) -> dict[str, Any]:
    """Return the configuration as plain nested values, as `config.yaml` holds them."""
    return asdict(config)


def dump_config(config: Config) -> str:
    """Return the configuration as YAML that `load_config` reads back to the same values."""
    return yaml.dump(config_values(config), Dumper=_Dumper, sort_keys=False)


def written_config(config: Config) -> str:
    """Return the text of a config.yaml: the configuration, and which version wrote it, as a comment."""
    return f"{_WRITTEN_BY} {fedfreeze.__version__}\n{dump_config(config)}"


def writer_of(path: Path) -> str | None:
    """Return the version of fedfreeze that wrote a config.yaml; None if it does not say, as an older one."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            first = file.readline(200)
    except OSError:
        return None
    found = re.fullmatch(rf"{_WRITTEN_BY} ([0-9A-Za-z.+!-]+)\s*", first)
    return found[1] if found else None


@contextmanager
def told_of_writer(path: Path | None) -> Iterator[None]:
    """Have an error over an unknown key say which other version wrote the file, if one did. Raises ConfigError."""
    try:
        yield
    except ConfigError as error:
        writer = writer_of(path) if path is not None and str(error).startswith("unknown ") else None
        if writer is None or writer == fedfreeze.__version__:
            raise
        raise ConfigError(
            f"{error}; {path} was written by fedfreeze {writer}, this is {fedfreeze.__version__}"
        ) from None


def values_before() -> dict[str, Any]:
    """Return what a version does that lacks all keys: the defaults, but for the keys in BEFORE."""
    found = config_values(Config())
    for key, value in BEFORE.items():
        section, _, name = key.partition(".")
        found[section] = found[section] | {name: value}
    return found


def filled_up(values: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Return the values of another version's config.yaml, and for each key that it lacks what that version did.

    That is the default, but for the keys in BEFORE. Beside them, by their dotted names: the keys that it lacked, with
    what was taken, and those that are not known here.
    """
    filled: dict[str, Any] = {}
    missing: dict[str, Any] = {}
    unknown = {name: value for name, value in values.items() if name not in _TOP_LEVEL}
    for name, default in values_before().items():
        given = values.get(name)
        if isinstance(default, dict) and (given is None or isinstance(given, dict)):
            given = given or {}
            filled[name] = default | given
            missing |= {f"{name}.{key}": value for key, value in default.items() if key not in given}
            unknown |= {f"{name}.{key}": value for key, value in given.items() if key not in default}
        elif name in values:
            filled[name] = given
        else:
            filled[name] = missing[name] = default
    return filled, missing, unknown


def config_difference(old: dict[str, Any], new: dict[str, Any]) -> str | None:
    """Name the first key that makes `new` another run than `old`; None where a resume is allowed."""
    for section in sorted(set(old) | set(new)):
        if section in RESUME_MAY_DIFFER:
            continue
        before, after = old.get(section), new.get(section)
        if isinstance(before, dict) and isinstance(after, dict):
            for key in sorted(set(before) | set(after)):
                if before.get(key) != after.get(key):
                    return f"{section}.{key} was {before.get(key)!r} and is now {after.get(key)!r}"
        elif before != after:
            return f"{section} was {before!r} and is now {after!r}"
    return None


def resume_difference(old: dict[str, Any], new: dict[str, Any]) -> str | None:
    """Name the first key that makes `new` another run than `old`, but for where its data lies: what is there decides.

    Data of the hub may have become a folder, and the other way round. Budgets of the cache decide nothing either. None
    where a resume is allowed so far.
    """
    moved = [dict(values) for values in (old, new)]
    for values in moved:
        if isinstance(values.get("cache"), dict):
            values["cache"] = {key: value for key, value in values["cache"].items() if key not in CACHE_MAY_DIFFER}
    before, after = (values.get("data") for values in moved)
    if isinstance(before, dict) and isinstance(after, dict):
        free = {*WHERE_DATA_LIES, *(["name"] if before.get("path") or after.get("path") else [])}
        for values, section in zip(moved, (before, after), strict=True):
            values["data"] = {key: value for key, value in section.items() if key not in free}
    return config_difference(*moved)


def _find(source: str) -> Path:
    shipped = shipped_experiments()
    if source in shipped:
        return shipped[source]
    path = Path(source)
    if path.suffix in (".yaml", ".yml") or "/" in source:
        try:
            found = path.is_file()
        except OSError as error:
            raise ConfigError(f"configuration file {source[:80]} cannot be read: {error.strerror}") from None
        if not found:
            raise ConfigError(f"configuration file {source} does not exist")
        return path
    raise ConfigError(
        f"no shipped experiment is called {source!r}{_nearest(source, shipped)}; shipped: {', '.join(shipped)}; "
        "a file needs its .yaml ending"
    )


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the values of a configuration file, not checked against the schema. Raises ConfigError."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except _UNREADABLE as error:
        raise ConfigError(f"{path} is not YAML: {one_line(error)}") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold sections (key: value), not {type(values).__name__}")
    for key in values:
        if not isinstance(key, str):
            raise ConfigError(_unknown(str(key), _TOP_LEVEL, "key"))
    return values


def _apply_override(values: dict[str, Any], override: str) -> None:
    text = override.removeprefix("--")
    key, equals, raw = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"{override!r} is not an override; write --section.field=value")
    section, dot, field = key.partition(".")
    if dot and section not in _SECTIONS:
        raise ConfigError(_unknown(section, list(_SECTIONS), "section"))
    try:
        value = yaml.load(raw, Loader=_Loader) if raw else ""
    except _UNREADABLE:
        value = raw
    if not dot:
        if section in _SECTIONS:
            raise ConfigError(f"{section} is a section; write --{section}.field=value")
        # a run may be called 007: names are text however they look
        values[section] = raw if section == "name" else value
        return
    if values.get(section) is None:  # `train:` with nothing under it means all defaults
        values[section] = {}
    target = values[section]
    if not isinstance(target, dict):
        raise ConfigError(f"{section}: must be a section with keys, not {target!r}")
    target[field] = value


def _check_replaced(values: dict[str, Any]) -> None:
    """Say what to write for what an earlier version had."""
    method = values.get("method")
    if isinstance(method, dict) and method.get("name") == "fedavg_checkpointing":
        raise ConfigError("method.name: fedavg_checkpointing is now fedavg with train.fit=recompute")


def _check_known_keys(values: dict[str, Any]) -> None:
    for key, value in values.items():
        if key not in _TOP_LEVEL:
            raise ConfigError(_unknown(str(key), _TOP_LEVEL, "key"))
        if key in _SECTIONS:
            if value is None:
                continue
            if not isinstance(value, dict):
                raise ConfigError(f"{key}: must be a section with keys, not {value!r}")
            known = [field.name for field in fields(_SECTIONS[key])]
            for name in value:
                _check_plain(f"{key}.{name}", value[name])
                if name not in known:
                    raise ConfigError(_unknown(f"{key}.{name}", [f"{key}.{other}" for other in known], "key"))
    for key in [key for key, value in values.items() if key in _SECTIONS and value is None]:
        del values[key]  # `train:` with nothing under it means all defaults


def _check_plain(key: str, value: Any) -> None:
    """Refuse what YAML can say and a configuration cannot hold: values within themselves, halves of characters."""
    try:
        _check_size(value)
        text = json.dumps(value, default=str, ensure_ascii=False, allow_nan=not isinstance(value, dict))
        text.encode()
        if "\\u0000" in text:
            raise ValueError("it holds a NUL")
    except _UNREADABLE as error:
        raise ConfigError(f"{key}: no number, text or list of these: {one_line(error)[:120]}") from None


def _check_size(value: Any) -> None:
    """Refuse what is small in the file and huge in memory: lists that name a list that names a list."""
    waiting, seen = [value], 0
    while waiting:
        seen += 1
        if seen + len(waiting) > _MOST_VALUES:
            raise ValueError(f"it holds itself, or more than {_MOST_VALUES} values")
        item = waiting.pop()
        if isinstance(item, dict):
            waiting += [*item, *item.values()]
        elif isinstance(item, list | tuple | set):
            waiting += item


def _unknown(key: str, known: list[str], what: str) -> str:
    key = " ".join(key.split())
    return f"unknown {what} {key}{_nearest(key, known)}; allowed: {', '.join(known)}"


def _nearest(key: str, known: Any) -> str:
    matches = difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)
    return f"; did you mean {matches[0]}?" if matches else ""


def _explain(error: ValidationError) -> str:
    first = error.errors()[0]
    # a union (number | list | text) reports each member; the key itself is what the user knows
    key = ".".join(str(part) for part in first["loc"][:2])
    others = {e["loc"][:2]: e for e in error.errors()}
    more = f" (and {len(others) - 1} more)" if len(others) > 1 else ""
    value = first["input"]
    if first["type"] == "literal_error":
        expected = str(first.get("ctx", {}).get("expected", ""))
        choices = re.findall(r"'([^']*)'", expected)
        own = any(e["type"] == "string_pattern_mismatch" and e["loc"][:2] == first["loc"][:2] for e in error.errors())
        listed = ", ".join([*choices, *(["package.module:Class"] if own else [])])
        return f"{key}: {value!r} is not allowed{_nearest(str(value), choices)}; allowed: {listed}{more}"
    if first["type"] == "string_pattern_mismatch":
        return f"{key}: {value!r} is not of the form package.module:name{more}"
    message = first["msg"]
    if len({e["type"] for e in error.errors() if e["loc"][:2] == first["loc"][:2]}) > 1:
        messages = dict.fromkeys(e["msg"] for e in error.errors() if e["loc"][:2] == first["loc"][:2])
        message = " or ".join(messages)
    message = message.replace("a valid array", "a list, as in [a, b]").replace("an object", "a mapping, as in {a: 1}")
    return f"{key}: {value!r}: {one_line(Exception(message))}{more}"


def is_name(text: str) -> bool:
    """Tell whether a run can be called so."""
    return re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", text) is not None


def _check_fit(config: Config) -> None:
    fit = config.train.fit
    try:
        ways = ways_of(fit)
    except ValueError as error:
        raise ConfigError(
            f"train.fit: {fit!r} names no way, or one twice, by {str(error)!r}; it is auto, or a list such as "
            "'whole, recompute, recompute2, micro(4), recompute2+micro(4)', each once"
        ) from None
    for way in ways:
        if way.passes > config.train.batch_size:
            raise ConfigError(
                f"train.fit: {way.name} takes more passes than train.batch_size ({config.train.batch_size}) has samples"
            )


def _check_rules(config: Config) -> None:
    """Rules between keys; what depends on data, memory or the machine is checked where it is known."""
    if config.train.participants > config.fleet.devices:
        raise ConfigError(
            f"train.participants: {config.train.participants} is more than fleet.devices ({config.fleet.devices}); "
            "lower the one or raise the other"
        )
    _check_fit(config)
    if not is_name(config.name):
        raise ConfigError(f"name: {config.name!r} must be letters, digits, '.', '_' and '-', for it names a folder")
    pace = config.pace
    if pace.max_rounds is not None and pace.max_rounds < pace.min_rounds:
        raise ConfigError(f"pace.max_rounds: {pace.max_rounds} is less than pace.min_rounds ({pace.min_rounds})")
    if config.data.views is not None and config.data.augment == "none":
        raise ConfigError(
            f"data.views: {config.data.views} views need an augmentation that makes them; set data.augment to flip or "
            "crop_flip, or leave data.views out"
        )
    if config.train.prefix == "stored" and config.data.view_count is None:
        raise ConfigError(
            f"train.prefix: a device cannot store the features of data.augment={config.data.augment}, which has no end "
            "of views; set data.views, as in data.views=4"
        )
    if config.train.prefix != "recomputed" and config.fleet.accounting == "cuda_segments":
        raise ConfigError(
            f"fleet.accounting: cuda_segments counts devices as on a GPU, where there is no train.prefix="
            f"{config.train.prefix}; use train.prefix=recomputed or fleet.accounting=tensor_bytes"
        )
    select = config.select
    if select.signature_devices is not None and select.signature_devices <= select.neighbours:
        raise ConfigError(
            f"select.signature_devices: {select.signature_devices} devices, each of them alike to select.neighbours "
            f"({select.neighbours}) others, would all be one community; ask several times as many, or lower the other"
        )
    split = config.model.split or []
    for name in split:
        if split.count(name) > 1:
            raise ConfigError(f"model.split: {name!r} is named {split.count(name)} times; a block begins once")
    sections = {"method": config.method.name, "select": config.select.name, "pace": config.pace.policy}
    for section, owner in (*sections.items(), ("model", config.model.factory or config.model.name)):
        if getattr(config, section).options and ":" not in owner:
            raise ConfigError(f"{section}.options: {owner!r} takes none; they are for your own (package.module:name)")
