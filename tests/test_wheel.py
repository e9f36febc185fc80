"""The wheel: what is in it, what an index page shows of it, and that it works where no checkout is."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from email import message_from_bytes
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest

import skymask_gpu

# The versions of Python that the metadata admit, and that may be on this machine.
PYTHONS = ("python3.11", "python3.12", "python3.13", "python3.14")


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of the files that git knows, so that nothing else can get into it."""
    if find_spec("build") is None or find_spec("setuptools") is None:
        pytest.skip("build and setuptools are needed")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(["git", "ls-files"], cwd=checkout, capture_output=True, text=True, check=True)
    for name in listed.stdout.splitlines():
        if (checkout / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((checkout / name).read_bytes())
    build = [sys.executable, "-P", "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    subprocess.run(build, check=True, capture_output=True)
    (built,) = out.glob("*.whl")
    return built


def test_it_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"skymask_gpu"}
    for wanted in (
        "skymask_gpu/py.typed",
        "skymask_gpu/report/page.html.j2",
        "skymask_gpu/kernels/mask_step/triton.py",
        "skymask_gpu/kernels/bins/bins.cu",
        "skymask_gpu/engine/solvers/reference.py",
        "skymask_gpu/bench/run.py",
    ):
        assert wanted in names
    assert not [name for name in names if "test" in name]


def test_its_metadata_are_what_an_index_needs(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
    metadata = message_from_bytes(archive.read(name))
    assert metadata["Version"] == skymask_gpu.__version__
    assert metadata["Author"] == "skymask-gpu developers"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata.get_all("Project-URL")
    assert "Typing :: Typed" in metadata.get_all("Classifier", [])
    extras = metadata.get_all("Provides-Extra", [])
    assert {"run", "data", "privacy", "flower", "docs"} <= set(extras)
    assert "torch" in {re.split(r"[<>=]", requirement)[0] for requirement in metadata.get_all("Requires-Dist", [])}
    readme = str(metadata.get_payload())
    assert "The license is Apache-2.0. CONTRIBUTING.md says" in readme
    assert not re.search(r"\]\((?!https://)", readme), "nothing leads to a file that is not on the page"


@pytest.fixture
def index_page(checkout: Path) -> Callable[[str, str, str], str]:
    return runpy.run_path(str(checkout / "setup.py"), run_name="read_only")["index_page"]


README = """# Name

[Page](docs/page.md#part) and [paper](https://example.org/paper) and [below](#name).

![A picture](docs/picture.png)

The end.
"""


def test_links_of_the_readme_get_the_address_of_the_repository(index_page: Callable[[str, str, str], str]) -> None:
    page = index_page(README, "https://example.org/blob/", "https://example.org/raw/")
    assert "[Page](https://example.org/blob/docs/page.md#part)" in page
    assert "[paper](https://example.org/paper) and [below](#name)" in page
    assert "![A picture](https://example.org/raw/docs/picture.png)" in page


def test_links_of_the_readme_become_text_without_an_address(index_page: Callable[[str, str, str], str]) -> None:
    wanted = "# Name\n\nPage and [paper](https://example.org/paper) and [below](#name).\n\nThe end.\n"
    assert index_page(README, "", "") == wanted


RUN = """
seed = 0
rounds = 2

[data]
dataset = "digits"
clients = 20

[attack]
name = "sign-flip"
share = 0.2

[defence]
rule = "skymask"
"""


@pytest.mark.slow
@pytest.mark.parametrize("python", PYTHONS)
def test_it_works_in_an_empty_environment(wheel: Path, python: str, tmp_path: Path) -> None:
    # A shim of pyenv may be there without the Python that it stands for.
    if shutil.which(python) is None or subprocess.run([python, "--version"], capture_output=True, check=False).returncode:
        pytest.skip(f"{python} is not on this machine")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}

    def call(*command: str | Path) -> str:
        done = subprocess.run([*map(str, command)], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.stdout}\n{done.stderr}"
        return done.stdout

    call(python, "-m", "venv", "venv")
    bin_folder = tmp_path / "venv" / "bin"
    # the torch that these tests run with, because the newest one may need a GPU's libraries
    torch = f"torch=={version('torch').split('+')[0]}"
    call(bin_folder / "pip", "install", "-q", torch, f"{wheel}[run]")
    skymask = bin_folder / "skymask-gpu"
    where = call(bin_folder / "python", "-c", "import skymask_gpu; print(skymask_gpu.__file__)")
    assert Path(where.strip()).is_relative_to(tmp_path / "venv")
    assert skymask_gpu.__version__ in call(skymask, "--version")

    call(skymask, "example", "round")
    files = {"--global": "global.safetensors", "--updates": "updates", "--root": "root.npz", "--model": "my_model.py:Net"}
    options = [part for option, file in files.items() for part in (option, f"round/{file}")]
    call(skymask, "aggregate", *options, "--out", "new.safetensors", "--json", "verdict.json")
    clients = json.loads((tmp_path / "verdict.json").read_text())["clients"]
    assert [name for name, verdict in clients.items() if not verdict["benign"]] == [f"client{n:02}" for n in (3, 7, 12, 18)]

    (tmp_path / "run.toml").write_text(RUN)
    call(skymask, "run", "run.toml", "--out", "out")
    assert list((tmp_path / "out").rglob("report.html"))
    (metrics,) = (tmp_path / "out").rglob("metrics.jsonl")
    assert len(metrics.read_text().splitlines()) == 2
