"""Devices for the tests: the GPU of the machine where one answers, and the stand-in that runs the same kernels on the CPU."""

from __future__ import annotations

import cuda_on_cpu
import pytest
from stub_cupy import installed

from vdamkit.simulate import simulate


def gpu_missing() -> str | None:
    """Why no GPU can be used here; None where one answers."""
    try:
        import cupy

        return None if cupy.cuda.runtime.getDeviceCount() else "no GPU"
    except Exception as problem:
        return f"no GPU answers: {(str(problem).splitlines() or [type(problem).__name__])[0]}"


@pytest.fixture(params=["stub", "cuda"])
def cuda(request):
    """CuPy: a stand-in with two devices, and the real one."""
    reason = cuda_on_cpu.available() if request.param == "stub" else gpu_missing()
    if reason:
        pytest.skip(f"{request.param}: {reason}")
    if request.param == "cuda":
        import cupy

        yield cupy
    else:
        with installed(n_devices=2) as stub:
            yield stub


@pytest.fixture
def stub():
    """The stand-in alone, for what cannot be asked of a real device: to run out of memory, to be lost."""
    if reason := cuda_on_cpu.available():
        pytest.skip(reason)
    with installed(n_devices=2) as stub:
        yield stub


@pytest.fixture(scope="session")
def few_particles(tmp_path_factory):
    """Optimisation set of 24 simulated particles in a box of 16 px, two optics groups: seconds of work for the stand-in."""
    options = {"poses": "random", "model": "asymmetric", "lattice_spacing": 400.0, "variance_ratio": 0.5}
    folder = tmp_path_factory.mktemp("few")
    return simulate(folder, particles=24, volumes=0, box=16, pixel_size=20.0, tilts=9, **options)["stacks2d"]
