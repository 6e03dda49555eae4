"""The configuration reference, made from the dataclasses: `python -m fedfreeze.config.reference`, and `--help`."""

from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic.fields import FieldInfo

from fedfreeze.config.schema import RESUME_MAY_DIFFER, Config, OwnObject, allowed_values

_MAY_DIFFER = ", ".join(f"`{name}`" for name in RESUME_MAY_DIFFER)
_HEADING = f"""# Configuration

Generated from `fedfreeze/config/schema.py` by `python -m fedfreeze.config.reference > docs/configuration.md`.
`fedfreeze run --help` prints the same keys.

A configuration is a YAML file or the name of a shipped one (`fedfreeze/experiments/`). What it leaves out has the
default below; `--section.field=value` on the command line wins over both, and its value is read as YAML. An unknown key
is an error. The resolved configuration is written to the run folder as `config.yaml`.

A resumed run may differ in the sections {_MAY_DIFFER}; any other change is an error. `null` means none.
"""

_PLAIN = {int: "whole number", float: "number", str: "text", bool: "`true`, `false`", type(None): "`null`", Any: "any"}


@dataclass(frozen=True)
class Key:
    """One key of the configuration, as its user sees it."""

    name: str
    """With its section: `train.rounds`."""
    default: str
    choices: tuple[str, ...]
    """The names that it allows; none where it is no choice."""
    allowed: str
    """Type, range or names, as Markdown."""
    meaning: str


def top_level_keys() -> list[Key]:
    """Return the keys outside the sections."""
    return _keys(Config, "")


def section_keys() -> Iterator[tuple[str, str, list[Key]]]:
    """Yield name, purpose and keys of each section, in the order of the schema."""
    for name, section in _sections():
        yield name, section.__doc__ or "", _keys(section, f"{name}.")


def configuration_reference() -> str:
    """Return docs/configuration.md."""
    parts = [_HEADING, _table(top_level_keys())]
    for name, purpose, keys in section_keys():
        parts.append(f"## {name}\n\n{purpose}\n\n{_table(keys)}")
    return "\n".join(parts)


def _sections() -> list[tuple[str, Any]]:
    return [(field.name, field.type) for field in fields(Config) if is_dataclass(field.type)]


def _keys(section: Any, prefix: str) -> list[Key]:
    described = section.__pydantic_fields__
    hints = get_type_hints(section, include_extras=True)
    return [
        Key(
            name=f"{prefix}{name}",
            default=_as_yaml(info.get_default(call_default_factory=True)),
            choices=tuple(allowed_values(info.annotation)),
            allowed=_allowed(hints[name]),
            meaning=" ".join((info.description or "").split()),
        )
        for name, info in described.items()
        if not is_dataclass(hints[name])
    ]


def _allowed(hint: Any) -> str:
    """Return in words what a type allows."""
    if hint == OwnObject:
        return "`package.module:Name`"
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(_allowed(member) for member in get_args(hint))
    if get_origin(hint) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(hint))
    if get_origin(hint) is list:
        return f"list: {_allowed(get_args(hint)[0])}"
    if get_origin(hint) is dict:
        return "mapping"
    if not hasattr(hint, "__metadata__"):
        return _PLAIN[hint]
    return _allowed(hint.__origin__) + _limits(hint.__metadata__)


def _limits(metadata: tuple[Any, ...]) -> str:
    """Return what a field's constraints leave, as it follows the name of the type."""
    found = {}
    for info in metadata:
        for constraint in info.metadata if isinstance(info, FieldInfo) else [info]:
            found.update({name: getattr(constraint, name) for name in constraint.__slots__})
    if "min_length" in found:
        least, most = found["min_length"], found.get("max_length")
        return f" (length {least}{'' if most == least else ' or more'})"
    if "ge" in found and "le" in found:
        return f", {_number(found['ge'])} to {_number(found['le'])}"
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    return " " + ", ".join(f"{sign} {_number(found[name])}" for name, sign in signs.items() if name in found)


def _number(value: float) -> str:
    """Return a bound, large ones as a power."""
    for base in (10, 2):
        exponent = len(str(int(value))) - 1 if base == 10 else int(value).bit_length() - 1
        if value > 10**3 and value == base**exponent:
            return f"{base}^{exponent}"
    return f"{value:g}"


def _as_yaml(value: Any) -> str:
    """Return a default as the user would write it."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _table(keys: list[Key]) -> str:
    rows = ["| key | default | allowed | meaning |", "|---|---|---|---|"]
    for key in keys:
        cells = (f"`{key.name}`", f"`{key.default}`", key.allowed, key.meaning)
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    print(configuration_reference(), end="")
