"""What the YAML of a recipe may hold: checked before it is read, so that nothing in it is lost or hangs."""

import re
from pathlib import Path
from typing import Any

import yaml

_LARGEST = 200_000
"""Characters of a recipe; those of this project have at most a few thousand."""
_DEEPEST = 20
_MOST_VALUES = 5_000
_PLAIN = {f"tag:yaml.org,2002:{name}" for name in ("map", "seq", "str", "int", "float", "bool", "null")}
_MISREAD = re.compile(r"[-+]?0[0-9_]+|[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?")
"""Numbers that YAML 1.1 reads in base 8 or 60."""


def check_file(path: Path) -> None:
    """Check the text of a recipe.

    Raises:
        OSError: The file cannot be read.
        ValueError: A key appears twice, the text is too large or too deep, or it holds what no field takes. The message
            names the file and the line.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text at byte {error.start}; save it as UTF-8") from error
    try:
        check(text)
    except ValueError as error:
        raise ValueError(f"{path}, {error}") from error


def check(text: str) -> None:
    """Check a text as `check_file` does.

    Raises:
        ValueError: As there; the message begins with the line.
    """
    if len(text) > _LARGEST:
        raise ValueError(f"line 1: a recipe has at most {_LARGEST:,} characters, and this text has {len(text):,}")
    depth = 0
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):  # events come one by one, without recursion
            starts = isinstance(event, yaml.MappingStartEvent | yaml.SequenceStartEvent)
            depth += starts - isinstance(event, yaml.MappingEndEvent | yaml.SequenceEndEvent)
            if depth > _DEEPEST:
                raise ValueError(f"line {_line(event)}: values are nested more than {_DEEPEST} deep; no field is")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or "the text is not YAML"
        raise ValueError(f"line {mark.line + 1 if mark else 1}: {problem}; mend the YAML") from error
    if root is not None:
        _Count().visit(root)


class _Count:
    """Visits all values, aliases expanded, and stops where there are too many."""

    def __init__(self) -> None:
        self._visited = 0

    def visit(self, node: Any, depth: int = 0) -> None:
        self._visited += 1
        if depth > _DEEPEST:
            raise ValueError(f"line {_line(node)}: values are nested more than {_DEEPEST} deep, aliases expanded")
        if self._visited > _MOST_VALUES:
            raise ValueError(f"line {_line(node)}: a recipe has at most {_MOST_VALUES:,} values, aliases expanded")
        if node.tag not in _PLAIN:
            raise ValueError(f"line {_line(node)}: {node.tag.rpartition(':')[2]} is a type that no field takes")
        if isinstance(node, yaml.SequenceNode):
            for part in node.value:
                self.visit(part, depth + 1)
        elif isinstance(node, yaml.MappingNode):
            self._keys(node)
            for _, part in node.value:
                self.visit(part, depth + 1)
        elif node.tag.endswith(":int") and _MISREAD.fullmatch(node.value):
            raise ValueError(
                f"line {_line(node)}: {node.value} would be read as a number in base 8 or 60; write a decimal number, "
                "or quote it"
            )

    def _keys(self, node: yaml.MappingNode) -> None:
        seen: dict[str, int] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise ValueError(f"line {_line(key)}: a name must be text, not a list or a mapping")
            if key.value in seen:
                raise ValueError(
                    f"line {_line(key)}: {key.value} is there twice, first in line {seen[key.value]}; keep one of them"
                )
            if value.tag.endswith(":null") and not value.value:
                raise ValueError(f"line {_line(key)}: {key.value} has no value; give one, or remove the line")
            seen[key.value] = _line(key)


def _line(node: Any) -> int:
    return node.start_mark.line + 1
