"""Shared by all tests: helpers in this folder can be imported, and property tests are reproducible."""

import sys
from pathlib import Path

from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent))

settings.register_profile("vdamkit", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("vdamkit")
