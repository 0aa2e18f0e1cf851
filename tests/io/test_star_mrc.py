"""STAR and MRC files: round trips, atomic writing, clear errors."""

import io
import os
import threading
from pathlib import Path

import mrcfile
import numpy as np
import pandas as pd
import pytest

from vdamkit.errors import InputError, OutputError
from vdamkit.io.mrc import mrc_header, open_mrc, read_map, write_mrc
from vdamkit.io.star_tables import (
    as_list,
    as_table,
    numeric_column,
    parse_vector,
    read_star,
    require_columns,
    resolve_path,
    write_star,
)

REFERENCE = Path(__file__).parents[2].parent / "shared" / "relion_reference"
needs_reference = pytest.mark.skipif(not REFERENCE.exists(), reason="RELION reference data not there")


def test_star_round_trip_keeps_names_and_small_numbers(tmp_path):
    table = pd.DataFrame({"rlnTomoName": ["01", "1e5"], "rlnValue": [3.2e-7, 123456.789], "rlnCount": [1, 2]})
    blocks = {"general": {"rlnTomoName": "007", "rlnX": 1.23456789123e-9, "rlnEmpty": ""}, "particles": table}
    write_star(tmp_path / "a.star", blocks)
    found = read_star(tmp_path / "a.star")
    assert found["general"] == {"rlnTomoName": "007", "rlnX": 1.23456789e-9, "rlnEmpty": ""}
    assert list(found["particles"]["rlnTomoName"]) == ["01", "1e5"]
    np.testing.assert_allclose(found["particles"]["rlnValue"], table["rlnValue"], rtol=1e-8)
    assert found["particles"]["rlnCount"].dtype == np.int64
    assert os.listdir(tmp_path) == ["a.star"]


def test_star_with_dos_line_ends_and_comments(tmp_path):
    text = "# version 50001\n\ndata_\n\nloop_ \n_rlnTomoName #1 \n_rlnA #2 \n  01   2.5 \n  02   3.5 \n \n"
    (tmp_path / "dos.star").write_bytes(text.replace("\n", "\r\n").encode())
    table = read_star(tmp_path / "dos.star")[""]
    assert list(table["rlnTomoName"]) == ["01", "02"] and list(table["rlnA"]) == [2.5, 3.5]
    assert as_list(table) == {"rlnTomoName": "01", "rlnA": 2.5}
    assert len(as_table({"rlnA": 1})) == 1


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "file not found"),
        (b"", "file is empty"),
        (b" \n\n", "file is empty"),
        (b"hello\nworld\n", "not a STAR file"),
        (b"data_x\n\x00\x00", "not a STAR file"),
        (b"data_x\n\xff\xfe\n", "not a STAR file"),
        (b"data_x\n\n", "STAR file"),
        (b"data_x\nloop_\n_rlnA #1\n_rlnB #2\n1 2\n1 2 3\n", "as many values as there are columns"),
        (b"data_x\nloop_\n_rlnA #1\n# version\n\ndata_y\n_rlnB 3\n", "column names but no rows"),
    ],
)
def test_bad_star_files(tmp_path, content, expected):
    path = tmp_path / "bad.star"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=expected) as caught:
        read_star(path)
    assert str(path) in str(caught.value)


def test_star_folder_and_repair_after_failure(tmp_path):
    with pytest.raises(InputError, match="is a folder"):
        read_star(tmp_path)
    path = tmp_path / "a.star"
    path.write_text("data_x\nloop_\n_rlnA #1\n1\n1 2\n")
    with pytest.raises(InputError):
        read_star(path)
    path.write_text("data_x\nloop_\n_rlnA #1\n1\n2\n")
    assert list(read_star(path)["x"]["rlnA"]) == [1, 2]


def test_require_columns_names_only_the_missing_ones():
    table = pd.DataFrame({"rlnA": [1]})
    with pytest.raises(InputError, match=r"f\.star: data_x lacks the columns rlnB, rlnC;") as caught:
        require_columns(table, ["rlnA", "rlnB", "rlnC"], "f.star", "x")
    assert "rlnA" not in str(caught.value)


def test_numeric_column():
    table = pd.DataFrame({"rlnA": [1.0, np.nan, 2.0], "rlnB": ["1", "x", "3"]})
    np.testing.assert_array_equal(numeric_column(table, "rlnC", "f", "x", default=4.0), [4, 4, 4])
    np.testing.assert_array_equal(numeric_column(table, "rlnA", "f", "x", allow_nan=True), [1, np.nan, 2])
    with pytest.raises(InputError, match="row 2, column rlnA: value nan"):
        numeric_column(table, "rlnA", "f", "x")
    with pytest.raises(InputError, match="row 2, column rlnB: value 'x'"):
        numeric_column(table, "rlnB", "f", "x", allow_nan=True)


@pytest.mark.parametrize(
    ("text", "expected"), [("[1,0]", [1, 0]), (" [1.5] ", [1.5]), ("1,0", None), ("[]", None), ("[a]", None)]
)
def test_parse_vector(text, expected):
    found = parse_vector(text)
    assert (found is None) if expected is None else (list(found) == expected)


def test_resolve_path_prefers_the_current_folder_then_climbs(tmp_path, monkeypatch):
    star = tmp_path / "project" / "Extract" / "job001" / "particles.star"
    star.parent.mkdir(parents=True)
    wanted = tmp_path / "project" / "sub" / "a.mrc"
    wanted.parent.mkdir()
    wanted.touch()
    assert resolve_path("sub/a.mrc", star) == wanted
    assert resolve_path(wanted, star) == wanted
    assert resolve_path("sub/b.mrc", star) is None
    monkeypatch.chdir(star.parent)
    assert resolve_path("sub/a.mrc", "particles.star") == wanted
    monkeypatch.chdir(tmp_path / "project")
    assert resolve_path("sub/a.mrc", star) == Path("sub/a.mrc")
    other = tmp_path / "other"
    (other / "sub").mkdir(parents=True)
    for name in ("a.mrc", "b.mrc"):
        (other / "sub" / name).touch()
    monkeypatch.chdir(other)  # files of the same names in another project
    assert resolve_path("sub/a.mrc", star) == wanted
    assert resolve_path("sub/b.mrc", star) == Path("sub/b.mrc"), "found nowhere else"


def test_failed_writing_keeps_the_old_file(tmp_path, monkeypatch):
    write_star(tmp_path / "a.star", {"x": {"rlnA": 1}})
    write_mrc(tmp_path / "a.mrc", np.ones((2, 2, 2)), 3.0)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OutputError, match=r"a\.star: could not be written \(No space left on device\)"):
        write_star(tmp_path / "a.star", {"x": {"rlnA": 2}})
    with pytest.raises(OutputError, match=r"a\.mrc: could not be written"):
        write_mrc(tmp_path / "a.mrc", np.zeros((2, 2, 2)), 3.0)
    assert read_star(tmp_path / "a.star")["x"]["rlnA"] == 1
    assert read_map(tmp_path / "a.mrc")[0].all()
    assert sorted(os.listdir(tmp_path)) == ["a.mrc", "a.star"]


def test_writing_into_no_folder(tmp_path):
    with pytest.raises(OutputError, match="could not be written"):
        write_star(tmp_path / "none" / "a.star", {"x": {"rlnA": 2}})
    with pytest.raises(OutputError, match="could not be written"):
        write_mrc(tmp_path / "none" / "a.mrc", np.zeros((2, 2, 2)), 1.0)


@pytest.mark.parametrize("dtype", ["float16", "float32", "int16", "uint16", "int8"])
def test_open_mrc_types(tmp_path, dtype):
    array = np.arange(24).reshape(2, 3, 4).astype(dtype)
    with mrcfile.new(tmp_path / "a.mrc") as mrc:
        mrc.set_data(array)
        mrc.voxel_size = 2.5
    data, voxel = open_mrc(tmp_path / "a.mrc")
    assert isinstance(data, np.memmap) and data.dtype == dtype and voxel == pytest.approx(2.5)
    np.testing.assert_array_equal(data, array)
    assert mrc_header(tmp_path / "a.mrc") == ((2, 3, 4), np.dtype(dtype), pytest.approx(2.5))


def test_big_endian_and_extended_header(tmp_path):
    array = np.arange(8, dtype=">f4").reshape(2, 2, 2)
    with mrcfile.new(tmp_path / "a.mrc") as mrc:
        mrc.set_data(array)
        mrc.set_extended_header(np.frombuffer(b"x" * 80, "V80"))
    data, _ = read_map(tmp_path / "a.mrc")
    assert data.dtype.isnative
    np.testing.assert_array_equal(data, array)


def test_write_mrc_round_trip(tmp_path):
    array = np.random.default_rng(0).normal(size=(3, 4, 6))
    write_mrc(tmp_path / "map.mrc", array, 8.1)
    data, voxel = read_map(tmp_path / "map.mrc")
    assert data.dtype == np.float32 and voxel == pytest.approx(8.1)
    np.testing.assert_allclose(data, array, rtol=1e-6)
    assert mrcfile.validate(tmp_path / "map.mrc", print_file=io.StringIO()) is True
    write_mrc(tmp_path / "stack.mrcs", array, 8.1, stack=True)
    with mrcfile.open(tmp_path / "stack.mrcs") as mrc:
        assert mrc.is_image_stack()


def _header(tmp_path: Path, **changes: int) -> bytes:
    with mrcfile.new(tmp_path / "good.mrc", overwrite=True) as mrc:
        mrc.set_data(np.ones((2, 3, 4), np.float32))
        for name, value in changes.items():
            mrc.header[name] = value
    return (tmp_path / "good.mrc").read_bytes()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "file not found"),
        (lambda p: b"", "truncated.*1024 bytes and 0 were found"),
        (lambda p: _header(p)[:500], "truncated.*1024 bytes and 500 were found"),
        (
            lambda p: _header(p)[:-5],
            "truncated, 4 x 3 x 2 voxels of float32 need 1120 bytes and 1115 were found",
        ),
        (lambda p: b"garbage!" * 400, "not an MRC file"),
        (lambda p: b"\0" * 2000, "not an MRC file"),
        (lambda p: _header(p)[:12] + b"\4\0\0\0" + _header(p)[16:], "mode 4 cannot be used"),
        (lambda p: _header(p, mapc=3, maps=1), r"order \(3, 2, 1\)"),
    ],
)
def test_bad_mrc_files(tmp_path, content, expected):
    path = tmp_path / "bad.mrc"
    if content is not None:
        path.write_bytes(content(tmp_path))
    for function in (mrc_header, open_mrc, read_map):
        with pytest.raises(InputError, match=expected) as caught:
            function(path)
        assert str(path) in str(caught.value)


def test_map_with_nan(tmp_path):
    array = np.ones((2, 2, 2), np.float32)
    array[0, 1, 1] = np.inf
    with mrcfile.new(tmp_path / "a.mrc") as mrc:
        mrc.set_data(np.ones((2, 2, 2), np.float32))
        mrc.data[...] = array
    with pytest.raises(InputError, match="not finite"):
        read_map(tmp_path / "a.mrc")


def test_star_files_read_by_several_threads(tmp_path):
    for k in range(4):
        write_star(tmp_path / f"{k}.star", {"x": pd.DataFrame({"rlnA": np.full(300, k)})})
    wrong = []

    def read(k):
        for _ in range(5):
            if not (read_star(tmp_path / f"{k}.star")["x"]["rlnA"] == k).all():
                wrong.append(k)

    threads = [threading.Thread(target=read, args=(k,)) for k in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not wrong


@needs_reference
def test_relion_files():
    blocks = read_star(REFERENCE / "relion_run" / "stacks2d" / "run_it010_data.star")
    assert list(blocks) == ["general", "optics", "particles"] and len(blocks["particles"]) == 100
    data, voxel = read_map(REFERENCE / "relion_run" / "stacks2d" / "run_it010_class001.mrc")
    assert data.shape == (40, 40, 40) and voxel == pytest.approx(8.1)


def test_names_with_an_apostrophe_or_a_hash_stay(tmp_path):
    """As in a folder's name; starfile alone takes them for quotes and comments."""
    table = pd.DataFrame({"rlnImageName": ["O'Brien/1.mrcs", "x/#2.mrcs"], "note": ["a#b", "two words"], "number": [1.5, 2.5]})
    path = tmp_path / "O'Brien.star"
    write_star(path, {"particles": table, "general": {"folder": "O'Brien/out", "count": 3}})
    blocks = read_star(path)
    pd.testing.assert_frame_equal(blocks["particles"], table, check_dtype=False)
    assert blocks["general"] == {"folder": "O'Brien/out", "count": 3}
    path.write_text("data_x\n\nloop_ # a comment\n_a #1\n_b #2\n'one word' 1 # of it\n\"another\" 2\n")
    assert read_star(path)["x"]["a"].tolist() == ["one word", "another"]
