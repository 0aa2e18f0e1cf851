"""Interactive de novo 3D initial models for subtomogram averaging, one VDAM mini-batch at a time.

The public face. Names are loaded at first use, so that ``import vdamkit`` costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

try:
    __version__ = version("vdamkit")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

_HOMES = {
    "Session": "vdamkit.session",
    "Settings": "vdamkit.settings",
    "State": "vdamkit.state",
    "StepReport": "vdamkit.state",
    "open_particles": "vdamkit.io.particles",
    "simulate": "vdamkit.simulate",
    "run_demo": "vdamkit.demo",
    "tutorial_data": "vdamkit.demo",
    "VdamkitError": "vdamkit.errors",
    "InputError": "vdamkit.errors",
    "OutputError": "vdamkit.errors",
    "ParticleError": "vdamkit.errors",
    "SettingsError": "vdamkit.errors",
}
"""Where each public name is defined."""

__all__ = [
    "InputError",
    "OutputError",
    "ParticleError",
    "Session",
    "Settings",
    "SettingsError",
    "State",
    "StepReport",
    "VdamkitError",
    "__version__",
    "open_particles",
    "run_demo",
    "simulate",
    "tutorial_data",
]


def __getattr__(name: str) -> Any:
    """Load a public name at its first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'vdamkit' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
