"""fid.py: the distance against closed forms, statistics, the network's weights, the command."""
import hashlib
import os
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
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


@pytest.mark.filterwarnings("error")  # as of a root that may be inaccurate
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


def test_what_is_no_gaussian_is_refused():
    good = np.zeros(6), np.eye(6)
    for bad in (
            (np.full(6, np.nan), np.eye(6)), (np.zeros(6), np.diag([1, 1, 1, 1, 1, np.inf])),
            (np.zeros(6), -np.eye(6)), (np.zeros(6), np.eye(5)), (np.zeros((6, 6)), np.eye(6))):
        for pair in ((*good, *bad), (*bad, *good)):
            with pytest.raises(fid.Error):
                fid.frechet_distance(*pair)


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (50, 3, 8, 8), dtype=torch.uint8, generator=generator)


def test_statistics_are_mean_and_unbiased_covariance(images):
    def network(batch):
        return Mean()(batch).double() + 1e9  # the covariance keeps its digits all the same

    x = network(images).numpy()
    for source in (images, images.split(7), (list(batch.split(1)) for batch in images.split(7))):
        mean, covariance = fid.statistics(source, network)
        np.testing.assert_allclose(mean, x.mean(0), rtol=1e-13)
        np.testing.assert_allclose(covariance, np.cov(x, rowvar=False), rtol=1e-6, atol=1e-6)


def test_only_uint8_is_taken(inception):  # test_peers.py has grey images
    with pytest.raises(fid.Error, match="uint8"):
        inception(torch.zeros(2, 1, 40, 30))


def test_weights_are_downloaded_once_and_checked(tmp_path, monkeypatch, weights):
    torch.save({"layer.weight": torch.zeros(3)}, tmp_path / "other.pt")
    for name in ("other.pt", "nowhere.pt"):
        with pytest.raises(fid.Error, match=name):
            fid.Inception(tmp_path / name)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(fid, "URL", (tmp_path / "server.pth").as_uri())
    for _ in range(2):  # the address leads nowhere; another hash
        with pytest.raises(fid.Error, match="put it into .*checkpoints"):
            fid.download_weights()
        server = shutil.copy(weights, tmp_path / "server.pth")
    assert not list(tmp_path.rglob("home/**/*.pth"))
    monkeypatch.setattr(fid, "SHA256", hashlib.sha256(server.read_bytes()).hexdigest())
    path = fid.download_weights()
    server.unlink()
    assert fid.download_weights() == path


@pytest.fixture
def command(tmp_path, monkeypatch, capsys, images):
    """command("a b --flag"): what `python fid.py a b --flag` prints; its network is Mean."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(fid, "Inception", lambda weights="": Mean())
    pixels = images.permute(0, 2, 3, 1).numpy()
    np.save("images.npy", pixels)
    np.savez("images.npz", pixels, labels=np.zeros(50))
    np.save("other.npy", pixels[:30] // 2)
    os.makedirs("folder/deep")
    os.mkdir("home")
    for i, image in enumerate(pixels):  # some are wider, and the same for Mean
        Image.fromarray(image if i < 25 else image.repeat(2, 1)).save(
            f"folder/{'deep/' * (i > 24)}{i:02}.png")
    shutil.make_archive("images", "zip", "folder")

    def command(line):
        monkeypatch.setattr(sys, "argv", ["fid.py", *line.split()])
        fid.main()
        return capsys.readouterr()

    return command


def test_every_kind_of_input_gives_the_same_number(command, images):
    command("folder --save ~/new/stats.npz --batch_size 7")
    assert set(np.load("home/new/stats.npz")) == {"mu", "sigma"} and not Path("~").exists()
    names = "folder images.zip images.npy images.npz ~/new/stats.npz".split()
    numbers = {command(f"{name} other.npy").out for name in names}
    both = [*fid.statistics(images, Mean()), *fid.statistics(images[:30] // 2, Mean())]
    assert numbers == {f"FID {fid.frechet_distance(*both):.4f}\n"}
    distance = fid.compare(iter(images.split(7)), images[:30] // 2, 30, 0, "cpu")
    assert distance == pytest.approx(fid.frechet_distance(*both))


def test_a_named_set_takes_precedence_and_is_cropped_as_for_training(command):
    os.mkdir("celeba")  # another folder of that name
    os.renames("folder", "data/celeba/img_align_celeba")
    cropped, _ = data.load("celeba", 16)
    np.save("cropped.npy", cropped.permute(0, 2, 3, 1).numpy())
    assert command("celeba cropped.npy --image_size 16").out == "FID 0.0000\n"


def test_num_is_a_seeded_subset_of_what_can_be_read(command):
    Path("folder/cut.png").write_bytes(Path("folder/00.png").read_bytes()[:60])
    Image.new("I;16", (8, 8), 300).save("folder/deep.png")
    for size in (7, 64):  # all 50 of the 52 files that can be read
        assert command(f"folder images.npy --num 50 --batch_size {size}").out == "FID 0.0000\n"
    for source in ("folder", "images.npy"):
        means = []
        for flags in ("--batch_size 7", "--batch_size 64", "--seed 1"):
            command(f"{source} --num 9 {flags} --save a.npz")
            means.append(np.load("a.npz")["mu"])
        np.testing.assert_allclose(means[0], means[1])
        assert not np.allclose(means[0], means[2])
    out, err = command("folder images.npy")
    assert out == "FID 0.0000\n" and "2 of 52" in err and "cut.png" in err and "deep.png" in err
    with pytest.raises(fid.Error, match="50 readable"):
        command("folder --num 51 --save a.npz")


def test_a_mistake_is_one_line_and_writes_nothing(command, capsys):
    os.mkdir("empty")
    Path("cut.npz").write_bytes(Path("images.npz").read_bytes()[:-50])
    np.savez("small.npz", mu=np.zeros(3), sigma=np.eye(3))
    np.savez("nan.npz", mu=np.full(6, np.nan), sigma=np.eye(6))
    np.savez("pickle.npz", mu=np.array([{}]), sigma=np.eye(3))
    np.save("picture.npy", np.zeros((64, 64, 3), np.uint8))
    before = os.listdir()
    for line, message in {
            "images.npy": "two inputs", "images.npy other.npy --save a.npz": "two inputs",
            "images.npy --save images.npy": "another file",
            "images.npy other.npy --num -1": "--num", "images.npy other.npy --num 31": "30 images",
            "images.npy other.npy --num 1": "two or more", "images.npy nowhere": "nowhere",
            "images.npy cut.npz": "cut.npz", "images.npy pickle.npz": "pickle.npz",
            "images.npy small.npz": "covariances", "images.npy nan.npz": "finite",
            "empty --save a.npz": "no readable image", "picture.npy .": "picture.npy"}.items():
        with pytest.raises((SystemExit, fid.Error)) as end:
            command(line)
        out, err = capsys.readouterr()
        text = str(end.value) if end.type is fid.Error else err[err.index("error: "):]  # argparse's
        assert message in text and (len(text.splitlines()), out) == (1, "")
    assert os.listdir() == before


def test_the_command_itself_prints_one_line_of_a_mistake(command, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["fid.py", "images.npy", "nowhere"])
    with pytest.raises(SystemExit, match="^error: .*nowhere"):
        runpy.run_path(str(ROOT / "fid.py"), run_name="__main__")
