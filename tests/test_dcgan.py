"""DCGAN: networks, losses, the training step against a plain one, EMA, collapse, learning."""
import re

import numpy as np
import pytest
import torch
from conftest import checkpoint
from PIL import Image
from test_fid import Mean
from torch import nn

import data
import dcgan
import fid


@pytest.mark.parametrize("size", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("channels", [1, 3])
def test_shapes(size, channels):
    G, D = dcgan.Generator(size, channels, 10, 2), dcgan.Discriminator(size, channels, 2)
    images = G(torch.randn(3, 10))
    assert images.shape == (3, channels, size, size) and images.abs().max() <= 1
    assert D(images).shape == (3,)


def test_layers_are_those_of_the_paper():
    G, D = dcgan.Generator(), dcgan.Discriminator()
    convolutions = [m for m in G.modules() if isinstance(m, nn.ConvTranspose2d)]
    assert [c.in_channels for c in convolutions] == [100, 512, 256, 128, 64]
    assert sum(isinstance(m, nn.BatchNorm2d) for m in G.modules()) == 4  # not at the output
    assert sum(isinstance(m, nn.ReLU) for m in G.modules()) == 4
    convolutions = [m for m in D.modules() if isinstance(m, nn.Conv2d)]
    assert [c.out_channels for c in convolutions] == [64, 128, 256, 512, 1]
    assert sum(isinstance(m, nn.BatchNorm2d) for m in D.modules()) == 3  # not at the input
    assert all(m.negative_slope == 0.2 for m in D.modules() if isinstance(m, nn.LeakyReLU))
    assert sum(p.numel() for p in G.parameters()) == 3_576_704
    assert sum(p.numel() for p in D.parameters()) == 2_765_568


def test_initial_weights():
    for net in (dcgan.Generator(), dcgan.Discriminator()):
        for m in net.modules():
            if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d)):
                error = 5 * 0.02 / m.weight.numel() ** 0.5  # five standard errors
                assert abs(m.weight.mean()) < error and abs(m.weight.std() - 0.02) < error
            if isinstance(m, nn.BatchNorm2d):
                assert abs(m.weight.mean() - 1) < 0.02 and abs(m.weight.std() - 0.02) < 0.01
                assert not m.bias.any()


def test_losses_are_binary_cross_entropy():
    real, fake = torch.randn(2, 50, dtype=torch.float64)
    bce = nn.BCELoss()
    ones, zeros = torch.ones_like(real), torch.zeros_like(fake)
    torch.testing.assert_close(dcgan.loss_d(real, fake),
                               bce(real.sigmoid(), ones) + bce(fake.sigmoid(), zeros))
    torch.testing.assert_close(dcgan.loss_g(fake), bce(fake.sigmoid(), ones))
    assert dcgan.loss_d(torch.tensor([-1e4]), torch.tensor([1e4])) == 2e4  # where BCELoss gives up


def test_training_is_that_of_a_plain_loop(run, images, tmp_path):
    """Three steps by main() end where the textbook loop ends from the same start."""
    run(dcgan, tmp_path, "--max_steps", 3, "--lr", 1e-3, "--beta1", 0.75, "--ema", 0)
    torch.manual_seed(0)
    G, D = dcgan.Generator(16, 3, 8, 4), dcgan.Discriminator(16, 3, 4)
    opt_G = torch.optim.Adam(G.parameters(), 1e-3, (0.75, 0.999))
    opt_D = torch.optim.Adam(D.parameters(), 1e-3, (0.75, 0.999))
    bce, (faces, _) = nn.BCEWithLogitsLoss(), data.load(str(images), 16)
    for step, (x, _) in zip(range(3), data.batches(faces, None, 8, 0, 0, flip=True)):
        torch.manual_seed(step)
        z = torch.randn(8, 8)
        opt_D.zero_grad()
        bce(D(x), torch.ones(8)).backward()
        bce(D(G(z).detach()), torch.zeros(8)).backward()
        opt_D.step()
        opt_G.zero_grad()
        with torch.no_grad():  # main() runs G once a step, so its running statistics move once
            buffers = {k: v.clone() for k, v in G.named_buffers()}
        bce(D(G(z)), torch.ones(8)).backward()
        for k, v in G.named_buffers():
            v.copy_(buffers[k])
        opt_G.step()
    ckpt = checkpoint(tmp_path)
    for net, name in ((G, "G"), (D, "D"), (G, "ema")):
        for key, value in net.state_dict().items():
            if value.is_floating_point():
                torch.testing.assert_close(ckpt[name][key], value, rtol=1e-4, atol=1e-5)


def test_ema_with_warm_up_averages_weights_and_statistics(run, tmp_path):
    before = None
    for step in range(1, 4):
        run(dcgan, tmp_path, "--max_steps", step, *["--resume"] * (step > 1))
        after = checkpoint(tmp_path)
        if before:
            decay = min(0.999, step / (9 + step))  # (1 + s) / (10 + s) at step s = step - 1
            for key, value in after["ema"].items():
                if value.is_floating_point():
                    expected = decay * before["ema"][key] + (1 - decay) * after["G"][key]
                    torch.testing.assert_close(value, expected)
        before = after
    assert (after["ema"]["layers.1.running_mean"] != after["G"]["layers.1.running_mean"]).any()


def test_grey_images_make_a_grey_generator(run, tmp_path):
    run(dcgan, tmp_path, "--max_steps", 2, "--limit", 30, "--data_dir", tmp_path, data="toy-digits")
    ckpt = checkpoint(tmp_path)
    assert ckpt["images"] == [30, 1, 16, 16] and not ckpt["config"]["FLIP"]  # its preset


def test_collapse_is_noticed(run, tmp_path, monkeypatch, capsys):
    def sure(self, x):  # white is real, all else is not
        return self.layers(x).flatten() * 0 + (x.mean((1, 2, 3)) - 0.9) * 1e3

    np.save(tmp_path / "white.npy", np.full((16, 16, 16, 3), 255, np.uint8))
    run(dcgan, tmp_path / "a", "--max_steps", 2, data=tmp_path / "white.npy")
    assert "D wins" not in capsys.readouterr().out
    monkeypatch.setattr(dcgan.Discriminator, "forward", sure)
    run(dcgan, tmp_path / "b", "--max_steps", 2, data=tmp_path / "white.npy")
    assert capsys.readouterr().out.count("D wins: see README") == 2


def test_pictures_show_both_distributions(run, tmp_path):
    run(dcgan, tmp_path, "--max_steps", 7, "--sample_every", 1)
    for name in ("prob/epoch_0001.png", "prob/epoch_0002.png", "samples/epoch_0002.png"):
        assert (tmp_path / name).exists()


def test_fid_at_the_end(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fid, "Inception", lambda: Mean())
    run(dcgan, tmp_path, "--max_steps", 2, "--fid", 20, "--data_dir", tmp_path)
    said = re.search(r"FID ([\d.]+) of 20 samples against 48 images", capsys.readouterr().out)
    run(dcgan, tmp_path, "--sample", 20)
    files = sorted((tmp_path / "generated").glob("*.png"))
    samples = np.stack([np.asarray(Image.open(f)) for f in files])
    cached = fid.load_statistics(next(tmp_path.glob("fid-*.npz")))
    distance = fid.frechet_distance(*fid.statistics(samples, Mean()), *cached)
    assert float(said[1]) == pytest.approx(distance, abs=1e-4)


def test_it_learns(run, tmp_path):
    """White digits on black: 400 steps bring the samples' mean image near to the data's."""
    run(dcgan, tmp_path, "--max_steps", 400, "--width", 8, "--batch_size", 32, "--lr", 1e-3,
        "--log_every", 100,
        "--data_dir", tmp_path, data="toy-digits")
    run(dcgan, tmp_path, "--sample", 200)
    samples, _ = data.load(str(tmp_path / "generated"), 16, tmp_path)
    digits, _ = data.load("toy-digits", 16, tmp_path)
    distance = (samples.float().mean(0) - digits.float().mean(0)).abs().mean() / 255
    untrained = dcgan.Generator(16, 1, 8, 8)(torch.randn(200, 8))
    start = (data.to_uint8(untrained).float().mean(0) - digits.float().mean(0)).abs().mean() / 255
    assert start > 0.3 and distance < 0.1, (start, distance)
