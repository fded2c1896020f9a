"""Reads, writes and compares TOPv2's bracketed semantic parses, and spells them as JSON.

A parse is a tree of intents (IN:) and slots (SL:) over the words of an utterance:

    [IN:GET_WEATHER weather in [SL:LOCATION boston ] ]

Our JSON form (the paper used one and did not publish it). A node is an object with one key, its label. The value is a
string, the node's words with single spaces, if it has nothing but words; otherwise a list of its parts in order:
strings for runs of words, objects for nodes. No spaces outside strings, non-ASCII letters as they are:

    {"IN:GET_WEATHER":["weather in",{"SL:LOCATION":"boston"}]}
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import groupby
from typing import Literal, NamedTuple

TargetFormat = Literal["parse", "json"]

_LABEL = re.compile(r"(IN|SL):[A-Z0-9_]+")
_MAX_DEPTH = 64  # annotations have at most 8; a model may open brackets for ever, and Python's stack is finite


class ParseError(ValueError):
    """Text that is no semantic parse; the message says what is wrong and where."""


@dataclass(frozen=True)
class Node:
    """An intent or a slot; every node that exists can be written and read back.

    Attributes:
        label: "IN:" or "SL:" and a name of capitals, digits and underscores.
        children: In order; a string is one word, without whitespace and brackets.
        depth: Number of nodes from here to the deepest one below; 1 for a leaf.

    Raises:
        ParseError: A label or a word cannot be written, or the tree is deeper than 64 nodes.
    """

    label: str
    children: tuple["Node | str", ...]
    depth: int = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        _check_label(self.label)
        for child in self.children:
            if isinstance(child, str) and (child.split() != [child] or "[" in child or "]" in child):
                raise ParseError(f"{child!r} in {self.label} is no word: it is empty or has whitespace or brackets")
        depth = 1 + max((child.depth for child in self.children if isinstance(child, Node)), default=0)
        if depth > _MAX_DEPTH:
            raise ParseError(f"{self.label}: nested deeper than {_MAX_DEPTH}")
        object.__setattr__(self, "depth", depth)


def normalise(text: str) -> str:
    """Give any text the official spacing: single spaces, `[` at its label, `]` by itself."""
    return " ".join(re.sub(r"\[\s*", " [", text).replace("]", " ] ").split())


def read_parse(text: str) -> Node:
    """Read a bracketed parse, whatever its whitespace; ParseError, which counts words from 1, if it is none."""
    open_nodes: list[tuple[str, list[Node | str]]] = []
    root: Node | None = None
    for number, word in enumerate(normalise(text).split(), start=1):
        try:
            if root is not None:
                raise ParseError("the parse has ended before it")
            if word.startswith("["):
                _check_label(word[1:])
                open_nodes.append((word[1:], []))
            elif not open_nodes:
                raise ParseError("a parse begins with [IN:")
            elif word == "]":
                label, children = open_nodes.pop()
                node = Node(label, tuple(children))
                if open_nodes:
                    open_nodes[-1][1].append(node)
                else:
                    root = _intent(node)
            else:
                open_nodes[-1][1].append(word)
        except ParseError as error:
            raise ParseError(f"at {number}, {word!r}: {error}") from None
    if root is None:
        still_open = ", ".join(label for label, _ in open_nodes[:3]) or "nothing was opened"
        raise ParseError(f"at the end: no ] for {still_open}" if open_nodes else f"at the end: {still_open}")
    return root


def write_parse(node: Node) -> str:
    """Write the official spelling: single spaces, a space before every `]`."""
    parts = (child if isinstance(child, str) else write_parse(child) for child in node.children)
    return " ".join([f"[{node.label}", *parts, "]"])


def to_json(node: Node) -> str:
    """Write our JSON form, on one line."""
    return json.dumps(_plain(node), ensure_ascii=False, separators=(",", ":"))


def from_json(text: str) -> Node:
    """Read our JSON form, whatever the whitespace; ParseError if it is no JSON, or no tree whose root is an intent."""
    try:
        value = json.loads(text, object_pairs_hook=_node, parse_int=float)  # int() refuses very long numbers
    except json.JSONDecodeError as error:
        raise ParseError(f"at character {error.pos}: no JSON: {error.msg}") from None
    except RecursionError:
        raise ParseError(f"nested deeper than {_MAX_DEPTH}") from None
    if not isinstance(value, Node):
        raise ParseError(f"at the root: got {type(value).__name__}, not an object")
    return _intent(value)


def frame(node: Node) -> Node:
    """Reduce a parse to what it asks for: intents, slots and the words of leaf slots, in order.

    The words of intents and those beside a nested intent in a slot are left out: the decoupled representation of
    Aghajanyan et al. 2020 (arXiv 2009.13655). Frames are compared with ==.
    """
    nodes = tuple(frame(child) for child in node.children if isinstance(child, Node))
    is_leaf_slot = node.label.startswith("SL:") and not nodes
    return node if is_leaf_slot else Node(node.label, nodes)


class FormatEntry(NamedTuple):
    """How answers are written. Both functions raise ParseError on a text that is no parse."""

    encode: Callable[[str], str]  # the annotation, a bracketed parse -> the text a model learns to write
    decode: Callable[[str], Node]  # that text, or what a model wrote -> the tree


TARGET_FORMATS: dict[TargetFormat, FormatEntry] = {
    "parse": FormatEntry(lambda parse: write_parse(read_parse(parse)), read_parse),
    "json": FormatEntry(lambda parse: to_json(read_parse(parse)), from_json),
}


def _check_label(label: str) -> None:
    if not _LABEL.fullmatch(label):
        raise ParseError(f"{label!r} is no label: IN: or SL: and capitals, digits, underscores")


def _intent(node: Node) -> Node:
    if not node.label.startswith("IN:"):
        raise ParseError(f"the root is {node.label}, not an intent")
    return node


def _plain(node: Node) -> dict[str, object]:
    parts: list[object] = []
    for is_word, children in groupby(node.children, key=lambda child: isinstance(child, str)):
        if is_word:
            parts.append(" ".join(child for child in children if isinstance(child, str)))
        else:
            parts += [_plain(child) for child in children if isinstance(child, Node)]
    only_words = not any(isinstance(child, Node) for child in node.children)
    return {node.label: " ".join(map(str, parts)) if only_words else parts}


def _node(pairs: list[tuple[str, object]]) -> Node:
    """Return the node of a JSON object, in which inner objects are nodes already."""
    if len(pairs) != 1:
        raise ParseError(f"an object of keys {[key for key, _ in pairs]}, allowed exactly one")
    ((label, value),) = pairs
    children: list[Node | str] = []
    for part in value if isinstance(value, list) else [value]:
        if isinstance(part, str):
            children += part.split()
        elif isinstance(part, Node) and isinstance(value, list):
            children.append(part)
        else:
            raise ParseError(
                f"in {label}: got {type(part).__name__}, allowed a string or a list of strings and objects"
            )
    return Node(label, tuple(children))
