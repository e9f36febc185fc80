"""The shape of the code: which way imports go, and what importing costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

# what each part may import of the others
ALLOWED = {
    "kernels": {"kernels"},
    "engine": {"kernels", "engine"},
    "skymask_gpu": {"kernels", "engine", "skymask_gpu"},
    "bench": {"kernels", "engine", "skymask_gpu", "bench"},
}
# the one command that plays the benchmark
BENCH_COMMAND = Path("skymask_gpu", "cli", "bench.py")


def imported_parts(file: Path) -> set[str]:
    """Which of the four parts a file imports."""
    parts = set()
    for node in ast.walk(ast.parse(file.read_text())):
        names = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for name in names:
            path = name.split(".")
            if path[0] in ("kernels", "engine", "bench"):
                parts.add(f"top-level {path[0]}")
            if path[0] == "skymask_gpu":
                parts.add(path[1] if len(path) > 1 and path[1] in ALLOWED else "skymask_gpu")
    return parts


@pytest.mark.parametrize("part", ALLOWED)
def test_imports_go_one_way(part: str, checkout: Path) -> None:
    files = [f for f in (checkout / part).rglob("*.py") if f.relative_to(checkout) != BENCH_COMMAND]
    assert files
    for file in files:
        wrong = imported_parts(file) - ALLOWED[part]
        assert not wrong, f"{file.relative_to(checkout)} imports {wrong}"


def imported_modules(file: Path, modules: set[str]) -> set[str]:
    """Which of the package's own modules a file imports; imports within functions do not count."""
    found = set()
    waiting = list(ast.parse(file.read_text()).body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            # `from package import name` reads the package's own names, unless the name is a module
            found |= {name if (name := f"{node.module}.{alias.name}") in modules else node.module for alias in node.names}
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            waiting += ast.iter_child_nodes(node)
    return found & modules


def circle(imports: dict[str, set[str]]) -> list[str] | None:
    """Modules each of which imports the next, and the last the first; None if there are none."""
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str] | None:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return None
        found = next(filter(None, (visit(other, [*path, module]) for other in sorted(imports[module]))), None)
        done.add(module)
        return found

    return next(filter(None, (visit(module, []) for module in sorted(imports))), None)


def test_no_module_imports_itself_through_others(checkout: Path) -> None:
    files = {}
    for part in ALLOWED:
        for file in (checkout / part).rglob("*.py"):
            names = [*file.relative_to(checkout).with_suffix("").parts]
            names = names if part == "skymask_gpu" else ["skymask_gpu", *names]
            files[".".join(names).removesuffix(".__init__")] = file
    imports = {module: imported_modules(file, set(files)) for module, file in files.items()}
    assert len(imports["skymask_gpu.engine"]) > 5, "imports must be found at all"
    # kernels/dispatch.py imports a kernel's compiled code by its name, which no syntax tree shows
    for module in files:
        package, _, name = module.rpartition(".")
        if package.startswith("skymask_gpu.kernels.") and name in ("cuda", "triton", "cpu"):
            imports[package].add(module)
    found = circle(imports)
    assert found is None, f"import circle: {' -> '.join(found or [])}"


def test_a_circle_is_found() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": set(), "d": {"b", "c"}}) is None
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"d"}, "d": {"b"}}) == ["b", "c", "d", "b"]
    assert circle({"a": {"a"}}) == ["a", "a"]


def test_the_reference_solver_imports_no_kernel(checkout: Path) -> None:
    tree = ast.parse((checkout / "engine" / "solvers" / "reference.py").read_text())
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert modules == {
        "torch",
        "skymask_gpu.engine.bits",
        "skymask_gpu.engine.progress",
        "skymask_gpu.engine.solvers.solution",
        "skymask_gpu.engine.solvers.solver",
        "skymask_gpu.engine.training_config",
    }


def test_the_package_is_light_until_one_of_its_names_is_asked_for() -> None:
    script = (
        "import sys, skymask_gpu\n"
        "assert 'torch' not in sys.modules\n"
        "assert not hasattr(skymask_gpu, 'SkyMusk')\n"
        "assert all(hasattr(skymask_gpu, name) for name in skymask_gpu.__all__)\n"
        "assert set(skymask_gpu.__all__) <= set(dir(skymask_gpu))\n"
        "assert skymask_gpu.engine.ClientBlocks is not None\n"
    )
    subprocess.run([sys.executable, "-P", "-c", script], check=True)


def test_importing_the_package_touches_no_gpu_and_loads_nothing_heavy() -> None:
    script = (
        "import sys, torch, skymask_gpu\n"
        "skymask_gpu.SkyMask\n"
        "heavy = {'triton', 'numba', 'sklearn', 'matplotlib', 'jinja2', 'torchvision', 'typer'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    subprocess.run([sys.executable, "-P", "-c", script], check=True)


def test_the_top_level_folders_are_no_packages_of_their_own() -> None:
    script = "from importlib.util import find_spec; assert not any(map(find_spec, ('kernels', 'engine', 'bench')))"
    subprocess.run([sys.executable, "-P", "-c", script], check=True)
