"""The package is one chain: a module imports only from its own floor or the floors below."""

import ast
import graphlib
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = "atommem_jax"

# Ground first. A new module gets its place here, as low as it can stand.
FLOORS = (
    ("types", "config", "tokenizer", "embedding", "protocol", "sharding", "distributed"),
    (
        "memory",
        "automaton",
        "token_tables",
        "grammar",
        "prompt",
        "chat",
        "attention",
        "lora",
        "model",
        "loss",
        "advantage",
        "reward",
        "optimizer",
        "checkpoint",
        "published",
        "safetensors_files",
        "gguf",
        "figures",
        "report",
    ),
    ("sampling", "tasks", "workflows", "pretrained", "encoder"),
    ("rollout",),
    ("microbatches", "trainer", "evaluate", "trace"),
)
FLOOR_OF = {module: floor for floor, modules in enumerate(FLOORS) for module in modules}
# Flags belong to the scripts, the scripts to nobody, and the rest weighs more than it is worth.
FORBIDDEN = ("absl.flags", "absl.app", "experiments", "tests", "tensorflow", "torch")


def read_imports(path: pathlib.Path, module: str) -> set[str]:
    """Returns the dotted names that a file imports, wherever in it they stand."""
    names = set()
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base += [node.module] if node.module else []
            names |= {".".join([*base, alias.name]) for alias in node.names}
    return names


def read_package(root: pathlib.Path) -> dict[str, set[str]]:
    """Returns {dotted name of the module: what it imports} of the package under `root`."""
    modules = {}
    for path in sorted((root / PACKAGE).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        modules[module] = read_imports(path, module)
    return modules


def find_violations(modules: dict[str, set[str]]) -> list[str]:
    """Returns a sentence for every import that the architecture forbids."""
    violations = []
    for module, imports in modules.items():
        own = module.split(".")[1] if "." in module else None
        if own is not None and own not in FLOOR_OF:
            violations.append(f"{module} has no floor: give it one in tests/architecture_test.py")
            continue
        for name in sorted(imports):
            if any(name == f or name.startswith(f"{f}.") for f in FORBIDDEN):
                violations.append(f"{module} imports {name}: it must not depend on that")
            if name.split(".")[0] != PACKAGE:
                continue
            other = name.split(".")[1] if "." in name else None
            if own is None or other is None:
                violations.append(f"{module} imports {name}: name the module that is meant")
            elif other not in FLOOR_OF:
                violations.append(f"{module} imports {name}: {other} has no floor")
            elif FLOOR_OF[other] > FLOOR_OF[own]:
                violations.append(
                    f"{module} (floor {FLOOR_OF[own]}) imports {name} (floor {FLOOR_OF[other]}): "
                    "no arrow runs up"
                )
    return violations


def test_no_module_imports_upwards():
    assert find_violations(read_package(ROOT)) == []


def test_no_import_cycles():
    modules = read_package(ROOT)

    def resolve(name):
        return name if name in modules else name.rpartition(".")[0]

    graph = {
        module: {resolve(name) for name in imports if name.startswith(f"{PACKAGE}.")} - {module}
        for module, imports in modules.items()
    }
    order = list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError
    assert set(modules) <= set(order)


@pytest.mark.parametrize(
    ("source", "violation"),
    [
        ("from atommem_jax import rollout", "(floor 1) imports atommem_jax.rollout (floor 3)"),
        ("from atommem_jax.sampling import generate", "imports atommem_jax.sampling.generate"),
        ("def f():\n    import atommem_jax.trainer", "imports atommem_jax.trainer (floor 4)"),
        ("from .tasks import babi", "imports atommem_jax.tasks.babi (floor 2)"),
        ("from . import evaluate", "imports atommem_jax.evaluate (floor 4)"),
        ("import atommem_jax", "name the module that is meant"),
        ("from absl import flags", "imports absl.flags: it must not"),
        ("from experiments import metrics", "imports experiments.metrics: it must not"),
        ("import atommem_jax.tools", "tools has no floor"),
    ],
)
def test_a_violation_is_found(tmp_path, source, violation):
    folder = tmp_path / PACKAGE
    folder.mkdir()
    (folder / "memory.py").write_text(
        f"import jax\nfrom atommem_jax.types import EMPTY\n{source}\n"
    )
    (found,) = find_violations(read_package(tmp_path))
    assert violation in found


def test_sideways_and_downward_imports_are_allowed(tmp_path):
    folder = tmp_path / PACKAGE / "tasks"
    folder.mkdir(parents=True)
    (folder / "babi.py").write_text(
        "from atommem_jax.tasks import episodes\nfrom ..types import Episode\nimport absl.logging\n"
    )
    assert find_violations(read_package(tmp_path)) == []
    (folder.parent / "gadgets.py").touch()
    assert find_violations(read_package(tmp_path)) == [
        "atommem_jax.gadgets has no floor: give it one in tests/architecture_test.py"
    ]


def test_importing_the_package_starts_no_backend():
    """A backend started at import would forbid `jax.distributed.initialize` later."""
    script = "\n".join(
        [f"import {module}" for module in read_package(ROOT)]
        + [
            "import sys",
            "from jax._src import xla_bridge",
            "assert not xla_bridge.backends_are_initialized(), 'a module made an array at import'",
            "heavy = {'tensorflow', 'torch'} & set(sys.modules)",
            "assert not heavy, heavy",
        ]
    )
    result = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert result.returncode == 0, result.stderr
