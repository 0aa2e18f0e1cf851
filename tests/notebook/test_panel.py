"""The panel in a kernel without a browser: every control against the session, and nothing left behind."""

import asyncio
import gc
import threading

import numpy as np
import pytest
from helpers_vdamkit import hold
from on_a_loop import idle, knob, until

import vdamkit as vk

pytest.importorskip("ipywidgets", reason="ipywidgets is not installed")


def run(scenario):
    """Run an async test on a loop, as a kernel has one."""
    asyncio.run(scenario)


def text(widget) -> str:
    return widget.value


def test_buttons_run_pause_undo_redo(job):
    async def scenario():
        panel = job.panel()
        await idle(panel)
        panel.face.buttons["step"].click()
        await until(lambda: job.iteration == 1)
        await idle(panel)
        assert "mini-batch <b>1</b> of 6" in text(panel.face.status)
        hold(job, until=lambda: panel.controller.status == "pausing")
        panel.face.to_go.value = 2
        panel.face.buttons["run"].click()
        assert panel.face.buttons["step"].disabled and not panel.face.buttons["pause"].disabled
        panel.face.buttons["pause"].click()
        assert "paus" in text(panel.face.status) and panel.face.buttons["pause"].description == "Go on"
        await until(lambda: panel.controller.status == "paused")
        panel.face.buttons["pause"].click()
        await until(lambda: job.iteration == 3)
        await idle(panel)
        panel.face.buttons["undo"].click()
        assert job.iteration == 2
        panel.face.buttons["redo"].click()
        assert job.iteration == 3
        panel.close()

    run(scenario())


def test_knobs_show_what_is_in_force_and_what_comes_next(job):
    async def scenario():
        panel = job.panel()
        await idle(panel)
        slider, hold = knob(panel, "T").parts
        assert "from the first mini-batch" in text(knob(panel, "T").note)
        panel.face.buttons["step"].click()
        await until(lambda: job.iteration == 1)
        await idle(panel)
        slider.value = 2.0
        note = knob(panel, "T").note
        await until(lambda: "next: final T 2" in text(note))
        assert job.settings.T == 2 and "final T 4" in text(note)
        hold.value = True
        assert job.settings.T_scheme == "constant"
        panel.face.buttons["step"].click()
        await until(lambda: job.iteration == 2)
        await idle(panel)
        assert job.report.T == 2 and "next" not in text(note) and "now 2.00" in text(note)
        panel.close()

    run(scenario())


def test_what_is_typed_counts_when_the_keys_rest(job):
    async def scenario():
        panel = job.panel()
        await idle(panel)
        box = knob(panel, "symmetry").parts[0]
        for typed in ("C", "C1", "C12"):
            box.value = typed
        assert job.settings.symmetry == "C6", "nothing yet"
        await until(lambda: job.settings.symmetry == "C12", 3)
        assert [n.note for n in job._history.nodes] == ["start; symmetry C6 → C12"]
        panel.close()

    run(scenario())


@pytest.mark.parametrize(
    ("name", "part", "bad", "good", "words"),
    [
        ("symmetry", 0, "C60x", "C3", "C60x"),
        ("mask_diameter", 0, 9000.0, 200.0, "Mask diameter is 9000"),
        ("tilt_prior_width", 1, 0.0, 20.0, "Tilt prior is 0"),
        ("batch_final", 0, -5, 10, "Particles per mini-batch is -5"),
    ],
)
def test_invalid_input_turns_red_and_nothing_is_lost(job, name, part, bad, good, words):
    async def scenario():
        panel = job.panel()
        await idle(panel)
        panel.face.buttons["step"].click()
        await until(lambda: job.iteration == 1)
        await idle(panel)
        before = job.settings
        control = knob(panel, name)
        control.parts[part].value = bad
        assert words in text(control.note) and "vk-bad" in control.parts[part]._dom_classes
        await asyncio.sleep(0.7)
        assert job.settings == before and job.iteration == 1
        control.parts[part].value = good
        assert "vk-bad" not in control.parts[part]._dom_classes
        await until(lambda: getattr(job.settings, name) == good, 3)
        panel.close()

    run(scenario())


def test_a_typed_number_to_go_stays_until_another_is_due(job):
    async def scenario():
        panel = job.panel()
        await idle(panel)
        assert panel.face.to_go.value == 6
        panel.face.to_go.value = 2
        knob(panel, "T").parts[0].value = 2.0
        await until(lambda: job.settings.T == 2)
        await idle(panel)
        assert panel.face.to_go.value == 2
        panel.face.buttons["run"].click()
        await until(lambda: job.iteration == 2)
        await idle(panel)
        assert panel.face.to_go.value == 4
        panel.close()

    run(scenario())


def test_options_change_while_it_runs(job):
    async def scenario():
        panel = job.panel()
        await idle(panel)
        held = hold(job, until=lambda: job.settings.psi_prior_width == 25)
        panel.face.to_go.value = 3
        panel.face.buttons["run"].click()
        await until(held.is_set)
        use, width = knob(panel, "psi_prior_width").parts
        width.value, use.value = 25.0, True
        await until(lambda: job.iteration == 3)
        await idle(panel)
        line = job._history.line()
        assert [node.settings.psi_prior_width for node in line] == [None, None, 25, 25]
        panel.close()

    run(scenario())


def test_a_cells_doing_shows_in_the_panel(job):
    async def scenario():
        panel = job.panel()
        await idle(panel)
        job.change(T=3.0)
        job.run(2)
        await until(lambda: "<b>2</b>" in text(panel.face.status))
        assert knob(panel, "T").parts[0].value == pytest.approx(3)
        assert "mini-batch 2:" in text(panel.face.log)
        panel.close()

    run(scenario())


def test_pictures_follow_and_only_the_one_looked_at_is_drawn(job):
    async def scenario():
        panel = job.panel()
        await idle(panel)
        await until(lambda: len(panel.pages[0].image.value) > 1000)
        first = panel.pages[0].image.value
        blank = panel.pages[3].image.value
        panel.face.buttons["step"].click()
        await until(lambda: panel.pages[0].image.value != first)
        assert panel.pages[3].image.value == blank
        for number in (1, 2, 3):
            panel.face.tabs.selected_index = number
            await until(lambda number=number: len(panel.pages[number].image.value) > 1000)
        assert not panel.painter.errors
        panel.close()

    run(scenario())


def test_symmetry_is_scored_when_a_person_asks(job):
    async def scenario():
        job.run(3)
        panel = job.panel()
        await idle(panel)
        number = next(i for i, page in enumerate(panel.pages) if page.name == "Symmetry")
        page = panel.pages[number]
        panel.face.tabs.selected_index = number
        await until(lambda: not panel.painter.busy)
        button, says = page.box.children[0].children[0], page.box.children[1]
        assert len(page.image.value) < 200, "nothing is scored before"
        button.click()
        panel._paint()  # a mini-batch that lands before the painter has begun takes no wish away
        assert "scoring" in says.value
        await until(lambda: len(page.image.value) > 1000, 60)
        assert "scoring" not in says.value and not panel.painter.errors
        panel.close()

    run(scenario())


def test_classes_are_split_and_dropped(job):
    async def scenario():
        panel = job.panel()
        await idle(panel)
        panel.face.buttons["split"].click()
        assert "no mini-batch" in text(panel.face.message), "there are no halves yet"
        panel.face.buttons["step"].click()
        await until(lambda: job.iteration == 1)
        await idle(panel)
        assert panel.face.buttons["drop"].disabled
        panel.face.buttons["split"].click()
        await until(lambda: len(panel.face.which.options) == 2)
        assert job.settings.classes == 2 and not panel.face.buttons["drop"].disabled
        panel.face.tabs.selected_index = 1
        await until(lambda: len(panel.pages[1].box.children[0].options) == 2)
        panel.face.which.value = 2
        panel.face.buttons["drop"].click()
        await until(lambda: len(panel.face.which.options) == 1)
        assert job.settings.classes == 1 and panel.face.which.value == 1
        panel.close()

    run(scenario())


def test_a_branch_is_another_session_beside_this_one(job):
    async def scenario():
        panel = job.panel()
        await idle(panel)
        job.run(2)
        panel.face.buttons["branch"].click()
        panel.face.buttons["seed"].click()
        branch, seed = panel.branches
        await until(lambda: seed.controller.status == "idle" and seed.session._history)
        assert len(panel.face.branches.children) == 2
        assert branch.session.iteration == 2 and seed.session.iteration == 0
        assert seed.session.settings.seed != job.settings.seed
        branch.face.buttons["step"].click()
        panel.face.buttons["step"].click()
        await until(lambda: branch.session.iteration == 3 and job.iteration == 3)
        await idle(panel)
        await idle(branch)
        np.testing.assert_array_equal(branch.session.map, job.map)
        panel.face.buttons["compare"].click()
        await until(lambda: len(panel.face.comparison.value) > 1000)
        panel.close()
        assert branch._closed and seed._closed

    run(scenario())


def test_a_node_of_the_tree_takes_back_to_it(job):
    async def scenario():
        panel = job.panel()
        await idle(panel)
        job.run(3)
        await asyncio.sleep(0.1)
        buttons = {b.description: b for b in panel.face.tree.children[0].children}
        buttons["1"].click()
        assert job.iteration == 1
        panel.close()

    run(scenario())


def test_save_writes_and_says_what_went_wrong(job, tmp_path):
    async def scenario():
        panel = job.panel()
        await idle(panel)
        panel.face.folder.value = str(tmp_path / "job")
        panel.face.buttons["save"].click()
        assert (tmp_path / "job" / "checkpoint.npz").exists() and "written to" in text(panel.face.message)
        (tmp_path / "file").write_text("")
        panel.face.folder.value = str(tmp_path / "file" / "job")
        panel.face.buttons["save"].click()
        assert "vk-error" in text(panel.face.message) and "cannot write" in text(panel.face.message)
        panel.close()

    run(scenario())


def test_each_panel_saves_to_a_folder_of_its_own(job, tmp_path, monkeypatch):
    """Another seed's Save does not replace this run's checkpoint, and tomorrow's session finds a free folder."""
    from vdamkit.storage import free_folder

    monkeypatch.chdir(tmp_path)

    async def scenario():
        panel = job.panel()
        await idle(panel)
        panel.face.buttons["branch"].click()
        panel.face.buttons["seed"].click()
        for each in (panel, *panel.branches, panel):
            await idle(each)
            each.face.buttons["save"].click()
            assert "written to" in text(each.face.message)
        seed = panel.branches[1]
        seed.face.folder.value = panel.face.folder.value
        seed.face.buttons["save"].click()
        assert "already holds a run (mini-batch 0)" in text(seed.face.message)
        panel.close()

    run(scenario())
    saved = {path.name for path in (tmp_path / "InitialModel").iterdir()}
    assert saved == {"vdamkit", "vdamkit_branch_1", "vdamkit_seed_5"}
    name = "InitialModel/vdamkit"
    assert free_folder(job, name) == name and free_folder(job.branch(), name) == f"{name}_2"
    assert vk.Session.resume(tmp_path / "InitialModel" / "vdamkit").settings.seed == job.settings.seed


def test_the_ghost_is_spoken_of_and_one_click_offers_the_psi_prior(job, monkeypatch):
    async def scenario():
        from vdamkit.notebook import panel as module

        panel = job.panel()
        await idle(panel)
        assert panel.face.ghost.layout.display == "none"
        monkeypatch.setattr(module, "upside_down_share", lambda angles, priors: 0.4)
        monkeypatch.setattr(module, "SURE", 0.0)
        job.step()
        await until(lambda: panel.face.ghost.layout.display is None)
        assert "40 % of the particles" in text(panel.face.ghost_text)
        panel.face.buttons["ghost"].click()
        assert job.settings.psi_prior_width == 10
        await until(lambda: panel.face.ghost.layout.display == "none")
        panel.close()

    run(scenario())


def test_the_verdict_comes_at_the_end(job):
    async def scenario():
        panel = job.panel()
        await idle(panel)
        assert text(panel.face.verdict) == ""
        panel.face.buttons["run"].click()
        await until(lambda: job.iteration == 6)
        await until(lambda: "Resolution" in text(panel.face.verdict))
        panel.close()

    run(scenario())


def test_closing_leaves_no_thread_and_no_callback(job):
    async def scenario():
        panel = job.panel()
        await idle(panel)
        panel.face.to_go.value = 1000
        panel.face.buttons["run"].click()
        await until(lambda: panel.controller.inside > 0)
        panel.close()
        assert not [t for t in threading.enumerate() if t.name in ("vdamkit session", "vdamkit painter")]
        assert job.listeners == [] and job.followers == [] and job._panel is None
        assert panel.face.widget.comm is None
        again = job.panel()
        second = job.panel()
        assert again._closed and not second._closed, "a session has one panel"
        second.close()

    run(scenario())
    gc.collect()


def test_without_ipywidgets_there_is_a_hint(job, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    with pytest.raises(vk.SettingsError, match=r"vdamkit\[notebook\]"):
        job.panel()
