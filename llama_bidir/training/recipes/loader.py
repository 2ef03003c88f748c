"""Reads the YAML of recipes strictly: repeated keys and numbers in base 8 or 60 are errors, and dates stay text."""

import re
from typing import Any

import yaml

# Text that looks like an ordinary number, but that YAML 1.1 reads in another base.
TRAPS = {
    re.compile(r"[-+]?0[0-7_]+"): "a leading zero makes it base 8",
    re.compile(r"[-+]?[0-9][0-9_]*(:[0-9]+)+(\.[0-9_]*)?"): "a colon makes it base 60",
}
INT, FLOAT, TIMESTAMP = (f"tag:yaml.org,2002:{kind}" for kind in ("int", "float", "timestamp"))


class RecipeError(ValueError):
    """A recipe breaks a rule that recipes add to YAML. The message names file and line."""


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, whose dates stay text."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # Checked before the mapping is constructed, because merged keys (<<) join it then and may be replaced.
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
        """Reads a number. Raises RecipeError if YAML 1.1 would not read it in base 10."""
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
        name: the name of the document in errors, such as the path of its file.

    Raises:
        RecipeError: a key is repeated, or a number is not in base 10. The message names the line.
        yaml.YAMLError, ValueError, RecursionError: the text is not one document of plain values.
    """
    loader = _Loader(text)
    loader.name = name  # PyYAML's messages name it too
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()
