"""CGAN: labels in both networks, labels on demand, the training step against a plain one."""
import numpy as np
import pytest
import torch
from conftest import checkpoint
from PIL import Image
from torch import nn

import cgan
import data


@pytest.mark.parametrize("shape, classes", [((1, 28, 28), 10), ((3, 16, 16), 3), ((1, 9, 9), 0)])
def test_shapes_and_where_the_label_enters(shape, classes):
    G, D = cgan.Generator(shape, classes, 20, 8), cgan.Discriminator(shape, classes, 8)
    y = torch.randint(0, max(classes, 1), (4,))
    images = G(torch.randn(4, 20), y)
    assert images.shape == (4, *shape) and images.abs().max() <= 1
    assert D(images, y).shape == (4,)
    assert G.layers[0].in_features == 20 + classes
    assert D.layers[0].in_features == images[0].numel() + classes


def test_labels_are_joined_one_hot():
    x = torch.randn(3, 5)
    joined = cgan.join(x, torch.tensor([2, 0, 1]), 4)
    assert joined[:, :5].equal(x)
    assert joined[:, 5:].tolist() == [[0, 0, 1, 0], [1, 0, 0, 0], [0, 1, 0, 0]]
    assert cgan.join(x, None, 0) is x  # the vanilla GAN


def test_training_is_that_of_a_plain_loop(run, tmp_path):
    """Three steps by main(), in two parts, end where the textbook loop ends."""
    run(cgan, tmp_path, "--conditional", "--image_size", 28, "--batch_size", 16, "--width", 32,
        "--limit", 640, "--ema", 0, "--max_steps", 2, data="toy-digits")
    run(cgan, tmp_path, "--resume", "--max_steps", 3)
    torch.manual_seed(0)
    G, D = cgan.Generator((1, 28, 28), 10, 8, 32), cgan.Discriminator((1, 28, 28), 10, 32)
    opt_G = torch.optim.Adam(G.parameters(), 2e-4, (0.5, 0.999))
    opt_D = torch.optim.Adam(D.parameters(), 2e-4, (0.5, 0.999))
    bce, (images, labels) = nn.BCEWithLogitsLoss(), data.load("toy-digits", 28, limit=640)
    get_batch = data.Batches(images, labels, 16)
    for step in range(3):
        x, y = get_batch(step)
        torch.manual_seed(step)
        fake = G(torch.randn(16, 8), y)
        opt_D.zero_grad()
        (bce(D(x, y), torch.ones(16)) + bce(D(fake.detach(), y), torch.zeros(16))).backward()
        opt_D.step()
        opt_G.zero_grad()
        bce(D(fake, y), torch.ones(16)).backward()
        opt_G.step()
    ckpt = checkpoint(tmp_path)
    for net, name in ((G, "G"), (D, "D"), (G, "ema")):
        for key, value in net.state_dict().items():
            if value.is_floating_point():
                torch.testing.assert_close(ckpt[name][key], value, rtol=1e-3, atol=5e-5)


@pytest.fixture
def quarters(tmp_path):
    """Four classes: class i is bright in quarter i of the image."""
    rng = np.random.default_rng(0)
    for quarter in range(4):
        folder = tmp_path / "quarters" / str(quarter)
        folder.mkdir(parents=True)
        for i in range(64):
            pixels = rng.integers(0, 60, (8, 8), np.uint8)
            pixels[quarter // 2 * 4:, quarter % 2 * 4:][:4, :4] += np.uint8(rng.integers(120, 190))
            Image.fromarray(pixels).save(folder / f"{i}.png")
    return tmp_path / "quarters"


def test_classes_on_demand(run, tmp_path, quarters):
    run(cgan, tmp_path, "--conditional", "--image_size", 8, "--batch_size", 32, "--width", 16,
        "--max_steps", 400, "--lr", 1e-3, "--sample_every", 50, "--data_dir", tmp_path,
        data=quarters)

    def read(*flags):
        """The brightest quarter of each sample, in order."""
        run(cgan, tmp_path, "--sample", 60, *flags)
        files = sorted((tmp_path / "generated").glob("*.png"))
        x = torch.from_numpy(np.stack([np.asarray(Image.open(file)) for file in files])).float()
        return nn.functional.avg_pool2d(x, 4).flatten(1).argmax(1)

    assert (read() == torch.arange(60) % 4).float().mean() > 0.8  # chance is 0.25
    assert (read("--label", "3") == 3).float().mean() > 0.8
    assert (read("--label", "2,0,2") == torch.tensor([2, 0, 2] * 20)).float().mean() > 0.8
    assert Image.open(tmp_path / "generated.png").size[0] == 3 * 10 + 2  # a column for each
    assert Image.open(tmp_path / "samples" / "epoch_0050.png").size == (4 * 10 + 2, 10 * 10 + 2)
    for wrong in ("4", "-1", "x", "1,,2"):
        with pytest.raises(SystemExit, match="4 classes"):
            run(cgan, tmp_path, "--sample", 3, f"--label={wrong}")


def test_without_labels(run, tmp_path, quarters):
    run(cgan, tmp_path, "--no-conditional", "--max_steps", 1, "--data_dir", tmp_path, data=quarters)
    assert checkpoint(tmp_path)["classes"] == 0
    with pytest.raises(SystemExit, match="0 classes"):
        run(cgan, tmp_path, "--sample", 3, "--label", "0")
