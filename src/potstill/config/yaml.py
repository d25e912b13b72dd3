"""YAML with positions: plain values, and the location of each key ("recipe.yaml:7:3").

Scalars are read by YAML 1.2's core rules, so that ``1e-4`` is a number and ``no`` is text (YAML 1.1 reads them the
other way round). Duplicate keys, anchors and tags are errors, and reading a recipe runs no code.
"""

import re
from dataclasses import dataclass, field
from typing import Any, cast

import yaml

from potstill.errors import UsageError

KeyPath = tuple[str | int, ...]  # ("teacher", "training", "lr"); whole numbers are positions in lists

_KINDS = {
    "null": re.compile(r"(?:~|null|Null|NULL|)$"),
    "bool": re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"),
    "int": re.compile(r"[-+]?[0-9]+$"),
    "float": re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$|[-+]?\.inf$|\.nan$"),
}


class _Scalars:
    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012 (the name is PyYAML's)


class _Loader(_Scalars, yaml.SafeLoader):
    """Composes nodes only; ``_value`` converts them, from four kinds of scalars, lists and mappings."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = cast(Any, self).get_event().start_mark  # typed nowhere
            raise yaml.MarkedYAMLError(problem="anchors and aliases are not allowed in recipes", problem_mark=mark)
        return super().compose_node(parent, index)


class _Dumper(_Scalars, yaml.SafeDumper):
    """Quotes text that the loader would read as another type."""


class _FastDumper(_Scalars, getattr(yaml, "CSafeDumper", yaml.SafeDumper)):  # type: ignore[misc]
    """The same by libyaml, in a third of the time; not every PyYAML has it."""


for _kind, _pattern in _KINDS.items():
    for _class in (_Loader, _Dumper, _FastDumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", _pattern, None)


class KeyLocations:
    """The location of each key: a position in a file, or the flag that set it."""

    def __init__(self, default: str = "") -> None:
        self.default = default
        self._locations: dict[KeyPath, str] = {}

    def find(self, path: KeyPath) -> str:
        """Return the location of ``path``, or else of the nearest section around it."""
        for length in range(len(path), -1, -1):
            if path[:length] in self._locations:
                return self._locations[path[:length]]
        return self.default

    def add(self, path: KeyPath, location: str) -> None:
        """Set the location of ``path``."""
        self._locations[path] = location

    def move(self, path: KeyPath, to: KeyPath) -> None:
        """Copy the location of ``path`` to ``to``, and move those of all keys inside it."""
        inside = {key: location for key, location in self._locations.items() if key[: len(path)] == path}
        self._locations = {
            key: location for key, location in self._locations.items() if key not in inside or key == path
        }
        self._locations |= {(*to, *key[len(path) :]): location for key, location in inside.items()}

    def replace(self, path: KeyPath, location: str) -> None:
        """Set the location of ``path`` and of all keys inside it."""
        self._locations = {key: known for key, known in self._locations.items() if key[: len(path)] != path}
        self._locations[path] = location


@dataclass
class Document:
    """A YAML text as plain values."""

    label: str  # the file's name, or the flag that the text came with
    value: Any = None
    locations: KeyLocations = field(default_factory=KeyLocations)
    problems: list[str] = field(default_factory=list)  # "recipe.yaml:7:3: key 'lr' is given twice"

    def format_location(self, mark: Any) -> str:
        """Return the label with line and column, or alone for a flag."""
        return (
            self.label
            if mark is None or self.label.startswith("-")
            else f"{self.label}:{mark.line + 1}:{mark.column + 1}"
        )


def parse_yaml(text: str, label: str) -> Document:
    """Parse one YAML document.  ``label``: the file's name in messages, or the flag's text."""
    document = Document(label, locations=KeyLocations(label))
    try:
        node = _Loader(text).get_single_node()
        document.value = None if node is None else _value(node, (), document)
    except yaml.MarkedYAMLError as error:
        location = document.format_location(error.problem_mark or error.context_mark)
        raise UsageError(f"{location}: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise UsageError(f"{label}: invalid YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise UsageError(f"{label}: nested too deeply") from error
    return document


def dump_yaml(value: Any) -> str:
    """Return plain values as YAML from which ``parse_yaml`` reads the same values."""
    try:
        return _dump(value, _FastDumper)
    except UnicodeEncodeError:  # a path that is not UTF-8 holds parts of characters, which libyaml does not write
        return _dump(value, _Dumper)


def _dump(value: Any, dumper: type[Any]) -> str:
    text: str = yaml.dump(value, Dumper=dumper, sort_keys=False, allow_unicode=True, width=120)
    return text


def _value(node: yaml.Node, path: KeyPath, document: Document) -> Any:
    kind = node.tag.removeprefix("tag:yaml.org,2002:")
    if isinstance(node, yaml.MappingNode) and kind == "map":
        return _mapping(node, path, document)
    if isinstance(node, yaml.SequenceNode) and kind == "seq":
        for i, child in enumerate(node.value):
            document.locations.add((*path, i), document.format_location(child.start_mark))
        return [_value(child, (*path, i), document) for i, child in enumerate(node.value)]
    if isinstance(node, yaml.ScalarNode) and kind == "str":
        return node.value
    if isinstance(node, yaml.ScalarNode) and kind in _KINDS and _KINDS[kind].match(node.value):
        return _scalar(kind, node.value)
    document.problems.append(f"{document.format_location(node.start_mark)}: tag {node.tag} is not allowed in recipes")
    return None


def _scalar(kind: str, text: str) -> Any:
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    if kind == "int" and len(text) < 100:  # Python refuses to parse thousands of digits
        return int(text)
    return float(text.replace(".inf", "inf").replace(".nan", "nan"))


def _mapping(node: yaml.MappingNode, path: KeyPath, document: Document) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key_node, value_node in node.value:
        location = document.format_location(key_node.start_mark)
        if not isinstance(key_node, yaml.ScalarNode):
            document.problems.append(f"{location}: a key must be text")
            continue
        key = str(key_node.value)
        name, colon, text = key.partition(":")
        if node.flow_style and key_node.style is None and colon and text and value_node.value == "":
            # YAML reads {epochs:3} as a key "epochs:3" without value.
            problem = f"{key!r} needs a space after the colon: {name}: {text}"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=key_node.start_mark)
        if key in result:
            document.problems.append(f"{location}: key {key!r} is given twice")
            continue
        document.locations.add((*path, key), location)
        result[key] = _value(value_node, (*path, key), document)
    return result
