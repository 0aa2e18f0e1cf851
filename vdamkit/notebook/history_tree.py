"""The history as a tree to click on: which nodes to show, where they stand, and the buttons."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vdamkit.history import Node

RECENT = 6  # nodes before the current one that are always shown
EVERY = (10, 20, 50, 100, 200, 500)  # and every tenth, or as many fewer as fit side by side
COLUMNS = 13


@dataclass(frozen=True)
class Cell:
    """A node of the tree in a grid: row = branch, column = shown mini-batch."""

    node: int
    row: int
    column: int
    text: str
    hint: str
    current: bool
    on_line: bool
    marked: bool  # something was changed here


def tree_cells(nodes: Sequence[Node], current: int) -> list[Cell]:
    """The nodes worth showing, with their places. The first child continues its parent's row, others open rows below."""
    if not nodes:
        return []
    children: dict[int, list[int]] = {node.number: [] for node in nodes}
    for node in nodes:
        if node.parent is not None:
            children[node.parent].append(node.number)
    line = set()
    at: int | None = current
    while at is not None:
        line.add(at)
        at = nodes[at].parent
    always = {node.number for node in nodes if _worth_showing(node, children[node.number])}
    always |= set(sorted(line)[-RECENT:]) | {current}
    always |= {number for branch in children.values() for number in branch[1:]}  # where a branch begins
    rows = _rows(nodes, children)
    for every in EVERY:
        shown = always | {node.number for node in nodes if node.iteration % every == 0}
        steps = sorted({nodes[n].iteration for n in shown})
        if len(steps) <= COLUMNS:
            break
    columns = {iteration: i for i, iteration in enumerate(steps)}
    out, taken = [], set()
    for number in sorted(shown):
        node = nodes[number]
        place = (rows[number], columns[node.iteration])
        while place in taken:  # a node without a step of its own, such as "all particles scored"
            place = (place[0], place[1] + 1)
        taken.add(place)
        begins = node.parent is not None and rows[node.parent] != rows[number]
        text = "start" if node.parent is None else f"{'↳ ' if begins else ''}{node.iteration}"
        hint = f"after mini-batch {node.iteration}" + (f": {node.note}" if node.note else "")
        if node.report is not None:
            hint += f"; {node.report.resolution:.1f} Å, Pmax {node.report.pmax:.2f}"
        out.append(
            Cell(number, *place, text, hint, number == current, number in line, bool(node.note) and node.parent is not None)
        )
    return out


def _worth_showing(node: Node, children: list[int]) -> bool:
    return node.parent is None or len(children) != 1 or bool(node.note)


def _rows(nodes: Sequence[Node], children: dict[int, list[int]]) -> dict[int, int]:
    """Row of each node, in the order in which branches were begun."""
    rows: dict[int, int] = {}
    last = -1
    for node in nodes:  # parents come before their children
        first_child = node.parent is not None and children[node.parent][0] == node.number
        if first_child:
            rows[node.number] = rows[node.parent]
        else:
            last += 1
            rows[node.number] = last
    return rows


def tree_widget(cells: Sequence[Cell], go_to: Callable[[int], None]) -> Any:
    """The cells as a grid of buttons."""
    import ipywidgets as widgets

    columns = max((cell.column for cell in cells), default=0) + 1
    buttons = []
    for cell in cells:
        button = widgets.Button(
            description=cell.text + (" •" if cell.marked else ""), tooltip=cell.hint,
            layout=widgets.Layout(grid_area=f"{cell.row + 1} / {cell.column + 1}", width="50px", height="26px", padding="0"),
        )  # fmt: skip
        button.style.button_color = "#0072B2" if cell.current else "#B5D5EA" if cell.on_line else "#e4e4e4"
        button.style.text_color = "white" if cell.current else "black"
        button.add_class(f"vk-node-{cell.node}")
        button.on_click(lambda _, number=cell.node: go_to(number))
        buttons.append(button)
    return widgets.GridBox(
        buttons, layout=widgets.Layout(grid_template_columns=f"repeat({columns}, 54px)", grid_gap="4px", overflow="auto",
                                       padding="4px"),
    )  # fmt: skip


def close_widget(widget: Any) -> None:
    """Close a widget, its layout and its style: each is an object of its own in kernel and browser, and would stay there."""
    for part in (widget, widget.layout, getattr(widget, "style", None)):
        if part is not None:
            part.close()
