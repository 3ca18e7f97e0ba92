"""Settings that every test shares; they are made before the first import of JAX."""

import importlib.metadata
import importlib.util
import os
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent

# The test process must not take a TPU or GPU that happens to be there: oracles compare bits.
os.environ["JAX_PLATFORMS"] = "cpu"
# Tests compile much and compute little: with the compiler's least effort three of their files took
# 104 s in place of 199. tests/experiments/train_test.py holds that users'
# runs come to the same.
LEAST_EFFORT = "--xla_backend_optimization_level=0"
# Newer versions of XLA do not know this flag, and end the process.
if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 12):
    LEAST_EFFORT += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = " ".join(
    (
        LEAST_EFFORT,
        "--xla_force_host_platform_device_count=8",
        os.environ.get("XLA_FLAGS", ""),  # the last word
    )
)
# `experiments` is not installed with the package.
sys.path.insert(0, str(ROOT))

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Workers and later runs share compiled programs. A size limit makes JAX lock the folder: without
# one, a worker can read an entry that another is still writing.
COMPILATION_CACHE = ROOT / ".pytest_cache" / "jax"
jax.config.update("jax_compilation_cache_dir", str(COMPILATION_CACHE))
jax.config.update("jax_compilation_cache_max_size", 1 << 30)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

hypothesis.settings.register_profile("local", deadline=None, print_blob=True)
hypothesis.settings.register_profile("ci", deadline=None, print_blob=True, derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


# A minute or more each: they start first, so that no process is left alone with one at the end.
LONGEST = (
    *(
        "resume_test",
        "scripts_test",
        "train_test",
        "parity_test",
        "distributed_test",
        "report_test",
    ),
    *("api_test", "sweep_test", "answer_test", "benchmark_test", "program_test", "collect_test"),
    *("lora_run_test", "lora_test", "decode_suite_test", "readme_test", "transformer_test"),
)


def pytest_collection_modifyitems(items):
    """The longest files first; the rest as collected."""
    place = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


# What test-all must not leave out: with ATOMMEM_NO_SKIPS, as in CI, a skip of one of these fails.
REQUIRED = ("browser", "libtpu", "peer", "processes", "long")


def pytest_runtest_setup(item):
    """Skips what needs the TPU compiler where there is none."""
    if item.get_closest_marker("libtpu") and importlib.util.find_spec("libtpu") is None:
        pytest.skip("needs the TPU compiler: make test-all, or pip install -e '.[tpu]'")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item):
    """Where nothing may be skipped, a skip of a required test is a failure."""
    report = (yield).get_result()
    required = any(item.get_closest_marker(name) for name in REQUIRED)
    if report.skipped and required and os.environ.get("ATOMMEM_NO_SKIPS"):
        report.outcome = "failed"
        report.longrepr = f"skipped, where nothing may be: {report.longrepr}"


@pytest.hookimpl(hookwrapper=True)
def pytest_make_collect_report():
    """The same of a whole file that is skipped."""
    report = (yield).get_result()
    if report.skipped and os.environ.get("ATOMMEM_NO_SKIPS"):
        report.outcome = "failed"
        report.longrepr = f"skipped, where nothing may be: {report.longrepr}"


@pytest.fixture(autouse=True)
def _promotion(request):
    """Relaxes type and rank promotion in tests marked `relaxed_promotion`."""
    if request.node.get_closest_marker("relaxed_promotion") is None:
        yield
        return
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


# Of the 65,530 that Linux allows a process by default.
_MOST_MAPPINGS = 30_000


@pytest.fixture(autouse=True, scope="module")
def _few_programs():
    """Lets go of compiled programs before there are more than the system has mappings for.

    XLA takes about seven of memory for each, and ends the process with a segmentation fault where
    none is left.
    """
    yield
    mappings = pathlib.Path("/proc/self/maps")
    if mappings.exists() and mappings.read_bytes().count(b"\n") > _MOST_MAPPINGS:
        jax.clear_caches()


@pytest.fixture(scope="module")
def data_root(tmp_path_factory) -> pathlib.Path:
    """Where the runs of a file keep their data sets."""
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
    """The folder with the public data sets; tests that need it are skipped where it is absent."""
    folder = pathlib.Path(os.environ.get("ATOMMEM_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no data at {folder}: set ATOMMEM_DATA to the folder that holds hotpotqa/")
    return folder
