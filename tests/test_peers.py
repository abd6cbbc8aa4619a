"""Against the packages whose place this project takes; skipped where one is missing."""
import importlib.util
import os
import re
from fractions import Fraction

import numpy as np
import pytest
import torch
from conftest import checkpoint, pictures, same
from PIL import Image
from test_fid import inception, weights  # noqa: F401 (fixtures)

import data
import ddpm
import fid


def test_peers_that_ci_installs_are_there():
    """In CI no test below may be skipped because a peer is missing."""
    for name in os.environ.get("PEERS", "").split():
        assert importlib.util.find_spec(name), name


# ---- pytorch-fid


@pytest.fixture(scope="session")
def pytorch_fid(weights):  # noqa: F811
    """pytorch-fid's network with the same random weights, and its module of statistics."""
    pytest.importorskip("pytorch_fid")
    from pytorch_fid import fid_score
    from pytorch_fid import inception as theirs

    theirs.load_state_dict_from_url = lambda *_, **__: torch.load(weights, weights_only=True)
    return theirs.InceptionV3([3]).eval(), fid_score


def test_features_and_statistics_are_pytorch_fids(inception, pytorch_fid, tmp_path):  # noqa: F811
    network, fid_score = pytorch_fid
    for name in ("toy-digits", "toy-faces"):  # grey; in colour, of sizes below and above 299
        folder = tmp_path / name
        folder.mkdir()
        drawn, _ = data.load(name, 32, limit=5)
        for i, pixels in enumerate(drawn.permute(0, 2, 3, 1).squeeze(3).numpy()):
            size = (200 + 50 * i, 400 - 50 * i) if name == "toy-faces" else (32, 32)
            Image.fromarray(pixels).resize(size).save(folder / f"{i}.png")
        expected = fid_score.get_activations(  # one by one: it takes batches of one size only
            sorted(folder.iterdir()), network, 1, device="cpu", num_workers=0).astype(np.float64)
        (images,) = fid.read_files(*data.list_files(folder), 0, 5)
        features = inception(images).numpy()
        assert np.linalg.norm(features - expected) < 1e-5 * np.linalg.norm(expected)
        mean, covariance = fid.statistics([images], inception)
        assert np.linalg.norm(mean - expected.mean(0)) < 1e-6 * np.linalg.norm(mean)
        # relative to the second moment: where images hardly differ, float32 takes their network
        # itself 2e-6 from float64
        error, moment = covariance - np.cov(expected, rowvar=False), expected.T @ expected / 5
        assert np.linalg.norm(error) < 1e-6 * np.linalg.norm(moment)


# ---- diffusers' schedulers


def draw(seed):
    x = torch.empty(2, 3, 4, 4, dtype=torch.float64)
    return x.normal_(generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("peer, eta, order", [
    ("DDPMScheduler", 1, 1), *[("DDIMScheduler", eta, 1) for eta in (0, 0.5, 1)],
    ("dpmsolver++", 0, 2), ("sde-dpmsolver++", 1, 2)])
@pytest.mark.parametrize("num_steps", [100, 8])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_step_is_that_of_diffusers_schedulers(
        schedule, num_steps, peer, eta, order, monkeypatch):
    """The same x_s from the same x_t, eps and noise, at every step on the way from x_T to x_0."""
    diffusers = pytest.importorskip("diffusers")
    settings = dict(num_train_timesteps=1000,
                    beta_schedule="linear" if schedule == "linear" else "squaredcos_cap_v2")
    if order == 2:
        theirs = diffusers.DPMSolverMultistepScheduler(
            **settings, algorithm_type=peer, solver_order=2, final_sigmas_type="zero")
    else:
        theirs = getattr(diffusers, peer)(**settings, clip_sample=True)
    alpha_bar, noise = ddpm.make_alpha_bar(schedule, 1000), draw(9000)
    torch.testing.assert_close(theirs.alphas_cumprod.double(), alpha_bar[1:], rtol=1e-4, atol=1e-7)
    theirs.alphas_cumprod = alpha_bar[1:]  # in float32, 1 - alpha_bar is 1e-3 off for small t
    times, eps = [], []

    def net(x, t):
        times.append(t[0].item())
        a = alpha_bar[t[0]]
        x_0 = draw(times[-1]) if order == 1 else draw(times[-1]).tanh()  # this peer does not clip
        eps.append((x - a.sqrt() * x_0) / (1 - a).sqrt())
        return eps[-1]

    with monkeypatch.context() as patch:
        patch.setattr(torch, "randn", lambda *_, **__: noise)
        path = list(ddpm.sample(net, draw(5000), alpha_bar, num_steps, eta, order))
    assert len(path) == num_steps + 1 and times[0] == 1000 and times[-1] > 0
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, **__: noise)
    options = {} if peer == "DDPMScheduler" else dict(variance_noise=noise)
    if peer == "DDIMScheduler":
        options.update(eta=eta, use_clipped_model_output=True)
    else:
        theirs.set_timesteps(timesteps=[t - 1 for t in times])
    for t, s, eps, x, after in zip(times, [*times[1:], 0], eps, path, path[1:]):
        if peer == "DDIMScheduler":  # it takes steps of 1000 // num_inference_steps
            theirs.num_inference_steps = Fraction(1000, t - s)
        expected = theirs.step(eps, t - 1, x, **options).prev_sample
        error = 1e-5 if order == 1 else 1e-4  # DPMSolverMultistepScheduler computes in float32
        torch.testing.assert_close(after, expected.double(), rtol=error, atol=error)


# ---- diffusers' U-Net

LAYOUTS = {  # of google/ddpm-cifar10-32 and ddpm-celebahq-256, narrowed to a quarter
    "cifar10-32": (32, (32, 64, 64, 64), [1]),
    "celebahq-256": (256, (32, 32, 64, 64, 128, 128), [4]),
    "attention in all levels of at most 16 px": (32, (32, 64, 64), [1, 2])}


def make_peer(sample_size=32, channels=(32, 64), levels=(1,), **changes):
    """A UNet2DModel with random weights and attention in these levels, as on the hub."""
    from diffusers import UNet2DModel

    kinds = ["Attn" if level in levels else "" for level in range(len(channels))]
    config = dict(
        sample_size=sample_size, block_out_channels=channels, layers_per_block=2,
        down_block_types=[f"{kind}DownBlock2D" for kind in kinds],
        up_block_types=[f"{kind}UpBlock2D" for kind in reversed(kinds)], attention_head_dim=None,
        norm_eps=1e-6, flip_sin_to_cos=False, freq_shift=1, downsample_padding=0)
    torch.manual_seed(0)
    net = UNet2DModel(**{**config, **changes}).eval()
    for weight in net.parameters():
        torch.nn.init.normal_(weight, 0.1 * (weight.ndim == 1), weight[0].numel() ** -0.5 / 2)
    return net


def rename(theirs, net):
    """The weights of a UNet2DModel under the names of ddpm.UNet, with q, k and v joined."""
    weights, state, blocks = theirs.state_dict(), {}, theirs.config.layers_per_block
    for name, value in weights.items():
        if "to_q" in name:
            parts = [name.replace("to_q", part) for part in ("to_q", "to_k", "to_v")]
            value = torch.cat([weights[part] for part in parts])
        elif "to_k" in name or "to_v" in name:
            continue
        if match := re.match(r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(.*)", name):
            way, level, kind, i, rest = match.groups()
            stage = int(level) * (blocks + 1) + (blocks if "samplers" in kind else int(i))
            last = len(getattr(net, way)[stage]) - 1
            layer = {"resnets": 0, "attentions": 1}.get(kind, last)
            name = f"{way}.{stage}.{layer}.{rest.removeprefix('conv.')}"
        for old, new in (
                ("mid_block.resnets.0", "middle.0"), ("mid_block.attentions.0", "middle.1"),
                ("mid_block.resnets.1", "middle.2"), ("time_embedding.linear_1", "time.0"),
                ("time_embedding.linear_2", "time.2"), ("time_emb_proj", "emb"), ("to_q", "qkv"),
                ("conv_shortcut", "skip"), ("group_norm", "norm"), ("to_out.0", "out"),
                ("conv_norm_out", "norm_out")):
            name = name.replace(old, new)
        state[name] = value
    return state


def assert_same_outputs(net, theirs, size):
    t = torch.tensor([1, 2, 501, 1000] if size < 100 else [2, 1000])
    x = torch.randn(len(t), 3, size, size)
    with torch.no_grad():
        ours, expected = net(x, t), theirs(x, t - 1)
    expected = getattr(expected, "sample", expected)
    assert expected.std() > 0.1
    assert (ours - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_u_net_is_that_of_diffusers(layout):
    pytest.importorskip("diffusers")
    size, channels, levels = LAYOUTS[layout]
    theirs = make_peer(*LAYOUTS[layout])
    mults = [width // 32 for width in channels]
    net = ddpm.UNet((3, size, size), 32, mults, blocks=2, attention=16, groups=32)
    state = rename(theirs, net)
    missing, unexpected = net.load_state_dict(state, strict=False)
    # theirs may have no attention in the smallest levels, where ours adds nothing at first
    attention = {name for name, module in net.named_modules() if isinstance(module, ddpm.Attention)}
    assert not unexpected and {name.rsplit(".", 2)[0] for name in missing} <= attention
    assert not missing or len(levels) == 1
    assert_same_outputs(net, theirs, size)


# ---- public weights


@pytest.fixture
def hub(tmp_path):
    """hub(**changes): a folder with a small UNet2DModel and its scheduler; the network."""
    diffusers = pytest.importorskip("diffusers")

    def hub(pipeline=False, scheduler={}, **changes):
        net, folder = make_peer(16, (32, 32), **changes), tmp_path / "hub"
        scheduler = diffusers.DDPMScheduler(**{"beta_schedule": "squaredcos_cap_v2", **scheduler})
        if pipeline:
            diffusers.DDPMPipeline(net, scheduler).save_pretrained(folder)
        else:
            net.save_pretrained(folder)
            scheduler.save_config(folder)  # scheduler_config.json
        return folder, net, scheduler

    return hub


@pytest.mark.parametrize("pipeline", [False, True])
def test_folders_of_diffusers_are_loaded(pipeline, hub, monkeypatch):
    folder, theirs, scheduler = hub(pipeline, dict(num_train_timesteps=500))
    monkeypatch.setenv("HOME", str(folder.parent))
    net, alpha_bar = ddpm.load_pretrained("~/hub")
    assert (list(net.shape), net.classes, len(alpha_bar), alpha_bar[0]) == ([3, 16, 16], 0, 501, 1)
    expected = scheduler.alphas_cumprod.double()
    torch.testing.assert_close(alpha_bar[1:], expected, rtol=1e-4, atol=1e-7)
    assert_same_outputs(net.eval(), theirs, 16)


def test_public_weights_are_sampled_fine_tuned_and_resumed(run, hub, tmp_path, monkeypatch):
    folder, theirs, _ = hub(dropout=0.1)
    modes, forward = [], torch.nn.Dropout.forward
    monkeypatch.setattr(torch.nn.Dropout, "forward",
                        lambda self, x: modes.append(self.training) or forward(self, x))
    source, out = ["--init_from", folder], tmp_path / "out"
    run("ddpm", out, "--sample", 3, "--sample_steps", 2, "--batch_size", 3, *source)
    assert len(pictures(out / "generated")) == 3 and not (out / "ckpt.pt").exists()
    assert not any(modes)
    run("ddpm", out, "--max_steps", 1, *source)
    assert all(modes[-8:])  # dropout is on
    for name, value in theirs.conv_in.state_dict().items():  # from there, by one step of warm-up
        moved = (checkpoint(out)["net"][f"net.conv_in.{name}"] - value).abs().max()
        assert 0 < moved < 1e-5
    run("ddpm", out, "--resume", "--max_steps", 2)
    run("ddpm", tmp_path / "straight", "--max_steps", 2, *source)
    assert same(checkpoint(tmp_path / "straight"), checkpoint(out))
    run("ddpm", out, "--sample", 2, "--sample_steps", 2)  # of the run, not of the public weights
    assert len(pictures(out / "generated")) == 2


@pytest.mark.parametrize("change", [
    dict(num_class_embeds=3), dict(out_channels=6),
    dict(scheduler=dict(prediction_type="v_prediction")), "damaged"], ids=str)
def test_what_does_not_predict_eps_is_refused(change, hub):
    folder, *_ = hub(**change) if change != "damaged" else hub()
    if change == "damaged":
        (path,) = folder.glob("diffusion_pytorch_model.*")
        path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(SystemExit, match="^error: .*--init_from") as end:
        ddpm.load_pretrained(str(folder))
    assert len(str(end.value).splitlines()) == 1


def test_the_weights_of_dlstudio(run, tmp_path, monkeypatch):
    dlstudio = pytest.importorskip("GenerativeDiffusion")
    model = dlstudio.UNetModel  # narrowed to a quarter, otherwise as ddpm.py calls it
    monkeypatch.setattr(dlstudio, "UNetModel", lambda c, width, *args, **kwargs: model(
        c, width // 4, *args, **kwargs))
    theirs = dlstudio.UNetModel(3, 128, 3, 2, (4, 8), channel_mult=(1, 2, 3, 4)).eval()
    for weight in theirs.parameters():
        torch.nn.init.normal_(weight, 0.1 * (weight.ndim == 1), weight[0].numel() ** -0.5 / 2)
    path = tmp_path / "diffusion.pt"
    torch.save(theirs.state_dict(), path)
    net, alpha_bar = ddpm.load_pretrained(str(path))
    assert_same_outputs(net.eval(), theirs, 64)
    assert alpha_bar.equal(ddpm.make_alpha_bar("linear", 1000))
    run("ddpm", tmp_path, "--init_from", path, "--sample", 2, "--sample_steps", 2)
    assert len(pictures(tmp_path / "generated")) == 2
