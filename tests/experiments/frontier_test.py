"""frontier.py, on an agent that has learned nothing."""

from tests.helpers import checkpoints, forks, runs


def test_every_budget_is_played_once(tmp_path):
    workdir = checkpoints.save_trained(tmp_path / "run")
    out = tmp_path / "frontier"
    flags = (
        f"--method=mine={workdir}",
        f"--data_root={tmp_path / 'data'}",
        f"--out={out}",
        *("--split=test_1x", "--slots=2,6", "--reads=0", "--episodes=4", "--cpu_devices=1"),
    )
    printed = runs.run("frontier.py", *flags)
    rows = [line for line in printed.splitlines() if line.startswith("| test_1x | mine |")]
    assert sorted(row.split(" | ")[2:4] for row in rows) == [["2", "0"], ["6", "0"]]
    table = (out / "frontier.md").read_text()
    assert table in printed
    assert (out / "frontier.png").stat().st_size > 0
    summaries = sorted((out / "points" / "mine").glob("*.json"))
    assert len(summaries) == 2
    before = [path.stat().st_mtime_ns for path in summaries]
    assert table in runs.run("frontier.py", *flags)
    assert [path.stat().st_mtime_ns for path in summaries] == before, "played again"

    for wrong, said in (
        ("--method=mine", "--method=mine: allowed is NAME=WORKDIR"),
        (f"--method=mine={workdir}", "'mine' is given twice"),
        ("--method=other=nowhere", "nowhere"),  # before the first is played
        ("--slots=2,many", "--slots=2,many: 'many' is no number"),
    ):
        assert said in forks.refuse("frontier.py", *flags, wrong)
