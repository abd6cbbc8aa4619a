"""README.md: its commands have flags that exist, its links lead somewhere, and three of them run."""
import re
import shlex

import pytest
import torch
from conftest import ROOT

import cgan
import dcgan
import ddpm
import fid

SCRIPTS = {"dcgan.py": dcgan, "cgan.py": cgan, "ddpm.py": ddpm}
PAGES = ["README.md", "REPORT.md"]


def commands():
    """Script and flags of each command in README.md and in the docstrings of the scripts."""
    texts = [(ROOT / "README.md").read_text("utf-8"), *[script.__doc__ for script in SCRIPTS.values()]]
    found = []
    for line in "\n".join(texts).splitlines():
        for part in line.split("#")[0].split("&&"):
            match = re.match(r"\s*(?:\w+=\d+ )*(python|torchrun .*?) (\S+\.py)( .*)?$", part.rstrip())
            if match:
                found.append((match[2], shlex.split(match[3] or "")))
    return found


@pytest.mark.parametrize("script, flags", commands(), ids=lambda value: "".join(value)[:60])
def test_the_flags_of_every_command_exist(script, flags, tmp_path, monkeypatch):
    assert (ROOT / script).exists()
    if script == "fid.py":
        def open_input(name, args):
            raise ValueError("the flags are fine")

        monkeypatch.setattr(fid, "open_input", open_input)
        with pytest.raises(SystemExit, match="the flags are fine"):
            fid.main(flags)
    elif script in SCRIPTS:
        module = SCRIPTS[script]
        monkeypatch.setattr(ddpm, "pretrained_settings", lambda source: {})
        settings, _ = module.parse_flags([])
        torch.save(dict(model=script[:-3], config=settings), tmp_path / "ckpt.pt")
        module.parse_flags([*flags, "--out_dir", str(tmp_path)])


def test_there_are_commands():
    assert len(commands()) > 25 and {"dcgan.py", "cgan.py", "ddpm.py", "fid.py"} <= {
        script for script, _ in commands()}


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_are_there(page):
    text = (ROOT / page).read_text("utf-8")
    targets = re.findall(r"\]\((?!https?:)([^)#]+)\)|src=\"([^\"]+)\"", text)
    assert targets
    for link, source in targets:
        assert (ROOT / (link or source)).exists(), link or source


def test_functions_that_the_report_names_exist():
    """Such as `loss_d` and `UNet`."""
    code = "".join((ROOT / name).read_text("utf-8") for name in ("data.py", "fid.py", *SCRIPTS))
    names = re.findall(r"`(\w+)`", (ROOT / "REPORT.md").read_text("utf-8"))
    functions = {name for name in names if "_" in name or name[0].isupper()}
    assert len(functions) > 12
    for name in functions:
        assert re.search(rf"\b{name}\b", code), name


@pytest.mark.parametrize("script, start", [
    (dcgan, "python dcgan.py --data toy-faces"), (cgan, "python cgan.py --no-conditional"),
    (ddpm, "python ddpm.py --conditional")], ids=["dcgan", "cgan", "ddpm"])
def test_three_commands_run_in_a_small_form(script, start, run, tmp_path, monkeypatch):
    text = (ROOT / "README.md").read_text("utf-8")
    line = next(line for line in text.splitlines() if start in line)
    flags = shlex.split(line.split("#")[0].split(f"python {script.__name__}.py")[1])
    monkeypatch.setitem(__import__("conftest").TINY, script.__name__, [])
    data = "toy-faces" if script is dcgan else "toy-digits"
    run(script, tmp_path, *flags, "--out_dir", tmp_path / "out", "--limit", 64, "--max_steps", 1,
        "--batch_size", 16, data=data)
    assert (tmp_path / "out" / "ckpt.pt").exists()
