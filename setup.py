"""Packaging: the three top-level folders ship as sub-packages of ``skymask_gpu``.

Names, classifiers and everything else that never changes is in ``pyproject.toml``. Here is what is
computed: requirements, packages, and the README as an index page shows it.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOTS = {
    "skymask_gpu": "skymask_gpu",
    "skymask_gpu.kernels": "kernels",
    "skymask_gpu.engine": "engine",
    "skymask_gpu.bench": "bench",
}

# The folder that shows the files of the released version, such as "https://HOST/OWNER/NAME/blob/main/", and the
# one that serves pictures themselves. Fill both in once the repository has a public address.
FILES = ""
PICTURES = ""

# Enough to aggregate updates; Triton comes with every CUDA build of torch.
REQUIRED = [
    "torch>=2.11,<2.15",
    "numpy>=1.26",
    "safetensors>=0.4",
    "numba>=0.61",
    "typer>=0.12",
    "rich>=13",
]
# `skymask-gpu run`: data sets, plots and the HTML report.
RUN = ["scikit-learn>=1.4", "matplotlib>=3.8", "jinja2>=3.1"]
# `skymask-gpu data`: downloads.
DATA = ["pooch>=1.8.2"]
# Faces that a leaky gradient gives away: data set `lfw` is in scikit-image; Pillow reads `lfw-people` and `orl`.
PRIVACY = ["scikit-image>=0.26", "pillow>=10.1"]
# `Clustering(backend="cuml")`, beside a CUDA 13 build of torch; beside a CUDA 12 build install cuml-cu12 instead.
CUML = ["cuml-cu13>=26.10; platform_system == 'Linux'"]
# `skymask_gpu.integrations.flower`. No part of DEV: it demands older versions of typer and rich than the newest, with which
# the tests shall run.
FLOWER = ["flwr[simulation]>=1.42"]
# `examples/byzfl_plugin.py`. ByzFL's torchvision fails beside a torch for CPUs only: pip install --no-deps byzfl scipy.
BYZFL = ["byzfl>=0.0.11"]
# `[tracking]` in a run's file, and `skymask-gpu export`; W&B and MLflow are installed by whoever uses them. TensorBoard
# before 2.21 needs pkg_resources, which setuptools no longer has.
TRACKING = ["tensorboard>=2.21"]
# `skymask_gpu.integrations.nvflare`. No part of DEV: it brings a web server along.
NVFLARE = ["nvflare>=2.9"]
# Without a GPU, Triton and NVRTC are needed only by the tests (interpreter and offline compile).
TEST = [
    *RUN,
    *DATA,
    "triton>=3.6,<3.10; platform_system == 'Linux'",
    "nvidia-cuda-nvrtc>=13.0.88; platform_system == 'Linux'",
    "pytest>=8.4",
    "pytest-xdist>=3.5",
    "hypothesis>=6.100",
]
DEV = [*TEST, "ruff>=0.6", "mypy>=1.11", "build>=1.2", "twine>=6.1"]
# `make docs`, in an environment of its own: one notebook runs a strategy of Flower, without its simulation.
DOCS = [*RUN, "sphinx>=8.2", "furo>=2025.7", "myst-nb>=1.3", "flwr>=1.42"]


def index_page(readme: str, files: str, pictures: str) -> str:
    """The README for a page that does not lie beside the repository's files.

    Relative links and pictures get the addresses of the repository. Without an address, a link becomes its
    text, and a picture is left out, because both would lead nowhere.
    """
    relative = r"\((?![a-z]+:|#)([^)\s]+)\)"
    if not (files and pictures):
        readme = re.sub(rf"^!\[[^\]]*\]{relative}\n+", "", readme, flags=re.MULTILINE)
        return re.sub(rf"\[([^\]]*)\]{relative}", r"\1", readme)
    readme = re.sub(rf"(!\[[^\]]*\]){relative}", rf"\1({pictures}\2)", readme)
    return re.sub(rf"(?<!!)(\[[^\]]*\]){relative}", rf"\1({files}\2)", readme)


# Also true where a build tool executes this file; a test reads `index_page` without building anything.
if __name__ == "__main__":
    setup(
        long_description=index_page(Path("README.md").read_text(encoding="utf-8"), FILES, PICTURES),
        long_description_content_type="text/markdown",
        package_dir=ROOTS,
        packages=[
            package
            for name, folder in ROOTS.items()
            for package in [name, *(f"{name}.{child}" for child in find_packages(folder))]
        ],
        package_data={
            "skymask_gpu": ["py.typed"],
            "skymask_gpu.report": ["*.html.j2"],
            "skymask_gpu.kernels.bins": ["bins.cu"],
        },
        install_requires=REQUIRED,
        extras_require={
            "run": RUN,
            "data": DATA,
            "privacy": PRIVACY,
            "cuml": CUML,
            "flower": FLOWER,
            "byzfl": BYZFL,
            "nvflare": NVFLARE,
            "tracking": TRACKING,
            "docs": DOCS,
            "test": TEST,
            "dev": DEV,
        },
    )
