"""Typed settings that refuse unknown keys: the base of every method's config and of the commands' options."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from typing_extensions import Self

from ptmoe.errors import PtmoeError, near


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
    """The keys and values of a YAML file that is there.

    Raises:
        PtmoeError: it is not YAML, or holds something else.
    """
    import yaml

    try:
        written = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise PtmoeError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(written, dict):
        raise PtmoeError(f"{path} holds {type(written).__name__}: needs keys and values")
    return written
