"""ddpm.py under torchrun, on the CPU: processes end with the same weights."""
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY, checkpoint, log_rows

import data
import ddpm

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs gloo")

DRIVER = f"""
import os, runpy, sys
sys.path.insert(0, {str(ROOT)!r})
import torch, data
torch.set_num_threads(1)

# each process reports its weights and its share of the batches
optimizers, batches = [], []
init, get_batch = torch.optim.Adam.__init__, data.Batches.__call__
def keep(self, *args, **kwargs):
    init(self, *args, **kwargs)
    optimizers.append(self)
def spy(self, i):
    batches.append(get_batch(self, i))
    return batches[-1]
torch.optim.Adam.__init__, data.Batches.__call__ = keep, spy

sys.argv[0] = {str(ROOT / "ddpm.py")!r}
runpy.run_path(sys.argv[0], run_name="__main__")
assert not torch.distributed.is_initialized()
weights = [p.detach() for p in optimizers[0].param_groups[0]["params"]]
torch.save(dict(weights=weights, x=[x for x, _ in batches]), f"process{{os.environ['RANK']}}")
"""


@pytest.fixture
def torchrun(images, tmp_path):
    """torchrun(out, *flags): ddpm.py in two processes. Returns its exit status and what it printed."""
    (tmp_path / "driver.py").write_text(DRIVER)

    def torchrun(out, *flags):
        flags = ["--out_dir", out, "--log_every", 2, "--sample_every", 0, *flags]
        if "--resume" not in flags:
            flags = ["--data", images, *TINY["ddpm"], *flags]
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        done = subprocess.run(
            [sys.executable, *launch, "driver.py", *[str(flag) for flag in flags]], cwd=tmp_path,
            text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=100,
            env={**os.environ, "OMP_NUM_THREADS": "1"})
        return done.returncode, done.stdout

    return torchrun


def test_processes_share_a_step_and_end_with_the_same_weights(run, torchrun, images, tmp_path):
    out, (faces, _) = tmp_path / "out", data.load(str(images), 16)
    status, printed = torchrun(out, "--max_steps", 1, "--ema", 0, "--epochs", 2, "--seed", 3)
    assert status == 0, printed

    # the first step is that of one process with both halves of the batch and of the noise
    torch.manual_seed(3)
    net = ddpm.UNet((3, 16, 16), 16, (1, 2), 1, 8).to(memory_format=torch.channels_last)
    a = ddpm.make_alpha_bar("linear", 30)
    scales = torch.stack([a, 1 - a]).sqrt().float()
    whole, noise = data.Batches(faces, None, 8, seed=3)(0)[0], []
    for rank in range(2):
        x_0 = whole[4 * rank:4 * rank + 4].to(memory_format=torch.channels_last)
        assert torch.load(tmp_path / f"process{rank}")["x"][0].equal(x_0)
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
    status, printed = torchrun(out, "--resume", "--max_steps", 7, "--sample_every", 1, "--flip")
    assert status == 0, printed
    weights = [torch.load(tmp_path / f"process{rank}")["weights"] for rank in range(2)]
    saved = checkpoint(out)
    names = [name for name, _ in net.named_parameters()]
    for name, one, other in zip(names, *weights, strict=True):
        assert one.equal(other) and saved["net"][name].equal(one)
    assert [row[0] for row in log_rows(out)] == ["step", "1", "2", "4", "6", "7"]
    assert (out / "samples" / "epoch_0002.png").exists()
    run("ddpm", out, "--resume", "--max_steps", 9)
    assert checkpoint(out)["step"] == 9


def test_a_batch_that_cannot_be_shared_is_refused(torchrun, tmp_path):
    status, printed = torchrun(tmp_path / "out", "--batch_size", 3)
    assert status != 0 and "error: " in printed and "multiple of 2" in printed
    assert not (tmp_path / "out").exists()
