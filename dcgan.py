"""DCGAN: images from noise (Radford, Metz & Chintala 2015, https://arxiv.org/abs/1511.06434).

Two convolutional networks play a game: the discriminator D learns to tell the images of a data
set from those that the generator G makes of random numbers, G learns to make D take them for real.

    python dcgan.py                               # CelebA at 64 px, into out/dcgan
    python dcgan.py --data path/to/photos         # your own: a folder, .zip, .npy or .npz
    python dcgan.py --resume --epochs 50          # go on from out/dcgan/ckpt.pt, exactly
    python dcgan.py --sample 1000                 # write images from it to out/dcgan/generated

Measured: 8 epochs of 25,000 faces take 51 minutes on 2 CPU cores; README.md shows what they give.
To train on a tensor of your own, in main() write images = tensor, uint8 (N, C, H, W).
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
from torch.nn.functional import softplus

# ---- config: every UPPER_CASE constant is also a flag, e.g. --batch_size 64 --no-flip

DATA = "celeba"         # celeba, mnist, toy-faces, toy-digits; or a folder, .zip, .npy or .npz
DATA_DIR = "data"       # where the named sets are found, downloaded and cached
OUT_DIR = "out/dcgan"   # everything that a run writes
IMAGE_SIZE = 64         # pixels a side: 16, 32, 64, 128 or 256
LIMIT = 0               # train on the first so many images only; 0 = all
FLIP = True             # mirror images at random (off for mnist and toy-digits)
EPOCHS = 25             # passes over the data in all, those before a resume among them
MAX_STEPS = 0           # steps in all, if that is sooner; 0 = no limit
BATCH_SIZE = 128        # images a step
LR = 2e-4               # Adam: learning rate of both networks
BETA1 = 0.5             # Adam: decay of the gradients' mean; 0 = no memory
BETA2 = 0.999           # Adam: decay of the mean of their squares
LATENT = 100            # numbers in z, the noise that an image is made from
WIDTH = 64              # channels next to the image; each layer doubles them, up to 8 times
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
CHECKPOINT = ""         # for --sample: the checkpoint, if it is not ckpt.pt in out_dir

PRESETS = {"mnist": dict(IMAGE_SIZE=32, FLIP=False), "toy-digits": dict(IMAGE_SIZE=32, FLIP=False)}
FIXED = {"DATA", "IMAGE_SIZE", "LIMIT", "FLIP", "BATCH_SIZE", "LATENT", "WIDTH"}  # in a checkpoint
LOCAL = {"DATA_DIR", "OUT_DIR", "MAX_STEPS", "DEVICE", "DTYPE", "COMPILE", "LOG_EVERY",
         "SAMPLE_EVERY", "RESUME", "SAMPLE", "CHECKPOINT"}  # never taken from a checkpoint


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


# ---- model: every layer halves or doubles height and width (section 3, figure 1)


def channels_at(image_size, width):
    """Channels of the layers from half the image's size down to 4x4; 64 px: 64, 128, 256, 512."""
    if image_size not in (16, 32, 64, 128, 256):
        raise ValueError(f"--image_size {image_size}: DCGAN takes 16, 32, 64, 128 or 256")
    return [width * min(2**i, 8) for i in range(int(math.log2(image_size)) - 2)]


class Generator(nn.Module):
    """z (B, latent) from N(0, 1) -> images (B, channels, image_size, image_size) in [-1, 1]."""

    def __init__(self, image_size=64, channels=3, latent=100, width=64):
        super().__init__()
        w = channels_at(image_size, width)[::-1]
        layers = [nn.ConvTranspose2d(latent, w[0], 4, bias=False),               # 4x4
                  nn.BatchNorm2d(w[0]), nn.ReLU(True)]
        for a, b in zip(w, w[1:]):
            layers += [nn.ConvTranspose2d(a, b, 4, 2, 1, bias=False),            # 8x8, 16x16 ...
                       nn.BatchNorm2d(b), nn.ReLU(True)]
        layers += [nn.ConvTranspose2d(w[-1], channels, 4, 2, 1, bias=False),     # the image's size
                   nn.Tanh()]
        self.layers = nn.Sequential(*layers)
        self.apply(init_weights)

    def forward(self, z):
        return self.layers(z[:, :, None, None])


class Discriminator(nn.Module):
    """Images (B, channels, image_size, image_size) -> logits (B,): D(x) = sigmoid(logit)."""

    def __init__(self, image_size=64, channels=3, width=64):
        super().__init__()
        w = channels_at(image_size, width)
        layers = [nn.Conv2d(channels, w[0], 4, 2, 1, bias=False), nn.LeakyReLU(0.2, True)]  # half
        for a, b in zip(w, w[1:]):
            layers += [nn.Conv2d(a, b, 4, 2, 1, bias=False),                     # ... 8x8, 4x4
                       nn.BatchNorm2d(b), nn.LeakyReLU(0.2, True)]
        layers += [nn.Conv2d(w[-1], 1, 4, bias=False)]                           # 1x1
        self.layers = nn.Sequential(*layers)
        self.apply(init_weights)

    def forward(self, x):
        return self.layers(x).flatten()


def init_weights(layer):
    """N(0, 0.02) for all weights (section 4), and N(1, 0.02) for BatchNorm's scales."""
    if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(layer.weight, 0.0, 0.02)
    elif isinstance(layer, nn.BatchNorm2d):
        nn.init.normal_(layer.weight, 1.0, 0.02)


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
    if not ckpt and (out / "ckpt.pt").exists():
        fail(f"{out} holds a run: give --resume to go on with it, or another --out_dir")
    channels_at(IMAGE_SIZE, WIDTH)  # refuses a size before the data is prepared in it
    if SAMPLE:
        shape = ckpt["images"]
    else:
        images, _ = data.load(DATA, IMAGE_SIZE, DATA_DIR, LIMIT, device)
        shape = list(images.shape)
        if ckpt and ckpt["images"] != shape:
            fail(f"{DATA} is {shape} now; the checkpoint was trained on {ckpt['images']}")

    torch.manual_seed(SEED)
    layout = dict(device=device, memory_format=data.best_layout(device))
    G = Generator(IMAGE_SIZE, shape[1], LATENT, WIDTH).to(**layout)
    D = Discriminator(IMAGE_SIZE, shape[1], WIDTH).to(**layout)
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
        for opt in (opt_G, opt_D):
            opt.param_groups[0].update(adam)  # a flag given now wins over the checkpoint
            for w, state in opt.state.items():  # laid out as w is here: fused steps rely on it
                state.update({k: torch.empty_like(w).copy_(v) for k, v in state.items() if v.ndim})

    def noise(first, count):
        """z of the samples from number `first` on; (seed, i) alone decides number i."""
        seeds = [(SEED + 1) * 10**7 - 1 - i for i in range(first, first + count)]  # steps count up
        generators = [torch.Generator().manual_seed(s) for s in seeds]
        return torch.stack([torch.randn(LATENT, generator=g) for g in generators]).to(device)

    def generate(count):
        """Yield uint8 batches of samples 0, 1, ... `count` - 1."""
        for first in range(0, count, BATCH_SIZE):  # whole ones: last bits depend on a batch's size
            yield data.to_uint8(ema(noise(first, BATCH_SIZE)))[:count - first]

    if SAMPLE:
        data.save_images(generate(SAMPLE), out / "generated")
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
        save(out / "ckpt.pt", **state, config=config(), images=shape, step=step,
             epoch=step // steps_per_epoch, seconds=log.seconds(), sums=sums)

    @torch.no_grad()
    def pictures(name):
        data.save_grid(torch.cat(list(generate(64))), out / "samples" / name)
        now_G, now_D = copy.deepcopy((G, D))  # copies: BatchNorm's statistics move while training
        x, _ = next(data.batches(images, None, 512, SEED, 0, device))
        fake = now_G(noise(0, 512))
        p_real, p_fake = now_D(x).sigmoid(), now_D(fake).sigmoid()
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
        for x, _ in data.batches(images, None, BATCH_SIZE, SEED, epoch, device, FLIP, start):
            torch.manual_seed(SEED * 10**7 + step)  # (seed, step) decides a step: --resume is exact

            # D step
            with autocast:
                fake = fast_G(torch.randn(len(x), LATENT, device=device))
                real_logit, fake_logit = fast_D(x).float(), fast_D(fake.detach()).float()
            d = loss_d(real_logit, fake_logit)
            opt_D.zero_grad()
            d.backward()
            opt_D.step()

            # G step: the same images before the new D
            with autocast:
                logit = fast_D(fake).float()
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
