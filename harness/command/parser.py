"""An argument parser with one-line errors: what was found and meant; and the help of a verb."""

import re
import shutil
import sys
import textwrap
from argparse import SUPPRESS, Action
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from errno import EDQUOT, ENOSPC
from importlib.util import find_spec
from pathlib import Path
from textwrap import shorten
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, NoReturn, Union, get_args, get_origin

from jsonargparse import ArgumentParser

from core_gates.errors import GatesError
from harness.command.configfile import packaged_configs

WIDTH = 100
COLUMN = 36  # where texts begin
MOST_CLASSES = 8
ORDER = ("data", "model", "")  # "" is what the verb itself takes; then other groups
LAST = ("options", "checkpoint", "trainer")
SHORT = {int: "INT", float: "FLOAT", str: "TEXT", bool: "{true,false}", Path: "PATH"}
PLACES = {"+": "{} ...", "*": "[{} ...]"}  # of arguments without an option
GLUE = "\N{NO-BREAK SPACE}"  # keeps a note on one line


class Group(NamedTuple):
    """Options that are shown together.

    Attributes:
        key: Their common prefix, such as ``data``; empty for what the verb itself takes, and
            ``options`` for what every verb takes.
        title: Heading.
        actions: The options.
    """

    key: str
    title: str
    actions: list[Action]


def help_text(parser: Any, *, trainer: bool = False) -> str:
    """Return the help of a parser without the options of the Trainer, or these alone.

    Args:
        parser: Parser of one verb, or of the arguments of one class.
        trainer: Whether to show the options of the Trainer, and nothing else.
    """
    groups = sorted(_groups(parser), key=_rank) if parser.verb else list(_groups(parser))
    if parser.verb:
        groups = [group for group in groups if (group.key == "trainer") == trainer]
    width = min(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns)
    lines = textwrap.wrap(_usage(parser), width) if parser.verb else []
    if parser.description and not trainer:
        lines += ["", *textwrap.wrap(plain(parser.description), width)]
    for group in groups:
        lines += ["", *textwrap.wrap(f"{group.title}:", width)]
        for action in group.actions:
            lines += _option(action, width, _notes(action, parser.needed))
    if any(_names_class(action, trainer=trainer) for action in parser._actions):
        lines += ["", "--OPTION.help CLASS lists what the class of an option takes."]
    return "\n".join(lines).lstrip("\n") + "\n"


def plain(text: str) -> str:
    """Return a docstring without its markup: no roles, no backticks, one line."""
    text = re.sub(r":[\w:]+:`~(?:[\w.]*\.)?(\w+)`", r"\1", text)  # `a.b.C` reads C
    text = re.sub(r":[\w:]+:`([^`<]+?)(?: <[^`]+>)?`", r"\1", text)
    text = re.sub(r"`([^`<]+?) <([^`]+)>`_+", r"\1 (\2)", text)
    text = re.sub(r"`+([^`]*)`+_*", r"\1", text)
    text = re.sub(r"\*\*([^*]+)\*\*", r"\1", text)
    return " ".join(text.split())


def _groups(parser: Any) -> Iterator[Group]:
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if _shown(action)]
        if not actions:
            continue
        title = plain(group.title or "")
        key = title if title == "options" else actions[-1].dest.rpartition(".")[0]
        key = key.partition(".")[0]
        if parser.verb and not key:
            title = "arguments" if title.startswith("positional") else f"options of {parser.verb}"
        elif parser.verb and key != "options":
            title = f"{key}: {title}"
        yield Group(key, title, actions)


def _names_class(action: Action, *, trainer: bool) -> bool:
    """Return whether an action is the help of a class, whose option is shown."""
    of_trainer = action.dest.startswith("trainer.")
    return type(action).__name__ == "_ActionHelpClassPath" and of_trainer == trainer


def _rank(group: Group) -> int:
    if group.key in LAST:
        return len(ORDER) + 1 + LAST.index(group.key)
    return ORDER.index(group.key) if group.key in ORDER else len(ORDER)


def _shown(action: Action) -> bool:
    """Leave out links, files of groups, and the help of each class."""
    hidden = ("ActionLink", "_ActionConfigLoad", "_ActionHelpClassPath")
    return action.help != SUPPRESS and type(action).__name__ not in hidden


def _usage(parser: Any) -> str:
    given = [a for a in parser._actions if not a.option_strings]
    places = [PLACES.get(a.nargs, "{}").format(a.dest.upper()) for a in given]
    words = [parser.prog, *places, "[--config FILE] [--key value ...]"]
    return "usage: " + " ".join(" ".join(words).replace("[options]", "").split())


def _option(action: Action, width: int, notes: list[str]) -> list[str]:
    names = [name for name in action.option_strings if not name.endswith("+")]
    head = "  " + " ".join(filter(None, (", ".join(names), _value(action))))
    text = plain(action.help or "")
    if notes:
        text += " (" + "; ".join(note.replace(" ", GLUE) for note in notes) + ")"
    indent = " " * COLUMN
    body = textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=indent)
    body = [line.replace(GLUE, " ") for line in body]
    if not body or len(head) > COLUMN - 2:
        return [*textwrap.wrap(head, width, subsequent_indent="    "), *body]
    return [head.ljust(COLUMN) + body[0][COLUMN:], *body[1:]]


def _value(action: Action) -> str:
    """The text after the name of an option."""
    if action.nargs == 0:
        return ""
    hint = getattr(action, "_typehint", None)
    typed = hasattr(action, "extra_help") and action.option_strings
    if not typed:
        word = action.metavar if isinstance(action.metavar, str) else action.dest.upper()
        return word.replace("\b", "")
    word = kind(hint)
    return f"[{word}]" if action.nargs == "?" else word


def kind(hint: Any) -> str:
    """Return a type as one word: ``INT``, ``{a,b}``, ``FLOAT,...``, or the name of a class."""
    origin, inside = get_origin(hint), get_args(hint)
    if hint in SHORT:
        return SHORT[hint]
    if origin is Literal:
        return "{" + ",".join(map(str, inside)) + "}"
    if origin in (Union, UnionType):
        return "|".join(dict.fromkeys(kind(part) for part in inside if part is not NoneType))
    if is_sequence(hint):
        fixed = origin is tuple and Ellipsis not in inside
        return ",".join(map(kind, inside)) if fixed else f"{kind(inside[0])},..."
    if origin is dict or hint is dict:
        return "MAPPING"
    return str(getattr(origin or hint, "__name__", hint))


def is_sequence(hint: Any) -> bool:
    """Return whether a type is a list, tuple, set or sequence whose item type is given."""
    origin = get_origin(hint)
    is_listed = isinstance(origin, type) and issubclass(origin, Sequence | set | frozenset)
    return bool(is_listed and get_args(hint))


def is_plain_sequence(hint: Any) -> bool:
    """Return whether a type is a sequence of numbers, words or choices, or none, or a mapping."""
    if get_origin(hint) in (Union, UnionType):
        parts = [p for p in get_args(hint) if p is not NoneType and get_origin(p) is not dict]
        return len(parts) == 1 and is_plain_sequence(parts[0])
    items = [item for item in get_args(hint) if item is not Ellipsis]
    return is_sequence(hint) and all(i in SHORT or get_origin(i) is Literal for i in items)


def _notes(action: Action, required: Collection[str]) -> list[str]:
    needed = (action.required or action.dest in required) and action.nargs != "*"
    notes = ["required"] if needed else []
    if names := _classes(action):
        notes.append(f"known: {', '.join(names)}")
    typed = hasattr(action, "extra_help") and action.option_strings and not needed
    if typed and action.default != SUPPRESS:
        notes.append(f"default: {_default(action.default)}")
    return notes


def _default(value: Any) -> str:
    """Show a default as it would be typed, on one line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return ",".join(map(_default, value)) or "[]"
    short = f"{value:g}".replace("e+", "e") if isinstance(value, float) else ""
    if "e" in short and float(short) == value:  # 1e15 has 18 characters as text
        return short
    text = str(value)
    return textwrap.shorten(text, 40, placeholder=" ...") if " " in text else text


def _classes(action: Action) -> list[str]:
    """Return the classes that an option may name, if they are few and come with its base class."""
    if not hasattr(action, "extra_help"):
        return []
    paths = action.extra_help().removeprefix(", known subclasses: ").split(", ")
    bases = {base.__module__.partition(".")[0] for base in _bases(action._typehint)}  # type: ignore[attr-defined]
    ours = [path for path in paths if path.partition(".")[0] in bases]
    return [path.rpartition(".")[2] for path in ours] if len(ours) <= MOST_CLASSES else []


def _bases(hint: Any) -> Iterator[type]:
    if isinstance(hint, type) and not get_args(hint):
        yield hint
    for part in get_args(hint):
        yield from _bases(part)


LIST = "a list, such as [a, b]"
COMMON_OPTIONS = {
    "help": "Show this help and exit.",
    "print_config": "Print the configuration with all other options applied, and exit.",
    "seed_everything": "Seed of all random numbers.",
}
"""Help in place of that of the libraries."""


class GatesParser(ArgumentParser):
    """ArgumentParser of jsonargparse with one-line errors and exit code 2.

    Args:
        app: Application, for the lookup of configurations.
        verb: The verb that this parser reads; empty for the parser above the verbs.
        verbs: Every verb of the application: names of sections in a configuration.
        kwargs: Passed on to ``ArgumentParser``.
    """

    config_path: Path | None = None
    needed: frozenset[str] = frozenset()  # options that are required, noted by `describe`

    def __init__(
        self, *args: Any, app: str = "", verb: str = "", verbs: tuple[str, ...] = (), **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.app, self.verb, self.verbs = app, verb, verbs

    def format_help(self, formatter: Any = None) -> str:
        """Return plain text, the options of data and model first, those of the Trainer apart."""
        if self._subcommands_action is not None:
            return str(super().format_help(formatter))
        return help_text(self)

    def _only_verb(self) -> Any:
        """Return the parser of the verb, where only one was built."""
        verbs = getattr(self._subcommands_action, "_name_parser_map", {})
        return next(iter(verbs.values())) if len(verbs) == 1 else None

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print one line and exit with code 2, or raise where the caller asked for exceptions."""
        if not self.exit_on_error:
            super().error(message, ex)
        cause: BaseException | None = ex
        while cause is not None:
            if isinstance(cause, GatesError):
                raise cause
            cause = cause.__cause__ or cause.__context__
        parser = getattr(ex, "subcommand_parser", None) or self._only_verb() or self
        config = getattr(parser, "config_path", None)
        if missing := re.search(r"arguments are required: (.+)", message):
            line = lacking(missing.group(1).split(", "), parser.verb, parser.app, config)
        else:
            line = one_line(message, option_names(parser), config)
        print(f"{_prog(parser)}: error: {line}", file=sys.stderr)
        sys.exit(2)


def lacking(names: Sequence[str], verb: str, app: str, config: Path | None = None) -> str:
    """Return one line on which arguments are missing, and where they are usually found.

    Args:
        names: Arguments, such as ``fit.model.network``; one without a dot is not an option.
        verb: The verb that is parsed.
        app: Application, whose packaged configurations are named.
        config: The configuration file that was given.
    """
    keys = [name.removeprefix(f"{verb}.") for name in names]
    if places := [key for key in keys if "." not in key]:
        names = ", ".join(key.upper() for key in places)
        return f"nothing is given for {names}: see gates {app} {verb} --help"
    if config is not None:
        return f"{config} lacks {', '.join(keys)}"
    packaged = packaged_configs(app)
    choices = (
        f"one of {', '.join(packaged)}, or a path" if packaged else f"a file with {', '.join(keys)}"
    )
    return f"no configuration is named: give --config NAME: {choices}"


class TrainerHelp(Action):
    """The ``--help.trainer`` option of every verb that has a Trainer."""

    def __init__(self, option_strings: list[str], dest: str, **kwargs: Any) -> None:
        super().__init__(option_strings, dest=SUPPRESS, nargs=0, default=SUPPRESS, **kwargs)

    def __call__(self, parser: Any, *_: Any) -> NoReturn:
        """Print the options of the Trainer and exit."""
        print(help_text(parser, trainer=True), end="")
        sys.exit(0)


def let_switches_stand_alone(parser: Any) -> None:
    """Let ``--quick`` mean ``--quick true`` for every option that is true or false."""
    for action in parser._actions:
        if getattr(action, "_typehint", None) is bool and action.nargs is None:
            action.nargs, action.const = "?", True


def let_lists_be_plain(parser: Any, words: Sequence[str]) -> list[str]:
    """Return the words with ``--seeds 0,1`` as ``--seeds [0,1]`` where a sequence is expected."""
    lists = {
        name
        for action in parser._actions
        if is_plain_sequence(getattr(action, "_typehint", None))
        for name in action.option_strings
        if not name.endswith("+")
    }
    plain = list(words)
    for name, value in values(plain, lists):
        if not value.strip():
            raise GatesError(f"{name} names nothing: give one value or several, or leave it out")
    for index, word in enumerate(plain):
        name, equals, value = word.partition("=")
        if name in lists and equals:
            plain[index] = f"{name}={_bracketed(value)}"
        elif index and plain[index - 1] in lists:
            plain[index] = _bracketed(word)
    return plain


def values(words: Sequence[str], names: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield the options of these names with their values."""
    for index, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name in names and equals:
            yield name, value
        elif word in names and index + 1 < len(words):
            yield word, words[index + 1]


def _bracketed(value: str) -> str:
    if value.startswith("(") and value.endswith(")"):
        value = value[1:-1]
    closed = value.startswith(("[", "{", "-")) and not re.match(r"-[\d.]", value)
    return value if closed or value in ("", "null") else f"[{value.strip(', ')}]"


def describe(parser: Any, texts: Mapping[str, str]) -> None:
    """Replace the help of options, named without dashes, and note which ones are required."""
    parser.needed = frozenset(action.dest for action in parser._actions if action.required)
    for action in parser._actions:
        action.help = texts.get(action.dest, action.help)


def option_names(parser: Any) -> list[str]:
    """Every option of a parser and of the verbs below it, such as ``--trainer.max_epochs``."""
    names: list[str] = []
    for action in parser._actions:
        names += [name for name in action.option_strings if name.startswith("--")]
        if isinstance(choices := getattr(action, "_name_parser_map", None), dict):
            for below in choices.values():
                names += option_names(below)
    return names


NESTED = r"NestedArg\(key='([^']*)', val='?([^']*?)'?\)"
"""How jsonargparse shows the value of an option of a class."""


def one_line(message: str, options: Iterable[str], config: Path | None = None) -> str:
    """Return in one line what jsonargparse reports in many.

    Args:
        message: The message, possibly with a trace of union types.
        options: Names that are accepted, for a hint when one is misspelled.
        config: The configuration file, named when the fault must lie in it.
    """
    text = re.sub(NESTED, r"\1=\2", " ".join(message.split()))
    keys = re.findall(r'Parser key "([^"]+)"', text)
    where = f"{'.'.join(keys[:1] if 'Subtypes:' in text else keys)}: " if keys else ""
    if match := re.search(r"given class_path '([^']+)': Option '([^']+)' is not accepted", text):
        return f"{where}{match.group(1)} does not accept {match.group(2)!r}"
    if reason := _reason_of_class(message):
        return f"{where}{reason}"
    if match := re.search(r"Problem with given class_path '([^']+)':$", text):
        return f"{where}{match.group(1)} cannot be made and gives no reason; --debug shows where"
    unknown = r"(?:Subcommand '[^']+' does not accept option|Option) '([^']+)'(?: is not accepted)?"
    if match := re.search(unknown, text):
        place = f" in {config}" if config else ""
        return f"unknown key {match.group(1)!r}{place}{_hint(match.group(1), options)}"
    absent = r"(No module named .*?|module '\S+' has no attribute .*?|cannot import .*?"
    absent += r"|[^.:]*\(\S+\.py, line \d+\))"
    if match := re.search(rf"{absent}\. Got value: Namespace\(class_path='([^']+)'", text):
        is_missing = match.group(1).startswith("No module named")
        hint = "; PYTHONPATH=FOLDER adds a folder that is searched" if is_missing else ""
        return f"{where}{match.group(2)} cannot be imported: {match.group(1)}{hint}"
    if match := re.search(r"Subtypes: \[(.*?)\] Errors:.*Given value: (.*)$", text):
        return f"{where}expected {_types(match.group(1))}, found {match.group(2)!r}"
    if match := re.search(r"Expected a (.*)\. Got value: (.*)$", text):
        return f"{where}expected {_types(match.group(1))}, found {match.group(2)!r}"
    if match := re.search(r"Expected a dot import path string: (\S+)", text):
        return f"{where}no class {match.group(1)!r}: give it as package.module.Class"
    if match := re.search(r"unrecognized arguments: (--?[\w.\-]+)", text):
        return text + _hint(match.group(1), options)
    return text


@contextmanager
def constructing() -> Iterator[None]:
    """Turn what a constructor raises inside the ``with`` block into one line.

    What the front door has a line for passes: a file or a package that is missing, a full disk.

    Raises:
        GatesError: A constructor raised something else.
    """
    try:
        yield
    except Exception as error:
        name = (isinstance(error, ModuleNotFoundError) and error.name) or "sys"
        absent = find_spec(name.partition(".")[0]) is None
        full = isinstance(error, OSError) and error.errno in (ENOSPC, EDQUOT)
        missing = isinstance(error, OSError) and error.filename is not None
        if isinstance(error, GatesError) or absent or full or missing:
            raise
        kind, text = type(error).__name__, shorten(str(error), 300)
        reason = f"{kind}: {text}" if text else kind
        raise GatesError(f"a constructor raised {reason}; --debug shows where") from error


def _reason_of_class(message: str) -> str:
    """Return why an object of a class with arguments cannot be made; empty for other messages."""
    lines = message.splitlines()
    for number, line in enumerate(lines):
        if match := re.match(r"(\s*)- Problem with given class_path '([^']+)':$", line):
            depth = len(match.group(1)) + 2
            rest = lines[number + 1 :]
            end = next((n for n, line in enumerate(rest) if _depth(line) < depth), len(rest))
            inner = one_line("\n".join(rest[:end]), ())
            return inner if "Parser key" in rest[0] else f"{match.group(2)}: {inner}"
    if not re.search(r"Given value: Namespace\(class_path=", message):
        return ""
    said = [line.strip()[2:] for line in lines if line.strip().startswith("- ")]
    reasons = [
        line for line in said if not re.match(r"Expected a |Unexpected |Import path |Not a ", line)
    ]
    return reasons[0] if reasons else ""


def _depth(line: str) -> int:
    return len(line) - len(line.lstrip())


def _hint(name: str, options: Iterable[str]) -> str:
    names = sorted({option.lstrip("-") for option in options})
    close = get_close_matches(name.lstrip("-"), names, n=1)
    dashes = "--" if name.startswith("--") else ""
    return f" (did you mean {dashes}{close[0]}?)" if close else ""


def _types(text: str) -> str:
    """``<class 'int'>, <class 'NoneType'>`` as ``int or null``."""
    text = re.sub(r"<class '([\w.]+)'>", lambda m: m.group(1), text).replace("typing.", "")
    text = re.sub(r"Literal\[([^\]]*)\]", lambda m: m.group(1).replace(", ", " | "), text)
    text = re.sub(r"(?:\w+\.)+(\w+)", lambda m: m.group(1), text)
    kinds = re.split(r", (?![^\[]*\])", text.replace("NoneType", "null"))  # not of dict[str, int]
    named = (LIST if kind in ("tuple", "list") else kind for kind in kinds)
    return " or ".join(named).replace(" | ", ", ")


def _prog(parser: Any) -> str:
    return " ".join(str(parser.prog).replace("[options]", "").split())
