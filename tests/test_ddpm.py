"""DDPM: the U-Net, the mathematics of diffusion, the sampler, guidance, training, learning."""
import copy
import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from conftest import checkpoint, log_rows
from test_oracle import exact_eps
from torch import nn

import data
import ddpm


def randomised(net):
    """The network with random weights everywhere: those that start from zero hide mistakes."""
    generator = torch.Generator().manual_seed(0)
    for p in net.parameters():
        p.data = torch.randn(p.shape, generator=generator) / p[0].numel()**0.5
    return net


def test_number_and_initial_zeros_of_weights():
    """Ho et al., appendix B: 35.7 million for CIFAR10, with attention at 16 px only. Here also at 8
    and 4 px, after two blocks on the way down and three on the way up."""
    modules = ddpm.UNet((3, 32, 32), 128, (1, 2, 2, 2), 2, 16, groups=32), ddpm.Attention(256, 32)
    count, more = [sum(p.numel() for p in module.parameters()) for module in modules]
    assert count - 2 * 5 * more == 35_746_307
    net, x = ddpm.UNet((1, 28, 20), 16, (1, 2, 4), classes=2), torch.randn(2, 1, 28, 20)
    assert net(x, torch.tensor([1, 10])).equal(torch.zeros_like(x))
    block, x = net.middle[0], torch.randn(2, 64, 4, 4)
    assert block(x, torch.randn(2, 64)).equal(x)


@pytest.mark.parametrize("channels", [16, 32])
def test_the_network_sees_the_time(channels):
    """With one channel in a group, GroupNorm would remove what t adds to a channel."""
    net = randomised(ddpm.UNet((3, 8, 8), channels, (1,), 1, 0))
    early, late = net(torch.randn(1, 3, 8, 8).expand(2, -1, -1, -1), torch.tensor([2, 901]))
    assert (early - late).abs().mean() > 1e-3 * early.abs().mean()


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("stride", [1, 10])
def test_the_step_with_eta_1_follows_from_bayes_rule(schedule, stride):
    """q(x_s | x_t, x_0) at every t: precisions add up (eq. 6 and 7 where s = t - 1)."""
    a = ddpm.make_alpha_bar(schedule, 1000).tolist()
    x_0, x_t = torch.tensor([[0.4, -1, 0, 1], [1.3, 0.2, -2, 0]], dtype=torch.float64)
    for t in range(stride, 1001, stride):
        s = t - stride
        keep = a[t] / a[s]  # x_t = sqrt(keep) x_s + sqrt(1 - keep) eps
        expected, variance = x_0, 0.0
        if s > 0:
            variance = 1 / (1 / (1 - a[s]) + keep / (1 - keep))
            expected = (a[s]**0.5 / (1 - a[s]) * x_0 + keep**0.5 / (1 - keep) * x_t) * variance
        mean, var = ddpm.ddim_step(x_t, x_0, a[t], a[s], 1.0)
        assert (mean - expected).abs().max() < 1e-10 and abs(var - variance) < 1e-10


def draw(net, a, steps, eta, order):
    torch.manual_seed(0)
    *_, x = ddpm.sample(net, torch.randn(20_000, 1).double(), a, steps, eta, order)
    return x


@pytest.mark.parametrize("eta, order", [(1, 1), (0, 1), (0, 2), (1, 2), (0.3, 1), (0.3, 2)])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_gaussian_comes_out_of_every_sampler(schedule, eta, order):
    a = ddpm.make_alpha_bar(schedule, 1000)
    x = draw(exact_eps(a, 0.3), a, 1000, eta, order)
    assert [x.mean(), x.std()] == pytest.approx([0.3, 0.2], abs=0.006)


def test_guidance_1_is_the_conditional_prediction_and_0_the_unconditional_one():
    net = randomised(ddpm.UNet((1, 8, 8), 16, (1, 2), 1, 4, classes=3)).eval()
    x, t = torch.randn(1, 1, 8, 8).expand(3, -1, -1, -1), torch.tensor([51, 51, 51])
    y = torch.arange(3)
    conditional, unconditional = net(x, t, y), net(x, t)
    torch.testing.assert_close(net(x, t, y * 0 - 1), unconditional)  # label -1 is no label
    outputs = torch.cat([conditional, unconditional[:1]]).flatten(1)
    assert torch.pdist(outputs).min() > 0.1
    for guidance in (1.0, 0.0, 2.5):
        expected = unconditional + guidance * (conditional - unconditional)
        torch.testing.assert_close(ddpm.predict_eps(net, x, t, y, guidance), expected)


def test_a_step_trains_every_t_and_leaves_out_a_tenth_of_the_labels():
    class Recorder(nn.Module):
        w, seen = nn.Parameter(torch.zeros(())), []

        def forward(self, x, t, y=None):
            self.seen.append((x, t, y))
            return x * self.w

    torch.manual_seed(0)
    T, net, x_0, y = 7, Recorder(), torch.full((7000, 1, 2, 2), 0.5), torch.arange(7000) % 4
    a, opt = ddpm.make_alpha_bar("cosine", T), torch.optim.SGD([net.w], 0)
    for labels in (y, None):
        scales = torch.stack([a, 1 - a]).sqrt().float()
        ddpm.train_step(net, opt, x_0, labels, scales, nullcontext())
    (_, t, labels), (_, _, none) = net.seen
    assert t.bincount(minlength=T + 1).tolist() == pytest.approx([0] + [1000] * T, abs=150)
    left_out = labels == -1
    assert left_out.float().mean().item() == pytest.approx(0.1, abs=0.015) and none is None
    assert labels[~left_out].equal(y[~left_out])


def test_training_is_that_of_a_plain_loop(run, images, tmp_path):
    """Three steps by the script end where Algorithm 1, written plainly, ends."""
    run("ddpm", tmp_path, "--max_steps", 3, "--lr", 1e-2, "--seed", 3, "--ema", 0.15)
    torch.manual_seed(3)
    net = ddpm.UNet((3, 16, 16), 16, (1, 2), 1, 8).to(memory_format=torch.channels_last)
    opt, ema = torch.optim.Adam(net.parameters(), 0), copy.deepcopy(net.state_dict())
    a = torch.cat([torch.ones(1), (1 - torch.linspace(1e-4, 0.02, 30) * 1000 / 30).cumprod(0)])
    batches = data.Batches(data.load(str(images), 16)[0], None, 8, seed=3)
    losses, times = [], []
    for step in (1, 2, 3):
        x_0 = batches(step - 1)[0].to(memory_format=torch.channels_last)  # noise has its order
        torch.manual_seed(3 * 10**7 + step)
        t = torch.randint(1, 31, (8,))
        eps = torch.randn_like(x_0)
        a_t = a[t].view(8, 1, 1, 1)
        error = net(a_t**0.5 * x_0 + (1 - a_t)**0.5 * eps, t) - eps
        net.zero_grad()
        error.square().mean().backward()
        cosine = (1 + math.cos(math.pi * (step - 1) / 60)) / 2
        opt.param_groups[0]["lr"] = 1e-2 * step / 200 * cosine
        opt.step()
        decay = min(0.15, step / (step + 9))
        ema = {key: decay * ema[key] + (1 - decay) * p for key, p in net.state_dict().items()}
        losses += error.detach().square().mean((1, 2, 3)).tolist()
        times += t.tolist()
    ckpt = checkpoint(tmp_path)
    for key, value in net.state_dict().items():
        torch.testing.assert_close(ckpt["net"][key], value, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ckpt["ema"][key], ema[key], rtol=1e-4, atol=1e-5)
    # the rows of steps 2 and 3: means since the row before, of all t and of each quarter
    losses, quarter = np.array(losses), (np.array(times) - 1) * 4 // 30
    for row, part in zip(ckpt["rows"], (slice(0, 16), slice(16, 24)), strict=True):
        assert row["loss"] == pytest.approx(losses[part].mean(), rel=1e-4)
        for i in range(4):
            chosen = losses[part][quarter[part] == i]
            expected = pytest.approx(chosen.mean(), rel=1e-4) if len(chosen) else None
            assert row[f"loss_q{i + 1}"] == expected


def test_the_learning_rate_warms_up_and_decays_over_all_epochs(monkeypatch):
    monkeypatch.setattr(ddpm, "LR", 1e-3)
    rates = [ddpm.learning_rate(step, 400) for step in (1, 201, 301, 400)]
    assert rates == pytest.approx([5e-6, 5e-4, 1.464e-4, 0], rel=1e-3, abs=2e-8)


def test_a_quarter_of_t_without_images_is_an_empty_field(run, tmp_path):
    run("ddpm", tmp_path, "--max_steps", 1, "--batch_size", 2)
    _, row = log_rows(tmp_path)
    assert 2 <= row[3:].count("") <= 3
