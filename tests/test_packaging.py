"""What is installed and what an import costs."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import vdamkit

ROOT = Path(__file__).parents[1]


def _conda_requirements() -> set[str]:
    text = (ROOT / "environment.yml").read_text(encoding="utf-8")
    items = {line.strip()[2:] for line in text.splitlines() if re.match(r"\s+- ", line)}
    return items - {"conda-forge", "pip", "pip:", "-e .[fast,notebook,viewer]", "python>=3.11"}


def test_the_conda_environment_asks_for_what_pyproject_asks_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert _conda_requirements() == set(project["dependencies"])
    assert f"- python{project['requires-python']}" in (ROOT / "environment.yml").read_text(encoding="utf-8")


def test_an_import_is_quick_and_brings_no_screen():
    code = (
        "import time, sys, json; began = time.perf_counter(); import vdamkit; lap = time.perf_counter() - began;"
        "import vdamkit.session;"
        "heavy = [m for m in ('matplotlib', 'napari', 'ipywidgets', 'cupy', 'numba', 'IPython') if m in sys.modules];"
        "print(json.dumps([lap, heavy]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, heavy = json.loads(done.stdout)
    assert seconds < 1.0
    assert heavy == []


@pytest.mark.parametrize("name", sorted(set(vdamkit.__all__)))
def test_public_names_exist(name):
    assert getattr(vdamkit, name) is not None
    assert name in dir(vdamkit)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'sesion'"):
        _ = vdamkit.sesion


def test_the_version_is_that_of_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert vdamkit.__version__ == project["version"]
