"""What a user waits for, against what they would run instead, side by side in one run.

    python tests/bench.py                       # all rows, some minutes
    python tests/bench.py --rows dcgan batches
    python tests/bench.py --smallest            # to see that it works: the figures mean nothing

Ours and theirs take turns (A B A B ...). A row shows the medians and the ratio of the pairs, with
its spread: above 1 where ours is better. Theirs is what tutorials do: float32, eager, BCELoss on a
sigmoid, .item() each step, ImageFolder and DataLoader. Figures are images a second, or seconds
where a row says so.
"""
import argparse
import contextlib
import csv
import math
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import cgan  # noqa: E402
import data  # noqa: E402
import dcgan  # noqa: E402
import ddpm  # noqa: E402
import fid  # noqa: E402

DEVICE = data.pick_device()


def timed(work):
    """Seconds that work() takes; on CUDA by its events."""
    if DEVICE.type != "cuda":
        began = time.perf_counter()
        work()
        return time.perf_counter() - began
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000


def main_rate(script, folder, steps, **constants):
    """Images a second of a script's own main(), from the last row of its log."""
    before = script.config()
    vars(script).update(before, OUT_DIR=str(folder), MAX_STEPS=3 * steps, LOG_EVERY=steps,
                        SAMPLE_EVERY=0, EPOCHS=10**6, **constants)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # its log; stdout is for the table
            script.main()
    finally:
        vars(script).update(before)
    with open(folder / "log.csv", encoding="utf-8") as file:
        return float(list(csv.DictReader(file))[-1]["images_per_s"])


def folder_of(images, path):
    """Write uint8 images (N, C, H, W) as JPEG files in a class folder, for ImageFolder."""
    (path / "class").mkdir(parents=True)
    for i, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
        data.picture(image).save(path / "class" / f"{i:06}.jpg", quality=90)
    return path


def image_folder(path, size, batch_size, workers):
    """The loader of the tutorials."""
    from torchvision import datasets, transforms

    steps = [transforms.Resize(size), transforms.CenterCrop(size), transforms.ToTensor(),
             transforms.Normalize((0.5,) * 3, (0.5,) * 3)]
    images = datasets.ImageFolder(path, transforms.Compose(steps))
    return torch.utils.data.DataLoader(images, batch_size, shuffle=True, num_workers=workers,
                                       drop_last=True)


def plain_gan(G, D, loader, steps, labelled):
    """The training loop of the tutorials: seconds for `steps` steps after a first one."""
    G, D = G.to(DEVICE), D.to(DEVICE)
    opt_G = torch.optim.Adam(G.parameters(), 2e-4, (0.5, 0.999))
    opt_D = torch.optim.Adam(D.parameters(), 2e-4, (0.5, 0.999))
    bce = nn.BCELoss()

    def endless():
        while True:
            yield from loader

    batches = endless()

    def step():
        x, y = (part.to(DEVICE) for part in next(batches))
        y = [y] if labelled else []
        real, fake = torch.ones(len(x), device=DEVICE), torch.zeros(len(x), device=DEVICE)
        D.zero_grad()
        p_real = D(x, *y).sigmoid()
        loss_real = bce(p_real, real)
        loss_real.backward()
        images = G(torch.randn(len(x), 100, device=DEVICE), *y)
        p_fake = D(images.detach(), *y).sigmoid()
        loss_fake = bce(p_fake, fake)
        loss_fake.backward()
        opt_D.step()
        G.zero_grad()
        p = D(images, *y).sigmoid()
        loss_G = bce(p, real)
        loss_G.backward()
        opt_G.step()
        return [v.item() for v in (loss_real + loss_fake, loss_G, p_real.mean(), p_fake.mean())]

    step()
    return timed(lambda: [step() for _ in range(steps)])


def plain_dcgan(loader, steps, size=64, width=64):
    G, D = dcgan.Generator(size, width=width), dcgan.Discriminator(size, width=width)
    return plain_gan(G, D, loader, steps, labelled=False)


def mnist_loader(tmp, batch_size, workers):
    """The drawn digits in MNIST's files, so that there is nothing to download, and their loader."""
    from torchvision import datasets, transforms

    images, labels = data.load("toy-digits", 28, tmp.parent)
    raw = tmp / "MNIST" / "raw"
    raw.mkdir(parents=True)
    pixels = struct.pack(">4I", 2051, len(images), 28, 28) + images.numpy().tobytes()
    classes = struct.pack(">2I", 2049, len(images)) + bytes(labels.tolist())
    for part in ("train", "t10k"):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(pixels)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(classes)
    steps = [transforms.ToTensor(), transforms.Normalize((0.5,), (0.5,))]
    digits = datasets.MNIST(tmp, transform=transforms.Compose(steps))
    return torch.utils.data.DataLoader(digits, batch_size, shuffle=True, num_workers=workers,
                                       drop_last=True)


def rounds(count, ours, theirs):
    """`count` pairs of figures, A B A B."""
    return [(ours(i), theirs(i)) for i in range(count)]


# ---- the rows: each returns pairs of figures, ours and theirs


def row_dcgan(tmp, small):
    """dcgan.py: training, faces/s"""
    size, width, batch, steps = (16, 4, 8, 1) if small else (64, 64, 128, 4)
    steps = 50 if DEVICE.type == "cuda" and not small else steps
    images, _ = data.load("toy-faces", size, tmp.parent)
    loader = image_folder(folder_of(images[:2000], tmp / "faces"), size, batch, 2)
    return rounds(
        1 if small else 4,
        lambda i: main_rate(dcgan, tmp / f"run{i}", steps, DATA="toy-faces", IMAGE_SIZE=size,
                            DATA_DIR=str(tmp.parent), WIDTH=width, BATCH_SIZE=batch),
        lambda i: steps * batch / plain_dcgan(loader, steps, size, width))


def row_batches(tmp, small):
    """batches of 64 px faces, from the cache"""
    images, _ = data.load("toy-faces", 16 if small else 64, tmp.parent)
    files = folder_of(images[:200 if small else 4000], tmp / "faces")
    loader = image_folder(files, 16 if small else 64, 128, 2)

    def ours(i):
        seconds = timed(lambda: [x for x, _ in data.batches(images, None, 128, 0, i, DEVICE, True)])
        return len(images) // 128 * 128 / seconds

    return rounds(1 if small else 5, ours,
                  lambda i: len(loader) * 128 / timed(lambda: [x.to(DEVICE) for x, _ in loader]))


def row_cache(tmp, small):
    """decoding 178x218 photos to 64 px, once"""
    images, _ = data.load("toy-faces", 16 if small else 64, tmp.parent)
    large = nn.functional.interpolate(images[:100 if small else 2000].float(), (218, 178))
    files = folder_of(large.byte(), tmp / "photos")
    loader = image_folder(files, 64, 10, 2)
    return rounds(
        1 if small else 3,
        lambda i: len(large) / timed(lambda: data.load(str(files), 64, tmp / f"cache{i}")),
        lambda i: len(large) / timed(lambda: [x for x, _ in loader]))


def row_digits(tmp, small):
    """batches of MNIST"""
    loader = mnist_loader(tmp, 128, workers=2)
    images, labels = data.load("mnist", 28, tmp)
    count = len(loader) * 128
    return rounds(
        1 if small else 5,
        lambda i: count / timed(lambda: list(data.batches(images, labels, 128, 0, i, DEVICE))),
        lambda i: count / timed(lambda: [x.to(DEVICE) for x, _ in loader]))


def row_start(tmp, small):
    """dcgan.py: seconds from start to the end of step 1, cached"""
    size, width, batch = (16, 4, 8) if small else (64, 64, 128)
    images, _ = data.load("toy-faces", size, tmp.parent)
    files = folder_of(images[:200 if small else 4000], tmp / "faces")
    flags = ["--data", str(files), "--data_dir", str(tmp), "--image_size", str(size), "--width",
             str(width), "--batch_size", str(batch), "--max_steps", "1", "--sample_every", "0"]

    def seconds(command):
        began = time.perf_counter()
        process = subprocess.Popen([sys.executable, *map(str, command)], stdout=subprocess.PIPE)
        process.stdout.readline()  # both print a line after their first step
        taken = time.perf_counter() - began
        process.communicate()
        return taken

    plain = [ROOT / "tests" / "bench.py", "--first_step", files, size, width, batch]
    ours = [[ROOT / "dcgan.py", *flags, "--out_dir", tmp / f"out{i}"] for i in range(4)]
    seconds(ours[3])  # makes the cache
    return rounds(1 if small else 3, lambda i: seconds(ours[i]), lambda i: seconds(plain))


def row_cgan(tmp, small):
    """cgan.py: training, digits/s"""
    steps = 2 if small else 100
    loader = mnist_loader(tmp, 128, workers=0)
    return rounds(
        1 if small else 5,
        lambda i: main_rate(cgan, tmp / f"run{i}", steps, DATA="mnist", DATA_DIR=str(tmp)),
        lambda i: steps * 128 / plain_gan(cgan.Generator(), cgan.Discriminator(), loader, steps,
                                          labelled=True))


def diffusers_unet(size, channels, settings):
    """The U-Net that ddpm.py makes of the settings, as diffusers builds it; None without it."""
    try:
        from diffusers import UNet2DModel
    except ImportError:
        return None
    widths = [settings["CHANNELS"] * m for m in settings["MULTS"]]
    attention = ["Attn" * (size // 2**i in settings["ATTENTION"]) for i in range(len(widths))]
    return UNet2DModel(
        in_channels=channels, out_channels=channels, layers_per_block=settings["BLOCKS"],
        block_out_channels=widths, down_block_types=[f"{a}DownBlock2D" for a in attention],
        up_block_types=[f"{a}UpBlock2D" for a in attention[::-1]], attention_head_dim=None,
        norm_num_groups=math.gcd(128, settings["CHANNELS"]) // 4 or 1, norm_eps=1e-6,
        flip_sin_to_cos=False, freq_shift=1, downsample_padding=0).to(DEVICE)


def plain_ddpm(net, images, batch, steps):
    """The training loop of the tutorials: seconds for `steps` steps after a first one.

    It gets its batches from data.py: the rows on training compare networks and steps alone.
    """
    from diffusers import DDPMScheduler

    noisy, opt = DDPMScheduler(1000), torch.optim.Adam(net.parameters(), 1e-3)
    batches = data.batches(images, None, batch, 0, 0, DEVICE)

    def step():
        x, _ = next(batches)
        eps, t = torch.randn_like(x), torch.randint(0, 1000, (len(x),), device=DEVICE)
        loss = nn.functional.mse_loss(net(noisy.add_noise(x, eps, t), t).sample, eps)
        opt.zero_grad()
        loss.backward()
        opt.step()
        return loss.item()

    step()
    return timed(lambda: [step() for _ in range(steps)])


def train_ddpm(tmp, small, name, size, batch, steps):
    """Pairs of images/s: ddpm.py with its settings for the data set, and diffusers' U-Net."""
    settings = {**ddpm.config(), **ddpm.PRESETS.get(name, {})}
    toys = "toy-digits" if name == "mnist" else "toy-faces"
    if small:
        size, batch, steps = 16, 8, 1
        settings.update(CHANNELS=8, MULTS=(1, 2), ATTENTION=(8,))
    images, _ = data.load(toys, size, tmp.parent)
    peer = diffusers_unet(size, images.shape[1], settings)
    settings.update(DATA=toys, DATA_DIR=str(tmp.parent), IMAGE_SIZE=size, BATCH_SIZE=batch)
    constants = {k: settings[k] for k in ddpm.FIXED}
    return peer and rounds(
        1 if small else 3,
        lambda i: main_rate(ddpm, tmp / f"run{i}", steps, **constants),
        lambda i: steps * batch / plain_ddpm(peer, images, batch, steps))


def row_ddpm(tmp, small):
    """ddpm.py: training, digits/s, against diffusers' U-Net"""
    return train_ddpm(tmp, small, "mnist", 28, 128, 50 if DEVICE.type == "cuda" else 5)


def row_ddpm_faces(tmp, small):
    """ddpm.py: training, 64 px faces/s, against diffusers' U-Net"""
    cuda = DEVICE.type == "cuda"
    return train_ddpm(tmp, small, "celeba", 64, 128 if cuda else 8, 30 if cuda else 3)


def row_ddpm_lucidrains(tmp, small):
    """ddpm.py: training, 32 px faces/s, against lucidrains' denoising-diffusion-pytorch"""
    try:
        from denoising_diffusion_pytorch import GaussianDiffusion, Unet
    except ImportError:
        return None
    size, batch, steps, width = (16, 8, 1, 8) if small else (32, 64, 5, 32)
    steps = 50 if DEVICE.type == "cuda" and not small else steps
    images, _ = data.load("toy-faces", size, tmp.parent)
    net = GaussianDiffusion(Unet(dim=width, dim_mults=(1, 2, 4)), image_size=size).to(DEVICE)
    opt = torch.optim.Adam(net.parameters(), 1e-3)
    batches = data.batches(images, None, batch, 0, 0, DEVICE)

    def step():
        loss = net(next(batches)[0] / 2 + 0.5)
        opt.zero_grad()
        loss.backward()
        opt.step()
        return loss.item()

    step()
    constants = dict(DATA="toy-faces", DATA_DIR=str(tmp.parent), IMAGE_SIZE=size, BATCH_SIZE=batch,
                     CHANNELS=width, ATTENTION=(8,), FLIP=False)
    return rounds(
        1 if small else 3,
        lambda i: main_rate(ddpm, tmp / f"run{i}", steps, **constants),
        lambda i: steps * batch / timed(lambda: [step() for _ in range(steps)]))


def row_ddpm_sample(tmp, small):
    """ddpm.py: digits sampled in 10 DDIM steps, images/s, against diffusers"""
    settings = dict(ddpm.config(), **(dict(CHANNELS=8) if small else {}))
    peer = diffusers_unet(28, 1, settings)
    if not peer:
        return None
    from diffusers import DDIMScheduler

    batch, steps = (2, 2) if small else (128 if DEVICE.type == "cuda" else 16, 10)
    attention = [28 // 2**i in settings["ATTENTION"] for i in range(3)]
    groups = math.gcd(128, settings["CHANNELS"]) // 4
    net = ddpm.UNet(1, settings["CHANNELS"], (1, 2, 4), 1, attention, groups).eval()
    net = net.to(DEVICE, memory_format=data.best_layout(DEVICE))
    fast = torch.compile(net) if data.pick_compile(True, DEVICE) else net
    alpha_bar, scheduler = ddpm.make_alpha_bar("linear", 1000), DDIMScheduler(1000)
    autocast = torch.autocast(DEVICE.type, torch.bfloat16, data.pick_bfloat16("auto", DEVICE))
    scheduler.set_timesteps(steps)

    def ours():
        with autocast:
            return ddpm.sample(fast, torch.randn(batch, 1, 28, 28, device=DEVICE), alpha_bar,
                               steps, "ddim")

    @torch.no_grad()
    def theirs():
        x = torch.randn(batch, 1, 28, 28, device=DEVICE)
        for t in scheduler.timesteps:
            x = scheduler.step(peer(x, t).sample, t, x).prev_sample
        return x

    ours(), theirs()
    return rounds(1 if small else 7, lambda i: batch / timed(ours), lambda i: batch / timed(theirs))


def row_fid(tmp, small):
    """fid.py: files to statistics, images/s, against pytorch-fid"""
    try:
        from pytorch_fid import fid_score
        from pytorch_fid import inception as theirs
    except ImportError:
        return None
    from torchvision.models.inception import Inception3

    torch.save(Inception3(1008, aux_logits=False, init_weights=False).state_dict(), tmp / "w.pth")
    theirs.load_state_dict_from_url = lambda *_, **__: torch.load(tmp / "w.pth", weights_only=True)
    count = 4 if small else 1000 if DEVICE.type == "cuda" else 100
    images, _ = data.load("toy-faces", 16 if small else 64, tmp.parent)
    files = sorted((folder_of(images[:count], tmp / "faces") / "class").iterdir())
    network, peer = fid.Inception(tmp / "w.pth").to(DEVICE), theirs.InceptionV3([3]).to(DEVICE)
    names, read = data.listing(tmp / "faces")
    return rounds(
        1 if small else 3,
        lambda i: count / timed(lambda: fid.statistics(
            fid.read_files(names, read, 50, tmp / "faces"), network)),
        lambda i: count / timed(lambda: fid_score.calculate_activation_statistics(
            files, peer, 50, 2048, DEVICE, 2)))


ROWS = {name[4:]: row for name, row in list(globals().items()) if name.startswith("row_")}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--smallest", action="store_true", help="see that every row runs")
    parser.add_argument("--first_step", nargs=4, help=argparse.SUPPRESS)  # row_start's other side
    args = parser.parse_args()
    if args.first_step:
        files, (size, width, batch) = args.first_step[0], map(int, args.first_step[1:])
        plain_dcgan(image_folder(files, size, batch, 2), 0, size, width)
        print("done", flush=True)
        return
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else DEVICE.type
    lines = [f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}", "",
             "| | ours | theirs | ratio (spread) |", "|---|--:|--:|--:|"]
    data.TOYS = 500 if args.smallest else data.TOYS
    with tempfile.TemporaryDirectory() as shared:
        for row in args.rows:
            title = ROWS[row].__doc__
            folder = Path(shared, row)
            folder.mkdir()
            pairs = ROWS[row](folder, args.smallest)
            if not pairs:
                lines.append(f"| {title} | | | not installed |")
                continue
            ours, theirs = (statistics.median(column) for column in zip(*pairs))
            ratios = sorted(b / a if "seconds" in title else a / b for a, b in pairs)
            lines.append(f"| {title} | {ours:,.4g} | {theirs:,.4g} | "
                         f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) |")
    print(*lines, sep="\n")


if __name__ == "__main__":
    main()
