"""The benchmark still runs: its smallest setting, every row."""
import re
import subprocess
import sys

from conftest import ROOT


def test_smallest_setting_prints_a_row_for_each():
    done = subprocess.run([sys.executable, str(ROOT / "tests" / "bench.py"), "--smallest"],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    figures = r"[\d.,e+]+ \| [\d.,e+]+ \| [\d.]+ \(.+\)"
    rows = re.findall(rf"^\| \w.+ \| ({figures}|\| \| not installed) \|$", done.stdout, re.M)
    code = (ROOT / "tests" / "bench.py").read_text("utf-8")
    assert len(rows) == len(re.findall(r"^def row_", code, re.M)), done.stdout
