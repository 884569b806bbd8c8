"""Lets the tests here import `tiny_families`, which the reference scripts use too."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "reference"))
