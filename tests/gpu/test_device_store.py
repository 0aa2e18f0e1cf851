"""Particles that stay on a device: which of them, whatever fails on the way, and whoever else wants some."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np
import pytest

from vdamkit.backend.cuda import CudaDevice
from vdamkit.errors import InputError
from vdamkit.imaging.device_projector import DeviceProjector
from vdamkit.imaging.halfball import half_ball
from vdamkit.imaging.projector import get_projector
from vdamkit.vdam.batched.store import Store


class Numbered:
    """Particles whose arrays hold their numbers; 7 cannot be read."""

    box, identity = 16, "numbered"

    def __init__(self):
        self.asked = []

    def __len__(self):
        return 50

    def fetch_on(self, device, index, radius):
        self.asked += index.tolist()
        at = np.flatnonzero(index != 7)
        numbers = np.repeat(index[at, None], len(half_ball(radius)), 1)
        arrays = tuple(device.put(numbers.astype(kind)) for kind in ("c8", "c8", "f4"))
        return arrays, at, ["particle 8 is unreadable"] * (len(index) - len(at))


def held(store, particles, index, radius=3):
    projector = DeviceProjector(get_projector(16, radius, "float32"), store.device)
    (masked, unmasked, weight), at, complaints = store.gather(particles, np.array(index), projector)
    for array in (masked, unmasked, weight):
        assert [int(v) for v in store.device.get(array)[:, projector.place[-1]].real] == [index[j] for j in at]
    return complaints


def test_store_keeps_what_was_used_last(stub):
    """More particles than fit: the right ones come back, those used longest ago make room, bad ones are told."""
    store, particles = Store(CudaDevice(0), 5, np.dtype(np.float32), 6), Numbered()
    assert held(store, particles, [1, 2, 3, 4]) == {}
    assert held(store, particles, [3, 5, 6, 7]) == {7: "particle 8 is unreadable"}
    particles.asked.clear()
    assert held(store, particles, [3, 4, 5, 6]) == {}
    assert particles.asked == []
    held(store, particles, [8, 9])
    assert particles.asked == [8, 9]
    particles.asked.clear()
    held(store, particles, [5, 6, 8, 9])
    assert particles.asked == []


def test_store_fetches_ahead(stub):
    """The next particles arrive while the current ones stay; where both do not fit nothing is fetched."""
    store, particles = Store(CudaDevice(0), 5, np.dtype(np.float32), 6), Numbered()
    held(store, particles, [1, 2, 3])
    store.fetch_ahead(particles, np.array([4, 5, 6]), np.array([1, 2, 3]))
    held(store, particles, [4, 5, 6])
    held(store, particles, [1, 2, 3])
    assert particles.asked == [1, 2, 3, 4, 5, 6]
    store.fetch_ahead(particles, np.arange(10, 15), np.array([1, 2, 3]))
    assert store._ahead is None


def test_an_error_while_fetching_ahead_is_met_again_where_it_counts(stub):
    class Broken(Numbered):
        def fetch_on(self, device, index, radius):
            raise InputError("the disc is gone")

    store = Store(CudaDevice(0), 5, np.dtype(np.float32), 6)
    store.fetch_ahead(Broken(), np.array([4]), np.array([1]))
    with pytest.raises(InputError, match="disc is gone"):
        held(store, Broken(), [4])
    held(store, Numbered(), [4, 5])


def test_what_could_not_be_written_does_not_count_as_there(stub):
    """An error after some of the arrays were written, in the background: the particles are fetched again."""

    class Cut(Numbered):
        def fetch_on(self, device, index, radius):
            (masked, unmasked, weight), *others = super().fetch_on(device, index, radius)
            return (masked, unmasked, weight[:, :-1]), *others

    store = Store(CudaDevice(0), 5, np.dtype(np.float32), 6)
    held(store, Numbered(), [1, 2, 3])
    store.fetch_ahead(Cut(), np.array([4, 5, 6]), np.array([1, 2, 3]))
    assert held(store, Numbered(), [4, 5, 6]) == {}
    assert held(store, Numbered(), [2, 3, 5, 6, 8, 9]) == {}


def test_a_store_serves_two_threads(stub):
    """A session and its branch, with the same particles and with others than fit beside them."""

    class Both(Numbered):
        together = threading.Barrier(2, timeout=0.3)

        def fetch_on(self, device, index, radius):
            with suppress(threading.BrokenBarrierError):  # where one waits until the other is done
                self.together.wait()
            return super().fetch_on(device, index, radius)

    store, particles = Store(CudaDevice(0), 5, np.dtype(np.float32), 6), Both()
    with ThreadPoolExecutor(2) as pool:
        for begins in ((10, 10), (20, 30)):
            begun = [pool.submit(held, store, particles, range(first, first + 6)) for first in begins]
            assert [future.result() for future in begun] == [{}, {}]
