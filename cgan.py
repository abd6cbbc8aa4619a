"""CGAN: digits on demand (Mirza & Osindero 2014, https://arxiv.org/abs/1411.1784).

Two fully connected networks compete. The discriminator D learns to tell real images from generated
ones. The generator G learns to turn random vectors into images that D classifies as real. Both also
get the label, so G learns to draw the class that it is given. --no-conditional leaves the labels
out: the original GAN of Goodfellow et al. 2014, https://arxiv.org/abs/1406.2661.

    python cgan.py                                # conditional GAN on MNIST, into out/cgan
    python cgan.py --no-conditional --out_dir out/gan
    python cgan.py --sample 100 --label 7         # write a hundred sevens to out/cgan/generated
    python cgan.py --sample 8 --label 2,0,2,6     # 2, 0, 2, 6, 2, 0, 2, 6; default: all classes
    python cgan.py --data path/to/folders         # your own: one folder of images for each class

Measured: 50 epochs took 19 minutes on one core of an AMD EPYC. tests/classify.py recognizes 99.5 %
of 1,000 samples as requested.
"""
import argparse
import copy
import importlib.util
import math
import os
import re
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import one_hot, softplus

# ---- settings of a run, kept in its checkpoint. Each constant is also a flag: --lr 1e-4 --no-flip

DATA = "mnist"          # celeba, mnist, toy-faces, toy-digits; or a folder, .zip, .npy or .npz
IMAGE_SIZE = 28         # height and width in pixels
LIMIT = 0               # use only N images, evenly spaced over the set; 0 = all
FLIP = False            # mirror half of the images; not for digits
EPOCHS = 50             # length of training, including the epochs before a resume
BATCH_SIZE = 128        # images in a training step
LR = 2e-4               # learning rate of both Adam optimizers
BETA1 = 0.5             # Adam's beta1, the decay of its mean gradient; beta2 is 0.999
CONDITIONAL = True      # give the labels to both networks; --no-conditional: the original GAN
LATENT = 100            # length of z, the random vector that G turns into an image
WIDTH = 128             # units in the first layer of G; the others have up to 8 times as many
EMA = 0.999             # decay of the averaged G that draws the samples; 0 = no averaging
DTYPE = "auto"          # bfloat16 or float32; auto = bfloat16 on GPUs that support it
SEED = 0                # decides initial weights, noise and the order of images
run_keys = [key for key, value in globals().items()  # the constants above this line
            if key.isupper() and isinstance(value, (int, float, str))]

# ---- settings of this call

DATA_DIR = "data"       # where the named sets are found, downloaded and cached
OUT_DIR = "out/cgan"    # the folder of the run
MAX_STEPS = 0           # end training at step N, even if epochs are left; 0 = no limit
DEVICE = "auto"         # cuda, mps or cpu; auto = a GPU if there is one
COMPILE = True          # use torch.compile, on CUDA where Triton is installed
LOG_EVERY = 50          # steps between two rows of the log
SAVE_EVERY = 60         # seconds between two checkpoints, which are written with a row
SAMPLE_EVERY = 1        # epochs between two grids of samples; 0 = no pictures
FID = 0                 # after training, FID of N samples against N images, or all; 0 = none
RESUME = False          # continue the run in OUT_DIR with its own settings
SAMPLE = 0              # write N images to OUT_DIR/generated instead of training
LABEL = ""              # classes to draw, in turn: 7, or 2,0,2,6; empty = all classes

# ---- networks


def join(x, y, classes):
    """x (B, n) and labels y (B,) -> (B, n + classes), with one-hot labels (section 3.2)."""
    if classes == 0:
        return x
    return torch.cat([x, one_hot(y, classes).to(x.dtype)], 1)


class Generator(nn.Module):
    """z (B, latent) from N(0, I) and labels (B,) -> images (B, *shape) in [-1, 1]."""

    def __init__(self, shape=(1, 28, 28), classes=10, latent=100, width=128):
        super().__init__()
        self.shape, self.classes, self.latent = shape, classes, latent
        sizes = [latent + classes, width, 2 * width, 4 * width, 8 * width]
        layers = []
        for n_in, n_out in zip(sizes, sizes[1:]):
            layers += [nn.Linear(n_in, n_out), nn.BatchNorm1d(n_out), nn.LeakyReLU(0.2, True)]
        layers += [nn.Linear(sizes[-1], math.prod(shape)), nn.Tanh()]
        self.layers = nn.Sequential(*layers)

    def forward(self, z, y=None):
        return self.layers(join(z, y, self.classes)).view(-1, *self.shape)


class Discriminator(nn.Module):
    """Images (B, *shape) and labels (B,) -> logits (B,), where D(x) = sigmoid(logit)."""

    def __init__(self, shape=(1, 28, 28), classes=10, width=128):
        super().__init__()
        self.classes = classes
        sizes = [math.prod(shape) + classes, 4 * width, 4 * width, 4 * width]
        layers = []
        for n_in, n_out in zip(sizes, sizes[1:]):
            layers += [nn.Linear(n_in, n_out), nn.LeakyReLU(0.2, True)]
        layers += [nn.Linear(sizes[-1], 1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x, y=None):
        logits = self.layers(join(x.flatten(1), y, self.classes))
        return logits.flatten().float()  # losses are computed in float32


# ---- the method (Goodfellow et al. 2014, https://arxiv.org/abs/1406.2661)


def train_step(G, D, opt_G, opt_D, x, y, z, autocast):
    """Update D, then G (Algorithm 1 with k = 1, but both on the same generated images).

    x: real images (B, C, H, W) in [-1, 1]; y: their labels (B,), also given to G;
    z: noise (B, latent)
    Both losses are binary cross-entropy. With D = sigmoid(logit), -log D = softplus(-logit) and
    -log(1 - D) = softplus(logit), which do not overflow.
    Returns the images G(z), loss_D, loss_G, and D(x) and D(G(z)), (B,), before the updates.
    """
    # D maximizes log D(x) + log(1 - D(G(z))); all of these also get the label y
    with autocast:
        fake = G(z, y)
        real_logit, fake_logit = D(x, y), D(fake.detach(), y)
    loss_D = softplus(-real_logit).mean() + softplus(fake_logit).mean()
    opt_D.zero_grad()
    loss_D.backward()
    opt_D.step()

    # G maximizes log D(G(z)). Minimizing log(1 - D(G(z))) would give it little gradient while D
    # recognizes its images (section 3)
    D.requires_grad_(False)  # the weights of D need no gradients here: faster
    with autocast:
        logit = D(fake, y)
    loss_G = softplus(-logit).mean()
    opt_G.zero_grad()
    loss_G.backward()
    opt_G.step()
    D.requires_grad_(True)

    return fake, loss_D, loss_G, real_logit.sigmoid(), fake_logit.sigmoid()


@torch.no_grad()
def update_ema(ema, net, decay):
    """ema = decay * ema + (1 - decay) * net, for weights and for BatchNorm's statistics."""
    for average, value in zip(ema.state_dict().values(), net.state_dict().values()):
        if value.is_floating_point():  # not BatchNorm's counter of batches
            average.lerp_(value, 1 - decay)


@torch.no_grad()
def generate(G, labels, num, seed, device):
    """Yield `num` samples as uint8 batches (64, C, H, W), with these labels in turn.
    (seed, i) alone decides the noise of batch i."""
    for i in range(math.ceil(num / 64)):
        torch.manual_seed((seed + 1) * 10**7 - 1 - i)  # never the seed of a training step
        z = torch.randn(64, G.latent).to(device)
        y = labels[torch.arange(64 * i, 64 * i + 64) % len(labels)].to(device)
        images = G(z, y)
        yield ((images + 1) * 127.5).round().byte()[:num - 64 * i]


# ---- a run


def pick_device():
    """The device, and autocast in the precision that the flags ask for."""
    best = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    device = torch.device(best if DEVICE == "auto" else DEVICE)
    auto = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    bfloat16 = dict(auto=auto, bfloat16=True, float32=False)
    if DTYPE not in bfloat16:
        sys.exit(f"error: --dtype {DTYPE}: give bfloat16, float32 or auto")
    return device, torch.autocast(device.type, torch.bfloat16, enabled=bfloat16[DTYPE])


def pick_labels(classes):
    """The class numbers of --label in a tensor; all classes by default."""
    if not LABEL:
        return torch.arange(max(classes, 1))  # without classes, the label 0, which is not used
    labels = LABEL.split(",")
    if not set(labels) <= {str(number) for number in range(classes)}:
        sys.exit(f"error: --label {LABEL}: there are {classes} classes, counted from 0")
    return torch.tensor([int(label) for label in labels])


def check_fixed(ckpt, fixed):
    """Exit if one of these values, which must stay as they are, differs from the checkpoint's."""
    for key, value in fixed.items():
        kept = ckpt["fixed"].get(key, value)  # an edited script may have new ones
        if value != kept:
            sys.exit(f"error: the run has {key} {kept}, now it is {value}: give the same flags "
                     "and data, or start a new run in another --out_dir")


def train(out, ckpt=None):
    """Train G and D, from the start or from a checkpoint. Writes its files into `out`."""
    from tqdm import tqdm

    import data

    device, autocast = pick_device()
    images, labels = data.load(DATA, IMAGE_SIZE, DATA_DIR, LIMIT)
    if CONDITIONAL and labels is None:
        sys.exit(f"error: {DATA} has no labels: give --no-conditional")
    classes = int(labels.max()) + 1 if CONDITIONAL else 0
    batches = data.Batches(images, labels, BATCH_SIZE, SEED, FLIP, device)
    sample_labels = pick_labels(classes)

    torch.manual_seed(SEED)
    shape = list(images.shape[1:])
    G = Generator(shape, classes, LATENT, WIDTH).to(device)
    D = Discriminator(shape, classes, WIDTH).to(device)
    ema = copy.deepcopy(G).eval()
    opt_G, opt_D = [torch.optim.Adam(net.parameters(), LR, (BETA1, 0.999), fused=True)
                    for net in (G, D)]
    parts = dict(G=G, D=D, ema=ema, opt_G=opt_G, opt_D=opt_D)
    fixed = dict(shape=shape, classes=classes, conditional=CONDITIONAL, latent=LATENT, width=WIDTH,
                 seed=SEED, batch_size=BATCH_SIZE, steps_per_epoch=len(batches))
    step, rows, began = 0, [], time.time()
    if ckpt:
        check_fixed(ckpt, fixed)
        step, rows = ckpt["step"], ckpt["rows"]
        began -= rows[-1]["time"]
        for name, part in parts.items():
            part.load_state_dict(ckpt[name])
        for opt in (opt_G, opt_D):  # a flag given now has priority
            opt.param_groups[0].update(lr=LR, betas=(BETA1, 0.999))
    if COMPILE and device.type == "cuda" and importlib.util.find_spec("triton"):
        G.compile()
        D.compile()

    out.mkdir(parents=True, exist_ok=True)
    total = min(EPOCHS * len(batches), MAX_STEPS or math.inf)
    saved, recent = 0, []  # when the last checkpoint was saved; statistics since the last row
    bar = tqdm(range(step + 1, total + 1), initial=step, total=total)
    for step in bar:
        x, y = batches(step - 1)
        torch.manual_seed(SEED * 10**7 + step)  # so that a resumed run draws the same noise
        z = torch.randn(len(x), LATENT, device=device)
        fake, loss_D, loss_G, p_real, p_fake = train_step(G, D, opt_G, opt_D, x, y, z, autocast)
        update_ema(ema, G, min(EMA, step / (step + 9)))  # at first, over a tenth of the steps
        recent.append(torch.stack([loss_D, loss_G, p_real.mean(), p_fake.mean()]).detach())

        epoch = math.ceil(step / len(batches))
        if step % max(1, LOG_EVERY) == 0 or step == total:  # here the loop waits for the GPU
            means = torch.stack(recent).mean(0).tolist()
            recent = []
            norm = nn.utils.get_total_norm([*G.parameters(), *D.parameters()]).item()
            if not math.isfinite(sum(means) + norm):
                sys.exit(f"error: diverged by step {step}: try a lower --lr")
            row = dict(zip(("loss_D", "loss_G", "D(x)", "D(G(z))"), means))
            rows.append(dict(step=step, epoch=epoch, time=time.time() - began, **row))
            bar.set_postfix(row)
            data.save_table(rows, out / "log.csv")
            if step == total or time.time() - saved > SAVE_EVERY:
                ckpt = {name: part.state_dict() for name, part in parts.items()}
                ckpt["settings"] = {key: globals()[key] for key in run_keys}
                ckpt.update(script="cgan", step=step, rows=rows, fixed=fixed)
                with data.replacing(out / "ckpt.pt") as tmp:  # a kill leaves the old one
                    torch.save(ckpt, tmp)
                saved = time.time()
        if SAMPLE_EVERY and (step == total or step % (SAMPLE_EVERY * len(batches)) == 0):
            name = f"epoch_{epoch:04}.png"
            samples = next(generate(ema, sample_labels, 64, SEED, device))
            data.save_grid(samples, out / "samples" / name, len(sample_labels))
            data.save_curves(rows, out / "loss.png")
            data.save_histograms(out / "prob" / name, D=(p_real, p_fake), pixels=(x, fake))

    print(f"step {step} of {EPOCHS * len(batches)} is done, see {out}; to go on: --resume "
          f"--out_dir {out}, after the last step with a larger --epochs")
    if FID:
        import fid
        samples = generate(ema, sample_labels, FID, SEED, device)
        print(f"FID {fid.compare(samples, images, FID, SEED, device):.4f} of {FID} samples")


def write_samples(out, ckpt):
    """Write SAMPLE images of the averaged G into out/generated, and a grid of the first 64."""
    import data

    device, _ = pick_device()
    shape, classes = [ckpt["fixed"]["shape"][0], IMAGE_SIZE, IMAGE_SIZE], ckpt["fixed"]["classes"]
    check_fixed(ckpt, dict(shape=shape, conditional=CONDITIONAL, latent=LATENT, width=WIDTH))
    labels = pick_labels(classes)
    G = Generator(shape, classes, LATENT, WIDTH).to(device).eval()
    G.load_state_dict(ckpt["ema"])
    data.save_samples(generate(G, labels, SAMPLE, SEED, device), SAMPLE, out, len(labels))


def parse_flags():
    """The flags that were given, like {"LR": 1e-4}. A constant's comment is its flag's help."""
    source = Path(__file__).read_text("utf-8")
    hide = argparse.SUPPRESS  # no usage line; flags that are not given are left out
    parser = argparse.ArgumentParser(usage=hide, argument_default=hide)
    for key, comment in re.findall(r"^([A-Z][A-Z0-9_]*) = [^#\n]*(?:# ?(.*))?$", source, re.M):
        default = globals()[key]
        kind = dict(type=type(default))
        if isinstance(default, bool):
            kind = dict(action=argparse.BooleanOptionalAction)
        text = f"{comment} (default: {default})".replace("%", "%%")
        parser.add_argument("--" + key.lower(), dest=key, help=text, **kind)
    flags = vars(parser.parse_args())
    for key, value in flags.items():
        if isinstance(value, (int, float)) and value < 0:
            parser.error(f"--{key.lower()} {value}: it cannot be negative")
    return flags


if __name__ == "__main__":
    import data

    if "RANK" in os.environ:
        sys.exit("error: cgan.py runs in one process: start it without torchrun")
    flags = parse_flags()
    globals().update(flags)
    out, ckpt = Path(OUT_DIR).expanduser(), None
    if RESUME or SAMPLE:
        try:
            ckpt = torch.load(out / "ckpt.pt", map_location="cpu", weights_only=True)
            assert ckpt["script"] == "cgan", "of another script"
        except Exception as error:  # torch.load raises many types on a damaged file
            sys.exit(f"error: no checkpoint of this cgan.py in {out}: {error!r:.80}. "
                     "Train first, or give another --out_dir")
        for key in run_keys:  # those of the run, except where a flag is given now
            value = ckpt["settings"].get(key, globals()[key])
            if key not in flags and value != globals()[key]:
                print(f"{key} = {value}, as in the run; in this file it is {globals()[key]}")
                globals()[key] = value
    elif (out / "ckpt.pt").exists():
        sys.exit(f"error: {out} holds a run: give --resume, or another --out_dir")
    try:
        write_samples(out, ckpt) if SAMPLE else train(out, ckpt)
    except data.Error as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(f"stopped: --resume --out_dir {out} continues from the last checkpoint, if any")
