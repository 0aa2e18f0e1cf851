"""The panel's pictures show the numbers they are given; they are drawn without touching the user's matplotlib."""

import io
import sys
import threading
from dataclasses import replace

import matplotlib
import numpy as np
import pytest
from matplotlib.image import imread

from vdamkit.notebook.figures import (
    Mark,
    compare_figure,
    convergence_figure,
    map_figure,
    moment_spectra,
    png,
    resolution_figure,
)
from vdamkit.notebook.orientation_figure import orientation_figure
from vdamkit.picture import STYLE, house_style

rng = np.random.default_rng(0)


def lines(axis) -> dict:
    return {line.get_label(): np.asarray(line.get_ydata(), float) for line in axis.lines}


def test_slices_are_cut_where_asked():
    volume = rng.normal(size=(16, 16, 16))
    figure = map_figure(volume[None], 5.0, at=(3, 7, 11))
    shown = [np.asarray(axis.images[0].get_array()) for axis in figure.axes[:6]]
    cut = [volume[3], volume[:, 7], volume[:, :, 11], *(volume.sum(i) for i in range(3))]
    for image, wanted in zip(shown, cut, strict=True):
        np.testing.assert_allclose(image[8::17, 8::17], wanted, rtol=1e-5)  # 17 pixels each, the middle one unchanged


def test_every_class_has_a_row():
    figure = map_figure(rng.normal(size=(3, 8, 8, 8)), 5.0, populations=[0.5, 0.3, 0.2])
    assert len(figure.axes) == 18
    axis = figure.axes[6]
    assert any("30 %" in text.get_text() for text in axis.texts) and "y" in axis.get_ylabel()


def test_resolution_shows_the_state(two_steps):
    state = two_steps.state
    figure = resolution_figure(state, two_steps.pixel_size, radius=9)
    ssnr, fsc_axis, spectra, second = figure.axes[:4]
    np.testing.assert_allclose(np.nan_to_num(ssnr.lines[0].get_ydata()), state.data_vs_prior[0][1:])
    np.testing.assert_allclose(lines(fsc_axis)["Wiener factor"], state.wiener[0][1:])
    assert any("pseudo-halves" in label for label in lines(fsc_axis))
    for name, curve, _ in moment_spectra(state, 0):
        np.testing.assert_allclose(np.nan_to_num(lines(spectra)[name]), curve[1:])
    assert second.lines[0].get_ydata().min() >= 0
    assert f"{20 * 16 / state.resolution_shell:.1f} Å" in figure.get_suptitle()


def test_wiener_factor_follows_from_the_spectra_that_are_shown(two_steps):
    """f = snr / (1 + snr), snr = 2 T <|P|> / <|m0 - m1|>: with the P of before, so after one step nearly that."""
    state, before = two_steps.state, two_steps._history.line()[-2].state
    noise = next(curve for name, curve, _ in moment_spectra(state, 0) if name.startswith("noise"))
    signal = next(curve for name, curve, _ in moment_spectra(before, 0) if name.startswith("map"))
    radius = two_steps.report.radius
    snr = 2 * two_steps.report.T * signal[1 : radius - 1] / noise[1 : radius - 1]
    np.testing.assert_allclose(state.wiener[0][1 : radius - 1], snr / (1 + snr), rtol=1e-3)


def test_convergence_shows_every_mini_batch_and_every_change(two_steps):
    reports = two_steps.reports()
    figure = convergence_figure(reports, [Mark(2, "T 4 → 2")], final_T=4)
    np.testing.assert_allclose(figure.axes[0].lines[0].get_ydata(), [r.resolution for r in reports])
    assert lines(figure.axes[5])["T in force"].tolist() == [r.T for r in reports]
    assert "T 4 → 2" in figure.get_supxlabel()
    assert "No mini-batch" in convergence_figure([]).texts[0].get_text()
    split = [reports[0], replace(reports[1], class_populations=(0.7, 0.3))]
    first, second = (lines(convergence_figure(split).axes[3])[f"class {k}"] for k in (1, 2))
    np.testing.assert_array_equal([first[1], second[0], second[1]], [0.7, np.nan, 0.3])


def test_comparison_is_blind_to_the_grey_scale():
    volume = rng.normal(size=(12, 12, 12))
    figure = compare_figure(volume, 0.01 * volume, 5.0, ("a", "b"))
    difference = next(axis for axis in figure.axes if axis.get_title() == "first − second")
    assert np.abs(difference.images[0].get_array()).max() < 1e-9
    curve = next(axis for axis in figure.axes if "shell correlation" in axis.get_ylabel())
    np.testing.assert_allclose(curve.lines[0].get_ydata()[:-1], 1, atol=1e-9)


@pytest.mark.parametrize("widths", [(None, None, None), (None, 10.0, None), (None, 10.0, 15.0), (20.0, 10.0, None)])
def test_orientations_are_counted(widths):
    angles = np.stack([rng.uniform(-180, 180, 60), rng.uniform(60, 120, 60), rng.uniform(-180, 180, 60)], -1)
    classes = np.repeat([0, 1, 2], 20)
    figure = orientation_figure(angles, classes, np.tile([np.nan, 90, 0], (60, 1)), widths)
    assert "40 particles" in figure.get_suptitle()
    tilt = next(axis for axis in figure.axes if axis.get_xlabel() == "tilt (°)")
    top = max(patch.get_y() + patch.get_height() for patch in tilt.patches)
    assert top == np.histogram(angles[20:, 1], np.arange(0, 181, 5.0))[0].max()
    assert bool(tilt.get_legend()) == (widths[1] is not None)


def test_nobody_visited_is_said():
    figure = orientation_figure(np.zeros((5, 3)), np.zeros(5, int), np.full((5, 3), np.nan), (None, None, None))
    assert any("No particle" in text.get_text() for text in figure.texts)


def test_the_users_matplotlib_is_left_alone():
    before = dict(matplotlib.rcParams)
    with matplotlib.rc_context({"font.size": 31, "axes.facecolor": "black"}):
        picture = imread(io.BytesIO(png(map_figure(rng.normal(size=(1, 8, 8, 8)), 5.0))))
        assert picture[2, 2, :3].min() == 1, "white, whatever the user's style is"
    assert dict(matplotlib.rcParams) == before
    if "matplotlib.pyplot" in sys.modules:
        assert not sys.modules["matplotlib.pyplot"].get_fignums()


def test_two_who_draw_at_once_leave_the_users_matplotlib_alone():
    """The panel's painter and a cell; and what the user sets meanwhile counts."""
    with matplotlib.rc_context({"font.size": 31, "axes.facecolor": "black"}):
        before, begun = dict(matplotlib.rcParams), threading.Event()

        def draw():
            begun.set()
            with house_style():
                sizes.append(matplotlib.rcParams["font.size"])

        sizes, other = [], threading.Thread(target=draw)
        with house_style():
            sizes.append(matplotlib.rcParams["font.size"])
            other.start()
            assert begun.wait(10)
            other.join(0.05)  # it would come in now, and leave last
            matplotlib.rcParams["lines.linewidth"] = 7.0
        other.join(10)
        assert sizes == [STYLE["font.size"]] * 2
        assert dict(matplotlib.rcParams) == before | {"lines.linewidth": 7.0}
