"""Fixtures shared by the tests. XLA compilation is what costs here, so compiled functions are cached across processes."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np  # noqa: E402
import pytest  # noqa: E402

GOLDEN_DIR = Path(os.environ.get("GOLDEN_DIR", ROOT / "tests" / "golden"))


@pytest.fixture(scope="session")
def golden():
    """Reads a recording: golden("single_update.npz") -> dict of arrays; golden("single.pt") -> path."""

    def read(name: str):
        path = GOLDEN_DIR / name
        return dict(np.load(path)) if path.suffix == ".npz" else path

    return read
