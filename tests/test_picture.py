"""The contact sheet: that it is written, complete, and readable by machine."""

import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure

from vdamkit.errors import OutputError
from vdamkit.picture import contact_sheet, draw_course, draw_fsc, sections
from vdamkit.state import StepReport


def _reports(n):
    return [
        StepReport(
            iteration=i + 1, n_particles=10, resolution=60 - i, radius=8, healpix_order=1, search="global", n_rotations=9,
            T=1 + i, step_size=0.9, pmax=0.1 * i, sigma_offset=5.0, angle_change=1.0, offset_change=1.0,
            class_populations=(1.0,), log_likelihood=-1.0, bad=(), seconds=1.0, timings={},
        )
        for i in range(n)
    ]  # fmt: skip


@pytest.fixture
def volume():
    z, y, x = np.indices((16, 16, 16)) - 8
    return np.exp(-((x - 3) ** 2 + (y - 1) ** 2 + (z + 2) ** 2) / 6)


def test_a_full_sheet_is_a_picture_of_the_right_size(tmp_path, volume):
    path = contact_sheet(
        tmp_path / "new" / "sheet.png", [volume, volume], 10.0, titles=["a", "b"], fsc_curves={"truth": np.linspace(1, 0, 9)},
        reports=_reports(5), heading="heading", radius=60.0, dpi=50,
    )  # fmt: skip
    image = matplotlib.image.imread(path)
    assert image.shape[1] == 480 and image.shape[0] > 300
    assert image[..., :3].min() < 0.1 and image[..., :3].max() == 1
    assert [p.name for p in path.parent.iterdir()] == ["sheet.png"]


def test_maps_alone_make_a_sheet_too(tmp_path, volume):
    assert contact_sheet(tmp_path / "maps.png", [np.zeros_like(volume)], 10.0, dpi=40).exists()


def test_slices_and_projections_are_seen_along_z_y_x(volume):
    slices, projections = sections(volume)
    peaks = [np.unravel_index(image.argmax(), image.shape) for image in projections]
    assert peaks == [(9, 11), (6, 11), (6, 9)]  # (y, x), (z, x), (z, y)
    assert np.array_equal(slices[1], volume[:, 8])


def test_a_folder_that_cannot_be_made_is_said_in_a_sentence(tmp_path, volume):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        contact_sheet(tmp_path / "file" / "sheet.png", [volume], 10.0, dpi=40)


def test_the_fsc_has_both_axes_and_says_the_resolution():
    axis = Figure().subplots()
    draw_fsc(axis, {"truth": np.array([1, 1, 0.9, 0.8, 0.4, 0.2, 0.1, 0.1, 0.0])}, 16, 10.0)
    assert axis.get_xlabel() == "spatial frequency (1/Å)"
    assert axis.child_axes[0].get_xlabel() == "resolution (Å)"
    assert axis.get_legend().get_texts()[0].get_text() == "truth: 42.7 Å"


def test_the_course_shows_resolution_pmax_and_t():
    axis = Figure().subplots()
    draw_course(axis, _reports(4))
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["resolution (left)", "Pmax (right)", "T / 4 (right)"]
    np.testing.assert_allclose(axis.lines[0].get_ydata(), [60, 59, 58, 57])
