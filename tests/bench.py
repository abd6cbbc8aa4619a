"""The speed of the scripts against what a user would run instead, side by side in one run.

    python tests/bench.py 2>log.txt     # some minutes; needs pytorch-fid

Ours and theirs take turns. A row shows both medians, in images a second, and the ratio, its median
and range: above 1, ours is faster. Theirs is what tutorials do: float32, eager mode, BCELoss on a
sigmoid, .item() in each step, ImageFolder and DataLoader."""
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
        command = [sys.executable, script.__file__, *flags.split()]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds = np.genfromtxt(Path(out, "log.csv"), delimiter=",", names=True)["time"]
        return steps * BATCH / (seconds[-1] - seconds[-2])

    def theirs():
        loop = make_loop()
        next(loop)  # the first step takes longer
        return rate(steps * BATCH, lambda: list(islice(loop, steps)))

    return ours, theirs


def compare_batches():
    """An epoch of ours, from the cache, and one of the data loader."""
    batches = data.Batches(data.load("photos", 64)[0], None, BATCH, flip=True, device=DEVICE)
    total, loader = len(batches), make_loader("photos")
    return (partial(rate, total * BATCH, lambda: [len(batches(i)[0]) for i in range(total)]),
            partial(rate, total * BATCH, lambda: [len(x.to(DEVICE)) for x, _ in loader]))


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
    "batches of 64 px photos, from the cache": compare_batches,
    "fid.py: files to statistics, against pytorch-fid": compare_fid,
}


def main():
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        prepare()
        print(f"{DEVICE}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
        print("| | ours | theirs | ratio (range) |\n|---|--:|--:|--:|")
        for title, row in ROWS.items():
            ours, theirs = row()
            a, b = np.array([(ours(), theirs()) for _ in range(TURNS)]).T
            ratio = f"{np.median(a / b):.2f} ({min(a / b):.2f} to {max(a / b):.2f})"
            print(f"| {title} | {np.median(a):,.4g} | {np.median(b):,.4g} | {ratio} |", flush=True)
        os.chdir(TESTS)


if __name__ == "__main__":
    main()
