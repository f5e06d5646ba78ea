"""What pyproject.toml cannot say: configs and tools ship inside the wheel."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent


class BuildWithConfigs(build_py):
    """Ship the configs and tools in psbn_mmdet/.mim, where mmengine and mim look for them."""

    def run(self) -> None:
        """Copy them beside the modules; an editable install finds them in the checkout."""
        super().run()
        if self.editable_mode:
            return
        mim = Path(self.build_lib, "psbn_mmdet", ".mim")
        for folder in ("configs", "tools"):
            shutil.copytree(
                ROOT / folder,
                mim / folder,
                ignore=shutil.ignore_patterns("__pycache__", "setup.sh", "mmcv_on_*"),
                dirs_exist_ok=True,
            )
        shutil.copy(ROOT / "model-index.yml", mim)


setup(cmdclass={"build_py": BuildWithConfigs})
