"""What `vdamkit check` finds, and the progress bar's arithmetic."""

import io
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from vdamkit.backend import get_backend
from vdamkit.checks import check_job, misses_avx512
from vdamkit.imaging.halfball import half_ball
from vdamkit.io.particles import open_particles
from vdamkit.progress import clock, watch
from vdamkit.settings import Settings
from vdamkit.source import ParticleSource

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture(scope="module")
def particles():
    return open_particles(DATA / "stacks2d" / "optimisation_set.star")


def test_the_tutorials_job_is_found_good(particles):
    found = check_job(particles, Settings(symmetry="C6", tilt_prior_width=10))
    assert (found.n_particles, found.box, found.pixel_size, found.optics_groups) == (110, 32, 10.6, 2)
    assert (found.tomograms, found.tilts, found.kind) == (2, 31, "2D stacks")
    assert found.good and not found.warnings
    assert found.batch_sizes == (27, 110)
    assert found.kept == 110 * len(half_ball(16)) * 20
    assert found.kept < found.memory < 4 * 2**30
    assert 0.01 < found.seconds_per_mini_batch < 200
    assert found.seconds == pytest.approx(100 * found.seconds_per_mini_batch)
    assert str(found).endswith("Ready to run.")


def test_volumes_are_named_as_such():
    found = check_job(open_particles(DATA / "volumes3d" / "optimisation_set.star"), Settings(), measure=False)
    assert found.kind == "3D pseudo-subtomograms"
    assert "an unknown time" in str(found)
    assert any("--sigma-tilt" in hint for hint in found.hints)


def test_a_search_with_fewer_candidates_is_expected_to_be_quicker(particles):
    free, group, prior = (
        check_job(particles, settings, measure=False).flops
        for settings in (Settings(), Settings(symmetry="C6"), Settings(symmetry="C6", tilt_prior_width=10))
    )
    assert free > group > prior > 0


def test_everything_wrong_is_said_at_once(particles):
    none = replace(particles, angle_priors=np.full((110, 3), np.nan))
    found = check_job(none, Settings(mask_diameter=900, tilt_prior_width=10, device="cuda:9", mini_batches=5), measure=False)
    assert not found.good
    assert any("Mask diameter 900" in text for text in found.problems)
    assert any("cuda:9" in text for text in found.problems)
    assert any("rlnAngleTiltPrior" in text for text in found.warnings)
    assert any("5 mini-batches are few" in text for text in found.warnings)
    assert "Ready" not in str(found)


def test_a_report_stays_one_screen(particles):
    """Whatever is wrong with however many files; the report itself has all of it."""
    table = particles.table.assign(rlnImageName=[f"missing/{i}.mrcs" for i in range(110)])
    found = check_job(replace(particles, table=table), Settings(mask_diameter=900), measure=False)
    assert len(found.problems) == 111
    lines = str(found).splitlines()
    assert "Mask diameter 900" in lines[5] and lines[11] == "Problem: and 105 more."
    assert len(lines) < 20


def test_a_mask_whose_edge_is_cut_is_a_warning(particles):
    found = check_job(particles, Settings(mask_diameter=300), measure=False)
    assert found.good
    assert any("soft edge" in text and "233.2 Å" in text for text in found.warnings)


def test_a_mask_in_nanometres_is_a_warning(particles):
    found = check_job(particles, Settings(mask_diameter=23), measure=False)
    assert any("2.2 px wide" in text and "Å, not in nm" in text for text in found.warnings)


def test_memory_without_end_holds_every_particle(particles):
    settings = Settings(memory_budget=float("inf"), threads=1)
    assert check_job(particles, settings, measure=False).kept == 110 * len(half_ball(16)) * 20
    source = ParticleSource(particles, settings.replace(T=1), get_backend("cpu", 1)).with_settings(
        settings, get_backend("cpu", 1)
    )
    source.fetch(np.arange(2), 4)
    assert len(source._kept) == 2


def test_a_scratch_folder_that_cannot_be_used_is_a_warning(particles, tmp_path):
    (tmp_path / "file").write_text("")
    found = check_job(particles, Settings(scratch_dir=str(tmp_path / "file")), measure=False)
    assert found.good and any(str(tmp_path / "file") in text for text in found.warnings)
    assert not check_job(particles, Settings(scratch_dir=str(tmp_path)), measure=False).warnings


def test_a_small_memory_budget_is_hinted_at(particles):
    found = check_job(particles, Settings(memory_budget=0.001), measure=False)
    assert any("--memory-budget" in text for text in found.hints)


@pytest.mark.parametrize(
    ("kernel", "cpu", "expected"),
    [("Haswell", "avx2 avx512f", True), ("SkylakeX", "avx2 avx512f", False), ("Haswell", "avx2", False)],
)
def test_missing_avx512_kernels_are_noticed(tmp_path, kernel, cpu, expected):
    (tmp_path / "cpuinfo").write_text(f"flags : {cpu}\n")
    libraries = [{"internal_api": "openblas", "architecture": kernel}, {"internal_api": "openmp"}]
    assert misses_avx512(tmp_path / "cpuinfo", libraries) is expected
    assert misses_avx512(tmp_path / "none", libraries) is False


# progress -----------------------------------------------------------------------------------------------------------


class _Report(SimpleNamespace):
    def __str__(self):
        return f"report {self.iteration}"


def _watched(n, live):
    text, session = io.StringIO(), SimpleNamespace(listeners=[], iteration=0)
    with watch(session, n, file=text, live=live) as bar:
        for i in range(n):
            for listener in session.listeners:
                listener("E-step", 0.4)
                listener("done", 1.0)
            session.iteration += 1
            notes = ("no room",) if i == 1 else ()
            bar.landed(_Report(iteration=i + 1, resolution=40.0, pmax=0.5, T=2.0, notes=notes))
    assert session.listeners == []
    return text.getvalue()


def test_without_a_terminal_there_is_a_line_per_ten_mini_batches_and_for_every_note():
    lines = _watched(23, False).splitlines()
    assert [line.split(";")[0] for line in lines] == ["report 2", "report 10", "report 20", "report 23"]
    assert "left" in lines[0] and "left" not in lines[-1]


def test_on_a_terminal_a_bar_shows_what_was_found():
    text = _watched(3, True)
    assert "mini-batch 3/3" in text and "40.0 Å, Pmax 0.50, T 2.0" in text
    assert text.count("note: mini-batch 2: no room") == 1


def test_a_bar_is_closed_when_a_mini_batch_fails():
    session = SimpleNamespace(listeners=[], iteration=0)
    with pytest.raises(RuntimeError), watch(session, 3, file=io.StringIO(), live=True):
        raise RuntimeError
    assert session.listeners == []


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (61.4, "1:01"), (3725, "1:02:05"), (-1, "0:00")])
def test_clock(seconds, text):
    assert clock(seconds) == text
