"""The known particles: symmetric where they should be, chiral, and any MRC map."""

import mrcfile
import numpy as np
import pytest
from scipy import ndimage
from scipy.spatial.transform import Rotation

from vdamkit.errors import InputError
from vdamkit.simulate.models import asymmetric, gaussian_density, hexamer, load_model

BOX, PIXEL_SIZE = 24, 10.6


def turned(density, rotation):
    """`density` turned about index N // 2 by the scipy rotation `rotation`."""
    centre = density.shape[0] // 2
    grid = np.indices(density.shape)[::-1].reshape(3, -1) - centre  # xyz
    points = rotation.inv().as_matrix() @ grid + centre
    return ndimage.map_coordinates(density, points[::-1], order=3).reshape(density.shape)


def correlation(a, b):
    return np.corrcoef(a.ravel(), b.ravel())[0, 1]


def mirrored(density):
    """Mirror image in the plane x = 0 of the particle; the box is even, so index 0 has no partner."""
    return np.roll(density[:, :, ::-1], 1, axis=2)


def low_passed(density, resolution):
    frequency = np.linalg.norm(np.stack(np.meshgrid(*[np.fft.fftfreq(BOX, PIXEL_SIZE)] * 3)), axis=0)
    return np.fft.ifftn(np.fft.fftn(density) * (frequency < 1 / resolution)).real


def test_a_gaussian_lies_where_it_is_put():
    density = gaussian_density(np.array([[21.2, 0, -10.6]]), np.array([8.0]), np.ones(1), box=16, pixel_size=10.6)
    assert np.unravel_index(density.argmax(), density.shape) == (7, 8, 10)
    assert density.max() == 1


@pytest.mark.parametrize(("angle", "same"), [(60, True), (120, True), (180, True), (30, False), (45, False)])
def test_hexamer_is_six_fold_about_z(angle, same):
    density = hexamer(48, 5.3)
    found = correlation(density, turned(density, Rotation.from_euler("z", angle, degrees=True)))
    assert (found > 0.99) if same else (found < 0.9)


def test_hexamer_differs_from_its_mirror_image_at_28_angstrom():
    density = low_passed(hexamer(BOX, PIXEL_SIZE), 28)
    mirror = mirrored(density)
    # With an axis, the mirror image can match only as it stands or upside down, turned about the axis.
    best = max(
        correlation(density, turned(mirror, Rotation.from_euler("xz", [flip, spin], degrees=True)))
        for flip in (0, 180)
        for spin in range(0, 60, 5)
    )
    assert best < 0.9


def test_hexamer_has_top_and_bottom():
    density = hexamer(BOX, PIXEL_SIZE)
    best = max(
        correlation(density, turned(density, Rotation.from_euler("xz", [180, spin], degrees=True))) for spin in range(0, 60, 5)
    )
    assert best < 0.8


def test_asymmetric_particle_has_no_symmetry_and_a_hand():
    density = asymmetric(BOX, PIXEL_SIZE)
    rng = np.random.default_rng(0)  # 200 coarse trials, the symmetric ones among them
    trials = [*Rotation.from_quat(rng.normal(size=(200, 4))), *Rotation.create_group("O")]
    mirror = mirrored(density)
    assert max(correlation(density, turned(mirror, r)) for r in trials) < 0.9
    assert max(correlation(density, turned(density, r)) for r in trials if r.magnitude() > 0.6) < 0.9


@pytest.mark.parametrize("model", [hexamer, asymmetric])
def test_models_fit_a_mask_of_230_angstrom(model):
    density = model(32, PIXEL_SIZE)
    axis = (np.arange(32) - 16) * PIXEL_SIZE
    radius = np.sqrt(axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2)
    assert density.dtype == np.float32
    assert density.shape == (32, 32, 32)
    assert density[radius > 125].sum() < 0.01 * density.sum()


def test_any_map_is_resampled_about_its_centre(tmp_path):
    with mrcfile.new(tmp_path / "fine.mrc") as mrc:
        mrc.set_data(40 * hexamer(60, 5.3))
        mrc.voxel_size = 5.3
    found = load_model(tmp_path / "fine.mrc", box=32, pixel_size=10.6)
    assert found.shape == (32, 32, 32)
    assert found.max() == 1
    assert correlation(found, hexamer(32, 10.6)) > 0.98


def test_a_file_that_is_no_map_is_named(tmp_path):
    (tmp_path / "notes.mrc").write_text("not a map")
    with pytest.raises(InputError, match=r"notes\.mrc"):
        load_model(tmp_path / "notes.mrc", box=32, pixel_size=10.6)
