"""The promises that every script makes: flags, resume, signals, one-line errors, checkpoints."""
import importlib
import inspect
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import TINY, checkpoint, command, log_rows, pictures, same
from PIL import Image
from test_fid import Mean

import data
import fid

SCRIPTS = [importlib.import_module(name) for name in TINY]
EXTRA = {  # mistakes of one script alone
    "dcgan": ["--image_size 17"],
    "cgan": ["--conditional", "--label 3"],
    "ddpm": ["--image_size 17", "--timesteps 20", "--sample_steps 31", "--schedule straight",
             "--sampler euler", "--variance medium", "--eta 1.5", "--channels 9", "--mults 0",
             "--dropout 1", "--guidance 2", "--conditional", "--init_from file"]}
each = pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)


@each
def test_a_copied_script_imports_with_torch_alone(script, tmp_path):
    shutil.copy(script.__file__, tmp_path)
    code = f"""
import sys
for name in ("numpy", "PIL", "torchvision", "scipy", "matplotlib", "data", "fid", "diffusers"):
    sys.modules.setdefault(name, None)  # importing it fails
import {script.__name__}
"""
    subprocess.run([sys.executable, "-B", "-c", code], cwd=tmp_path, check=True)
    assert os.listdir(tmp_path) == [f"{script.__name__}.py"]


@each
def test_every_constant_is_a_flag_with_its_comment_and_default(script):
    settings, ckpt = script.parse_flags([])
    constants = {name for name in vars(script) if name.isupper() and name not in ("F", "PRESETS")}
    assert settings.keys() == constants and ckpt is None
    shown = subprocess.run(**command(script.__name__, "--help")).stdout
    for name, value in settings.items():
        assert f"--{name.lower()}" in shown and f"--{name.lower().replace('_', '-')}" in shown
        assert f"(default: {value})" in re.sub(r"\s+", " ", shown)
    assert script.parse_flags(["--batch-size", "7"])[0]["BATCH_SIZE"] == 7
    assert script.parse_flags(["--lr", "1"])[0]["LR"] == 1.0
    assert script.parse_flags(["--no-compile"])[0]["COMPILE"] is False
    if script.__name__ == "cgan":  # the function is copied, to the letter
        dcgan = SCRIPTS[0]
        assert inspect.getsource(script.parse_flags) == inspect.getsource(dcgan.parse_flags)


@each
def test_a_run_writes_its_files_and_a_second_one_leaves_them(script, run, tmp_path):
    out = tmp_path / "a folder, ä"
    run(script, out, "--max_steps", 8, "--sample_every", 1)
    picture = "denoise.png" if script.__name__ == "ddpm" else "prob/epoch_0002.png"
    for name in ("loss.png", "samples.gif", "samples/epoch_0001.png", picture):
        assert (out / name).stat().st_size > 0
    assert [row[0] for row in log_rows(out)] == ["step", "1", "2", "4", "6", "8"]
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    with pytest.raises(SystemExit, match="--resume"):
        run(script, out, "--max_steps", 8)
    assert before == {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}


@each
def test_resume_is_exact_and_pictures_do_not_change_a_run(script, run, tmp_path):
    """The same seed is the same run, too, and another seed is another one."""
    run(script, tmp_path / "straight", "--max_steps", 14, "--sample_every", 1)
    for total in (5, 11, 14):  # in mid-epoch, and between two rows of the log
        run(script, tmp_path / "parts", "--max_steps", total, *["--resume"] * (total > 5))
    run(script, tmp_path / "other", "--max_steps", 14, "--seed", 1)
    straight, parts = checkpoint(tmp_path / "straight"), checkpoint(tmp_path / "parts")
    assert straight["step"] == parts["step"] == 14
    assert same(straight, parts) and not same(straight, checkpoint(tmp_path / "other"))
    assert log_rows(tmp_path / "straight") == log_rows(tmp_path / "parts")
    assert not (tmp_path / "parts" / "samples").exists()


@each
def test_a_resume_counts_totals_and_its_flags_win(script, run, tmp_path):
    run(script, tmp_path, "--epochs", 1, "--beta1", 0.25, "--no-compile")
    assert checkpoint(tmp_path)["step"] == 6  # 48 images in batches of 8
    with open(tmp_path / "log.csv", "a", encoding="utf-8") as file:
        file.write("10,2" + ",0" * 6 + "\n12,2,0")  # of a run that died after its save
    run(script, tmp_path, "--resume", "--epochs", 2)
    assert [row[0] for row in log_rows(tmp_path)[1:]] == "1 2 4 6 8 10 12".split()
    run(script, tmp_path, "--resume")  # nothing is left to do
    config = checkpoint(tmp_path)["config"]
    assert config["BETA1"] == 0.25 and config["COMPILE"]  # COMPILE belongs to the machine
    assert checkpoint(tmp_path)["step"] == 12
    run(script, tmp_path, "--resume", "--epochs", 3, "--beta1", 0.75)
    ckpt = checkpoint(tmp_path)
    optimizers = [part for name, part in ckpt.items() if name.startswith("opt")]
    betas = {group["betas"] for opt in optimizers for group in opt["param_groups"]}
    assert ckpt["config"]["BETA1"] == 0.75 and betas == {(0.75, 0.999)}


@each
def test_a_run_without_matplotlib_says_so_and_goes_on(script, run, tmp_path, monkeypatch):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it fails
    with pytest.warns(UserWarning, match="matplotlib is not installed"):
        run(script, tmp_path, "--epochs", 1, "--sample_every", 1)
    assert (tmp_path / "samples" / "epoch_0001.png").exists()
    assert not (tmp_path / "loss.png").exists()


@each
def test_fid_at_the_end(script, run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fid, "Inception", Mean)
    run(script, tmp_path, "--max_steps", 2, "--fid", 20)
    printed = re.search(r"FID ([\d.]+) of 20 samples", capsys.readouterr().out)
    run(script, tmp_path, "--sample", 20)
    samples, _ = data.load(str(tmp_path / "generated"), 16, tmp_path)
    reals, _ = data.load(checkpoint(tmp_path)["config"]["DATA"], 16)
    reals = reals[fid.random_subset(48, 20, seed=0)]
    both = [*fid.statistics(samples, Mean()), *fid.statistics(reals, Mean())]
    assert float(printed[1]) == pytest.approx(fid.frechet_distance(*both), abs=1e-3)


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_kill_9_leaves_a_checkpoint_and_other_signals_save_one(images, tmp_path):
    flags = ["--data", images, "--epochs", 10**6, "--sample_every", 0, "--out_dir"]
    numbers = [signal.SIGKILL] * 3 + [signal.SIGINT, signal.SIGTERM, signal.SIGINT]
    runs = []
    for name, number in zip([*TINY, *TINY], numbers):  # side by side, to save time
        out = tmp_path / f"{name} {number}"
        process = subprocess.Popen(**command(name, *TINY[name], *flags, out))
        runs.append((process, number, out))
    for process, number, out in runs:
        began, step = time.time(), 0
        while step < 18:
            assert process.poll() is None and time.time() - began < 99, process.stderr.read()
            step = checkpoint(out)["step"] if (out / "ckpt.pt").exists() else 0
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=60)
        saved = checkpoint(out)["step"]
        assert saved >= step
        if number != signal.SIGKILL:
            assert process.returncode == 128 + number and stderr == ""
            assert f"stopped at step {saved}" in stdout and "--resume" in stdout


@each
def test_a_save_that_dies_leaves_the_last_checkpoint(script, run, tmp_path, monkeypatch):
    run(script, tmp_path, "--max_steps", 2)
    before, save = (tmp_path / "ckpt.pt").read_bytes(), torch.save

    def save_half(state, path):
        save(state, path)
        os.truncate(path, os.path.getsize(path) // 2)
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", save_half)
    with pytest.raises(KeyboardInterrupt):
        run(script, tmp_path, "--resume", "--max_steps", 4)
    assert (tmp_path / "ckpt.pt").read_bytes() == before
    monkeypatch.undo()
    run(script, tmp_path, "--resume", "--max_steps", 4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt.pt", "log.csv"]


@each
@pytest.mark.parametrize("log_every", [2, 1000])  # noticed at a row of the log, or when saving
def test_divergence_keeps_the_last_checkpoint(script, log_every, run, tmp_path, monkeypatch):
    run(script, tmp_path, "--max_steps", 4)
    before, get_batch = (tmp_path / "ckpt.pt").read_bytes(), data.Batches.__call__

    def poisoned(self, step):
        x, y = get_batch(self, step)
        return x * math.nan, y

    monkeypatch.setattr(data.Batches, "__call__", poisoned)
    with pytest.raises(SystemExit, match="diverged"):
        run(script, tmp_path, "--resume", "--epochs", 2, "--log_every", log_every)
    assert (tmp_path / "ckpt.pt").read_bytes() == before


def test_resume_may_change_how_weights_lie_in_memory(run, tmp_path, monkeypatch):
    """As from a GPU to MPS. Adam's fused step reads weights and moments as plain memory."""
    dcgan = SCRIPTS[0]
    run(dcgan, tmp_path / "a", "--max_steps", 5)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    before = checkpoint(tmp_path / "a")["G"]
    run(dcgan, tmp_path / "a", "--resume", "--max_steps", 6)
    monkeypatch.setattr(torch, "channels_last", torch.contiguous_format)
    run(dcgan, tmp_path / "b", "--resume", "--max_steps", 6)
    a, b = checkpoint(tmp_path / "a")["G"], checkpoint(tmp_path / "b")["G"]
    weights = [key for key in a if a[key].ndim == 4]
    way = sum((a[key] - before[key]).square().sum() for key in weights)
    error = sum((a[key] - b[key]).square().sum() for key in weights)
    assert 0 < error < 1e-3 * way  # not 0, for sums are taken in another order


@each
def test_a_checkpoint_that_does_not_fit_is_refused(script, run, tmp_path):
    run(script, tmp_path, "--max_steps", 1)
    wider = "--channels" if script.__name__ == "ddpm" else "--width"
    with pytest.raises(SystemExit, match="^2$|does not fit"):  # 2: from parse_flags()
        run(script, tmp_path, "--resume", "--max_steps", 2, wider, 32)
    ckpt = checkpoint(tmp_path)
    for damaged in ({}, {name: torch.zeros(3, 2) for name in ckpt["ema"]}):
        torch.save({**ckpt, "ema": damaged}, tmp_path / "ckpt.pt")
        for flags in (["--resume", "--max_steps", 2], ["--sample", 1]):
            with pytest.raises(SystemExit, match="does not fit"):
                run(script, tmp_path, *flags)
    assert not (tmp_path / "generated").exists()


@each
def test_user_mistakes_are_one_line_and_write_nothing(script, run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for folder in ("empty", "bad", "other"):
        Path(folder).mkdir()
    Path("file").write_text("text")
    Path("bad/ckpt.pt").write_bytes(b"no checkpoint")
    torch.save({"model": "another", "config": {}}, "other/ckpt.pt")
    before = {*os.listdir(), "data"}
    for mistake in (
            "--no_such_flag 1", "--batch 3", "--batch_size abc", "--batch_size 0", "--epochs -1",
            "--lr nan", "--lr inf", "--log_every 0", "--beta1 1.5", "--ema 1", "--device nonsense",
            "--dtype float17", "--data nowhere", "--data empty", "--data file",
            "--data mnist --data_dir file", "--resume", "--sample 3", "--sample 0",
            "--sample 3 --out_dir bad", "--resume --out_dir other", *EXTRA[script.__name__]):
        with pytest.raises(SystemExit) as end:
            run(script, "out", "--max_steps", 1, *mistake.split())
        code, err = end.value.code, capsys.readouterr().err
        text = err if code == 2 else code  # of argparse, or of sys.exit(text)
        assert "error: " in text and len(text.splitlines()) == 1, mistake
    assert {*os.listdir(), "data"} == before


def test_nothing_that_is_read_can_run_code(tmp_path):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    for script in SCRIPTS:
        torch.save({"model": script.__name__, "config": Payload()}, tmp_path / "ckpt.pt")
        with pytest.raises(SystemExit):
            script.parse_flags(["--resume", "--out_dir", str(tmp_path)])
    torch.save({"weights": Payload()}, tmp_path / "diffusion.pt")
    for load in (SCRIPTS[2].UNet.from_pretrained, fid.Inception):
        with pytest.raises(ValueError):
            load(str(tmp_path / "diffusion.pt"))
    assert not (tmp_path / "owned").exists()


@each
def test_samples_depend_on_the_seed_and_their_number_alone(script, run, tmp_path, monkeypatch):
    run(script, tmp_path, "--max_steps", 4)
    monkeypatch.setattr(data, "load", None)  # --sample reads no data set
    generated = tmp_path / "generated"
    run(script, tmp_path, "--sample", 70)
    (generated / "mine.txt").write_text("stays")
    many = pictures(generated)
    assert sorted(many) == [f"{i:06}.png" for i in range(70)]
    assert len(set(many.values())) == 70
    run(script, tmp_path, "--sample", 3)
    few = pictures(generated)
    assert few == {name: many[name] for name in sorted(many)[:3]}
    assert (generated / "mine.txt").exists()
    assert Image.open(tmp_path / "generated.png").size == (3 * 18 + 2, 18 + 2)
    run(script, tmp_path, "--sample", 3, "--seed", 1)
    assert not set(pictures(generated).values()) & set(many.values())
