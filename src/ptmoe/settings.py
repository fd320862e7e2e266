"""Typed settings that refuse unknown keys: the base of every method's config and of the commands' options."""

import json
import re
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from typing_extensions import Self

from ptmoe.errors import PtmoeError, near, shown

LARGEST_YAML, LARGEST_JSON = 200_000, 4_000_000  # bytes of a configuration; YAML is read in seconds, JSON at once
DEEPEST = 50  # levels of lists and mappings in it
OF_PEFT = "peft:"  # begins the name of a method that is a type of `peft`


def method_name(text: str) -> str:
    """A method's name as it is written in files: `PEFT:LN_Tuning` is `peft:ln-tuning`."""
    name = text.strip()
    return name.lower().replace("_", "-") if name.lower().startswith(OF_PEFT) else name


@dataclass(frozen=True)
class Flag:
    """How a field appears on the command line, where its name and type do not say so: `Annotated[int, Flag("-n")]`."""

    names: tuple[str, ...] = ()  # its spellings; by default `--field-name`
    # The field's validator reads text, which is given once (False) or several times (True); None follows its type.
    repeatable: bool | None = None


class Settings(BaseModel):
    """A frozen, strictly checked set of named values.

    Raises:
        PtmoeError: on an unknown key (the nearest known one is suggested) or a value that does not fit; all of them
            are named in one message.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, protected_namespaces=())

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise PtmoeError(_one_line_each(type(self), error)) from None

    @model_validator(mode="before")
    @classmethod
    def _yes_is_no_number(cls, values: Any) -> Any:
        """Python counts `True` as 1, where a mistaken `seeds: true` would be taken."""
        for name, value in values.items() if isinstance(values, dict) else ():
            field = cls.model_fields.get(name)
            if field is not None and _holds_a_boolean(value) and _numbers_alone(field.annotation):
                raise ValueError(f"{name}={shown(value)}: needs a number")
        return values

    def replace(self, **changes: Any) -> Self:
        """A checked copy with other values."""
        return type(self)(**{**self.model_dump(), **changes})


def differences(pairs: Iterable[tuple[str, Any, Any]]) -> list[str]:
    """A sentence for each (name, before, now) whose values differ."""
    return [f"{name} was {before!r}, is {now!r}" for name, before, now in pairs if before != now]


def _parts(annotation: Any) -> Iterator[Any]:
    """The types in it, at any depth."""
    inner = get_args(annotation)
    yield from (part for each in inner for part in _parts(each)) if inner else (annotation,)


def _numbers_alone(annotation: Any) -> bool:
    """Whether a value holds numbers, and no value may be a boolean."""
    parts = set(filter(lambda part: isinstance(part, Hashable), _parts(annotation)))
    return bool(parts & {int, float}) and not parts & {bool, Any, True, False}


def _holds_a_boolean(value: Any) -> bool:
    if isinstance(value, dict | list | tuple):
        return any(map(_holds_a_boolean, value.values() if isinstance(value, dict) else value))
    return isinstance(value, bool)


def _flags(owner: type[BaseModel]) -> dict[str, str]:
    """The field of each spelling that a `Flag` gives, as a key would be written."""
    return {
        spelling.lstrip("-").replace("-", "_"): name
        for name, field in owner.model_fields.items()
        for entry in field.metadata
        if isinstance(entry, Flag)
        for spelling in entry.names
    }


def _one_line_each(owner: type[BaseModel], error: ValidationError) -> str:
    lines = []
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"])
        message = f"{key}={shown(problem['input'])}: {problem['msg'][0].lower()}{problem['msg'][1:]}"
        if problem["type"] == "extra_forbidden":
            flags = _flags(owner)  # --batch-size is a key of another name
            message = f"unknown key {key!r}" + (
                f"; did you mean {flags[key]!r}?" if key in flags else near(key, owner.model_fields)
            )
        elif problem["type"] == "missing":
            message = f"{key} is missing"
        elif problem["type"] == "value_error":  # one of our own checks: it says everything itself
            message = str(problem["ctx"]["error"])
        lines.append(message)
    return "; ".join(lines)


def read_yaml(path: Path) -> dict[str, Any]:
    """The keys and values of a YAML file that is there: what JSON has, in YAML's spelling. Dates are text.

    Raises:
        PtmoeError: it is not YAML, is larger than 200 kB, or holds something else.
    """
    return _read(path, "YAML", LARGEST_YAML, parse_yaml)


def read_json(path: Path) -> dict[str, Any]:
    """The keys and values of a JSON file that is there.

    Raises:
        PtmoeError: it is not JSON, is larger than 4 MB, or holds something else.
    """
    return _read(
        path, "JSON", LARGEST_JSON, partial(json.loads, object_pairs_hook=_once_each, parse_constant=_no_number)
    )


def parse_yaml(text: str) -> Any:
    """YAML of JSON's types. An alias, with which a few bytes become gigabytes, and a tag, which makes other types, are
    refused; so is a key that is no text, or is there twice.

    Raises:
        yaml.YAMLError, ValueError, RecursionError: the text is something else.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        depth = 0
        yaml_implicit_resolvers = {
            first: [(tag, pattern) for tag, pattern in resolvers if tag.endswith((":bool", ":float", ":null"))]
            for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }

        def compose_node(self, parent: Any, index: Any) -> Any:
            event = self.peek_event()
            if isinstance(event, yaml.AliasEvent) or getattr(event, "tag", None) is not None:
                raise yaml.YAMLError(f"an alias or a tag in line {event.start_mark.line + 1}")
            self.depth += 1
            if self.depth > DEEPEST:  # the scanner's time grows with the square
                raise yaml.YAMLError(f"more than {DEEPEST} levels in line {event.start_mark.line + 1}")
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = [key.value for key, _ in node.value if key.tag == "tag:yaml.org,2002:str"]
            if len(set(keys)) < len(node.value):
                raise yaml.YAMLError(f"a key that is no text or is there twice, after line {node.start_mark.line + 1}")
            return super().construct_mapping(node, deep)

    # YAML's own integers are octal behind a 0, and 1:30 is 90.
    whole = re.compile(r"[-+]?(0|[1-9][0-9_]*)$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:int", whole, list("-+0123456789"))
    return yaml.load(text, Loader)  # derived from the safe one


def yaml_text(value: Any) -> str:
    """The YAML of a value of JSON's types, keys in their order, that `parse_yaml` reads as the same value."""
    import yaml

    class Dumper(yaml.SafeDumper):
        def ignore_aliases(self, data: Any) -> bool:
            return True

    options: dict[str, Any] = {"Dumper": Dumper, "sort_keys": False}
    text: str = yaml.dump(value, allow_unicode=True, **options)
    # PyYAML writes "next line" as it stands, where reading folds it to a space.
    if "\x85" in text:
        text = yaml.dump(value, allow_unicode=False, **options)
    return text


def _read(path: Path, kind: str, largest: int, parse: Callable[[str], Any]) -> dict[str, Any]:
    try:
        size = path.stat().st_size
        content = path.read_bytes() if size <= largest else b""
    except OSError as error:
        raise PtmoeError(f"{path}: {error.strerror}") from error
    if size > largest:
        raise PtmoeError(f"{path} has {size:,} bytes: needs at most {largest:,}")
    try:
        written = parse(content.decode())
        json.dumps(written, ensure_ascii=False).encode()  # no half of a character
    except RecursionError:
        raise PtmoeError(f"{path} is not {kind}: lists in lists in lists") from None
    except Exception as error:  # parsers end in whatever they end in
        raise PtmoeError(f"{path} is not {kind}: {' '.join(str(error).split())[:300]}") from None
    if not isinstance(written, dict):
        raise PtmoeError(f"{path} holds {type(written).__name__}: needs keys and values")
    return written


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(values := dict(pairs)) < len(pairs):
        raise ValueError("a key is there twice")
    return values


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is no number of JSON")
