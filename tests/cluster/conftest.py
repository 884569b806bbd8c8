import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.append(str(Path(__file__).parents[1] / "reference"))

from rig import expected, model_dir, rig  # noqa: E402, F401
