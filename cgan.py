"""CGAN: digits on demand (Mirza & Osindero 2014, https://arxiv.org/abs/1411.1784).

Two fully connected networks play a game: the discriminator D learns to tell images of a data set
from those that the generator G makes of random numbers, G learns to make D take them for real. Both
are told the label, so that G learns to draw what it is asked for. --no-conditional leaves the label
out: the first GAN (Goodfellow et al. 2014, https://arxiv.org/abs/1406.2661).

    python cgan.py                                # conditional GAN on MNIST, into out/cgan
    python cgan.py --no-conditional --out_dir out/gan
    python cgan.py --sample 100 --label 7         # write a hundred sevens to out/cgan/generated
    python cgan.py --sample 8 --label 2,0,2,6     # these in turn; all classes in turn without it
    python cgan.py --data path/to/folders         # your own: a folder of images for each class

Measured: 50 epochs on MNIST take 21 minutes on 2 CPU cores; then a classifier reads 99.6 % of
10,000 samples as asked for.
To train on tensors of your own, in main() set images, uint8 (N, C, H, W), and labels, int64 (N,).
"""
import argparse
import copy
import math
import os
import re
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import one_hot, softplus

# ---- config: every UPPER_CASE constant is also a flag, e.g. --batch_size 64 --no-flip

DATA = "mnist"          # celeba, mnist, toy-faces, toy-digits; or a folder, .zip, .npy or .npz
DATA_DIR = "data"       # where the named sets are found, downloaded and cached
OUT_DIR = "out/cgan"    # everything that a run writes
IMAGE_SIZE = 28         # pixels a side
LIMIT = 0               # train on the first so many images only; 0 = all
FLIP = False            # mirror images at random (on for celeba and toy-faces)
EPOCHS = 50             # passes over the data in all, those before a resume among them
MAX_STEPS = 0           # steps in all, if that is sooner; 0 = no limit
BATCH_SIZE = 128        # images a step
LR = 2e-4               # Adam: learning rate of both networks
BETA1 = 0.5             # Adam: decay of the gradients' mean; 0 = no memory
BETA2 = 0.999           # Adam: decay of the mean of their squares
CONDITIONAL = True      # tell both networks the label
LATENT = 100            # numbers in z, the noise that an image is made from
WIDTH = 128             # units of the narrowest layer; the widest has 8 times as many
EMA = 0.999             # decay of the averaged G that samples come from; 0 = the latest G
SEED = 0                # decides initial weights, noise and order of images; 0 is one like any
DEVICE = "auto"         # cuda, mps or cpu; auto: the first of them that is there
DTYPE = "auto"          # bfloat16 or float32; auto: bfloat16 on GPUs made for it
COMPILE = True          # torch.compile both networks (on CUDA only)
LOG_EVERY = 50          # steps between two lines of the log
SAMPLE_EVERY = 1        # epochs between two grids of samples; 0 = none
FID = 0                 # at the end: FID of so many samples against the data; 0 = none
RESUME = False          # go on from ckpt.pt in out_dir
SAMPLE = 0              # do not train: write so many images, 1 or more, to out_dir/generated
LABEL = ""              # for --sample: a class, or some, as in 2,0,2,6, in turn; all by default
CHECKPOINT = ""         # for --sample: the checkpoint, if it is not ckpt.pt in out_dir

FACES = dict(IMAGE_SIZE=32, FLIP=True, CONDITIONAL=False)
PRESETS = {"celeba": FACES, "toy-faces": FACES}
FIXED = {"DATA", "IMAGE_SIZE", "LIMIT", "FLIP", "BATCH_SIZE", "LATENT", "WIDTH",
         "CONDITIONAL"}  # in a checkpoint
LOCAL = {"DATA_DIR", "OUT_DIR", "MAX_STEPS", "DEVICE", "DTYPE", "COMPILE", "LOG_EVERY",
         "SAMPLE_EVERY", "RESUME", "SAMPLE", "LABEL", "CHECKPOINT"}  # never taken from a checkpoint


def preset(given):
    """What takes the place of constants: a data set's settings."""
    return PRESETS.get(given.get("DATA", DATA), {})


# ---- flags and checkpoints: the same in each script


def config():
    """All constants by name; the types leave out what is imported under an upper-case name."""
    plain = (int, float, str, tuple)
    return {k: v for k, v in globals().items() if k.isupper() and isinstance(v, plain)}


def parse_flags(argv=None):
    """Each constant: as its flag says, or the checkpoint, or a preset, or this file."""
    notes = dict(re.findall(r"^(\w+) = .*?  # (.+)$", Path(__file__).read_text("utf-8"), re.M))
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    for name, default in config().items():
        kind = type(default[0] if isinstance(default, tuple) else default)
        options = dict(type=kind, metavar=kind.__name__)
        if isinstance(default, tuple):
            options["nargs"] = "+"
        elif kind is bool:
            options = dict(action=argparse.BooleanOptionalAction)
        flag, note = f"--{name.lower()}", f"{notes[name]} (default: {default})".replace("%", "%%")
        spellings = dict.fromkeys((flag, flag.replace("_", "-")))
        parser.add_argument(*spellings, dest=name, help=note, **options)
    given = vars(parser.parse_args(argv))
    for name, value in given.items():  # a number is positive, unless the comment says what 0 means
        given[name] = tuple(value) if isinstance(value, list) else value
        for v in value if isinstance(value, list) else [value]:
            zero = v == 0 and "0" in notes[name].split()
            if type(v) in (int, float) and not (0 < v < 2**32 or zero):
                fail(f"--{name.lower()} {v} is out of range: {notes[name]}")

    settings = {**config(), **preset(given), **given}
    if settings["CHECKPOINT"] and not settings["SAMPLE"]:
        fail("--checkpoint goes with --sample; --resume goes on from ckpt.pt in --out_dir")
    if (settings["RESUME"] or settings["SAMPLE"]) and not settings.get("INIT_FROM"):
        saved = load(settings["CHECKPOINT"] or Path(settings["OUT_DIR"], "ckpt.pt"))["config"]
        for name in FIXED & given.keys():
            if given[name] != saved[name]:
                fail(f"--{name.lower()} {given[name]}: the checkpoint has {saved[name]}; leave "
                     "the flag out, or train anew with another --out_dir")
        settings.update({k: v for k, v in saved.items() if k not in LOCAL | given.keys()})
    return settings


def fail(message):
    """Stop on a user's mistake: the guard below prints it as one line and exits with status 2."""
    raise ValueError(message)


def save(path, **state):
    """Write a checkpoint beside, then rename it: whatever happens meanwhile, `path` is whole."""
    tmp = Path(f"{path}.{os.getpid()}.tmp")
    try:
        torch.save(dict(state, model=__doc__.split(":")[0]), tmp)
        os.replace(tmp, path)
    except RuntimeError as error:  # what torch makes of a full disk
        raise OSError(f"cannot write {path}: {error}; is the disk full?") from error
    finally:
        tmp.unlink(missing_ok=True)


def load(path):
    """What save() wrote: only tensors and plain values are read, so nothing in it can run."""
    if not Path(path).is_file():
        fail(f"no checkpoint {path}: train first, or name the --out_dir of a run")
    try:
        ckpt = torch.load(path, map_location="cpu", weights_only=True)
        model = ckpt["model"]
    except Exception as error:  # a damaged or foreign file makes torch raise nearly anything
        raise ValueError(f"{path} is no checkpoint ({type(error).__name__})") from error
    if model != __doc__.split(":")[0]:
        fail(f"{path} is a checkpoint of another model: {model}")
    return ckpt


# ---- model


def join(x, y, classes):
    """The one idea of the paper: the label, one-hot, is more input. No classes: a plain GAN."""
    return torch.cat([x, one_hot(y, classes).to(x.dtype)], 1) if classes else x


class Generator(nn.Module):
    """z (B, latent) from N(0, 1) and labels (B,) -> images (B, *shape) in [-1, 1]."""

    def __init__(self, shape=(1, 28, 28), classes=10, latent=100, width=128):
        super().__init__()
        self.shape, self.classes = shape, classes
        sizes = [latent + classes, width, 2 * width, 4 * width, 8 * width]
        layers = []
        for a, b in zip(sizes, sizes[1:]):
            layers += [nn.Linear(a, b), nn.BatchNorm1d(b), nn.LeakyReLU(0.2, True)]
        self.layers = nn.Sequential(*layers, nn.Linear(sizes[-1], math.prod(shape)), nn.Tanh())

    def forward(self, z, y):
        return self.layers(join(z, y, self.classes)).view(-1, *self.shape)


class Discriminator(nn.Module):
    """Images (B, *shape) and labels (B,) -> logits (B,): D(x) = sigmoid(logit)."""

    def __init__(self, shape=(1, 28, 28), classes=10, width=128):
        super().__init__()
        self.classes = classes
        sizes = [math.prod(shape) + classes, 4 * width, 4 * width, 4 * width]
        layers = []
        for a, b in zip(sizes, sizes[1:]):
            layers += [nn.Linear(a, b), nn.LeakyReLU(0.2, True)]  # no dropout: see README.md
        self.layers = nn.Sequential(*layers, nn.Linear(sizes[-1], 1))

    def forward(self, x, y):
        return self.layers(join(x.flatten(1), y, self.classes)).flatten()


# ---- losses (Goodfellow et al. 2014, https://arxiv.org/abs/1406.2661): binary cross-entropy
# With D = sigmoid(logit): -log D = softplus(-logit) and -log(1 - D) = softplus(logit).


def loss_d(real, fake):
    """D ascends log D(x) + log(1 - D(G(z))) (Algorithm 1)."""
    return softplus(-real).mean() + softplus(fake).mean()


def loss_g(fake):
    """G ascends log D(G(z)), whose gradient does not fade where D is sure (section 3)."""
    return softplus(-fake).mean()


# ---- train and sample


def main():
    import data  # not at the top: the networks above need nothing but torch

    device = data.pick_device(DEVICE)
    autocast = torch.autocast(device.type, torch.bfloat16, data.pick_bfloat16(DTYPE, device))
    out = Path(OUT_DIR)
    ckpt = load(CHECKPOINT or out / "ckpt.pt") if RESUME or SAMPLE else None
    if EMA >= 1 or FID == 1:
        fail("--ema must be less than 1, and --fid 2 or more")
    if LABEL and not SAMPLE:
        fail("--label goes with --sample")
    if not ckpt and (out / "ckpt.pt").exists():
        fail(f"{out} holds a run: give --resume to go on with it, or another --out_dir")
    if SAMPLE:
        shape, classes = ckpt["images"], ckpt["classes"]
    else:
        images, labels = data.load(DATA, IMAGE_SIZE, DATA_DIR, LIMIT, device)
        shape = list(images.shape)
        if ckpt and ckpt["images"] != shape:
            fail(f"{DATA} is {shape} now; the checkpoint was trained on {ckpt['images']}")
        if CONDITIONAL and labels is None:
            fail(f"{DATA} has no classes (a folder of images for each): give --no-conditional")
        labels = labels if CONDITIONAL else None
        classes = int(labels.max()) + 1 if CONDITIONAL else 0
        if min(BATCH_SIZE, len(images)) < 2:
            fail("BatchNorm needs batches of two images or more")
    asked = [int(c) if c.isdecimal() else -1 for c in LABEL.split(",")] if LABEL else range(classes)
    if not all(0 <= c < classes for c in asked):
        fail(f"--label {LABEL}: the checkpoint has {classes} classes, counted from 0")

    torch.manual_seed(SEED)
    G = Generator(shape[1:], classes, LATENT, WIDTH).to(device)
    D = Discriminator(shape[1:], classes, WIDTH).to(device)
    ema = copy.deepcopy(G).eval().requires_grad_(False)  # the generator that we sample from
    adam = dict(lr=LR, betas=(BETA1, BETA2))
    opt_G = torch.optim.Adam(G.parameters(), **adam, fused=True)
    opt_D = torch.optim.Adam(D.parameters(), **adam, fused=True)
    parts = dict(G=G, D=D, ema=ema, opt_G=opt_G, opt_D=opt_D)
    if ckpt:
        try:
            for name, part in parts.items():
                part.load_state_dict(ckpt[name])
        except (KeyError, RuntimeError, ValueError) as error:
            raise ValueError("the checkpoint does not fit these networks or classes") from error
        for group in opt_G.param_groups + opt_D.param_groups:
            group.update(adam)  # a flag given now wins over the checkpoint

    def noise(first, count):
        """z of the samples from number `first` on; (seed, i) alone decides number i."""
        seeds = [(SEED + 1) * 10**7 - 1 - i for i in range(first, first + count)]  # steps count up
        generators = [torch.Generator().manual_seed(s) for s in seeds]
        return torch.stack([torch.randn(LATENT, generator=g) for g in generators]).to(device)

    def label(first, count):
        """The classes of the samples from number `first` on: those asked for, in turn."""
        order = [asked[i % len(asked)] for i in range(first, first + count)] if classes else []
        return torch.tensor(order, device=device)

    def generate(count):
        """Yield uint8 batches of samples 0, 1, ... `count` - 1."""
        for first in range(0, count, BATCH_SIZE):  # whole ones: last bits depend on a batch's size
            batch = ema(noise(first, BATCH_SIZE), label(first, BATCH_SIZE))
            yield data.to_uint8(batch)[:count - first]

    columns = len(asked) if len(asked) > 1 else 8  # of a grid: a class each
    if SAMPLE:
        data.save_images(generate(SAMPLE), out / "generated", columns)
        print(f"wrote {SAMPLE} images to {out / 'generated'} and a grid to {out / 'generated.png'}")
        return 0

    if FID:  # now, for there is no use in training first if its weights are missing
        import fid

        inception = fid.Inception().to(device)

    steps_per_epoch = max(1, len(images) // BATCH_SIZE)
    total = min(EPOCHS * steps_per_epoch, MAX_STEPS or math.inf)
    step, seconds, sums = 0, 0.0, torch.zeros(5, device=device)  # sums: since the log's last row
    if ckpt:
        step, seconds, sums = ckpt["step"], ckpt["seconds"], ckpt["sums"].to(device)
    out.mkdir(parents=True, exist_ok=True)
    log = data.Log(out / "log.csv", ("loss_D", "loss_G", "D(x)", "D(G(z))"), step, seconds)

    def checkpoint():
        if not all(t.isfinite().all() for t in [sums, *G.parameters(), *D.parameters()]):
            fail(f"training diverged by step {step}: a loss is not finite; try a lower --lr "
                 f"(the last checkpoint in {out} stays as it was)")
        state = {name: part.state_dict() for name, part in parts.items()}
        save(out / "ckpt.pt", **state, config=config(), images=shape, classes=classes, step=step,
             epoch=step // steps_per_epoch, seconds=log.seconds(), sums=sums)

    @torch.no_grad()
    def pictures(name):
        data.save_grid(torch.cat(list(generate(10 * columns))), out / "samples" / name, columns)
        now_G, now_D = copy.deepcopy((G, D))  # copies: BatchNorm's statistics move while training
        x, y = next(data.batches(images, labels, 512, SEED, 0, device))
        fake_y = label(0, 512)
        fake = now_G(noise(0, 512), fake_y)
        p_real, p_fake = now_D(x, y).sigmoid(), now_D(fake, fake_y).sigmoid()
        data.save_histograms(p_real, p_fake, x, fake, out / "prob" / name)
        data.save_curves(out / "log.csv", out / "loss.png")

    if not ckpt:
        checkpoint()  # claims the folder, and finds out now if the disk is full
    stop = data.catch_signals()
    compiled = data.pick_compile(COMPILE, device)
    fast_G, fast_D = (torch.compile(G), torch.compile(D)) if compiled else (G, D)
    weights_G = list(G.parameters())
    pairs = zip(ema.state_dict().values(), G.state_dict().values())
    pairs = [(e, p) for e, p in pairs if e.is_floating_point()]  # BatchNorm's statistics too
    one = torch.ones((), device=device)

    while step < total and not stop:
        epoch, start = divmod(step, steps_per_epoch)
        saved_at = time.time()
        for x, y in data.batches(images, labels, BATCH_SIZE, SEED, epoch, device, FLIP, start):
            torch.manual_seed(SEED * 10**7 + step)  # (seed, step) decides a step: --resume is exact

            # D step: real and generated images of the same labels
            with autocast:
                fake = fast_G(torch.randn(len(x), LATENT, device=device), y)
                real_logit, fake_logit = fast_D(x, y).float(), fast_D(fake.detach(), y).float()
            d = loss_d(real_logit, fake_logit)
            opt_D.zero_grad()
            d.backward()
            opt_D.step()

            # G step: the same images before the new D
            with autocast:
                logit = fast_D(fake, y).float()
            g = loss_g(logit)
            opt_G.zero_grad()
            g.backward(inputs=weights_G)  # no gradient for D's weights
            opt_G.step()

            with torch.no_grad():
                decay = min(EMA, (1 + step) / (10 + step))  # warm-up: the initial weights go soon
                for e, p in pairs:
                    e.lerp_(p, 1 - decay)
                p_real, p_fake = real_logit.sigmoid().mean(), fake_logit.sigmoid().mean()
                sums += torch.stack([one, d, g, p_real, p_fake])
            step += 1

            if step == 1 or step % LOG_EVERY == 0:
                means = (sums[1:] / sums[0]).tolist()  # the one place that waits for the GPU
                if not all(map(math.isfinite, means)):
                    checkpoint()  # which says so
                stuck = means[2] > 0.98 and means[3] < 0.02  # the ends that they should keep off
                log.write(step, total, epoch + 1, len(x), means, "  D wins: see README" * stuck)
                sums.zero_()
            if step >= total or stop:
                break
            if time.time() - saved_at > 600:
                checkpoint()
                saved_at = time.time()

        epoch, rest = divmod(step, steps_per_epoch)
        checkpoint()
        if SAMPLE_EVERY and (step >= total or not rest and epoch % SAMPLE_EVERY == 0):
            pictures(f"epoch_{epoch + bool(rest):04}.png")

    data.release_signals()
    data.save_gif(out / "samples", out / "samples.gif")
    print(f"{'stopped' if stop else 'done'} at step {step}, saved in {out / 'ckpt.pt'}"
          + "; go on with --resume" * bool(stop))
    if FID and not stop:
        real = fid.cached_statistics(images, inception, DATA_DIR)
        fake = fid.statistics(generate(FID), inception)
        distance = fid.frechet_distance(*fake, *real)
        print(f"FID {distance:.4f} of {FID} samples against {shape[0]} images")
    return 128 + stop[0] if stop else 0


if __name__ == "__main__":
    try:
        globals().update(parse_flags())
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except ModuleNotFoundError as error:
        print(f"error: {error}: copy data.py and fid.py too, pip install the rest", file=sys.stderr)
        sys.exit(2)
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
