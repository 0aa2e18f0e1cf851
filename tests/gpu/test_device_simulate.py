"""Virtual tilt series made on a device: the data that the CPU makes."""

import mrcfile
import numpy as np
import pytest

from vdamkit.backend.device import OutOfDeviceMemory
from vdamkit.errors import SettingsError
from vdamkit.io.star_tables import read_star
from vdamkit.simulate import render, simulate

FEW = {"particles": 6, "volumes": 2, "tomograms": 2, "box": 16, "pixel_size": 20.0, "tilts": 5, "seed": 4}
HALF = 2.0**-10  # of float16's rounding, relative


@pytest.mark.parametrize("options", [{}, {"second_model": "asymmetric", "poses": "random", "variance_ratio": None}])
def test_the_same_data(cuda, tmp_path, options):
    for folder, device in (("cpu", "cpu"), ("gpu", "cuda")):
        simulate(tmp_path / folder, device=device, **FEW, **options)
    files = sorted(path.relative_to(tmp_path / "cpu") for path in (tmp_path / "cpu").rglob("*.mrc*"))
    assert len(files) > 6 + 2 * 2
    for name in files:
        ours, theirs = (np.asarray(mrcfile.read(tmp_path / folder / name), np.float64) for folder in ("gpu", "cpu"))
        np.testing.assert_allclose(ours, theirs, rtol=2 * HALF, atol=1e-4 * np.abs(theirs).max(), err_msg=str(name))
    for name in ("stacks2d/particles.star", "volumes3d/particles.star", "particles_true_poses.star"):
        ours, theirs = (read_star(tmp_path / folder / name)["particles"] for folder in ("gpu", "cpu"))
        assert ours.equals(theirs)
    assert (tmp_path / "gpu/recipe.json").read_text() == (tmp_path / "cpu/recipe.json").read_text()


def test_pieces_are_the_whole_and_a_run_repeats(cuda, tmp_path, monkeypatch):
    simulate(tmp_path / "whole", device="cuda", **FEW)
    monkeypatch.setattr(render, "BYTES", 8 * 32**2 * 2 * FEW["tilts"])  # two particles at a time, and then one
    for folder in ("pieces", "again"):
        simulate(tmp_path / folder, device="cuda", threads=3, **FEW)
    for path in (tmp_path / "pieces").rglob("*.mrc*"):
        name = path.relative_to(tmp_path / "pieces")
        assert path.read_bytes() == (tmp_path / "again" / name).read_bytes()
        ours, theirs = (np.asarray(mrcfile.read(tmp_path / folder / name), np.float64) for folder in ("pieces", "whole"))
        np.testing.assert_allclose(ours, theirs, rtol=2 * HALF, atol=1e-4 * np.abs(theirs).max(), err_msg=str(name))


def test_a_device_that_is_too_small_is_named(stub, tmp_path):
    stub.limit(0, 100_000)
    with pytest.raises(OutOfDeviceMemory, match="cuda:0 has no memory left"):
        simulate(tmp_path, device="cuda", **FEW)


def test_several_devices_are_refused(stub, tmp_path):
    with pytest.raises(SettingsError, match="one GPU"):
        simulate(tmp_path, device="cuda:0,cuda:1", **FEW)


def test_a_device_that_is_not_there_is_named(stub, tmp_path):
    with pytest.raises(SettingsError, match="cuda:7"):
        simulate(tmp_path, device="cuda:7", **FEW)
