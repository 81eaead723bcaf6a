"""Trees: dicts, lists and tuples, nested as you like, with tensors as leaves.

The name of a leaf is its path: `layers.0.weight`. Dicts are taken in the order of their keys' names, so that workers
that fill them in another order agree. A single tensor is a tree with one leaf, called `value`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from .errors import BadInputError

ROOT = "value"


class Ordered(dict[str, Any]):
    """A dict whose order counts."""


def _children(tree: Any) -> list[tuple[str, Any]] | None:
    """Named children of a node; `None` for a leaf."""
    if isinstance(tree, Ordered):
        return list(tree.items())
    if isinstance(tree, Mapping):
        named = [(str(key), child) for key, child in tree.items()]
        return sorted(named, key=lambda pair: pair[0])
    if isinstance(tree, (list, tuple)):
        return [(str(index), child) for index, child in enumerate(tree)]
    return None


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(name, leaf) of all leaves, in an order that depends on the names alone."""
    children = _children(tree)
    if children is None:
        yield path or ROOT, tree
        return
    for name, child in children:
        yield from leaves(child, f"{path}.{name}" if path else name)


def rebuild(tree: Any, leaf: Callable[[str], Any], path: str = "") -> Any:
    """A tree of the same form, with `leaf(name)` in the place of each leaf."""
    if isinstance(tree, Mapping):
        rebuilt = {
            key: rebuild(child, leaf, f"{path}.{key}" if path else str(key)) for key, child in tree.items()
        }
        return rebuilt if type(tree) is dict else _like_mapping(tree, rebuilt)
    if isinstance(tree, (list, tuple)):
        children = [
            rebuild(child, leaf, f"{path}.{index}" if path else str(index)) for index, child in enumerate(tree)
        ]
        if isinstance(tree, list):
            return children
        return type(tree)(*children) if hasattr(tree, "_fields") else tuple(children)
    return leaf(path or ROOT)


def _like_mapping(tree: Mapping[Any, Any], rebuilt: dict[Any, Any]) -> Any:
    try:
        return type(tree)(rebuilt)  # type: ignore[call-arg]
    except TypeError:
        return rebuilt


def named(tree: Any) -> dict[str, Any]:
    """Leaves by name; refuses a tree without any, and names that occur twice (`{"a.b": x, "a": {"b": y}}`)."""
    found: dict[str, Any] = {}
    for name, leaf in leaves(tree):
        if name in found:
            raise BadInputError(f"two leaves of the tree are called {name!r}: rename a key")
        found[name] = leaf
    if not found:
        raise BadInputError("the tree has no tensors: a job needs at least one")
    return found

