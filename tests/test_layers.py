"""The modules import downwards only, and importing them does nothing."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Lowest first: a module imports from layers below its own, or from its own.
LAYERS = (
    ("gspmd.errors",),
    ("gspmd.distributed", "gspmd.options", "gspmd.sharding"),
    ("gspmd.meshes",),
    ("gspmd.ir", "gspmd.specs"),
    ("gspmd._compat", "gspmd.arguments", "gspmd.local", "gspmd.printing", "gspmd.uneven"),
    ("gspmd.call", "gspmd.collectives", "gspmd.exchange", "gspmd.jaxpr"),
    ("gspmd.reshard.blocks",),
    ("gspmd.reshard.turns",),
    ("gspmd.reshard.moves", "gspmd.rules", "gspmd.reshard.ways"),
    (
        "gspmd.annotate",
        "gspmd.convert",
        "gspmd.evaluate",
        "gspmd.propagate",
        "gspmd.regions",
        "gspmd.reshard",
        "gspmd.trace",
    ),
    ("gspmd.choose", "gspmd.explain", "gspmd.rules.check", "gspmd.shard_update", "gspmd.splice"),
    ("gspmd.findings", "gspmd.fusion", "gspmd.simplified", "gspmd.storage", "gspmd.timeline"),
    ("gspmd.footprint", "gspmd.ordering"),
    ("gspmd.liveness",),
    ("gspmd.emit",),
    ("gspmd.partition",),
    ("gspmd.search",),
    ("gspmd.optimize",),
    ("gspmd.devices", "gspmd.hlo"),
    ("gspmd.bubble", "gspmd.compiled", "gspmd.cost", "gspmd.memory", "gspmd.run", "gspmd.stages"),
    ("gspmd.pipeline",),
    ("gspmd.report",),
    ("gspmd.performance",),
    ("gspmd.plan",),
    ("gspmd.planner",),
    ("gspmd.partitioned",),
    ("gspmd.testing",),
    ("gspmd",),
    ("gspmd.models",),
    ("gspmd.cli", "gspmd.__main__", "pytest_gspmd"),
    ("examples", "benchmarks", "tests"),
)
DOORS = {
    "gspmd._compat",
    "gspmd.annotate",
    "gspmd.convert",
    "gspmd.jaxpr",
    "gspmd.trace",
}  # where jaxprs are met
PRIMITIVES = ("jax.extend.core.primitives", "jax.extend.random")  # whose names any module may use


def modules() -> dict[str, Path]:
    """The dotted name and file of every module of the repository."""
    files = {
        f"gspmd.{folder}": ROOT / folder
        for folder in ("models", "meshes")  # seen once, where the files are
    } | {folder: ROOT / folder for folder in ("gspmd", "examples", "benchmarks")}
    found = {}
    for package, folder in files.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            if package == "gspmd" and parts[0] in ("models", "meshes"):
                continue
            name = ".".join((package, *parts)).removesuffix(".__init__")
            found[name] = path
    return found | {"pytest_gspmd": ROOT / "pytest_gspmd.py"}


MODULES = modules()


def layer(module: str) -> int:
    """The number of the layer of `module`: of the longest prefix of its name that has one."""
    while module:
        for i, names in enumerate(LAYERS):
            if module in names:
                return i
        module = module.rpartition(".")[0]
    raise LookupError


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """The line and the full dotted name of each thing that the file imports, at any depth."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def module_of(name: str) -> str:
    """The module that `name`, a module or something in one, belongs to."""
    while name not in MODULES:
        name = name.rpartition(".")[0]
    return name


def test_every_module_has_a_layer() -> None:
    unplaced = [m for m in MODULES if m.startswith("gspmd.") and layer(m) == layer("gspmd")]
    assert not unplaced, f"say in LAYERS where these belong: {unplaced}"


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module: str) -> None:
    for line, name in imports(MODULES[module]):
        if name.split(".")[0] not in ("gspmd", "models", "meshes", "examples", "benchmarks"):
            continue
        assert not name.startswith(("models", "meshes")), f"{module}:{line}: say gspmd.{name}"
        target = module_of(name)
        assert layer(target) <= layer(module), f"{module}:{line} imports {target}, a layer above it"


@pytest.mark.parametrize("module", MODULES)
def test_jax_internals_are_met_at_the_doors(module: str) -> None:
    for line, name in imports(MODULES[module]):
        if name.startswith("jax._src"):
            assert module == "gspmd._compat", f"{module}:{line} imports {name}"
        if name.startswith(("jax.extend", "jax.interpreters")) and not name.startswith(PRIMITIVES):
            assert module in DOORS, f"{module}:{line} imports {name}"


def test_importing_does_nothing() -> None:
    """No backend starts, no configuration, environment variable or seed changes."""
    program = """if True:
        import json, os, sys
        import jax, numpy as np
        def state():
            return [dict(jax.config.values), dict(os.environ), np.random.get_state()[1].tolist()]
        before = repr(state())
        import gspmd
        from jax._src import xla_bridge
        above = ("gspmd.models", "gspmd.meshes", "flax", "optax")
        print(json.dumps({
            "same": repr(state()) == before,
            "backend": xla_bridge.backends_are_initialized(),
            "above": [m for m in sys.modules if m.startswith(above)],
        }))
    """
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"same": True, "backend": False, "above": []}


def test_nothing_is_left_to_do() -> None:
    marks = ("TO" + "DO", "FIX" + "ME", "XX" + "X")
    files = [*MODULES.values(), *sorted((ROOT / "tests").rglob("*.py"))]
    left = [
        f"{path.relative_to(ROOT)}:{i}"
        for path in files
        for i, line in enumerate(path.read_text().splitlines(), 1)
        if any(mark in line for mark in marks)
    ]
    assert not left
