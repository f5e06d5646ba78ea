import os
from pathlib import Path

import pytest
import torch

from tests.helpers.paths import ROOT


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def shared_data() -> Path:
    """Real images: PSBN_TEST_DATA, or ``shared/data`` beside the checkout."""
    folder = Path(os.environ.get("PSBN_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "coco128").is_dir():
        pytest.skip(f"no real images at {folder} (PSBN_TEST_DATA names another place)")
    return folder
