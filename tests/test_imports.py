"""The house rule: each layer imports only what stands below it, and light commands load nothing heavy."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent / "e88"

# What each part may import besides itself. Leaves may be imported by everyone.
LEAVES = {"e88.errors", "e88.files", "e88.models.config", "e88.training.config", "e88"}
ALLOWED = {
    "runtime": set(),
    "ops": {"runtime"},
    "layers": {"ops", "runtime"},
    "baselines": {"layers", "ops", "runtime"},
    "models": {"layers", "ops", "runtime"},
    "data": {"runtime"},
    "sizing": {"models.lm", "runtime"},
    "training": {"data", "models", "sizing", "layers", "ops", "runtime"},
    "study": {"training", "sizing", "data", "models", "runtime"},
    # The parts of study that make no run.
    "report": {
        f"study.{m}" for m in ("store", "statistics", "design", "judge", "verdict", "findings", "frontier", "claims")
    },
    "cli": {"report", "study", "training", "sizing", "data", "models", "layers", "ops", "runtime"},
}
HEAVY = {"torch", "numba", "triton", "transformers", "matplotlib", "scipy", "pandas"}


def sources():
    return sorted(p for p in ROOT.rglob("*.py") if "__pycache__" not in p.parts)


KERNELS = sorted((ROOT / "e88" / "ops" / "cuda").glob("*.cu*"))


def imported_modules(path):
    """Every e88 module that a file imports anywhere, also inside functions."""
    package = path.relative_to(ROOT.parent).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            names = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name for name in names if name == "e88" or name.startswith("e88."))


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_each_layer_imports_only_what_stands_below_it(path):
    part = path.relative_to(ROOT).parts[0].removesuffix(".py")
    if part in ("__init__", "__main__", "errors", "files"):
        return
    for name in imported_modules(path):
        if any(name == leaf or name.startswith(leaf + ".") and leaf != "e88" for leaf in LEAVES):
            continue
        target = name.removeprefix("e88.")
        if target.split(".")[0] == part or target in ("__version__",):
            continue
        allowed = any(target == a or target.startswith(a + ".") for a in ALLOWED[part])
        assert allowed, f"{path.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize("path", [*sources(), *KERNELS], ids=lambda p: str(p.relative_to(ROOT)))
def test_files_stay_short(path):
    limit = 400 if "kernels" in path.name or "triton" in path.parts or path in KERNELS else 300
    assert len(path.read_text().splitlines()) <= limit


@pytest.mark.parametrize(
    "statement",
    ["import e88", "import e88.cli", "import e88.models.config, e88.training.config, e88.sizing.presets"],
)
def test_light_imports_load_nothing_heavy(statement):
    code = f"import sys; {statement}; print(*sorted(m for m in sys.modules if '.' not in m))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not HEAVY & set(run.stdout.split())


def test_public_names_resolve():
    import e88

    for name in e88.__all__:
        assert getattr(e88, name) is not None
