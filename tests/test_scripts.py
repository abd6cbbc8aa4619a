"""The promises that every script makes: flags, settings, resume, one-line errors, checkpoints."""
import ast
import importlib
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
from conftest import ROOT, TINY, checkpoint, command, log_rows, pictures, same
from PIL import Image

import data
import fid

each = pytest.mark.parametrize("script", TINY)
NETWORK = {  # flags that ask for another network or schedule
    "dcgan": ["--width 8", "--latent 9", "--image_size 32"],
    "cgan": ["--width 8", "--latent 9", "--image_size 32"],
    "ddpm": ["--channels 32", "--mults 2 2", "--blocks 2", "--attention 16", "--image_size 32",
             "--timesteps 40", "--schedule cosine"]}
MISTAKES = {  # of one script alone
    "dcgan": ["--image_size 17"],
    "cgan": ["--conditional", "--label 0"],
    "ddpm": ["--image_size 17", "--channels 24", "--sample_steps 0", "--order 3", "--eta 2",
             "--guidance 2", "--conditional", "--label 0", "--timesteps 20", "--schedule other"]}


def files(folder):
    """The content of all files in a folder, by path."""
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


@each
def test_a_copied_script_imports_and_samples_with_torch_alone(script, tmp_path):
    shutil.copy(ROOT / f"{script}.py", tmp_path)
    code = f"""
import sys
for name in ("numpy", "PIL", "tqdm", "data", "fid", "torchvision", "scipy", "matplotlib", "diffusers"):
    sys.modules.setdefault(name, None)  # importing it fails
import torch, {script} as module
if module.__name__ == "ddpm":
    from ddpm import UNet, sample
    *_, x = sample(UNet(), torch.randn(2, 1, 28, 28), module.make_alpha_bar("linear", 30), 2)
    assert x.shape == (2, 1, 28, 28)
"""
    subprocess.run([sys.executable, "-B", "-c", code], cwd=tmp_path, check=True)
    assert os.listdir(tmp_path) == [f"{script}.py"]


@each
def test_every_constant_is_a_flag_with_help_and_default(script, monkeypatch, capsys):
    module = importlib.import_module(script)
    statements = ast.parse(Path(module.__file__).read_text("utf-8")).body
    names = [line.targets[0].id for line in statements if isinstance(line, ast.Assign)]
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit):
        module.parse_flags()
    blocks = re.split(r"\n  (?=--)", capsys.readouterr().out)
    blocks = {re.match("[-_a-z0-9]*", block)[0]: " ".join(block.split()) for block in blocks}
    for name in filter(str.isupper, names):
        shown = blocks[f"--{name.lower()}"]
        assert f"(default: {getattr(module, name)})" in shown and len(shown) > 50, name
    monkeypatch.setattr(sys, "argv", [script, "--lr", "1", "--no-flip", "--data", "a b"])
    assert module.parse_flags() == dict(LR=1.0, FLIP=False, DATA="a b")


@each
def test_a_new_constant_is_a_flag_and_does_no_harm(script, run, tmp_path, capsys):
    copy = edited_copy(script, tmp_path, ("^(SEED = .*)$", r"""\1
import torch.nn.functional as F
import numpy as NP
RATE = 0.5              # 50 % of something
PLAIN = "abc"
"""), ("^(OUT_DIR = .*)$", r"\1\nCOLOUR = 'red'  # of nothing"))
    run(copy, tmp_path / "out", "--max_steps", 2, "--rate", 0.25, "--colour", "blue")
    settings = checkpoint(tmp_path / "out")["settings"]
    assert settings["RATE"] == 0.25 and settings["PLAIN"] == "abc"
    assert not {"F", "NP", "COLOUR", "OUT_DIR", "DEVICE"} & settings.keys()
    names = run(copy, tmp_path / "out", "--resume", "--max_steps", 4, "--plain", "x")
    assert (names["RATE"], names["PLAIN"], names["COLOUR"]) == (0.25, "x", "red")
    assert checkpoint(tmp_path / "out")["step"] == 4
    with pytest.raises(SystemExit):
        run(copy, tmp_path, "--help")
    assert "50 % of something (default: 0.5)" in re.sub(r"\s+", " ", capsys.readouterr().out)


@each
def test_the_traceback_of_an_edit_stays(script, run, tmp_path):
    copy = edited_copy(script, tmp_path, (r"^(def train_step.*)$", r"\1\n    raise ValueError('mine')"))
    with pytest.raises(ValueError, match="mine"):
        run(copy, tmp_path / "out", "--max_steps", 1)


@each
def test_a_run_writes_its_files_and_a_second_one_leaves_them(script, run, tmp_path):
    out = tmp_path / "a folder, ä"
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    run(script, out, "--max_steps", 8, "--sample_every", 1)
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    epochs = ["epoch_0001.png", "epoch_0002.png"]  # 48 images in batches of 8: after steps 6 and 8
    expected = {"ckpt.pt", "log.csv", "loss.png", *[f"samples/{name}" for name in epochs]}
    expected |= {"denoise.png"} if script == "ddpm" else {f"prob/{name}" for name in epochs}
    before = files(out)
    assert {path.relative_to(out).as_posix() for path in before} == expected
    header, *rows = log_rows(out)
    assert header[:2] + header[2:] == ["step", "epoch"] + (
        ["loss", "loss_q1", "loss_q2", "loss_q3", "loss_q4"] if script == "ddpm" else
        ["loss_D", "loss_G", "D(x)", "D(G(z))"])
    assert [row[:2] for row in rows] == [["2", "1"], ["4", "1"], ["6", "1"], ["8", "2"]]
    parts = {"net", "opt", "alpha_bar"} if script == "ddpm" else {"G", "D", "opt_G", "opt_D"}
    assert checkpoint(out).keys() == {"script", "settings", "fixed", "step", "rows", "ema", *parts}
    with pytest.raises(SystemExit, match="--resume"):
        run(script, out, "--max_steps", 8)
    assert before == files(out)


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
        assert {part.dtype for part in checkpoint(tmp_path / name)["ema"].values()} <= {
            torch.float32, torch.int64}  # weights stay float32


@each
def test_the_average_reaches_over_a_tenth_of_the_steps(script, run, tmp_path):
    """ema = decay * ema + (1 - decay) * weights, with decay = min(EMA, step / (step + 9))."""
    for step in (1, 2, 3, 4):
        before = checkpoint(tmp_path) if step > 1 else None
        resume = ["--resume"] * (step > 1)
        run(script, tmp_path, "--max_steps", step, "--lr", 0.1, "--ema", 0.2, *resume)
        after = checkpoint(tmp_path)
        decay = min(0.2, step / (step + 9))
        for key, value in after["ema"].items() if before else []:
            if value.is_floating_point():  # BatchNorm's statistics among them
                net = after["net" if script == "ddpm" else "G"][key]
                torch.testing.assert_close(value, decay * before["ema"][key] + (1 - decay) * net)


@pytest.mark.parametrize("script, name", [("dcgan", "G"), ("ddpm", "net")])
def test_resume_may_change_how_weights_lie_in_memory(script, name, run, tmp_path, monkeypatch):
    """As from a GPU to MPS. Adam's fused step reads weights and moments as plain memory."""
    # the same noise in both layouts: randn_like fills memory in its order
    monkeypatch.setattr(torch, "randn_like", lambda x: torch.empty_like(x).copy_(torch.randn(x.shape)))
    run(script, tmp_path / "a", "--max_steps", 5)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    before = checkpoint(tmp_path / "a")[name]
    run(script, tmp_path / "a", "--resume", "--max_steps", 6)
    monkeypatch.setattr(torch, "channels_last", torch.contiguous_format)
    run(script, tmp_path / "b", "--resume", "--max_steps", 6)
    a, b = checkpoint(tmp_path / "a")[name], checkpoint(tmp_path / "b")[name]
    weights = [key for key in a if a[key].ndim == 4]
    way = sum((a[key] - before[key]).square().sum() for key in weights)
    error = sum((a[key] - b[key]).square().sum() for key in weights)
    assert 0 < error < 1e-3 * way  # not 0, for sums are taken in another order


@each
def test_fid_at_the_end_is_of_the_images_of_the_flag_sample(
        script, run, images, tmp_path, monkeypatch, capsys):
    calls = []

    def compare(samples, real, num, *_):
        calls.append((torch.cat(list(samples)), real, num))
        return 12.34567

    monkeypatch.setattr(fid, "compare", compare)
    monkeypatch.setattr(fid, "Inception", torch.nn.Identity)  # needs no download
    run(script, tmp_path, "--max_steps", 2, "--fid", 20)
    assert "FID 12.3457 of 20 samples" in capsys.readouterr().out
    (samples, real, num), = calls
    assert num == 20 and real.equal(data.load(str(images), 16)[0])
    run(script, tmp_path, "--sample", 20)
    assert data.load(str(tmp_path / "generated"), 16, tmp_path)[0].equal(samples)


@each
def test_home_folders(script, run, tmp_path, monkeypatch):
    home = tmp_path / "home"
    (home / "set").mkdir(parents=True)
    for i in range(9):
        Image.new("RGB", (20, 16), (i * 20, 99, 0)).save(home / "set" / f"{i}.png")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USERPROFILE", str(home))  # on Windows
    monkeypatch.chdir(tmp_path)
    run(script, "~/out", "--max_steps", 1, "--data_dir", "~/cache", data="~/set")
    run(script, "~/out", "--sample", 1)
    assert sorted(os.listdir(home)) == ["cache", "out", "set"] and os.listdir(home / "cache")
    assert os.listdir() == ["home"]


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
    for group in [checkpoint(tmp_path)[name]["param_groups"][0]
                  for name in (["opt_G", "opt_D"] if beta1 else ["opt"])]:
        schedule = 1 if beta1 else 12 / 200 * (1 + math.cos(math.pi * 11 / 12)) / 2
        assert group["lr"] == pytest.approx(5e-4 * schedule)
        assert group["betas"] == (0.75 if beta1 else 0.9, 0.999)
    run(script, tmp_path, "--resume", "--epochs", 9, "--max_steps", 13)
    assert checkpoint(tmp_path)["step"] == 13
    assert checkpoint(tmp_path)["settings"]["LR"] == 5e-4  # the last one that was given


@each
def test_a_constant_edited_after_the_run_is_overruled_and_printed(script, run, tmp_path, capsys):
    run(script, tmp_path / "straight", "--max_steps", 6, "--lr", 3e-3)
    run(script, tmp_path / "out", "--max_steps", 4, "--lr", 3e-3)
    width = "CHANNELS" if script == "ddpm" else "WIDTH"
    copy = edited_copy(script, tmp_path, ("^LR = [^ ]*", "LR = 0.125"), ("^EMA = [^ ]*", "EMA = 0.5"),
                       (f"^{width} = [0-9]*", f"{width} = 48"))
    capsys.readouterr()
    run(copy, tmp_path / "out", "--resume", "--max_steps", 6)
    assert same(checkpoint(tmp_path / "straight"), checkpoint(tmp_path / "out"))
    run(copy, tmp_path / "out", "--sample", 1)
    lines = capsys.readouterr().out.splitlines()
    for name, kept, edited in (("LR", "0.003", "0.125"), ("EMA", "0.999", "0.5"), (width, "", "48")):
        found = [line for line in lines if line.startswith(f"{name} ")]
        assert len(found) == 2 and all(kept in line and edited in line for line in found)
    assert not any(line.startswith(("SEED", "FLIP")) for line in lines)  # they do not differ


@each
def test_what_a_run_cannot_change_is_refused(script, run, images, tmp_path, capsys):
    run(script, tmp_path, "--epochs", 4)
    before = files(tmp_path)
    for flags in ("--batch_size 16", "--seed 1", "--limit 20", *NETWORK[script]):
        text = message(capsys, run, script, tmp_path, "--resume", "--epochs", 6, *flags.split())
        assert "error: the run has" in text, flags
    for flags in NETWORK[script]:
        message(capsys, run, script, tmp_path, "--sample", 3, *flags.split())
    assert files(tmp_path) == before


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_kill_9_leaves_a_checkpoint_that_loads_and_ctrl_c_is_one_line(run, images, tmp_path):
    flags = ["--data", images, "--epochs", 10**6, "--sample_every", 0, "--log_every", 1,
             "--save_every", 0, "--out_dir"]
    running = []
    for script, number in (*[(name, signal.SIGKILL) for name in TINY], ("dcgan", signal.SIGINT)):
        out = tmp_path / f"{script} {number}"
        process = subprocess.Popen(**command(script, *TINY[script], *flags, out))
        running.append((script, number, out, process))
    began = time.time()
    while running:
        script, number, out, process = running.pop(0)
        step = checkpoint(out)["step"] if (out / "ckpt.pt").exists() else 0
        if step < 5:
            assert process.poll() is None and time.time() - began < 99, process.stderr.read()
            running.append((script, number, out, process))
            time.sleep(0.05)
            continue
        process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
        assert process.returncode != 0
        if number == signal.SIGINT:
            assert "Traceback" not in stderr and stderr.splitlines()[-1].startswith("stopped: ")
        saved = checkpoint(out)["step"]
        run(script, out, "--resume", "--max_steps", saved + 1)
        assert saved >= step and checkpoint(out)["step"] == saved + 1


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
        with pytest.raises((SystemExit, KeyboardInterrupt), match="stopped: .*--resume"):
            run(script, out, "--max_steps", 8, "--save_every", 0)
    assert checkpoint(out)["step"] == 4 and [row["step"] for row in checkpoint(out)["rows"]] == [2, 4]
    run(script, out, "--resume", "--max_steps", 8)
    assert same(checkpoint(tmp_path / "straight"), checkpoint(out))
    assert log_rows(tmp_path / "straight") == log_rows(out)
    assert sorted(os.listdir(out)) == ["ckpt.pt", "log.csv"]


@each
@pytest.mark.parametrize("what", ["loss", "weights"])
def test_divergence_keeps_the_last_checkpoint(script, what, run, tmp_path, monkeypatch):
    run(script, tmp_path, "--max_steps", 4)
    before, updates = (tmp_path / "ckpt.pt").read_bytes(), []
    get_batch, step = data.Batches.__call__, torch.optim.Adam.step

    def poisoned_batch(self, i):
        x, y = get_batch(self, i)
        return x * math.nan, y

    def poisoned_step(self):
        step(self)
        updates.append(self)
        if len(updates) == (2 if script == "ddpm" else 4):  # the last one before the row of step 6
            self.param_groups[0]["params"][0].data[0] = math.nan

    if what == "loss":
        monkeypatch.setattr(data.Batches, "__call__", poisoned_batch)
    else:
        monkeypatch.setattr(torch.optim.Adam, "step", poisoned_step)
    with pytest.raises(SystemExit, match="error: diverged by step 6"):
        run(script, tmp_path, "--resume", "--epochs", 2, "--save_every", 0)
    assert (tmp_path / "ckpt.pt").read_bytes() == before


@each
def test_user_mistakes_are_one_line_and_write_nothing(script, run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for folder in ("empty", "bad", "old", "half", "data"):
        Path(folder).mkdir()
    Path("file").write_text("text")
    Path("bad/ckpt.pt").write_bytes(b"no checkpoint")
    torch.save({"model": script, "config": {}, "step": 3}, "old/ckpt.pt")  # of an older version
    for name in (script, "cgan" if script == "dcgan" else "dcgan"):
        run(name, "run" if name == script else "another", "--max_steps", 1)
    Path("half/ckpt.pt").write_bytes(Path("run/ckpt.pt").read_bytes()[:-9999])
    before = files(tmp_path)
    mistakes = [
        "--no_such_flag 1", "--batch 3", "--batch_size abc", "--batch_size 0", "--epochs -1",
        "--dtype float17", "--data nowhere", "--data empty", "--data file",
        "--data mnist --data_dir file", "--resume", "--sample 3"]
    for folder in ("bad", "old", "another", "half"):
        mistakes += [f"--resume --out_dir {folder}", f"--sample 3 --out_dir {folder}"]
    for mistake in mistakes + MISTAKES[script]:
        text = message(capsys, run, script, "out", "--max_steps", 1, *mistake.split())
        assert "error: " in text, mistake
    for name, value in dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="2").items():
        monkeypatch.setenv(name, value)
    for flags in [["run", "--sample", 2], *[["out"]] * (script != "ddpm")]:
        assert "torchrun" in message(capsys, run, script, *flags)
    assert files(tmp_path) == before and not Path("out").exists()


def test_nothing_that_is_read_can_run_code(run, tmp_path, capsys):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    for script in TINY:
        torch.save({"script": script, "settings": Payload()}, tmp_path / "ckpt.pt")
        for flags in (["--resume"], ["--sample", 2]):
            message(capsys, run, script, tmp_path, *flags)
    np.save(tmp_path / "images.npy", np.array([Payload()], object), allow_pickle=True)
    message(capsys, run, "ddpm", tmp_path / "new", "--data", tmp_path / "images.npy")
    torch.save({"weights": Payload()}, tmp_path / "diffusion.pt")
    message(capsys, run, "ddpm", tmp_path / "new", "--init_from", tmp_path / "diffusion.pt")
    assert not (tmp_path / "owned").exists()


@each
def test_samples_depend_on_the_seed_and_their_number_alone(script, run, tmp_path, monkeypatch):
    run(script, tmp_path, "--max_steps", 4)
    monkeypatch.setattr(data, "load", None)  # --sample reads no data set
    steps = ["--sample_steps", 10] * (script == "ddpm")
    run(script, tmp_path, "--sample", 70, *steps)
    many = pictures(tmp_path / "generated")
    assert sorted(many) == [f"{i:06}.png" for i in range(70)] and len(set(many.values())) == 70
    (tmp_path / "generated" / "mine.png").write_text("stays")
    for num in (9, 4):  # ddpm.py draws them in batches of 8
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


@each
def test_it_learns(script, run, tmp_path):
    """White digits on black: the mean image of samples comes near to that of the data."""
    flags = ("--max_steps 400 --batch_size 32 --width 8 --lr 1e-3" if script != "ddpm" else
             "--max_steps 240 --batch_size 16 --epochs 4 --lr 6e-3 --ema 0.98")
    run(script, tmp_path, "--limit", 1000, "--no-flip", *flags.split(), data="toy-digits")
    run(script, tmp_path, "--sample", 96, *["--sample_steps", 15] * (script == "ddpm"))
    samples, _ = data.load(str(tmp_path / "generated"), 16, tmp_path)
    digits, _ = data.load("toy-digits", 16, limit=1000)
    error = (samples.float().mean(0) - digits.float().mean(0)).abs().mean() / 255
    assert error < 0.1, error  # before training: more than 0.3
