"""fid.py: the distance against closed forms, statistics, the network's weights, the command."""
import hashlib
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models.inception import Inception3

import data
import fid


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """A state dict like pytorch-fid's, random, but of features in range."""
    torch.manual_seed(0)
    state = Inception3(1008, aux_logits=False, init_weights=False).state_dict()
    for key, value in state.items():
        if key.endswith("conv.weight"):
            value.normal_(0, (2 / value[0].numel()) ** 0.5)
        elif key.endswith(("bn.weight", "running_var")):
            value.uniform_(0.8, 1.2)
        elif value.is_floating_point():
            value.normal_(0, 0.1)
    path = tmp_path_factory.mktemp("weights") / "random.pth"
    torch.save(state, path)
    return path


@pytest.fixture(scope="session")
def inception(weights):
    return fid.Inception(weights)


class Mean(torch.nn.Module):
    """In place of Inception: six features, the mean colour of the left and right half."""

    def forward(self, images):
        batches = images if isinstance(images, list) else [images]
        halves = [torch.nn.functional.adaptive_avg_pool2d(x.float(), (1, 2)) for x in batches]
        return torch.cat([x.expand(-1, 3, -1, -1).flatten(1) for x in halves])


def gaussian(rank, smallest, seed):
    """The mean, the covariance of this rank, and a factor of it: sigma = factor @ factor.T."""
    rng = np.random.default_rng(seed)
    factor = rng.normal(size=(60, rank)) * np.geomspace(1, smallest, rank) ** 0.5
    return rng.normal(size=60), factor @ factor.T, factor


@pytest.mark.parametrize("rank1, rank2, smallest", [
    (120, 120, 1), (5, 5, 1), (120, 5, 1), (5, 120, 1), (1, 1, 1), (59, 59, 1),
    (60, 60, 1e-9), (60, 60, 1e-13), (0, 5, 1)])
def test_distance_is_the_closed_form(rank1, rank2, smallest):
    mean1, sigma1, factor1 = gaussian(rank1, smallest, seed=1)
    mean2, sigma2, factor2 = gaussian(rank2, smallest, seed=2)
    distance = fid.frechet_distance(mean1, sigma1, mean2, sigma2)
    trace = np.linalg.norm(factor1.T @ factor2, "nuc")  # sum of singular values
    squares = [np.square(x).sum() for x in (mean1 - mean2, factor1, factor2)]
    assert distance == pytest.approx(sum(squares) - 2 * trace, rel=1e-5)
    assert 0 <= fid.frechet_distance(mean1, sigma1, mean1, sigma1) < 1e-4


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (50, 3, 8, 8), dtype=torch.uint8, generator=generator)


def test_statistics_are_mean_and_unbiased_covariance(images):
    def network(batch):
        return Mean()(batch).double() + 1e9  # the covariance keeps its digits all the same

    x = network(images).numpy()
    lists = (list(batch.split(1)) for batch in images.split(7))
    for source in (images, iter(images.split(7)), lists):
        mean, covariance = fid.statistics(source, network, batch_size=9)
        np.testing.assert_allclose(mean, x.mean(0), rtol=1e-13)
        np.testing.assert_allclose(covariance, np.cov(x, rowvar=False), rtol=1e-6, atol=1e-6)


def test_features(inception):
    colour = torch.randint(0, 256, (3, 3, 40, 30), dtype=torch.uint8)
    features = inception(colour)
    assert features.shape == (3, 2048) and features.std() > 0.1
    grey = colour[:, :1]
    torch.testing.assert_close(inception(grey), inception(grey.repeat(1, 3, 1, 1)))
    unlike = inception([colour[:1], grey[:1, :, :9]])
    torch.testing.assert_close(unlike[:1], features[:1], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="uint8"):
        inception(colour / 127.5 - 1)


def test_wrong_or_missing_weights(tmp_path):
    torch.save({"layer.weight": torch.zeros(3)}, tmp_path / "other.pth")
    for name in ("other.pth", "nowhere.pth"):
        with pytest.raises((ValueError, OSError), match=name):
            fid.Inception(tmp_path / name)


def test_weights_are_downloaded_once_and_checked(tmp_path, monkeypatch, weights):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    server = tmp_path / "weights.pth"
    monkeypatch.setattr(fid, "URL", server.as_uri())
    advice = "put it into .*checkpoints, or give --weights"
    with pytest.raises(OSError, match=advice):  # the address leads nowhere
        fid.download_weights()
    server.write_bytes(weights.read_bytes())
    with pytest.raises(OSError, match=advice):  # another hash
        fid.download_weights()
    assert list(tmp_path.rglob("*.pth")) == [server]
    monkeypatch.setattr(fid, "SHA256", hashlib.sha256(server.read_bytes()).hexdigest())
    path = fid.download_weights()
    server.unlink()
    assert fid.download_weights() == path


@pytest.fixture
def command(tmp_path, monkeypatch, capsys, images):
    """command("a b --flag"): what `python fid.py a b --flag` prints; its network is Mean."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fid, "Inception", lambda weights: Mean())
    pixels = images.permute(0, 2, 3, 1).numpy()
    np.save("images.npy", pixels)
    np.savez("images.npz", pixels, labels=np.zeros(50))
    np.save("other.npy", pixels[:30] // 2)
    data.save_images(images[:25], Path("folder"), first=0)
    wider = images[25:].repeat_interleave(2, 3)  # of another size, and the same for Mean
    data.save_images(wider, Path("folder/deep"), first=25)
    shutil.make_archive("images", "zip", "folder")

    def command(line):
        fid.main(line.split())
        return capsys.readouterr()

    return command


def test_every_kind_of_input_gives_the_same_number(command, images):
    command("folder --save new/stats.npz --batch_size 7")
    names = "folder images.zip images.npy images.npz new/stats.npz".split()
    numbers = {command(f"{name} other.npy").out for name in names}
    both = [*fid.statistics(images, Mean()), *fid.statistics(images[:30] // 2, Mean())]
    assert numbers == {f"FID {fid.frechet_distance(*both):.4f}\n"}
    assert set(np.load("new/stats.npz")) == {"mu", "sigma"}
    os.renames("folder", "data/celeba/img_align_celeba")
    cropped, _ = data.load("celeba", 16)
    np.save("cropped.npy", cropped.permute(0, 2, 3, 1).numpy())
    assert command("celeba cropped.npy --image_size 16").out == "FID 0.0000\n"


def test_files_are_skipped_by_name_and_small_sets_warned_of(command):
    assert "fewer than 10,000" in command("images.npy other.npy").err
    Path("folder/cut.png").write_bytes(Path("folder/000000.png").read_bytes()[:60])
    Image.new("I;16", (8, 8), 300).save("folder/deep.png")
    out, err = command("folder images.npy")
    assert "cut.png, deep.png" in err and out == "FID 0.0000\n"


def test_num_is_a_seeded_subset(command):
    lines = [f"images.npy other.npy --num 9 --seed {seed}" for seed in (0, 0, 1)]
    first, again, other = [command(line).out for line in lines]
    assert first == again != other


@pytest.mark.parametrize("line, message", [
    ("images.npy", "two inputs"), ("images.npy other.npy --save a.npz", "two inputs"),
    ("images.npy other.npy --num -1", "--num"), ("images.npy other.npy --num 31", "30 images"),
    ("images.npy other.npy --num 1", "two or more"), ("images.npy nowhere", "nowhere"),
    ("images.npy other.npy --device abc", "--device abc"), ("images.npy cut.npz", "cut.npz"),
    ("images.npy pickle.npz", "pickle.npz"), ("images.npy small.npz", "dimensions"),
    ("images.npy nan.npz", "finite"), ("empty --save a.npz", "no readable image")])
def test_a_mistake_is_one_line_and_writes_nothing(line, message, command, capsys):
    Path("empty").mkdir()
    Path("cut.npz").write_bytes(Path("images.npz").read_bytes()[:-50])
    np.savez("small.npz", mu=np.zeros(3), sigma=np.eye(3))
    np.savez("nan.npz", mu=np.full(6, np.nan), sigma=np.eye(6))
    np.savez("pickle.npz", mu=np.array([{}]), sigma=np.eye(3))
    before = os.listdir()
    with pytest.raises(SystemExit) as end:
        command(line)
    out, err = capsys.readouterr()
    text = err if end.value.code == 2 else end.value.code  # of argparse, or of sys.exit(text)
    assert "error: " in text and message in text
    assert (len(text.splitlines()), out) == (1, "")
    assert os.listdir() == before
