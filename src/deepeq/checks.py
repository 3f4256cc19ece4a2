"""Checks of arguments, each with one wording: the name, the value, and what is allowed."""

from typing import Any, get_args


def check_count(name: str, value: Any, *, least: int, owner: object = None) -> None:
    """Raise ValueError unless a value is a whole number of at least `least`.

    Args:
        name: Name of the argument or field.
        value: Its value.
        least: Smallest value that is allowed.
        owner: The object that has the field; None for an argument of a function.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        whose = "" if owner is None else f" of {type(owner).__name__}"
        raise ValueError(f"{name}={value!r}{whose} must be a whole number >= {least}")


def check_choice(name: str, value: Any, choices: Any) -> None:
    """Raise ValueError unless a value is one of the strings of a Literal.

    Args:
        name: Name of the argument or field.
        value: Its value.
        choices: The Literal.
    """
    if value not in get_args(choices):
        raise ValueError(f"{name}={value!r} must be one of {', '.join(map(repr, get_args(choices)))}")
