"""Benchmarks of deqdiff_fast: `python -m bench NAME [options]` in the root of a checkout, with the package installed.

What is measured is the installed package. `python -m` and pytest put the root of the checkout on the path, where the
sources lie; it is taken off again wherever the package can be found without it.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def _measure_the_installed_package() -> None:
    before = list(sys.path)
    sys.path[:] = [entry for entry in before if Path(entry).resolve() != ROOT]
    if "deqdiff_fast" not in sys.modules and importlib.util.find_spec("deqdiff_fast") is None:
        sys.path[:] = before


_measure_the_installed_package()
