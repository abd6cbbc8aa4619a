"""The GANs: networks, labels, the training step against a plain one."""
import copy

import pytest
import torch
from conftest import checkpoint
from torch import nn

import cgan
import data
import dcgan


@pytest.mark.parametrize("size", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("channels", [1, 3])
def test_shapes_of_dcgan(size, channels):
    G, D = dcgan.Generator(size, channels, 10, 2), dcgan.Discriminator(size, channels, 2)
    images = G(torch.randn(3, 10))
    assert images.shape == (3, channels, size, size) and images.abs().max() <= 1
    assert D(images).shape == (3,)


def test_number_and_initial_values_of_weights():
    """With 64 pixels, as many as in PyTorch's DCGAN tutorial."""
    for net, count in ((dcgan.Generator(), 3_576_704), (dcgan.Discriminator(), 2_765_568)):
        assert sum(p.numel() for p in net.parameters()) == count
        for name, p in net.named_parameters():
            mean, std = (0, 0) if "bias" in name else (float(p.ndim == 1), 0.02)
            error = 5 * std / p.numel() ** 0.5  # five standard errors
            assert abs(p.mean() - mean) <= error and abs(p.std() - std) <= error
        slopes = {m.negative_slope for m in net.modules() if isinstance(m, nn.LeakyReLU)}
        assert slopes <= {0.2}


@pytest.mark.parametrize("shape, classes", [((1, 28, 28), 10), ((3, 16, 16), 3), ((1, 9, 9), 0)])
def test_shapes_of_cgan_and_where_the_label_enters(shape, classes):
    G, D = cgan.Generator(shape, classes, 20, 8), cgan.Discriminator(shape, classes, 8)
    y = torch.tensor([2, 0, 1, 1]) if classes else None
    images = G(torch.randn(4, 20), y)
    assert images.shape == (4, *shape) and images.abs().max() <= 1
    assert D(images, y).shape == (4,)
    assert G.layers[0].in_features == 20 + classes
    assert D.layers[0].in_features == images[0].numel() + classes
    joined = cgan.join(images.flatten(1), y, classes)
    assert joined[:, :-classes or None].equal(images.flatten(1))
    assert classes != 3 or joined[:, -3:].tolist() == [[0, 0, 1], [1, 0, 0], [0, 1, 0], [0, 1, 0]]


def check_against_a_plain_loop(ckpt, G, D, batches, seed, lr, beta1, limit):
    """Three steps of Algorithm 1, written plainly from the same start, give it. limit: --ema"""
    opt_G, opt_D = [torch.optim.Adam(net.parameters(), lr, (beta1, 0.999)) for net in (G, D)]
    bce = nn.BCEWithLogitsLoss()
    ema, rows = copy.deepcopy(G.state_dict()), []
    for step in (1, 2, 3):
        x, y = batches(step - 1)
        y = [] if y is None else [y]
        ones, zeros = torch.ones(len(x)), torch.zeros(len(x))
        torch.manual_seed(seed * 10**7 + step)
        fake = G(torch.randn(len(x), 8), *y)
        real_logit, fake_logit = D(x, *y), D(fake.detach(), *y)
        opt_D.zero_grad()
        loss_D = bce(real_logit, ones) + bce(fake_logit, zeros)
        loss_D.backward()
        opt_D.step()
        opt_G.zero_grad()
        loss_G = bce(D(fake, *y), ones)
        loss_G.backward()
        opt_G.step()
        decay = min(limit, step / (step + 9))
        for key, value in G.state_dict().items():
            if value.is_floating_point():  # BatchNorm's statistics among them
                ema[key] = decay * ema[key] + (1 - decay) * value
        rows.append([loss_D, loss_G, real_logit.sigmoid().mean(), fake_logit.sigmoid().mean()])
    for name, state in dict(G=G.state_dict(), D=D.state_dict(), ema=ema).items():
        for key, value in state.items():
            torch.testing.assert_close(ckpt[name][key], value, rtol=1e-3, atol=5e-5)
    # the rows of steps 2 and 3: means since the row before
    for row, expected in zip(ckpt["rows"], (torch.tensor(rows[:2]).mean(0), rows[2]), strict=True):
        assert list(row.values())[3:] == pytest.approx([float(v) for v in expected], rel=1e-3)


def test_training_of_dcgan(run, images, tmp_path):
    run("dcgan", tmp_path, "--max_steps", 3, "--lr", 1e-3, "--beta1", 0.75, "--seed", 3,
        "--ema", 0.15)
    batches = data.Batches(data.load(str(images), 16)[0], None, 8, 3, flip=True)
    torch.manual_seed(3)
    G, D = dcgan.Generator(16, 3, 8, 4), dcgan.Discriminator(16, 3, 4)
    check_against_a_plain_loop(checkpoint(tmp_path), G, D, batches, 3, 1e-3, 0.75, 0.15)


def test_training_of_cgan(run, tmp_path):
    """Three steps by the script, in two parts."""
    run("cgan", tmp_path, "--conditional", "--batch_size", 16, "--width", 32, "--limit", 640,
        "--seed", 5, "--max_steps", 2, "--ema", 0.9, data="toy-digits")
    run("cgan", tmp_path, "--resume", "--max_steps", 3)
    batches = data.Batches(*data.load("toy-digits", 16, limit=640), 16, 5)
    torch.manual_seed(5)
    G, D = cgan.Generator((1, 16, 16), 10, 8, 32), cgan.Discriminator((1, 16, 16), 10, 32)
    check_against_a_plain_loop(checkpoint(tmp_path), G, D, batches, 5, 2e-4, 0.5, 0.9)
