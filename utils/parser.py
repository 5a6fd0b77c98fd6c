"""argparse with long flags in full, defaults in --help, and the types of values."""
import argparse
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from utils import fail


class Parser(argparse.ArgumentParser):
    """Long flags in full, defaults in --help, mistakes in one line."""

    def __init__(self, description, prog=None):
        super().__init__(prog, description=description, allow_abbrev=False, formatter_class=Formatter)

    def parse_known_args(self, args=None, namespace=None):
        found, rest = super().parse_known_args(args, namespace)
        for flag, value in vars(found).items():  # every path: a shell expands ~ only where a word begins
            setattr(found, flag,
                    [expanded(one) for one in value] if isinstance(value, list) else expanded(value))
        return found, rest

    def error(self, message):
        fail(f"{self.prog}: {message} (--help lists the flags)")


def expanded(value):
    """A path or word from ~ on, with the home folder in its place; other values as they are."""
    known = isinstance(value, (str, Path)) and str(value).startswith("~")
    return type(value)(os.path.expanduser(value)) if known else value


class Formatter(argparse.RawDescriptionHelpFormatter):
    """One line a flag where it fits; in parentheses the value that would run."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=27,
                         width=max(60, min(shutil.get_terminal_size((110, 24)).columns - 2, 110)))

    def _get_help_string(self, action):
        value, words = action.default, action.help or ""
        if action.choices and self._get_default_metavar_for_optional(action) == "NAME":
            words += f": {' '.join(map(str, action.choices))}"
        plain_switch = isinstance(value, bool) and action.nargs == 0 and len(action.option_strings) == 1
        if value in (None, argparse.SUPPRESS) or plain_switch:
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
    if text not in ("none", "resized") and not (re.fullmatch(r"pad\d{1,3}", text, re.ASCII)):
        raise argparse.ArgumentTypeError(f"{text!r} is none of: none, resized, pad<pixels>, such as pad4")
    return text


def epoch_range(text: str) -> str:
    """argparse type: first:last:step, epochs from 1 on, the last among them; or none."""
    if text != "none" and not re.fullmatch(r"[1-9]\d{0,5}:\d{1,6}:[1-9]\d{0,5}", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form first:last:step, such as 11:46:5")
    if text != "none" and int(text.split(":")[0]) > int(text.split(":")[1]):
        raise argparse.ArgumentTypeError(f"{text!r} ends before it begins; use first:last:step, such as "
                                         "11:46:5, or none")
    return text


def plain_name(text: str) -> str:
    """argparse type: a word that is safe as part of a folder's name."""
    if len(text) > 100 or text.strip(".") != text or not re.fullmatch(r"[\w.-]+", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text!r} is no plain name; use up to 100 letters, digits, '.', "
                                         "'_' and '-'")
    return text
