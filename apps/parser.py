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
        print(f"{_prog(parser)}: error: {one_line(message, option_names(parser))}", file=sys.stderr)
        sys.exit(2)


def option_names(parser: Any) -> list[str]:
    """Every option of a parser and of the verbs below it, such as ``--trainer.max_epochs``."""
    names: list[str] = []
    for action in parser._actions:
        names += [name for name in action.option_strings if name.startswith("--")]
        if isinstance(choices := getattr(action, "_name_parser_map", None), dict):
            for below in choices.values():
                names += option_names(below)
    return names


def one_line(message: str, options: Iterable[str]) -> str:
    """Shorten a message of jsonargparse: no trace of unions, one line, a hint for misspelled keys.

    Args:
        message: The message, often many lines long.
        options: Names that are accepted, with leading dashes.
    """
    first = _without_union_trace(message)
    unknown = _unknown_key(message)
    if unknown:
        known = {name.lstrip("-") for name in options}
        close = get_close_matches(unknown.lstrip("-"), sorted(known), n=1, cutoff=0.6)
        dashes = "--" if unknown.startswith("--") else ""
        if close:
            first += f" (did you mean {dashes}{close[0]}?)"
    return first


def _without_union_trace(message: str) -> str:
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    kept: list[str] = []
    for line in lines:
        if re.match(r"^(- |Errors:|Subtypes|Given value type|Given value:)", line):
            break
        kept.append(line)
    text = " ".join(kept or lines[:1])
    text = re.sub(r"Does not validate against any of the Union subtypes", "wrong type", text)
    return text.rstrip(" :,")


def _unknown_key(message: str) -> str | None:
    patterns = (
        r"unrecognized arguments: (--?[\w.\-]+)",
        r"Key '([\w.\-]+)' is not expected",
        r'Key "([\w.\-]+)" is not expected',
        r"No action for key ['\"]([\w.\-]+)['\"]",
        r"does not accept nested key ['\"]?([\w.\-]+)",
    )
    for pattern in patterns:
        if match := re.search(pattern, message):
            return match.group(1)
    return None


def _prog(parser: Any) -> str:
    return " ".join(str(parser.prog).replace("[options]", "").split())
