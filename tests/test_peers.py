"""Against the packages whose place this project takes; skipped where a peer is missing."""
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_ddpm import randomised
from test_fid import inception, weights  # noqa: F401 (fixtures)

import data
import ddpm
import fid


@pytest.fixture(scope="session")
def pytorch_fid(weights):  # noqa: F811
    """pytorch-fid's network with the same random weights, and its module of statistics."""
    pytest.importorskip("pytorch_fid")
    from pytorch_fid import fid_score
    from pytorch_fid import inception as theirs

    theirs.load_state_dict_from_url = lambda *_, **__: torch.load(weights, weights_only=True)
    return theirs.InceptionV3([3]).eval(), fid_score


def folder_of(images, path):
    """Write a list of uint8 arrays as PNG files."""
    path.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(path / f"{i:03}.png")
    return path


def make_sets(kind, tmp_path):
    """Two folders of 20 drawn faces or digits."""
    images, _ = data.load("toy-digits" if kind == "grey" else "toy-faces", 32, tmp_path)
    images = list(images[:40].permute(0, 2, 3, 1).numpy())
    if kind == "grey":
        images = [image[..., 0] for image in images]
    if kind == "mixed sizes":
        sizes = [(20 + i % 7, 50 - i % 5) for i in range(40)]
        images = [np.asarray(Image.fromarray(i).resize(s)) for i, s in zip(images, sizes)]
    return folder_of(images[:20], tmp_path / "a"), folder_of(images[20:], tmp_path / "b")


@pytest.mark.parametrize("kind", ["faces", "grey", "mixed sizes"])
def test_features_statistics_and_fid_are_pytorch_fids(kind, inception, pytorch_fid,  # noqa: F811
                                                      tmp_path, monkeypatch):
    monkeypatch.setattr(data, "TOYS", 40)
    network, fid_score = pytorch_fid
    ours, theirs = [], []
    for folder in make_sets(kind, tmp_path):
        files = sorted(folder.iterdir())
        batch = 1 if kind == "mixed sizes" else 20  # theirs takes batches of one size only
        expected = fid_score.get_activations(files, network, batch, device="cpu", num_workers=0)
        names, read = data.listing(folder)
        (images,) = fid.read_files(names, read, 20, folder)
        features = inception(images).numpy()
        assert np.linalg.norm(features - expected) < 1e-5 * np.linalg.norm(expected)
        ours.append(fid.statistics([images], inception))
        expected = expected.astype(np.float64)
        theirs.append((expected.mean(0), np.cov(expected, rowvar=False)))
        # The covariance's bound is of the second moment: where images hardly differ, as random
        # weights see drawn digits, float32 takes their network 2e-6 from itself in float64.
        moment = np.linalg.norm(expected.T @ expected) / len(expected)
        for a, b, scale in zip(ours[-1], theirs[-1], (np.linalg.norm(theirs[-1][0]), moment)):
            assert np.linalg.norm(a - b) < 1e-6 * scale
    expected = fid.frechet_distance(*theirs[0], *theirs[1])
    assert fid.frechet_distance(*ours[0], *ours[1]) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("kind", ["faces", "grey"])
def test_covariances_are_pytorch_fids_where_rounding_plays_no_part(kind, weights,  # noqa: F811
                                                                   pytorch_fid, tmp_path):
    """In float64 both networks' means and covariances are the same to 1e-6, and far below."""
    import copy

    images, _ = data.load("toy-faces", 32, tmp_path)
    images = images[:12] if kind == "faces" else images[:12, :1]
    theirs = copy.deepcopy(pytorch_fid[0]).double()
    with torch.no_grad():
        expected = theirs(images.expand(-1, 3, -1, -1).double() / 255)[0][:, :, 0, 0].numpy()
    mu, sigma = fid.statistics(images, fid.Inception(weights).double())
    for a, b in ((mu, expected.mean(0)), (sigma, np.cov(expected, rowvar=False))):
        assert np.linalg.norm(a - b) < 1e-6 * np.linalg.norm(b)


def test_distance_is_pytorch_fids_at_full_rank(pytorch_fid):
    rng = np.random.default_rng(0)
    sets = [rng.normal(size=(400, 100)) @ rng.normal(size=(100, 100)) for _ in range(2)]
    gaussians = [(x.mean(0), np.cov(x, rowvar=False)) for x in sets]
    try:
        expected = pytorch_fid[1].calculate_frechet_distance(*gaussians[0], *gaussians[1])
    except TypeError:
        pytest.skip("pytorch-fid's call of sqrtm does not fit this SciPy")
    assert fid.frechet_distance(*gaussians[0], *gaussians[1]) == pytest.approx(expected, rel=1e-6)


def test_it_reads_our_statistics(pytorch_fid, tmp_path):
    mu, sigma = np.arange(3.0), np.eye(3)
    fid.save_statistics(tmp_path / "stats.npz", mu, sigma)
    read = pytorch_fid[1].compute_statistics_of_path(str(tmp_path / "stats.npz"), None, 1, 3, "cpu")
    assert (read[0] == mu).all() and (read[1] == sigma).all()


@pytest.mark.parametrize("sampler", ["ddpm small", "ddpm large", "ddim 0", "ddim 0.5", "ddim 1"])
@pytest.mark.parametrize("steps", [1000, 100, 8])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_step_is_that_of_diffusers_schedulers(schedule, steps, sampler):
    """The same x_s from the same x_t, eps and noise, at every step on the way from x_T to x_0."""
    schedulers = pytest.importorskip("diffusers")
    kind, how = sampler.split()
    settings = dict(num_train_timesteps=1000, timestep_spacing="trailing", clip_sample=True,
                    beta_schedule="linear" if schedule == "linear" else "squaredcos_cap_v2")
    if kind == "ddpm":
        theirs = schedulers.DDPMScheduler(**settings, variance_type=f"fixed_{how}")
        way = dict(variance=how)
    else:
        theirs = schedulers.DDIMScheduler(**settings)
        way = dict(sampler="ddim", eta=float(how))
        options = dict(eta=float(how), use_clipped_model_output=True)
    theirs.set_timesteps(steps)
    alpha_bar = ddpm.make_alpha_bar(schedule, 1000)
    torch.testing.assert_close(theirs.alphas_cumprod.double(), alpha_bar[1:], rtol=1e-4, atol=1e-7)
    theirs.alphas_cumprod = alpha_bar[1:]  # in float32, 1 - alpha_bar is 1e-3 off for small t

    def draw(seed, *_):
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=generator)

    seen = []

    def net(x, t):
        seen.append(t[0].item())
        return draw(t[0].item())

    path = []
    ddpm.sample(net, draw(5000), alpha_bar, steps, **way, noise=lambda x: draw(9000), path=path)
    assert seen == theirs.timesteps.tolist()
    if sampler == "ddpm large" and steps < 1000:
        path.pop()  # theirs adds noise in the last step, too, unless it starts from t = 1
    for t, x, after in zip(seen, path, path[1:]):
        if kind == "ddpm":  # it draws its noise itself
            patch = pytest.MonkeyPatch()
            patch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor",
                          lambda *_, **__: draw(9000))
            expected = theirs.step(draw(t), t, x).prev_sample
            patch.undo()
        else:
            extra = dict(options, variance_noise=draw(9000)) if options["eta"] else options
            expected = theirs.step(draw(t), t, x, **extra).prev_sample
        torch.testing.assert_close(after, expected, rtol=1e-5, atol=1e-5)


def difference(net, theirs, sizes, channels=3):
    """The largest ||ours - theirs|| / ||theirs||, at several times, on squares of these sizes."""
    torch.manual_seed(1)
    worst = 0.0
    for size in sizes:
        t = torch.tensor([0, 1, 500, 999] if size < 100 else [1, 999])
        x = torch.randn(len(t), channels, size, size)
        with torch.no_grad():
            expected = theirs(x, t)
            expected = getattr(expected, "sample", expected)
            assert expected.std() > 0.1
            worst = max(worst, ((net(x, t) - expected).norm() / expected.norm()).item())
    return worst


LAYOUTS = {  # of google/ddpm-cifar10-32 and google/ddpm-celebahq-256, narrowed to a quarter
    "cifar10-32": dict(
        sample_size=32, block_out_channels=(32, 64, 64, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D")),
    "celebahq-256": dict(
        sample_size=256, block_out_channels=(32, 32, 64, 64, 128, 128),
        down_block_types=(*["DownBlock2D"] * 4, "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", *["UpBlock2D"] * 4))}
OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["safetensors", "bin", "old names"])
def test_weights_of_diffusers_give_the_same_output(layout, kind, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    theirs = diffusers.UNet2DModel(
        **LAYOUTS[layout], layers_per_block=2, attention_head_dim=None, downsample_padding=0,
        flip_sin_to_cos=False, freq_shift=1, norm_eps=1e-6).eval()
    randomised(theirs)
    theirs.save_pretrained(tmp_path, safe_serialization=kind == "safetensors")
    if kind == "old names":
        weights = torch.load(tmp_path / "diffusion_pytorch_model.bin", weights_only=True)
        for new, old in OLD.items():
            weights = {k.replace(new, old): v for k, v in weights.items()}
        torch.save(weights, tmp_path / "diffusion_pytorch_model.bin")
    scheduler = diffusers.DDPMScheduler(variance_type="fixed_large", clip_sample=True)
    scheduler.save_config(tmp_path)
    net = ddpm.UNet.from_pretrained(tmp_path)
    sizes = (32, 64) if layout == "cifar10-32" else (32, 96, 256)
    assert difference(net, theirs, sizes) < 1e-5
    settings = ddpm.parse_flags(["--init_from", str(tmp_path)])
    assert settings["VARIANCE"] == "large"
    assert settings["IMAGE_SIZE"] == LAYOUTS[layout]["sample_size"]


@pytest.mark.parametrize("attention, sizes", [((4, 8), (32, 64, 256)), ((2,), (32, 64))])
def test_weights_of_dlstudio_give_the_same_output(attention, sizes, tmp_path):
    spec = importlib.util.find_spec("GenerativeDiffusion")
    if not spec:
        pytest.skip("DLStudio is not installed")
    path = Path(spec.submodule_search_locations[0], "GenerativeDiffusion.py")
    spec = importlib.util.spec_from_file_location("dlstudio", path)  # without the whole package
    spec.loader.exec_module(dlstudio := importlib.util.module_from_spec(spec))
    torch.manual_seed(0)
    theirs = dlstudio.UNetModel(3, 32, 3, 2, attention, (1, 2, 3, 4), num_heads=1).eval()
    randomised(theirs)
    torch.save(theirs.state_dict(), tmp_path / "diffusion.pt")
    net = ddpm.UNet.from_pretrained(tmp_path / "diffusion.pt")
    assert difference(net, theirs, sizes) < 1e-5
    settings = ddpm.parse_flags(["--init_from", str(tmp_path / "diffusion.pt")])
    assert (settings["IMAGE_SIZE"], settings["TIMESTEPS"]) == (64, 1000)
    assert (settings["SCHEDULE"], settings["VARIANCE"]) == ("linear", "small")


def test_peers_that_ci_installs_are_there():
    """In CI no test above may be skipped for want of its peer."""
    import os

    if os.environ.get("PEERS"):
        assert all(importlib.util.find_spec(name) for name in os.environ["PEERS"].split())
