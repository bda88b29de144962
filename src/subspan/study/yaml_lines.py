"""A YAML file whose keys know their lines and stand only once: of two equal keys YAML takes the second in silence."""

from pathlib import Path
from typing import Any

import yaml

from subspan.utils.errors import InputError


class Document:
    """The content of a YAML file.

    Attributes:
        value: what ``yaml.safe_load`` returns for it.

    Raises:
        InputError: it cannot be read, is no YAML, or says a key twice; the message names the file and the line.
    """

    def __init__(self, path: Path, example: str) -> None:
        self.path = path
        self._lines: dict[tuple[str, ...], int] = {}
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}; give the path of {example}") from error
        except UnicodeDecodeError as error:
            raise self._no_yaml(error) from error
        try:
            loader = yaml.SafeLoader(text)
            root = loader.get_single_node()
            self._walk(root, ())
        except (yaml.YAMLError, RecursionError) as error:
            raise self._no_yaml(error) from error
        try:  # a scalar may look like a date or a number and be none, which is a ValueError
            self.value: Any = None if root is None else loader.construct_document(root)
        except (yaml.YAMLError, ValueError) as error:
            raise self._no_yaml(error) from error

    def _no_yaml(self, error: Exception) -> InputError:
        return InputError(f"{self.path}: is no YAML: {' '.join(str(error).split())}")

    def _walk(self, node: Any, within: tuple[str, ...]) -> None:
        if isinstance(node, yaml.SequenceNode):
            for number, item in enumerate(node.value):
                self._walk(item, (*within, str(number)))
        if not isinstance(node, yaml.MappingNode):
            return
        for key, value in node.value:
            name, line = (*within, str(key.value)), key.start_mark.line + 1
            if name in self._lines:
                raise InputError(
                    f"{self.path}:{line}: {'.'.join(name)!r} stands in line {self._lines[name]} too; rename or "
                    "remove one"
                )
            self._lines[name] = line
            self._walk(value, name)

    def place(self, *keys: str) -> str:
        """Return ``FILE:LINE`` of a key, or of the last of the ``keys`` that is there; ``FILE`` if none is."""
        for end in range(len(keys), 0, -1):
            if line := self._lines.get(keys[:end]):
                return f"{self.path}:{line}"
        return str(self.path)
