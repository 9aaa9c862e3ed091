"""Policy for notebooks as tests. Their kernels inherit this process's environment."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parent

os.environ.setdefault("FLASHMOE_PROFILE", "ci")
os.environ.setdefault("PYTHONHASHSEED", "0")
# pytest's own `pythonpath` does not reach kernels
paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
os.environ.pop("MPLBACKEND", None)  # figures must be drawn inline, as in JupyterLab


def pytest_configure(config: pytest.Config) -> None:
    """Name the sanitizing rules by an absolute path, so that pytest works anywhere."""
    config.option.nbval_sanitize_with = str(ROOT / "tests" / "nbval_sanitize.cfg")


def pytest_collectstart(collector: pytest.Collector) -> None:
    """Leave out what differs in each run: process numbers in warnings, dates in SVG."""
    if hasattr(collector, "skip_compare"):  # nbval's collector of a notebook
        collector.skip_compare += ("stderr", "image/svg+xml")
