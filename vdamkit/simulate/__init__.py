"""Virtual tilt series of a known particle, extracted into RELION pseudo-subtomograms with known poses."""

from vdamkit.simulate.settings import SimulationSettings
from vdamkit.simulate.simulate import simulate

__all__ = ["SimulationSettings", "simulate"]
