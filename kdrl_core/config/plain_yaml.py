"""YAML texts as plain values. A hostile text costs little time and memory."""

import re
from collections.abc import Hashable
from functools import lru_cache
from typing import Any

import yaml

MAX_CHARS = 2**17
"""Most characters of a text, as given and with its aliases written out. Shipped recipes have 5,000; a few lines of
aliases can stand for terabytes."""
_MERGE_TAG = "tag:yaml.org,2002:merge"


class NotYamlError(ValueError):
    """Not valid YAML, or longer than a recipe may be."""


class _Loader(yaml.SafeLoader):
    """Safe YAML with three differences: 1e-6 is a number (as in YAML 1.2), 2026-01-31 is a string, keys are unique."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != _MERGE_TAG]
        seen: set[Any] = set()
        for key in keys:
            if isinstance(key, Hashable):  # the standard method refuses the others
                if key in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"key {key!r} stands twice", node.start_mark)
                seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def parse_yaml(text: str, *, hide: bool = False) -> Any:
    """The plain values of a YAML text.

    Args:
        hide: the text may hold a key, so errors show no piece of it.

    Raises:
        NotYamlError: not valid YAML, or too long.
    """
    return _unshared(_parsed(text, hide=hide))


@lru_cache(maxsize=64)  # a process opens its run, or a sweep its cells, again and again
def _parsed(text: str, *, hide: bool) -> Any:
    """As `parse_yaml`, but YAML aliases are one value, and so are the results for equal texts."""
    too_long = f"it has more than {MAX_CHARS:,} characters, aliases written out"
    if len(text) > MAX_CHARS:
        raise NotYamlError(too_long)
    try:
        node = (loader := _Loader(text)).get_single_node()
        if node is None:
            return None
        if _written_out(node, {}) > MAX_CHARS:
            raise NotYamlError(too_long)
        return loader.construct_document(node)
    except NotYamlError:
        raise
    except (yaml.YAMLError, RecursionError) as error:
        if hide:
            raise NotYamlError(_place(error)) from None
        raise NotYamlError(str(error)) from error
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:  # such as `!!int x`
        if hide:
            raise NotYamlError("a value is not of the kind that its tag says") from None
        raise NotYamlError(f"a value is not of the kind that its tag says ({error})") from error


def _place(error: Exception) -> str:
    """Where a YAML text is wrong, without the text."""
    mark = getattr(error, "problem_mark", None)
    where = f"line {mark.line + 1}, column {mark.column + 1}" if mark else "too deeply nested"
    return f"{where} (not shown, as it may hold a key)"


def _written_out(node: yaml.Node, known: dict[int, int]) -> int:
    """About how many characters a node has with its aliases written out, counted without writing them."""
    if (size := known.get(id(node))) is not None:
        return size
    if isinstance(node, yaml.ScalarNode):
        size = 1 + len(node.value)
    else:
        children = node.value if isinstance(node, yaml.SequenceNode) else [part for pair in node.value for part in pair]
        size = 1 + sum(_written_out(child, known) for child in children)
    known[id(node)] = size
    return size


def _unshared(value: Any) -> Any:
    """A copy in which YAML aliases are separate values, so that an override changes one field only."""
    if isinstance(value, dict):
        return {key: _unshared(child) for key, child in value.items()}
    return [_unshared(child) for child in value] if isinstance(value, list) else value
