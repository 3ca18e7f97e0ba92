"""Records on disk: found by file, run or label, and refused by name."""

import json

import pytest

from atommem_jax.agent import results
from atommem_jax.config import ConfigError

RECORD = {
    **{"episode": 0, "question": 0, "text": "Who?", "answer": "Anna", "aliases": ["Anna"]},
    **{"em": 1.0, "f1": 1.0},
}


def write(folder, name, records=(RECORD,)):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.jsonl"
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return path


def test_records_are_found_by_file_run_folder_or_label(tmp_path):
    name = results.name_files("test_1x", 0.0, 900)
    assert name == "test_1x_t0_step900"
    longer = results.name_files("test_1x", 0.5, 900, ["memory.shown=2"])
    assert longer == "test_1x_t0.5_step900_memory.shown=2"
    out, run = tmp_path / "out", tmp_path / "run"
    here, there = write(out, name), write(run / "eval", name)
    write(out, longer)

    def find(chosen, temperature=0.0):
        return results.find(str(chosen), out, "test_1x", temperature)

    assert find(there) == there
    assert find(run) == find(run / "eval") == there
    assert find("step900") == here
    assert find("step900_memory.shown=2", 0.5).name == f"{longer}.jsonl"
    with pytest.raises(ConfigError, match=r"--against=step7: .*no test_1x_t0_step7.jsonl; it has"):
        find("step7")
    write(run / "eval", results.name_files("test_1x", 0.0, 950))
    with pytest.raises(
        ConfigError, match=r"2 files of records .*step900.jsonl, test_1x_t0_step950"
    ):
        find(run)
    with pytest.raises(ConfigError, match=r"0 files of records of test_1x at temperature 1"):
        find(run, 1.0)


def test_what_is_no_record_is_named(tmp_path):
    assert results.read(write(tmp_path, "good")) == [RECORD]
    bad = write(tmp_path, "bad", [RECORD, {"episode": 1}])
    with pytest.raises(ConfigError, match=r"bad.jsonl: record 2 has no question"):
        results.read(bad)
    with pytest.raises(ConfigError, match=r"empty.jsonl"):
        results.read(write(tmp_path, "empty", []))
