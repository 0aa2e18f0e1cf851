"""Who computes: worker threads, and the process-wide settings that they hold."""

import os
import subprocess
import sys
import threading

import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from vdamkit.backend import Backend, get_backend
from vdamkit.backend.device import HOST, Device, DeviceLost, OutOfDeviceMemory, or_on_host


def blas_threads():
    return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}


def test_blas_stays_on_one_thread_until_the_last_session_leaves():
    """BLAS on two threads rounds differently, so a session that ends must not give threads back to one that computes."""
    with threadpool_limits(2, user_api="blas"):
        before, interval = blas_threads(), sys.getswitchinterval()
        first, second = get_backend("cpu", 2).limits(), get_backend("cpu", 1).limits()
        first.__enter__()
        second.__enter__()
        assert sys.getswitchinterval() < interval
        first.__exit__(None, None, None)
        assert blas_threads() == {1}
        second.__exit__(None, None, None)
        assert blas_threads() == before
        assert sys.getswitchinterval() == interval


def test_any_thread_holds_blas_to_one_thread():
    """Entered in one thread, held in the main one, left in a third: threadpoolctl lets only one thread at a time do that."""
    with threadpool_limits(2, user_api="blas"):
        before, seen = blas_threads(), []
        contexts = [get_backend("cpu", 2).limits() for _ in range(2)]

        def elsewhere(act):
            thread = threading.Thread(target=lambda: (act(), seen.append(blas_threads())))
            thread.start()
            thread.join()

        elsewhere(contexts[0].__enter__)
        contexts[1].__enter__()
        elsewhere(lambda: contexts[0].__exit__(None, None, None))
        assert seen == [{1}, {1}] and blas_threads() == {1}
        elsewhere(lambda: contexts[1].__exit__(None, None, None))
        assert blas_threads() == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system knows no fork")
def test_a_forked_child_has_workers():
    """Those of its parent do not come along; it would wait for them for ever."""
    code = (
        "import os, sys\nfrom vdamkit.backend import get_backend\n"
        "work = lambda: get_backend('cpu', 2).map(abs, range(-5, 0))\nwork()\nchild = os.fork()\n"
        "if not child:\n    os._exit(0 if work() == [5, 4, 3, 2, 1] else 1)\nsys.exit(os.waitpid(child, 0)[1])\n"
    )
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", code], timeout=60, check=False).returncode == 0


def test_limits_end_with_an_error():
    before, interval = blas_threads(), sys.getswitchinterval()
    try:
        with get_backend("cpu", 2).limits():
            raise RuntimeError
    except RuntimeError:
        pass
    assert blas_threads() == before
    assert sys.getswitchinterval() == interval


def test_map_keeps_the_order():
    items = list(range(50))
    for threads in (1, 2):
        for at_once in (1, 8):
            assert get_backend("cpu", threads).map(lambda i: i * i, items, at_once=at_once) == [i * i for i in items]


def test_map_takes_the_largest_first_and_keeps_the_order():
    begun = []
    out = get_backend("cpu", 1).map(lambda n: begun.append(n) or n * n, [2, 5, 3, 5], size=lambda n: n)
    assert out == [4, 25, 9, 25] and begun == [5, 5, 3, 2]
    assert get_backend("cpu", 2).map(lambda n: n * n, [2, 5, 3, 5], size=lambda n: n) == out


def test_begin_returns_at_once_and_keeps_the_order():
    gate = threading.Event()
    waiting = Backend(2).begin(lambda i: gate.wait(10) and i * i, range(5))
    assert not waiting[-1].done()
    gate.set()
    assert [future.result() for future in waiting] == [0, 1, 4, 9, 16]


def test_hand_over_is_quicker_with_a_device_and_put_back():
    before = sys.getswitchinterval()
    with Backend(2).limits():
        assert sys.getswitchinterval() == pytest.approx(2e-4)
        with Backend(2, (Device(),)).limits():
            assert sys.getswitchinterval() == pytest.approx(2e-5)
    assert sys.getswitchinterval() == before


def test_what_a_device_has_no_memory_for_is_done_here():
    class Full(Device):
        released = False

        def release(self):
            self.released = True

    def work(device):
        if device is not HOST:
            raise OutOfDeviceMemory("full")
        return "here"

    device = Full()
    assert or_on_host(device, work) == "here" and device.released
    assert or_on_host(HOST, lambda device: device) is HOST
    with pytest.raises(DeviceLost):
        or_on_host(device, lambda device: (_ for _ in ()).throw(DeviceLost("gone")))
