"""The promises that every script makes: flags, resume, signals, one-line errors, checkpoints."""
import ast
import importlib
import inspect
import json
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
import data
from conftest import ROOT, TINY, checkpoint, command, log_rows, same

SCRIPTS = [importlib.import_module(name) for name in TINY]
EXTRA = {  # mistakes of one alone
    "dcgan": [["--image_size", "17"]], "cgan": [["--conditional"]],
    "ddpm": [["--image_size", "17"], ["--timesteps", "20"], ["--sample_steps", "31"],
             ["--schedule", "straight"], ["--sampler", "euler"], ["--variance", "medium"],
             ["--eta", "1.5"], ["--channels", "9"], ["--mults", "0"], ["--dropout", "1"]]}
each = pytest.mark.parametrize("script", SCRIPTS, ids=lambda m: m.__name__)


# ---- the files


@each
def test_copied_alone_it_imports_with_torch_only_and_does_nothing(script, tmp_path):
    shutil.copy(script.__file__, tmp_path)
    code = f"""
import os, runpy, sys
for name in ("numpy", "PIL", "torchvision", "scipy", "matplotlib", "data", "fid"):
    if name not in sys.modules: sys.modules[name] = None  # importing it fails
import {script.__name__} as script
assert os.listdir() == [script.__name__ + ".py"]
del sys.modules["data"]
sys.argv[1:] = ["--data", "toy-digits"]
runpy.run_path(script.__file__, run_name="__main__")
"""
    command = [sys.executable, "-B", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    said = done.stderr.splitlines()[-1]  # after torch's warning that numpy is missing
    assert re.fullmatch(r"error: No module named 'data': copy data.py .*", said)
    assert [p.name for p in tmp_path.iterdir()] == [f"{script.__name__}.py"]


@each
def test_every_constant_is_a_flag_that_is_explained_and_used(script):
    tree = ast.parse(open(script.__file__, encoding="utf-8").read())
    used = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    done = subprocess.run(**command(script.__name__, "--help"))
    assert done.returncode == 0 and done.stderr == ""
    for name, default in script.config().items():
        for flag in (f"--{name.lower()}", f"--{name.lower().replace('_', '-')}"):
            assert flag in done.stdout
        assert name in used, f"{name} is defined and never used"
    shown = re.sub(r"\s+", " ", done.stdout)
    for name, default in script.config().items():
        assert f"(default: {default})" in shown


@each
def test_flags_round_trip(script):
    assert script.parse_flags([]) == script.config()
    assert script.parse_flags(["--batch-size", "7"])["BATCH_SIZE"] == 7
    assert script.parse_flags(["--batch_size=7", "--lr", "1"])["LR"] == 1.0
    assert script.parse_flags(["--no-compile"])["COMPILE"] is False
    for name in script.FIXED | script.LOCAL:
        assert name in script.config(), f"{name} is listed but is no constant"


@pytest.mark.parametrize("name", ["config", "parse_flags", "fail", "save", "load"])
def test_shared_helpers_are_the_same_to_the_letter(name):
    assert len({inspect.getsource(getattr(script, name)) for script in SCRIPTS}) == 1


def test_no_line_is_longer_than_100_columns():
    for file in [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py")]:
        for number, line in enumerate(file.read_text("utf-8").splitlines(), 1):
            assert len(line) <= 100, f"{file.name}:{number}"


# ---- a run


@each
def test_a_run_writes_its_files_and_a_second_one_leaves_them(script, run, tmp_path):
    out = tmp_path / "a folder, ä"
    assert run(script, out, "--max_steps", 8, "--sample_every", 1) == 0
    for name in ("ckpt.pt", "log.csv", "loss.png", "samples.gif",
                 "samples/epoch_0001.png", "samples/epoch_0002.png"):
        assert (out / name).stat().st_size > 0
    assert [row[0] for row in log_rows(out)] == ["step", "1", "2", "4", "6", "8"]
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    with pytest.raises(ValueError, match="--resume"):
        run(script, out, "--max_steps", 8)
    assert before == {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}


@each
def test_resume_is_exact(script, run, tmp_path):
    run(script, tmp_path / "straight", "--max_steps", 14)
    run(script, tmp_path / "parts", "--max_steps", 5)  # in mid-epoch, in mid-interval of the log
    run(script, tmp_path / "parts", "--resume", "--max_steps", 11)
    run(script, tmp_path / "parts", "--resume", "--max_steps", 14)
    straight, parts = checkpoint(tmp_path / "straight"), checkpoint(tmp_path / "parts")
    assert straight["step"] == parts["step"] == 14
    assert same(straight, parts)
    assert log_rows(tmp_path / "straight") == log_rows(tmp_path / "parts")


@each
def test_resume_cuts_the_log_back_to_the_checkpoint(script, run, tmp_path):
    run(script, tmp_path, "--max_steps", 8)
    with open(tmp_path / "log.csv", "a", encoding="utf-8") as file:
        file.write("10,2" + ",0" * 6 + "\n12,2,0")  # as a run leaves it that dies after its save
    run(script, tmp_path, "--resume", "--max_steps", 10)
    assert [row[0] for row in log_rows(tmp_path)] == ["step", "1", "2", "4", "6", "8", "10"]


@each
def test_same_seed_same_run_and_pictures_do_not_change_it(script, run, tmp_path):
    run(script, tmp_path / "a", "--max_steps", 7, "--sample_every", 1)
    run(script, tmp_path / "b", "--max_steps", 7)
    run(script, tmp_path / "c", "--max_steps", 7, "--seed", 1)
    a, b, c = (checkpoint(tmp_path / name) for name in "abc")
    assert same(a, b)
    assert not same(a, c)
    assert not (tmp_path / "b" / "samples").exists()


@each
def test_epochs_are_totals(script, run, tmp_path):
    run(script, tmp_path, "--epochs", 1)
    assert checkpoint(tmp_path)["step"] == 6  # 48 images in batches of 8
    run(script, tmp_path, "--resume", "--epochs", 2)
    assert checkpoint(tmp_path)["step"] == 12 and checkpoint(tmp_path)["epoch"] == 2
    run(script, tmp_path, "--resume")  # nothing left to do
    assert checkpoint(tmp_path)["step"] == 12


@each
def test_a_flag_wins_over_the_checkpoint_but_may_not_change_the_run(script, run, tmp_path):
    run(script, tmp_path, "--max_steps", 2, "--lr", 1e-5)
    run(script, tmp_path, "--resume", "--max_steps", 3)
    assert checkpoint(tmp_path)["config"]["LR"] == 1e-5
    run(script, tmp_path, "--resume", "--max_steps", 4, "--lr", 1e-6)
    ckpt = checkpoint(tmp_path)
    optimizers = [part for name, part in ckpt.items() if name.startswith("opt")]
    assert optimizers and ckpt["config"]["LR"] == 1e-6
    assert {group["lr"] for part in optimizers for group in part["param_groups"]} == {1e-6}
    changes = {"--batch_size": 4, "--image_size": 32, "--data": "toy-faces", "--limit": 9}
    for flag, value in changes.items():
        with pytest.raises(ValueError, match=flag):
            run(script, tmp_path, "--resume", flag, value)
    run(script, tmp_path, "--resume", "--max_steps", 4, "--batch_size", 8)  # the same: no change


@each
def test_data_that_changed_is_noticed(script, run, tmp_path):
    rng = np.random.default_rng(0)
    np.save(tmp_path / "x.npy", rng.integers(0, 256, (24, 16, 16, 3), np.uint8))
    run(script, tmp_path / "out", "--max_steps", 2, data=tmp_path / "x.npy")
    np.save(tmp_path / "x.npy", rng.integers(0, 256, (32, 16, 16, 3), np.uint8))
    with pytest.raises(ValueError, match="trained on"):
        run(script, tmp_path / "out", "--resume", "--max_steps", 4)


# ---- what may go wrong


def test_kill_9_leaves_a_checkpoint_that_loads(images, tmp_path):
    flags = ["--data", images, "--epochs", 10**6, "--sample_every", 0]
    for attempt in range(2):
        outs = {script: tmp_path / script.__name__ for script in SCRIPTS}
        processes = {script: subprocess.Popen(**command(
            script.__name__, *flags, *TINY[script.__name__], "--out_dir", out,
            *["--resume"] * attempt)) for script, out in outs.items()}  # at once, to save time
        for script, process in processes.items():
            out, began, first, step = outs[script], time.time(), 18 * attempt, 0
            while step < first + 18:
                assert process.poll() is None and time.time() - began < 60, process.stderr.read()
                step = checkpoint(out)["step"] if (out / "ckpt.pt").exists() else 0
            process.kill()
            process.communicate()
            assert script.load(out / "ckpt.pt")["step"] >= step


@each
def test_a_save_that_dies_leaves_the_last_checkpoint(script, tmp_path, monkeypatch):
    script.save(tmp_path / "ckpt.pt", step=1)
    whole = torch.save

    def half(state, path):
        whole(state, path)
        os.truncate(path, os.path.getsize(path) // 2)
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(KeyboardInterrupt):
        script.save(tmp_path / "ckpt.pt", step=2)
    assert script.load(tmp_path / "ckpt.pt")["step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["ckpt.pt"]


@each
@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the size of files")
def test_a_full_disk_is_one_line_and_no_half_file(script, tmp_path):
    code = f"""
import resource, sys
sys.path.insert(0, {str(ROOT)!r})
import torch, {script.__name__} as script
script.save({str(tmp_path / "ckpt.pt")!r}, step=1)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try:
    script.save({str(tmp_path / "ckpt.pt")!r}, weights=torch.zeros(10**5))
except OSError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "is the disk full?" in done.stdout, done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["ckpt.pt"]
    assert script.load(tmp_path / "ckpt.pt")["step"] == 1


@each
@pytest.mark.skipif(sys.platform == "win32", reason="no POSIX signals")
def test_signals_finish_the_step_save_and_say_so(script, images, tmp_path):
    flags = ["--data", images, "--epochs", 10**6, "--sample_every", 0, *TINY[script.__name__]]
    statuses = {signal.SIGINT: 130, signal.SIGTERM: 143}
    processes = {number: subprocess.Popen(**command(  # at once, to save time
        script.__name__, *flags, "--out_dir", tmp_path / str(status)))
        for number, status in statuses.items()}
    for number, process in processes.items():
        process.stdout.readline()  # the line of step 1
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=60)
        assert process.returncode == statuses[number] and stderr == ""
        assert "once more ends it" in stdout and "--resume" in stdout
        step = script.load(tmp_path / str(statuses[number]) / "ckpt.pt")["step"]
        assert f"stopped at step {step}" in stdout


@each
def test_a_signal_during_the_last_save_counts(script, run, tmp_path, monkeypatch, capsys):
    save = script.save

    def interrupted(path, **state):
        save(path, **state)
        if state["step"] == 3:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(script, "save", interrupted)
    assert run(script, tmp_path, "--max_steps", 3) == 130
    assert "stopped at step 3" in capsys.readouterr().out


@each
@pytest.mark.parametrize("log_every", [2, 1000])  # seen at a line of the log, or else at a save
def test_divergence_keeps_the_last_checkpoint(script, log_every, run, tmp_path, monkeypatch):
    run(script, tmp_path, "--max_steps", 4)
    before = (tmp_path / "ckpt.pt").read_bytes()
    batches = data.batches

    def poisoned(*args, **options):
        yield from ((x * float("nan"), y) for x, y in batches(*args, **options))

    monkeypatch.setattr(data, "batches", poisoned)
    with pytest.raises(ValueError, match="not finite"):
        run(script, tmp_path, "--resume", "--epochs", 2, "--log_every", log_every)
    assert (tmp_path / "ckpt.pt").read_bytes() == before


@pytest.mark.parametrize("script, net, flags", [
    (SCRIPTS[0], "G", []), (SCRIPTS[2], "net", ["--optimizer", "adam"])], ids=["dcgan", "ddpm"])
def test_resume_may_change_how_weights_lie_in_memory(
        script, net, flags, run, tmp_path, monkeypatch):
    """As from a GPU to MPS. Adam's fused step goes through weights and moments as they lie."""
    run(script, tmp_path / "a", "--max_steps", 5, *flags)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    before = checkpoint(tmp_path / "a")[net]
    run(script, tmp_path / "a", "--resume", "--max_steps", 6)
    monkeypatch.setattr(data, "best_layout", lambda device: torch.contiguous_format)
    run(script, tmp_path / "b", "--resume", "--max_steps", 6)
    one, other = (checkpoint(tmp_path / out)[net] for out in "ab")
    way = sum((one[k] - before[k]).square().sum() for k in one if one[k].ndim == 4)
    error = sum((one[k] - other[k]).square().sum() for k in one if one[k].ndim == 4)
    assert 0 < error < 1e-3 * way  # not 0: sums are taken in another order


@each
@pytest.mark.parametrize("damage", ["a part is missing", "a weight is missing", "another shape"])
def test_a_checkpoint_that_does_not_fit_is_refused(script, damage, run, tmp_path):
    run(script, tmp_path, "--max_steps", 1)
    ckpt = checkpoint(tmp_path)
    part = {"ddpm": "net"}.get(script.__name__, "G")
    weight = next(k for k, v in ckpt[part].items() if v.ndim)
    if damage == "a part is missing":
        del ckpt[part]
    elif damage == "a weight is missing":
        del ckpt[part][weight]
    else:
        ckpt[part][weight] = torch.zeros(3, 2, 1)
    torch.save(ckpt, tmp_path / "ckpt.pt")
    for flags in (["--resume", "--max_steps", 2], ["--sample", 1]):
        with pytest.raises(ValueError, match="does not fit"):
            run(script, tmp_path, *flags)
    assert not (tmp_path / "generated").exists()


@each
def test_user_mistakes_are_one_line_with_status_2(script, images, tmp_path):
    """In one process each would take seconds: so the guard's code runs on a list of mistakes."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("text")
    (tmp_path / "bad.pt").write_bytes(b"no checkpoint")
    torch.save({"model": "Another", "config": {}}, tmp_path / "other.pt")
    np.save(tmp_path / "floats.npy", np.zeros((4, 16, 16, 3)))
    np.save(tmp_path / "none.npy", np.zeros((0, 16, 16, 3), np.uint8))
    mistakes = [
        ["--no_such_flag", "1"], ["--batch", "3"], ["--batch_size", "abc"], ["--batch_size", "0"],
        ["--epochs", "-1"], ["--lr", "nan"], ["--lr", "inf"], ["--log_every", "0"],
        ["--beta1", "1.5"], ["--device", "nonsense"], ["--dtype", "float17"],
        *EXTRA[script.__name__], ["--data", "nowhere"], ["--data", "empty"], ["--data", "file"],
        ["--data", "floats.npy"], ["--data", "none.npy"], ["--out_dir", "file"],
        ["--data", "toy-digits", "--data_dir", "file"], ["--checkpoint", "x.pt"],
        ["--resume"], ["--sample", "3"], ["--sample", "0"],
        ["--sample", "3", "--checkpoint", "bad.pt"], ["--sample", "3", "--checkpoint", "other.pt"],
    ]
    code = f"""
import json, runpy, sys
for flags in json.loads(sys.argv[1]):
    sys.argv = ["script", *flags]
    try:
        runpy.run_path({script.__file__!r}, run_name="__main__")
    except SystemExit as end:
        print("status", end.code, flush=True, file=sys.stderr)
"""
    tiny = ["--data", str(images), *TINY[script.__name__], "--out_dir", "out", "--max_steps", "1"]
    flags = [m if {"--resume", "--sample"} & set(m) else [*tiny, *m] for m in mistakes]
    before = sorted(tmp_path.rglob("*"))
    command = [sys.executable, "-c", code, json.dumps(flags)]
    done = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})
    lines = [line for line in done.stderr.splitlines() if not line.startswith("preparing ")]
    assert len(lines) == 2 * len(mistakes), done.stderr
    for mistake, message, status in zip(mistakes, lines[::2], lines[1::2]):
        assert message.startswith("error: ") and len(message) > 20, (mistake, message)
        assert status == "status 2", (mistake, message, status)
    assert [p for p in sorted(tmp_path.rglob("*")) if p not in before and p.name != "data"] == []


@each
def test_nothing_that_is_read_can_run_code(script, tmp_path):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    torch.save({"model": script.__doc__.split(":")[0], "config": Payload()}, tmp_path / "ckpt.pt")
    with pytest.raises(ValueError, match="no checkpoint"):
        script.load(tmp_path / "ckpt.pt")
    assert not (tmp_path / "owned").exists()
    for file in ROOT.glob("*.py"):
        for call in re.findall(r"torch\.load\(.*", file.read_text("utf-8")):
            assert "weights_only=True" in call, f"{file.name}: {call}"


# ---- samples


@each
def test_sample_i_depends_on_seed_and_i_alone(script, run, tmp_path, capsys):
    run(script, tmp_path, "--max_steps", 4)
    generated = tmp_path / "generated"
    run(script, tmp_path, "--sample", 19)
    (generated / "mine.txt").write_text("stays")
    many = {p.name: p.read_bytes() for p in generated.glob("*.png")}
    assert sorted(many) == [f"{i:06}.png" for i in range(19)]
    assert len(set(many.values())) == 19
    assert "removing" not in capsys.readouterr().err
    run(script, tmp_path, "--sample", 3)
    assert f"removing 19 images of an earlier --sample from {generated}" in capsys.readouterr().err
    few = {p.name: p.read_bytes() for p in generated.glob("*.png")}
    assert few == {name: many[name] for name in sorted(many)[:3]}
    assert (generated / "mine.txt").exists() and (tmp_path / "generated.png").exists()
    elsewhere = tmp_path / "elsewhere"
    run(script, elsewhere, "--sample", 3, "--checkpoint", tmp_path / "ckpt.pt", "--seed", 1)
    other = {p.name: p.read_bytes() for p in (elsewhere / "generated").glob("*.png")}
    assert sorted(other) == sorted(few) and not set(other.values()) & set(many.values())


@each
def test_a_run_without_matplotlib_says_so_once(script, run, tmp_path, monkeypatch, capsys):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it fails
    data.plots.cache_clear()
    try:
        assert run(script, tmp_path, "--epochs", 2, "--sample_every", 1) == 0
    finally:
        data.plots.cache_clear()
    assert capsys.readouterr().err.count("matplotlib is not installed") == 1
    assert (tmp_path / "samples" / "epoch_0002.png").exists()
    assert not (tmp_path / "loss.png").exists()


def test_readme_counts_lines_right():
    readme = (ROOT / "README.md").read_text("utf-8")
    rows = re.findall(r"^\| \[(\w+\.py)\]\(\w+\.py\) \| (\d+) \|", readme, re.M)
    assert {name for name, _ in rows} == {p.name for p in ROOT.glob("*.py")}
    for name, lines in rows:
        assert int(lines) == len((ROOT / name).read_text("utf-8").splitlines()), name


def test_readme_points_at_the_right_lines():
    """[`name`](file.py#L7): line 7 of file.py begins the function or class; D and G are classes."""
    readme = (ROOT / "README.md").read_text("utf-8")
    links = re.findall(r"\[`(\w+)`\]\((\w+\.py)#L(\d+)\)", readme)
    full = {"D": "Discriminator", "G": "Generator"}
    assert len(links) > 10
    for name, file, number in links:
        line = (ROOT / file).read_text("utf-8").splitlines()[int(number) - 1]
        assert re.match(rf"(def|class) {full.get(name, name)}\b", line), (name, file, number, line)
