"""Every mistake in the input gives one sentence that names file, row or column, value and remedy."""

import pandas as pd
import pytest
from bad_cases import LOADING, OPENING
from builders import make_project

from vdamkit.errors import InputError, ParticleError
from vdamkit.io.particles import open_particles, problems


def assert_helpful(error: Exception | str, expected: list[str]) -> None:
    """One line, one sentence, with every expected part."""
    text = str(error)
    for part in expected:
        assert part in text, f"{part!r} is not in: {text}"
    assert text.endswith(".") and "\n" not in text and "; " in text


@pytest.mark.parametrize("case", OPENING)
def test_opening(tmp_path, case):
    mutate, expected = OPENING[case]
    project = make_project(tmp_path)
    mutate(project)
    with pytest.raises(InputError) as caught:
        open_particles(project.write())
    assert_helpful(caught.value, expected)


@pytest.mark.parametrize("case", LOADING)
def test_loading(tmp_path, case):
    kind, mutate, index, expected, in_header = LOADING[case]
    project = make_project(tmp_path, kind)
    mutate(project)
    particles = open_particles(project.write())
    with pytest.raises(ParticleError) as caught:
        particles.load(index)
    assert caught.value.index == index
    expected = ["particles.star", f"row {index + 1}", *expected]
    assert_helpful(caught.value, expected)
    for other in {0, 1, 2} - {index}:
        particles.load(other)
    found = problems(particles)
    assert len(found) == int(in_header)
    if in_header:
        assert_helpful(found[0], expected)


def test_nothing_given():
    with pytest.raises(InputError, match="neither an optimisation set nor a particles file was given"):
        open_particles()


def test_stacks_need_tomograms(tmp_path):
    make_project(tmp_path).write()
    with pytest.raises(InputError) as caught:
        open_particles(particles=tmp_path / "particles.star")
    assert_helpful(caught.value, ["particles.star", "no tomograms file was given", "give"])


def test_corner_coordinates_need_tomograms(tmp_path):
    project = make_project(tmp_path, "volume")
    project.drop("particles.star", "particles", *[f"rlnCenteredCoordinate{axis}Angst" for axis in "XYZ"])
    for axis in "XYZ":
        project.particles[f"rlnCoordinate{axis}"] = 10.0
    project.write()
    with pytest.raises(InputError) as caught:
        open_particles(particles=tmp_path / "particles.star")
    assert_helpful(caught.value, ["particles.star", "rlnCoordinateX", "give tomograms.star"])


def test_folder_without_permission_is_no_crash(tmp_path):
    path = make_project(tmp_path).write()
    (tmp_path / "particles.star").unlink()
    (tmp_path / "particles.star").mkdir()
    with pytest.raises(InputError) as caught:
        open_particles(path)
    assert_helpful(caught.value, ["particles.star", "is a folder", "give"])


def test_bad_trajectories(tmp_path):
    path = make_project(tmp_path).write()
    frame = pd.DataFrame({f"rlnOrigin{axis}Angst": ["a"] for axis in "XYZ"})
    text = "data_01/1\nloop_\n" + "".join(f"_{c} #{i + 1}\n" for i, c in enumerate(frame)) + "1 2 z\n"
    (tmp_path / "motion.star").write_text(text)
    with pytest.raises(InputError) as caught:
        open_particles(path, trajectories=tmp_path / "motion.star")
    assert_helpful(caught.value, ["motion.star", "data_01/1 row 1", "rlnOriginZAngst", "'z'", "correct"])
