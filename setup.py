import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent


class BuildWithConfigs(build_py):
    """Ship the configs and tools in psbn_mmdet/.mim, where mmengine and mim look for them."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        mim = Path(self.build_lib, "psbn_mmdet", ".mim")
        for folder in ("configs", "tools"):
            shutil.copytree(
                ROOT / folder,
                mim / folder,
                ignore=shutil.ignore_patterns("__pycache__", "setup.sh"),
                dirs_exist_ok=True,
            )
        shutil.copy(ROOT / "model-index.yml", mim)


setup(
    name="psbn_mmdet",
    version=re.search(r'__version__ = "(.+)"', (ROOT / "psbn_mmdet/__init__.py").read_text())[1],
    description="Post-shifted batch normalization (psBN) for the MMDetection ecosystem",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["psbn_mmdet", "psbn_mmdet.*"]),
    package_data={"psbn_mmdet": ["py.typed"], "psbn_mmdet.collapse": ["page.html"]},
    cmdclass={"build_py": BuildWithConfigs},
    python_requires=">=3.10",
    # Not mmcv: it has to be built, or picked by mim, to fit torch (README).
    install_requires=[
        "torch>=2.1",
        "mmengine>=0.10.7",
        "mmdet>=3.3.0",
        "numpy>=1.26",
        "scipy",
        "matplotlib",
        "plotly",
        "numba",
        "jinja2",
        "pycocotools",
        "safetensors",
        "tqdm",
        "setuptools<81",  # mmengine imports pkg_resources
    ],
)
