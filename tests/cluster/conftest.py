import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.append(str(Path(__file__).parents[1] / "reference"))

from rig import expected, model_dir, rig  # noqa: E402, F401

from blitzjax.serve.client import Client  # noqa: E402

Client.status.__defaults__ = (300.0,)  # a controller that gets no time answers later, not wrongly
