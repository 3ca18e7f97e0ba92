"""The package is one chain: a file imports only from files that stand before it.

The order is that of `ORDER`, folder by folder, ground first; CONTRIBUTING.md says what each is for.
The scripts in `experiments/` stand on top: a script imports the package and `flags`, never another
script.
"""

import ast
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = "atommem_jax"

# A new file gets its place here, as low as it can stand.
ORDER = {
    "": "types",
    "config": "errors paths fields curriculum sections upgrade experiment files",
    "text_files": "",
    "folder_lock": "",
    "metrics": "",
    "language": "tokenizer protocol automaton token_tables grammar prompt chat sentences",
    "parallel": "rules mesh program processes host_batches",
    "model": (
        "quantized attention model_config lora rope kv_cache matrices transformer cpu_decode "
        "drafts distribution sampling scoring prefix groups"
    ),
    "memory": "slot_table embedding encoder",
    "tasks": (
        "schema user_functions background packing builders synthetic village babi_simulator "
        "babi babilong passages multihop_files multihop_qa custom datasets encoding batches "
        "teacher keeper workflows"
    ),
    "weights": (
        "fingerprint records checkpoint hf_config hf_tokenizer hf_shards gguf_file gguf hf_names "
        "huggingface hf_export"
    ),
    "learning": (
        "document_index environment rollout reward table_history evidence life_cycle advantage "
        "loss credit gate optimizer microbatches trainer evaluation long_evaluation comparison "
        "collapse"
    ),
    "agent": "encoders build play crossed validate settings phases load long_score results score",
    "report": "replay trace figures failures lengths frontier page run",
    "documents": "split session memory_file transcript reader",
    "collection": "endpoint judge store player",
    "sweeps": "launcher scheduler local_processes tpu_vms placements plan jobs table",
    "tpu_model": (
        "hlo_text device_groups provenance loops hlo hardware flops roofline lowering presentation "
        "workload compilation"
    ),
    "runs": "agreement stages curriculum resume recorder validity",
    "api": "",
}
"""Folder -> its files, each in order. A folder of no files is a file of the package itself."""

# Flags belong to the scripts, the scripts to nobody, and the rest weighs more than it is worth.
FORBIDDEN = ("absl.flags", "absl.app", "experiments", "tests", "tensorflow", "torch")


def list_places() -> dict[str, int]:
    """{module: its number, ground first}; a folder itself stands where its last file does."""
    places: dict[str, int] = {}
    for folder, files in ORDER.items():
        for name in files.split():
            places[".".join(filter(None, (PACKAGE, folder, name)))] = len(places)
        if folder:
            places[f"{PACKAGE}.{folder}"] = len(places)
    return places


PLACES = list_places()


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
        if module == PACKAGE:  # what the library offers; it may name everything
            continue
        if module not in PLACES:
            violations.append(f"{module} has no place: give it one in tests/architecture_test.py")
            continue
        for name in sorted(imports):
            if any(name == f or name.startswith(f"{f}.") for f in FORBIDDEN):
                violations.append(f"{module} imports {name}: it must not depend on that")
            if name.split(".")[0] != PACKAGE:
                continue
            other = name if name in PLACES else name.rpartition(".")[0]
            if other not in PLACES:
                violations.append(f"{module} imports {name}: name the file that is meant")
            elif PLACES[other] >= PLACES[module] and not is_inside(other, module):
                violations.append(f"{module} imports {name}, which stands above: no arrow runs up")
    return violations


def is_inside(name: str, folder: str) -> bool:
    """Whether a module is one of the files of a folder whose __init__ is meant."""
    return name.startswith(f"{folder}.")


def read_scripts(root: pathlib.Path) -> dict[str, set[str]]:
    """Returns {dotted name: what it imports} of everything under experiments/."""
    modules = {}
    for path in sorted((root / "experiments").rglob("*.py")):
        module = ".".join(path.relative_to(root).with_suffix("").parts)
        modules[module] = read_imports(path, module)
    return modules


def find_script_violations(modules: dict[str, set[str]]) -> list[str]:
    """Returns a sentence for every script that imports another."""
    violations = []
    for module, imports in modules.items():
        shared = {"experiments.flags"}
        shared |= {name for name in modules if name.split(".")[1] in ("configs", "benchmarks")}
        for name in sorted(imports):
            if name.split(".")[0] != "experiments":
                continue
            other = name if name in modules else name.rpartition(".")[0]
            if other not in shared:
                violations.append(f"{module} imports {name}: a script is no library")
            if module.startswith("experiments.configs") and not other.startswith(
                "experiments.configs"
            ):
                violations.append(f"{module} imports {name}: a config stands on configs alone")
    return violations


def test_no_module_imports_upwards():
    assert find_violations(read_package(ROOT)) == []


def test_every_place_is_taken():
    found = set(read_package(ROOT))
    missing = [name for name in PLACES if name not in found]
    assert not missing, "ORDER names files that are not there"


def test_no_script_imports_another():
    assert find_script_violations(read_scripts(ROOT)) == []


@pytest.mark.parametrize(
    ("source", "violation"),
    [
        ("from atommem_jax.learning import rollout", "imports atommem_jax.learning.rollout, which"),
        ("from atommem_jax.tasks.teacher import policy", "which stands above"),
        (
            "def f():\n    import atommem_jax.learning.trainer",
            "imports atommem_jax.learning.trainer",
        ),
        ("from atommem_jax.memory import encoder", "imports atommem_jax.memory.encoder, which"),
        ("from . import embedding", "imports atommem_jax.memory.embedding, which"),
        ("import atommem_jax", "name the file that is meant"),
        ("from absl import flags", "imports absl.flags: it must not"),
        ("from experiments import train", "imports experiments.train: it must not"),
        ("import atommem_jax.tools", "name the file that is meant"),
    ],
)
def test_a_violation_is_found(tmp_path, source, violation):
    folder = tmp_path / PACKAGE / "memory"
    folder.mkdir(parents=True)
    (folder / "slot_table.py").write_text(
        f"import jax\nfrom atommem_jax.types import EMPTY\n{source}\n"
    )
    (found,) = find_violations(read_package(tmp_path))
    assert violation in found


def test_downward_imports_are_allowed_and_every_file_has_a_place(tmp_path):
    folder = tmp_path / PACKAGE / "tasks"
    folder.mkdir(parents=True)
    (folder / "babi.py").write_text(
        "from atommem_jax.tasks import schema\nfrom ..types import Episode\nimport absl.logging\n"
    )
    assert find_violations(read_package(tmp_path)) == []
    (folder.parent / "gadgets.py").touch()
    assert find_violations(read_package(tmp_path)) == [
        "atommem_jax.gadgets has no place: give it one in tests/architecture_test.py"
    ]


@pytest.mark.parametrize(
    ("name", "source", "violation"),
    [
        ("report.py", "from experiments import demo", "a script is no library"),
        ("report.py", "from experiments.demo import run", "a script is no library"),
        ("configs/small.py", "from experiments import flags", "a config stands on configs alone"),
    ],
)
def test_a_script_that_imports_another_is_found(tmp_path, name, source, violation):
    (tmp_path / "experiments" / "configs").mkdir(parents=True)
    (tmp_path / "experiments" / "demo.py").touch()
    (tmp_path / "experiments" / "flags.py").touch()
    (tmp_path / "experiments" / name).write_text(f"{source}\n")
    (found,) = find_script_violations(read_scripts(tmp_path))
    assert violation in found


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


def import_alone(module: str) -> set[str]:
    """The top-level names of all that is loaded by importing a module in a fresh process."""
    script = f"import {module}, sys; print(*{{name.split('.')[0] for name in sys.modules}})"
    result = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    return set(result.stdout.split())


def test_the_transformer_needs_neither_checkpoints_nor_an_optimizer():
    assert not {"orbax", "optax"} & import_alone(f"{PACKAGE}.model.transformer")
    assert "orbax" in import_alone(f"{PACKAGE}.weights.checkpoint"), "nothing would be found"
