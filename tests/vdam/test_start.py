"""State 0, accuracy of alignment, auto-sampling, and one whole mini-batch on particles held in memory."""

import numpy as np
import pytest
from helpers_vdamkit import Blobs, random_rotations

from vdamkit.backend import get_backend
from vdamkit.errors import InputError
from vdamkit.imaging.convert import HalfBallParticle
from vdamkit.imaging.device_convert import upload_half_balls
from vdamkit.imaging.halfball import fourier_grid, gather_half_ball, half_ball, map_to_fourier
from vdamkit.imaging.projector import Projector
from vdamkit.sampling.euler import matrix_to_euler
from vdamkit.settings import Settings
from vdamkit.vdam.accuracy import alignment_accuracy, refined_sampling
from vdamkit.vdam.advance import advance
from vdamkit.vdam.start import initial_state
from vdamkit.vdam.visit import Cancelled

BOX, PIXEL = 24, 8.0
OBJECT = Blobs.random(8, reach=5.0, sigma=1.3, seed=6)
CPU = get_backend("cpu", 1)
SETTINGS = Settings(mini_batches=20, mask_diameter=110.0, precision="double", offset_range=1, offset_step=1, threads=1)


class Memory:
    """Particles of one object at random poses with white noise; unmasked data serve as masked ones."""

    box, pixel_size, mask_ndim, n_optics = BOX, PIXEL, 3, 2

    def __init__(self, n: int, sigma2: float, seed: int = 0, grey: float = 1.0):
        rng = np.random.default_rng(seed)
        ball = half_ball(BOX // 2)
        k = np.linalg.norm(ball.k, axis=1)
        self.optics = np.arange(n) % 2
        self.angles, self.offsets = np.zeros((n, 3)), np.zeros((n, 3))
        self.angle_priors, self.offset_priors = np.full((n, 3), np.nan), np.zeros((n, 3))
        self.items = []
        for rotation in random_rotations(n, seed):
            w = 5 * (0.3 + np.cos(0.3 * k + rng.uniform(0, 3)) ** 2)
            white = gather_half_ball(map_to_fourier(rng.normal(size=(BOX,) * 3)), ball) * np.sqrt(2 * BOX**3 * sigma2)
            b = grey * (w * OBJECT.turned(rotation).transform(ball.k, BOX) + np.sqrt(w) * white)
            self.items.append(HalfBallParticle(BOX // 2, b, b, w))

    def __len__(self) -> int:
        return len(self.items)

    def fetch(self, index, radius):
        return [self.items[i].crop(radius) for i in index], np.arange(len(index)), []

    def fetch_on(self, device, index, radius):
        items, at, complaints = self.fetch(index, radius)
        return upload_half_balls(items, radius, device), at, complaints

    def take_notes(self):
        return ()


class Unreadable(Memory):
    """Particles whose files are gone."""

    def fetch(self, index, radius):
        return [], np.zeros(0, int), [f"particle {i}: no file" for i in index]


POWER = float((OBJECT.map(BOX) ** 2).sum()) / BOX**6


@pytest.mark.parametrize(
    ("particles", "said"),
    [(Unreadable(4, POWER), "none of the 4 .* e.g. particle 0: no file"), (Memory(4, 0.0, grey=0.0), "but a constant")],
)
def test_no_start_without_any_particle(particles, said):
    with pytest.raises(InputError, match=said):
        initial_state(particles, SETTINGS, CPU)


@pytest.mark.parametrize("classes", [1, 3])
def test_every_class_starts_with_power_and_its_own_map(classes):
    state = initial_state(Memory(20, POWER), SETTINGS.replace(classes=classes), CPU)
    assert state.maps.shape == (classes, BOX, BOX, BOX)
    # VDAM cannot move a shell that is exactly empty: p(s) = 0 makes the Wiener factor 0
    for volume in state.maps:
        spectrum = fourier_grid(BOX).shell_means(np.abs(map_to_fourier(volume)), BOX // 2)[: BOX // 2]
        assert spectrum.min() > 1e-6 * spectrum.max()
    for i in range(classes):
        for j in range(i):
            a, b = state.maps[i].ravel(), state.maps[j].ravel()
            assert np.linalg.norm(a - b) > 0.05 * np.linalg.norm(a)
    np.testing.assert_allclose(state.class_probability, 1 / classes)
    assert (state.moment1 == 0).all()
    assert (state.moment2 == 1).all()


def test_start_is_blurred_and_reproducible():
    """Nothing but leakage beyond the first shells; the same seed gives the same state, another seed another map."""
    particles = Memory(20, POWER)
    state = initial_state(particles, SETTINGS, CPU)
    np.testing.assert_array_equal(state.maps, initial_state(particles, SETTINGS, CPU).maps)
    assert np.abs(state.maps - initial_state(particles, SETTINGS.replace(seed=1), CPU).maps).max() > 0
    power = np.abs(map_to_fourier(state.maps[0])) ** 2
    k = np.sqrt(sum(np.square(x) for x in np.meshgrid(np.fft.fftfreq(BOX) * BOX, np.fft.fftfreq(BOX) * BOX,
                                                    np.arange(BOX // 2 + 1), indexing="ij")))  # fmt: skip
    assert power[k > 6].sum() < 0.01 * power.sum()


def test_noise_spectrum_is_measured_and_scaled_to_one():
    """White noise of known variance per group; the masks of this test cover the whole box."""
    settings = SETTINGS.replace(mask_diameter=2000.0)
    for grey in (1.0, 50.0):
        particles = Memory(60, 20 * POWER, grey=grey)
        state = initial_state(particles, settings, CPU)
        assert np.median(state.sigma2[:, 1:]) == pytest.approx(1, rel=0.05)
        variance = state.sigma2[:, 6:11] / state.grey_scale**2  # lower shells hold signal too
        np.testing.assert_allclose(variance, grey**2 * 20 * POWER, rtol=0.1)


def test_grey_scale_of_the_data_has_no_effect():
    """Images times 50 or 1/1000: the same start map in internal units."""
    base = initial_state(Memory(20, POWER), SETTINGS, CPU)
    for grey in (50.0, 1e-3):
        other = initial_state(Memory(20, POWER, grey=grey), SETTINGS, CPU)
        np.testing.assert_allclose(other.maps, base.maps, atol=1e-9 * np.abs(base.maps).max())
        np.testing.assert_allclose(other.sigma2, base.sigma2, rtol=1e-9)


# accuracy -----------------------------------------------------------------------------------------------------------

PROJECTOR = Projector(BOX, 10, np.float64)


def euler_angles(n: int) -> np.ndarray:
    return matrix_to_euler(random_rotations(n, 1))


def accuracy(factor: float) -> tuple[float, float]:
    volume = OBJECT.map(BOX)
    weights = np.tile(PROJECTOR.ball.weight * factor / POWER, (6, 1))
    return alignment_accuracy([volume], PROJECTOR, CPU, weights, euler_angles(6), np.random.default_rng(2))


def test_more_weight_means_better_accuracy():
    found = np.array([accuracy(f) for f in (1e-9, 1, 4, 16, 64, 256, 1e5)])
    assert (np.diff(found, axis=0) <= 1e-9).all()
    np.testing.assert_array_equal(found[0], [30, 10])  # the largest error that is asked for
    assert (found[-1] < [0.5, 0.1]).all()
    # small errors cost their square: four times the weight halves them
    np.testing.assert_allclose(found[5] / found[4], 0.5, atol=0.08)


def test_accuracy_of_shifts_from_its_definition():
    """The shift at which sum w |A|² (1 - cos) reaches the threshold, for a spherical object, where all axes are alike."""
    ball = PROJECTOR.ball
    blob = Blobs(np.ones(1), np.zeros((1, 3)), np.array([1.5]))
    volume, power = blob.map(BOX), blob.transform(ball.k, BOX).real ** 2
    weight = ball.weight * 3.0 / power.sum() * 20
    _, found = alignment_accuracy([volume], PROJECTOR, CPU, weight[None], np.zeros((1, 3)), np.random.default_rng(0))
    cost = (weight * power * (1 - np.cos(2 * np.pi / BOX * found * ball.k[:, 0]))).sum()
    assert cost == pytest.approx(-np.log(0.01), rel=0.12)


def test_a_turn_about_the_axis_of_a_round_particle_is_one_of_three():
    """Blobs along z, seen from the side: a change of rot cannot be noticed, one of tilt or psi can."""
    volume = Blobs(np.ones(3), np.array([[0.0, 0, -4], [0, 0, 0], [0, 0, 3]]), np.full(3, 1.5)).map(BOX)
    n = 60
    weights = np.tile(PROJECTOR.ball.weight * 64 / POWER, (n, 1))
    angles = np.tile([40.0, 90.0, -20.0], (n, 1))
    found, _ = alignment_accuracy([volume], PROJECTOR, CPU, weights, angles, np.random.default_rng(0))
    assert 30 / 3 * 0.6 < found < 30 / 3 * 1.4


def test_best_class_counts():
    volumes = [OBJECT.map(BOX) * s for s in (0.01, 1.0)]
    weights = np.tile(PROJECTOR.ball.weight * 16 / POWER, (3, 1))
    both = alignment_accuracy(volumes, PROJECTOR, CPU, weights, euler_angles(3), np.random.default_rng(2))
    worse = alignment_accuracy(volumes[:1], PROJECTOR, CPU, weights, euler_angles(3), np.random.default_rng(2))
    assert both[0] < worse[0]


# sampling -----------------------------------------------------------------------------------------------------------


def sampled(accuracy=(2.0, 0.5), **changes):
    state = initial_state(Memory(4, POWER), SETTINGS, CPU)
    state = state.replace(**({"no_gain": 1, "offset_range": 50.0, "offset_step": 16.0, "offset_change2": 50.0} | changes))
    return refined_sampling(state, SETTINGS, is_stack=True, accuracy=accuracy, pixel_size=2.0)


def test_sampling_is_refined_when_it_has_stalled():
    new = sampled()
    assert (new.healpix_order, new.no_gain) == (2, 0)
    # spread sqrt(50 / 2) = 5 Å, five times that for stacks, at least 1.5 steps; step halved or 1.5 x accuracy
    assert (new.offset_step, new.offset_range) == (8.0, 25.0)


def test_sampling_stays_without_reason():
    same = sampled(no_gain=0)
    assert (same.healpix_order, same.offset_step, same.no_gain) == (1, 16.0, 0)
    assert sampled(accuracy=(25.0, 0.5)).healpix_order == 1  # 15 degrees is finer than 3/4 of the accuracy
    assert sampled(accuracy=(19.9, 0.5)).healpix_order == 2


def test_sampling_stops_at_the_last_order():
    assert sampled(healpix_order=3).healpix_order == 3


def test_steps_never_grow():
    new = sampled(offset_step=1.0, offset_range=3.0)
    assert (new.offset_step, new.offset_range) == (1.0, 3.0)
    for step in (2.0, 4.0, 16.0):
        assert sampled(offset_step=step).offset_step <= step
        assert sampled(offset_step=step).offset_range <= 4 * sampled(offset_step=step).offset_step + 1e-9 or step == 2.0


# a whole mini-batch -------------------------------------------------------------------------------------------------

COARSE = SETTINGS.replace(healpix_order=0, batch_initial=16)  # 60 degrees, 30 after oversampling: quick


@pytest.fixture(scope="module")
def stepped():
    particles = Memory(16, 0.3 * POWER)
    states, reports = [initial_state(particles, COARSE, CPU)], []
    for _ in range(2):
        state, report = advance(states[-1], COARSE, particles, CPU)
        states.append(state)
        reports.append(report)
    return particles, states, reports


def test_map_is_zero_outside_the_mask(stepped):
    r = np.sqrt((np.stack(np.indices((BOX,) * 3) - BOX // 2) ** 2).sum(0))
    outside = r >= COARSE.mask_diameter / (2 * PIXEL) + 5
    assert outside.any()
    for state in stepped[1]:
        assert (state.maps[:, outside] == 0).all()
        assert np.isfinite(state.maps).all()
        assert state.maps.any()


def test_likelihood_grows_and_poses_are_written(stepped):
    _, states, reports = stepped
    assert [s.iteration for s in states] == [0, 1, 2]
    poses = states[2].poses
    assert (poses.last_visit == 2).all()
    assert (poses.class_number == 1).all()
    assert ((poses.pmax > 0) & (poses.pmax <= 1)).all()
    assert np.abs(poses.offsets).max() <= 3 * 2 * PIXEL
    assert reports[1].log_likelihood > reports[0].log_likelihood
    assert reports[0].n_particles == 16


def test_a_mini_batch_is_a_pure_function(stepped):
    """The same state gives the same bits again; the old state is untouched."""
    particles, states, _ = stepped
    again, _ = advance(states[0], COARSE, particles, CPU)
    for name in ("maps", "moment1", "moment2", "sigma2", "wiener"):
        np.testing.assert_array_equal(getattr(again, name), getattr(states[1], name))
    np.testing.assert_array_equal(again.poses.angles, states[1].poses.angles)
    assert states[0].iteration == 0
    assert not states[0].moment1.any()


def test_noise_variance_is_found(stepped):
    """A mini-batch that explains most of the signal leaves the noise; white, known variance (masks ignored here)."""
    _, states, _ = stepped
    from vdamkit.imaging.masks import mask_power

    kept = mask_power(BOX, COARSE.mask_diameter / (2 * PIXEL), 3)
    variance = states[2].sigma2[:, 9:12] * kept / states[2].grey_scale ** 2
    np.testing.assert_allclose(variance, 0.3 * POWER, rtol=0.2)


def test_cancelling_leaves_the_state(stepped):
    particles, states, _ = stepped

    def stop(stage, fraction):
        if fraction > 0.3:
            raise Cancelled

    with pytest.raises(Cancelled):
        advance(states[1], COARSE, particles, CPU, stop)
    assert states[1].iteration == 1
