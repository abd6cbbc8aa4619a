"""fid.py: the distance against closed forms, streaming statistics, inputs, bad inputs."""
import hashlib
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import scipy.linalg
import torch
from conftest import ROOT
from PIL import Image
from torchvision.models.inception import Inception3

import data
import fid


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """A state dict in the form of pytorch-fid's, random all over, that keeps features in range."""
    torch.manual_seed(0)
    state = Inception3(1008, aux_logits=False, init_weights=False).state_dict()
    for key, value in state.items():
        if key.endswith("conv.weight"):
            value.normal_(0, (2 / value[0].numel()) ** 0.5)
        elif key.endswith("bn.weight") or key.endswith("running_var"):
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
    """In place of the Inception network: six features that cost nothing."""

    digest = "mean"

    def forward(self, images):
        parts = images if isinstance(images, list) else images.split(1)
        pooled = [torch.nn.functional.adaptive_avg_pool2d(p.float(), (1, 2)) for p in parts]
        return torch.cat([p.expand(-1, 3, -1, -1).flatten(1) for p in pooled])


def gaussian(dimensions, rank=0, seed=0, scale=1.0):
    """A mean and a covariance of this rank (0 = full)."""
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(dimensions, rank or 2 * dimensions)) * scale
    return rng.normal(size=dimensions), a @ a.T / a.shape[1]


def symmetric_form(mu1, sigma1, mu2, sigma2):
    values, vectors = np.linalg.eigh(sigma1)
    half = vectors * np.sqrt(values.clip(0)) @ vectors.T
    trace = np.sqrt(np.linalg.eigvalsh(half @ sigma2 @ half).clip(0)).sum()
    return ((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * trace


# ---- the distance


def test_equal_covariances_leave_the_means():
    mu, sigma = gaussian(30)
    assert fid.frechet_distance(mu, sigma, mu + 2, sigma) == pytest.approx(4 * 30, rel=1e-9)


def test_diagonal_covariances():
    rng = np.random.default_rng(0)
    a, b = rng.uniform(0.1, 3, (2, 40))
    distance = fid.frechet_distance(np.zeros(40), np.diag(a**2), np.zeros(40), np.diag(b**2))
    assert distance == pytest.approx(((a - b) ** 2).sum(), rel=1e-9)


def test_it_is_sqrtm_of_the_product_at_full_rank(monkeypatch):
    one, two = gaussian(50), gaussian(50, seed=1)
    calls, sqrtm = [], scipy.linalg.sqrtm
    monkeypatch.setattr(scipy.linalg, "sqrtm",
                        lambda *args, **options: calls.append((args, options)) or sqrtm(*args))
    assert fid.frechet_distance(*one, *two) == pytest.approx(symmetric_form(*one, *two), rel=1e-9)
    assert len(calls) == 1 and len(calls[0][0]) == 1 and not calls[0][1]  # the matrix alone


@pytest.mark.parametrize("rank1, rank2", [(5, 5), (60, 5), (5, 0), (0, 5), (1, 1), (59, 59)])
def test_singular_covariances(rank1, rank2):
    one, two = gaussian(60, rank1), gaussian(60, rank2, seed=1)
    distance = fid.frechet_distance(*one, *two)
    assert type(distance) is float and np.isfinite(distance)
    assert distance == pytest.approx(symmetric_form(*one, *two), rel=1e-6)
    assert distance == pytest.approx(fid.frechet_distance(*two, *one), rel=1e-6)


@pytest.mark.parametrize("smallest", [1e-4, 1e-6, 1e-8, 1e-9, 1e-11, 1e-13, 0])
def test_nearly_singular_covariances(smallest):
    """Eigenvalues from 1 down to `smallest`, in different bases."""
    rng = np.random.default_rng(0)
    values = np.geomspace(1, max(smallest, 1e-13), 300)
    values[-100:] = smallest
    bases = [np.linalg.qr(rng.normal(size=(300, 300)))[0] for _ in range(2)]
    one, two = ((np.zeros(300), q * values @ q.T) for q in bases)
    distance = fid.frechet_distance(*one, *two)
    assert distance == pytest.approx(symmetric_form(*one, *two), rel=1e-3)


def test_equal_sets_are_at_distance_0():
    for rank, bound in ((0, 1e-6), (10, 1e-3)):
        mu, sigma = gaussian(200, rank)
        assert 0 <= fid.frechet_distance(mu, sigma, mu, sigma) < bound
    zero = np.zeros(5), np.zeros((5, 5))
    assert fid.frechet_distance(*zero, *zero) == 0  # two sets of one image each, repeated


def test_other_shapes_and_nan_are_refused():
    with pytest.raises(ValueError, match="dimensions"):
        fid.frechet_distance(*gaussian(3), *gaussian(4))
    with pytest.raises(ValueError, match="finite"):
        fid.frechet_distance(*gaussian(3), np.full(3, np.nan), np.eye(3))


def test_sampling_bias_is_what_equal_distributions_measure():
    rng = np.random.default_rng(0)
    sigma = np.diag(np.geomspace(1, 0.01, 8))
    measured = []
    for _ in range(200):
        sets = [rng.multivariate_normal(np.zeros(8), sigma, n) for n in (300, 500)]
        gaussians = [(x.mean(0), np.cov(x, rowvar=False)) for x in sets]
        measured.append(fid.frechet_distance(*gaussians[0], *gaussians[1]))
    assert fid.sampling_bias(sigma, 300, 500) == pytest.approx(np.mean(measured), rel=0.1)


# ---- statistics


def test_statistics_are_mean_and_unbiased_covariance():
    images = np.random.default_rng(0).integers(0, 256, (50, 8, 8, 3), np.uint8)
    x = Mean()(torch.from_numpy(images).permute(0, 3, 1, 2)).double().numpy()
    tensor = torch.from_numpy(images).permute(0, 3, 1, 2)
    parts = (part if i % 2 else list(part.split(1)) for i, part in enumerate(tensor.split(7)))
    for source in (images, tensor, parts):
        mu, sigma = fid.statistics(source, Mean(), batch_size=9)
        assert mu.dtype == sigma.dtype == np.float64
        np.testing.assert_allclose(mu, x.mean(0), rtol=1e-12)
        np.testing.assert_allclose(sigma, np.cov(x, rowvar=False), rtol=1e-9)


def test_statistics_need_two_images():
    for count in (0, 1):
        with pytest.raises(ValueError, match="two or more"):
            fid.statistics(np.zeros((count, 8, 8, 3), np.uint8), Mean())


def test_memory_does_not_grow_with_the_number_of_images():
    code = f"""
import resource, sys
sys.path.insert(0, {str(ROOT)!r})
import torch, fid
class Features(torch.nn.Module):
    def forward(self, images):
        return torch.randn(len(images), 512)
torch.set_num_threads(1)
one = torch.zeros(500, 3, 8, 8, dtype=torch.uint8)
for count in (4, 40):
    fid.statistics((one for _ in range(count)), Features())
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    pytest.importorskip("resource")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    few, many = map(int, done.stdout.split())  # of 2,000 and of 20,000 images
    assert many < few * 1.05


def test_cached_statistics_are_for_the_same_images_and_weights_only(tmp_path, monkeypatch):
    images = torch.randint(0, 256, (20, 3, 8, 8), dtype=torch.uint8)
    net, calls = Mean(), []
    plain = fid.statistics
    monkeypatch.setattr(fid, "statistics", lambda *a: calls.append(1) or plain(*a))
    first = fid.cached_statistics(images, net, tmp_path)
    again = fid.cached_statistics(images.clone(), net, tmp_path)
    assert all((a == b).all() for a, b in zip(first, again)) and len(calls) == 1
    changed = images.clone()
    changed[3, 0, 0, 0] ^= 1
    fid.cached_statistics(changed, net, tmp_path)
    fid.cached_statistics(images[:19], net, tmp_path)
    net.digest = "other weights"
    fid.cached_statistics(images, net, tmp_path)
    assert len(calls) == 4 and len(list(tmp_path.iterdir())) == 4


# ---- the network


def test_features(inception):
    colour = torch.randint(0, 256, (3, 3, 40, 30), dtype=torch.uint8)
    with pytest.raises(ValueError, match="uint8"):
        inception(colour / 127.5 - 1)  # what a generator gives
    features = inception(colour)
    assert features.shape == (3, 2048) and features.isfinite().all() and features.std() > 0.1
    grey = colour[:, :1]
    torch.testing.assert_close(inception(grey), inception(grey.repeat(1, 3, 1, 1)))
    one_by_one = inception([colour[:1], colour[1:2], torch.zeros(1, 1, 9, 9, dtype=torch.uint8)])
    torch.testing.assert_close(one_by_one[:2], features[:2], rtol=1e-4, atol=1e-4)


def test_wrong_and_missing_weights(tmp_path, monkeypatch):
    torch.save({"layer.weight": torch.zeros(3)}, tmp_path / "other.pth")
    (tmp_path / "text.pth").write_text("text")
    for name in ("other.pth", "text.pth"):
        with pytest.raises(ValueError, match="does not hold the weights"):
            fid.Inception(tmp_path / name)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))

    def download(url, path, digest):
        assert url == fid.URL and digest == fid.SHA256
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    with pytest.raises(OSError, match="put it into .*checkpoints.*--weights"):
        fid.Inception()


def test_a_download_with_another_hash_is_refused(tmp_path, monkeypatch, weights):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(fid, "URL", weights.as_uri())
    with pytest.raises(OSError, match="hash"):
        fid.fetch_weights()
    assert not list(tmp_path.rglob("*.pth"))
    monkeypatch.setattr(fid, "SHA256", hashlib.sha256(weights.read_bytes()).hexdigest())
    assert fid.fetch_weights().read_bytes() == weights.read_bytes()


# ---- the command


@pytest.fixture
def command(monkeypatch, capsys):
    """command(*flags): what `python fid.py flags` prints, with a network that costs nothing."""
    monkeypatch.setattr(fid, "Inception", lambda weights: Mean())

    def command(*flags):
        monkeypatch.setattr(sys, "argv", ["fid.py", *map(str, flags)])
        fid.main()
        return capsys.readouterr()

    return command


@pytest.fixture
def sets(tmp_path):
    """The same 12 images as a folder, a zip, a .npy and a .npz; and 10 others."""
    rng = np.random.default_rng(0)
    images, others = (rng.integers(0, 256, (n, 8, 8, 3), np.uint8) for n in (12, 10))
    (tmp_path / "folder" / "deep").mkdir(parents=True)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for i, image in enumerate(images):
            path = tmp_path / "folder" / ("deep" if i % 2 else "") / f"{i:02}.png"
            Image.fromarray(image).save(path)
            archive.write(path, f"top/{i}.png")
    np.save(tmp_path / "a.npy", images)
    np.savez(tmp_path / "a.npz", arr_0=images, labels=np.zeros(12))
    np.save(tmp_path / "b.npy", others)
    return tmp_path


def test_every_kind_of_input_gives_the_same_number(command, sets):
    answers = {command(sets / a, sets / "b.npy").out for a in ("folder", "a.zip", "a.npy", "a.npz")}
    assert len(answers) == 1
    (answer,) = answers
    assert answer.startswith("FID ") and answer.count("\n") == 1 and len(answer.split(".")[1]) == 5
    x, y = (np.load(sets / name) for name in ("a.npy", "b.npy"))
    distance = fid.frechet_distance(*fid.statistics(x, Mean()), *fid.statistics(y, Mean()))
    assert answer == f"FID {distance:.4f}\n"
    command(sets / "folder", "--save", sets / "new" / "stats.npz")
    assert command(sets / "new" / "stats.npz", sets / "b.npy").out == answer
    with np.load(sets / "new" / "stats.npz") as stats:
        assert sorted(stats) == ["mu", "sigma"]


def test_what_it_says(command, sets):
    said = command(sets / "a.npy", sets / "b.npy")
    assert "12 of 12 images" in said.err and "10 of 10 images" in said.err
    assert "bias FID upwards" in said.err and "JPEG" not in said.err
    Image.new("RGB", (8, 8)).save(sets / "folder" / "x.jpg")
    (sets / "folder" / "y.png").write_bytes(b"")
    Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(sets / "folder" / "z.png")
    Image.new("RGBA", (8, 8)).save(sets / "folder" / "zz.png")
    said = command(sets / "folder", sets / "b.npy").err
    assert "JPEG" in said and "skipped 1 of 16 files" in said and "y.png" in said
    assert "16-bit" in said and "transparency" in said


def test_num_is_a_seeded_subset(command, sets):
    def answer(*flags):
        return command(sets / "a.npy", sets / "b.npy", *flags).out

    assert answer("--num", 5) == answer("--num", 5) != answer("--num", 5, "--seed", 1)
    assert answer("--num", 5) != answer()
    with pytest.raises(ValueError, match="--num 11"):
        answer("--num", 11)


def test_a_mistake_in_the_second_input_shows_before_the_first_is_worked_on(command, sets, capsys):
    with pytest.raises(ValueError, match="nowhere"):
        command(sets / "a.npy", sets / "nowhere")
    assert "images/s" not in capsys.readouterr().err


def test_named_sets_go_through_data(command, sets):
    folder = sets / "celeba" / "img_align_celeba"
    folder.mkdir(parents=True)
    for i in range(3):
        Image.new("RGB", (178, 218), (i * 90, 0, 0)).save(folder / f"{i}.jpg")
    data.load("celeba", 64, sets)
    said = command("celeba", sets / "celeba64.npy", "--data_dir", sets)
    assert said.out == "FID 0.0000\n"


def test_bad_input_is_one_line_with_status_2(sets, weights):
    (sets / "empty").mkdir()
    (sets / "text").mkdir()
    (sets / "text" / "a.txt").write_text("text")
    np.save(sets / "floats.npy", np.zeros((3, 8, 8, 3)))
    np.save(sets / "one.npy", np.zeros((1, 8, 8, 3), np.uint8))
    np.savez(sets / "small.npz", mu=np.zeros(3), sigma=np.eye(3))
    np.savez(sets / "large.npz", mu=np.zeros(4), sigma=np.eye(4))
    (sets / "broken.npz").write_bytes(b"PK broken")
    code = f"""
import runpy, sys
sys.path.insert(0, {str(ROOT)!r})
for line in sys.stdin.read().splitlines():
    sys.argv = ["fid.py", *line.split()]
    try:
        runpy.run_path({str(ROOT / "fid.py")!r}, run_name="__main__")
    except SystemExit as end:
        print("status", end.code, file=sys.stderr, flush=True)
"""
    lines = ["a.npy", "", "a.npy b.npy a.npz", "nowhere b.npy", "small.npz large.npz",
             "floats.npy b.npy", "broken.npz b.npy", "a.npy b.npy --num 0", "a.npy b.npy --num x",
             "a.npy b.npy --weights nowhere.pth", "a.npy b.npy --weights floats.npy",
             "a.npy b.npy --nonsense", "empty b.npy --weights W", "text b.npy --weights W",
             "one.npy b.npy --weights W", "a.npy b.npy --device nonsense --weights W"]
    done = subprocess.run([sys.executable, "-c", code], cwd=sets, text=True, capture_output=True,
                          input="\n".join(line.replace("W", str(weights)) for line in lines) + "\n")
    said = [s for s in done.stderr.splitlines() if s.startswith(("error", "status", "Traceback"))]
    assert len(said) == 2 * len(lines), done.stderr
    for line, message, status in zip(lines, said[::2], said[1::2]):
        assert message.startswith("error: ") and len(message) > 20, (line, message)
        assert status == "status 2", (line, status)
    assert done.stdout == ""
