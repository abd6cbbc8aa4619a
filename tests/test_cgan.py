"""CGAN: labels in both networks, the training step against a plain one."""
import pytest
import torch
from conftest import checkpoint
from test_dcgan import check_against_a_plain_loop

import cgan
import data


@pytest.mark.parametrize("shape, classes", [((1, 28, 28), 10), ((3, 16, 16), 3), ((1, 9, 9), 0)])
def test_shapes_and_where_the_label_enters(shape, classes):
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


def test_training_is_that_of_a_plain_loop(run, tmp_path):
    """Three steps by the script, in two parts."""
    run("cgan", tmp_path, "--conditional", "--batch_size", 16, "--width", 32, "--limit", 640,
        "--seed", 5, "--max_steps", 2, "--ema", 0.9, data="toy-digits")
    run("cgan", tmp_path, "--resume", "--max_steps", 3)
    batches = data.Batches(*data.load("toy-digits", 16, limit=640), 16, 5)
    torch.manual_seed(5)
    G, D = cgan.Generator((1, 16, 16), 10, 8, 32), cgan.Discriminator((1, 16, 16), 10, 32)
    check_against_a_plain_loop(checkpoint(tmp_path), G, D, batches, 5, 2e-4, 0.5)
