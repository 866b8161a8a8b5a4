"""An argument parser whose errors are one line: what was found and what was probably meant."""

import re
import sys
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from lightning.pytorch.cli import LightningArgumentParser

from core_gates.errors import GatesError


class GatesParser(LightningArgumentParser):
    """LightningArgumentParser with one-line errors and exit code 2.

    Args:
        app: Application, for the look-up of configurations.
        verb: The verb that this parser reads; empty for the parser above the verbs.
        verbs: Every verb of the application: names of sections in a configuration.
        kwargs: Passed on to ``LightningArgumentParser``.
    """

    config_path: Path | None = None

    def __init__(
        self, *args: Any, app: str = "", verb: str = "", verbs: tuple[str, ...] = (), **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.app, self.verb, self.verbs = app, verb, verbs

    def format_help(self, formatter: Any = None) -> str:
        """Show a short usage, then the options of the verb first and those of the Trainer last."""
        if not self.verb:
            return str(super().format_help(formatter))
        groups, usage = self._action_groups, self.usage
        self._action_groups = sorted(groups, key=_rank)
        self.usage = f"{_prog(self)} [--config FILE] [--key value ...]"
        try:
            return str(super().format_help(formatter))
        finally:
            self._action_groups, self.usage = groups, usage

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print one line and exit with code 2, or raise where the caller asked for exceptions."""
        if not self.exit_on_error:
            super().error(message, ex)
        cause: BaseException | None = ex
        while cause is not None:
            if isinstance(cause, GatesError):
                raise cause
            cause = cause.__cause__ or cause.__context__
        parser = getattr(ex, "subcommand_parser", None) or self
        line = one_line(message, option_names(parser), getattr(parser, "config_path", None))
        print(f"{_prog(parser)}: error: {line}", file=sys.stderr)
        sys.exit(2)


def _rank(group: Any) -> int:
    """Order of a group of options in the help."""
    names = [action.dest.partition(".")[0] for action in group._group_actions]
    order = ("help", "data", "model", "checkpoint", "trainer")
    return 1 + order.index(names[0]) if names and names[0] in order else 0


def let_switches_stand_alone(parser: Any) -> None:
    """Let ``--quick`` mean ``--quick true`` for every option that is true or false."""
    for action in parser._actions:
        if getattr(action, "_typehint", None) is bool and action.nargs is None:
            action.nargs, action.const = "?", True


def option_names(parser: Any) -> list[str]:
    """Every option of a parser and of the verbs below it, such as ``--trainer.max_epochs``."""
    names: list[str] = []
    for action in parser._actions:
        names += [name for name in action.option_strings if name.startswith("--")]
        if isinstance(choices := getattr(action, "_name_parser_map", None), dict):
            for below in choices.values():
                names += option_names(below)
    return names


def one_line(message: str, options: Iterable[str], config: Path | None = None) -> str:
    """Say in one line what jsonargparse says in many.

    Args:
        message: The message, possibly with a trace of union types.
        options: Names that are accepted, for a hint when one is misspelled.
        config: The configuration file, named when the fault must lie in it.
    """
    text = " ".join(message.split())
    key = re.search(r'Parser key "([^"]+)"', text)
    where = f"{key.group(1)}: " if key else ""
    if found := re.search(r"given class_path '([^']+)': Option '([^']+)' is not accepted", text):
        return f"{where}{found.group(1)} does not accept {found.group(2)!r}"
    unknown = r"(?:Subcommand '[^']+' does not accept option|Option) '([^']+)'(?: is not accepted)?"
    if found := re.search(unknown, text):
        place = f" in {config}" if config else ""
        return f"unknown key {found.group(1)!r}{place}{_hint(found.group(1), options)}"
    if found := re.search(r"Subtypes: \[(.*?)\] Errors:.*Given value: (.*)$", text):
        return f"{where}expected {_types(found.group(1))}, found {found.group(2)!r}"
    if found := re.search(r"Expected a (.*)\. Got value: (.*)$", text):
        return f"{where}expected {_types(found.group(1))}, found {found.group(2)!r}"
    if found := re.search(r"unrecognized arguments: (--?[\w.\-]+)", text):
        return text + _hint(found.group(1), options)
    return text


def _hint(name: str, options: Iterable[str]) -> str:
    known = sorted({option.lstrip("-") for option in options})
    close = get_close_matches(name.lstrip("-"), known, n=1)
    dashes = "--" if name.startswith("--") else ""
    return f" (did you mean {dashes}{close[0]}?)" if close else ""


def _types(text: str) -> str:
    """``<class 'int'>, <class 'NoneType'>`` as ``int or null``."""
    text = re.sub(r"<class '([\w.]+)'>", lambda m: m.group(1), text).replace("typing.", "")
    text = re.sub(r"Literal\[([^\]]*)\]", lambda m: m.group(1).replace(", ", " | "), text)
    text = re.sub(r"(?:\w+\.)+(\w+)", lambda m: m.group(1), text)
    return text.replace("NoneType", "null").replace(", ", " or ").replace(" | ", ", ")


def _prog(parser: Any) -> str:
    return " ".join(str(parser.prog).replace("[options]", "").split())
