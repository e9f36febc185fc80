"""The documentation site, as far as it can be checked without building it: names, examples, links and the picture."""

import importlib
import inspect
import re
from pathlib import Path

import pytest

MODULES = ("skymask_gpu", "skymask_gpu.engine", "skymask_gpu.federation")
NAMES = [(module, name) for module in MODULES for name in importlib.import_module(module).__all__]


def pages(checkout: Path) -> list[Path]:
    """The pages of the site and those that lie beside the README."""
    return [*sorted(checkout.glob("*.md")), *sorted((checkout / "docs").rglob("*.md"))]


def documented(checkout: Path) -> set[str]:
    """The full names that the API pages document."""
    text = "\n".join(page.read_text() for page in (checkout / "docs" / "api").glob("*.md"))
    return set(re.findall(r"^\.\. auto\w+:: ([\w.]+)$", text, re.MULTILINE))


@pytest.mark.parametrize(("module", "name"), NAMES)
def test_every_public_name_is_on_an_api_page(module: str, name: str, checkout: Path) -> None:
    thing = getattr(importlib.import_module(module), name)
    # What the top level only hands on stands on the page of the package that defines it.
    places = {f"{other}.{name}" for other in MODULES if getattr(importlib.import_module(other), name, None) is thing}
    assert places & documented(checkout), f"add {module}.{name} to a page of docs/api"


@pytest.mark.parametrize(("module", "name"), NAMES)
def test_every_public_class_and_function_has_an_example(module: str, name: str) -> None:
    thing = getattr(importlib.import_module(module), name)
    if not (inspect.isclass(thing) or inspect.isfunction(thing)):
        return
    members = [member for member in vars(thing).values() if inspect.isfunction(member)] if inspect.isclass(thing) else []
    assert any(">>> " in (member.__doc__ or "") for member in [thing, *members]), f"{module}.{name} has no example"


def test_what_the_api_pages_document_exists(checkout: Path) -> None:
    names = documented(checkout)
    assert len(names) > 30
    # Flower need not be installed here.
    for full in {name for name in names if ".integrations.flower." not in name}:
        module, _, name = full.rpartition(".")
        assert hasattr(importlib.import_module(module), name), full


def test_every_page_is_in_the_table_of_contents(checkout: Path) -> None:
    docs = checkout / "docs"
    listed = set(re.findall(r"^([a-z_/]+)$", (docs / "index.md").read_text(), re.MULTILINE))
    written = {page.relative_to(docs).with_suffix("").as_posix() for page in docs.rglob("*.md")}
    assert written - {"index"} <= listed
    assert listed <= written, "the table of contents names pages that do not exist"


def prose_of(page: Path) -> str:
    """The page without its blocks of code, in which a # is no heading and a bracket no link."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """The names of a page's headings in links, as the site and pages of repositories make them."""
    headings = re.findall(r"^#{1,3} (.*)$", prose_of(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_between_pages_lead_somewhere(checkout: Path) -> None:
    found = 0
    for page in pages(checkout):
        for target in re.findall(r"\]\((?![a-z]+:)([^)\s]+)\)", prose_of(page)):
            name, _, anchor = target.partition("#")
            file = (page.parent / name).resolve() if name else page
            assert file.is_file(), f"{page.name} links to {target}"
            assert not anchor or anchor in anchors(file), f"{page.name} links to {target}, which has no such heading"
            found += 1
    assert found > 40


def test_notebooks_are_text_with_cells(checkout: Path) -> None:
    notebooks = [page for page in (checkout / "docs").glob("*.md") if "file_format: mystnb" in page.read_text()]
    assert len(notebooks) == 4
    for page in notebooks:
        cells = re.findall(r"^```\{code-cell\}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
        assert len(cells) > 2, page.name
        for cell in cells:
            compile(re.sub(r"^:.*\n\n?", "", cell), page.name, "exec")
