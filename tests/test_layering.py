"""The shape of the project: imports go one way, importing is free of side effects, no file outgrows a reader."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "triton_conv3d"
MAX_LINES = 450

# Each layer may import the layers before it, and its own package; names in one layer do not import each other.
LAYERS = (
    ("problem", "settings", "console"),
    ("reference",),
    ("engines",),
    ("tuning", "batching", "flops"),
    ("posing",),
    ("ops",),
    ("functional", "decompositions"),
    ("modules", "transposed", "compile_backend", "workload"),
    ("convert", "explain", "tryout"),
    ("__init__",),
    ("demo",),
    ("__main__",),
)
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}


def python_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.py") if "__pycache__" not in path.parts)


def imported_names(path: Path, root: Path = ROOT) -> set[str]:
    """Absolute dotted names that a file imports, wherever in the file it does so."""
    package = path.relative_to(root).with_suffix("").parts[:-1]
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *([node.module] if node.module else [])))
            names.update(f"{module}.{alias.name}" for alias in node.names)
    return names


def layer_of(dotted: str) -> str | None:
    """The part of triton_conv3d that a dotted name belongs to; None if it is not of this package."""
    first, *rest = dotted.split(".")
    if first != "triton_conv3d":
        return None
    return rest[0] if rest and rest[0] in RANK else "__init__"


def violations(path: Path, root: Path = ROOT) -> list[str]:
    own = layer_of(".".join(path.relative_to(root).with_suffix("").parts))
    found = []
    for name in sorted(imported_names(path, root)):
        other = layer_of(name)
        if other is not None and other != own and RANK[other] >= RANK[own]:
            found.append(f"{path.relative_to(root)} ({own}) imports {name} ({other})")
    return found


def test_every_module_has_a_layer():
    parts = {p.stem if p.is_file() else p.name for p in PACKAGE.iterdir() if p.suffix == ".py" or p.is_dir()}
    assert parts - {"__pycache__"} <= set(RANK)


@pytest.mark.parametrize("path", python_files(PACKAGE), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    assert violations(path) == []


@pytest.mark.parametrize(
    "file, line",
    [
        ("engines/a.py", "from ..tuning import select"),
        ("engines/a.py", "from .. import conv3d"),
        ("problem.py", "from .settings import current"),
        ("tuning/b.py", "def f():\n    import triton_conv3d.ops"),
        ("functional.py", "from . import Conv3d"),
    ],
)
def test_an_import_against_the_order_is_seen(tmp_path, file, line):
    path = tmp_path / "triton_conv3d" / file
    path.parent.mkdir(parents=True)
    path.write_text(line)
    assert len(violations(path, tmp_path)) == 1


@pytest.mark.parametrize("folder, others", [("triton_conv3d", ("autotune", "perf")), ("autotune", ("perf",)),
                                            ("perf", ("autotune",))], ids=lambda v: v if isinstance(v, str) else "")
def test_tool_folders_stand_apart(folder, others):
    for path in python_files(ROOT / folder):
        roots = {name.split(".")[0] for name in imported_names(path)}
        assert not roots & {*others, "tests"}, path.relative_to(ROOT)


@pytest.mark.parametrize("folder", ["triton_conv3d", "autotune", "perf", "tests"])
def test_no_file_is_too_long(folder):
    lengths = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in python_files(ROOT / folder)}
    assert {name: n for name, n in lengths.items() if n > MAX_LINES} == {}


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON_", "CUDA_"))}
    environment = {**inherited, **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment)


def test_importing_touches_no_device():
    done = run_python(
        "import sys, torch, triton_conv3d\n"
        "assert not torch.cuda.is_initialized(), 'CUDA was initialised'\n"
        "if 'triton' in sys.modules:\n"
        "    from triton.runtime import driver\n"
        "    assert driver._active is None, 'a Triton driver was created'\n"
        "for slow in ('triton_conv3d.compile_backend', 'torch._dynamo'): assert slow not in sys.modules, slow\n"
    )
    assert done.returncode == 0, done.stderr


def test_importing_writes_nothing(tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    done = run_python("import triton_conv3d", HOME=str(home), XDG_CACHE_HOME=str(home), PYTHONDONTWRITEBYTECODE="1")
    assert done.returncode == 0, done.stderr
    assert list(home.rglob("*")) == []


def test_importing_needs_neither_numpy_nor_the_extras():
    code = (
        "import sys\n"
        "for name in ('numpy', 'nibabel', 'nilearn', 'matplotlib', 'tqdm'): sys.modules[name] = None\n"
        "import triton_conv3d\n"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr
