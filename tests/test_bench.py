"""The benchmark still runs: its smallest setting prints every row."""
import re
import sys

import bench


def test_smallest_setting_prints_every_row(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)  # main() changes the working folder
    monkeypatch.setattr(sys, "argv", ["bench.py", "--smallest"])
    bench.main()
    rows = dict(re.findall(r"^\| (\w.+?) \| (.+) \|$", capsys.readouterr().out, re.M))
    assert list(rows) == list(bench.ROWS)
    for figures in rows.values():
        assert re.fullmatch(r"\S+ \| \S+ \| \S+ \(.+\)|\| \| \w+ is not installed", figures)
