"""Which nodes of the history are shown, and where."""

from dataclasses import replace

from vdamkit.history import Node
from vdamkit.notebook.history_tree import tree_cells
from vdamkit.settings import Settings


def line_of(n: int) -> list[Node]:
    return [Node(i, i - 1 if i else None, i, Settings(), None, "start" if i == 0 else "") for i in range(n)]


def test_nothing_yet():
    assert tree_cells([], -1) == []


def test_a_long_line_is_thinned_out():
    nodes = line_of(101)
    cells = tree_cells(nodes, 100)
    shown = [nodes[cell.node].iteration for cell in cells]
    assert shown == [0, 20, 40, 60, 80, *range(95, 101)], "what fits side by side"
    assert [nodes[cell.node].iteration for cell in tree_cells(line_of(51), 50)] == [0, 10, 20, 30, 40, *range(45, 51)]
    assert {cell.row for cell in cells} == {0}
    assert [cell.column for cell in cells] == list(range(len(cells)))
    assert [cell.node for cell in cells if cell.current] == [100]


def test_branches_stand_below_where_they_began():
    nodes = line_of(6)
    nodes.append(Node(6, 2, 3, Settings(), None))  # from 2: another 3, 4
    nodes.append(Node(7, 6, 4, Settings(), None))
    cells = {cell.node: cell for cell in tree_cells(nodes, 7)}
    assert cells[7].row == cells[6].row == 1 and cells[2].row == cells[5].row == 0
    assert cells[7].column > cells[6].column > cells[2].column
    assert cells[5].column > cells[7].column, "columns are mini-batches"
    assert cells[6].text.startswith("↳")
    assert [n for n, cell in sorted(cells.items()) if cell.on_line] == [0, 1, 2, 6, 7]


def test_a_change_of_options_is_marked_and_always_shown():
    nodes = line_of(40)
    nodes[13] = replace(nodes[13], note="T 4.0 → 2.0")
    cell = next(cell for cell in tree_cells(nodes, 39) if cell.node == 13)
    assert cell.marked and "T 4.0 → 2.0" in cell.hint


def test_no_two_cells_share_a_place():
    nodes = line_of(12)
    nodes.append(Node(12, 11, 11, Settings(), None, "all particles scored"))  # no step of its own
    nodes += [Node(13 + i, 4, 5, Settings(), None) for i in range(5)]
    cells = tree_cells(nodes, 12)
    assert len({(cell.row, cell.column) for cell in cells}) == len(cells)
