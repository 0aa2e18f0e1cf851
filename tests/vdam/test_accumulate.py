"""M-step sums: the gradient of the likelihood by finite differences, noise, populations, invariances."""

from dataclasses import replace

import numpy as np
import pytest
from helpers_vdamkit import Blobs, dense_posterior, grid_row, make_search, plant
from test_posterior import grid_poses, tick

from vdamkit.sampling.orientations import orientation_grid
from vdamkit.sampling.shifts import shift_grid
from vdamkit.vdam.accumulate import Sums, accumulate
from vdamkit.vdam.posterior import run_search
from vdamkit.vdam.search import Level
from vdamkit.vdam.visit import in_chunks

BOX, RADIUS = 12, 5
MAPS = np.stack([Blobs.random(6, reach=3.0, sigma=1.1, seed=s).map(BOX) for s in (1, 2)])
POWER = float((MAPS[0] ** 2).sum()) / BOX**6
COARSE = orientation_grid(0)


@pytest.fixture(autouse=True, params=["as matrices", "sample by sample"])
def way(request, monkeypatch):
    """Both ways to form the sums of a group of rotations, whatever its posteriors are like."""
    if request.param == "sample by sample":
        pytest.importorskip("numba", reason="the extra [fast] is not installed")
    monkeypatch.setattr("vdamkit.vdam.accumulate.NARROW", 0 if request.param == "as matrices" else np.inf)
    return request.param


def problem(n: int = 6, dtype: str = "float64", classes: int = 2, sigma2: float = 100.0, **changes):
    """Search, batch, raw batch and posteriors of a few noisy particles in both halves and two optics groups."""
    options = {"dtype": dtype, "log_class": np.log(np.full(classes, 1 / classes)), "perturbation": 13.0,
               "adaptive_fraction": 0.95} | changes  # fmt: skip
    search = make_search(MAPS[:classes], [Level(COARSE, RADIUS, False)], shift_grid(1, 1) + 0.2, **options)
    poses, _ = grid_poses(search, n, 1, classes)
    index = np.random.default_rng(2).permutation(40)[:n]
    batch, raw = plant(search, poses, sigma2 * POWER, 3, index=index, optics=np.arange(n) % 2)
    rng = np.random.default_rng(4)
    batch = replace(batch, offsets=rng.uniform(-1, 1, (n, 3)), offset_priors=rng.uniform(-1, 1, (n, 3)))
    return search, batch, raw, run_search(search, batch, None, tick)


def sums_of(search, batch, raw, posteriors) -> Sums:
    return accumulate(search, batch, raw, posteriors, 2, tick)


def model_terms(search, batch, posteriors, i: int, volumes):
    """All (class, p, rotated reference, phases) of particle i."""
    projector = search.projector(RADIUS)
    phases = np.exp(-2j * np.pi / BOX * search.coarse_shifts @ projector.ball.k.T)
    p = dense_posterior(search, posteriors[i])
    prepared = [projector.prepare(volume) for volume in volumes]
    for c, r in np.argwhere(p.any(2)):
        yield c, p[c, r], grid_row(search, prepared[c], r), phases


def log_likelihood(search, batch, posteriors, volumes, half: int, k: int) -> float:
    """Expected log-likelihood of one half under fixed weights, of the unmasked data, as a function of the map of class k."""
    total = 0.0
    for i in np.flatnonzero(batch.index % 2 == half):
        for c, p, a, phases in model_terms(search, batch, posteriors, i, volumes):
            if c == k:
                overlap = ((phases * batch.unmasked[i]) @ a.conj()).real
                total += float(p @ overlap - 0.5 * p.sum() * (batch.weight[i] * np.abs(a) ** 2).sum())
    return total


@pytest.mark.parametrize(("half", "k"), [(0, 0), (1, 0), (0, 1), (1, 1)])
def test_sums_are_the_gradient_of_the_likelihood(half, k):
    """Central differences of log L along random changes of the map, weights fixed; and the same through to_map."""
    search, batch, raw, posteriors = problem()
    cube = sums_of(search, batch, raw, posteriors).cubes[k, half, :2]
    grid = search.projector(RADIUS).grid
    rng = np.random.default_rng(5)
    for _ in range(3):
        change = rng.normal(size=(BOX,) * 3)
        values = []
        for step in (1e-3, -1e-3):
            volumes = MAPS.copy()
            volumes[k] += step * change
            values.append(log_likelihood(search, batch, posteriors, volumes, half, k))
        slope = (values[0] - values[1]) / 2e-3
        assert abs(slope) > 1e-3
        assert (grid.from_map(change) * (cube[0] - 1j * cube[1])).real.sum() == pytest.approx(slope, rel=1e-6)
        assert (change * grid.to_map(cube[0] + 1j * cube[1])).sum() / (2 * BOX**3) == pytest.approx(slope, rel=1e-6)


def test_noise_is_the_expected_residual():
    """sum_k |b' - w' A|² over the posterior, per optics group and shell, Friedel-weighted."""
    search, batch, raw, posteriors = problem(adaptive_fraction=1.0)
    found = sums_of(search, batch, raw, posteriors)
    ball = search.projector(RADIUS).ball
    noise, weight = np.zeros((2, ball.n_shells)), np.zeros((2, ball.n_shells))
    for i, group in enumerate(raw.optics):
        for _, p, a, phases in model_terms(search, batch, posteriors, i, MAPS):
            for mass, phase in zip(p, phases, strict=True):
                gap = np.abs(raw.masked[i] * phase - raw.weight[i] * a) ** 2
                noise[group] += mass * np.bincount(ball.shell, gap * ball.weight)
        weight[group] += np.bincount(ball.shell, raw.weight[i] * ball.weight)
    np.testing.assert_allclose(found.noise, noise, rtol=1e-6)
    np.testing.assert_allclose(found.noise_weight, weight, rtol=1e-6)


def test_noise_spectrum_is_recovered():
    """With a sharp posterior at the truth the ratio of the sums is twice the variance per real component."""
    search, batch, raw, posteriors = problem(40, sigma2=0.3, classes=1)
    found = sums_of(search, batch, raw, posteriors)
    estimate = found.noise.sum(0) / found.noise_weight.sum(0) / 2
    assert estimate[2:] == pytest.approx(0.3 * POWER, rel=0.12)


def test_populations_and_offsets():
    search, batch, raw, posteriors = problem(adaptive_fraction=1.0)
    found = sums_of(search, batch, raw, posteriors)
    dense = np.stack([dense_posterior(search, p) for p in posteriors])
    np.testing.assert_allclose(found.class_weight, dense.sum((0, 2, 3)), rtol=1e-9)
    away = batch.offsets[:, None] + search.coarse_shifts - batch.offset_priors[:, None]
    assert found.offset2 == pytest.approx((dense.sum((1, 2)) * (away**2).sum(2)).sum(), rel=1e-9)


def test_weights_are_positive_and_carry_every_voxel():
    search, batch, raw, posteriors = problem(8, adaptive_fraction=1.0)
    found = sums_of(search, batch, raw, posteriors)
    weight = found.cubes[:, :, 2]
    assert weight.min() >= 0
    for half in (0, 1):
        wanted = batch.weight[batch.index % 2 == half].sum()
        assert weight[:, half].sum() == pytest.approx(wanted, rel=0.35)  # six angles psi, some of them on the lattice


def close(a: Sums, b: Sums, tolerance: float) -> None:
    for name in Sums.__dataclass_fields__:
        x, y = np.asarray(getattr(a, name)), np.asarray(getattr(b, name))
        assert np.abs(x - y).max() <= tolerance * np.abs(x).max(), name


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-10), ("float32", 1e-5)])
def test_order_of_particles_does_not_matter(dtype, tolerance):
    search, batch, raw, posteriors = problem(12, dtype)
    order = np.random.default_rng(6).permutation(12)
    shuffled = replace(batch, **{n: getattr(batch, n)[order] for n in batch.__dataclass_fields__})
    other = replace(raw, **{n: getattr(raw, n)[order] for n in raw.__dataclass_fields__})
    again = run_search(search, shuffled, None, tick)
    close(sums_of(search, batch, raw, posteriors), sums_of(search, shuffled, other, again), tolerance)


def test_chunks_add_up():
    search, batch, raw, posteriors = problem(9)
    parts = []
    for part in (np.arange(4), np.arange(4, 9)):
        b = replace(batch, **{n: getattr(batch, n)[part] for n in batch.__dataclass_fields__})
        r = replace(raw, **{n: getattr(raw, n)[part] for n in raw.__dataclass_fields__})
        parts.append(sums_of(search, b, r, [posteriors[i] for i in part]))
    close(sums_of(search, batch, raw, posteriors), parts[0] + parts[1], 1e-10)


@pytest.mark.parametrize(
    ("n", "size", "wanted"),
    [(7, 100, [7]), (110, 100, [110]), (149, 100, [149]), (151, 100, [76, 75]), (1000, 100, [100] * 10)],
)
def test_chunks_have_no_small_rest(n, size, wanted):
    chunks = in_chunks(np.arange(n), size)
    assert [len(chunk) for chunk in chunks] == wanted
    assert np.concatenate(chunks).tolist() == list(range(n))


def test_voxels_a_few_at_a_time_or_all_at_once(monkeypatch):
    case = problem(16, adaptive_fraction=1.0)
    whole = sums_of(*case)
    monkeypatch.setattr("vdamkit.vdam.accumulate.CACHE_BYTES", 0)
    pieces = sums_of(*case)
    for name in Sums.__dataclass_fields__:
        np.testing.assert_allclose(getattr(pieces, name), getattr(whole, name), rtol=1e-9, atol=1e-9)


def test_halves_do_not_mix():
    """A change in the data of an even particle leaves the odd half as it is."""
    search, batch, raw, posteriors = problem(8, classes=1)
    even = np.flatnonzero(batch.index % 2 == 0)[0]
    unmasked = batch.unmasked.copy()
    unmasked[even] *= 2
    a = sums_of(search, batch, raw, posteriors)
    b = sums_of(search, replace(batch, unmasked=unmasked), raw, posteriors)
    np.testing.assert_array_equal(a.cubes[0, 1], b.cubes[0, 1])
    assert np.abs(a.cubes[0, 0] - b.cubes[0, 0]).max() > 0
    np.testing.assert_array_equal(a.cubes[:, :, 2], b.cubes[:, :, 2])


def test_threads_do_not_matter():
    from vdamkit.backend import get_backend

    search, batch, raw, posteriors = problem(8)
    threaded = replace(search, backend=get_backend("cpu", 2), references={}, tables={}, kept={})
    again = run_search(threaded, batch, None, tick)
    close(sums_of(search, batch, raw, posteriors), sums_of(threaded, batch, raw, again), 0.0)


def test_both_ways_agree_in_single_precision(monkeypatch):
    search, batch, raw, posteriors = problem(12, "float32")
    found = []
    for narrow in (0, np.inf):
        monkeypatch.setattr("vdamkit.vdam.accumulate.NARROW", narrow)
        found.append(sums_of(search, batch, raw, posteriors))
    for name in ("cubes", "noise"):
        a, b = (getattr(sums, name) for sums in found)
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * np.abs(a).max())


def laid_out(arrays: list[np.ndarray], rng: np.random.Generator) -> list[np.ndarray]:
    """Copies one behind the other, in any order and with small gaps."""
    gaps = 64 * rng.integers(1, 20, len(arrays))
    memory, out, end = np.zeros(sum(a.nbytes + 64 for a in arrays) + gaps.sum(), np.uint8), list(arrays), 0
    for number in rng.permutation(len(arrays)):
        array = arrays[number]
        out[number] = memory[end : end + array.nbytes].view(array.dtype).reshape(array.shape)
        out[number][:] = array
        end += -(-array.nbytes // 64) * 64 + gaps[number]
    return out


def test_compiled_sums_do_not_depend_on_where_arrays_lie(way, monkeypatch):
    if way == "as matrices":
        pytest.skip("sums sample by sample are compiled")
    from vdamkit.vdam import narrow

    calls, add = [], narrow._add
    monkeypatch.setattr(narrow, "_add", lambda *arrays: (calls.append([np.copy(a) for a in arrays]), add(*arrays))[1])
    sums_of(*problem(12, "float32"))
    for number, arrays in enumerate(calls[:3]):
        seen = set()
        for seed in range(60):
            *_, data, total, noise = laid = laid_out(arrays, np.random.default_rng([number, seed]))
            add(*laid)
            seen.add(data.tobytes() + total.tobytes() + noise.tobytes())
        assert len(seen) == 1
