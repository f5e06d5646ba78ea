"""An environment that cannot work is refused at import, in one line that says what to do."""

import os
import re
import subprocess
import sys
from importlib import metadata

import pytest

from psbn_mmdet.installed import DISTRIBUTIONS, check_environment, why_unfit
from tests.helpers.paths import ROOT

try:
    import tomllib
except ModuleNotFoundError:  # Python below 3.11, where pytest brings it
    import tomli as tomllib

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
FIT = dict(torch="2.13.0+cpu", numpy="2.4.6", mmengine="0.10.7", installed={})


def one_line(**environment):
    reason = why_unfit(**{**FIT, **environment})
    assert reason is not None
    assert "\n" not in reason
    return reason


def test_this_environment_is_fit():
    check_environment()


def test_versions_that_fit():
    assert why_unfit(**FIT) is None
    for torch in ("2.1.0", "2.10.0a0+git", "3.0"):
        assert why_unfit(**{**FIT, "torch": torch, "numpy": "1.26.4"}) is None
    assert why_unfit(**{**FIT, "torch": "2.3.0", "numpy": "2.0.0"}) is None
    assert why_unfit(**{**FIT, "mmengine": "0.10.12"}) is None


@pytest.mark.parametrize("torch", ["1.13.1", "2.0.1+cu118"])
def test_old_torch(torch):
    reason = one_line(torch=torch, numpy="1.26.4")
    assert reason.startswith("psbn_mmdet needs torch 2.1 or newer")
    assert reason.endswith(torch)


@pytest.mark.parametrize("torch", ["2.1.2", "2.2.2+cu121"])
def test_numpy_2_with_a_torch_built_for_numpy_1(torch):
    assert one_line(torch=torch).endswith("pip install 'numpy<2' 'opencv-python<4.12'")


def test_old_mmengine():
    assert "needs mmengine 0.10.7 or newer; this is 0.9.1" in one_line(mmengine="0.9.1")


def test_no_mmengine_names_both_extras():
    named = re.findall(r"psbn_mmdet\[(.+?)\]", one_line(mmengine=None))
    assert named == ["mmengine", "onedl-mmengine"]
    assert set(named) <= set(PROJECT["optional-dependencies"])


@pytest.mark.parametrize("module", DISTRIBUTIONS)
def test_two_distributions_of_one_module(module):
    names = [DISTRIBUTIONS[module][0], DISTRIBUTIONS[module][-1]]
    assert f"pip uninstall -y {names[0]} {names[1]}" in one_line(installed={module: names})
    assert why_unfit(**{**FIT, "installed": {module: names[1:]}}) is None


def test_a_distribution_whose_files_are_gone():
    """As after uninstalling the one that lay over it."""
    reason = one_line(mmengine=None, installed={"mmengine": ["onedl-mmengine"]})
    assert reason.endswith("pip install --force-reinstall --no-deps onedl-mmengine")


def test_no_distribution_is_required_that_another_could_be_in_the_place_of():
    either = {name for names in DISTRIBUTIONS.values() for name in names}
    for dependency in PROJECT["dependencies"]:
        assert re.match(r"[\w-]+", dependency)[0] not in either
    extras = PROJECT["optional-dependencies"]
    for extra in ("report", "theory", "ap"):
        assert not any(re.match(r"[\w-]+", named)[0] in either for named in extras[extra])


def test_importing_over_two_distributions_fails_in_one_line(tmp_path):
    """The fork's metadata beside OpenMMLab's, as pip leaves them."""
    installed = {d.metadata["Name"] for d in metadata.distributions()}
    (ours,) = installed & {*DISTRIBUTIONS["mmengine"]}
    other = "onedl-mmengine" if ours != "onedl-mmengine" else "mmengine"
    folder = tmp_path / f"{other.replace('-', '_')}-0.10.12.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {other}\nVersion: 0.10.12\n")
    (folder / "RECORD").write_text("mmengine/__init__.py,sha256=x,1\n")
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH"), str(ROOT)]))
    run = subprocess.run(
        [sys.executable, "-c", "import psbn_mmdet.registry"],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1
    assert "UnfitEnvironmentError: mmengine and onedl-mmengine are" in run.stderr.splitlines()[-1]
