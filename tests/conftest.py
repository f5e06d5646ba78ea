import os
import re
from pathlib import Path

import pytest
import torch

from tests.helpers.devices import CUDA
from tests.helpers.paths import ROOT


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["cpu", CUDA])
def device(request: pytest.FixtureRequest) -> str:
    """The CPU too, so that what a GPU must show is itself tried where there is none."""
    return request.param


@pytest.fixture
def shared_data() -> Path:
    """Real images: PSBN_TEST_DATA, or ``shared/data`` beside the checkout."""
    folder = Path(os.environ.get("PSBN_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "coco128").is_dir():
        pytest.skip(f"no real images at {folder} (PSBN_TEST_DATA names another place)")
    return folder


@pytest.fixture
def checkpoints(shared_data: Path) -> Path:
    """Networks that others trained."""
    folder = shared_data / "checkpoints"
    if not folder.is_dir():
        pytest.skip(f"no published checkpoints at {folder}")
    return folder


# What may be skipped where CI is set, each with the reason why it cannot run on every machine.
MAY_BE_SKIPPED = {
    r"no CUDA device": "GPUs are not on every machine",
    r"^no Slurm cluster": "needs root and Debian's slurm-wlm",
    r"may mount a file system": "containers may forbid it",
    r"needs torch [<>=]": "the environment has one version of torch",
    r"^could not import '(wandb|mlflow|mmseg|mmpose|mmaction|mmdet3d|mmyolo)'": "optional peers",
}


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """In CI a test that could run there and was skipped is a failure."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if not os.environ.get("CI") or reporter is None:
        return
    for report in reporter.stats.get("skipped", []):
        reason = report.longrepr[2].removeprefix("Skipped: ")
        if not any(re.search(allowed, reason) for allowed in MAY_BE_SKIPPED):
            reporter.write_line(f"\nmust not be skipped in CI: {report.nodeid}: {reason}", red=True)
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
