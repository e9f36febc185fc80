"""The prose of docstrings, comments and pages keeps the rules of CONTRIBUTING.md, "How we write".

Only what a program can see is tested: words and openings that make a sentence hard to read, the width of
prose lines, and the sizes of functions and files.
"""

import ast
import io
import re
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# --- EXCEPTIONS: violations that are left, by check and by file or folder; empty these lists -------------
HARD_TO_READ_LEFT: dict[str, int] = {}
TOO_WIDE_LEFT: dict[str, int] = {}
TOO_LARGE_LEFT: dict[str, int] = {}
# ---------------------------------------------------------------------------------------------------------

PRODUCT = ("kernels", "engine", "skymask_gpu")
PROSE_WIDTH = 100
FUNCTION_LINES = 60
FILE_LINES = 350

# What is hard to read and easy to find: a vague amount in the place of a number, and an opening without a
# subject, in a docstring, a comment or a sentence. The test below has examples of both.
HARD_TO_READ = re.compile(r"\b[Ss]o[ -](?:many|long|manieth)\b(?! as\b)|(?:^|[.:?!|*]\s+)Of\s", re.MULTILINE)
# what CONTRIBUTING.md quotes as bad examples
QUOTED = re.compile(r'Before: ".*?"', re.DOTALL)

Violation = tuple[str, str]


def python_files(checkout: Path, folders: tuple[str, ...]) -> list[Path]:
    return [file for folder in folders for file in sorted((checkout / folder).rglob("*.py"))]


def prose_lines(text: str) -> Iterator[tuple[int, str, bool]]:
    """(number of the first line, text, whether it stands alone on its lines) of each docstring and comment."""
    comment, first, last = "", 0, -1
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type != tokenize.COMMENT:
            continue
        number, alone, words = token.start[0], token.line.lstrip().startswith("#"), token.string.lstrip("# ")
        if alone and number == last + 1:
            comment, last = f"{comment}\n{words}", number
            continue
        if comment:
            yield first, comment, True
        comment, first, last = (words, number, number) if alone else ("", 0, -1)
        if not alone:
            yield number, words, False
    if comment:
        yield first, comment, True
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node, clean=False)
            if docstring is not None:
                yield node.body[0].lineno, docstring, True


def hard_to_read(checkout: Path) -> Iterator[Violation]:
    for file in python_files(checkout, (*PRODUCT, "bench")):
        name = file.relative_to(checkout).as_posix()
        for number, prose, _ in prose_lines(file.read_text()):
            for found in HARD_TO_READ.finditer(prose.strip()):
                yield name, f"line {number}: {found.group().strip()!r} in {prose.strip()[:60]!r}"
    for file in [*sorted(checkout.glob("*.md")), *sorted((checkout / "docs").rglob("*.md"))]:
        page = QUOTED.sub("", file.read_text())
        for found in HARD_TO_READ.finditer(page):
            yield file.relative_to(checkout).as_posix(), f"line {page[: found.start()].count(chr(10)) + 1}: {found.group()!r}"


def too_wide(checkout: Path) -> Iterator[Violation]:
    for file in python_files(checkout, (*PRODUCT, "bench")):
        text = file.read_text()
        lines = text.splitlines()
        for first, prose, alone in prose_lines(text):
            for number in range(first, first + prose.count("\n") + 1) if alone else ():
                line = lines[number - 1]
                may_be_wide = line.lstrip().startswith(("|", "# |")) or "://" in line
                if len(line) > PROSE_WIDTH and not may_be_wide:
                    yield file.relative_to(checkout).as_posix(), f"line {number} has {len(line)} characters"


def too_large(checkout: Path) -> Iterator[Violation]:
    """Functions, whose docstrings do not count, and files. Kernels may be larger."""
    for file in python_files(checkout, PRODUCT[1:]):
        name, text = file.relative_to(checkout).as_posix(), file.read_text()
        if (length := len(text.splitlines())) > FILE_LINES:
            yield name, f"{length} lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                first = node.body[0]
                is_docstring = ast.get_docstring(node) is not None
                docstring = (first.end_lineno or 0) - first.lineno + 1 if is_docstring else 0
                if (length := (node.end_lineno or 0) - node.lineno + 1 - docstring) > FUNCTION_LINES:
                    yield name, f"{node.name} has {length} lines"


@pytest.mark.parametrize(
    ("check", "left"),
    [(hard_to_read, HARD_TO_READ_LEFT), (too_wide, TOO_WIDE_LEFT), (too_large, TOO_LARGE_LEFT)],
    ids=["words", "width", "size"],
)
def test_prose(check: Callable[[Path], Iterator[Violation]], left: dict[str, int], checkout: Path) -> None:
    groups: dict[str, list[str]] = {}
    for name, what in check(checkout):
        group = next((excepted for excepted in left if name.startswith(excepted)), name)
        groups.setdefault(group, []).append(f"{name}, {what}")
    for group, found in groups.items():
        most = left.get(group, 0)
        assert len(found) <= most, f"{len(found)} violations in {group}, at most {most} are excepted:\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("prose", "is_hard"),
    [
        ("Of the cuts, one is best.", True),
        ("A cut. Of these, one is best.", True),
        ("Blocks of so many bytes.", True),
        ("every so-manieth column", True),
        ("so long as it lasts", False),
        ("One of the cuts. Often it is best.", False),
    ],
)
def test_hard_openings_and_words_are_found(prose: str, is_hard: bool) -> None:
    assert bool(HARD_TO_READ.search(prose)) is is_hard


def test_comments_and_docstrings_are_found() -> None:
    text = '"""Head."""\n# one\n# two\nx = 1  # three\n\n\ndef f():\n    """Doc\n    string."""\n'
    found = sorted(prose_lines(text))
    assert found == [(1, "Head.", True), (2, "one\ntwo", True), (4, "three", False), (8, "Doc\n    string.", True)]
