"""The promises that every script makes: flags, resume, signals, one-line errors, checkpoints."""
import importlib
import inspect
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, checkpoint, command, log_rows, pictures, same
from PIL import Image

import data
import fid

SCRIPTS = [importlib.import_module(name) for name in TINY]
NETWORK = {"dcgan": "G", "cgan": "G", "ddpm": "net"}  # the part that a checkpoint calls so
EXTRA = {  # mistakes of one script alone
    "dcgan": ["--image_size 17"],
    "cgan": ["--conditional", "--label 3"],
    "ddpm": ["--image_size 17", "--timesteps 20", "--sample_steps 31", "--schedule straight",
             "--sampler euler", "--variance medium", "--eta 1.5", "--channels 9", "--mults 0",
             "--dropout 1", "--guidance 2", "--conditional", "--init_from floats.npy"]}
each = pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)


# ---- the files and their flags


@each
def test_a_copied_script_imports_with_torch_alone(script, tmp_path):
    shutil.copy(script.__file__, tmp_path)
    code = f"""
import os, sys
for name in ("numpy", "PIL", "torchvision", "scipy", "matplotlib", "data", "fid", "diffusers"):
    sys.modules.setdefault(name, None)  # importing it fails
import {script.__name__}
assert os.listdir() == ["{script.__name__}.py"]
"""
    done = subprocess.run([sys.executable, "-B", "-c", code], cwd=tmp_path)
    assert done.returncode == 0


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


def test_parse_flags_is_the_same_in_dcgan_and_cgan():
    dcgan, cgan, _ = SCRIPTS
    assert inspect.getsource(dcgan.parse_flags) == inspect.getsource(cgan.parse_flags)


# ---- a run


@each
def test_a_run_writes_its_files_and_a_second_one_leaves_them(script, run, tmp_path, capsys):
    out = tmp_path / "a folder, ä"
    run(script, out, "--max_steps", 8, "--sample_every", 1)
    names = ["ckpt.pt", "log.csv", "loss.png", "samples.gif", "samples/epoch_0001.png",
             "samples/epoch_0002.png"]
    names += ["denoise.png"] if script.__name__ == "ddpm" else ["prob/epoch_0002.png"]
    for name in names:
        assert (out / name).stat().st_size > 0
    assert [row[0] for row in log_rows(out)] == ["step", "1", "2", "4", "6", "8"]
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    with pytest.raises(SystemExit, match="--resume"):
        run(script, out, "--max_steps", 8)
    assert before == {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}


@each
def test_resume_is_exact(script, run, tmp_path):
    run(script, tmp_path / "straight", "--max_steps", 14)
    for total in (5, 11, 14):  # in mid-epoch, and between two rows of the log
        run(script, tmp_path / "parts", "--max_steps", total, *["--resume"] * (total > 5))
    straight, parts = checkpoint(tmp_path / "straight"), checkpoint(tmp_path / "parts")
    assert straight["step"] == parts["step"] == 14
    assert same(straight, parts)
    assert log_rows(tmp_path / "straight") == log_rows(tmp_path / "parts")


@each
def test_same_seed_same_run_and_pictures_do_not_change_it(script, run, tmp_path):
    run(script, tmp_path / "a", "--max_steps", 7, "--sample_every", 1)
    run(script, tmp_path / "b", "--max_steps", 7)
    run(script, tmp_path / "c", "--max_steps", 7, "--seed", 1)
    assert same(checkpoint(tmp_path / "a"), checkpoint(tmp_path / "b"))
    assert not same(checkpoint(tmp_path / "a"), checkpoint(tmp_path / "c"))
    assert not (tmp_path / "b" / "samples").exists()


@each
def test_epochs_are_totals_and_the_log_follows_the_checkpoint(script, run, tmp_path):
    run(script, tmp_path, "--epochs", 1)
    assert checkpoint(tmp_path)["step"] == 6  # 48 images in batches of 8
    with open(tmp_path / "log.csv", "a", encoding="utf-8") as file:
        file.write("10,2" + ",0" * 6 + "\n12,2,0")  # of a run that died after its save
    run(script, tmp_path, "--resume", "--epochs", 2)
    assert checkpoint(tmp_path)["step"] == 12
    assert [row[0] for row in log_rows(tmp_path)[1:]] == "1 2 4 6 8 10 12".split()
    run(script, tmp_path, "--resume")  # nothing is left to do
    assert checkpoint(tmp_path)["step"] == 12


@each
def test_a_flag_wins_over_the_checkpoint(script, run, tmp_path):
    run(script, tmp_path, "--max_steps", 2, "--beta1", 0.25, "--no-compile")
    run(script, tmp_path, "--resume", "--max_steps", 3)
    config = checkpoint(tmp_path)["config"]
    assert config["BETA1"] == 0.25 and config["COMPILE"]  # COMPILE belongs to the machine
    run(script, tmp_path, "--resume", "--max_steps", 4, "--beta1", 0.75)
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
    from test_fid import Mean

    monkeypatch.setattr(fid, "Inception", Mean)
    run(script, tmp_path, "--max_steps", 2, "--fid", 48)
    printed = re.search(r"FID ([\d.]+) of 48 samples", capsys.readouterr().out)
    run(script, tmp_path, "--sample", 48)
    samples, _ = data.load(str(tmp_path / "generated"), 16, tmp_path)
    reals, _ = data.load(checkpoint(tmp_path)["config"]["DATA"], 16)
    distance = fid.frechet_distance(*fid.statistics(samples, Mean()), *fid.statistics(reals, Mean()))
    assert float(printed[1]) == pytest.approx(distance, abs=1e-3)


# ---- what may go wrong


def test_kill_9_leaves_a_checkpoint_that_loads(images, tmp_path):
    flags = ["--data", images, "--epochs", 10**6, "--sample_every", 0]
    processes = {}
    for script in SCRIPTS:  # side by side, to save time
        processes[script] = subprocess.Popen(**command(
            script.__name__, *flags, *TINY[script.__name__], "--out_dir", tmp_path / script.__name__))
    for script, process in processes.items():
        out, began, step = tmp_path / script.__name__, time.time(), 0
        while step < 18:
            assert process.poll() is None and time.time() - began < 60, process.stderr.read()
            step = checkpoint(out)["step"] if (out / "ckpt.pt").exists() else 0
        process.kill()
        process.communicate()
        assert checkpoint(out)["step"] >= step


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


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_signals_finish_the_step_save_and_say_so(images, tmp_path):
    flags = ["--data", images, "--epochs", 10**6, "--sample_every", 0]
    processes = {}
    for script, number in zip(SCRIPTS, (signal.SIGINT, signal.SIGTERM, signal.SIGINT)):
        processes[script, number] = subprocess.Popen(**command(
            script.__name__, *flags, *TINY[script.__name__], "--out_dir", tmp_path / script.__name__))
    for (script, number), process in processes.items():
        process.stdout.readline()  # the row of step 1
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=60)
        assert process.returncode == 128 + number and stderr == ""
        step = checkpoint(tmp_path / script.__name__)["step"]
        assert f"stopped at step {step}" in stdout and "--resume" in stdout


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
def test_a_checkpoint_that_does_not_fit_is_refused(script, run, tmp_path, capsys):
    run(script, tmp_path, "--max_steps", 1)
    ckpt, name = checkpoint(tmp_path), NETWORK[script.__name__]
    wider = ["--channels", 32] if script.__name__ == "ddpm" else ["--width", 8]
    with pytest.raises(SystemExit) as refused:
        run(script, tmp_path, "--resume", "--max_steps", 2, *wider)
    assert refused.value.code == 2 or "does not fit" in refused.value.code
    weight = next(key for key, value in ckpt[name].items() if value.ndim)
    for changed in ({**ckpt[name], weight: torch.zeros(3, 2)}, {}):
        torch.save({**ckpt, name: changed}, tmp_path / "ckpt.pt")
        for flags in (["--resume", "--max_steps", 2], ["--sample", 1]):
            with pytest.raises(SystemExit, match="does not fit"):
                run(script, tmp_path, *flags)
    torch.save({**ckpt, "model": script.__name__.upper()}, tmp_path / "ckpt.pt")
    with pytest.raises(SystemExit):
        run(script, tmp_path, "--resume", "--max_steps", 2)
    assert "older version" in capsys.readouterr().err
    assert not (tmp_path / "generated").exists()


@each
def test_user_mistakes_are_one_line_and_write_nothing(script, images, tmp_path):
    """All in one process, for each would take seconds in its own."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("text")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "ckpt.pt").write_bytes(b"no checkpoint")
    (tmp_path / "other").mkdir()
    torch.save({"model": "another", "config": {}}, tmp_path / "other" / "ckpt.pt")
    np.save(tmp_path / "floats.npy", np.zeros((4, 16, 16, 3)))
    np.save(tmp_path / "none.npy", np.zeros((0, 16, 16, 3), np.uint8))
    tiny = f"--data {images} {' '.join(TINY[script.__name__])} --out_dir out --max_steps 1 "
    mistakes = [tiny + mistake for mistake in (
        "--no_such_flag 1", "--batch 3", "--batch_size abc", "--batch_size 0", "--epochs -1",
        "--lr nan", "--lr inf", "--log_every 0", "--beta1 1.5", "--ema 1", "--device nonsense",
        "--dtype float17", "--data nowhere", "--data empty", "--data file", "--data floats.npy",
        "--data none.npy", "--data mnist --data_dir file", *EXTRA[script.__name__])]
    mistakes += ["--resume", "--sample 3", "--sample 0", "--sample 3 --out_dir bad",
                 "--resume --out_dir other"]
    code = f"""
import json, runpy, sys
for flags in json.loads(sys.argv[1]):
    sys.argv = ["script.py", *flags.split()]
    try:
        runpy.run_path({script.__file__!r}, run_name="__main__")
    except SystemExit as end:
        message = end.code if isinstance(end.code, str) else "status"
        print(message, "status", end.code, flush=True, file=sys.stderr)
"""
    before = sorted(tmp_path.rglob("*"))
    done = subprocess.run([sys.executable, "-c", code, json.dumps(mistakes)], cwd=tmp_path,
                          env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True,
                          capture_output=True)
    lines = [line for line in done.stderr.splitlines() if "error: " in line]
    assert len(lines) == len(mistakes) and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.count("status") >= len(mistakes) and "status 0" not in done.stderr
    after = [path for path in sorted(tmp_path.rglob("*")) if path not in before]
    assert [path for path in after if "data" not in path.parts] == []


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


# ---- samples


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
