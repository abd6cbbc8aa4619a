"""ddpm.py under torchrun, on the CPU: processes end with the same weights."""
import subprocess
import sys

import pytest
import torch
from conftest import ENVIRONMENT, ROOT, TINY, checkpoint, log_rows

import data
import ddpm

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs gloo")

DRIVER = f"""
import os, runpy, sys
sys.path.insert(0, {str(ROOT)!r})
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

register_optimizer_step_post_hook(lambda opt, *_: torch.save(
    opt.param_groups[0]["params"], f"process{{os.environ['RANK']}}"))  # the weights of each process
sys.argv[0] = {str(ROOT / "ddpm.py")!r}
runpy.run_path(sys.argv[0], run_name="__main__")
assert not torch.distributed.is_initialized()
"""


def torchrun(folder, *flags):
    """ddpm.py in two processes, into folder/out: its exit status and what it printed."""
    (folder / "driver.py").write_text(DRIVER)
    launch = "-m torch.distributed.run --standalone --nproc_per_node=2 driver.py".split()
    flags = ["--out_dir", folder / "out", "--log_every", 2, *flags]
    done = subprocess.run(
        [sys.executable, *launch, *map(str, flags)], cwd=folder, env=ENVIRONMENT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=100)
    return done.returncode, done.stdout


def test_processes_share_a_step_and_end_with_the_same_weights(run, images, tmp_path):
    out, (faces, _) = tmp_path / "out", data.load(str(images), 16)
    tiny = ["--data", images, *TINY["ddpm"], "--sample_every", 0]
    status, printed = torchrun(tmp_path, *tiny, "--max_steps", 1, "--epochs", 2, "--seed", 3)
    assert status == 0, printed

    # the first step is that of one process with both halves of the batch and of the noise
    torch.manual_seed(3)
    net = ddpm.UNet((3, 16, 16), 16, (1, 2), 1, 8).to(memory_format=torch.channels_last)
    a = ddpm.make_alpha_bar("linear", 30)
    scales = torch.stack([a, 1 - a]).sqrt().float()
    whole, noise = data.Batches(faces, None, 8, seed=3)(0)[0], []
    for rank in range(2):
        x_0 = whole[4 * rank:4 * rank + 4].to(memory_format=torch.channels_last)
        torch.manual_seed((3 * 10**7 + 1) * 2 + rank)
        t = torch.randint(1, 31, (4,))
        noise.append(torch.randn_like(x_0))
        predicted = net(ddpm.add_noise(x_0, t, noise[-1], scales), t)
        ((noise[-1] - predicted).square().mean() / 2).backward()
    assert not noise[0].equal(noise[1])
    moments = checkpoint(out)["opt"]["state"]
    for i, weight in enumerate(net.parameters()):
        torch.testing.assert_close(moments[i]["exp_avg"], weight.grad * 0.1, rtol=1e-4, atol=1e-6)

    # both go on from there, draw, and end alike; one process goes on from them
    flags = ["--max_steps", 7, "--sample_every", 1, "--flip"]
    status, printed = torchrun(tmp_path, "--resume", *flags)
    assert status == 0, printed
    weights = [torch.load(tmp_path / f"process{rank}") for rank in range(2)]
    saved = checkpoint(out)["net"].values()
    assert all(a.equal(b) and a.equal(c) for a, b, c in zip(*weights, saved, strict=True))
    assert [row[0] for row in log_rows(out)] == ["step", "1", "2", "4", "6", "7"]
    assert (out / "samples" / "epoch_0002.png").exists()
    run("ddpm", out, "--resume", "--max_steps", 9)
    assert checkpoint(out)["step"] == 9


def test_a_batch_that_cannot_be_shared_is_refused(images, tmp_path):
    flags = ["--data", images, "--image_size", 16, "--batch_size", 3]
    status, printed = torchrun(tmp_path, *flags)
    assert status != 0 and "error: " in printed and "multiple of 2" in printed
    assert not (tmp_path / "out").exists()
