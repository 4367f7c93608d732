"""Experiments of the papers and of this package, by name: see `python -m benchmarks list`."""

import os
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]

# Cells run beside each other, each on a core of its own.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# The data sets and networks are those of the Flower App.
sys.path.insert(0, str(REPOSITORY / "simulations"))
