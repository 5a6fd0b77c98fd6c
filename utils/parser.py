"""argparse with long flags in full, defaults in --help, and the types of values."""
import argparse
import os
import re
import shutil
import sys
from collections.abc import Callable

from utils import fail


class Parser(argparse.ArgumentParser):
    """Long flags in full, defaults in --help, mistakes in one line."""

    def __init__(self, description, prog=None):
        super().__init__(prog, description=description, allow_abbrev=False, formatter_class=Formatter)

    def parse_known_args(self, args=None, namespace=None):
        words = sys.argv[1:] if args is None else args
        # a shell expands ~ only where a word begins, and not in quotes
        words = ["=".join(map(os.path.expanduser, word.split("=", 1))) for word in words]
        return super().parse_known_args(words, namespace)

    def error(self, message):
        fail(f"{self.prog}: {message} (--help lists the flags)")


class Formatter(argparse.RawDescriptionHelpFormatter):
    """One line a flag where it fits; in parentheses the value that would run."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=27,
                         width=max(60, min(shutil.get_terminal_size((110, 24)).columns - 2, 110)))

    def _get_help_string(self, action):
        value, words = action.default, action.help or ""
        if action.choices:
            words += f": {' '.join(map(str, action.choices))}"
        if value in (None, argparse.SUPPRESS) or isinstance(action, argparse._StoreTrueAction):
            return words
        if isinstance(value, bool):
            value = "on" if value else "off"
        shown = " ".join(map(str, value)) if isinstance(value, list) else value
        return words + f" ({shown})".replace("%", "%%")

    def _get_default_metavar_for_optional(self, action):
        return {"int": "N", "float": "X", "Path": "DIR"}.get(getattr(action.type, "__name__", None), "NAME")

    def _metavar_formatter(self, action, default):
        return lambda size: (action.metavar or default,) * size

    def _format_action_invocation(self, action):
        if isinstance(action, argparse.BooleanOptionalAction):
            return action.option_strings[0].replace("--", "--[no-]", 1)
        return super()._format_action_invocation(action)


def number(kind: type, low: float, high: float | None = None, word: str | None = None) -> Callable:
    """argparse type: a number of low .. high, which by default is more than anyone can mean, or the word."""
    high = high or {int: 10 ** 6, float: 1e30}[kind]

    def parse(text):
        if text == word:
            return text
        value = kind(text)
        if not low <= value <= high:                                                    # also refuses nan
            raise argparse.ArgumentTypeError(f"{text} is not in {low} .. {high}")
        return value
    parse.__name__ = kind.__name__  # argparse: invalid int value
    return parse


def crop_name(text: str) -> str:
    """argparse type: none, resized (RandomResizedCrop), or pad<pixels> (RandomCrop with padding)."""
    if not re.fullmatch(r"none|resized|pad\d{1,3}", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text!r} is none of: none, resized, pad<pixels>, such as pad4")
    return text


def epoch_range(text: str) -> str:
    """argparse type: first:last:step, epochs from 1 on, up to last; or none."""
    found = re.fullmatch(r"([1-9]\d{0,5}):(\d{1,6}):[1-9]\d{0,5}", text, re.ASCII)
    if text != "none" and not (found and int(found[1]) <= int(found[2])):
        why = "ends before it begins" if found else "is not of the form first:last:step"
        raise argparse.ArgumentTypeError(f"{text!r} {why}; use first:last:step, such as 11:46:5, or none")
    return text


def plain_name(text: str) -> str:
    """argparse type: a word that is safe as part of a folder's name."""
    if len(text) > 100 or text.strip(".") != text or not re.fullmatch(r"\w[\w.-]*", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text!r} is no plain name; use up to 100 letters, digits, '.', "
                                         "'_' and '-', the first no '-'")
    return text
