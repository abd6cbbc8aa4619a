"""DCGAN: networks, losses, the training step against a plain one, EMA, collapse, learning."""
import numpy as np
import pytest
import torch
from conftest import checkpoint
from torch import nn

import data
import dcgan


@pytest.mark.parametrize("size", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("channels", [1, 3])
def test_shapes(size, channels):
    G, D = dcgan.Generator(size, channels, 10, 2), dcgan.Discriminator(size, channels, 2)
    images = G(torch.randn(3, 10))
    assert images.shape == (3, channels, size, size) and images.abs().max() <= 1
    assert D(images).shape == (3,)


def test_number_and_initial_values_of_weights():
    """With 64 pixels, as many as in PyTorch's DCGAN tutorial."""
    for net, count in ((dcgan.Generator(), 3_576_704), (dcgan.Discriminator(), 2_765_568)):
        assert sum(p.numel() for p in net.parameters()) == count
        for m in net.modules():
            if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d)):
                error = 5 * 0.02 / m.weight.numel() ** 0.5  # five standard errors
                assert abs(m.weight.mean()) < error and abs(m.weight.std() - 0.02) < error
            if isinstance(m, nn.BatchNorm2d):
                assert abs(m.weight.mean() - 1) < 0.02 and abs(m.weight.std() - 0.02) < 0.01
                assert not m.bias.any()
            if isinstance(m, nn.LeakyReLU):
                assert m.negative_slope == 0.2


def test_losses_are_binary_cross_entropy():
    real, fake = torch.randn(2, 50, dtype=torch.float64)
    bce = nn.BCELoss()
    ones, zeros = torch.ones_like(real), torch.zeros_like(fake)
    expected = bce(real.sigmoid(), ones) + bce(fake.sigmoid(), zeros)
    torch.testing.assert_close(dcgan.loss_d(real, fake), expected)
    torch.testing.assert_close(dcgan.loss_g(fake), bce(fake.sigmoid(), ones))
    assert dcgan.loss_d(torch.tensor([-1e4]), torch.tensor([1e4])) == 2e4  # no overflow


def test_training_and_ema_are_those_of_a_plain_loop(run, images, tmp_path):
    """Three steps by main() end where the textbook loop ends from the same start."""
    run(dcgan, tmp_path, "--max_steps", 3, "--lr", 1e-3, "--beta1", 0.75)
    torch.manual_seed(0)
    G, D = dcgan.Generator(16, 3, 8, 4), dcgan.Discriminator(16, 3, 4)
    opt_G = torch.optim.Adam(G.parameters(), 1e-3, (0.75, 0.999))
    opt_D = torch.optim.Adam(D.parameters(), 1e-3, (0.75, 0.999))
    bce, (faces, _) = nn.BCEWithLogitsLoss(), data.load(str(images), 16)
    get_batch = data.Batches(faces, None, 8, seed=0, flip=True)
    ema = {key: value.clone() for key, value in G.state_dict().items() if value.ndim}
    for step in range(3):
        x, _ = get_batch(step)
        torch.manual_seed(step)
        fake = G(torch.randn(8, 8))
        opt_D.zero_grad()
        (bce(D(x), torch.ones(8)) + bce(D(fake.detach()), torch.zeros(8))).backward()
        opt_D.step()
        opt_G.zero_grad()
        bce(D(fake), torch.ones(8)).backward()
        opt_G.step()
        decay = (1 + step) / (10 + step)
        for key in ema:  # the weights, and the statistics of BatchNorm
            ema[key] = decay * ema[key] + (1 - decay) * G.state_dict()[key]
    ckpt = checkpoint(tmp_path)
    for name, state in (("G", G.state_dict()), ("D", D.state_dict()), ("ema", ema)):
        for key, value in state.items():
            torch.testing.assert_close(ckpt[name][key], value, rtol=1e-4, atol=1e-5)


def test_collapse_is_noted(run, tmp_path, monkeypatch, capsys):
    def sure(self, x):  # white is real, all else is not
        return self.layers(x).flatten() * 0 + (x.mean((1, 2, 3)) - 0.9) * 1e3

    np.save(tmp_path / "white.npy", np.full((16, 16, 16, 3), 255, np.uint8))
    run(dcgan, tmp_path / "a", "--max_steps", 2, data=tmp_path / "white.npy")
    assert "D wins" not in capsys.readouterr().out
    monkeypatch.setattr(dcgan.Discriminator, "forward", sure)
    run(dcgan, tmp_path / "b", "--max_steps", 2, data=tmp_path / "white.npy")
    assert capsys.readouterr().out.count("D wins") == 2


def test_it_learns(run, tmp_path):
    """White digits on black: 300 steps bring the mean image of samples near to that of the data."""
    run(dcgan, tmp_path, "--max_steps", 300, "--width", 8, "--batch_size", 32, "--lr", 1e-3,
        "--limit", 1000, "--no-flip", data="toy-digits")
    run(dcgan, tmp_path, "--sample", 200)
    samples, _ = data.load(str(tmp_path / "generated"), 16, tmp_path)
    digits, _ = data.load("toy-digits", 16, limit=1000)
    error = (samples.float().mean(0) - digits.float().mean(0)).abs().mean() / 255
    assert error < 0.1  # before training: more than 0.3
