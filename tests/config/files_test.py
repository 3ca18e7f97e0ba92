"""Config errors name the field and the nearest valid one, also on the command line."""

import pathlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

from atommem_jax.config import (
    ConfigError,
    check,
    check_path,
    find_config,
    list_paths,
    load_config,
    suggest,
)
from tests.helpers import forks

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIG = ConfigDict(
    {
        "seed": 0,
        "model": {"width": 64, "layers": 3, "attention": {"heads": 4}},
        "memory": {"slots": 5, "width": 16},
        "optimizer": {"learning_rate": 1e-3},
    }
)


def test_check_raises_only_when_the_condition_fails():
    check(True, "unused")
    with pytest.raises(ConfigError, match=r"model\.width=65 is odd"):
        check(False, "model.width=65 is odd")


def test_paths_cover_sections_and_fields():
    assert list_paths({"b": {"d": 1, "c": {"e": 2}}, "a": 0}) == ["a", "b", "b.c", "b.c.e", "b.d"]


@pytest.mark.parametrize(
    ("unknown", "nearest"),
    [
        ("model.widht", "model.width"),
        ("memory.widht", "memory.width"),  # the section that was meant wins
        ("modle.width", "model.width"),
        ("learning_rate", "optimizer.learning_rate"),
        ("heads", "model.attention.heads"),
        ("model.heads", "model.attention.heads"),
        ("sed", "seed"),
        ("model.quantisation", None),  # a shared section alone is no likeness
    ],
)
def test_suggest_finds_the_nearest_path(unknown, nearest):
    assert suggest(CONFIG, unknown) == nearest


@settings(max_examples=50)
@given(path=st.sampled_from(list_paths(CONFIG)), data=st.data())
def test_one_swapped_pair_of_letters_is_recognised(path, data):
    """Of names with five letters or more, in which a swap leaves most of the word."""
    head, _, leaf = path.rpartition(".")
    if len(leaf) < 5:
        return
    i = data.draw(st.integers(0, len(leaf) - 2))
    swapped = leaf[:i] + leaf[i + 1] + leaf[i] + leaf[i + 2 :]
    assert suggest(CONFIG, f"{head}.{swapped}".lstrip(".")) == path


def test_unknown_paths_are_explained():
    check_path(CONFIG, "model.attention.heads")
    check_path(CONFIG, "model")
    with pytest.raises(ConfigError) as error:
        check_path(CONFIG, "model.widht")
    assert str(error.value) == (
        "unknown config field 'model.widht'; did you mean 'model.width'? "
        "Valid fields of 'model': attention, layers, width."
    )
    with pytest.raises(ConfigError, match=r"'zzz'. Valid fields at the top: memory, model, opt"):
        check_path(CONFIG, "zzz")
    with pytest.raises(ConfigError, match=r"'model.width' holds the value 64 and has no fields"):
        check_path(CONFIG, "model.width.bits")


def test_load_config_explains_files_that_are_not_configs(tmp_path):
    (tmp_path / "empty.py").write_text("x = 1\n")
    (tmp_path / "plain.py").write_text("def get_config():\n    return {}\n")
    with pytest.raises(ConfigError, match=r"absent\.py: no such file\. Configs there are: "):
        load_config("absent.py")
    with pytest.raises(ConfigError, match=r"does not define get_config"):
        load_config(str(tmp_path / "empty.py"))
    with pytest.raises(ConfigError, match=r"too many positional arguments; what follows the colon"):
        load_config(f"{tmp_path / 'plain.py'}:big")
    assert load_config(str(tmp_path / "plain.py")) == {}


def test_files_of_the_repository_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config("experiments/flags.py") == ROOT / "experiments" / "flags.py"


_CONFIG_FILE = """
from ml_collections import ConfigDict
from atommem_jax.config import check

def get_config(size="small"):
    check(size in ("small", "big"), f"argument {size!r}: choose small or big.")
    return ConfigDict({"seed": 0, "model": {"width": 64 if size == "small" else 128, "deep": False},
                       "rate": 0.1, "mesh": (1, 8), "names": ("key", "value")})
"""

_SCRIPT = """
from atommem_jax.config import check
from experiments import flags

CONFIG = flags.define_config("CONFIG_FILE")

def main(argv):
    config = CONFIG.value
    width = config.model.width
    check(width % 2 == 0, f"model.width={width} is odd; take an even one.")
    assert config.is_locked
    if config.seed == 13:
        raise RuntimeError("a bug, not a mistake of the user")
    print(config.seed, config.model.width, config.model.deep, config.rate, config.mesh, argv[1:],
          *([config.names] if config.names != ("key", "value") else []))

if __name__ == "__main__":
    flags.run(main)
"""


@pytest.fixture(scope="module")
def run_script(tmp_path_factory):
    folder = tmp_path_factory.mktemp("script")
    (folder / "tiny.py").write_text(_CONFIG_FILE)
    (folder / "script.py").write_text(_SCRIPT.replace("CONFIG_FILE", str(folder / "tiny.py")))

    return lambda *arguments: forks.run(folder / "script.py", *arguments, cwd=folder)


@pytest.mark.parametrize(
    ("arguments", "output"),
    [
        ([], "0 64 False 0.1 (1, 8) []"),
        (["--config=tiny.py:big", "--config.seed=3", "rest"], "3 128 False 0.1 (1, 8) ['rest']"),
        (
            ["--config.rate=2", "--config.model.deep", "--config.mesh=(2, 4)"],
            "0 64 True 2.0 (2, 4) []",
        ),
        (["--config", "tiny.py", "--config.seed", "4"], "4 64 False 0.1 (1, 8) []"),
        # Of what is given twice the last counts, tuples included.
        (["--config.mesh=(1, 2)", "--config.mesh=(4, 8)"], "0 64 False 0.1 (4, 8) []"),
        (["--config.mesh", "(1, 2)", "x", "--config.mesh=3,4"], "0 64 False 0.1 (3, 4) ['x']"),
        (["--config.seed=1", "--config.seed=2"], "2 64 False 0.1 (1, 8) []"),
        (["--config.model.deep", "--noconfig.model.deep"], "0 64 False 0.1 (1, 8) []"),
        (["--config.names=query,key"], "0 64 False 0.1 (1, 8) [] ('query', 'key')"),
        (["--config.names=(query, key)"], "0 64 False 0.1 (1, 8) [] ('query', 'key')"),
        (["--config.names=('query',)"], "0 64 False 0.1 (1, 8) [] ('query',)"),
        (
            ["--config.names=value", "--", "--config.seed=3"],
            "0 64 False 0.1 (1, 8) ['--config.seed=3'] ('value',)",
        ),
    ],
)
def test_overrides_reach_the_config(run_script, arguments, output):
    result = run_script(*arguments)
    assert (result.status, result.stdout.strip()) == (0, output), result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--config.model.widht=3"],
            "script.py: unknown config field 'model.widht'; did you mean 'model.width'? "
            "Valid fields of 'model': deep, width.",
        ),
        (["--config=tiny.py:big", "--config.sed=3"], "did you mean 'seed'?"),
        (["--config.seed=many"], "flag --config.seed=many"),
        (["--config.model.width=3"], "script.py: model.width=3 is odd; take an even one."),
        (["--config=tiny.py:huge"], "script.py: argument 'huge': choose small or big."),
        (["--config=tyny.py"], "--config=tyny.py: no such file"),
        (["--config.seed=5", "--config=tiny.py"], "before a value for --config was specified"),
        (["--confog=tiny.py"], "Unknown command line flag 'confog'"),
    ],
)
def test_a_mistake_ends_with_status_2_and_no_traceback(run_script, arguments, message):
    result = run_script(*arguments)
    assert result.status == 2, result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_a_bug_keeps_its_traceback(run_script):
    result = run_script("--config.seed=13")
    assert result.status == 1
    assert "RuntimeError: a bug" in result.stderr
    assert "Traceback" in result.stderr
