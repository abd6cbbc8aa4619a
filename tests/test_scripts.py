"""The promises that every script makes: flags, settings, resume, one-line errors, checkpoints."""
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ENVIRONMENT, ROOT, TINY, Payload, checkpoint, log_rows, pictures, same
from PIL import Image

import data
import fid

each = pytest.mark.parametrize("script", TINY)
NETWORK = dict(  # flags that ask for another network or schedule
    dcgan=["--width 8", "--latent 9", "--image_size 32"],
    cgan=["--width 8", "--latent 9", "--image_size 32"],
    ddpm=["--channels 32", "--mults 2 2", "--blocks 2", "--attention 16", "--image_size 32",
          "--timesteps 40", "--schedule cosine"])
MISTAKES = dict(  # of one script alone
    dcgan=["--image_size 17"],
    cgan=["--conditional", "--label 0"],
    ddpm=["--image_size 17", "--channels 24", "--sample_steps 0", "--order 3", "--eta 2",
          "--guidance 2", "--conditional", "--label 0",
          "--sample 3 --out_dir run --conditional", "--sample 3 --out_dir run --batch_size 0",
          "--init_from payload/ckpt.pt"])


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def message(capsys, run, *args):
    """The one line with which a run ends, be it from sys.exit or from argparse."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        run(*args)
    text = capsys.readouterr().err if end.value.code == 2 else end.value.code
    assert isinstance(text, str) and len(text.strip().splitlines()) == 1, (args, text)
    return text


def edited_copy(script, folder, *edits):
    """A copy of a script, with each (pattern, replacement) applied to one line."""
    source = (ROOT / f"{script}.py").read_text("utf-8")
    for pattern, replacement in edits:
        source, count = re.subn(pattern, replacement, source, count=1, flags=re.M)
        assert count == 1, pattern
    (folder / f"{script}.py").write_text(source, "utf-8")
    return folder / f"{script}.py"


@pytest.mark.parametrize("script", [*TINY, "fid"])
def test_a_copied_script_imports_and_samples_with_torch_alone(script, tmp_path):
    shutil.copy(ROOT / f"{script}.py", tmp_path)
    missing = "data" if script == "fid" else "numpy PIL tqdm data fid torchvision scipy matplotlib"
    code = f"""
import sys
sys.modules.update(dict.fromkeys({missing.split()}))  # importing these fails
import torch, {script} as module
if module.__name__ == "ddpm":
    x, alpha_bar = torch.randn(2, 1, 28, 28), module.make_alpha_bar("linear", 30)
    list(module.sample(module.UNet(), x, alpha_bar, 2))
elif module.__name__ == "fid":
    module.statistics(torch.ones(2, 3, dtype=torch.uint8), torch.nn.Identity())
"""
    subprocess.run([sys.executable, "-B", "-c", code], cwd=tmp_path, check=True)


@each
def test_a_run_keeps_its_settings_in_an_edited_copy_whose_new_constants_are_flags(
        script, run, tmp_path, capsys):
    run(script, tmp_path / "straight", "--max_steps", 6, "--lr", 3e-3)
    run(script, tmp_path / "out", "--max_steps", 4, "--lr", 3e-3)
    width = "CHANNELS" if script == "ddpm" else "WIDTH"
    copy = edited_copy(
        script, tmp_path, ("^LR = [^ ]*", "LR = 0.125"), (f"^{width} = [0-9]*", f"{width} = 48"),
        ("^(SEED = .*)$", r"\1\nimport torch.nn.functional as F\nRATE = 0.5  # 50 % of something"),
        ("^(OUT_DIR = .*)$", r"\1\nCOLOUR = 'red'  # of nothing"))
    capsys.readouterr()
    flags = ["--rate", 1, "--colour", "blue"]
    names = run(copy, tmp_path / "out", "--resume", "--max_steps", 6, *flags)
    assert same(checkpoint(tmp_path / "straight"), checkpoint(tmp_path / "out"))
    settings = checkpoint(tmp_path / "out")["settings"]
    assert (settings["LR"], settings["RATE"], names["COLOUR"]) == (0.003, 1, "blue")
    assert not {"F", "COLOUR", "OUT_DIR", "DEVICE"} & settings.keys()
    names = run(copy, tmp_path / "out", "--sample", 1)
    assert (names["RATE"], names["COLOUR"]) == (1, "red")
    lines = capsys.readouterr().out.splitlines()
    for name, kept, edited in (("LR", "0.003", "0.125"), (width, "", "48")):
        found = [line for line in lines if line.startswith(f"{name} ")]
        assert len(found) == 2 and all(kept in line and edited in line for line in found)
    assert not any(line.startswith(("SEED", "FLIP")) for line in lines)  # they do not differ
    with pytest.raises(SystemExit):
        run(copy, tmp_path, "--help")
    assert "50 % of something (default: 0.5)" in " ".join(capsys.readouterr().out.split())
    copy = edited_copy(script, tmp_path, ("^(def train_step.*)", r"\1\n    raise ValueError('me')"))
    with pytest.raises(ValueError, match="me"):  # the traceback of an edit stays
        run(copy, tmp_path / "new", "--max_steps", 1)


@each
def test_a_run_writes_its_files_and_a_second_one_leaves_them(
        script, run, images, tmp_path, monkeypatch):
    """In folders that begin with ~."""
    monkeypatch.setenv("HOME", str(images.parent))
    monkeypatch.setenv("USERPROFILE", str(images.parent))  # on Windows
    monkeypatch.chdir(tmp_path)
    name = f"a folder, ä {script}"
    out = images.parent / name
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    run(script, f"~/{name}", "--max_steps", 8, "--sample_every", 1, data="~/images.npy")
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    epochs = ["epoch_0001.png", "epoch_0002.png"]  # 48 images in batches of 8: after steps 6 and 8
    expected = {"ckpt.pt", "log.csv", "loss.png", *[f"samples/{name}" for name in epochs]}
    expected |= {"denoise.png"} if script == "ddpm" else {f"prob/{name}" for name in epochs}
    before = files(out)
    assert {path.relative_to(out).as_posix() for path in before} == expected
    header, *rows = log_rows(out)
    ddpm, gan = "loss loss_q1 loss_q2 loss_q3 loss_q4", "loss_D loss_G D(x) D(G(z))"
    assert header == ["step", "epoch", *(ddpm if script == "ddpm" else gan).split()]
    assert [row[:2] for row in rows] == [["2", "1"], ["4", "1"], ["6", "1"], ["8", "2"]]
    with pytest.raises(SystemExit, match="--resume"):
        run(script, f"~/{name}", "--max_steps", 8)
    assert before == files(out) and os.listdir() == []


@each
def test_resume_is_exact_and_pictures_do_not_change_a_run(script, run, tmp_path):
    """The same seed is the same run, too; another seed or precision is another one."""
    run(script, tmp_path / "straight", "--max_steps", 14, "--sample_every", 1)
    for name, totals in (("parts", (4, 10, 14)), ("odd", (5, 14))):  # 5 is between rows of the log
        for total in totals:
            resume = ["--resume"] * (total > totals[0])
            run(script, tmp_path / name, "--max_steps", total, *resume)
        assert same(checkpoint(tmp_path / "straight"), checkpoint(tmp_path / name))
    assert log_rows(tmp_path / "straight") == log_rows(tmp_path / "parts")
    for name, value in (("seed", 1), ("dtype", "bfloat16")):
        run(script, tmp_path / name, "--max_steps", 14, f"--{name}", value)
        assert not same(checkpoint(tmp_path / "straight"), checkpoint(tmp_path / name))


@pytest.mark.parametrize("script, name", [("dcgan", "G"), ("ddpm", "net")])
def test_resume_may_change_how_weights_lie_in_memory(script, name, run, tmp_path, monkeypatch):
    """As from a GPU to MPS. Adam's fused step reads weights and moments as plain memory."""
    # the same noise in both layouts: randn_like fills memory in its order
    monkeypatch.setattr(torch, "randn_like", lambda x: torch.randn(x.shape) + torch.zeros_like(x))
    run(script, tmp_path / "a", "--max_steps", 5)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    before = checkpoint(tmp_path / "a")[name]
    run(script, tmp_path / "a", "--resume", "--max_steps", 6)
    monkeypatch.setattr(torch, "channels_last", torch.contiguous_format)
    run(script, tmp_path / "b", "--resume", "--max_steps", 6)
    a, b = checkpoint(tmp_path / "a")[name], checkpoint(tmp_path / "b")[name]
    pairs = [(a[key] - before[key], a[key] - b[key]) for key in a if a[key].ndim == 4]
    way, error = [sum(change.square().sum() for change in changes) for changes in zip(*pairs)]
    assert 0 < error < 1e-3 * way  # not 0, for sums are taken in another order


@each
def test_fid_at_the_end_is_of_the_images_of_the_flag_sample(
        script, run, images, tmp_path, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(fid, "compare", lambda samples, real, num, *_: calls.append(
        (torch.cat(list(samples)), real, num)) or 12.34567)
    run(script, tmp_path, "--max_steps", 2, "--fid", 20)
    assert "FID 12.3457 of 20 samples" in capsys.readouterr().out
    (samples, real, num), = calls
    assert num == 20 and real.equal(data.load(str(images), 16)[0])
    run(script, tmp_path, "--sample", 20)
    assert data.load(str(tmp_path / "generated"), 16, tmp_path)[0].equal(samples)


@each
def test_a_resume_counts_totals_and_its_flags_win(script, run, tmp_path, capsys):
    beta1 = script != "ddpm"
    run(script, tmp_path, "--epochs", 1, "--lr", 1e-3, *["--beta1", 0.25] * beta1)
    assert checkpoint(tmp_path)["step"] == 6  # 48 images in batches of 8
    before = (tmp_path / "ckpt.pt").read_bytes()
    for flags in ([], ["--max_steps", 4, "--epochs", 3]):
        run(script, tmp_path, "--resume", *flags)  # nothing is left to do
        printed = capsys.readouterr().out
        assert "step 6 " in printed and "--resume" in printed and "--epochs" in printed
    assert (tmp_path / "ckpt.pt").read_bytes() == before
    with open(tmp_path / "log.csv", "a", encoding="utf-8") as file:
        file.write("8,2" + ",0" * 6)  # of a run that died after its last save
    run(script, tmp_path, "--resume", "--epochs", 2, "--lr", 5e-4, *["--beta1", 0.75] * beta1)
    assert [row[0] for row in log_rows(tmp_path)[1:]] == "2 4 6 8 10 12".split()
    for name in ("opt_G", "opt_D") if beta1 else ("opt",):
        group = checkpoint(tmp_path)[name]["param_groups"][0]
        schedule = 1 if beta1 else 12 / 200 * (1 + math.cos(math.pi * 11 / 12)) / 2
        assert group["lr"] == pytest.approx(5e-4 * schedule)
        assert group["betas"] == (0.75 if beta1 else 0.9, 0.999)
    run(script, tmp_path, "--resume", "--epochs", 9, "--max_steps", 13)
    assert checkpoint(tmp_path)["step"] == 13
    assert checkpoint(tmp_path)["settings"]["LR"] == 5e-4  # the last one that was given


@each
def test_kill_9_leaves_a_checkpoint_that_loads(script, run, images, tmp_path):
    flags = "--log_every 1 --save_every 0 --sample_every 0 --epochs 1000000".split()
    command = [sys.executable, ROOT / f"{script}.py", "--data", images, "--out_dir", tmp_path]
    process = subprocess.Popen([*command, *TINY[script], *flags], env=ENVIRONMENT)
    step = 0
    while step < 5:
        assert process.poll() is None
        time.sleep(0.05)
        step = checkpoint(tmp_path)["step"] if (tmp_path / "ckpt.pt").exists() else 0
    process.kill()
    process.wait()
    saved = checkpoint(tmp_path)["step"]
    run(script, tmp_path, "--resume", "--max_steps", saved + 1)
    assert saved >= step and checkpoint(tmp_path)["step"] == saved + 1


@each
def test_ctrl_c_in_a_save_leaves_the_one_before_from_which_a_resume_is_exact(
        script, run, tmp_path, monkeypatch):
    run(script, tmp_path / "straight", "--max_steps", 8)
    save = torch.save

    def save_half(state, path):
        save(state, path)
        if state["step"] == 6:
            os.truncate(path, os.path.getsize(path) // 2)
            raise KeyboardInterrupt

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save_half)
        with pytest.raises(SystemExit, match="^stopped: .*--resume.*$"):
            run(script, out, "--max_steps", 8, "--save_every", 0)
    ckpt = checkpoint(out)
    assert ckpt["step"] == 4 and [row["step"] for row in ckpt["rows"]] == [2, 4]
    run(script, out, "--resume", "--max_steps", 8)
    assert same(checkpoint(tmp_path / "straight"), checkpoint(out))
    assert log_rows(tmp_path / "straight") == log_rows(out)
    assert sorted(os.listdir(out)) == ["ckpt.pt", "log.csv"]


@each
@pytest.mark.parametrize("what", ["loss", "weights"])
def test_divergence_keeps_the_last_checkpoint(script, what, run, tmp_path, monkeypatch):
    run(script, tmp_path, "--max_steps", 4)
    before, updates, step = (tmp_path / "ckpt.pt").read_bytes(), [], torch.optim.Adam.step

    def poisoned_step(self):
        step(self)
        updates.append(self)
        if len(updates) == (1 if script == "ddpm" else 2):  # the last one before the row of step 5
            self.param_groups[0]["params"][0].data[0] = math.nan

    if what == "weights":
        monkeypatch.setattr(torch.optim.Adam, "step", poisoned_step)
    flags = ["--save_every", 0, *(["--lr", 1e30] if what == "loss" else ["--log_every", 1])]
    with pytest.raises(SystemExit, match="error: diverged by step"):
        run(script, tmp_path, "--resume", "--epochs", 2, *flags)
    assert (tmp_path / "ckpt.pt").read_bytes() == before


@each
def test_user_mistakes_are_one_line_and_write_nothing(script, run, tmp_path, monkeypatch, capsys):
    """Nothing that is read can run code."""
    monkeypatch.chdir(tmp_path)
    for folder in ("empty", "bad", "old", "half", "payload", "data"):
        Path(folder).mkdir()
    Path("file").write_text("text")
    np.save("pickle.npy", np.array([Payload()]))
    torch.save({"script": script, "settings": Payload()}, "payload/ckpt.pt")
    Path("bad/ckpt.pt").write_bytes(b"no checkpoint")
    torch.save({"model": script, "config": {}, "step": 3}, "old/ckpt.pt")  # of an older version
    for name in (script, "cgan" if script == "dcgan" else "dcgan"):
        run(name, "run" if name == script else "another", "--epochs", 4)
    Path("half/ckpt.pt").write_bytes(Path("run/ckpt.pt").read_bytes()[:-9999])
    before = files(tmp_path)
    mistakes = [
        "--no_such_flag 1", "--batch_size abc", "--batch_size 0", "--epochs -1",
        "--dtype float17", "--data nowhere", "--data empty", "--data file", "--data pickle.npy",
        "--data mnist --data_dir file", "--resume", "--sample 3"]
    for folder in ("bad", "old", "another", "half", "payload"):
        mistakes += [f"--resume --out_dir {folder}", f"--sample 3 --out_dir {folder}"]
    changes = [f"--sample 3 --out_dir run {flags}" for flags in NETWORK[script]]
    for flags in ("--batch_size 16", "--seed 1", "--limit 20", *NETWORK[script]):
        changes += [f"--resume --out_dir run --epochs 6 {flags}"]
    for mistake in mistakes + changes + MISTAKES[script]:
        text = message(capsys, run, script, "out", *mistake.split())
        assert ("error: the run has" if mistake in changes else "error: ") in text, mistake
    for name, value in dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="2").items():
        monkeypatch.setenv(name, value)
    for flags in [["run", "--sample", 2], *[["out"]] * (script != "ddpm")]:
        assert "torchrun" in message(capsys, run, script, *flags)
    assert files(tmp_path) == before and not Path("out").exists()


@each
def test_it_learns_and_samples_depend_on_the_seed_and_their_number_alone(
        script, run, tmp_path, monkeypatch):
    """White digits on black: the mean image of samples comes near to that of the data."""
    flags = ("--max_steps 400 --batch_size 32 --width 8 --lr 1e-3" if script != "ddpm" else
             "--max_steps 240 --batch_size 16 --epochs 4 --lr 6e-3 --ema 0.98")
    run(script, tmp_path, "--limit", 1000, "--no-flip", *flags.split(), data="toy-digits")
    digits, _ = data.load("toy-digits", 16, limit=1000)
    monkeypatch.setattr(data, "load", None)  # --sample reads no data set
    steps = ["--sample_steps", 15] * (script == "ddpm")
    run(script, tmp_path, "--sample", 70, *steps)
    many = pictures(tmp_path / "generated")
    mean = np.mean([np.asarray(Image.open(tmp_path / "generated" / name)) for name in many], 0)
    assert abs(mean - digits[:, 0].numpy().mean(0)).mean() < 32  # before training: more than 75
    assert sorted(many) == [f"{i:06}.png" for i in range(70)] and len(set(many.values())) == 70
    (tmp_path / "generated" / "mine.png").write_text("stays")
    for num in (20, 4):  # ddpm.py draws them in batches of 16
        run(script, tmp_path, "--sample", num, *steps)
        few = pictures(tmp_path / "generated")
        assert few.pop("mine.png") == b"stays"
        assert few == {name: many[name] for name in sorted(many)[:num]}
    assert Image.open(tmp_path / "generated.png").size == (4 * 18 + 2, 18 + 2)
    run(script, tmp_path, "--sample", 4, "--seed", 1, *steps)
    assert not set(pictures(tmp_path / "generated").values()) & set(many.values())


@pytest.mark.parametrize("script", ["cgan", "ddpm"])
def test_labels_on_demand(script, run, tmp_path):
    run(script, tmp_path, "--conditional", "--max_steps", 1, "--limit", 40, "--batch_size", 32,
        "--sample_every", 1, data="toy-digits")
    width, _ = Image.open(tmp_path / "samples" / "epoch_0001.png").size
    assert width == 10 * 18 + 2  # a column for each label
    for label in ("10", "-1", "2,11"):
        with pytest.raises(SystemExit, match="10 classes"):
            run(script, tmp_path, "--sample", 3, f"--label={label}")
    ckpt = checkpoint(tmp_path)
    for weight in ckpt["ema"].values() if script == "ddpm" else []:
        weight += torch.rand(weight.shape) * 0.3  # so that a label matters
    torch.save(ckpt, tmp_path / "ckpt.pt")

    def draw(*flags):
        run(script, tmp_path, "--sample", 10, *["--sample_steps", 5] * (script == "ddpm"), *flags)
        paths = sorted((tmp_path / "generated").glob("*.png"))
        return np.stack([np.asarray(Image.open(path)) for path in paths]).astype(float)

    # number i has the same noise each time, so that with the same label it is the same image
    twos = draw("--label", 2)
    for flags, labels in (([], range(10)), (["--label", "2,0,2"], [2, 0, 2] * 3 + [2])):
        change = abs(draw(*flags) - twos).mean((1, 2))
        assert [value < 0.01 for value in change] == [label == 2 for label in labels], change
    if script == "ddpm":
        assert abs(draw("--label", 2, "--guidance", 3) - twos).mean((1, 2)).min() > 0.01
