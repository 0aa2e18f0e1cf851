"""What is written beside the tables: headers as mrcfile makes them, errors of the threads that write."""

import mrcfile
import numpy as np
import pytest

from vdamkit.backend import Backend
from vdamkit.backend.device import Device
from vdamkit.simulate.output import write_map
from vdamkit.simulate.workers import Workers


@pytest.mark.parametrize("shape", [(5, 6, 8), (6, 8), (0, 6, 8)])
@pytest.mark.parametrize("stack", [False, True])
@pytest.mark.parametrize("half", [False, True])
def test_a_map_is_what_mrcfile_writes(tmp_path, shape, stack, half):
    if stack and len(shape) == 2:
        pytest.skip("a stack has three axes")
    array = np.random.default_rng(0).normal(3, 20, shape)
    write_map(tmp_path / "folder/ours.mrc", array, 1.37, stack=stack, half=half)
    with mrcfile.new(tmp_path / "theirs.mrc") as mrc:
        mrc.set_data(array.astype(np.float16 if half else np.float32))
        if len(shape) == 3:
            (mrc.set_image_stack if stack else mrc.set_volume)()
        mrc.voxel_size = 1.37
        mrc.header.label[0] = "vdamkit simulate"
    assert (tmp_path / "folder/ours.mrc").read_bytes() == (tmp_path / "theirs.mrc").read_bytes()


@pytest.mark.parametrize("devices", [(), (Device(),)])
def test_workers_finish_what_they_are_given(devices):
    done = []
    with Workers(Backend(2, devices)) as workers:
        later = workers.prepare(pow, 2, 5)
        for number in range(20):
            workers.do(done.append, number)
        assert later() == 32
    assert sorted(done) == list(range(20))


@pytest.mark.parametrize("devices", [(), (Device(),)])
def test_an_error_of_a_worker_is_not_lost(devices):
    with pytest.raises(ZeroDivisionError), Workers(Backend(2, devices)) as workers:
        workers.do(divmod, 1, 0)
