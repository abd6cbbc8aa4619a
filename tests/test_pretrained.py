"""ddpm.py --init_from: layouts, file formats, refusals. Against the packages: test_peers.py."""
import json
import struct
import urllib.error

import numpy as np
import pytest
import torch
from conftest import checkpoint, log_rows
from test_ddpm import files, randomised

import ddpm

CONFIG = dict(  # as diffusers writes it for a small network of Ho et al.'s kind
    _class_name="UNet2DModel", _diffusers_version="0.1", act_fn="silu", attention_head_dim=None,
    block_out_channels=[8, 16, 16], center_input_sample=False,
    down_block_types=["DownBlock2D", "AttnDownBlock2D", "DownBlock2D"], downsample_padding=0,
    flip_sin_to_cos=False, freq_shift=1, in_channels=3, layers_per_block=2,
    mid_block_scale_factor=1, norm_eps=1e-6, norm_num_groups=4, out_channels=3, sample_size=16,
    time_embedding_type="positional", up_block_types=["UpBlock2D", "AttnUpBlock2D", "UpBlock2D"])
SCHEDULER = dict(_class_name="DDPMScheduler", beta_end=0.02, beta_schedule="linear",
                 beta_start=0.0001, clip_sample=True, num_train_timesteps=1000,
                 trained_betas=None, variance_type="fixed_large")
NET = dict(in_channels=3, channels=8, mults=[1, 2, 2], blocks=2, attention=[False, True, False],
           groups=4)


def places(levels, blocks, attention):
    """Pairs of prefixes, diffusers' and ours, from the structure of the network."""
    yield from (("conv_in", "conv_in"), ("conv_norm_out", "norm_out"), ("conv_out", "conv_out"),
                ("time_embedding.linear_1", "time.0"), ("time_embedding.linear_2", "time.2"),
                ("mid_block.resnets.0", "middle.0"), ("mid_block.resnets.1", "middle.1"),
                ("mid_block.attentions.0", "middle.0.attention"))
    for side, extra, last in (("down", 0, levels - 1), ("up", 1, levels - 1)):
        n = 0
        for level in range(levels):
            for i in range(blocks + extra):
                yield f"{side}_blocks.{level}.resnets.{i}", f"{side}.{n}"
                if attention[level if side == "down" else levels - 1 - level]:
                    yield f"{side}_blocks.{level}.attentions.{i}", f"{side}.{n}.attention"
                n += 1
            if level < last:
                yield f"{side}_blocks.{level}.{side}samplers.0.conv", f"{side}.{n}"
                n += 1


def in_diffusers_names(net, old):
    """Our state dict as diffusers would name it, attention in its old or new way."""
    q, k, v, out = (["query", "key", "value", "proj_attn"] if old else
                    ["to_q", "to_k", "to_v", "to_out.0"])
    leaves = {"norm": "group_norm", "time": "time_emb_proj", "skip": "conv_shortcut", "out": out}
    ours, theirs = net.state_dict(), {}
    for there, here in places(len(net.args["mults"]), net.args["blocks"], net.args["attention"]):
        for name in [n for n in ours if n.startswith(here + ".")]:
            *leaf, kind = name[len(here) + 1:].split(".")
            if leaf == ["attention"] or leaf[:1] == ["attention"]:
                continue  # has its own place
            value = ours.pop(name)
            if leaf == ["qkv"]:
                theirs.update({f"{there}.{p}.{kind}": w.clone()
                               for p, w in zip((q, k, v), value.chunk(3))})
            else:
                leaf = [leaves.get(part, part) for part in leaf]
                theirs[".".join([there, *leaf, kind])] = value
    assert not ours
    return theirs


def safetensors(tensors, **changes):
    """The bytes of a .safetensors file; `changes` replaces entries of its header."""
    header, data = {"__metadata__": {"format": "pt"}}, b""
    kinds = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    for name, tensor in tensors.items():
        raw = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        header[name] = dict(dtype=kinds[tensor.dtype], shape=list(tensor.shape),
                            data_offsets=[len(data), len(data) + len(raw)])
        data += raw
    text = json.dumps({**header, **changes}).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.fixture
def net():
    return randomised(ddpm.UNet(**NET)).eval()


def write(folder, net, old=False, kind="safetensors", config={}, scheduler={}):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    (folder / "scheduler_config.json").write_text(json.dumps({**SCHEDULER, **scheduler}))
    weights, path = in_diffusers_names(net, old), folder / f"diffusion_pytorch_model.{kind}"
    if kind == "safetensors":
        path.write_bytes(safetensors(weights))
    else:
        torch.save(weights, path)
    ddpm.read_pretrained.cache_clear()
    return folder


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_folder_in_diffusers_layout(old, kind, net, tmp_path):
    loaded = ddpm.UNet.from_pretrained(write(tmp_path / "hub", net, old, kind))
    assert not loaded.training
    for (name, a), b in zip(net.state_dict().items(), loaded.state_dict().values()):
        assert torch.equal(a, b), name
    settings = ddpm.parse_flags(["--init_from", str(tmp_path / "hub"), "--data", "celeba"])
    assert (settings["IMAGE_SIZE"], settings["TIMESTEPS"]) == (16, 1000)
    assert (settings["SCHEDULE"], settings["VARIANCE"]) == ("linear", "large")
    assert settings["FLIP"] and settings["MULTS"] == (1, 2, 2) and settings["ATTENTION"] == (8,)
    flags = ["--init_from", str(tmp_path / "hub"), "--variance", "small", "--image_size", "32"]
    assert ddpm.parse_flags(flags)["VARIANCE"] == "small"
    assert ddpm.parse_flags(flags)["IMAGE_SIZE"] == 32
    assert (settings["OPTIMIZER"], settings["LR"]) == ("adam", 1e-4)
    assert ddpm.parse_flags([*flags, "--optimizer", "muon"])["OPTIMIZER"] == "muon"
    with pytest.raises(ValueError, match="--mults comes with the weights"):
        ddpm.parse_flags([*flags, "--mults", "1"])
    with pytest.MonkeyPatch.context() as patch:  # the constant, as one who copies the file edits it
        patch.setattr(ddpm, "INIT_FROM", str(tmp_path / "hub"))
        assert ddpm.parse_flags(["--data", "celeba"]) == settings


@pytest.mark.parametrize("change, there", [
    (dict(act_fn="gelu"), "act_fn is gelu"),
    (dict(attention_head_dim=8), "attention_head_dim is 8"),
    (dict(resnet_time_scale_shift="scale_shift"), "resnet_time_scale_shift"),
    (dict(down_block_types=["DownBlock2D", "SkipDownBlock2D", "DownBlock2D"]), "down_block_types"),
    (dict(up_block_types=["UpBlock2D"] * 3), "up_block_types"), (dict(out_channels=6), "out_chann"),
    (dict(cross_attention_dim=64), "cross_attention_dim"), (dict(class_embed_type="x"), "class_em"),
    (dict(block_out_channels=[8, 12, 16]), "block_out"), (dict(downsample_padding=2), "is 2"),
    (dict(in_channels=None, out_channels=None), "another network"),
    (dict(norm_num_groups=3), "another network"), (dict(norm_num_groups=0), "another network"),
    (dict(sample_size=None), "not what was"), (dict(sample_size=[16, 16]), "not what was"),
    (dict(sample_size=None, down_block_types=["DownBlock2D"] * 3,
          up_block_types=["UpBlock2D"] * 3), "not what was"), (dict(sample_size=2), "too small"),
    (dict(down_block_types=["DownBlock2D"] * 2, up_block_types=["UpBlock2D"] * 2), "another net"),
    (dict(block_out_channels=[0, 0, 0]), "not what was"),
    (dict(layers_per_block=3), "another network"), (dict(down_block_types=None), "not what was")])
def test_what_the_unet_does_not_have_is_refused_by_name(change, there, net, tmp_path):
    write(tmp_path / "hub", net, config=change)
    with pytest.raises(ValueError, match=there):
        ddpm.UNet.from_pretrained(tmp_path / "hub")
    if "attention_head_dim" in change:  # as when it is left out: diffusers' default is 8
        config = {k: v for k, v in CONFIG.items() if k != "attention_head_dim"}
        (tmp_path / "hub" / "config.json").write_text(json.dumps(config))
        ddpm.read_pretrained.cache_clear()
        with pytest.raises(ValueError, match=there):
            ddpm.UNet.from_pretrained(tmp_path / "hub")


def test_a_mended_source_is_read_anew(net, tmp_path):
    write(tmp_path / "hub", net, config=dict(layers_per_block=3))
    with pytest.raises(ValueError, match="another network"):
        ddpm.UNet.from_pretrained(tmp_path / "hub")
    (tmp_path / "hub" / "config.json").write_text(json.dumps(CONFIG))
    ddpm.UNet.from_pretrained(tmp_path / "hub")


def test_strange_bytes_are_refused_with_the_name_of_their_source(net, tmp_path):
    write(tmp_path / "hub", net)
    (tmp_path / "hub" / "config.json").write_bytes(b"\xff\xfe{}")
    torch.save({"input_blocks.0.0.weight": torch.ones(3)}, tmp_path / "diffusion.pt")
    for source in ("hub", "diffusion.pt"):
        with pytest.raises(ValueError, match=f"{source}: not what was"):
            ddpm.UNet.from_pretrained(tmp_path / source)


@pytest.mark.parametrize("change", [
    dict(prediction_type="v_prediction"), dict(beta_schedule="sigmoid"), dict(beta_end=0.03),
    dict(trained_betas=[0.1]), dict(variance_type="learned_range"), dict(thresholding=True),
    dict(clip_sample=False), dict(num_train_timesteps=500), dict(new_option=1),
    dict(num_train_timesteps=0)])
def test_what_the_diffusion_does_not_have_is_refused_by_name(change, net, tmp_path):
    write(tmp_path / "hub", net, scheduler=change)
    (name, value), = change.items()
    if name == "num_train_timesteps":  # those betas are of other T
        name = "beta_" if value else "not what was"
    with pytest.raises(ValueError, match=name):
        ddpm.UNet.from_pretrained(tmp_path / "hub")


@pytest.mark.parametrize("T", [500, 4000])
def test_schedules_of_other_lengths(T, net, tmp_path):
    betas = dict(num_train_timesteps=T, beta_start=0.1 / T, beta_end=20 / T)
    write(tmp_path / "a", net, scheduler=betas)
    assert ddpm.parse_flags(["--init_from", str(tmp_path / "a")])["TIMESTEPS"] == T
    cosine = dict(num_train_timesteps=T, beta_schedule="squaredcos_cap_v2")
    write(tmp_path / "b", net, scheduler=cosine)
    assert ddpm.parse_flags(["--init_from", str(tmp_path / "b")])["SCHEDULE"] == "cosine"


def test_half_precision_weights():
    tensors = {"a": torch.randn(3, 5).half(), "b": torch.randn(7).bfloat16(), "c": torch.ones(2)}
    read = ddpm.read_safetensors(bytearray(safetensors(tensors)))
    assert all(torch.equal(read[k], v) and read[k].dtype == v.dtype for k, v in tensors.items())


HOSTILE = dict(
    beyond=dict(a=dict(dtype="F32", shape=[9], data_offsets=[0, 36])),
    overlap=dict(b=dict(dtype="F32", shape=[2], data_offsets=[4, 12])),
    gap=dict(a=dict(dtype="F32", shape=[1], data_offsets=[0, 4])),
    backwards=dict(a=dict(dtype="F32", shape=[2], data_offsets=[8, 0])),
    negative=dict(a=dict(dtype="F32", shape=[2], data_offsets=[-8, 0])),
    shape=dict(a=dict(dtype="F32", shape=[-1, -2], data_offsets=[0, 8])),
    huge=dict(a=dict(dtype="F32", shape=[2**62, 4], data_offsets=[0, 8])),
    text=dict(a=dict(dtype="F32", shape=["x"], data_offsets=[0, 8])),
    kind=dict(a=dict(dtype="OBJECT", shape=[2], data_offsets=[0, 8])),
    entry=dict(a=7))


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_headers_are_refused(name, tmp_path):
    two = dict(a=torch.ones(2), b=torch.ones(2))
    (tmp_path / "x.safetensors").write_bytes(safetensors(two, **HOSTILE[name]))
    with pytest.raises(ValueError, match="no whole file of weights"):
        ddpm.read_weights(tmp_path / "x.safetensors")


@pytest.mark.parametrize("content", [
    b"", b"1234", struct.pack("<Q", 2**63) + b"{}", struct.pack("<Q", 10**9) + b"{}",
    struct.pack("<Q", 3) + b"{]}", struct.pack("<Q", 2) + b"[]",
    struct.pack("<Q", 200_000) + b"[" * 200_000, safetensors(dict(a=torch.ones(9)))[:-1]])
def test_damaged_files_are_refused(content, tmp_path):
    for name in ("x.safetensors", "x.bin"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match="no whole file of weights"):
            ddpm.read_weights(tmp_path / name)


def test_nothing_in_a_file_of_weights_runs(tmp_path):
    class Evil:
        def __reduce__(self):
            return (pytest.fail, ("code in a file of weights ran",))

    torch.save(dict(a=Evil()), tmp_path / "x.bin")
    with pytest.raises(ValueError, match="no whole file of weights"):
        ddpm.read_weights(tmp_path / "x.bin")


def test_a_hub_repository_is_fetched_once(net, tmp_path, monkeypatch):
    there, asked = write(tmp_path / "there", net, kind="bin"), []

    def download(url, path):
        asked.append(url)
        name = url.split("/")[-1]
        if not (there / name).exists():
            raise urllib.error.HTTPError(url, 404, "Not Found", None, None)
        with open(path, "wb") as file:
            file.write((there / name).read_bytes())

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "cache"))
    for attempt in range(2):
        ddpm.read_pretrained.cache_clear()
        loaded = ddpm.UNet.from_pretrained("some/one.net-2")
        assert torch.equal(loaded.conv_in.weight, net.conv_in.weight)
    base = "https://huggingface.co/some/one.net-2/resolve/main/"
    weights = ["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"]
    names = ["config.json", "scheduler_config.json", *weights]
    assert asked == [base + name for name in [*names, weights[0]]]  # .safetensors may appear yet

    def no_network(url, path):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    with pytest.raises(OSError, match="no network.*folder"):
        ddpm.UNet.from_pretrained("another/one")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "config.json").write_text("{")
    with pytest.raises(ValueError, match="text: not what was expected"):
        ddpm.UNet.from_pretrained(tmp_path / "text")
    for source in ("nowhere", "no/such/file.pt", "../up/there", "a b/c"):
        with pytest.raises(OSError, match="no such file"):
            ddpm.UNet.from_pretrained(source)


def test_sampling_and_fine_tuning(run, net, tmp_path, images):
    hub = write(tmp_path / "hub", net)
    out = tmp_path / "out"
    flags = ["--init_from", hub, "--sample_steps", 3, "--batch_size", 8]
    run(ddpm, out, "--sample", 9, *flags)
    made = files(out / "generated")
    assert len(made) == 9 and not (out / "ckpt.pt").exists()
    run(ddpm, out, "--sample", 9, "--resume", *flags)
    assert files(out / "generated") == made
    with pytest.raises(ValueError, match="made otherwise"):
        run(ddpm, out, "--sample", 9, "--resume", *flags, "--image_size", 32)
    with pytest.raises(ValueError, match="3 of them|there are 1000"):
        run(ddpm, out, "--sample", 9, "--init_from", hub, "--sample_steps", 1001)

    tune = ["--data", images, "--batch_size", 8]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(__import__("conftest").TINY, "ddpm", [])
        run(ddpm, out, "--init_from", hub, "--max_steps", 2, *tune)
        with pytest.raises(ValueError, match="begins anew"):
            run(ddpm, out, "--init_from", hub, "--resume", *tune)
        np.save(tmp_path / "grey.npy", np.zeros((9, 16, 16), np.uint8))
        with pytest.raises(ValueError, match="has 1 channels"):
            run(ddpm, tmp_path / "b", "--init_from", hub, "--data", tmp_path / "grey.npy")
    first = checkpoint(out)
    assert first["config"]["LR"] == 1e-4 and first["config"]["VARIANCE"] == "large"
    moved = (first["net"]["conv_in.weight"] - net.conv_in.weight).abs().max()
    assert 0 < moved < 1e-3  # from those weights, by two small steps
    for file in hub.iterdir():
        file.unlink()  # the checkpoint needs them no more
    run(ddpm, out, "--resume", "--max_steps", 3)
    run(ddpm, out, "--sample", 2, "--sample_steps", 3)
    assert checkpoint(out)["step"] == 3 and len(log_rows(out)) == 3
    assert checkpoint(out)["unet"]["groups"] == 4
