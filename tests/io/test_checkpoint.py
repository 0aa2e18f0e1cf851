"""The checkpoint: bit for bit, never half written, and clear about what is wrong with a file."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
from states import SETTINGS, make_state

from vdamkit.errors import InputError, OutputError
from vdamkit.io import checkpoint
from vdamkit.io.checkpoint import load_checkpoint, save_checkpoint

LOG = [{"node": 0, "parent": None, "note": "T 4 → 2", "pmax": np.float32(0.5), "change": float("nan")}]
INPUTS = {"optimisation_set": "a b/optimisation_set.star", "tomograms": None, "n_particles": 7}


@pytest.fixture
def saved(tmp_path):
    """State and path of a checkpoint."""
    state, path = make_state(7, 8), tmp_path / "checkpoint.npz"
    save_checkpoint(path, state, SETTINGS, LOG, INPUTS)
    return state, path


def assert_same(found: object, expected: object) -> None:
    """Same types and bits, field by field."""
    for field in dataclasses.fields(expected):
        a, b = getattr(found, field.name), getattr(expected, field.name)
        if dataclasses.is_dataclass(b):
            assert_same(a, b)
        elif isinstance(b, np.ndarray):
            assert (a.dtype, a.shape) == (b.dtype, b.shape), field.name
            assert a.tobytes() == b.tobytes(), field.name
        else:
            assert type(a) is type(b) and (a == b or (a != a and b != b)), field.name


def test_round_trip(saved):
    expected, path = saved
    state, settings, log, inputs = load_checkpoint(path)
    assert_same(state, expected)
    assert settings == SETTINGS and inputs == INPUTS
    assert log[0]["note"] == "T 4 → 2" and log[0]["pmax"] == 0.5 and np.isnan(log[0]["change"])
    assert os.listdir(path.parent) == ["checkpoint.npz"]


def test_double_precision_and_special_values(tmp_path):
    state = make_state(4, 8, classes=1)
    special = np.array([np.nan, -0.0, np.inf, 5e-324])
    state = state.replace(
        maps=state.maps.astype(np.float64),
        moment1=state.moment1.astype(np.complex128),
        poses=dataclasses.replace(state.poses, log_likelihood=special),
        bad_particles=(),
        sigma_offset=0.1 + 0.2,
    )
    save_checkpoint(tmp_path / "c.npz", state, SETTINGS, [], {})
    assert_same(load_checkpoint(tmp_path / "c.npz")[0], state)


def test_no_pickles(saved):
    with np.load(saved[1], allow_pickle=False) as stored:
        assert all(stored[name].dtype != object for name in stored.files)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.9999])
def test_truncated(saved, share):
    content = saved[1].read_bytes()
    saved[1].write_bytes(content[: int(share * len(content))])
    with pytest.raises(InputError, match=r"checkpoint\.npz: (damaged or truncated|no checkpoint, it is empty)"):
        load_checkpoint(saved[1])


@pytest.mark.parametrize("share", [0.01, 0.2, 0.5, 0.8, 0.999])
def test_a_flipped_bit_is_found(saved, share):
    """Anywhere in data, headers or directory: an error or nothing changed, never other numbers."""
    content = bytearray(saved[1].read_bytes())
    content[int(share * len(content))] ^= 4
    saved[1].write_bytes(content)
    try:
        state = load_checkpoint(saved[1])[0]
    except InputError as error:
        assert str(saved[1]) in str(error)
    else:
        assert_same(state, saved[0])


def _npz(path: Path, **arrays: np.ndarray) -> None:
    with open(path, "wb") as file:
        np.savez(file, **arrays)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda p: p.write_text("data_\n"), "not as an array file"),
        (lambda p: p.write_bytes(b"\x93NUMPY\x01\x00"), "not as an array file"),
        (lambda p: _npz(p, x=np.ones(3)), r"no 'metadata' \(arrays: x\)"),
        (lambda p: _npz(p, metadata=np.array("[1]")), "no checkpoint"),
        (lambda p: _npz(p, metadata=np.array("no json")), "damaged"),
        (lambda p: _npz(p, metadata=np.array([{}], object)), "damaged"),
        (lambda p: None, "file not found"),
        (lambda p: p.mkdir(), "is a folder"),
    ],
)
def test_foreign_files(tmp_path, make, expected):
    path = tmp_path / "x.npz"
    make(path)
    with pytest.raises(InputError, match=expected) as caught:
        load_checkpoint(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda m: m.update(version=99), "version 99"),
        (lambda m: m["settings"].update(new_option=1), "new_option"),
        (lambda m: m["settings"].update(T=-1), "T is -1"),
        (lambda m: m["state"].pop("tau2"), "tau2"),
        (lambda m: m["state"].update(extra="(array)"), r"state\.extra"),
    ],
)
def test_of_another_vdamkit(saved, change, expected):
    with np.load(saved[1]) as stored:
        arrays = dict(stored)
    metadata = json.loads(str(arrays["metadata"]))
    change(metadata)
    _npz(saved[1], **{**arrays, "metadata": np.array(json.dumps(metadata))})
    with pytest.raises(InputError, match=expected) as caught:
        load_checkpoint(saved[1])
    assert "continue with the vdamkit that wrote it" in str(caught.value)


@pytest.mark.parametrize("step", ["savez", "fsync", "replace"])
def test_a_failed_write_leaves_the_old_checkpoint(saved, monkeypatch, step):
    state, path = saved

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.np if step == "savez" else os, step, full)
    with pytest.raises(OutputError, match=r"checkpoint\.npz.*No space left on device"):
        save_checkpoint(path, state.replace(iteration=11), SETTINGS, LOG, INPUTS)
    monkeypatch.undo()
    assert load_checkpoint(path)[0].iteration == 10 and os.listdir(path.parent) == ["checkpoint.npz"]


def test_no_folder(tmp_path):
    with pytest.raises(OutputError, match="none"):
        save_checkpoint(tmp_path / "none" / "checkpoint.npz", make_state(2, 8), SETTINGS, [], {})
