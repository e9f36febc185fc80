"""Packaging: the three top-level folders ship as sub-packages of ``skymask_gpu``."""

from pathlib import Path

from setuptools import find_packages, setup

ROOTS = {
    "skymask_gpu": "skymask_gpu",
    "skymask_gpu.kernels": "kernels",
    "skymask_gpu.engine": "engine",
    "skymask_gpu.bench": "bench",
}

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
# `skymask-gpu data`: downloads. Beside a CPU build of torch its registry wheel does not work.
DATA = ["torchvision>=0.26"]
# Faces that a leaky gradient gives away: data set `lfw` is in scikit-image; Pillow reads `lfw-people` and `orl`.
PRIVACY = ["scikit-image>=0.26", "pillow>=10.1"]
# `Clustering(backend="cuml")`, beside a CUDA 13 build of torch; beside a CUDA 12 build install cuml-cu12 instead.
CUML = ["cuml-cu13>=26.10; platform_system == 'Linux'"]
# `skymask_gpu.integrations.flower`. No part of DEV: it demands older versions of typer and rich than the newest, with which
# the tests shall run.
FLOWER = ["flwr[simulation]>=1.42"]
# `examples/byzfl_plugin.py`. ByzFL's torchvision fails beside a torch for CPUs only: pip install --no-deps byzfl scipy.
BYZFL = ["byzfl>=0.0.11"]
# `[tracking]` in a run's file, and `skymask-gpu export`; W&B and MLflow are installed by whoever uses them.
TRACKING = ["tensorboard>=2.18"]
# Without a GPU, Triton is needed only by the tests (interpreter and offline compile).
TEST = [
    *RUN,
    "triton>=3.6,<3.10; platform_system == 'Linux'",
    "pytest>=8.4",
    "pytest-xdist>=3.5",
    "hypothesis>=6.100",
]
DEV = [*TEST, "ruff>=0.6", "mypy>=1.11", "build>=1.2"]

setup(
    name="skymask-gpu",
    version="0.1.0",
    description="SkyMask, the mask-based defence of federated learning, at the cost of averaging",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    package_dir=ROOTS,
    packages=[
        package for name, folder in ROOTS.items() for package in [name, *(f"{name}.{child}" for child in find_packages(folder))]
    ],
    package_data={"skymask_gpu": ["py.typed"], "skymask_gpu.report": ["*.html.j2"]},
    install_requires=REQUIRED,
    extras_require={
        "run": RUN,
        "data": DATA,
        "privacy": PRIVACY,
        "cuml": CUML,
        "flower": FLOWER,
        "byzfl": BYZFL,
        "tracking": TRACKING,
        "test": TEST,
        "dev": DEV,
    },
    entry_points={"console_scripts": ["skymask-gpu=skymask_gpu.__main__:main"]},
)
