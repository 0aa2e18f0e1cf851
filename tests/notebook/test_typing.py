"""What is typed into the panel, from whatever thread it comes; what the panel says of what was done; what it leaves behind."""

import asyncio
import threading
import time

import pytest
from on_a_loop import knob, until, with_panel

import vdamkit as vk
from vdamkit.history import Node
from vdamkit.notebook.loop import Loop
from vdamkit.notebook.marks import marks_of

pytest.importorskip("ipywidgets", reason="ipywidgets is not installed")


def elsewhere(act):
    """Do something in another thread, as JupyterLab has a widget's messages handled, and wait for it."""
    thread = threading.Thread(target=act)
    thread.start()
    thread.join(10)


def test_a_timer_from_another_thread_wakes_a_loop_that_sleeps():
    async def scenario():
        loop, rung = Loop(), threading.Event()
        began = time.monotonic()
        elsewhere(lambda: loop.call_later(0.05, rung.set))
        loop.call_later(0.02, lambda: pytest.fail("was cancelled"))()
        # nothing else turns the loop in the meantime
        await asyncio.wait_for(asyncio.to_thread(rung.wait, 5), 5)
        assert time.monotonic() - began < 1
        loop.call_later(0.02, lambda: pytest.fail("was closed"))
        loop.close()
        await asyncio.sleep(0.06)

    asyncio.run(scenario())


def test_what_was_typed_counts_when_a_button_is_pressed(job):
    async def scenario(panel):
        box = knob(panel, "symmetry").parts[0]
        elsewhere(lambda: setattr(box, "value", "C3"))
        elsewhere(panel.face.buttons["step"].click)
        assert job.settings.symmetry == "C3"
        await until(lambda: job.iteration == 1)
        await until(lambda: panel.controller.status == "idle")
        assert job._history.node.settings.symmetry == "C3"

    with_panel(job, scenario)


def test_the_panel_says_what_was_done_and_no_longer_what_went_wrong(job):
    async def scenario(panel):
        press, said = panel.face.buttons, panel.face.message
        panel.face.folder.value = "/proc/nowhere"
        press["save"].click()
        assert "cannot write to /proc/nowhere" in said.value and "--o" not in said.value
        press["step"].click()
        assert "/proc" not in said.value
        await until(lambda: job.iteration == 1 and panel.controller.status == "idle")
        job.change(symmetry="C3")
        press["step"].click()
        await until(lambda: "mini-batch 2: symmetry C6 → C3" in said.value)
        await until(lambda: panel.controller.status == "idle")
        press["split"].click()
        assert "class 1 split; the other half is class 2" in said.value
        press["branch"].click()
        assert "branch 1 has a panel of its own now" in said.value

    with_panel(job, scenario)


def test_a_verdict_goes_with_the_state_that_it_was_on(job):
    async def scenario(panel):
        await panel.run()
        await until(lambda: panel.face.verdict.value)
        job.step()
        await until(lambda: "mini-batch <b>7</b> (1 beyond the schedule)" in panel.face.status.value)
        panel.face.buttons["undo"].click(), panel.face.buttons["undo"].click()
        await until(lambda: "mini-batch <b>5</b> of 6" in panel.face.status.value)
        await until(lambda: not panel.face.verdict.value)

    with_panel(job, scenario)


def test_what_was_changed_several_times_is_told_of_once():
    typed = "start; batch_final None → 6, batch_initial None → 6; T 4.0 → 2.0; batch_final 6 → 60, batch_initial 6 → 60"
    line = [
        Node(0, None, 3, vk.Settings(), None, f"{typed}; T 2.0 → 4.0"),
        Node(1, 0, 4, vk.Settings(), None, "class 1 split; symmetry C6 → C3"),
    ]
    found = [(mark.iteration, mark.text) for mark in marks_of(line)]
    assert found == [
        (4, "batch_final None → 60; batch_initial None → 60"), (5, "symmetry C6 → C3; class 1 split"),
    ]  # fmt: skip


def test_the_history_leaves_no_widgets_behind_and_waits_until_it_is_looked_at(job, monkeypatch):
    from ipywidgets.widgets.widget import _instances as all_widgets

    async def scenario(panel):
        await panel.run(1)
        await asyncio.sleep(0.1)
        before = len(all_widgets)
        for _ in range(3):
            panel._refresh_history()
        assert len(all_widgets) == before
        monkeypatch.setattr(type(panel.controller), "status", "running")
        job._history.remark("T 4.0 → 2.0")
        panel._refresh_all()
        assert "T 4.0" not in panel.face.log.value
        for tab in ("History", "Log"):
            panel.face.tabs.selected_index = panel.face.tabs.titles.index(tab)
        assert "T 4.0 → 2.0" in panel.face.log.value
        assert [button.description for button in panel.face.tree.children[0].children] == ["start", "1 •"]
        monkeypatch.undo()

    with_panel(job, scenario)
