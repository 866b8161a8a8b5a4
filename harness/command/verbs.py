"""Verbs that need no Trainer: typed functions with the options and errors of all others."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast, get_type_hints

import yaml
from rich.console import Console

from core_gates.errors import GatesError
from harness.command.configfile import ConfigFile, find_config, read_config
from harness.command.parser import (
    COMMON_OPTIONS,
    GatesParser,
    constructing,
    describe,
    let_lists_be_plain,
    let_switches_stand_alone,
    values,
)
from harness.runs.folder import RunFolder
from harness.runs.terminal import quiet_lightning

if TYPE_CHECKING:
    from harness.experiment import Run

NAME = "Name of the run; that of the configuration if null."
NAME_OF_PATH = "Name of the run; that of the configuration, else of the --model, if null."


class Place(NamedTuple):
    """Where a verb finds what ``fit`` left, and leaves what it makes.

    Attributes:
        run_folder: Folder of the run.
        config: Name of the configuration, under which weights are shipped.
        config_path: Its file; None where none is named.
        command: Command line, for records.
    """

    run_folder: RunFolder
    config: str
    config_path: Path | None = None
    command: str = ""

    def run(self, **options: Any) -> Run:
        """Return the run of the verb, see `harness.experiment.Run` for options."""
        from harness.experiment import Run

        folder, path = self.run_folder, self.config_path
        settings: dict[str, Any] = {"overwrite": folder.overwrite, **options}
        return Run(folder.path, app=folder.app, config_path=path, command=self.command, **settings)


class OwnSection(ConfigFile):
    """The ``--config`` option of a verb that reads its own section and nothing else."""

    def __call__(
        self, parser: Any, cfg: Any, values: Any, option_string: str | None = None
    ) -> None:
        """Merge the section of the verb into the namespace.

        Raises:
            GatesError: The file is not found or not readable, or the section is not a mapping.
        """
        path = find_config(str(values), parser.app)
        section = read_config(path).get(parser.verb) or {}
        if not isinstance(section, dict):
            raise GatesError(f"the section {parser.verb!r} of {path} must be a mapping")
        parser.config_path = path
        self.apply_config(parser, cfg, self.dest, yaml.safe_dump(section, sort_keys=False))


class FunctionVerb(NamedTuple):
    """A verb.

    Attributes:
        target: ``module:function``, imported only for this verb. The function takes a
            `Place` named ``place`` if it reads or writes a run, which gives the verb the
            options ``--name`` and ``--root``; its other arguments, typed and documented, are the
            options.
        positional: Argument that stands without an option, a list of one path or several, or of
            none if it has a default; or names of several such arguments, each of one path.
        flat: Arguments that are documented dataclasses, whose fields are options.
        literal: Options whose value on the command line is text, even ``null`` or ``# a``.
    """

    target: str
    positional: str | tuple[str, ...] = ()
    flat: tuple[str, ...] = ()
    literal: tuple[str, ...] = ()

    def load(self) -> Callable[..., None]:
        """Return the function."""
        module, _, name = self.target.partition(":")
        with Console(stderr=True).status(f"starting {name}"):  # importing torch takes seconds
            return cast(Callable[..., None], getattr(importlib.import_module(module), name))


def run_verb(
    app: str,
    verbs: Mapping[str, FunctionVerb],
    arguments: Sequence[str],
    *,
    config: str,
    name_of: Callable[[Mapping[str, Any]], str | None] | None = None,
) -> None:
    """Parse the command line of one verb and run it.

    Args:
        app: Application.
        verbs: Those of it that are functions.
        arguments: Verb and options.
        config: Configuration that is meant where none is named.
        name_of: Returns the name of the run by its options, or None, where nothing names it.

    Raises:
        GatesError: A value is wrong.
    """
    quiet_lightning()
    verb, *words = arguments
    function, positional = verbs[verb].load(), verbs[verb].positional
    placed = "place" in (parameters := inspect.signature(function).parameters)
    parser = GatesParser(prog=f"gates {app} {verb}", app=app, verb=verb)
    parser.description = _summary(function)
    parser.add_argument(
        "-c", "--config", action=OwnSection, help="Configuration: a path, or a packaged name."
    )
    skip: set[str | int] = {"place"}
    for name in (positional,) if isinstance(positional, str) else positional:
        skip.add(name)
        optional = parameters[name].default is not inspect.Parameter.empty
        many: dict[str, Any] = {"nargs": "*" if optional else "+"} if name == positional else {}
        text = re.search(rf"(?m)^    {name}: (.+(?:\n {{5,}}.+)*)", inspect.getdoc(function) or "")
        parser.add_argument(name, type=str, help=text[1] if text else "", **many)
    if placed:
        parser.add_argument("--name", type=str | None, help=NAME_OF_PATH if name_of else NAME)
        parser.add_argument("--root", type=str, default="runs", help="Folder of all runs.")
    grouped = _add_options(parser, function, skip, verbs[verb].flat)
    let_switches_stand_alone(parser)
    describe(parser, COMMON_OPTIONS)
    words = [_with_two_dashes(parser, word) for word in words]
    parsed = parser.parse_args(let_lists_be_plain(parser, words))
    with constructing():
        try:
            options = vars(parser.instantiate_classes(parsed))
            options |= {name: _taken(kind, options) for name, kind in grouped.items()}
        except ValueError as error:  # of the constructor of a dataclass
            raise GatesError(f"an option is wrong: {error}") from error
    options |= {n[2:]: v for n, v in values(words, [f"--{name}" for name in verbs[verb].literal])}
    options.pop("config")
    if placed:
        run, root = options.pop("name"), options.pop("root")
        if run is None and parser.config_path is None and name_of is not None:
            run = name_of(options)
        stem = parser.config_path.stem if parser.config_path else config
        folder, called = RunFolder(app, run or stem, root), shlex.join(["gates", app, *arguments])
        options["place"] = Place(folder, stem, parser.config_path, called)
    function(**options)


def refuse_existing(path: Path, *, overwrite: bool) -> None:
    """Refuse to replace an output unless asked for.

    Raises:
        GatesError: It exists.
    """
    if path.exists() and not overwrite:
        raise GatesError(f"{path} exists: choose another --output or add --overwrite_output")


def _add_options(
    parser: GatesParser, function: Callable[..., None], skip: set[str | int], flat: Sequence[str]
) -> dict[str, type[Any]]:
    """Add the options of a function; return the dataclasses of its flat arguments, by name."""
    grouped: dict[str, type[Any]] = {name: get_type_hints(function)[name] for name in flat}
    parser.add_function_arguments(function, skip=skip | set(grouped), as_group=False)
    for kind in grouped.values():
        parser.add_class_arguments(kind, as_group=False)
    return grouped


def _with_two_dashes(parser: GatesParser, word: str) -> str:
    """Return ``-k`` as ``--k`` where an option has a name of one letter."""
    actions = parser._option_string_actions
    short = word.partition("=")[0]
    return (
        f"-{word}" if len(short) == 2 and f"-{short}" in actions and short not in actions else word
    )


def _taken(kind: type[Any], options: dict[str, Any]) -> Any:
    """Return a dataclass of its fields, which are taken out of the options."""
    return kind(**{field.name: options.pop(field.name) for field in dataclasses.fields(kind)})


def _summary(function: Callable[..., None]) -> str:
    """Return the part of a docstring before its arguments."""
    return inspect.cleandoc(function.__doc__ or "").partition("\nArgs:")[0].strip()
