"""Typed settings that refuse unknown keys: the base of every method's config and of the commands' options."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from typing_extensions import Self

from ptmoe.errors import PtmoeError, near

LARGEST_YAML = 1_000_000  # bytes


@dataclass(frozen=True)
class Flag:
    """How a field appears on the command line, where its name and type do not say so: `Annotated[int, Flag("-n")]`.

    Attributes:
        names: its spellings; by default `--field-name`.
        repeatable: the field's validator reads text, which is given once (False) or several times (True); None follows
            the field's type.
    """

    names: tuple[str, ...] = ()
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

    def replace(self, **changes: Any) -> Self:
        """A checked copy with other values."""
        return type(self)(**{**self.model_dump(), **changes})


def _one_line_each(owner: type[BaseModel], error: ValidationError) -> str:
    lines = []
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"])
        message = f"{key}={problem['input']!r}: {problem['msg'][0].lower()}{problem['msg'][1:]}"
        if problem["type"] == "extra_forbidden":
            message = f"unknown key {key!r}{near(key, owner.model_fields)}"
        elif problem["type"] == "missing":
            message = f"{key} is missing"
        elif problem["type"] == "value_error":  # one of our own checks: it says everything itself
            message = str(problem["ctx"]["error"])
        lines.append(message)
    return "; ".join(lines)


def read_yaml(path: Path) -> dict[str, Any]:
    """The keys and values of a YAML file that is there. Dates are text; aliases, with which a few bytes become
    gigabytes, are refused.

    Raises:
        PtmoeError: it is not YAML, is larger than 1 MB, or holds something else.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers = {
            first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
            for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise yaml.YAMLError(f"an alias (*{self.peek_event().anchor})")
            return super().compose_node(parent, index)

    if path.stat().st_size > LARGEST_YAML:
        raise PtmoeError(f"{path} has {path.stat().st_size:,} bytes: needs at most {LARGEST_YAML:,}")
    try:
        written = yaml.load(path.read_text(encoding="utf-8"), Loader)  # derived from the safe one
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise PtmoeError(f"{path} is not YAML: {' '.join(str(error).split())[:300]}") from None
    if not isinstance(written, dict):
        raise PtmoeError(f"{path} holds {type(written).__name__}: needs keys and values")
    return written
