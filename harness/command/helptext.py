"""The help of a verb: plain text, the options of data and model first."""

import re
import shutil
import textwrap
from argparse import SUPPRESS, Action
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

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
    """Return the help of a parser.

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
    text = re.sub(r":[\w:]+:`~(?:[\w.]*\.)?(\w+)`", r"\1", text)  # :class:`~a.b.C` reads C
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
    """Return whether a type is a list, a tuple or another sequence with a type of its items."""
    origin = get_origin(hint)
    known = isinstance(origin, type) and issubclass(origin, Sequence | set | frozenset)
    return bool(known and get_args(hint))


def is_plain_sequence(hint: Any) -> bool:
    """Return whether a type is a sequence of numbers, words or choices, possibly none."""
    if get_origin(hint) in (Union, UnionType):
        parts = [part for part in get_args(hint) if part is not NoneType]
        return len(parts) == 1 and is_plain_sequence(parts[0])
    items = [item for item in get_args(hint) if item is not Ellipsis]
    return is_sequence(hint) and all(i in SHORT or get_origin(i) is Literal for i in items)


def _notes(action: Action, required: Collection[str]) -> list[str]:
    needed = (action.required or action.dest in required) and action.nargs != "*"
    notes = ["required"] if needed else []
    if known := _classes(action):
        notes.append(f"known: {', '.join(known)}")
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
    text = str(value)
    return textwrap.shorten(text, 40, placeholder=" ...") if " " in text else text


def _classes(action: Action) -> list[str]:
    """Return the classes that an option may name, if they are few and come with its base class."""
    if not hasattr(action, "extra_help"):
        return []
    paths = action.extra_help().removeprefix(", known subclasses: ").split(", ")
    bases = {base.__module__.partition(".")[0] for base in _bases(action._typehint)}  # type: ignore[attr-defined]
    own = [path for path in paths if path.partition(".")[0] in bases]
    return [path.rpartition(".")[2] for path in own] if len(own) <= MOST_CLASSES else []


def _bases(hint: Any) -> Iterator[type]:
    if isinstance(hint, type) and not get_args(hint):
        yield hint
    for part in get_args(hint):
        yield from _bases(part)
