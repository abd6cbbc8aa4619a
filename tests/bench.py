"""The speed of the scripts against what a user would run instead, side by side in one run.

    python tests/bench.py                       # all rows, some minutes
    python tests/bench.py --rows dcgan batches
    python tests/bench.py --smallest            # to see that it works: its figures mean nothing

Ours and theirs take turns. A row shows both medians, and the median and the range of their ratio:
above 1 where ours is better. Theirs is what tutorials do: float32, eager mode, BCELoss on a
sigmoid, .item() in each step, ImageFolder and DataLoader. Figures are images a second, or seconds
where a row says so. All images are drawn, so nothing is downloaded.
"""
import argparse
import itertools
import os
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

TESTS = Path(__file__).resolve().parent
sys.path.insert(0, str(TESTS.parent))

import cgan  # noqa: E402
import data  # noqa: E402
import dcgan  # noqa: E402
import ddpm  # noqa: E402

DEVICE, BFLOAT16, COMPILED = data.pick_device(compiled=True)
CUDA = DEVICE.type == "cuda"
PEERS = ("denoising_diffusion_pytorch", "diffusers", "pytorch_fid")

TURNS = 5
COUNT = 10_000                  # faces in an array, and digits
FILES = 2000                    # faces as JPEG files
FID_FILES = 1000 if CUDA else 100
SIZE = 64                       # of faces
BATCH = 128
STEPS = 50 if CUDA else 5       # that are measured
WIDTH = 64                      # of DCGAN
UNET = {}                       # changed settings of ddpm.py
SMALLEST = dict(TURNS=1, COUNT=50, FILES=50, FID_FILES=4, SIZE=16, BATCH=8, STEPS=1, WIDTH=4,
                UNET=dict(CHANNELS=8, MULTS=(1, 2), ATTENTION=(8,)))

# ---- data, in the working folder


def prepare():
    """Draw the data of all rows: faces as an array and as files, and digits as MNIST's files."""
    faces, _ = data.load("toy-faces", SIZE, limit=COUNT)
    np.save("faces.npy", faces.permute(0, 2, 3, 1).numpy())
    save_files(faces[:FILES], Path("faces/class"))
    save_files(F.interpolate(faces[:FILES], (218, 178)), Path("photos/class"))
    digits, labels = data.load("toy-digits", 28, limit=COUNT)
    raw = Path("data/MNIST/raw")
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        header = struct.pack(">4I", 2051, COUNT, 28, 28)
        Path(raw, f"{part}-images-idx3-ubyte").write_bytes(header + digits.numpy().tobytes())
        header = struct.pack(">2I", 2049, COUNT)
        Path(raw, f"{part}-labels-idx1-ubyte").write_bytes(header + bytes(labels.tolist()))


def save_files(images, folder):
    folder.mkdir(parents=True)
    for i, pixels in enumerate(images.permute(0, 2, 3, 1).numpy()):
        Image.fromarray(pixels).save(folder / f"{i}.jpg", quality=90)


def make_loader(images, first_steps, batch_size, workers):
    """The data loader of the tutorials."""
    steps = [*first_steps, transforms.ToTensor(), transforms.Normalize((0.5,), (0.5,))]
    images.transform = transforms.Compose(steps)
    return DataLoader(images, batch_size, shuffle=True, num_workers=workers, drop_last=True)


def face_loader(folder, size, batch_size):
    resize = [transforms.Resize(size), transforms.CenterCrop(size)]
    return make_loader(datasets.ImageFolder(folder), resize, batch_size, workers=2)


# ---- figures


def rate(count, work):
    """Images a second, if work() makes `count` of them."""
    began = time.perf_counter()
    work()
    if CUDA:
        torch.cuda.synchronize()
    return count / (time.perf_counter() - began)


def epoch_rate(batches, steps):
    some = itertools.islice(batches, steps)
    return rate(steps * BATCH, lambda: [x.to(DEVICE).shape for x, _ in some])


def loop_rate(loop, steps, batch_size):
    """Images a second of a training loop, which is a generator."""
    next(loop)
    return rate(steps * batch_size, lambda: list(itertools.islice(loop, steps)))


def main_rate(script, steps, **changes):
    """Images a second of a script's main(), from the last row of its log."""
    settings, ckpt = script.parse_flags([])
    settings.update(changes)
    settings.update(EPOCHS=10**6, MAX_STEPS=3 * steps, LOG_EVERY=steps, SAMPLE_EVERY=0)
    if COMPILED:
        torch.compiler.reset()  # else it gives up after a number of networks
    with tempfile.TemporaryDirectory() as out:
        settings.update(OUT_DIR=out)
        with mock.patch.multiple(script, **settings):
            script.main(settings, ckpt)
        log = np.genfromtxt(Path(out, "log.csv"), delimiter=",", names=True)
    return log["images_per_s"][-1]


def start_seconds(*command):
    """Seconds until a Python program prints its first line."""
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE)
    process.stdout.readline()
    passed = time.perf_counter() - began
    process.communicate()
    assert process.returncode == 0, command
    return passed


# ---- theirs


def plain_gan(G, D, loader, labelled):
    """The training loop of the tutorials."""
    G, D, bce = G.to(DEVICE), D.to(DEVICE), torch.nn.BCELoss()
    opt_G = torch.optim.Adam(G.parameters(), 2e-4, (0.5, 0.999))
    opt_D = torch.optim.Adam(D.parameters(), 2e-4, (0.5, 0.999))
    for x, y in itertools.chain.from_iterable(itertools.repeat(loader)):
        x, y = x.to(DEVICE), [y.to(DEVICE)] if labelled else []
        D.zero_grad()
        p_real = D(x, *y).sigmoid()
        loss_real = bce(p_real, torch.ones_like(p_real))
        loss_real.backward()
        images = G(torch.randn(len(x), 100, device=DEVICE), *y)
        p_fake = D(images.detach(), *y).sigmoid()
        loss_fake = bce(p_fake, torch.zeros_like(p_fake))
        loss_fake.backward()
        opt_D.step()
        G.zero_grad()
        p = D(images, *y).sigmoid()
        loss_g = bce(p, torch.ones_like(p))
        loss_g.backward()
        opt_G.step()
        for value in (loss_real + loss_fake, loss_g, p_real.mean(), p_fake.mean()):
            value.item()
        yield


def plain_dcgan(size, width, batch_size):
    G, D = dcgan.Generator(size, width=width), dcgan.Discriminator(size, width=width)
    return plain_gan(G, D, face_loader("faces", size, batch_size), labelled=False)


def plain_ddpm(net, compute_loss, name, size, batch_size):
    """The same for a diffusion model. Its batches are ours: only the training differs."""
    opt = torch.optim.Adam(net.parameters(), 1e-3)
    images, _ = data.load(name, size)
    get_batch = data.Batches(images, None, batch_size, device=DEVICE)
    for x, _ in map(get_batch, itertools.count()):
        loss = compute_loss(x)
        opt.zero_grad()
        loss.backward()
        opt.step()
        loss.item()
        yield


def diffusers_unet(image_channels, size, **changes):
    """The U-Net of ddpm.py, by diffusers."""
    from diffusers import UNet2DModel

    settings = {**vars(ddpm), **changes}
    widths = [settings["CHANNELS"] * mult for mult in settings["MULTS"]]
    sizes = [size // 2**level for level in range(len(widths))]
    kinds = ["Attn" if size in settings["ATTENTION"] else "" for size in sizes]
    net = UNet2DModel(
        size, image_channels, image_channels,
        block_out_channels=widths,
        layers_per_block=settings["BLOCKS"],
        down_block_types=[f"{kind}DownBlock2D" for kind in kinds],
        up_block_types=[f"{kind}UpBlock2D" for kind in reversed(kinds)],
        attention_head_dim=None,  # one head
        norm_num_groups=min(8, settings["CHANNELS"] // 4),
        norm_eps=1e-6,
        flip_sin_to_cos=False,
        freq_shift=1,
        downsample_padding=0)
    return net.to(DEVICE)


# ---- rows: each yields pairs of figures, ours and theirs


def row_dcgan():
    """dcgan.py: training, faces/s"""
    changes = dict(DATA="faces.npy", IMAGE_SIZE=SIZE, WIDTH=WIDTH, BATCH_SIZE=BATCH)
    for _ in range(TURNS):
        loop = plain_dcgan(SIZE, WIDTH, BATCH)
        yield main_rate(dcgan, STEPS, **changes), loop_rate(loop, STEPS, BATCH)


def row_batches():
    """batches of 64 px faces, from the cache"""
    images, _ = data.load("faces.npy", SIZE)
    return compare_batches(images, None, face_loader("faces", SIZE, BATCH))


def compare_batches(images, labels, loader):
    get_batch = data.Batches(images, labels, BATCH, flip=labels is None, device=DEVICE)
    batches = map(get_batch, itertools.count())
    for _ in range(TURNS):
        yield epoch_rate(batches, len(get_batch)), epoch_rate(loader, len(loader))


def row_cache():
    """decoding 178x218 photos to 64 px, once"""
    loader = face_loader("photos", SIZE, BATCH)
    for _ in range(TURNS):
        cache = tempfile.mkdtemp(dir=".")
        ours = rate(FILES, lambda: data.load("photos", SIZE, cache))
        yield ours, epoch_rate(loader, len(loader))


def row_digits():
    """batches of MNIST"""
    loader = make_loader(datasets.MNIST("data"), [], BATCH, workers=2)
    return compare_batches(*data.load("mnist", 28), loader)


def row_start():
    """dcgan.py: seconds from start to the end of step 1, cached"""
    data.load("faces", SIZE)  # makes the cache
    flags = f"--data faces --image_size {SIZE} --width {WIDTH} --batch_size {BATCH} --max_steps 1"
    ours = [TESTS.parent / "dcgan.py", *flags.split(), "--out_dir"]
    theirs = (f"import sys; sys.path.append({str(TESTS)!r}); import bench; "
              f"next(bench.plain_dcgan({SIZE}, {WIDTH}, {BATCH})); print(flush=True)")
    for turn in range(TURNS):
        yield start_seconds(*ours, f"out{turn}"), start_seconds("-c", theirs)


def row_cgan():
    """cgan.py: training, digits/s"""
    steps = 20 * STEPS
    loader = make_loader(datasets.MNIST("data"), [], BATCH, workers=0)
    for _ in range(TURNS):
        loop = plain_gan(cgan.Generator(), cgan.Discriminator(), loader, labelled=True)
        yield main_rate(cgan, steps, BATCH_SIZE=BATCH), loop_rate(loop, steps, BATCH)


def row_ddpm():
    """ddpm.py: training, digits/s, against diffusers' U-Net"""
    return compare_diffusers(1, "mnist", 28, BATCH, UNET)


def row_ddpm_faces():
    """ddpm.py: training, 64 px faces/s, against diffusers' U-Net"""
    changes = {**ddpm.PRESETS["celeba"], **UNET}
    return compare_diffusers(3, "faces.npy", SIZE, BATCH if CUDA else 8, changes)


def compare_diffusers(image_channels, name, size, batch_size, changes):
    from diffusers import DDPMScheduler

    net = diffusers_unet(image_channels, size, **changes)
    scheduler = DDPMScheduler(1000)

    def compute_loss(x):
        eps, t = torch.randn_like(x), torch.randint(0, 1000, (len(x),), device=DEVICE)
        return F.mse_loss(net(scheduler.add_noise(x, eps, t), t).sample, eps)

    return compare_ddpm(net, compute_loss, name, size, batch_size, changes)


def compare_ddpm(net, compute_loss, name, size, batch_size, changes):
    changes = dict(changes, DATA=name, IMAGE_SIZE=size, BATCH_SIZE=batch_size)
    for _ in range(TURNS):
        loop = plain_ddpm(net, compute_loss, name, size, batch_size)
        yield main_rate(ddpm, STEPS, **changes), loop_rate(loop, STEPS, batch_size)


def row_ddpm_lucidrains():
    """ddpm.py: training, 32 px faces/s, against lucidrains' denoising-diffusion-pytorch"""
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet

    size, net = SIZE // 2, Unet(dim=32, dim_mults=(1, 2, 4))
    net = GaussianDiffusion(net, image_size=size, auto_normalize=False).to(DEVICE)
    return compare_ddpm(net, net, "faces.npy", size, BATCH // 2, dict(ATTENTION=(8,)))


def row_ddpm_sample():
    """ddpm.py: digits sampled in 10 DDIM steps, images/s, against diffusers"""
    from diffusers import DDIMPipeline, DDIMScheduler

    net = ddpm.UNet().eval().to(DEVICE, memory_format=torch.channels_last)
    if COMPILED:
        net.compile()
    alpha_bar = ddpm.make_alpha_bar("linear", 1000)
    pipeline = DDIMPipeline(diffusers_unet(1, 28), DDIMScheduler(1000))
    count = BATCH if CUDA else BATCH // 8

    def ours():
        x = torch.randn(count, 1, 28, 28, device=DEVICE)
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=BFLOAT16):
            ddpm.sample(net, x, alpha_bar, 10, "ddim")

    def theirs():
        pipeline(count, num_inference_steps=10, output_type="np")

    ours(), theirs()  # the first time takes longer
    for _ in range(TURNS):
        yield rate(count, ours), rate(count, theirs)


def row_fid():
    """fid.py: files to statistics, images/s, against pytorch-fid"""
    from pytorch_fid import fid_score, inception
    from torchvision.models import Inception3

    import fid

    weights = Inception3(1008, aux_logits=False, init_weights=False).state_dict()
    torch.save(weights, "weights.pth")
    network = fid.Inception("weights.pth").to(DEVICE)
    with mock.patch.object(inception, "load_state_dict_from_url", return_value=weights):
        peer = inception.InceptionV3().to(DEVICE)
    files = sorted(Path("faces/class").iterdir())[:FID_FILES]
    theirs = fid_score.calculate_activation_statistics
    for _ in range(TURNS):
        yield (
            rate(FID_FILES, lambda: fid.statistics(fid.read_files(files, Path, 50), network)),
            rate(FID_FILES, lambda: theirs(files, peer, 50, 2048, DEVICE, num_workers=2)))


ROWS = {name[4:]: row for name, row in list(globals().items()) if name.startswith("row_")}


def measure(row):
    """The row's line of the table."""
    title = row.__doc__
    try:
        pairs = list(row())
    except ModuleNotFoundError as error:
        if error.name not in PEERS:
            raise
        return f"| {title} | | | {error.name} is not installed |"
    ratios = [b / a if "seconds" in title else a / b for a, b in pairs]
    a, b = (statistics.median(column) for column in zip(*pairs))
    ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    return f"| {title} | {a:,.4g} | {b:,.4g} | {ratio} |"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--smallest", action="store_true", help="see that every row runs")
    args = parser.parse_args()
    if args.smallest:
        globals().update(SMALLEST)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        prepare()
        lines = [measure(ROWS[name]) for name in args.rows]
        os.chdir(TESTS)
    print(f"{DEVICE}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print("| | ours | theirs | ratio (range) |", "|---|--:|--:|--:|", *lines, sep="\n")


if __name__ == "__main__":
    main()
