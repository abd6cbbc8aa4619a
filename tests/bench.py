"""The speed of the scripts against what a user would run instead, side by side in one run.

    python tests/bench.py 2>log.txt             # all rows, some minutes
    python tests/bench.py --rows cgan batches   # those with one of these words in their titles
    python tests/bench.py --smallest            # to see that it works: its figures mean nothing

Ours and theirs take turns. A row shows both medians, in images a second, and the ratio, its median
and range: above 1, ours is faster. Theirs is what tutorials do: float32, eager mode, BCELoss on a
sigmoid, .item() in each step, ImageFolder and DataLoader."""
import argparse
import os
import subprocess
import sys
import tempfile
import time
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
COUNT = 4000                    # photos and digits
FID_COUNT = 1000 if CUDA else 100
BATCH = 128
STEPS = 50 if CUDA else 5       # that are measured
SAMPLES = 128 if CUDA else 16
SMALLEST = dict(TURNS=1, COUNT=20, FID_COUNT=2, BATCH=2, STEPS=1, SAMPLES=1)


def prepare():
    """Draw the data of all rows: photos of 178x218 pixels, and digits as MNIST's files."""
    os.makedirs("photos/class")
    photos = F.interpolate(data.load("toy-faces", 64, limit=COUNT)[0], (218, 178))
    for i, pixels in enumerate(photos.permute(0, 2, 3, 1).numpy()):
        Image.fromarray(pixels).save(f"photos/class/{i}.jpg", quality=90)
    digits, labels = data.load("toy-digits", 28, limit=COUNT)
    os.makedirs("data/MNIST/raw")
    for name, array in (("images-idx3", digits[:, 0]), ("labels-idx1", labels)):
        content = np.array([2048 + array.ndim, *array.shape], ">i4").tobytes()
        content += array.byte().numpy().tobytes()
        for part in ("train", "t10k"):
            Path(f"data/MNIST/raw/{part}-{name}-ubyte").write_bytes(content)


def rate(number, work):
    """How many a second, where work() makes or reads that number of them."""
    began = time.perf_counter()
    work()
    if CUDA:
        torch.cuda.synchronize()
    return number / (time.perf_counter() - began)


def python(*args):
    subprocess.run([sys.executable, *args], check=True, stdout=subprocess.DEVNULL)


def make_loader(source, workers=2):
    """The data loader of the tutorials: of MNIST, or of a folder of photos."""
    steps = [transforms.ToTensor(), transforms.Normalize((0.5,), (0.5,))]
    if source == "mnist":
        images = datasets.MNIST("data", transform=transforms.Compose(steps))
    else:
        resize = [transforms.Resize(64), transforms.CenterCrop(64)]
        images = datasets.ImageFolder(source, transforms.Compose(resize + steps))
    return DataLoader(images, BATCH, shuffle=True, num_workers=workers, drop_last=True)


def plain_gan(script, loader):
    """The training loop of the tutorials, with the networks of cgan.py or dcgan.py."""
    G, D = script.Generator().to(DEVICE), script.Discriminator().to(DEVICE)
    opt_G, opt_D = [torch.optim.Adam(net.parameters(), 2e-4, (0.5, 0.999)) for net in (G, D)]
    bce = torch.nn.BCELoss()
    for x, y in chain.from_iterable(repeat(loader)):  # epoch after epoch
        x = x.to(DEVICE)
        y = [y.to(DEVICE)] if script is cgan else []
        fake = G(torch.randn(len(x), 100, device=DEVICE), *y)
        p_real, p_fake = D(x, *y).sigmoid(), D(fake.detach(), *y).sigmoid()
        loss_D = bce(p_real, torch.ones_like(p_real)) + bce(p_fake, torch.zeros_like(p_fake))
        opt_D.zero_grad()
        loss_D.backward()
        opt_D.step()
        p = D(fake, *y).sigmoid()
        loss_G = bce(p, torch.ones_like(p))
        opt_G.zero_grad()
        loss_G.backward()
        opt_G.step()
        yield [value.item() for value in (loss_D, loss_G, p_real.mean(), p_fake.mean())]


def plain_ddpm():
    """The same for ddpm.py's U-Net, but with our batches, so that only the training differs."""
    net, alpha_bar = ddpm.UNet().to(DEVICE), ddpm.make_alpha_bar("linear", 1000).float().to(DEVICE)
    opt = torch.optim.Adam(net.parameters(), 1e-3)
    for x, _ in map(data.Batches(data.load("mnist", 28)[0], None, BATCH, device=DEVICE), count()):
        eps, t = torch.randn_like(x), torch.randint(1, 1001, (len(x),), device=DEVICE)
        a = alpha_bar[t].view(-1, 1, 1, 1)
        loss = F.mse_loss(net(a.sqrt() * x + (1 - a).sqrt() * eps, t), eps)
        opt.zero_grad()
        loss.backward()
        opt.step()
        yield loss.item()


def compare_training(script, source, steps, make_loop):
    def ours():  # by the last two rows of its log
        out = tempfile.mkdtemp(dir=".")
        flags = (f"--data {source} --out_dir {out} --batch_size {BATCH} --epochs 1000000 "
                 f"--max_steps {3 * steps} --log_every {steps} --sample_every 0")
        python(script.__file__, *flags.split())
        seconds = np.genfromtxt(Path(out, "log.csv"), delimiter=",", names=True)["time"]
        return steps * BATCH / (seconds[-1] - seconds[-2])

    def theirs():
        loop = make_loop()
        next(loop)  # the first step takes longer
        return rate(steps * BATCH, lambda: list(islice(loop, steps)))

    return ours, theirs


def compare_start():
    flags = f"--data photos --batch_size {BATCH} --max_steps 1 --sample_every 0 --out_dir".split()
    code = (f"import sys; sys.path.append({str(TESTS)!r}); import bench; bench.BATCH = {BATCH}; "
            "next(bench.plain_gan(bench.dcgan, bench.make_loader('photos')))")
    data.load("photos", 64)  # makes the cache
    return (lambda: rate(1, lambda: python(dcgan.__file__, *flags, tempfile.mkdtemp(dir="."))),
            lambda: rate(1, lambda: python("-c", code)))


def compare_loading(number, work):
    """work() reads that number of images; theirs is an epoch of the data loader."""
    loader = make_loader("photos")
    theirs = partial(rate, len(loader) * BATCH, lambda: [len(x.to(DEVICE)) for x, _ in loader])
    return partial(rate, number, work), theirs


def compare_batches():
    batches = data.Batches(data.load("photos", 64)[0], None, BATCH, flip=True, device=DEVICE)
    total = len(batches)
    return compare_loading(total * BATCH, lambda: [len(batches(i)[0]) for i in range(total)])


def compare_sampling():
    from diffusers import DDIMScheduler
    net = ddpm.UNet().eval().to(DEVICE)
    noise, alpha_bar = torch.randn(SAMPLES, 1, 28, 28), ddpm.make_alpha_bar("linear", 1000)
    scheduler = DDIMScheduler(1000)
    scheduler.set_timesteps(10)

    @torch.no_grad()
    def theirs():
        x = noise.to(DEVICE)
        for t in scheduler.timesteps:
            x = scheduler.step(net(x, t.repeat(len(x)).to(DEVICE) + 1), t, x).prev_sample

    def ours():
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=CUDA):
            list(ddpm.sample(net, noise.to(DEVICE), alpha_bar, 10, eta=0, order=1))

    ours(), theirs()  # the first time takes longer
    return partial(rate, SAMPLES, ours), partial(rate, SAMPLES, theirs)


def compare_fid():
    import fid
    from pytorch_fid import fid_score, inception
    weights = models.Inception3(1008, aux_logits=False, init_weights=False).state_dict()
    torch.save(weights, "weights.pth")
    network = fid.Inception("weights.pth").to(DEVICE)
    with mock.patch.object(inception, "load_state_dict_from_url", return_value=weights):
        peer = inception.InceptionV3().to(DEVICE)
    names, root = data.list_files(Path("photos/class"))
    read = partial(fid.read_files, names[:FID_COUNT], root, FID_COUNT, 50)
    paths = [root / name for name in names[:FID_COUNT]]
    theirs = partial(fid_score.calculate_activation_statistics, paths, peer, 50, 2048, DEVICE, 2)
    ours = partial(rate, FID_COUNT, lambda: fid.statistics(read(), network))
    return ours, partial(rate, FID_COUNT, theirs)


ROWS = {  # each returns two functions, for one figure of ours and one of theirs
    "dcgan.py: training, photos": lambda: compare_training(
        dcgan, "photos", STEPS, lambda: plain_gan(dcgan, make_loader("photos"))),
    "cgan.py: training, digits": lambda: compare_training(
        cgan, "mnist", 10 * STEPS, lambda: plain_gan(cgan, make_loader("mnist", 0))),
    "ddpm.py: training, digits": lambda: compare_training(
        ddpm, "mnist", STEPS, plain_ddpm),
    "dcgan.py: starts of a run, up to its first step": compare_start,
    "batches of 64 px photos, from the cache": compare_batches,
    "decoding 178x218 photos to 64 px, once": lambda: compare_loading(
        COUNT, lambda: data.load("photos", 64, tempfile.mkdtemp(dir="."))),
    "ddpm.py: digits sampled in 10 DDIM steps, against diffusers": compare_sampling,
    "fid.py: files to statistics, against pytorch-fid": compare_fid,
}


def measure(title):
    """The row's line of the table."""
    try:
        ours, theirs = ROWS[title]()
        a, b = np.array([(ours(), theirs()) for _ in range(TURNS)]).T
    except ModuleNotFoundError as error:
        return f"| {title} | | | {error.name} is not installed |"
    ratio = f"{np.median(a / b):.2f} ({min(a / b):.2f} to {max(a / b):.2f})"
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
