"""Where a person changed something, as the history tells it."""

from __future__ import annotations

import re
from collections.abc import Sequence

from vdamkit.history import Node
from vdamkit.notebook.figures import Mark

CHANGE = re.compile(r"(\w+) (.+) → (.+)")  # as Session.change notes it


def marks_of(line: Sequence[Node]) -> list[Mark]:
    """Where a person changed something: the note of a node speaks of what the next mini-batch used."""
    skip = ("start", "resumed", "all particles scored")
    out = []
    for node in line:
        words = net([part for part in node.note.split("; ") if part and not part.startswith(skip)])
        if words:
            out.append(Mark(node.iteration + 1, "; ".join(words)))
    return out


def net(parts: Sequence[str]) -> list[str]:
    """Parts of a note, where an option that was changed several times, as while it is typed, is told of once."""
    first: dict[str, str] = {}
    last: dict[str, str] = {}
    others = []
    for part in parts:
        changes = [CHANGE.fullmatch(change) for change in part.split(", ")]
        if not all(changes):
            others.append(part)
            continue
        for name, old, new in (change.groups() for change in changes if change):
            first.setdefault(name, old)
            last[name] = new
    return [f"{name} {first[name]} → {new}" for name, new in last.items() if new != first[name]] + others
