"""Each CUDA kernel against its NumPy twin: its source compiled for the CPU everywhere, and on a GPU where there is one."""

import re
import shutil
import subprocess

import numpy as np
import pytest

from vdamkit.backend import twins
from vdamkit.backend.cuda import CudaDevice, _source
from vdamkit.backend.device import Device, round_to_tf32
from vdamkit.backend.twins import KZ, SCORE_COST
from vdamkit.imaging.device_projector import DeviceProjector
from vdamkit.imaging.projector import Projector
from vdamkit.imaging.turns import Turns, turns_of
from vdamkit.sampling.orientations import orientation_grid
from vdamkit.vdam.batched.posterior import score_blocks

REALS = [np.float32, np.float64]
TOLERANCE = {True: 2e-5, False: 1e-12}  # in single precision and not, of the largest value: sums go in another order


class Both:
    """A kernel and its twin on the same arguments."""

    def __init__(self, device):
        self.device = device

    def __call__(self, name: str, inputs: list, outputs: list, **options) -> list:
        """Compares what both write into copies of `outputs`; returns what the kernel wrote."""
        there = [np.array(a) for a in outputs]
        getattr(twins, name)(*inputs, *there, **options)
        on_device = [self.device.put(a) if isinstance(a, np.ndarray) else a for a in inputs]
        here = [self.device.put(a) for a in outputs]
        getattr(self.device.kernels, name)(*on_device, *here, **options)
        found = [self.device.get(a) for a in here]
        single = any(getattr(a, "dtype", None) in (np.float32, np.complex64) for a in (*inputs, *outputs))
        for a, b in zip(found, there, strict=True):
            if a.dtype.kind in "iu" and name != "tilt_adjoint":
                np.testing.assert_array_equal(a, b)
            else:
                wide = np.float64 if a.dtype.kind == "i" else a.dtype
                atol = TOLERANCE[single] * np.abs(b).max()
                np.testing.assert_allclose(a.astype(wide), b.astype(wide), rtol=0, atol=atol)
        return found


@pytest.fixture
def both(cuda):
    device = CudaDevice(0)
    with device.active():
        yield Both(device)


def ragged(rng, sizes):
    return np.append(0, np.cumsum(sizes)).astype(np.int64), rng.normal(size=int(np.sum(sizes)))


def normal(rng, real, *shape):
    return rng.normal(size=shape).astype(real)


def complex_normal(rng, real, *shape):
    return (rng.normal(size=shape) + 1j * rng.normal(size=shape)).astype(np.result_type(real, np.complex64))


@pytest.mark.parametrize("real", REALS)
def test_projector_kernels(both, real):
    """Tilt, spin and their adjoints with the tables of a real projector and grid."""
    rng = np.random.default_rng(0)
    projector = Projector(20, 9, real)
    tables = DeviceProjector(projector, Device())
    grid = orientation_grid(1, "C3")
    turns = turns_of(grid, 5.0, np.flatnonzero(rng.random(len(grid)) < 0.4))
    spins, d, p = turns.spins, len(turns.tilts), projector
    assert (spins[:, 2:] >= 0).sum() == len(turns.direction) > len(spins)
    moved, half_width = tables._matrices(turns.tilts), p.grid.half_width
    cube = p.grid.from_map(rng.normal(size=(20,) * 3))
    (slabs,) = both(
        "tilt", [cube, moved, tables._source, tables._source_at, half_width], [np.zeros((d, tables.slab_size), p.complex)]
    )
    rows, shape = np.zeros((len(turns.direction), len(tables.order)), p.complex), (tables.depth, p.width)
    both("spin", [slabs, spins, *tables._taps(turns.psis), tables.pair, tables._turned, *shape], [rows])
    values, weights = complex_normal(rng, real, 2, *rows.shape), rng.random((2, *rows.shape)).astype(real)
    start = np.searchsorted(spins[:, 0], np.arange(d + 1)).astype(np.int32)
    (back,) = both(
        "spin_adjoint", [values, weights, start, spins, *tables._sources(turns.psis), tables._needed, 2.3, *shape],
        [np.full((d, tables.slab_size, 2, 4), np.nan, real)],
    )  # fmt: skip
    both("tilt_back", [back, moved, tables._points, half_width, *shape], [np.zeros((2, 3, p.grid.size))])


def test_a_tile_has_room_for_its_columns():
    """At no angle do more columns of the half-ball bear on a tile than its block of threads has memory for."""
    room = int(re.search(r"#define COLUMNS (\d+)", _source())[1])
    tables = DeviceProjector(Projector(48, 22), Device())
    ranges = tables._sources(np.linspace(0, 89, 90))[0]
    assert 361 <= np.diff(ranges).max() <= room


@pytest.mark.parametrize("real", REALS)
def test_columns_are_left_out_where_they_do_not_reach(real):
    """Of a ball a good part of the columns does not reach a layer; every one that does is there."""
    tables = DeviceProjector(Projector(40, 18, real), Device())
    ranges, _, count, *_ = tables._sources(np.array([0.0, 35.0]))
    for layers in ranges:
        for layer, tiles in enumerate(layers):
            for (first, end), (_, whole) in zip(tiles, layers[0], strict=True):
                low = layer * KZ[np.dtype(real).itemsize]
                assert (count[first:end] > low).all() and not (count[end:whole] > low).any()
    listed = np.diff(ranges).sum((0, 2, 3))
    assert listed[0] == len(count) and listed.sum() < 0.9 * len(listed) * len(count)


@pytest.mark.parametrize("real", REALS)
def test_tilt_adjoint(both, real):
    """Planes that go to two owners, in whole numbers."""
    rng = np.random.default_rng(7)
    projector = Projector(16, 6, real)
    tables = DeviceProjector(projector, Device())
    moved = tables._matrices(orientation_grid(1, "C3").tilts(5.0))
    owner = (np.arange(len(moved)) % 2).astype(np.int32)
    shape, grid = (2, len(moved), tables.slab_size), projector.grid
    samples, weights = complex_normal(rng, real, *shape), rng.random(shape).astype(real)
    both(
        "tilt_adjoint",
        [samples, weights, moved, owner, tables._source, tables._source_at, grid.half_width, (2.0**40, 2.0**42)],
        [np.zeros((2, 2, 3, grid.size), np.int64)],
    )


@pytest.mark.parametrize("real", REALS)
def test_collect(both, real):
    rng = np.random.default_rng(0)
    rows, order = rng.integers(0, 5, 9).astype(np.int32), rng.permutation(300).astype(np.int32) - 1
    for values in (normal(rng, real, 5, 400), complex_normal(rng, real, 5, 400)):
        both("collect", [values, rows, order], [np.zeros((9, 300), values.dtype)])


@pytest.mark.parametrize("real", REALS)
def test_phases(both, real):
    rng = np.random.default_rng(0)
    k = rng.integers(-20, 20, (300, 3)).astype(np.int32)
    out = np.zeros((7, 300), np.result_type(real, np.complex64))
    both("phases", [rng.uniform(-0.2, 0.2, (7, 3)), k], [out])


@pytest.mark.parametrize("real", REALS)
def test_moved_pairs(both, real):
    """Pairs whose second voxel, or both, are not there; images with more voxels than phases."""
    rng = np.random.default_rng(0)
    pairs = rng.permutation(600).reshape(2, 300).astype(np.int32)
    pairs[1, :5], pairs[:, -1] = -1, -1
    sums = [np.zeros((3 * 4, 300), np.result_type(real, np.complex64)) for _ in range(2)]
    both("moved_pairs", [complex_normal(rng, real, 3, 610), complex_normal(rng, real, 4, 600), pairs], sums)


@pytest.mark.parametrize("tile", SCORE_COST)
@pytest.mark.parametrize("real", REALS)
def test_score(both, real, tile):
    """Particles with more entries and shifts than a tile holds, with few, with none in this piece, and one that is left out."""
    rng = np.random.default_rng(1)
    n, who = 277, np.array([4, 0, 2, 3])
    entries, shifts = [70, 5, 3, 0, 33], [5, 9, 1, 40, 65]
    entry_start, shift_start = (np.append(0, np.cumsum(a)).astype(np.int32) for a in (entries, shifts))
    m, t = entry_start[-1], shift_start[-1]
    sizes = np.repeat(shifts, entries)
    out = (np.cumsum(sizes) - sizes).astype(np.int64)
    blocks = score_blocks(who, np.array(entries)[who], np.array(shifts)[who], tile)
    inputs = [
        complex_normal(rng, real, 50, n), complex_normal(rng, real, 5, n + 9), rng.random((5, n + 9)).astype(real),
        complex_normal(rng, real, 12, n), blocks, entry_start, rng.integers(50, size=m).astype(np.int32), out,
        normal(rng, real, m), shift_start, rng.integers(12, size=t).astype(np.int32), normal(rng, real, t),
    ]  # fmt: skip
    both("score", inputs, [np.zeros(int(sizes.sum()), real)], tile=tile)


@pytest.mark.parametrize("real", REALS)
def test_posterior_kernels(both, real):
    """From scores to significant samples; particles with one score, with many, with equal ones, with some not admitted."""
    rng = np.random.default_rng(2)
    widths, per_particle = np.array([7, 1, 33, 20]), np.array([90, 1, 40, 25])
    start, scores = ragged(rng, widths * per_particle)
    scores = (3 * scores).astype(real)
    scores[start[2] : start[2] + 500] = -np.inf
    scores[start[3] : start[4]] = 1.5
    weights, _, _, total, _ = both("normalise", [], [scores, start, np.zeros(4), np.zeros(4), np.zeros(4, np.int64)])
    for fraction, cap in ((0.9, 10**6), (0.999, 30), (0.99999, 10**6)):
        (limit,) = both("threshold", [weights, start, fraction * total, cap], [np.zeros(4, real)])
        particle = np.repeat(np.arange(4), per_particle).astype(np.int32)
        base = np.concatenate([start[i] + widths[i] * np.arange(per_particle[i]) for i in range(4)])
        shift_start = np.append(0, np.cumsum(widths)).astype(np.int32)
        shift, prior = rng.integers(50, size=widths.sum()).astype(np.int32), normal(rng, real, widths.sum())
        line = np.concatenate([np.sort(rng.integers(6, size=width)) for width in widths]).astype(np.int32)
        m = len(base)
        where = [weights, base, 1, particle, shift_start]
        unset = [*np.zeros((2, m), np.int32), *np.zeros((2, m))]
        count, _, mass, _ = both("entry_sums", [*where, line, prior, limit, total], unset)
        kept = np.bincount(particle, count, 4)
        assert (kept[:3] <= cap).all() and kept[3] in (500, min(cap, 500)), "equal weights come together"
        assert np.bincount(particle, mass, 4).max() <= 1 + 1e-6
        first = np.append(0, np.cumsum(count, dtype=np.int64))
        both("samples", [*where, shift, limit, total, first],
             [np.zeros(first[-1], np.int32), np.zeros(first[-1], real)])  # fmt: skip


def test_weights_of_one_matrix_product(both):
    """Entries one after the other in memory, their shifts a row apart."""
    rng = np.random.default_rng(3)
    weights, start = rng.random(3 * 5 * 11), np.arange(4) * 55
    base, particle = np.concatenate([55 * i + np.arange(11) for i in range(3)]), np.repeat(np.arange(3), 11).astype(np.int32)
    shift_start, total, limit = (5 * np.arange(4)).astype(np.int32), np.full(3, 2.0), np.full(3, 0.4)
    where = [weights, base, 11, particle, shift_start]
    unset = [*np.zeros((2, 33), np.int32), *np.zeros((2, 33))]
    count, _, mass, _ = both("entry_sums", [*where, np.zeros(15, np.int32), np.zeros(15), limit, total], unset)
    table = weights.reshape(3, 5, 11)
    np.testing.assert_array_equal(count.reshape(3, 11), (table >= 0.4).sum(1))
    np.testing.assert_allclose(mass.reshape(3, 11), np.where(table >= 0.4, table, 0).sum(1) / 2)
    first = np.append(0, np.cumsum(count, dtype=np.int64))
    shift = np.tile(np.arange(5), 3).astype(np.int32)
    both("samples", [*where, shift, limit, total, first], [np.zeros(first[-1], np.int32), np.zeros(first[-1])])
    assert start[-1] == len(weights)


@pytest.mark.parametrize("real", REALS)
def test_column_sums(both, real):
    rng = np.random.default_rng(5)
    both("column_sums", [normal(rng, real, 30, 2, 300)], [normal(rng, np.float64, 2, 300)])


@pytest.mark.parametrize("real", REALS)
def test_shell_sums(both, real):
    """Shells of one voxel, of none, and of more than a block has threads."""
    rng = np.random.default_rng(8)
    voxel, start = rng.permutation(700).astype(np.int32), np.array([0, 1, 1, 9, 700], np.int32)
    both("shell_sums", [rng.normal(size=(3, 720)), normal(rng, real, 720), voxel, start], [np.full((3, 4), np.nan)])


@pytest.mark.parametrize("real", REALS)
def test_own_power(both, real):
    rng = np.random.default_rng(5)
    inputs = [complex_normal(rng, real, 9, 300), rng.random((9, 300)).astype(real), rng.permutation(9).astype(np.int32)]
    both("own_power", [*inputs, np.array([0, 4, 5, 9], np.int32)], [np.full((3, 2, 300), np.nan, real)])


@pytest.mark.parametrize("real", REALS)
def test_row_sums(both, real):
    """Rows with many members, with one, with none; both halves, three optics groups; two blocks of rows; the planes of all
    rows, and of all but the first."""
    rng = np.random.default_rng(4)
    tables = DeviceProjector(Projector(16, 6, real), Device())
    n, members, p = len(tables.order), [3, 0, 1, 6], 5
    m = sum(members)
    count = rng.integers(1, 30, m).astype(np.int32)
    first = (np.cumsum(count) - count).astype(np.int64)
    shift = np.concatenate([np.sort(rng.permutation(99)[:c]) for c in count]).astype(np.int32)
    lines = rng.integers(5, size=(99, 4)).astype(np.int32)
    lines = lines[np.lexsort(lines[:, :3].T)]
    waves = complex_normal(rng, real, 5, 14)
    planes = [len(np.unique(lines[shift[a : a + c], 2])) for a, c in zip(first, count, strict=True)]
    plane_start = np.append(0, np.cumsum(planes)).astype(np.int32)
    samples = [first, count, shift, rng.random(len(shift)).astype(real)]
    row_start = np.append(0, np.cumsum(members)).astype(np.int32)
    columns = [rng.integers(top, size=m).astype(np.int32) for top in (p, 3)] + [rng.random(m).astype(real)]
    images = [complex_normal(rng, real, p, n), rng.random((p, n)).astype(real)] * 2
    rows, half = complex_normal(rng, real, 4, n), np.array([0, 1, 1, 0, 1], np.int32)
    for begin in (0, 1):
        of_member = row_start[begin]
        unset = np.full((plane_start[-1] - plane_start[of_member], len(tables.disc)), np.nan, rows.dtype)
        found = both(
            "wave_planes", [waves, lines, tables.disc, *samples, plane_start], [unset, np.zeros(len(unset), np.int32)],
            first=int(of_member), members=int(m - of_member),
        )  # fmt: skip
        unset = [np.full((2, 4 - begin, n), np.nan, kind) for kind in (rows.dtype, real)]
        both(
            "row_sums",
            [rows[begin:], waves, tables.pair, row_start[begin:], *columns, plane_start, *found, *images, half],
            [*unset, normal(rng, real, 2, 3, n)], rows_at_once=3 - begin,
        )  # fmt: skip


def test_scattering_repeats(cuda):
    """Twice the same, bit for bit; directions in another order, to the rounding of float64 sums."""
    device, rng = CudaDevice(0), np.random.default_rng(5)
    tables = DeviceProjector(Projector(16, 5), device)
    grid, n = orientation_grid(1), len(tables.order)
    tilts, number = grid.tilts(0.0), np.arange(grid.n_directions)
    values, weights = complex_normal(rng, np.float32, 2, len(number), n), rng.random((2, len(number), n)).astype(np.float32)

    def scattered(order):
        turns = Turns.single(tilts[order])
        with device.active():
            out = device.xp.zeros((2, 3, tables.projector.grid.size))
            tables.scatter(turns, device.put(values[:, order]), device.put(weights[:, order]), out)
            return device.get(out)

    first = scattered(number)
    np.testing.assert_array_equal(first, scattered(number))
    np.testing.assert_allclose(first, scattered(rng.permutation(number)), rtol=0, atol=1e-12 * np.abs(first).max())


def test_nvcc_takes_the_source(tmp_path):
    """The source as a device's compiler sees it, in both precisions."""
    source = tmp_path / "kernels.cu"
    source.write_text(_source())
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc")
    for kind in (("-DREAL=float", "-DCOMPLEX=float2", "-DSINGLE"), ("-DREAL=double", "-DCOMPLEX=double2")):
        command = [nvcc, "-ptx", "-arch=sm_80", "-std=c++17", "-Werror=all-warnings", *kind, "-o", "-", str(source)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count(".entry") == _source().count('extern "C"')


# TF32 --------------------------------------------------------------------------------------------------------------------


def test_tf32_rounds_to_ten_bits():
    values = np.array([1.0, 1 + 2**-10, 1 + 2**-11, 1 + 2**-12, -3.1415927, 1e-20], np.float32)
    found = round_to_tf32(values)
    np.testing.assert_array_equal(found[:4], np.array([1, 1 + 2**-10, 1 + 2**-10, 1], np.float32))
    np.testing.assert_allclose(found, values, rtol=2**-11)


def test_tensor_product(cuda):
    """cuBLAS counts by columns; what comes back is a @ b.T of rounded factors."""
    rng, device = np.random.default_rng(6), CudaDevice(0)
    a, b = (rng.normal(size=(m, 5)).astype(np.float32) for m in (3, 4))
    with device.active():
        found, exact = (device.get(device.matmul(device.put(a), device.put(b), tf32=tf32)) for tf32 in (True, False))
    np.testing.assert_allclose(found, Device().matmul(a, b, tf32=True), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(exact, a @ b.T, rtol=1e-5, atol=1e-6)
