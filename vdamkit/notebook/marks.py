"""Where a person changed something, as the history tells it."""

from __future__ import annotations

from collections.abc import Sequence

from vdamkit.history import Node
from vdamkit.notebook.figures import Mark


def marks_of(line: Sequence[Node]) -> list[Mark]:
    """Where a person changed something: the note of a node speaks of what the next mini-batch used."""
    skip = ("start", "resumed", "all particles scored")
    out = []
    for node in line:
        words = [part for part in node.note.split("; ") if part and not part.startswith(skip)]
        if words:
            out.append(Mark(node.iteration + 1, "; ".join(words)))
    return out
