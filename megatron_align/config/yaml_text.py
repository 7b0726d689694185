"""Read YAML that people wrote: mistakes are errors with their line, and no text takes more than seconds or megabytes.

The values are those of PyYAML's safe loader, with two differences: ``1e6`` is a number (as in YAML 1.2), and a date is
text. A key that is given twice is an error, where YAML loaders silently take the last.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import yaml

from megatron_align.config.paths import expand_home
from megatron_align.errors import InputError, one_line, require

MOST_BYTES = 8_000_000
MOST_NODES = 500_000  # with every alias written out
DEEPEST = 30
_PREFIX = "tag:yaml.org,2002:"
_TAGS = {_PREFIX + kind for kind in ("str", "int", "float", "bool", "null", "map", "seq", "merge", "value")}


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with limits; raises only YAMLError and ValueError."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.depth > DEEPEST:
            raise yaml.MarkedYAMLError(
                problem=f"nested deeper than {DEEPEST} levels", problem_mark=self.peek_event().start_mark
            )
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def check(self, node: yaml.Node, sizes: dict[int, int]) -> int:
        """Check tags, repeated keys and size of a node; return its number of nodes with every alias written out.

        Args:
            node: to check.
            sizes: by ``id``, of the nodes seen so far; 0: a node that is being checked, so that it holds itself.
        """
        if (size := sizes.get(id(node))) is not None:
            if size == 0:
                raise yaml.MarkedYAMLError(problem="an alias holds itself", problem_mark=node.start_mark)
            return size
        if node.tag not in _TAGS:
            raise yaml.MarkedYAMLError(
                problem=f"the tag {node.tag.replace(_PREFIX, '!!')} is not read", problem_mark=node.start_mark
            )
        if isinstance(node, yaml.ScalarNode) and node.tag not in (_PREFIX + "str", self._plain_tag(node)):
            raise yaml.MarkedYAMLError(
                problem=f"'{node.value[:80]}' is no {node.tag.replace(_PREFIX, '!!')}",
                problem_mark=node.start_mark,
            )
        sizes[id(node)] = 0
        size = 1
        if isinstance(node, yaml.MappingNode):
            keys: set[str] = set()
            for key, value in node.value:
                if isinstance(key, yaml.ScalarNode):
                    if key.value in keys:
                        raise yaml.MarkedYAMLError(
                            problem=f"the key '{key.value[:80]}' is given twice", problem_mark=key.start_mark
                        )
                    keys.add(key.value)
                size += self.check(key, sizes) + self.check(value, sizes)
        elif isinstance(node, yaml.SequenceNode):
            size += sum(self.check(item, sizes) for item in node.value)
        if size > MOST_NODES:
            raise yaml.MarkedYAMLError(
                problem=f"aliases expand to more than {MOST_NODES:,} values", problem_mark=node.start_mark
            )
        sizes[id(node)] = size
        return size

    def _plain_tag(self, node: yaml.ScalarNode) -> str:
        """Return the tag that the value has without an explicit one."""
        return self.resolve(yaml.ScalarNode, node.value, (True, False))


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _PREFIX + "timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_EXPONENT = re.compile(r"^[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9]+)[eE][-+]?[0-9]+$")
_Loader.add_implicit_resolver(_PREFIX + "float", _EXPONENT, list("-+.0123456789"))


def read_yaml(path: str, holds: str = "sections (model, data, train, ...)") -> dict[str, Any]:
    """Read a mapping from a YAML file; ``holds``: what it is of, for errors.

    Raises:
        InputError: there is no such file, it cannot be read, is no YAML, or holds something else.
    """
    found = expand_home(path)
    require(os.path.isfile(found), f"--config needs a YAML file, found none at '{path}'")
    file = Path(found)
    try:
        size = file.stat().st_size
        require(size <= MOST_BYTES, f"--config needs a YAML file, got {size:,} bytes: is {path} a data file?")
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not valid YAML: it must be text in UTF-8, {error.reason}") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    content = parse_yaml(text, path)
    if not isinstance(content, dict):
        found = "nothing" if content is None else "a list" if isinstance(content, list) else "text"
        raise InputError(f"{path} must hold a mapping of {holds}, got {found}")
    return content


def parse_yaml(text: str, where: str) -> Any:
    """Return the value of a YAML text.

    Args:
        text: one YAML document.
        where: name of the file, for errors.

    Raises:
        InputError: the text is no YAML, repeats a key, or is nested or expanded beyond the limits.
    """
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            loader.check(node, {})
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        reason = ", ".join(filter(None, (error.problem, error.context)))
        raise InputError(f"{where} is not valid YAML{line}: {' '.join(reason.split())}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"{where} is not valid YAML: {one_line(error, 200)}") from error
