"""YAML as recipes use it: a repeated key is an error, and no value silently becomes another one."""

import re
from typing import Any

import yaml

# What YAML 1.1 makes of text that looks like an ordinary number.
TRAPS = {
    re.compile(r"[-+]?0[0-7_]+"): "with a leading zero, it is of base 8",
    re.compile(r"[-+]?[0-9][0-9_]*(:[0-9]+)+(\.[0-9_]*)?"): "with a colon, it is of base 60",
}
INT, FLOAT, TIMESTAMP = (f"tag:yaml.org,2002:{kind}" for kind in ("int", "float", "timestamp"))


class RecipeError(ValueError):
    """A rule that recipes add to YAML is broken; the message names file and line."""


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, whose dates stay text."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # Not when the mapping is constructed: merged keys (<<) have joined it by then, and they may be replaced.
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            line = key.start_mark.line + 1
            if (key.tag, key.value) in lines:
                first = lines[key.tag, key.value]
                raise RecipeError(
                    f"{self.name}:{line}: the key {key.value!r} is there already, in line {first}; keep one of them"
                )
            lines[key.tag, key.value] = line
        return node

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        """Reads a number; raises RecipeError for one that YAML 1.1 reads in another base than it seems to have."""
        for pattern, reason in TRAPS.items():
            if pattern.fullmatch(node.value):
                raise RecipeError(
                    f"{self.name}:{node.start_mark.line + 1}: {node.value} is not a plain number in YAML: {reason}; "
                    "write a plain number, or put text in quotes"
                )
        return self.construct_yaml_int(node) if node.tag == INT else self.construct_yaml_float(node)

    def construct_date(self, node: yaml.ScalarNode) -> str:
        """Returns a date as it is written; raises ValueError for one that does not exist."""
        self.construct_yaml_timestamp(node)
        return str(node.value)


_Loader.add_constructor(INT, _Loader.construct_number)
_Loader.add_constructor(FLOAT, _Loader.construct_number)
_Loader.add_constructor(TIMESTAMP, _Loader.construct_date)


def load_yaml(text: str, name: str) -> Any:
    """
    Returns the value of a YAML document.

    Args:
        text: the document.
        name: what errors call it, such as the path of its file.

    Raises:
        RecipeError: a key is repeated, or a number is not what it seems to be, with the line.
        yaml.YAMLError, ValueError, RecursionError: the text is not one document of plain values.
    """
    loader = _Loader(text)
    loader.name = name  # in the messages of PyYAML, too
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()
