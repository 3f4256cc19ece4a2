"""The scripts of benchmarks/ are no package: their tests import them from their folder."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
