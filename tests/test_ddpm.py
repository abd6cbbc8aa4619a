"""DDPM: the U-Net, the mathematics of diffusion, samplers, guidance, training, learning."""
import math

import numpy as np
import pytest
import torch
from conftest import checkpoint, log_rows
from PIL import Image
from torch import nn
from torch.nn import functional as F

import data
import ddpm
import fid


def randomised(net, seed=0):
    """The network with random weights everywhere: those that start from zero hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        p.data = torch.randn(p.shape, generator=generator, dtype=p.dtype) / p[0].numel()**0.5
    return net


# ---- the U-Net


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size, mults", [((8, 8), (1,)), ((28, 28), (1, 2, 4)), ((16, 24), (2, 1))])
def test_shapes_and_initial_zeros(size, mults, channels):
    attention = [True, False, True][:len(mults)]
    net, x = ddpm.UNet(channels, 8, mults, 2, attention, 2), torch.randn(2, channels, *size)
    assert net(x, torch.tensor([0, 9])).equal(torch.zeros_like(x))
    block, x = net.middle[0], torch.randn(2, 8 * mults[-1], 4, 4)
    assert block(x, torch.randn(2, 32)).equal(x)


def test_weights_are_as_many_as_in_the_paper():
    """Appendix B: 35.7 million for CIFAR10."""
    net = ddpm.UNet(3, 128, (1, 2, 2, 2), 2, (False, True, False, False), 32, 0.1)
    assert sum(p.numel() for p in net.parameters()) == 35_746_307


@pytest.mark.parametrize("channels", [4, 8, 12, 32, 64])
def test_groups_keep_the_time_embedding(channels, run, tmp_path):
    run(ddpm, tmp_path, "--max_steps", 1, "--channels", channels, "--mults", 1)
    groups = checkpoint(tmp_path)["args"]["groups"]
    assert channels // groups >= 4 and groups <= 8
    net = randomised(ddpm.UNet(3, channels, (1,), 1, (False,), groups).double())
    x = torch.randn(1, 3, 8, 8, dtype=torch.float64).expand(2, -1, -1, -1)
    early, late = net(x, torch.tensor([1, 900]))
    assert (early - late).abs().mean() > 1e-3 * early.abs().mean()


def test_time_embedding():
    """sin and cos of t / 10000^(i / (half - 1))."""
    t = torch.tensor([0, 1, 7, 999])
    angles = t[:, None] / 10000 ** (torch.arange(4) / 3)
    expected = torch.cat([angles.sin(), angles.cos()], 1)
    torch.testing.assert_close(ddpm.embed_time(t, 8), expected, rtol=0, atol=1e-4)


def test_attention_is_softmax_of_q_k_over_pixels():
    layer, x = randomised(ddpm.Attention(8, 2, 1e-6)), torch.randn(2, 8, 3, 5)
    h = layer.norm(x).reshape(2, 8, 15).transpose(1, 2)
    weights = layer.qkv.weight.split(8), layer.qkv.bias.split(8)
    q, k, v = [h @ w.T + b for w, b in zip(*weights)]
    attended = ((q @ k.transpose(1, 2)) / 8**0.5).softmax(-1) @ v
    expected = x + layer.out(attended).transpose(1, 2).reshape(x.shape)
    torch.testing.assert_close(layer(x), expected)


# ---- the mathematics


def test_linear_schedule():
    """Ho et al., section 4: betas from 1e-4 to 0.02; other T keep the total amount of noise."""
    a = ddpm.make_alpha_bar("linear", 1000)
    assert a.dtype == torch.float64 and a.shape == (1001,) and a[0] == 1
    np.testing.assert_allclose(a[1:], np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)), rtol=1e-12)
    ends = [ddpm.make_alpha_bar("linear", T)[-1] for T in (21, 100, 4000)]
    assert max(ends) < 1e-4  # x_T is noise


@pytest.mark.parametrize("T", [10, 1000])
def test_cosine_schedule(T):
    """Nichol & Dhariwal 2021, eq. 17: betas clipped at 0.999."""
    f = np.cos((np.arange(T + 1) / T + 0.008) / 1.008 * np.pi / 2) ** 2
    expected = np.cumprod(1 - np.minimum(1 - f[1:] / f[:-1], 0.999))
    np.testing.assert_allclose(ddpm.make_alpha_bar("cosine", T), [1, *expected], rtol=1e-9)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_moments_of_noisy_images(schedule):
    """q(x_t | x_0) is Gaussian with mean sqrt(alpha_bar) x_0 and variance 1 - alpha_bar (eq. 4)."""
    torch.manual_seed(0)
    a = ddpm.make_alpha_bar(schedule, 1000)
    scales = torch.stack([a, 1 - a]).sqrt()
    for t in (1, 10, 300, 1000):
        x_0 = torch.full((40_000, 1, 1, 1), 0.7, dtype=torch.float64)
        x = ddpm.add_noise(x_0, torch.full((40_000,), t), torch.randn_like(x_0), scales)
        mean, variance = a[t]**0.5 * 0.7, 1 - a[t]
        assert abs(x.mean() - mean) < 5 * (variance / 40_000) ** 0.5
        assert abs(x.var() / variance - 1) < 0.04


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("stride", [1, 10])
def test_ddpm_and_ddim_with_eta_1_follow_from_bayes_rule(schedule, stride):
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
        for step, eta in ((ddpm.ddpm_step, ()), (ddpm.ddim_step, (1.0,))):
            mean, var = step(x_t, x_0, a[t], a[s], *eta)
            assert (mean - expected).abs().max() < 1e-10 and abs(var - variance) < 1e-10


# ---- the samplers, with networks that are formulas


def gaussian(mean, std, a):
    """The exact eps for data from N(mean, std^2): E[eps | x_t]."""
    def net(x, t):
        a_t = a[t + 1].view(-1, 1, 1, 1)
        variance = a_t * std**2 + 1 - a_t
        return (1 - a_t)**0.5 * (x - a_t**0.5 * mean) / variance

    return net


def start(count=20_000, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 1, 1, 1, dtype=torch.float64, generator=generator)


WAYS = [dict(), dict(variance="large"), dict(sampler="ddim"), dict(sampler="ddim", eta=1.0),
        dict(sampler="ddim", eta=0.3)]


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_gaussian_comes_out_of_every_sampler(way, schedule):
    torch.manual_seed(1)  # another one than start()'s, for noise must not repeat x_T
    a = ddpm.make_alpha_bar(schedule, 1000)
    x = ddpm.sample(gaussian(0.3, 0.2, a), start(), a, 1000, **way)
    assert x.mean() == pytest.approx(0.3, abs=0.006)
    assert x.std() == pytest.approx(0.2, abs=0.006)


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("steps", [1, 7, 100])
def test_an_oracle_recovers_the_image(way, steps):
    a, goal = ddpm.make_alpha_bar("linear", 100), torch.rand(4, 1, 3, 3).double() * 2 - 1

    def oracle(x, t):
        a_t = a[t + 1].view(-1, 1, 1, 1)
        return (x - a_t**0.5 * goal) / (1 - a_t)**0.5

    x = ddpm.sample(oracle, torch.randn(4, 1, 3, 3).double(), a, steps, **way)
    torch.testing.assert_close(x, goal)


def test_eta_1_at_all_steps_is_ancestral_sampling_and_eta_0_draws_nothing():
    a, ends, counts = ddpm.make_alpha_bar("cosine", 200), [], []
    for way in (dict(), dict(sampler="ddim", eta=1.0), dict(sampler="ddim")):
        noises = [start(50, seed) for seed in range(1, 201)]
        ends.append(ddpm.sample(gaussian(-0.2, 0.5, a), start(50), a, 200, **way,
                                noise=lambda x: noises.pop()))
        counts.append(200 - len(noises))
    torch.testing.assert_close(ends[1], ends[0])
    assert counts == [199, 199, 0]  # the last step draws nothing


@pytest.mark.parametrize("T, steps", [(1000, 1000), (1000, 50), (1000, 7), (40, 33), (40, 1)])
def test_times_are_spaced_evenly_and_the_network_counts_from_0(T, steps):
    seen, path = [], []

    def net(x, t):
        seen.append(t[0].item() + 1)
        return x

    ddpm.sample(net, start(2), ddpm.make_alpha_bar("linear", T), steps, path=path)
    assert seen == np.round(np.linspace(T, 0, steps + 1)).astype(int).tolist()[:-1]
    assert len(path) == steps + 1 and torch.equal(path[0], start(2))


@pytest.mark.parametrize("variance", ["small", "large"])
def test_large_variance_is_beta_and_x_0_is_clipped(variance):
    a, path = ddpm.make_alpha_bar("linear", 50), []
    ddpm.sample(lambda x, t: x * 0, start(1) * 0, a, 50, variance=variance, noise=torch.ones_like,
                path=path)
    beta = (1 - a[50] / a[49]).item()
    expected = beta if variance == "large" else beta * ((1 - a[49]) / (1 - a[50])).item()
    assert path[1].item() == pytest.approx(expected**0.5)  # of the first step, whose mean is 0
    x = ddpm.sample(gaussian(0.9, 0.5, a), start(9), a, 50, "ddim")
    assert x.abs().max() <= 1


# ---- labels and guidance


def test_guidance_1_is_the_conditional_prediction_and_0_the_unconditional_one():
    net = randomised(ddpm.UNet(1, 8, (1, 2), 1, (False, True), 2, classes=3)).eval()
    x, t = torch.randn(4, 1, 8, 8), torch.tensor([0, 3, 50, 999])
    y, none = torch.tensor([0, 1, 2, 0]), torch.full((4,), 3)
    conditional, unconditional = net(x, t, y), net(x, t, none)
    assert (conditional - unconditional).abs().max() > 0.01
    sizes = []
    net.register_forward_hook(lambda net, inputs, output: sizes.append(len(output)))
    for guidance in (1.0, 0.0, 2.5):
        expected = unconditional + guidance * (conditional - unconditional)
        torch.testing.assert_close(ddpm.guide(net, y, guidance)(x, t), expected)
    assert sizes == [4, 8, 8]  # both predictions at once, and with guidance 1 only one


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_mixture_comes_out_in_the_class_asked_for(guidance):
    """Class 0 is N(-0.5, 0.1^2), class 1 N(0.5, 0.1^2); the exact eps of both and the mixture."""
    a = ddpm.make_alpha_bar("linear", 200)

    def net(x, t, y):
        a_t, y = a[t + 1].view(-1, 1, 1, 1), y.view(-1, 1, 1, 1)
        eps_0, eps_1 = gaussian(-0.5, 0.1, a)(x, t), gaussian(0.5, 0.1, a)(x, t)
        log_odds = 2 * 0.5 * a_t**0.5 * x / (a_t * 0.01 + 1 - a_t)  # of class 1, given x_t
        mixture = torch.lerp(eps_0, eps_1, log_odds.sigmoid())
        return torch.where(y == 0, eps_0, torch.where(y == 1, eps_1, mixture))

    net.args = dict(classes=2)
    torch.manual_seed(1)
    y = torch.arange(2000) % 2
    x = ddpm.sample(ddpm.guide(net, y, guidance), start(2000), a, 200).flatten()
    assert ((x > 0) == (y == 1)).all()
    if guidance == 1:
        assert x[y == 1].mean() == pytest.approx(0.5, abs=0.02)


def test_every_t_is_trained_and_a_tenth_of_the_labels_left_out(run, tmp_path, monkeypatch):
    times, labels, forward = [], [], ddpm.UNet.forward

    def spy(self, x, t, y):
        times.extend(t.tolist())
        labels.extend(y.tolist())
        return forward(self, x, t, y)

    monkeypatch.setattr(ddpm.UNet, "forward", spy)
    run(ddpm, tmp_path, "--conditional", "--max_steps", 60, "--batch_size", 32, "--limit", 320,
        "--timesteps", 21, data="toy-digits")
    counts = np.bincount(times, minlength=21)
    assert len(counts) == 21 and counts.min() > 45 and counts.max() < 140  # 1920 / 21 = 91 each
    shares = np.bincount(labels, minlength=11) / len(labels)
    assert shares == pytest.approx([0.09] * 10 + [0.1], abs=0.03)


def test_labels_on_demand(run, tmp_path, monkeypatch):
    run(ddpm, tmp_path, "--conditional", "--max_steps", 2, "--limit", 40, "--sample_every", 1,
        data="toy-digits")
    assert Image.open(tmp_path / "samples" / "epoch_0001.png").size == (10 * 18 + 2, 10 * 18 + 2)
    seen, guide = [], ddpm.guide

    def spy(net, y, guidance):
        seen.append((y.tolist(), guidance))
        return guide(net, y, guidance)

    monkeypatch.setattr(ddpm, "guide", spy)
    run(ddpm, tmp_path, "--sample", 10, "--sample_steps", 2)
    run(ddpm, tmp_path, "--sample", 10, "--sample_steps", 2, "--label", "2,0,2", "--guidance", 3)
    batch = [i % 10 for i in range(16)]
    assert seen[0] == (batch[:8], 1.0) and seen[1] == (batch[8:], 1.0)
    assert seen[2] == ([2, 0, 2, 2, 0, 2, 2, 0], 3.0) and seen[3][0] == [2, 2, 0, 2, 2, 0, 2, 2]
    with pytest.raises(SystemExit, match="10 classes"):
        run(ddpm, tmp_path, "--sample", 10, "--label", "10")


# ---- a run


def test_training_is_that_of_a_plain_loop(run, images, tmp_path):
    """Three steps by main() end where Algorithm 1, written plainly, ends from the same start."""
    run(ddpm, tmp_path, "--max_steps", 3, "--lr", 1e-2, "--beta1", 0.8, "--ema", 0)
    torch.manual_seed(0)
    net = ddpm.UNet(3, 16, (1, 2), 1, (False, True), 4)
    opt = torch.optim.Adam(net.parameters(), 0, (0.8, 0.999))
    a = torch.cat([torch.ones(1), (1 - torch.linspace(1e-4, 0.02, 30) * 1000 / 30).cumprod(0)])
    get_batch = data.Batches(data.load(str(images), 16)[0], None, 8)
    for step in range(3):
        x_0, _ = get_batch(step)
        torch.manual_seed(step)
        t = torch.randint(1, 31, (8,))
        eps = torch.randn_like(x_0)
        a_t = a[t].view(8, 1, 1, 1)
        loss = nn.MSELoss()(net(a_t**0.5 * x_0 + (1 - a_t)**0.5 * eps, t - 1), eps)
        net.zero_grad()
        loss.backward()
        cosine = (1 + math.cos(math.pi * step / 60)) / 2
        opt.param_groups[0]["lr"] = 1e-2 * (step + 1) / 200 * cosine
        opt.step()
    ckpt = checkpoint(tmp_path)
    for name in ("net", "ema"):
        for key, value in net.state_dict().items():
            torch.testing.assert_close(ckpt[name][key], value, rtol=1e-4, atol=1e-5)


def test_the_learning_rate_warms_up_and_decays_over_all_epochs(run, tmp_path, monkeypatch):
    rates, step = [], torch.optim.Adam.step

    def spy(self):
        rates.append(self.param_groups[0]["lr"])
        return step(self)

    monkeypatch.setattr(torch.optim.Adam, "step", spy)
    run(ddpm, tmp_path, "--epochs", 50, "--max_steps", 250, "--channels", 4, "--mults", 1)
    run(ddpm, tmp_path, "--resume")
    expected = [1e-3 * min(1, (i + 1) / 200) * (1 + math.cos(math.pi * i / 300)) / 2
                for i in range(300)]  # 48 images in batches of 8: 6 steps an epoch
    assert rates == pytest.approx(expected)


def test_ema_warms_up(run, tmp_path):
    run(ddpm, tmp_path, "--max_steps", 1, "--lr", 1)  # in warm-up: 0.005 and more
    for step in (1, 2, 3):
        before = checkpoint(tmp_path)
        run(ddpm, tmp_path, "--resume", "--max_steps", step + 1)
        after = checkpoint(tmp_path)
        decay = min(0.999, (1 + step) / (10 + step))
        for key, value in after["ema"].items():
            expected = decay * before["ema"][key] + (1 - decay) * after["net"][key]
            torch.testing.assert_close(value, expected)


def test_the_log_has_the_loss_by_quarter_of_t(run, tmp_path):
    run(ddpm, tmp_path, "--max_steps", 6, "--batch_size", 48, "--lr", 1e-9)
    header, *rows = log_rows(tmp_path)
    assert header[2:] == ["loss", "loss_q1", "loss_q2", "loss_q3", "loss_q4"]
    for row in rows:  # an untrained network predicts 0, so the loss is the variance of noise: 1
        assert [float(value) for value in row[2:]] == pytest.approx([1] * 5, abs=0.1)


def test_what_a_checkpoint_decides_cannot_be_changed(run, tmp_path, capsys):
    run(ddpm, tmp_path, "--max_steps", 1)
    for flags in ("--timesteps 40", "--schedule cosine", "--channels 32", "--mults 1",
                  "--blocks 2", "--attention 16", "--conditional"):
        with pytest.raises(SystemExit):
            run(ddpm, tmp_path, "--sample", 3, *flags.split())
        assert "cannot be changed" in capsys.readouterr().err
    for flags in ("--label 1", "--guidance 2"):
        with pytest.raises(SystemExit, match="0 classes"):
            run(ddpm, tmp_path, "--sample", 3, *flags.split())


def test_the_preset_of_a_data_set():
    faces, _ = ddpm.parse_flags(["--data", "celeba"])
    assert faces["IMAGE_SIZE"] == 64 and faces["FLIP"] and faces["MULTS"] == (1, 2, 3, 4)
    assert ddpm.parse_flags(["--data", "celeba", "--image_size", "32"])[0]["IMAGE_SIZE"] == 32


def test_it_learns(run, tmp_path):
    """300 steps on drawn digits: the loss, and the Fréchet distance between pixels."""
    run(ddpm, tmp_path, "--max_steps", 300, "--epochs", 10, "--log_every", 100, "--channels", 16,
        "--lr", 3e-3, "--attention", 0, "--batch_size", 32, "--timesteps", 200, "--ema", 0.98,
        "--limit", 1000, data="toy-digits")
    assert float(log_rows(tmp_path)[-1][2]) < 0.07
    run(ddpm, tmp_path, "--sample", 128, "--sample_steps", 25, "--sampler", "ddim")
    statistics = []
    for source in (str(tmp_path / "generated"), "toy-digits"):
        images, _ = data.load(source, 16, tmp_path, limit=1000)
        x = F.avg_pool2d(images.float() / 127.5 - 1, 2).flatten(1).double().numpy()
        statistics += [x.mean(0), np.cov(x, rowvar=False)]
    assert fid.frechet_distance(*statistics) < 5  # of noise: more than 40
