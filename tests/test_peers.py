"""Against the packages whose place this project takes; skipped where one is missing."""
import importlib.util
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import checkpoint, pictures
from test_ddpm import randomised
from test_fid import inception, weights  # noqa: F401 (fixtures)
from torch.nn.functional import interpolate

import data
import ddpm
import fid


def test_peers_that_ci_installs_are_there():
    """In CI no test below may be skipped because a peer is missing."""
    for name in os.environ.get("PEERS", "").split():
        assert importlib.util.find_spec(name), name


@pytest.fixture(scope="session")
def pytorch_fid(weights):  # noqa: F811
    """pytorch-fid's network with the same random weights, and its module of statistics."""
    pytest.importorskip("pytorch_fid")
    from pytorch_fid import fid_score
    from pytorch_fid import inception as theirs

    theirs.load_state_dict_from_url = lambda *_, **__: torch.load(weights, weights_only=True)
    return theirs.InceptionV3([3]).eval(), fid_score


@pytest.mark.parametrize("kind", ["faces", "grey", "mixed sizes"])
def test_features_statistics_and_fid_are_pytorch_fids(kind, inception, pytorch_fid,  # noqa: F811
                                                      tmp_path):
    network, fid_score = pytorch_fid
    ours, theirs = [], []
    drawn, _ = data.load("toy-digits" if kind == "grey" else "toy-faces", 32, limit=40)
    for folder, part in zip((tmp_path / "a", tmp_path / "b"), drawn.split(20)):
        for i, image in enumerate(part.split(1)):
            size = (50 - i % 5, 20 + i % 7) if kind == "mixed sizes" else (32, 32)
            data.save_images(interpolate(image, size), folder, first=i)
        batch = 1 if kind == "mixed sizes" else 20  # theirs takes batches of one size only
        expected = fid_score.get_activations(sorted(folder.iterdir()), network, batch,
                                             device="cpu", num_workers=0)
        (images,) = fid.read_files(*data.list_files(folder), 20)
        features = inception(images).numpy()
        assert np.linalg.norm(features - expected) < 1e-5 * np.linalg.norm(expected)
        ours.append(fid.statistics([images], inception))
        expected = expected.astype(np.float64)
        theirs.append((expected.mean(0), np.cov(expected, rowvar=False)))
        # relative to the second moment: where images hardly differ, float32 takes their network
        # itself 2e-6 from float64
        moment = np.linalg.norm(expected.T @ expected) / len(expected)
        for a, b, scale in zip(ours[-1], theirs[-1], (np.linalg.norm(theirs[-1][0]), moment)):
            assert np.linalg.norm(a - b) < 1e-6 * scale
    expected = fid.frechet_distance(*theirs[0], *theirs[1])
    assert fid.frechet_distance(*ours[0], *ours[1]) == pytest.approx(expected, rel=1e-4)


def test_distance_is_pytorch_fids_at_full_rank(pytorch_fid):
    rng = np.random.default_rng(0)
    sets = [rng.normal(size=(400, 100)) @ rng.normal(size=(100, 100)) for _ in range(2)]
    gaussians = [(x.mean(0), np.cov(x, rowvar=False)) for x in sets]
    try:
        expected = pytorch_fid[1].calculate_frechet_distance(*gaussians[0], *gaussians[1])
    except TypeError:
        pytest.skip("pytorch-fid's call of sqrtm does not fit this SciPy")
    assert fid.frechet_distance(*gaussians[0], *gaussians[1]) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("way", [
    dict(variance="small"), dict(variance="large"),
    *[dict(sampler="ddim", eta=eta) for eta in (0.0, 0.5, 1.0)]], ids=str)
@pytest.mark.parametrize("steps", [1000, 100, 8])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_step_is_that_of_diffusers_schedulers(schedule, steps, way, monkeypatch):
    """The same x_s from the same x_t, eps and noise, at every step on the way from x_T to x_0."""
    diffusers = pytest.importorskip("diffusers")

    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=generator)

    settings = dict(num_train_timesteps=1000, timestep_spacing="trailing", clip_sample=True,
                    beta_schedule="linear" if schedule == "linear" else "squaredcos_cap_v2")
    if "eta" in way:
        theirs = diffusers.DDIMScheduler(**settings)
        options = dict(eta=way["eta"], use_clipped_model_output=True, variance_noise=draw(9000))
    else:
        theirs = diffusers.DDPMScheduler(**settings, variance_type=f"fixed_{way['variance']}")
        options = {}
    theirs.set_timesteps(steps)
    alpha_bar = ddpm.make_alpha_bar(schedule, 1000)
    torch.testing.assert_close(theirs.alphas_cumprod.double(), alpha_bar[1:], rtol=1e-4, atol=1e-7)
    theirs.alphas_cumprod = alpha_bar[1:]  # in float32, 1 - alpha_bar is 1e-3 off for small t
    seen, path = [], []

    def net(x, t):
        seen.append(t[0].item())
        return draw(t[0].item())

    ddpm.sample(net, draw(5000), alpha_bar, steps, **way, noise=lambda x: draw(9000), path=path)
    assert seen == theirs.timesteps.tolist()
    if way == dict(variance="large") and steps < 1000:
        path.pop()  # theirs adds noise in the last step, too, unless it starts from t = 1
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor",
                        lambda *_, **__: draw(9000))
    for t, x, after in zip(seen, path, path[1:]):
        expected = theirs.step(draw(t), t, x, **options).prev_sample
        torch.testing.assert_close(after, expected, rtol=1e-5, atol=1e-5)


def difference(net, theirs, sizes):
    """The largest ||ours - theirs|| / ||theirs||, at several times, on squares of these sizes."""
    torch.manual_seed(1)
    errors = []
    for size in sizes:
        t = torch.tensor([0, 1, 500, 999] if size < 100 else [1, 999])
        x = torch.randn(len(t), 3, size, size)
        with torch.no_grad():
            ours, expected = net(x, t), theirs(x, t)
        expected = getattr(expected, "sample", expected)
        assert expected.std() > 0.1
        errors.append((ours - expected).norm() / expected.norm())
    return max(errors)


LAYOUTS = {  # of google/ddpm-cifar10-32 and google/ddpm-celebahq-256, narrowed to a quarter
    "cifar10-32": dict(
        sample_size=32, block_out_channels=(32, 64, 64, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D")),
    "celebahq-256": dict(
        sample_size=256, block_out_channels=(32, 32, 64, 64, 128, 128),
        down_block_types=(*["DownBlock2D"] * 4, "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", *["UpBlock2D"] * 4))}


@pytest.fixture
def hub(tmp_path):
    """hub(**changes): a folder like google/ddpm-cifar10-32, with random weights; its network."""
    diffusers = pytest.importorskip("diffusers")

    def hub(layout="cifar10-32", safe=True, scheduler={}, **changes):
        config = dict(layers_per_block=2, attention_head_dim=None, downsample_padding=0,
                      flip_sin_to_cos=False, freq_shift=1, norm_eps=1e-6)
        net = diffusers.UNet2DModel(**{**LAYOUTS[layout], **config, **changes}).eval()
        randomised(net).save_pretrained(tmp_path / "hub", safe_serialization=safe)
        scheduler = diffusers.DDPMScheduler(**{"variance_type": "fixed_large", **scheduler})
        scheduler.save_config(tmp_path / "hub")
        return str(tmp_path / "hub"), net

    return hub


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("safe", [True, False])
def test_weights_of_diffusers_give_the_same_output_or_are_refused(layout, safe, hub):
    folder, theirs = hub(layout, safe)
    net = ddpm.UNet.from_pretrained(folder)
    assert not net.training
    assert difference(net, theirs, (32, 64) if layout == "cifar10-32" else (32, 96, 256)) < 1e-5
    settings, _ = ddpm.parse_flags(["--init_from", folder])
    assert settings["VARIANCE"] == "large" and settings["LR"] == 1e-4
    assert settings["IMAGE_SIZE"] == LAYOUTS[layout]["sample_size"]
    assert ddpm.parse_flags(["--init_from", folder, "--lr", "1"])[0]["LR"] == 1
    (path,) = Path(folder).glob("diffusion_pytorch_model.*")
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="--init_from"):
        ddpm.UNet.from_pretrained(folder)


@pytest.mark.parametrize("change", [
    dict(act_fn="gelu"), dict(attention_head_dim=8), dict(downsample_padding=1),
    dict(flip_sin_to_cos=True), dict(freq_shift=0), dict(resnet_time_scale_shift="scale_shift"),
    dict(mid_block_scale_factor=2), dict(num_class_embeds=3), dict(out_channels=6),
    *[dict(scheduler=other) for other in (
        dict(prediction_type="v_prediction"), dict(beta_schedule="sigmoid"), dict(beta_end=0.03),
        dict(trained_betas=[0.1] * 30), dict(num_train_timesteps=500))]], ids=str)
def test_another_network_or_diffusion_is_refused(change, hub):
    folder, _ = hub(**change)
    with pytest.raises((SystemExit, ValueError), match="^2$|--init_from"):  # 2: of parse_flags()
        ddpm.parse_flags(["--init_from", folder])
        ddpm.UNet.from_pretrained(folder)


@pytest.mark.parametrize("T", [500, 4000])
def test_schedules_of_other_lengths(T, hub):
    folder, _ = hub(scheduler=dict(num_train_timesteps=T, beta_start=0.1 / T, beta_end=20 / T))
    assert ddpm.parse_flags(["--init_from", folder])[0]["TIMESTEPS"] == T
    folder, _ = hub(scheduler=dict(num_train_timesteps=T, beta_schedule="squaredcos_cap_v2"))
    assert ddpm.parse_flags(["--init_from", folder])[0]["SCHEDULE"] == "cosine"


@pytest.mark.parametrize("attention, sizes", [((4, 8), (32, 64, 256)), ((2,), (32, 64))])
def test_weights_of_dlstudio_give_the_same_output(attention, sizes, tmp_path):
    spec = importlib.util.find_spec("GenerativeDiffusion")
    if not spec:
        pytest.skip("DLStudio is not installed")
    path = Path(spec.submodule_search_locations[0], "GenerativeDiffusion.py")
    spec = importlib.util.spec_from_file_location("dlstudio", path)  # without the whole package
    dlstudio = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(dlstudio)
    theirs = dlstudio.UNetModel(3, 32, 3, 2, attention, (1, 2, 3, 4), num_heads=1).eval()
    torch.save(randomised(theirs).state_dict(), tmp_path / "diffusion.pt")
    net = ddpm.UNet.from_pretrained(tmp_path / "diffusion.pt")
    assert difference(net, theirs, sizes) < 1e-5
    settings, _ = ddpm.parse_flags(["--init_from", str(tmp_path / "diffusion.pt")])
    assert (settings["IMAGE_SIZE"], settings["TIMESTEPS"]) == (64, 1000)
    assert (settings["SCHEDULE"], settings["VARIANCE"]) == ("linear", "small")


def test_sampling_and_fine_tuning(run, hub, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("conftest.TINY", {"ddpm": ["--batch_size", "8"]})
    folder, theirs = hub(block_out_channels=(32, 32, 32, 32), sample_size=16)
    out, source = tmp_path / "out", ["--init_from", folder]
    run(ddpm, out, "--sample", 3, "--sample_steps", 2, "--batch_size", 3, *source)
    assert len(pictures(out / "generated")) == 3 and not (out / "ckpt.pt").exists()
    run(ddpm, out, "--max_steps", 2, *source)
    moved = (checkpoint(out)["net"]["conv_in.weight"] - theirs.conv_in.weight).abs().max()
    assert 0 < moved < 1e-5  # from those weights, by two steps of warm-up
    np.save(tmp_path / "grey.npy", np.zeros((9, 16, 16), np.uint8))
    for wrong in (["--channels", 8], ["--resume"], ["--data", tmp_path / "grey.npy"]):
        with pytest.raises(SystemExit, match="^2$|3 channels"):
            run(ddpm, tmp_path / "other", *source, *wrong)
    for file in Path(folder).iterdir():
        file.unlink()  # the checkpoint no longer needs them
    run(ddpm, out, "--resume", "--max_steps", 3)
    assert checkpoint(out)["step"] == 3 and checkpoint(out)["args"]["groups"] == 32
    monkeypatch.setitem(sys.modules, "diffusers", None)  # importing it fails
    with pytest.raises(SystemExit):
        run(ddpm, tmp_path / "other", *source)
    assert "pip install diffusers" in capsys.readouterr().err
