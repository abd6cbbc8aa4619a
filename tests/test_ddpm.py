"""DDPM: the U-Net, the mathematics of diffusion, the samplers, the training step, learning."""
import math
import re
import signal

import numpy as np
import pytest
import torch
from conftest import checkpoint, log_rows
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

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


@pytest.mark.parametrize("size, mults, attention", [(8, (1,), (True,)), (28, (1, 2, 4), (0, 0, 1)),
                                                    ((16, 24), (1, 1, 2, 2), (0, 1, 0, 0))])
@pytest.mark.parametrize("channels", [1, 3])
def test_shapes(size, mults, attention, channels):
    net = ddpm.UNet(channels, 8, mults, 2, attention, 2)
    x = torch.randn(2, channels, *(size if isinstance(size, tuple) else (size, size)))
    assert net(x, torch.tensor([0, 9])).shape == x.shape


def test_weights_are_as_many_as_in_the_paper():
    """Appendix B: 35.7 million for CIFAR10."""
    net = ddpm.UNet(3, 128, (1, 2, 2, 2), 2, (False, True, False, False), 32, 0.1)
    assert sum(p.numel() for p in net.parameters()) == 35_746_307


def test_it_starts_from_zero_and_a_residual_block_from_nothing():
    net = ddpm.UNet(3, 8, (1, 2), 1, (False, True), 2)
    assert not net(torch.randn(2, 3, 8, 8), torch.tensor([3, 4])).any()
    block, x = net.middle[0], torch.randn(2, 16, 4, 4)
    assert torch.equal(block(x, torch.randn(2, 32)), x)


@pytest.mark.parametrize("channels", [4, 8, 10, 12, 32, 64, 96, 128, 160])
def test_groups_keep_the_time(channels, run, tmp_path, images):
    """A time added to every channel is seen: no group is a single channel."""
    run(ddpm, tmp_path, "--max_steps", 1, "--channels", channels, "--mults", 1, "--batch_size", 2)
    groups = math.gcd(128, channels) // 4 or 1
    assert channels % groups == 0 and channels // groups >= 4
    assert groups == {32: 8, 128: 32}.get(channels, groups)  # the presets' and the paper's
    net = randomised(ddpm.UNet(3, channels, (1,), 1, (False,), groups).double())
    x = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    early, late = net(x, torch.tensor([1])), net(x, torch.tensor([900]))
    assert (early - late).abs().mean() > 1e-3 * early.abs().mean()
    erased = randomised(ddpm.UNet(3, channels, (1,), 1, (False,), channels).double())
    early, late = erased(x, torch.tensor([1])), erased(x, torch.tensor([900]))  # a channel a group
    assert (early - late).abs().mean() < 1e-9 * early.abs().mean()


def test_embedding_of_time():
    """sin and cos of t / 10000^(i / (half - 1)), as public weights expect it."""
    t = torch.tensor([0, 1, 7, 999])
    embedded = ddpm.embed_time(t, 8)
    for row, time in zip(embedded.tolist(), t.tolist()):
        angles = [time / 10000 ** (i / 3) for i in range(4)]
        expected = [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        assert row == pytest.approx(expected, abs=1e-4)


def test_upsampling_is_nearest_and_a_convolution():
    layer = ddpm.Upsample(6).double()
    x = torch.randn(2, 6, 5, 7, dtype=torch.float64)
    large = F.interpolate(x, scale_factor=2.0, mode="nearest")
    expected = F.conv2d(large, layer.weight, layer.bias, padding=1)
    torch.testing.assert_close(layer(x, None), expected)


def test_downsampling_pads_to_the_right_and_below():
    layer, x = ddpm.Downsample(4), torch.randn(2, 4, 6, 8)
    padded = torch.zeros(2, 4, 7, 9)
    padded[:, :, :6, :8] = x
    expected = F.conv2d(padded, layer.weight, layer.bias, stride=2)
    torch.testing.assert_close(layer(x, None), expected)


def test_attention_is_softmax_of_q_k_over_pixels():
    layer, x = randomised(ddpm.Attention(8, 2)), torch.randn(2, 8, 3, 5)
    h = layer.norm(x).reshape(2, 8, 15).transpose(1, 2)
    weights = layer.qkv.weight.split(8), layer.qkv.bias.split(8)
    q, k, v = (h @ w.T + b for w, b in zip(*weights))
    attended = ((q @ k.transpose(1, 2)) / 8**0.5).softmax(-1) @ v
    expected = x + layer.out(attended).transpose(1, 2).reshape(x.shape)
    torch.testing.assert_close(layer(x), expected)


def test_wrong_sizes_are_refused():
    net = ddpm.UNet(1, 8, (1, 2, 4), 1, (False,) * 3, 2)
    with pytest.raises(ValueError, match="multiples of 4"):
        net(torch.randn(1, 1, 28, 30), torch.tensor([1]))


# ---- the mathematics


def test_linear_schedule():
    """Ho et al., section 4: betas from 1e-4 to 0.02; other T keep the whole amount of noise."""
    a = ddpm.make_alpha_bar("linear", 1000)
    assert a.dtype == torch.float64 and a.shape == (1001,) and a[0] == 1
    beta = np.linspace(1e-4, 0.02, 1000)
    np.testing.assert_allclose(a[1:], np.cumprod(1 - beta), rtol=1e-12)
    for T in (21, 100, 4000):
        assert ddpm.make_alpha_bar("linear", T)[-1] < 1e-4  # x_T is noise
    for T in (1, 20):
        with pytest.raises(ValueError, match="21 or more"):
            ddpm.make_alpha_bar("linear", T)


@pytest.mark.parametrize("T", [10, 1000])
def test_cosine_schedule(T):
    """Nichol & Dhariwal 2021, eq. 17: betas clipped at 0.999."""
    def f(t):
        return math.cos((t / T + 0.008) / 1.008 * math.pi / 2) ** 2

    expected = [1.0]
    for t in range(1, T + 1):
        expected.append(expected[-1] * (1 - min(1 - f(t) / f(t - 1), 0.999)))
    np.testing.assert_allclose(ddpm.make_alpha_bar("cosine", T), expected, rtol=1e-9)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_moments_of_noisy_images(schedule):
    """q(x_t | x_0) is Gaussian with mean sqrt(alpha_bar) x_0 and variance 1 - alpha_bar (eq. 4)."""
    torch.manual_seed(0)
    a = ddpm.make_alpha_bar(schedule, 1000)
    for t in (1, 10, 300, 1000):
        x_0 = torch.full((40_000, 1, 1, 1), 0.7, dtype=torch.float64)
        x = ddpm.add_noise(x_0, torch.full((40_000,), t), torch.randn_like(x_0), a)
        mean, variance = a[t] ** 0.5 * 0.7, 1 - a[t]
        assert abs(x.mean() - mean) < 5 * (variance / 40_000) ** 0.5
        assert abs(x.var() / variance - 1) < 0.04


def test_noise_is_added_step_by_step():
    """x_t by eq. 4 has the distribution of t steps of eq. 2: same mean and variance, exactly."""
    a = ddpm.make_alpha_bar("linear", 1000)
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    mean, variance = 1.0, 0.0
    for t in range(1, 1001):
        mean, variance = (1 - beta[t - 1]) ** 0.5 * mean, (1 - beta[t - 1]) * variance + beta[t - 1]
        assert abs(mean - a[t] ** 0.5) < 1e-12 and abs(variance - (1 - a[t])) < 1e-12


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("stride", [1, 10])
def test_posterior_is_that_of_two_gaussians_at_every_t(schedule, stride):
    """q(x_s | x_t, x_0) from Bayes' rule: precisions add up (eq. 6 and 7 where s = t - 1)."""
    a = ddpm.make_alpha_bar(schedule, 1000).tolist()
    x_0, x_t = torch.tensor([[0.4, -1, 0, 1], [1.3, 0.2, -2, 0]], dtype=torch.float64)
    for t in range(stride, 1001, stride):
        s = t - stride
        keep = a[t] / a[s]  # x_t = sqrt(keep) x_s + sqrt(1 - keep) eps
        if s == 0:
            expected, variance = x_0, 0.0
        else:
            precision = 1 / (1 - a[s]) + keep / (1 - keep)
            variance = 1 / precision
            expected = (a[s]**0.5 / (1 - a[s]) * x_0 + keep**0.5 / (1 - keep) * x_t) * variance
        mean, var = ddpm.ddpm_step(x_t, x_0, a[t], a[s])
        assert (mean - expected).abs().max() < 1e-10 and abs(var - variance) < 1e-10


def test_ddim_with_eta_1_is_ddpm_at_every_t():
    a = ddpm.make_alpha_bar("linear", 1000).tolist()
    x_0, x_t = torch.randn(2, 50, dtype=torch.float64)
    for t in range(1, 1001):
        mean, var = ddpm.ddpm_step(x_t, x_0, a[t], a[t - 1])
        other_mean, other_var = ddpm.ddim_step(x_t, x_0, a[t], a[t - 1], 1.0)
        assert (mean - other_mean).abs().max() < 1e-10 and abs(var - other_var) < 1e-10


# ---- the samplers, with networks that are formulas


def gaussian(mean, std, a):
    """The exact eps of data from N(mean, std^2): E[eps | x_t]."""
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
    torch.manual_seed(1)  # another one than start()'s: noise must not repeat x_T
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
    a = ddpm.make_alpha_bar("cosine", 200)
    net, x, draws = gaussian(-0.2, 0.5, a), start(50), []

    def noise(x):
        draws.append(len(draws))
        return start(50, seed=len(draws))

    ancestral = ddpm.sample(net, x, a, 200, noise=noise)
    assert draws.pop() == 198  # every step but the last one draws
    draws.clear()
    torch.testing.assert_close(ddpm.sample(net, x, a, 200, "ddim", eta=1.0, noise=noise), ancestral)
    draws.clear()
    still = ddpm.sample(net, x, a, 200, "ddim", noise=noise)
    assert not draws and torch.equal(still, ddpm.sample(net, x, a, 200, "ddim"))


@pytest.mark.parametrize("T, steps", [(1000, 1000), (1000, 50), (1000, 7), (40, 33), (40, 1)])
def test_times_are_spaced_evenly_and_the_network_counts_from_0(T, steps):
    seen = []

    def net(x, t):
        assert (t == t[0]).all()
        seen.append(t[0].item() + 1)
        return x

    path = []
    ddpm.sample(net, start(2), ddpm.make_alpha_bar("linear", T), steps, path=path)
    assert seen == np.round(np.linspace(T, 0, steps + 1)).astype(int).tolist()[:-1]
    assert len(path) == steps + 1 and torch.equal(path[0], start(2))


def test_large_variance_keeps_the_mean_and_x_0_is_clipped():
    a, zeros = ddpm.make_alpha_bar("linear", 50), torch.zeros_like
    net = gaussian(0.9, 0.5, a)
    small, large = ([], [])
    ddpm.sample(net, start(9), a, 50, noise=zeros, path=small)
    x = ddpm.sample(net, start(9), a, 50, variance="large", noise=zeros, path=large)
    assert all(torch.equal(s, b) for s, b in zip(small, large))
    assert x.abs().max() <= 1
    ones, drawn = torch.ones_like, {}
    for variance in ("small", "large"):
        drawn[variance] = []
        ddpm.sample(lambda x, t: x * 0, start(1) * 0, a, 50, variance=variance, noise=ones,
                    path=drawn[variance])
    first = [drawn[v][1].item() for v in ("small", "large")]  # the deviation of the first step
    beta = (1 - a[50] / a[49]).item()
    assert first == pytest.approx([(beta * (1 - a[49]) / (1 - a[50])).item()**0.5, beta**0.5])


# ---- the optimizer


@pytest.mark.parametrize("shape", [(16, 16), (16, 40), (40, 16)])
def test_orthogonalize_leaves_directions_and_evens_out_singular_values(shape):
    torch.manual_seed(0)
    x = torch.randn(3, *shape, dtype=torch.float64) * torch.tensor([1e-3, 1, 1e3])[:, None, None]
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    s = torch.linspace(1, 0.01, 16).repeat(3, 1) * s[:, :1]  # a hundredth of the largest, at least
    y = ddpm.orthogonalize(u * s[:, None] @ v)
    turned = u.mT @ y @ v.mT
    values = turned.diagonal(dim1=1, dim2=2)
    assert torch.allclose(turned, values.diag_embed(), atol=1e-6)
    assert values.min() > 0.65 and values.max() < 1.25
    assert not ddpm.orthogonalize(torch.zeros(1, *shape)).any()


def test_orthogonalize_counts_in_whole_float32():
    """Errors in directions that a matrix hardly has grow; those of TF32, as on GPUs, too far."""
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "mm" in func.__name__:
                seen.append(torch.get_float32_matmul_precision())
            return func(*args, **(kwargs or {}))

    torch.manual_seed(0)
    x = torch.randn(1, 64, 4) @ torch.randn(1, 4, 96) + 1e-4 * torch.randn(1, 64, 96)
    seen, before = [], torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        with Watch():
            y = ddpm.orthogonalize(x)
        assert set(seen) == {"highest"}
        assert torch.get_float32_matmul_precision() == "high"  # as the caller has it
    finally:
        torch.set_float32_matmul_precision(before)
    exact = ddpm.orthogonalize(x.double())
    assert (y - exact).norm() < 0.01 * exact.norm()


def test_muon_is_torchs():
    """torch.optim.Muon takes matrices only, and counts in bfloat16."""
    torch.manual_seed(0)
    shapes = [(8, 24), (24, 8), (8, 24), (8, 4, 3, 3)]
    ours = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    ours[3].data = ours[3].data.to(memory_format=torch.channels_last)
    theirs = [nn.Parameter(w.detach().clone().flatten(1)) for w in ours]
    start = [w.detach().clone() for w in theirs]
    opts = [ddpm.Muon(ours, 0.02, momentum=0.9),
            torch.optim.Muon(theirs, 0.02, 0, 0.9, adjust_lr_fn="match_rms_adamw")]
    for _ in range(4):
        for a, b in zip(ours, theirs):
            b.grad = torch.randn_like(b)
            a.grad = b.grad.view_as(a).clone(memory_format=torch.preserve_format)
        for opt in opts:
            opt.step()
    for a, b, c in zip(ours, theirs, start):
        way, error = b - c, a.flatten(1) - b
        assert error.norm() < 0.02 * way.norm()
        assert way.square().mean()**0.5 > 0.2 * 0.02  # longer than one step of Adam's usual length


# ---- a run


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_training_is_that_of_a_plain_loop(run, images, tmp_path, optimizer):
    """Three steps by main() end where Algorithm 1, written plainly, ends from the same start."""
    run(ddpm, tmp_path, "--max_steps", 3, "--lr", 1e-3, "--beta1", 0.8, "--ema", 0,
        "--optimizer", optimizer)
    torch.manual_seed(0)
    net = ddpm.UNet(3, 8, (1, 2), 1, (False, True), 2)
    adam, muon = list(net.parameters()), []
    if optimizer == "muon":  # vectors are Adam's, all else Muon's
        adam, muon = ([p for p in adam if (p.dim() > 1) == matrix] for matrix in (False, True))
    opts = [torch.optim.Adam(adam, 1e-3, (0.8, 0.999))]
    opts += [ddpm.Muon(muon, 1e-3)] if muon else []
    a = torch.cat([torch.ones(1), (1 - torch.linspace(1e-4, 0.02, 30) * 1000 / 30).cumprod(0)])
    pictures, _ = data.load(str(images), 16)
    for step, (x_0, _) in zip(range(3), data.batches(pictures, None, 8, 0, 0)):
        torch.manual_seed(step)
        t = torch.randint(1, 31, (8,))
        eps = torch.randn_like(x_0)
        a_t = a[t].view(8, 1, 1, 1)
        net.zero_grad()
        loss = nn.MSELoss()(net(a_t**0.5 * x_0 + (1 - a_t)**0.5 * eps, t - 1), eps)
        loss.backward()
        for opt in opts:
            opt.step()
    ckpt = checkpoint(tmp_path)
    for name in ("net", "ema"):
        for key, value in net.state_dict().items():
            torch.testing.assert_close(ckpt[name][key], value, rtol=1e-4, atol=1e-5)


def test_every_t_is_trained_both_ends_included(run, tmp_path, monkeypatch):
    seen, forward = [], ddpm.UNet.forward

    def spy(self, x, t):
        seen.extend(t.tolist())
        return forward(self, x, t)

    monkeypatch.setattr(ddpm.UNet, "forward", spy)
    run(ddpm, tmp_path, "--max_steps", 60, "--timesteps", 21, "--log_every", 100)
    counts = np.bincount(seen, minlength=21)
    assert len(counts) == 21 and counts.min() > 5 and counts.max() < 60  # 480 / 21 = 23 each


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_images_lie_in_memory_as_the_dtype_likes_it_best(run, tmp_path, monkeypatch, dtype):
    """On the CPU: GroupNorm is slow in bfloat16 where channels come last, convolutions are not."""
    seen, forward = set(), nn.GroupNorm.forward

    def spy(self, x):
        seen.add(x.is_contiguous())
        return forward(self, x)

    monkeypatch.setattr(nn.GroupNorm, "forward", spy)
    run(ddpm, tmp_path, "--max_steps", 1, "--device", "cpu", "--dtype", dtype)
    run(ddpm, tmp_path, "--sample", 1, "--sample_steps", 1, "--device", "cpu", "--dtype", dtype)
    assert seen == {dtype == "bfloat16"}


def test_ema_with_warm_up(run, tmp_path):
    before = None
    for step in range(1, 5):
        run(ddpm, tmp_path, "--max_steps", step, *["--resume"] * (step > 1))
        after = checkpoint(tmp_path)
        if before:
            decay = min(0.999, step / (9 + step))  # (1 + s) / (10 + s) at step s = step - 1
            for key, value in after["ema"].items():
                expected = decay * before["ema"][key] + (1 - decay) * after["net"][key]
                torch.testing.assert_close(value, expected)
        before = after


def test_the_log_has_the_loss_by_quarter_of_t(run, tmp_path):
    run(ddpm, tmp_path, "--max_steps", 6, "--batch_size", 48, "--lr", 1e-9)
    header, *rows = log_rows(tmp_path)
    assert header[2:] == ["loss", "loss_q1", "loss_q2", "loss_q3", "loss_q4"]
    for row in rows[1:]:  # an untrained network predicts 0, so the loss is the noise's: 1
        assert [float(v) for v in row[2:]] == pytest.approx([1] * 5, abs=0.05)


def test_denoise_png_goes_from_noise_to_images(run, tmp_path):
    run(ddpm, tmp_path, "--max_steps", 2, "--sample_every", 1)
    width, height = Image.open(tmp_path / "denoise.png").size
    assert (width, height) == (11 * 18 + 2, 8 * 18 + 2)  # 2 pixels between images of 16


def test_a_signal_during_pictures_stops_before_the_next_step(run, tmp_path, monkeypatch):
    """On a CPU they may take a minute: no further step, and above all no further pictures."""
    save_grid, grids = data.save_grid, []

    def interrupted(images, path, *columns):
        save_grid(images, path, *columns)
        grids.append(path.name)
        if len(grids) == 1:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(data, "save_grid", interrupted)
    assert run(ddpm, tmp_path, "--epochs", 3, "--sample_every", 1) == 130
    assert grids == ["epoch_0001.png", "denoise.png"]
    assert checkpoint(tmp_path)["step"] == 6


def files(folder):
    return {f.name: f.read_bytes() for f in folder.glob("*.png")}


def test_a_sample_depends_on_seed_and_number_alone(run, tmp_path):
    run(ddpm, tmp_path, "--max_steps", 2)
    run(ddpm, tmp_path, "--sample", 11)
    eleven = files(tmp_path / "generated")
    assert sorted(eleven) == [f"{i:06}.png" for i in range(11)]
    run(ddpm, tmp_path, "--sample", 3)
    three = files(tmp_path / "generated")
    assert three == {name: eleven[name] for name in list(sorted(eleven))[:3]}
    run(ddpm, tmp_path, "--sample", 3, "--seed", 1)
    assert not set(files(tmp_path / "generated").values()) & set(three.values())


def test_a_stopped_sample_run_goes_on(run, tmp_path, monkeypatch):
    run(ddpm, tmp_path, "--max_steps", 2)
    how = ["--sample", 20, "--sample_steps", 4]
    run(ddpm, tmp_path, *how)
    whole, sampled, sample = files(tmp_path / "generated"), [], ddpm.sample

    def stopping(*args, **options):
        sampled.append(1)
        if len(sampled) == 2:
            raise KeyboardInterrupt
        return sample(*args, **options)

    monkeypatch.setattr(ddpm, "sample", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(ddpm, tmp_path, *how)
    assert len(files(tmp_path / "generated")) == 8  # what was made before the stop is there
    (tmp_path / "generated" / "000008.png.1.tmp").write_bytes(b"half")  # as kill -9 leaves one
    run(ddpm, tmp_path, *how, "--resume")
    assert len(sampled) == 4  # batches of 8: one, the stop, and the two that were missing
    assert files(tmp_path / "generated") == whole
    assert len(list((tmp_path / "generated").iterdir())) == 20
    with pytest.raises(ValueError, match="made otherwise"):
        run(ddpm, tmp_path, "--sample", 20, "--sample_steps", 5, "--resume")
    with pytest.raises(ValueError, match="made otherwise"):
        run(ddpm, tmp_path, *how, "--resume", "--dtype", "bfloat16")
    assert files(tmp_path / "generated") == whole
    run(ddpm, tmp_path, "--sample", 5, "--sample_steps", 4, "--resume")  # fewer: the first five
    assert files(tmp_path / "generated") == {f"{i:06}.png": whole[f"{i:06}.png"] for i in range(5)}
    run(ddpm, tmp_path / "other", "--max_steps", 2, "--lr", 1e-4)  # as many steps, another network
    with pytest.raises(ValueError, match="made otherwise"):
        run(ddpm, tmp_path, *how, "--resume", "--checkpoint", tmp_path / "other" / "ckpt.pt")


def test_flags_of_the_method_stay_with_a_checkpoint(run, tmp_path):
    run(ddpm, tmp_path, "--max_steps", 1)
    for flags in (["--timesteps", 40], ["--schedule", "cosine"], ["--channels", 16], ["--mults", 1],
                  ["--blocks", 2], ["--attention", 16]):
        with pytest.raises(ValueError, match=flags[0]):
            run(ddpm, tmp_path, "--sample", 3, *flags)


def test_presets_and_sizes(run, tmp_path, capsys):
    faces = ddpm.parse_flags(["--data", "celeba"])
    assert faces["IMAGE_SIZE"] == 64 and faces["FLIP"] and faces["CHANNELS"] == 64
    with pytest.raises(ValueError, match="multiple of 4"):
        run(ddpm, tmp_path, "--image_size", 18, "--mults", 1, 2, 4)
    run(ddpm, tmp_path, "--max_steps", 1, "--attention", 16, 8)
    said = capsys.readouterr().out
    assert "16x16 8 channels with attention, 8x8 16 channels with attention;" in said


def test_a_tensor_of_ones_own_decides_the_levels(run, tmp_path, monkeypatch, capsys):
    images = torch.zeros(16, 1, 32, 32, dtype=torch.uint8)
    monkeypatch.setattr(data, "load", lambda *_: (images, None))
    run(ddpm, tmp_path, "--attention", 16, "--max_steps", 1)  # with --image_size 16
    said = "32x32 8 channels, 16x16 16 channels with attention"
    assert said in capsys.readouterr().out


def test_fid_at_the_end(run, tmp_path, monkeypatch, capsys):
    from test_fid import Mean

    monkeypatch.setattr(fid, "Inception", lambda: Mean())
    run(ddpm, tmp_path, "--max_steps", 2, "--fid", 20, "--data_dir", tmp_path)
    said = re.search(r"FID ([\d.]+) of 20 samples against 48 images", capsys.readouterr().out)
    run(ddpm, tmp_path, "--sample", 20)
    samples = np.stack([np.asarray(Image.open(f)) for f in
                        sorted((tmp_path / "generated").glob("*.png"))])
    cached = fid.load_statistics(next(tmp_path.glob("fid-*.npz")))
    distance = fid.frechet_distance(*fid.statistics(samples, Mean()), *cached)
    assert float(said[1]) == pytest.approx(distance, abs=1e-4)


def test_it_learns(run, tmp_path):
    """300 steps on drawn digits: the loss, and the Fréchet distance between pixels."""
    run(ddpm, tmp_path, "--max_steps", 300, "--log_every", 100, "--channels", 16, "--lr", 3e-3,
        "--attention", 0, "--batch_size", 32, "--timesteps", 200, "--ema", 0.98,
        "--data_dir", tmp_path, data="toy-digits")
    assert float(log_rows(tmp_path)[-1][2]) < 0.07
    run(ddpm, tmp_path, "--sample", 128, "--sample_steps", 25, "--sampler", "ddim")
    samples, _ = data.load(str(tmp_path / "generated"), 16, tmp_path)
    digits, _ = data.load("toy-digits", 16, tmp_path)

    def gaussian(images):
        x = F.avg_pool2d(images.float() / 127.5 - 1, 2).flatten(1).double().numpy()
        return x.mean(0), np.cov(x, rowvar=False)

    noise = torch.randn(128, 1, 16, 16).clamp(-1, 1)
    goal = gaussian(digits)
    distance, worst = (fid.frechet_distance(*gaussian(x), *goal)
                       for x in (samples, data.to_uint8(noise)))
    assert worst > 40 and distance < 5, (distance, worst)  # real ones: 0.3
