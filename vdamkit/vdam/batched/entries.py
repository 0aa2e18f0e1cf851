"""Which rotations and shifts are scored for which particle: plain index arrays on the host, for all particles at once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from vdamkit.sampling.orientations import OrientationGrid
from vdamkit.vdam.posterior import PAIRS


def different(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The different ones of numbers that do not reach far, ascending, without sorting; and the place of each among them."""
    there = np.zeros(int(numbers.max(initial=0)) + 1, bool)
    there[numbers] = True
    return np.flatnonzero(there), np.cumsum(there) - 1


@dataclass(frozen=True)
class Entries:
    """Rotations of a level's grid to be scored, sorted by particle, class and orientation; and each particle's shifts.

    All shifts of a particle are scored at each of its entries. Scores lie one entry after the other.
    """

    particle: np.ndarray  # (m,)
    class_index: np.ndarray  # (m,)
    orientation: np.ndarray  # (m,)
    shift_start: np.ndarray  # (p + 1,) first shift of each particle
    shift: np.ndarray  # (t,) numbers in the level's table of shifts, those of each particle sorted by z, y and x

    @property
    def n_particles(self) -> int:
        return len(self.shift_start) - 1

    @cached_property
    def start(self) -> np.ndarray:
        """First entry of each particle, and their number, `(p + 1,)`."""
        return np.searchsorted(self.particle, np.arange(self.n_particles + 1))

    @cached_property
    def width(self) -> np.ndarray:
        """How many shifts each particle has."""
        return np.diff(self.shift_start)

    @cached_property
    def out(self) -> np.ndarray:
        """Place of each entry's first score, and the number of scores, `(m + 1,)` int64."""
        return np.append(0, np.cumsum(self.width[self.particle], dtype=np.int64))

    @property
    def shift_particle(self) -> np.ndarray:
        """The particle of each shift, `(t,)`."""
        return np.repeat(np.arange(self.n_particles), self.width)

    def shifts_in_use(self) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of the shifts that any particle has, ascending; and each shift's place among them."""
        return different(self.shift)

    def some(self, kept: np.ndarray) -> Entries:
        """Some of the entries, by their numbers; all shifts stay."""
        columns = (column[kept] for column in (self.particle, self.class_index, self.orientation))
        return Entries(*columns, self.shift_start, self.shift)

    @classmethod
    def chosen(cls, mine: np.ndarray, classes: int, n_shifts: int) -> Entries:
        """Each particle's own orientations, `mine` `(p, orientations)` bool, in every class; the same shifts for all."""
        p = len(mine)
        particle, class_index, orientation = np.nonzero(np.broadcast_to(mine[:, None], (p, classes, mine.shape[1])))
        return cls(particle, class_index, orientation, n_shifts * np.arange(p + 1), np.tile(np.arange(n_shifts), p))

    @classmethod
    def everything(cls, n_particles: int, classes: int, orientations: np.ndarray, shifts: np.ndarray) -> Entries:
        """The same orientations and shifts for all particles."""
        each = len(orientations)
        return cls(
            np.repeat(np.arange(n_particles), classes * each), np.tile(np.repeat(np.arange(classes), each), n_particles),
            np.tile(orientations, n_particles * classes), len(shifts) * np.arange(n_particles + 1),
            np.tile(shifts, n_particles),
        )  # fmt: skip

    def with_fine_shifts(self, order: np.ndarray) -> Entries:
        """Coarse shifts replaced by their eight children each; order: all fine shifts, as each particle's are to be sorted."""
        rank = np.empty(len(order), int)
        rank[order] = np.arange(len(order))
        keys = (self.shift_particle * len(order))[:, None] + rank[8 * self.shift[:, None] + np.arange(8)]
        shift = order[np.sort(keys, axis=None) % len(order)]
        return Entries(self.particle, self.class_index, self.orientation, 8 * self.shift_start, shift)

    def children(self, grid: OrientationGrid) -> Entries:
        """Orientations of `grid` replaced by their eight children each, in the grid of the next order."""
        most = 8 * len(grid)
        classes = int(self.class_index.max(initial=0)) + 1
        family = (self.particle * classes + self.class_index) * most
        keys = np.sort((family[:, None] + grid.children_of(self.orientation)).ravel())
        family, orientation = np.divmod(keys, most)
        particle, class_index = np.divmod(family, classes)
        return Entries(particle, class_index, orientation, self.shift_start, self.shift)


@dataclass(frozen=True)
class Rows:
    """The different rotations among some entries, sorted by class and orientation."""

    class_index: np.ndarray  # (r,)
    orientation: np.ndarray  # (r,)
    of_entry: np.ndarray  # (m,) row of each entry

    @classmethod
    def of(cls, entries: Entries, grid: OrientationGrid) -> Rows:
        keys = entries.class_index * len(grid) + entries.orientation
        rows, place = different(keys)
        return cls(*np.divmod(rows, len(grid)), place[keys])

    def pieces(self, most: int, size: np.ndarray | float = 1.0) -> list[slice]:
        """Runs of rows, each of one class, whose sizes sum to at most so much; or single rows."""
        before = np.append(0, np.cumsum(np.broadcast_to(size, self.orientation.shape)))
        ends = np.append(np.flatnonzero(np.diff(self.class_index)) + 1, len(self.class_index))
        out, begin = [], 0
        for end in ends.tolist():
            while begin < end:
                stop = int(np.searchsorted(before, before[begin] + most, "right")) - 1
                out.append(slice(begin, min(max(stop, begin + 1), end)))
                begin = out[-1].stop
        return out


def most_likely(
    entries: Entries, sample: tuple[np.ndarray, np.ndarray, np.ndarray], max_significant: int, classes: int
) -> Entries:
    """Entries and shifts worth refining: those of the best samples, taken in order of weight.

    sample: entry, shift (number in the level's table) and weight of the samples that are significant. Rules as in
    `vdam.posterior`: at most `max_significant` samples per class, and before rotations × shifts exceeds PAIRS times that
    number.
    """
    entry, shift, weight = sample
    cap = max_significant * classes
    order = np.argsort(entries.particle[entry] - weight, kind="stable")  # weights are at most 1
    entry, shift = entry[order], shift[order]
    particle = entries.particle[entry]
    first = np.searchsorted(particle, np.arange(entries.n_particles))
    n_shifts = int(entries.shift.max(initial=0)) + 1
    shift_key = particle * n_shifts + shift

    def seen(keys: np.ndarray) -> np.ndarray:
        """How many different keys the particle has had so far."""
        place, first_place = np.arange(len(keys)), np.empty(int(keys.max()) + 1, int)
        first_place[keys[::-1]] = place[::-1]  # what is written last stays
        new = first_place[keys] == place
        total = np.cumsum(new)
        return total - (total - new)[first][particle]

    rank = np.arange(len(entry)) - first[particle]
    fits = seen(entry) * seen(shift_key) <= PAIRS * cap
    used = (rank == 0) | (fits & (rank < cap))
    kept, _ = different(entry[used])
    owner, number = np.divmod(different(shift_key[used])[0], n_shifts)
    return Entries(
        entries.particle[kept], entries.class_index[kept], entries.orientation[kept],
        np.searchsorted(owner, np.arange(entries.n_particles + 1)), number,
    )  # fmt: skip
