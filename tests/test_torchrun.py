"""ddpm.py under torchrun, on the CPU: the same run on any number of processes."""
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, TINY, checkpoint, log_rows, tensors
from test_ddpm import files

import ddpm

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs gloo and POSIX signals")

DRIVER = f"""
import os, pathlib, sys
sys.path.insert(0, {str(ROOT)!r})
import torch, data, ddpm
torch.set_num_threads(1)
UNet, batches = ddpm.UNet, data.batches

class Double(UNet):  # so that rounding plays no part
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.double()

if "--sample" not in sys.argv:
    ddpm.UNet = Double
    data.batches = lambda *a, **k: ((x.double(), y) for x, y in batches(*a, **k))
pathlib.Path(f"pid{{os.environ.get('RANK', 0)}}").write_text(str(os.getpid()))
vars(ddpm).update(ddpm.parse_flags())
sys.exit(ddpm.main())
"""


@pytest.fixture
def start(images, tmp_path):
    """start(processes, out, *flags): the command, running, in float64."""
    (tmp_path / "driver.py").write_text(DRIVER)
    started = []

    def start(processes, out, *flags):
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        flags = ["--out_dir", str(out), "--log_every", "2", "--sample_every", "0", *map(str, flags)]
        if not {"--resume", "--sample"} & set(flags):
            flags = ["--data", str(images), *TINY["ddpm"], *flags]
        command = [sys.executable, *launch * (processes > 1), "driver.py", *flags]
        process = subprocess.Popen(command, cwd=tmp_path, text=True, stdout=subprocess.PIPE,
                                   stderr=subprocess.STDOUT,
                                   env={**os.environ, "OMP_NUM_THREADS": "1"})
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()


@pytest.fixture
def torchrun(start):
    def torchrun(*args):
        process = start(*args)
        said, _ = process.communicate(timeout=100)
        assert process.returncode == 0, said
        return said

    return torchrun


def assert_equal(a, b):
    parts = ("net", "ema", "opt", "opt_muon", "sums")
    a, b = (tensors({part: checkpoint(out)[part] for part in parts}) for out in (a, b))
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-6, atol=1e-9)


def test_three_and_then_two_processes_end_with_the_weights_of_one(start, torchrun, tmp_path):
    """Batches of 8 go to three processes as 2, 3 and 3; two of them end what the three began."""
    one = start(1, tmp_path / "one", "--max_steps", 20, "--flip")  # beside the next, to save time
    torchrun(3, tmp_path / "more", "--max_steps", 13, "--flip")
    torchrun(2, tmp_path / "more", "--resume", "--max_steps", 20)
    said, _ = one.communicate(timeout=100)
    assert one.returncode == 0, said
    assert_equal(tmp_path / "one", tmp_path / "more")
    rows = log_rows(tmp_path / "one"), log_rows(tmp_path / "more")
    for a, b in zip(*rows, strict=True):
        assert a[:2] == b[:2]
        if a[0] != "step":
            values = [[float(v) for v in row[2:]] for row in (a, b)]
            assert values[0] == pytest.approx(values[1], rel=1e-4, nan_ok=True)


def test_samples_are_shared_out_and_each_is_written_once(run, torchrun, tmp_path):
    run(ddpm, tmp_path, "--max_steps", 2)
    run(ddpm, tmp_path, "--sample", 21, "--sample_steps", 2)
    alone, grid = files(tmp_path / "generated"), (tmp_path / "generated.png").read_bytes()
    (tmp_path / "generated.png").unlink()
    said = torchrun(3, tmp_path, "--sample", 21, "--sample_steps", 2)
    assert said.count("wrote 21") == 1
    assert files(tmp_path / "generated") == alone and len(alone) == 21
    assert (tmp_path / "generated.png").read_bytes() == grid
    (tmp_path / "generated" / "000009.png").unlink()
    torchrun(2, tmp_path, "--sample", 21, "--sample_steps", 2, "--resume")
    assert files(tmp_path / "generated") == alone


def wait_for_steps(process):
    for line in process.stdout:
        if "step 2/" in line:
            return
    raise AssertionError(process.wait())


def test_a_signal_to_one_process_stops_all(start, tmp_path):
    process = start(2, tmp_path / "out", "--epochs", 10**6)
    wait_for_steps(process)
    os.kill(int((tmp_path / "pid1").read_text()), signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    step = checkpoint(tmp_path / "out")["step"]
    assert f"stopped at step {step}" in said and "--resume" in said
    assert process.returncode != 0


def test_ctrl_c_at_torchrun_saves(start, tmp_path):
    process = start(2, tmp_path / "out", "--epochs", 10**6)
    wait_for_steps(process)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    step = checkpoint(tmp_path / "out")["step"]
    assert f"stopped at step {step}" in said


def test_a_process_that_dies_ends_the_run_and_the_checkpoint_is_whole(run, start, tmp_path):
    process, began = start(2, tmp_path / "out", "--epochs", 10**6), time.time()
    wait_for_steps(process)
    os.kill(int((tmp_path / "pid1").read_text()), signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode != 0 and time.time() - began < 60
    step = checkpoint(tmp_path / "out")["step"]
    run(ddpm, tmp_path / "out", "--resume", "--max_steps", step + 2)
    assert checkpoint(tmp_path / "out")["step"] == step + 2


def test_too_many_processes_for_a_batch_are_refused(start, tmp_path):
    process = start(2, tmp_path / "out", "--batch_size", 1)
    said, _ = process.communicate(timeout=60)
    assert process.returncode != 0 and "cannot share batches of 1" in said
