"""The speed of the scripts against what a user would run instead, side by side in one run.

    python tests/bench.py 2>log.txt             # all rows, some minutes
    python tests/bench.py --rows cgan batches   # those with one of these words in their titles
    python tests/bench.py --smallest            # to see that it works: its figures mean nothing

Ours and theirs take turns. A row shows both medians, and the ratio, its median and range: above 1,
ours is faster. Theirs is what tutorials do: float32, eager mode, BCELoss on a sigmoid, .item() in
each step, ImageFolder and DataLoader."""
import argparse
import os
import runpy
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stdout
from functools import partial
from itertools import chain, count, islice, repeat
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision import datasets, models, transforms

TESTS = Path(__file__).resolve().parent
sys.path.insert(0, str(TESTS.parent))

import cgan  # noqa: E402
import data  # noqa: E402
import dcgan  # noqa: E402
import ddpm  # noqa: E402

DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
CUDA = DEVICE.type == "cuda"
TURNS = 5 if CUDA else 3
COUNT = 10_000                  # faces in an array, and digits
FILES = 4000                    # faces as JPEG files
FID_FILES = 1000 if CUDA else 100
BATCH = 128
STEPS = 50 if CUDA else 5       # that are measured
SAMPLES = 128 if CUDA else 16
FACES = dict(channels=64, mults=[1, 2, 3, 4], blocks=2, attention=16)  # of ddpm.py's docstring
SMALLEST = dict(TURNS=1, COUNT=20, FILES=20, FID_FILES=2, BATCH=2, STEPS=1, SAMPLES=1,
                FACES=dict(FACES, channels=16))


def prepare():
    """Draw the data of all rows: faces as an array and as files, and digits as MNIST's files."""
    faces, _ = data.load("toy-faces", 64, limit=COUNT)
    np.save("faces.npy", faces.permute(0, 2, 3, 1).numpy())
    photos = F.interpolate(faces[:FILES], (218, 178))
    for folder, images in (("faces/class", faces[:FILES]), ("photos/class", photos)):
        os.makedirs(folder)
        for i, pixels in enumerate(images.permute(0, 2, 3, 1).numpy()):
            Image.fromarray(pixels).save(f"{folder}/{i}.jpg", quality=90)
    digits, labels = data.load("toy-digits", 28, limit=COUNT)
    os.makedirs("data/MNIST/raw")
    for name, array in (("images-idx3", digits[:, 0]), ("labels-idx1", labels)):
        header = np.array([2048 + array.ndim, *array.shape], ">i4").tobytes()
        for part in ("train", "t10k"):
            file = Path(f"data/MNIST/raw/{part}-{name}-ubyte")
            file.write_bytes(header + array.byte().numpy().tobytes())


def rate(number, work):
    """Images a second, where work() makes or reads that number of them."""
    began = time.perf_counter()
    work()
    if CUDA:
        torch.cuda.synchronize()
    return number / (time.perf_counter() - began)


def loop_rate(loop, steps, batch_size):
    """Images a second of a training loop, which is a generator, after a first step."""
    next(loop)
    return rate(steps * batch_size, lambda: list(islice(loop, steps)))


def script_rate(script, batch_size, steps, **flags):
    """Images a second of a script, as if it were started with these flags, by the last two rows of
    its log."""
    if CUDA:
        torch.compiler.reset()  # it compiles only so many networks in a process
    with tempfile.TemporaryDirectory() as out:
        flags.update(out_dir=out, batch_size=batch_size, epochs=10**6, max_steps=3 * steps,
                     log_every=steps, sample_every=0)
        argv = [f"{script.__name__}.py"]
        for key, value in flags.items():
            argv += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
        with mock.patch.object(sys, "argv", argv), redirect_stdout(sys.stderr):
            runpy.run_path(script.__file__, run_name="__main__")
        seconds = np.genfromtxt(Path(out, "log.csv"), delimiter=",", names=True)["time"]
        return steps * batch_size / (seconds[-1] - seconds[-2])


def make_loader(source, workers):
    """The data loader of the tutorials: of MNIST, or of a folder of faces."""
    steps = [transforms.ToTensor(), transforms.Normalize((0.5,), (0.5,))]
    if source == "mnist":
        images = datasets.MNIST("data", transform=transforms.Compose(steps))
    else:
        resize = [transforms.Resize(64), transforms.CenterCrop(64)]
        images = datasets.ImageFolder(source, transforms.Compose(resize + steps))
    return DataLoader(images, BATCH, shuffle=True, num_workers=workers, drop_last=True)


def plain_gan(script, source, workers):
    """The training loop of the tutorials, with the networks of cgan.py or dcgan.py."""
    G, D = script.Generator().to(DEVICE), script.Discriminator().to(DEVICE)
    opt_G, opt_D = [torch.optim.Adam(net.parameters(), 2e-4, (0.5, 0.999)) for net in (G, D)]
    bce = torch.nn.BCELoss()
    for x, y in chain.from_iterable(repeat(make_loader(source, workers))):  # epoch after epoch
        x = x.to(DEVICE)
        y = [y.to(DEVICE)] if script is cgan else []
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
        yield [x.item() for x in (loss_real + loss_fake, loss_g, p_real.mean(), p_fake.mean())]


def plain_ddpm(net, name, size, batch_size):
    """The same for a diffusion model, but with our batches, so that only the training differs."""
    from diffusers import DDPMScheduler
    opt, scheduler = torch.optim.Adam(net.parameters(), 1e-3), DDPMScheduler(1000)
    batches = data.Batches(data.load(name, size)[0], None, batch_size, device=DEVICE)
    for x, _ in map(batches, count()):
        eps, t = torch.randn_like(x), torch.randint(0, 1000, (len(x),), device=DEVICE)
        loss = F.mse_loss(net(scheduler.add_noise(x, eps, t), t).sample, eps)
        opt.zero_grad()
        loss.backward()
        opt.step()
        yield loss.item()


def diffusers_unet(image_channels, size, channels=32, mults=(1, 2, 4), blocks=1, attention=7):
    """The U-Net of ddpm.py, by diffusers."""
    from diffusers import UNet2DModel
    kinds = ["Attn" if size // 2**level <= attention else "" for level in range(len(mults))]
    return UNet2DModel(
        size, image_channels, image_channels, layers_per_block=blocks,
        block_out_channels=[channels * mult for mult in mults],
        down_block_types=[f"{kind}DownBlock2D" for kind in kinds],
        up_block_types=[f"{kind}UpBlock2D" for kind in reversed(kinds)],
        norm_num_groups=8, norm_eps=1e-6, attention_head_dim=None, flip_sin_to_cos=False,
        freq_shift=1, downsample_padding=0,
    ).to(DEVICE)


def compare_gan(script, source, workers, steps, **flags):
    return (lambda: script_rate(script, BATCH, steps, **flags),
            lambda: loop_rate(plain_gan(script, source, workers), steps, BATCH))


def compare_start():
    data.load("faces", 64)  # makes the cache
    flags = f"--data faces --batch_size {BATCH} --max_steps 1 --sample_every 0 --out_dir".split()
    theirs = (f"import sys; sys.path.append({str(TESTS)!r}); import bench; bench.BATCH = {BATCH}; "
              "next(bench.plain_gan(bench.dcgan, 'faces', 2))")

    def seconds(*command):
        began = time.perf_counter()
        subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - began

    return (lambda: seconds(TESTS.parent / "dcgan.py", *flags, tempfile.mkdtemp(dir=".")),
            lambda: seconds("-c", theirs))


def compare_loading(source, number, work):
    """work() reads or makes that number of images; theirs is an epoch of the data loader."""
    loader = make_loader(source, workers=2)
    return (lambda: rate(number, work),
            lambda: rate(len(loader) * BATCH, lambda: [len(x.to(DEVICE)) for x, _ in loader]))


def compare_batches(name, size, source):
    images, labels = data.load(name, size)
    batches = data.Batches(images, labels, BATCH, flip=labels is None, device=DEVICE)
    steps, loop = len(batches), map(batches, count())
    return compare_loading(source, steps * BATCH, lambda: [len(x) for x, _ in islice(loop, steps)])


def compare_ddpm(name, size, batch, **flags):
    net = diffusers_unet(1 if name == "mnist" else 3, size, **flags)
    return (lambda: script_rate(ddpm, batch, STEPS, data=name, image_size=size, **flags),
            lambda: loop_rate(plain_ddpm(net, name, size, batch), STEPS, batch))


def compare_sampling():
    from diffusers import DDIMPipeline, DDIMScheduler
    net = ddpm.UNet().eval().to(DEVICE, memory_format=torch.channels_last)
    if CUDA:
        net.compile()
    pipeline = DDIMPipeline(diffusers_unet(1, 28), DDIMScheduler(1000))
    theirs = partial(pipeline, SAMPLES, num_inference_steps=10, output_type="np")

    def ours():
        x = torch.randn(SAMPLES, 1, 28, 28, device=DEVICE)
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=CUDA):
            list(ddpm.sample(net, x, ddpm.make_alpha_bar("linear", 1000), 10, eta=0, order=1))

    ours(), theirs()  # the first time takes longer
    return lambda: rate(SAMPLES, ours), lambda: rate(SAMPLES, theirs)


def compare_fid():
    import fid
    from pytorch_fid import fid_score, inception
    weights = models.Inception3(1008, aux_logits=False, init_weights=False).state_dict()
    torch.save(weights, "weights.pth")
    network = fid.Inception("weights.pth").to(DEVICE)
    with mock.patch.object(inception, "load_state_dict_from_url", return_value=weights):
        peer = inception.InceptionV3().to(DEVICE)
    names, root = data.list_files(Path("faces/class"))
    names = names[:FID_FILES]
    read = partial(fid.read_files, names, root, FID_FILES, 50)
    theirs = partial(fid_score.calculate_activation_statistics, [root / name for name in names],
                     peer, 50, 2048, DEVICE, 2)
    return (lambda: rate(FID_FILES, lambda: fid.statistics(read(), network)),
            lambda: rate(FID_FILES, theirs))


ROWS = {  # each returns two functions, for one figure of ours and one of theirs
    "dcgan.py: training, faces/s": lambda: compare_gan(dcgan, "faces", 2, STEPS, data="faces.npy"),
    "batches of 64 px faces, from the cache": lambda: compare_batches("faces.npy", 64, "faces"),
    "decoding 178x218 photos to 64 px, once": lambda: compare_loading(
        "photos", FILES, lambda: data.load("photos", 64, tempfile.mkdtemp(dir="."))),
    "batches of MNIST": lambda: compare_batches("mnist", 28, "mnist"),
    "dcgan.py: seconds for a run of one step, cached": compare_start,
    "cgan.py: training, digits/s": lambda: compare_gan(cgan, "mnist", 0, 10 * STEPS),
    "ddpm.py: training, digits/s, against diffusers' U-Net":
        lambda: compare_ddpm("mnist", 28, BATCH),
    "ddpm.py: training, 64 px faces/s, against diffusers' U-Net":
        lambda: compare_ddpm("faces.npy", 64, BATCH if CUDA else 8, **FACES),
    "ddpm.py: digits sampled in 10 DDIM steps, images/s, against diffusers": compare_sampling,
    "fid.py: files to statistics, images/s, against pytorch-fid": compare_fid,
}


def measure(title):
    """The row's line of the table."""
    try:
        ours, theirs = ROWS[title]()
    except ModuleNotFoundError as error:
        return f"| {title} | | | {error.name} is not installed |"
    a, b = np.array([(ours(), theirs()) for _ in range(TURNS)]).T
    ratios = b / a if "seconds" in title else a / b
    ratio = f"{np.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    return f"| {title} | {np.median(a):,.4g} | {np.median(b):,.4g} | {ratio} |"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="+", default=[""], help="words of their titles")
    parser.add_argument("--smallest", action="store_true", help="see that every row runs")
    args = parser.parse_args()
    globals().update(SMALLEST if args.smallest else {})
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        prepare()
        print(f"{DEVICE}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
        print("| | ours | theirs | ratio (range) |\n|---|--:|--:|--:|")
        for title in ROWS:
            if any(word in title for word in args.rows):
                print(measure(title), flush=True)
        os.chdir(TESTS)


if __name__ == "__main__":
    main()
