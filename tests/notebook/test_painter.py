"""Background drawing: the newest wish only, a small share of the time, and no thread without work."""

import threading
import time

from helpers_vdamkit import LooksAway

from vdamkit.notebook.loop import Loop
from vdamkit.notebook.painter import SHARE, Painter


def painters_threads():
    return [thread for thread in threading.enumerate() if thread.name == "vdamkit painter"]


def test_a_newer_wish_replaces_an_older_one_that_waits():
    painter, drawn, gate, begun = Painter(Loop()), [], threading.Event(), threading.Event()
    painter.ask("map", lambda: begun.set() or (gate.wait(5) and b"first"), drawn.append)
    begun.wait(5)
    for number in range(20):
        painter.ask("map", lambda number=number: bytes([number]), drawn.append, at_once=True)
    gate.set()
    assert painter.wait()
    assert drawn == [b"first", bytes([19])]
    assert not painters_threads(), "the thread goes when there is nothing to draw"


def test_drawing_takes_no_more_than_its_share():
    painter, starts = Painter(Loop()), []

    def draw() -> bytes:
        starts.append(time.monotonic())
        time.sleep(0.03)
        return b""

    end = time.monotonic() + 1.2
    while time.monotonic() < end:  # somebody asks all the time, as a run with quick mini-batches does
        painter.ask("map", draw, lambda data: None)
        time.sleep(0.005)
    painter.close()
    assert 2 <= len(starts) <= 1.2 / (0.03 / SHARE) + 2


def test_what_a_person_waits_for_is_drawn_at_once():
    painter, drawn = Painter(Loop()), []
    painter.ask("slow", lambda: time.sleep(0.2) or b"slow", drawn.append)
    end = time.monotonic() + 20
    while not drawn:
        assert time.monotonic() < end, "nothing was drawn"
        time.sleep(0.005)
    asked = time.monotonic()
    painter.ask("later", lambda: b"later", drawn.append)
    painter.ask("now", lambda: b"now", lambda data: drawn.append((data, time.monotonic())), at_once=True)
    while len(drawn) < 2:
        assert time.monotonic() < end, "the second picture was not drawn"
        time.sleep(0.005)
    assert drawn[1][0] == b"now" and drawn[1][1] - asked < 0.2
    painter.close()


def test_a_picture_that_fails_does_not_take_the_others_along():
    drawn, told = [], []
    painter = Painter(Loop(), told.append)
    painter.ask("bad", lambda: 1 / 0, drawn.append, at_once=True)
    painter.ask("good", lambda: b"good", drawn.append, at_once=True)
    assert painter.wait()
    assert drawn == [b"good"] and told == painter.errors == ["bad: ZeroDivisionError: division by zero"]


def test_close_ends_the_thread():
    painter = Painter(Loop())
    painter.ask("map", lambda: b"", lambda data: None)
    painter.ask("map", lambda: b"", lambda data: None)
    painter.close()
    assert not painters_threads()
    painter.ask("map", lambda: b"", lambda data: None)
    assert not painters_threads(), "after closing nothing is begun"


def test_closing_between_a_look_and_a_grasp_ends_the_thread_quietly():
    painter, drawn = Painter(Loop()), []
    painter._lock = LooksAway("vdamkit painter")
    painter.ask("map", lambda: time.sleep(0.02) or b"map", drawn.append, at_once=True)
    painter.ask("chart", lambda: b"chart", drawn.append, at_once=True)
    time.sleep(0.01)
    painter.close()
    assert not painters_threads()
    assert not painter.errors
