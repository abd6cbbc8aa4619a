"""ddpm.py under torchrun, on the CPU: processes end with the same weights."""
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY, checkpoint, log_rows, pictures

import data
import ddpm

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs gloo")

DRIVER = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import torch, ddpm
torch.set_num_threads(1)
if "--resume" not in sys.argv and "--sample" not in sys.argv:  # each process reports its weights
    init = ddpm.UNet.__init__
    ddpm.UNet.__init__ = lambda self, *a, **k: (init(self, *a, **k), nets.append(self))[0]
nets = []
settings, ckpt = ddpm.parse_flags()
vars(ddpm).update(settings)
ddpm.main(settings, ckpt)
ddpm.distributed.barrier()
ddpm.distributed.destroy_process_group()
if nets:
    torch.save(nets[0].state_dict(), "net" + os.environ.get("RANK", "0"))
"""


@pytest.fixture
def torchrun(images, tmp_path):
    """torchrun(processes, out, *flags): what the command printed; its status must be 0."""
    (tmp_path / "driver.py").write_text(DRIVER)

    def torchrun(processes, out, *flags, status=0):
        flags = ["--out_dir", out, "--log_every", 2, "--sample_every", 0, *flags]
        if "--resume" not in flags and "--sample" not in flags:
            flags = ["--data", images, *TINY["ddpm"], *flags]
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        done = subprocess.run(
            [sys.executable, *launch, "driver.py", *[str(flag) for flag in flags]], cwd=tmp_path,
            text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=100,
            env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert (done.returncode == 0) == (status == 0), done.stdout
        return done.stdout

    return torchrun


def test_processes_end_with_the_same_weights_and_resume_in_another_number(run, torchrun, tmp_path):
    out = tmp_path / "out"
    torchrun(2, out, "--max_steps", 7, "--flip")
    nets = [torch.load(tmp_path / f"net{rank}", weights_only=True) for rank in range(2)]
    saved = checkpoint(out)["net"]
    for name, weight in saved.items():
        assert torch.equal(nets[0][name], weight) and torch.equal(nets[1][name], weight)
    assert [row[0] for row in log_rows(out)] == ["step", "1", "2", "4", "6"]
    run(ddpm, out, "--resume", "--max_steps", 9)
    assert checkpoint(out)["step"] == 9

    # --sample is shared: each image is written once, as by one process
    run(ddpm, out, "--sample", 21, "--sample_steps", 2)
    alone, grid = pictures(out / "generated"), (out / "generated.png").read_bytes()
    (out / "generated.png").unlink()
    torchrun(2, out, "--sample", 21, "--sample_steps", 2)
    assert pictures(out / "generated") == alone and len(alone) == 21
    assert (out / "generated.png").read_bytes() == grid


def test_gradients_are_averaged_over_all_processes(torchrun, tmp_path):
    """Two processes take the step of one that gets both halves of the batch and of the noise."""
    torchrun(2, tmp_path / "two", "--max_steps", 1, "--ema", 0, "--lr", 1)
    images, _ = data.load(checkpoint(tmp_path / "two")["config"]["DATA"], 16)
    torch.manual_seed(0)
    net = ddpm.UNet(3, 16, (1, 2), 1, (False, True), 4)
    a = ddpm.make_alpha_bar("linear", 30)
    scales = torch.stack([a.sqrt(), (1 - a).sqrt()]).float()
    for rank in range(2):
        x_0, _ = data.Batches(images[rank::2], None, 4)(0)
        torch.manual_seed(rank)
        t = torch.randint(1, 31, (4,))
        eps = torch.randn_like(x_0)
        predicted = net(ddpm.add_noise(x_0, t, eps, scales), t - 1)
        ((eps - predicted).square().mean() / 2).backward()
    moments = checkpoint(tmp_path / "two")["opt"]["state"]
    for i, weight in enumerate(net.parameters()):
        torch.testing.assert_close(moments[i]["exp_avg"], weight.grad * 0.1, rtol=1e-4, atol=1e-6)


def test_a_batch_that_cannot_be_shared_is_refused(torchrun, tmp_path):
    printed = torchrun(2, tmp_path / "out", "--batch_size", 3, status=1)
    assert "must be a multiple of 2" in printed
