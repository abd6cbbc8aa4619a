"""README.md: its commands have flags that exist, its links lead somewhere, and three run."""
import re
import shlex
from unittest.mock import Mock

import pytest
import torch
from conftest import ROOT

import cgan
import dcgan
import ddpm
import fid

SCRIPTS = {"dcgan.py": dcgan, "cgan.py": cgan, "ddpm.py": ddpm}
README = (ROOT / "README.md").read_text("utf-8")


def commands():
    """Script and flags of each command in README.md and in the docstrings of the scripts."""
    text = "\n".join([README, *[script.__doc__ for script in SCRIPTS.values()]])
    text = re.sub("#.*|&&", "\n", text)
    pattern = r"^ *(?:\w+=\d+ )*(?:python|torchrun .*?) (\S+\.py)( .*)?$"
    return [(script, shlex.split(flags)) for script, flags in re.findall(pattern, text, re.M)]


@pytest.mark.parametrize("script, flags", commands(), ids=lambda value: "".join(value)[:60])
def test_the_flags_of_every_command_exist(script, flags, tmp_path, monkeypatch):
    assert (ROOT / script).exists()
    if script == "fid.py":
        monkeypatch.setattr(fid, "open_input", Mock(side_effect=ValueError("the flags are fine")))
        with pytest.raises(SystemExit, match="the flags are fine"):
            fid.main(flags)
    elif script in SCRIPTS:
        module = SCRIPTS[script]
        monkeypatch.setattr(ddpm, "pretrained_settings", lambda source: {})
        settings, _ = module.parse_flags([])
        torch.save(dict(model=script[:-3], config=settings), tmp_path / "ckpt.pt")
        module.parse_flags([*flags, "--out_dir", str(tmp_path)])


@pytest.mark.parametrize("page", ["README.md", "REPORT.md"])
def test_links_and_pictures_are_there(page):
    text = (ROOT / page).read_text("utf-8")
    targets = re.findall(r"\]\((?!https?:)([^)#]+)\)|src=\"([^\"]+)\"", text)
    assert targets and len(commands()) > 25
    for link, source in targets:
        assert (ROOT / (link or source)).exists(), link or source


def test_functions_that_the_report_names_exist():
    """Such as `loss_d` and `UNet`."""
    code = "".join((ROOT / name).read_text("utf-8") for name in ("data.py", "fid.py", *SCRIPTS))
    names = re.findall(r"`(\w+)`", (ROOT / "REPORT.md").read_text("utf-8"))
    functions = {name for name in names if "_" in name or name[0].isupper()}
    assert len(functions) > 12
    assert functions <= set(re.findall(r"\w+", code))


@pytest.mark.parametrize("script, start", [
    (dcgan, "python dcgan.py --data toy-faces"), (cgan, "python cgan.py --no-conditional"),
    (ddpm, "python ddpm.py --conditional")])
def test_three_commands_run_in_a_small_form(script, start, run, tmp_path, monkeypatch):
    line = next(line for line in README.splitlines() if start in line)
    flags = shlex.split(line.split("#")[0].split(f"python {script.__name__}.py")[1])
    monkeypatch.setitem(__import__("conftest").TINY, script.__name__, [])
    data = "toy-faces" if script is dcgan else "toy-digits"
    run(script, tmp_path, *flags, "--out_dir", tmp_path / "out", "--limit", 64, "--max_steps", 1,
        "--batch_size", 16, data=data)
    assert (tmp_path / "out" / "ckpt.pt").exists()
