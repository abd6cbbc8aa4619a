"""The commands in README.md, REPORT.md and docstrings run; links lead somewhere."""
import re
import shlex
import sys
from unittest.mock import Mock

import pytest
from conftest import ROOT

import cgan
import dcgan
import ddpm
import fid

SCRIPTS = {"dcgan.py": dcgan, "cgan.py": cgan, "ddpm.py": ddpm}
README, REPORT = [(ROOT / page).read_text("utf-8") for page in ("README.md", "REPORT.md")]


def commands():
    """Script and flags of each command, once."""
    docstrings = [script.__doc__ for script in (*SCRIPTS.values(), fid)]
    text = "\n".join([README, REPORT, *docstrings]).replace("\\\n", " ")
    text = re.sub("#.*|&&|`", "\n", text)  # comments; commands in a row, or within a sentence
    pattern = r"^ *(?:\w+=\d+ )*(?:python|torchrun .*?) (\S+\.py)( .*)?$"
    found = [(script, " ".join(flags.split())) for script, flags in re.findall(pattern, text, re.M)]
    return [(script, flags) for script, flags in dict.fromkeys(found) if flags != "--help"]


@pytest.mark.parametrize("script, flags", commands(), ids=lambda text: text[:60])
def test_the_flags_of_every_command_exist(script, flags, monkeypatch):
    assert (ROOT / script).exists()
    monkeypatch.setattr(sys, "argv", [script, *shlex.split(flags)])
    if script == "fid.py":
        monkeypatch.setattr(fid, "open_input", Mock(side_effect=fid.Error("the flags are fine")))
        with pytest.raises(fid.Error, match="the flags are fine"):
            fid.main()
    elif script in SCRIPTS:
        SCRIPTS[script].parse_flags()


TRAINING = [(script, flags) for script, flags in commands()
            if script in SCRIPTS and not re.search("--(sample |resume|init_from)", flags)]


@pytest.mark.parametrize("script, flags", TRAINING, ids=lambda text: text[:60])
def test_commands_that_train_run_in_a_small_form(script, flags, run, tmp_path):
    small = ["--out_dir", tmp_path / "out", "--max_steps", 1, "--batch_size", 2, "--limit", 20,
             "--sample_every", 0, "--fid", 0, "--epochs", 1, "--dtype", "float32", "--data"]
    run(script[:-3], "", *shlex.split(flags), *small,
        "toy-faces" if "dcgan" in script else "toy-digits")
    assert (tmp_path / "out" / "ckpt.pt").exists()


@pytest.mark.parametrize("text", [README, REPORT], ids=["README.md", "REPORT.md"])
def test_links_and_pictures_are_there(text):
    targets = re.findall(r"(?:\]\(|src=\")(?!https?:)([^)#\"]+)[)\"]", text)
    assert targets and len(commands()) > 20
    assert [target for target in targets if not (ROOT / target).exists()] == []
