"""Paths are spelled out the same way wherever one is given, and tried before they count."""

import pathlib
import types

import pytest

from atommem_jax.agent import validate
from atommem_jax.config import ConfigError, StoreError, parse, paths
from atommem_jax.metrics import MetricWriter
from atommem_jax.tasks import babi, multihop_files
from experiments.configs import synthetic


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("~/mine", "HOME/mine"),
        ("~", "HOME"),
        (" runs/mine ", "runs/mine"),
        ("runs/mine/", "runs/mine"),
        ("runs/mine//", "runs/mine"),
        ("/", "/"),
        ("", ""),
        ("a b/ü", "a b/ü"),
        ("gs://bucket/run/", "gs://bucket/run"),
        (" gs://bucket ", "gs://bucket"),
        ("file:///runs/mine", "/runs/mine"),
        ("x/~/y", "x/~/y"),
    ],
)
def test_a_path_is_what_is_meant_and_stays_so(home, typed, meant):
    meant = meant.replace("HOME", str(home))
    assert paths.expand(typed) == meant
    assert paths.expand(meant) == meant
    assert paths.expand(pathlib.Path(typed)) == paths.expand(str(pathlib.Path(typed)))


def test_a_path_that_cannot_be_is_refused():
    with pytest.raises(ConfigError, match="~nobody-here/x: there is no home folder of ~nobody-"):
        paths.expand("~nobody-here/x")
    with pytest.raises(ConfigError, match="has a NUL character"):
        paths.expand("a\0b")
    with pytest.raises(ConfigError, match=r"^ftp://x/y: ftp:// is no object store that is"):
        paths.expand("ftp://x/y")


def test_a_url_is_absolute_and_not_local(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert paths.absolute("runs/mine/") == f"{tmp_path}/runs/mine"
    assert paths.absolute("gs://bucket/run/") == "gs://bucket/run"
    assert paths.bucket_of("gs://bucket/run/checkpoints") == "gs://bucket"
    paths.check_local("runs/mine", "--json=x")
    with pytest.raises(ConfigError, match=r"^--json=x: is in an object store, and this is read"):
        paths.check_local("gs://bucket/run", "--json=x")
    config = parse(synthetic.get_config()).replace({"sft.data": "gs://bucket/teacher"})
    with pytest.raises(ConfigError, match=r"^sft\.data=gs://bucket/teacher: is in an object store"):
        validate.validate(config)


def test_a_text_is_written_whole(tmp_path):
    paths.write_text(tmp_path / "a", "ü")
    paths.write_text(str(tmp_path / "a"), "zwei")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "zwei"


class WithCodeError(Exception):
    """As the clients of stores raise them."""

    def __init__(self, code):
        super().__init__("text")
        self.code = code


@pytest.mark.parametrize(
    ("error", "trouble"),
    [
        (WithCodeError(503), "passing"),
        (WithCodeError("429"), "passing"),
        (WithCodeError(403), "rights"),
        (WithCodeError(404), ""),
        (ValueError("UNAVAILABLE: Error reading 'd/3'"), "passing"),
        (ValueError("PERMISSION_DENIED: Error reading"), "rights"),
        (ValueError("DATA_LOSS: Error decoding"), ""),
        (ValueError("Compute Engine Metadata server unavailable. Last"), "passing"),
        (ConnectionResetError("reset"), "passing"),
        (OSError("Forbidden: b/bucket/o"), "rights"),
        (FileNotFoundError("b/bucket/o/x"), ""),
    ],
)
def test_what_is_in_the_way_of_a_store_is_told_from_what_it_holds(error, trouble):
    assert paths.find_trouble("gs://bucket/run", error) == trouble
    wrapped = RuntimeError("restore failed")
    wrapped.__cause__ = error
    assert paths.find_trouble("gs://bucket/run", wrapped) == trouble
    assert paths.find_trouble("/runs/mine", error) == ""


def test_what_went_wrong_in_a_store_is_told_from_what_went_wrong_elsewhere():
    url = "gs://bucket/run"
    lost = RuntimeError("UNAVAILABLE: the coordinator of this run has gone")
    assert paths.explain([url], lost) is None
    assert paths.explain([url], ConnectionResetError("by a teacher's endpoint")) is None
    assert paths.explain([], ValueError(f"UNAVAILABLE: Error writing {url}/3/d/1")) is None
    found = paths.explain(["--a=b", url], ValueError(f"UNAVAILABLE: Error writing {url}/3/d/1"))
    assert isinstance(found, StoreError)
    assert str(found).startswith(f"{url}: cannot be read or written (ValueError: UNAVAILABLE")

    def raise_as_a_client():
        raise OSError("Forbidden: b/bucket/o")

    code = raise_as_a_client.__code__
    client = types.FunctionType(code, {"__name__": "gcsfs.core", "OSError": OSError})
    with pytest.raises(OSError) as caught:
        client()
    found = paths.explain([url], caught.value)
    assert isinstance(found, ConfigError)
    assert not isinstance(found, StoreError)  # a restart would be refused too


def test_fields_of_a_config_and_of_tasks_are_spelled_out(home):
    changes = {"init_from": "~/base/", "sft.data": " teacher "}
    config = parse(synthetic.get_config()).replace(changes)
    assert (config.init_from, config.sft.data) == (f"{home}/base", "teacher")
    assert parse(config.to_dict()) == config
    assert babi.BabiConfig(data_dir="~/en-10k/").data_dir == f"{home}/en-10k"
    assert multihop_files.MultihopQaConfig(data_file="~/a.json").data_file == f"{home}/a.json"
    with pytest.raises(ConfigError, match=r"--config.init_from=~nobody-here: there is no home"):
        config.replace({"init_from": "~nobody-here"})


def test_metrics_go_where_checkpoints_go(home):
    with MetricWriter("~/mine") as writer:
        writer.write(1, "sft", {})
    assert (home / "mine" / "metrics.jsonl").is_file()
    assert not (home / "~").exists()


def test_a_folder_is_tried_and_nothing_is_left(tmp_path):
    paths.try_folder(tmp_path / "a" / "b", "--out=x")
    paths.try_folder(tmp_path, "--out=x")
    assert list(tmp_path.iterdir()) == []
    paths.make_folder(tmp_path / "a" / "b", "--out=x")
    assert list((tmp_path / "a" / "b").iterdir()) == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("file", "^--out=x: is a file; pass a folder"),
        ("file/inside", "^--out=x: .*/file is a file; pass a folder"),
        ("name" * 100, r"^--out=x: cannot be written to \(File name too long\); pass a folder"),
        # A folder in which nobody, not even root, can make anything.
        ("/proc/self/out", r"^--out=x: cannot be written to \(No such file .*; pass a folder"),
    ],
)
def test_a_folder_that_cannot_be_written_is_refused(tmp_path, name, message):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=message):
        paths.try_folder(tmp_path / name, "--out=x")


def test_a_file_that_will_be_written_gets_its_folder(tmp_path):
    paths.make_place(None, "--json=None")
    paths.make_place(tmp_path / "a" / "b.json", "--json=x")
    assert list((tmp_path / "a").iterdir()) == []
    with pytest.raises(ConfigError, match=r"^--json=x: is a folder; pass a file in it"):
        paths.make_place(tmp_path / "a", "--json=x")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"^--json=x: is a file; pass a folder"):
        paths.make_place(tmp_path / "file" / "b.json", "--json=x")


def test_a_file_is_tried_and_stays_as_it_was(tmp_path):
    (tmp_path / "m.npz").write_text("kept")
    paths.try_file(tmp_path / "m.npz", "--save_memory=m")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["kept"]
    with pytest.raises(ConfigError, match=r"--save_memory=m: cannot be written \("):
        paths.try_file("/proc/self/m.npz", "--save_memory=m")
