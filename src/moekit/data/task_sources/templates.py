"""Sentence templates, and sentences drawn from them.

The notation is that of Home Assistant's intents: `(a|b)` one of several, `[a]` or nothing, `(a;b)` all in any order,
`{list}` or `{list:slot}` a value of a list, `<rule>` another template. Templates of a dozen such places stand for
millions of sentences, so a few are drawn. What is drawn depends on the template and a number alone, never on what was
drawn before or on the version of a library.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from moekit.config.errors import DataError

Draw = Callable[[int], int]
"""A number below its argument."""

_DEEPEST = 20
_PIECES = re.compile(r"[()\[\]|;]|\{[^{}]*\}|<[^<>]*>|[^()\[\]|;{}<>]+|.", re.DOTALL)
_TWICE = re.compile(r"\b(\w+)(?: \1\b)+")


@dataclass(frozen=True)
class Piece:
    """A part of a template.

    Attributes: kind: "text", "list", "rule", "sequence", "choice" or "permutation". name: the text, list or rule.
        parts: what the last three kinds hold.
    """

    kind: str
    name: str = ""
    parts: tuple[Piece, ...] = field(default=())


def parse_template(template: str) -> Piece:
    """The pieces of a template.

    Errors: `DataError` where brackets do not match.

    >>> parse_template("light {state}").parts
    (Piece(kind='text', name='light ', parts=()), Piece(kind='list', name='state', parts=()))
    """
    tokens = _PIECES.findall(template)
    piece, end = _group(tokens, 0, template, closing="")
    if end != len(tokens):
        raise DataError(f"the template {template!r} closes a bracket that it does not open")
    return piece


def _group(tokens: list[str], place: int, template: str, closing: str) -> tuple[Piece, int]:
    """What stands from `place` to the bracket that closes it (the end, where that is empty), and the place after."""
    sequences: list[list[Piece]] = [[]]
    separators = set()
    while place < len(tokens) and tokens[place] not in (")", "]"):
        token = tokens[place]
        place += 1
        if token in ("(", "["):
            inner, place = _group(tokens, place, template, ")" if token == "(" else "]")
            optional = Piece("choice", parts=(inner, Piece("text")))
            sequences[-1].append(inner if token == "(" else optional)
        elif token in ("|", ";"):
            separators.add(token)
            sequences.append([])
        elif token in ("{", "}", "<", ">"):
            raise DataError(f"the template {template!r} has a {token} without its other half")
        elif token[0] == "{":
            sequences[-1].append(Piece("list", token[1:-1].split(":")[0]))
        elif token[0] == "<":
            sequences[-1].append(Piece("rule", token[1:-1]))
        else:
            sequences[-1].append(Piece("text", token))
    if len(separators) > 1:
        raise DataError(f"the template {template!r} has | and ; in one bracket")
    if closing:
        if place == len(tokens) or tokens[place] != closing:
            raise DataError(f"the template {template!r} does not close a bracket")
        place += 1
    parts = tuple(Piece("sequence", parts=tuple(sequence)) for sequence in sequences)
    if len(parts) == 1:
        return parts[0], place
    return Piece("choice" if "|" in separators else "permutation", parts=parts), place


def sample_sentences(
    template: str,
    count: int,
    lists: Mapping[str, Callable[[Draw], str]],
    rules: Mapping[str, str],
) -> list[str]:
    """Up to `count` different sentences of a template; fewer where eight times as many draws give no more.

    A word twice in a row, as where a value ends with the word that follows it (`{floor} [floor]`), is said once.

    Args:
        lists: for each list, what draws a value, which may be a template itself.
        rules: for each rule, its template.

    Errors: `DataError` for a list or a rule that is not there, or that holds itself.

    >>> sample_sentences("turn (on|off) [the] {what}", 3, {"what": lambda draw: ("light", "fan")[draw(2)]}, {})
    ['turn off the light', 'turn on light', 'turn on the fan']
    """
    piece = parse_template(template)
    found: dict[str, None] = {}
    for number in range(8 * count):
        sentence = _draw_piece(piece, _draws(f"{template}\0{number}"), lists, rules, 0)
        sentence = _TWICE.sub(r"\1", " ".join(sentence.split()))
        if sentence:
            found.setdefault(sentence)
        if len(found) == count:
            break
    return list(found)


def _draws(seed: str) -> Draw:
    """A source of numbers that depend on the seed and nothing else."""
    count = 0

    def draw(size: int) -> int:
        nonlocal count
        count += 1
        digest = hashlib.sha256(f"{seed}\0{count}".encode()).digest()
        return int.from_bytes(digest[:8], "big") % size

    return draw


def _draw_piece(
    piece: Piece,
    draw: Draw,
    lists: Mapping[str, Callable[[Draw], str]],
    rules: Mapping[str, str],
    depth: int,
) -> str:
    def inner(part: Piece) -> str:
        return _draw_piece(part, draw, lists, rules, depth)

    match piece.kind:
        case "sequence":
            return "".join(inner(part) for part in piece.parts)
        case "choice":
            return inner(piece.parts[draw(len(piece.parts))])
        case "permutation":
            left = list(piece.parts)
            return " ".join(inner(left.pop(draw(len(left)))) for _ in piece.parts)
        case "list" | "rule":
            known: Mapping[str, object] = lists if piece.kind == "list" else rules
            if piece.name not in known:
                raise DataError(f"the {piece.kind} {piece.name!r} is not there")
            if depth == _DEEPEST:
                raise DataError(f"the {piece.kind} {piece.name!r} holds itself")
            template = lists[piece.name](draw) if piece.kind == "list" else rules[piece.name]
            return _draw_piece(parse_template(template), draw, lists, rules, depth + 1)
        case _:
            return piece.name
