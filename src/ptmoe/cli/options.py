"""Options that several commands share, and options that are the fields of a settings class."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from contextlib import suppress
from copy import copy
from functools import cached_property
from pathlib import Path
from pkgutil import resolve_name
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

import typer
from typer.core import TyperCommand

from ptmoe.errors import PtmoeError

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from ptmoe.settings import Settings

    Fields = dict[str, list[FieldInfo]]  # by name; several methods may have a field of one name

HELP = ("-h", "--help")

Model = Annotated[str, typer.Option(help="nano, smollm2, a folder, a GGUF file, or a Hugging Face Hub repository")]
AdapterBase = Annotated[str | None, typer.Option("--model", help="by default the base that the adapter names")]
Adapter = Annotated[Path, typer.Argument(help="adapter folder, or a run folder that holds one")]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1, mps, …; by default the accelerator, where there is one")
]
NamedSplit = Annotated[str, typer.Option(help="of a named task")]
DataDir = Annotated[str | None, typer.Option(help="folder or file with the data set; by default it is downloaded")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="skip bad records, and report how many there were")]
Ids = Annotated[Path | None, typer.Option(help="file of example ids, one a line or a JSON list: only these")]
Examples = Annotated[int | None, typer.Option(min=1, help="the first N examples only")]


def given(**options: Any) -> dict[str, Any]:
    """The options that were given: those that are not None."""
    return {name: value for name, value in options.items() if value is not None}


def command_of(settings: str, *only: str, methods: bool = False) -> type[TyperCommand]:
    """A command whose options are those of its function and the fields of a settings class.

    The class is imported when the command is used, so `ptmoe --help` does not import it. The function finds the fields
    that were given in `context.obj`.

    Args:
        settings: `"MODULE:CLASS"`.
        only: fields to offer; by default all.
        methods: offer the fields of the methods' configs as well.
    """

    class SettingsCommand(TyperCommand):
        arguments: Sequence[str] = HELP  # what the command was given; the reference in docs/ is its help

        @cached_property
        def from_fields(self) -> list[Any]:
            described = described_fields(resolve_name(settings))
            fields = {name: [field] for name, field in described.items() if not only or name in only}
            return _options(fields | _method_fields(self.arguments) if methods else fields)

        def parse_args(self, context: Any, arguments: list[str]) -> list[str]:
            self.arguments = tuple(arguments)
            return super().parse_args(context, arguments)

        def get_params(self, context: Any) -> list[Any]:
            *declared, help_option = super().get_params(context)
            return [*declared, *self.from_fields, help_option]

        def invoke(self, context: Any) -> Any:
            values = {option.name: context.params.pop(option.name) for option in self.from_fields}
            context.obj = {name: value for name, value in values.items() if value is not None and value != ()}
            return super().invoke(context)

    return SettingsCommand


def _method_fields(arguments: Sequence[str]) -> Fields:
    """The fields of all methods' configs, as a YAML file may name the method; in a method's help, its own."""
    asks_for_help = not {*HELP}.isdisjoint(arguments)
    named = re.findall(r"^--method[=\n]([^\n]*)", "\n".join(arguments), re.MULTILINE)
    if asks_for_help and not named:
        return {}
    from ptmoe.methods import METHODS, WITH_FILES, method_named
    from ptmoe.settings import OF_PEFT
    from ptmoe.train.options import method_entry

    own: list[Any] = []
    with suppress(PtmoeError):  # which the command then says
        own = [method_named(method_entry(text)["name"]) for text in named[-1:]]
    of_peft = bool(own) and own[0].method.startswith(OF_PEFT)  # its fields are like no others'
    # A file may name a short form of a type of peft; else importing peft, which takes seconds, can wait.
    in_file = not named and any(text.endswith((".yaml", ".yml")) for text in arguments)
    known = METHODS.values() if in_file or not {*own} <= {*WITH_FILES} else WITH_FILES
    fields: Fields = {}
    for config in own if asks_for_help or of_peft else known:
        for name, field in described_fields(config).items():
            fields.setdefault(name, []).append(field)
    return fields


def described_fields(owner: type[Settings]) -> dict[str, FieldInfo]:
    """A class's fields, and a method's `shorthands`, each with a description: its own, or what the docstring of the
    class, or of one that it inherits from, says under `Attributes`."""
    docstrings = [inspect.cleandoc(parent.__doc__ or "") for parent in owner.__mro__]
    fields = {}
    for name, field in {**owner.model_fields, **getattr(owner, "shorthands", {})}.items():
        found = (re.search(rf"^ {{4}}{name}: (.+(?:\n {{8}}.+)*)", text, re.MULTILINE) for text in docstrings)
        fields[name] = copy(field)
        fields[name].description = field.description or next((match[1] for match in found if match), None)
    return fields


def _options(fields: Fields) -> list[Any]:
    """What `typer` makes of a function with these parameters."""

    def function(**_: Any) -> None: ...

    parameters = [parameter for name, same in fields.items() if (parameter := _parameter(name, same)) is not None]
    function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    app = typer.Typer(add_completion=False)
    app.command()(function)
    return list(typer.main.get_command(app).params)


def _parameter(name: str, fields: Sequence[FieldInfo]) -> inspect.Parameter | None:
    """Fields of one name as `typer` reads them; the settings class checks the rest. None for a mapping, which only a
    YAML file can hold."""
    from ptmoe.settings import Flag

    first, leaves = fields[0], _leaves(fields)
    flag = next((entry for entry in first.metadata if isinstance(entry, Flag)), Flag())
    repeatable = list in leaves if flag.repeatable is None else flag.repeatable
    kind: Any = list[str] if repeatable else str
    if flag.repeatable is None and not repeatable:
        if dict in leaves:
            return None
        if all(get_origin(leaf) is Literal for leaf in leaves):
            kind = Literal[tuple(dict.fromkeys(choice for leaf in leaves for choice in get_args(leaf)))]
        elif len(leaves) == 1 and leaves[0] in (bool, int, float):
            kind = leaves[0]
    text, default = " ".join((first.description or "").split()), first.get_default()
    if isinstance(default, str | int | float) and default not in ("", False):
        text += f" [default: {'--' + name.replace('_', '-') if default is True else default}]"
    callback = _alone if {str, list} <= {*leaves} else None
    option = typer.Option(*flag.names, help=text, metavar="<str>..." if repeatable else None, callback=callback)
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )


def _alone(values: list[str] | None) -> Any:
    """A text given once is that text, not a list of one."""
    return values[0] if values and len(values) == 1 else values


def _leaves(fields: Sequence[FieldInfo]) -> list[Any]:
    """The types in the fields' annotations, without None; of a list or a mapping its kind alone."""

    def leaves(annotation: Any) -> list[Any]:
        origin, parts = get_origin(annotation), get_args(annotation)
        if origin in (Union, UnionType):
            return [leaf for part in parts if part is not type(None) for leaf in leaves(part)]
        return leaves(parts[0]) if origin is Annotated else [origin if origin in (list, dict) else annotation]

    return list(dict.fromkeys(leaf for field in fields for leaf in leaves(field.annotation)))
