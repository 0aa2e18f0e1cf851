"""Local copies: made once, made again when the data change, done without where the folder will not take them."""

import errno
import os
import shutil

import numpy as np
import pytest
from builders import make_project, write_image

from vdamkit.backend import get_backend
from vdamkit.errors import ParticleError
from vdamkit.io.particles import open_particles
from vdamkit.io.scratch import Scratch, scratch_problem
from vdamkit.settings import Settings
from vdamkit.source import ParticleSource


@pytest.fixture
def particles(tmp_path):
    return open_particles(make_project(tmp_path / "data").write())


def test_data_extracted_again_are_copied_again(particles, tmp_path, monkeypatch):
    scratch, copied, copy = Scratch(tmp_path / "local"), [], shutil.copyfile
    monkeypatch.setattr(shutil, "copyfile", lambda *paths: copied.append(paths[0]) or copy(*paths))
    first, again = (particles.load(0, locate=scratch.locate).images for _ in range(2))
    assert len(copied) == 1 and np.array_equal(first, again)
    path = tmp_path / "data" / "sub" / "0_stack2d.mrcs"
    before = path.stat()
    write_image(path, -first)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns - 10**9))  # an older version put back is another one, too
    assert np.array_equal(particles.load(0, locate=Scratch(tmp_path / "local").locate).images, -first)
    write_image(path, first[:, :6, :6])
    with pytest.raises(ParticleError, match=r"local/vdamkit_scratch/.*0_stack2d.mrcs: is 6 x 6"):
        particles.load(0, locate=scratch.locate)
    assert scratch.take_notes() == ()


def test_a_full_folder_is_done_without_and_said_once(particles, tmp_path, monkeypatch):
    scratch, copy = Scratch(tmp_path / "local"), shutil.copyfile
    path = scratch.locate(tmp_path / "data" / "sub" / "0_stack2d.mrcs")
    assert path.is_relative_to(tmp_path / "local")

    def full(source, target):
        copy(source, target)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    for i in (1, 2):
        particles.load(i, locate=scratch.locate)
    (note,) = scratch.take_notes()
    assert "No space left on device" in note and "local" in note and scratch.take_notes() == ()
    assert [file for file in (tmp_path / "local").rglob("*") if file.is_file()] == [path], "no half of a copy is left"
    assert scratch.locate(tmp_path / "data" / "sub" / "0_stack2d.mrcs") == path, "copies that there are serve on"


def test_a_folder_that_cannot_be_made_is_done_without(particles, tmp_path):
    (tmp_path / "file").write_text("")
    settings = Settings(scratch_dir=str(tmp_path / "file"), mask_diameter=30.0, threads=1)
    source = ParticleSource(particles, settings, get_backend("cpu", 1))
    found, _, complaints = source.fetch(np.arange(3), 4)
    assert len(found) == 3 and complaints == []
    (note,) = source.take_notes()
    assert str(tmp_path / "file") in note
    assert source.with_settings(settings.replace(T=2), source.backend).take_notes() == ()


def test_what_would_not_go_is_known_beforehand(tmp_path):
    (tmp_path / "file").write_text("")
    assert scratch_problem(tmp_path / "new" / "folder", 1000) is None and not (tmp_path / "new").exists()
    assert "nothing can be written" in scratch_problem(tmp_path / "file" / "folder", 0)
    assert "GiB are free" in scratch_problem(tmp_path, 2**62)
