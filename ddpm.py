"""DDPM: images out of noise, step by step (Ho et al. 2020, https://arxiv.org/abs/2006.11239).

T small steps turn an image into noise. A U-Net learns to tell the noise in a noisy image; with it
the steps can be taken backwards, and pure noise becomes a new image. DDIM (Song et al. 2020,
https://arxiv.org/abs/2010.02502) takes fewer, longer steps with the same network.

    python ddpm.py                                # digits: MNIST, into out/ddpm
    python ddpm.py --data celeba --out_dir out/faces
    python ddpm.py --sample 2048 --sample_steps 100              # write images, in 100 steps each
    python ddpm.py --sample 2048 --sample_steps 50 --sampler ddim
    python ddpm.py --data path/to/photos --image_size 64 --attention 16 --out_dir out/photos
    python ddpm.py --init_from google/ddpm-celebahq-256 --sample 8 --out_dir out/celebahq
    torchrun --nproc_per_node=4 ddpm.py --data celeba --out_dir out/faces    # on four GPUs

Measured: 10 epochs on MNIST take 1 h 48 min on 2 CPU cores that have bfloat16 (--dtype bfloat16);
then a classifier reads 92 % of 1,000 samples with a probability above 0.9; of test digits, 98 %.
To train on a tensor of your own, in main() write images = tensor, uint8 (N, C, H, W).
"""
import argparse
import copy
import datetime
import functools
import json
import math
import os
import re
import sys
import time
from pathlib import Path

import torch
from torch import distributed, nn
from torch.nn import functional as F

# ---- config: every UPPER_CASE constant is also a flag, e.g. --timesteps 100 --mults 1 2 2 4

DATA = "mnist"          # celeba, mnist, toy-faces, toy-digits; or a folder, .zip, .npy or .npz
DATA_DIR = "data"       # where the named sets are found, downloaded and cached
OUT_DIR = "out/ddpm"    # everything that a run writes
IMAGE_SIZE = 28         # pixels a side
LIMIT = 0               # train on the first so many images only; 0 = all
FLIP = False            # mirror images at random (on for celeba and toy-faces)
EPOCHS = 10             # passes over the data in all, those before a resume among them
MAX_STEPS = 0           # steps in all, if that is sooner; 0 = no limit
BATCH_SIZE = 64         # images a step, over all processes together
OPTIMIZER = "muon"      # muon: half the steps of adam, or fewer; adam: as in the papers
LR = 1e-3               # learning rate, of either optimizer
BETA1 = 0.9             # Adam: decay of the gradients' mean; 0 = no memory
BETA2 = 0.999           # Adam: decay of the mean of their squares
TIMESTEPS = 1000        # T: steps from an image to noise
SCHEDULE = "linear"     # how the noise grows: linear (Ho et al.) or cosine (Nichol & Dhariwal)
CHANNELS = 32           # of the U-Net's first level
MULTS = (1, 2, 4)       # channels of each level, as multiples of that; each next is half the size
BLOCKS = 1              # residual blocks a level on the way down; one more on the way up
ATTENTION = (7,)        # in levels of these sizes, in pixels, and in the middle; 0 = only there
DROPOUT = 0.0           # share of activations that are dropped in residual blocks; 0 = none
EMA = 0.999             # decay of the averaged weights that samples come from; 0 = the latest
SAMPLER = "ddpm"        # for --sample and --fid: ddpm or ddim
SAMPLE_STEPS = 0        # of the T steps use so many, evenly spaced; 0 = all
VARIANCE = "small"      # of a ddpm step: small (the posterior's) or large (beta)
ETA = 0.0               # noise in a ddim step, from 0 = none to 1 = as in ddpm
SEED = 0                # decides initial weights, noise and order of images; 0 is one like any
DEVICE = "auto"         # cuda, mps or cpu; auto: the first of them that is there
DTYPE = "auto"          # bfloat16 or float32; auto: bfloat16 on GPUs made for it
COMPILE = True          # torch.compile the network (on CUDA only)
LOG_EVERY = 50          # steps between two lines of the log
SAMPLE_EVERY = 1        # epochs between two grids of samples, in 50 steps each; 0 = none
FID = 0                 # at the end: FID of so many samples against the data; 0 = none
RESUME = False          # go on from ckpt.pt in out_dir; with --sample: where that stopped
SAMPLE = 0              # do not train: write so many images, 1 or more, to out_dir/generated
CHECKPOINT = ""         # for --sample: the checkpoint, if it is not ckpt.pt in out_dir
INIT_FROM = ""          # pre-trained weights: a hub repository, a folder like one, diffusion.pt

PRESETS = {
    "celeba": dict(IMAGE_SIZE=64, FLIP=True, EPOCHS=100, BATCH_SIZE=128, OPTIMIZER="adam", LR=2e-4,
                   EMA=0.9999, CHANNELS=64, MULTS=(1, 2, 3, 4), BLOCKS=2, ATTENTION=(8, 16)),
    "toy-faces": dict(IMAGE_SIZE=32, FLIP=True, ATTENTION=(8,)),
}
FIXED = {"DATA", "IMAGE_SIZE", "LIMIT", "FLIP", "BATCH_SIZE", "OPTIMIZER", "TIMESTEPS", "SCHEDULE",
         "CHANNELS", "MULTS", "BLOCKS", "ATTENTION"}  # in a checkpoint
LOCAL = {"DATA_DIR", "OUT_DIR", "MAX_STEPS", "DEVICE", "DTYPE", "COMPILE", "LOG_EVERY",
         "SAMPLE_EVERY", "RESUME", "SAMPLE", "CHECKPOINT", "INIT_FROM"}  # never from a checkpoint


def preset(given):
    """What takes the place of constants: a data set's settings, those of pre-trained weights."""
    settings, source = PRESETS.get(given.get("DATA", DATA), {}), given.get("INIT_FROM", INIT_FROM)
    if not source:
        return settings
    own = read_pretrained(source)[1]
    for name in own.keys() & given.keys() & FIXED - {"IMAGE_SIZE"}:
        fail(f"--{name.lower()} comes with the weights of --init_from: leave the flag out")
    return {**settings, **own, "OPTIMIZER": "adam", "LR": 1e-4}  # for fine-tuning


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


# ---- model: the U-Net of Ho et al. (appendix B)


def embed_time(t, channels, shift=1, cos_first=False):
    """Times (B,) -> (B, channels): sines, then cosines, of frequencies from 1 down to 1/10000."""
    half = channels // 2
    frequency = torch.exp(-math.log(10000) / (half - shift) * torch.arange(half, device=t.device))
    angle = t[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()] if cos_first else [angle.sin(), angle.cos()], 1)


def zero(layer):
    """Start from weights of zero: each residual branch, and the whole U-Net, does nothing yet."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class ResBlock(nn.Module):
    """Two convolutions with the time added in between, past which the input skips; attention.

    a, b: channels of the input and of the output; width_t: of the time's embedding
    """

    def __init__(self, a, b, attention, width_t, groups, dropout=0.0, eps=1e-6, all_skips=False):
        super().__init__()
        self.norm1, self.norm2 = (nn.GroupNorm(groups, c, eps) for c in (a, b))
        self.conv1 = nn.Conv2d(a, b, 3, padding=1)
        self.conv2 = zero(nn.Conv2d(b, b, 3, padding=1))
        self.time = nn.Linear(width_t, b)
        self.dropout = nn.Dropout(dropout)
        self.skip = nn.Conv2d(a, b, 1) if a != b or all_skips else nn.Identity()
        self.attention = Attention(b, groups, eps) if attention else nn.Identity()

    def forward(self, x, t):
        h = self.conv1(F.silu(self.norm1(x))) + self.time(t)[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.attention(self.skip(x) + h)


class Attention(nn.Module):
    """Every pixel looks at every other one: single-head self-attention, past which x skips."""

    def __init__(self, channels, groups, eps=1e-6):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = zero(nn.Linear(channels, channels))

    def forward(self, x):
        h = self.norm(x).flatten(2).transpose(1, 2)                           # (B, H W, C)
        q, k, v = self.qkv(h)[:, None].chunk(3, -1)                           # (B, 1, H W, C)
        h = self.out(F.scaled_dot_product_attention(q, k, v)[:, 0])
        return x + h.transpose(1, 2).view(x.shape)


class Downsample(nn.Conv2d):
    """Half the size: a convolution of stride 2, with zeros to the right and below.

    t is not used, but lets the U-Net call all its layers alike.
    """

    def __init__(self, channels, symmetric=False):
        super().__init__(channels, channels, 3, stride=2, padding=int(symmetric))

    def forward(self, x, t):
        return super().forward(x if self.padding[0] else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Conv2d):
    """Twice the size: each pixel becomes 2x2, then a convolution.

    Its 3x3 weights meet only 2x2 different pixels. To sum those that meet the same one beforehand
    gives a transposed convolution of 4x4 weights: the same, with 16 multiplications in place of 36.
    """

    def __init__(self, channels):
        super().__init__(channels, channels, 3, padding=1)

    def forward(self, x, t):
        sums = F.avg_pool2d(self.weight, 2, stride=1, padding=1, divisor_override=1)
        return F.conv_transpose2d(x, sums.flip(2, 3).transpose(0, 1), self.bias, 2, padding=1)


class UNet(nn.Module):
    """Noisy images (B, C, H, W) and times (B,) in 0 ... T - 1 -> the noise in them, eps.

    channels, mults: level i has channels * mults[i], at 1 / 2**i of the image's size
    blocks: residual blocks a level on the way down, one more on the way up
    attention: for each level, whether its blocks have attention; the middle has it always
    groups, eps: of GroupNorm; groups must divide channels
    shift, cos_first, symmetric, all_skips: how public weights may differ in embed_time, in
        Downsample's padding, and in skips of blocks that leave the number of channels as it is
    """

    def __init__(self, in_channels=1, channels=32, mults=(1, 2, 4), blocks=1,
                 attention=(False, False, True), groups=8, dropout=0.0, eps=1e-6,
                 shift=1, cos_first=False, symmetric=False, all_skips=False):
        # what a checkpoint keeps, to build the network anew
        self.args = {k: v for k, v in dict(locals()).items() if k not in ("self", "__class__")}
        super().__init__()
        widths = [channels * m for m in mults]
        width_t = 4 * channels
        self.time = nn.Sequential(nn.Linear(channels, width_t), nn.SiLU(),
                                  nn.Linear(width_t, width_t))
        self.conv_in = nn.Conv2d(in_channels, channels, 3, padding=1)
        block = functools.partial(ResBlock, width_t=width_t, groups=groups, dropout=dropout,
                                  eps=eps, all_skips=all_skips)
        self.down, a = nn.ModuleList(), channels
        skips = [a]                                                           # their channels
        for i, b in enumerate(widths):
            for _ in range(blocks):
                self.down.append(block(a, b, attention[i]))
                a = b
                skips.append(a)
            if i < len(widths) - 1:
                self.down.append(Downsample(a, symmetric))
                skips.append(a)
        self.middle = nn.ModuleList([block(a, a, True), block(a, a, False)])
        self.up = nn.ModuleList()
        for i, b in reversed(list(enumerate(widths))):
            for _ in range(blocks + 1):
                self.up.append(block(a + skips.pop(), b, attention[i]))
                a = b
            if i:
                self.up.append(Upsample(a))
        self.norm_out = nn.GroupNorm(groups, a, eps)
        self.conv_out = zero(nn.Conv2d(a, in_channels, 3, padding=1))

    def forward(self, x, t):
        args, multiple = self.args, 2 ** (len(self.args["mults"]) - 1)
        if x.shape[2] % multiple or x.shape[3] % multiple:
            raise ValueError(f"images of {x.shape[2]}x{x.shape[3]}: give multiples of {multiple}, "
                             "which this U-Net's levels can halve")
        t = embed_time(t, args["channels"], args["shift"], args["cos_first"]).to(x.dtype)
        t = F.silu(self.time(t))
        x = self.conv_in(x)
        skips = [x]                                                           # taken last first
        for layer in self.down:
            x = layer(x, t)
            skips.append(x)
        for layer in self.middle:
            x = layer(x, t)
        for layer in self.up:
            if isinstance(layer, ResBlock):
                x = torch.cat([x, skips.pop()], 1)
            x = layer(x, t)
        return self.conv_out(F.silu(self.norm_out(x)))

    @classmethod
    def from_pretrained(cls, source, **override):
        """A U-Net with public weights, in eval mode.

        source: a hub repository of diffusers' UNet2DModel (google/ddpm-cifar10-32), a folder with
            its config.json, scheduler_config.json and weights, or the file of a state dict of
            improved-diffusion's UNetModel as DLStudio ships it
        override: arguments in place of the source's, such as dropout
        ValueError, OSError: there is no such thing, or it has what this U-Net does not have
        """
        args, _, weights = read_pretrained(str(source))
        read_pretrained.cache_clear()
        try:
            net = cls(**{**args, **override})
            net.load_state_dict(weights)
        except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"{source} is another network: {str(error)[:300]} ...") from error
        return net.eval()


# ---- method: diffusion in the papers' symbols; x_t is the image x_0 after t = 0 ... T steps


def make_alpha_bar(schedule, T):
    """alpha_bar_t, the share of x_0's variance that is left in x_t, for t = 0 ... T, in float64."""
    if schedule == "linear":  # Ho et al., section 4: from 1e-4 to 0.02 for T = 1000
        if T <= 20:
            raise ValueError(f"--timesteps {T}: the linear schedule needs 21 or more")
        beta = torch.linspace(1e-4, 0.02, T, dtype=torch.float64) * 1000 / T
    else:                     # Nichol & Dhariwal 2021, https://arxiv.org/abs/2102.09672, eq. 17
        s = torch.linspace(0.008, 1.008, T + 1, dtype=torch.float64)
        f = torch.cos(s / 1.008 * math.pi / 2)**2
        beta = (1 - f[1:] / f[:-1]).clamp(max=0.999)
    return torch.cat([beta.new_ones(1), (1 - beta).cumprod(0)])


def add_noise(x_0, t, eps, alpha_bar):
    """x_t ~ q(x_t | x_0) (eq. 4); x_0 and eps ~ N(0, 1) are (B, C, H, W), t is (B,).

    t and alpha_bar are on the CPU, for float64: 1 - alpha_bar is tiny where t is small.
    """
    a = alpha_bar[t].view(-1, 1, 1, 1)
    like = dict(device=x_0.device, dtype=x_0.dtype, non_blocking=x_0.is_cuda)
    return a.sqrt().to(**like) * x_0 + (1 - a).sqrt().to(**like) * eps


def ddpm_step(x_t, x_0, a_t, a_s):
    """Mean and variance of q(x_s | x_t, x_0) for s < t (eq. 6 and 7, where s = t - 1).

    a_t, a_s: alpha_bar at t and at s; beta is then that of the whole way from s to t
    """
    beta = 1 - a_t / a_s
    mean = (a_s**0.5 * beta * x_0 + (a_t / a_s)**0.5 * (1 - a_s) * x_t) / (1 - a_t)
    return mean, beta * (1 - a_s) / (1 - a_t)


def ddim_step(x_t, x_0, a_t, a_s, eta):
    """Mean and variance of x_s for s < t (Song et al. 2020, eq. 12 and 16)."""
    eps = (x_t - a_t**0.5 * x_0) / (1 - a_t)**0.5  # the network's, save where x_0 was clipped
    variance = eta**2 * (1 - a_s) / (1 - a_t) * (1 - a_t / a_s)
    return a_s**0.5 * x_0 + (1 - a_s - variance)**0.5 * eps, variance


@torch.no_grad()
def sample(net, x, alpha_bar, steps, sampler="ddpm", variance="small", eta=0.0,
           noise=torch.randn_like, path=None):
    """x_T, noise (B, C, H, W) -> x_0, images in [-1, 1] (Algorithm 2), in `steps` of the T steps.

    sampler, variance, eta: as the flags above say; noise(x) draws noise like x
    path: a list, if given, to which x_T, ..., x_0 are appended
    """
    times = torch.linspace(len(alpha_bar) - 1, 0, steps + 1, dtype=torch.float64).round().long()
    alphas = alpha_bar[times].tolist()
    for t, s, a_t, a_s in zip(times.tolist(), times[1:].tolist(), alphas, alphas[1:]):
        eps = net(x, torch.full((len(x),), t - 1, device=x.device)).to(x.dtype)  # it counts from 0
        # It knows the score, the way to more likely images (https://arxiv.org/abs/2011.13456)
        score = -eps / (1 - a_t)**0.5                                         # grad log q(x_t)
        x_0 = ((x + (1 - a_t) * score) / a_t**0.5).clamp(-1, 1)               # eq. 15
        if path is not None:
            path.append(x)
        if sampler == "ddim":
            mean, var = ddim_step(x, x_0, a_t, a_s, eta)
        else:
            mean, var = ddpm_step(x, x_0, a_t, a_s)
            var = 1 - a_t / a_s if variance == "large" and s else var         # 0 in the last step
        x = mean + var**0.5 * noise(x) if var else mean
    if path is not None:
        path.append(x)
    return x


# ---- optimizer


class Muon(torch.optim.Optimizer):
    """Momentum whose steps are made orthogonal: all directions of a matrix learn at one pace.

    Of Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon/). A convolution's weights are
    a matrix, too, of a row for each output channel. lr is as Adam's, for steps are as long as its
    steps (Liu et al. 2025, https://arxiv.org/abs/2502.16982, eq. 4). torch.optim.Muon does the
    same in bfloat16, for 2-d weights only: 1.7 s a step on a CPU without, where this takes 60 ms.
    """

    def __init__(self, params, lr, momentum=0.95):
        super().__init__(params, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            alike = {}  # weights by shape, to take those of one shape together
            for w in group["params"]:
                alike.setdefault(w.shape, []).append(w)
                if not self.state[w]:
                    self.state[w]["mean"] = torch.zeros_like(w)
            for weights in alike.values():
                grads = [w.grad for w in weights]
                means = [self.state[w]["mean"] for w in weights]
                torch._foreach_lerp_(means, grads, 1 - group["momentum"])
                ahead = torch._foreach_lerp(grads, means, group["momentum"])  # as Nesterov's
                steps = orthogonalize(torch.stack(ahead).flatten(2))
                length = 0.2 * max(steps.shape[1:])**0.5
                for w, step in zip(weights, steps):
                    w.sub_(step.view_as(w), alpha=group["lr"] * length)


def orthogonalize(x):
    """Matrices (N, rows, columns): singular values become about 1 (0.7 to 1.2), all else stays.

    s -> 3.4445 s - 4.775 s**3 + 2.0315 s**5 of each singular value, five times. As x is only ever
    multiplied from the left, by polynomials in x x^T, their product is found first: it is small.
    """
    if x.shape[1] > x.shape[2]:
        return orthogonalize(x.mT).mT
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # errors of TF32 would grow from round to round
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    square, one = x @ x.mT, torch.eye(x.shape[1], device=x.device, dtype=x.dtype)
    product = one
    for _ in range(5):
        factor = 3.4445 * one - 4.775 * square + 2.0315 * square @ square
        product, square = factor @ product, factor @ square @ factor
    x = product @ x
    torch.set_float32_matmul_precision(precision)
    return x


# ---- train and sample


def main():
    import data  # not at the top: the network above needs nothing but torch

    world, rank, local = (int(os.environ.get(name, default)) for name, default in (
        ("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0)))  # as torchrun sets them
    device = data.pick_device(DEVICE)
    if world > 1:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        wait = datetime.timedelta(hours=6)  # while the first downloads, or draws its last samples
        distributed.init_process_group(backend, timeout=wait)
    barrier = distributed.barrier if world > 1 else lambda: None
    bfloat16 = data.pick_bfloat16(DTYPE, device)
    autocast = torch.autocast(device.type, torch.bfloat16, bfloat16)
    out = Path(OUT_DIR)
    goes_on = (RESUME or SAMPLE) and not INIT_FROM
    ckpt = load(CHECKPOINT or out / "ckpt.pt") if goes_on else None
    if INIT_FROM and (CHECKPOINT or RESUME and not SAMPLE):
        fail("--init_from begins anew; to go on with such a run, leave it out")
    for name, good, limit in (
            ("EMA", EMA < 1, "less than 1"), ("DROPOUT", DROPOUT < 1, "less than 1"),
            ("ETA", ETA <= 1, "1 at most"), ("FID", FID != 1, "2 or more")):
        if not good:
            fail(f"--{name.lower()} {config()[name]}: give {limit}")
    for name, allowed in dict(OPTIMIZER=("muon", "adam"), SCHEDULE=("linear", "cosine"),
                              SAMPLER=("ddpm", "ddim"), VARIANCE=("small", "large")).items():
        if config()[name] not in allowed:
            fail(f"--{name.lower()} {config()[name]}: give {' or '.join(allowed)}")
    if SAMPLE_STEPS > TIMESTEPS:
        fail(f"--sample_steps {SAMPLE_STEPS}: there are {TIMESTEPS} of them")
    if CHANNELS < 4 or CHANNELS % 2:
        fail(f"--channels {CHANNELS}: give an even number, 4 or more")
    if IMAGE_SIZE % 2 ** (len(MULTS) - 1):
        fail(f"--image_size {IMAGE_SIZE}: give a multiple of {2 ** (len(MULTS) - 1)}, for the "
             f"{len(MULTS)} levels of --mults halve it {len(MULTS) - 1} times")
    alpha_bar = make_alpha_bar(SCHEDULE, TIMESTEPS)
    if not ckpt and not SAMPLE and (out / "ckpt.pt").exists():
        fail(f"{out} holds a run: give --resume to go on with it, or another --out_dir")
    loaded = UNet.from_pretrained(INIT_FROM, dropout=DROPOUT).train() if INIT_FROM else None
    if SAMPLE:
        shape = ckpt["images"] if ckpt else [0, loaded.args["in_channels"], IMAGE_SIZE, IMAGE_SIZE]
    else:
        if local:
            barrier()  # one process of each machine prepares the data while the others wait
        images, _ = data.load(DATA, IMAGE_SIZE, DATA_DIR, LIMIT, device)
        if not local:
            barrier()
        shape = list(images.shape)
        if ckpt and ckpt["images"] != shape:
            fail(f"{DATA} is {shape} now; the checkpoint was trained on {ckpt['images']}")
        if loaded and loaded.args["in_channels"] != shape[1]:
            fail(f"{DATA} has {shape[1]} channels, --init_from {loaded.args['in_channels']}")
        if min(BATCH_SIZE, len(images)) < world:
            fail(f"{world} processes cannot share batches of {min(BATCH_SIZE, len(images))}")

    torch.manual_seed(SEED)
    layout = dict(device=device, memory_format=data.best_layout(device))
    if bfloat16 and device.type == "cpu":  # GroupNorm is then up to 20 times as fast
        layout["memory_format"] = torch.contiguous_format
    sizes = [shape[2] // 2**i for i in range(len(MULTS))]
    args = ckpt["unet"] if ckpt else dict(
        in_channels=shape[1], channels=CHANNELS, mults=MULTS, blocks=BLOCKS,
        attention=[size in ATTENTION for size in sizes],
        groups=math.gcd(128, CHANNELS) // 4 or 1)  # of one channel, they would lose the time
    net = (loaded or UNet(**{**args, "dropout": DROPOUT})).to(**layout)
    ema = copy.deepcopy(net).eval().requires_grad_(False)  # the network that we sample with
    weights, averages = list(net.parameters()), list(ema.parameters())
    matrices = [w for w in weights if w.ndim > 1 and OPTIMIZER == "muon"]
    others = [w for w in weights if w.ndim == 1 or OPTIMIZER == "adam"]
    opts = dict(opt=torch.optim.Adam(others, LR, (BETA1, BETA2), fused=True))
    if matrices:
        opts["opt_muon"] = Muon(matrices, LR)
    parts = dict(net=net, ema=ema, **opts)
    if ckpt:
        try:
            for name, part in parts.items():
                part.load_state_dict(ckpt[name])
        except (KeyError, RuntimeError, ValueError) as error:
            raise ValueError("the checkpoint does not fit this network") from error
        for opt in opts.values():
            opt.param_groups[0].update(opt.defaults)  # a flag given now wins over the checkpoint
            for w, state in opt.state.items():  # laid out as w is here: fused steps rely on it
                state.update({k: torch.empty_like(w).copy_(v) for k, v in state.items() if v.ndim})
    fast = torch.compile if data.pick_compile(COMPILE, device) else lambda net: net
    fast_ema = fast(ema)

    # For grids. Noise on the way mends errors of a young network; without it, colours run away
    quick = dict(steps=min(50, TIMESTEPS), sampler="ddim", eta=1.0)
    chosen = dict(steps=SAMPLE_STEPS or TIMESTEPS, sampler=SAMPLER, variance=VARIANCE, eta=ETA)
    at_once = min(BATCH_SIZE, 16 if device.type == "cpu" else 128, 2**19 // shape[2]**2 or 1)

    def draw(first, **how):
        """uint8 samples `first`, ...: `at_once` of them, for last bits depend on a batch's size."""
        # (seed, i) decides; steps count their seeds up from the other end of SEED's range
        seeds = [(SEED + 1) * 10**7 - 1 - i for i in range(first, first + at_once)]
        generators = [torch.Generator(device).manual_seed(s) for s in seeds]

        def noise(x=None):
            each = [torch.randn(shape[1:], generator=g, device=device) for g in generators]
            return torch.stack(each).to(**layout)

        with autocast:
            return data.to_uint8(sample(fast_ema, noise(), alpha_bar, noise=noise, **how))

    def generate(begin, end, **how):
        """Yield uint8 batches of samples `begin` ... `end` - 1."""
        for first in range(begin, end, at_once):
            yield draw(first, **how)[:end - first]

    if SAMPLE:
        folder, trained = out / "generated", [ckpt["step"], ckpt["seconds"]] if ckpt else INIT_FROM
        if rank == 0:
            made_by = dict(chosen, seed=SEED, trained=trained, size=shape[2:], at_once=at_once,
                           bfloat16=bfloat16, device=device.type)
            data.keep_images(folder, SAMPLE if RESUME else 0, made_by)
        barrier()
        firsts = data.missing_images(folder, SAMPLE, at_once)
        barrier()
        for first in firsts[rank::world]:
            if sys.stderr.isatty():
                print(f"image {first} of {SAMPLE}", end="\r", file=sys.stderr, flush=True)
            data.write_images(draw(first, **chosen)[:SAMPLE - first], folder, first)
        barrier()
        if rank == 0:
            data.save_overview(folder)
            print(f"wrote {SAMPLE} images to {folder} and a grid to {folder}.png")
        if world > 1:
            distributed.destroy_process_group()
        return 0

    if FID and rank == 0:  # now, for there is no use in training first if its weights are missing
        import fid

        inception = fid.Inception().to(device)

    steps_per_epoch = max(1, len(images) // BATCH_SIZE)
    total = min(EPOCHS * steps_per_epoch, MAX_STEPS or math.inf)
    # sums since the log's last row: of losses and of images, by quarter of t
    past = ckpt or dict(step=0, seconds=0.0, sums=torch.zeros(2, 4))
    step, seconds, sums = past["step"], past["seconds"], past["sums"].to(device) * (rank == 0)
    out.mkdir(parents=True, exist_ok=True)
    names = ("loss", "loss_q1", "loss_q2", "loss_q3", "loss_q4")
    log = data.Log(out / "log.csv", names, step, seconds) if rank == 0 else None

    def gather():
        """Bring `sums` of all processes into the first one, and stop if they are not finite."""
        if world > 1:
            distributed.all_reduce(sums)
        if not sums.isfinite().all():  # the loop waits for the GPU here, and for pictures
            fail(f"training diverged by step {step}: a loss or weight is not finite; try a "
                 f"lower --lr (the last checkpoint in {out} stays as it was)")
        sums.mul_(rank == 0)  # the first one goes on from the sums of all

    def checkpoint():
        if not all(w.isfinite().all() for w in weights):
            sums.fill_(math.nan)  # of all processes, then
        gather()
        state = {name: part.state_dict() for name, part in parts.items()}
        if rank == 0:
            save(out / "ckpt.pt", **state, config=config(), unet=net.args, images=shape, step=step,
                 epoch=step // steps_per_epoch, seconds=log.seconds(), sums=sums)

    def pictures(name):
        path = []
        grid = torch.cat([draw(0, **quick, path=path), *generate(at_once, 64, **quick)])[:64]
        data.save_grid(grid, out / "samples" / name)
        shown = [path[i * (len(path) - 1) // 10][:8] for i in range(11)]  # from x_T to x_0
        data.save_grid(data.to_uint8(torch.stack(shown, 1).flatten(0, 1)), out / "denoise.png", 11)
        data.save_curves(out / "log.csv", out / "loss.png", "log")

    if not ckpt:
        checkpoint()  # claims the folder, and finds out now if the disk is full
    stop = data.catch_signals(patient=world > 1)
    levels = ", ".join(f"{side}x{side} {CHANNELS * m} channels" + " with attention" * a
                       for side, m, a in zip(sizes, MULTS, net.args["attention"]))
    levels += ", attention in the middle only" * (not any(net.args["attention"]))
    if rank == 0:
        print(f"U-Net: {levels}; {sum(p.numel() for p in net.parameters()):,} weights", flush=True)
    fast_net = fast(nn.parallel.DistributedDataParallel(net) if world > 1 else net)
    ending = 0  # the number of the signal that stops the run, on whichever process it arrived

    while step < total and not ending and (world > 1 or not stop):
        epoch, start = divmod(step, steps_per_epoch)
        saved_at = time.time()
        for x_0, _ in data.batches(images, None, BATCH_SIZE, SEED, epoch, device, FLIP, start):
            torch.manual_seed(SEED * 10**7 + step)  # (seed, step) decides a step: --resume is exact

            # Algorithm 1: tell the noise in x_t, for any t in 1 ... T; the network counts from 0
            # Each process draws for the whole batch and keeps its share: so many make one step
            count = len(x_0)
            share = slice(count * rank // world, count * (rank + 1) // world)
            t, eps = torch.randint(1, TIMESTEPS + 1, (count,))[share], torch.randn_like(x_0)[share]
            if rank:
                torch.manual_seed((SEED * 10**7 + step) * world + rank)  # for dropout of its own
            x_t = add_noise(x_0[share], t, eps, alpha_bar).to(**layout)
            with autocast:
                guess = fast_net(x_t, (t - 1).to(device, non_blocking=x_0.is_cuda)).to(x_0.dtype)
            errors = (eps - guess).square().mean((1, 2, 3))  # of each image
            loss = errors.sum() / count                      # eq. 14
            net.zero_grad()
            (loss * world).backward()  # DistributedDataParallel averages gradients over processes
            for opt in opts.values():
                opt.step()

            with torch.no_grad():
                decay = min(EMA, (1 + step) / (10 + step))  # warm-up: the initial weights go soon
                torch._foreach_lerp_(averages, weights, 1 - decay)  # e.lerp_(w, ...) for each pair
                quarter = F.one_hot((t - 1) * 4 // TIMESTEPS, 4).to(x_0, non_blocking=x_0.is_cuda)
                sums += torch.stack([errors @ quarter, quarter.sum(0)])
            step += 1

            if step == 1 or step % LOG_EVERY == 0:
                gather()
                if rank == 0:
                    totals = torch.cat([sums.sum(1, keepdim=True), sums], 1)  # all t, then each
                    log.write(step, total, epoch + 1, count, (totals[0] / totals[1]).tolist())
                sums.zero_()
            ending, due = (stop or [0])[0], time.time() - saved_at > 600
            if world > 1:  # what one process is asked to do, all do
                asked = torch.tensor([ending, due], dtype=torch.int64)
                distributed.all_reduce(asked, distributed.ReduceOp.MAX)
                ending, due = asked.tolist()
            if step >= total or ending:
                break
            if due:
                checkpoint()
                saved_at = time.time()

        epoch, rest = divmod(step, steps_per_epoch)
        checkpoint()
        drawn = SAMPLE_EVERY and (step >= total or not rest and epoch % SAMPLE_EVERY == 0)
        if drawn and rank == 0:
            pictures(f"epoch_{epoch + bool(rest):04}.png")

    barrier()  # gloo drops tensors of the last exchange a little later: not while Python ends
    ending = ending or (stop or [0])[0]  # one that came during the last pictures
    data.release_signals()
    if world > 1:
        distributed.destroy_process_group()
    if rank == 0:
        data.save_gif(out / "samples", out / "samples.gif")
        print(f"{'stopped' if ending else 'done'} at step {step}, saved in {out / 'ckpt.pt'}"
              + "; go on with --resume" * bool(ending))
    if FID and rank == 0 and not ending:
        real = fid.cached_statistics(images, inception, DATA_DIR)
        fake = fid.statistics(generate(0, FID, **chosen), inception)
        distance = fid.frechet_distance(*fake, *real)
        print(f"FID {distance:.4f} of {FID} samples against {shape[0]} images")
    return 128 + ending if ending else 0


# ---- appendix: the same U-Net as diffusers' UNet2DModel or improved-diffusion's UNetModel has it


@functools.cache
def read_pretrained(source):
    """What from_pretrained() takes -> UNet's arguments, settings for the constants, weights."""
    try:
        read = read_improved if Path(source).is_file() else read_diffusers
        args, size, settings, weights = read(source)
        weights = translate(weights, args["blocks"])
        sizes = [size // 2**i for i in range(len(args["mults"]))]
        if sizes[-1] < 1:
            fail(f"--init_from {source}: its sample_size is {size}, too small for its levels")
    except OSError as error:
        raise OSError(f"--init_from {source}: {error}; give a hub repository, a folder with its "
                      "files, or DLStudio's diffusion.pt") from error
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError,
            UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"--init_from {source}: not what was expected: {error!r}") from error
    sizes = tuple(side for side, there in zip(sizes, args["attention"]) if there)
    settings.update(IMAGE_SIZE=size, CHANNELS=args["channels"], MULTS=tuple(args["mults"]),
                    BLOCKS=args["blocks"], ATTENTION=sizes or (0,), DROPOUT=args["dropout"])
    return args, settings, weights


def read_diffusers(source):
    """A folder or hub repository: a UNet2DModel, and T, betas and variance in its scheduler."""
    unet, scheduler = (json.loads(fetch(source, name).read_text("utf-8"))
                       for name in ("config.json", "scheduler_config.json"))
    width, T = unet["block_out_channels"][0], scheduler["num_train_timesteps"]
    mults = [w // width for w in unet["block_out_channels"]]
    attention = [kind.startswith("Attn") for kind in unet["down_block_types"]]
    down = ["Attn" * a + "DownBlock2D" for a in attention]
    linear = scheduler["beta_schedule"] == "linear"
    possible = dict(  # what each option may be; []: anything; those that are not here: None
        act_fn=["silu"], add_attention=[True], beta_end=[20 / T] * linear,
        beta_schedule=["linear", "squaredcos_cap_v2"], beta_start=[0.1 / T] * linear,
        block_out_channels=[[width * m for m in mults]], center_input_sample=[False],
        clip_sample=[True], clip_sample_range=[1], down_block_types=[down],
        downsample_padding=[0, 1], downsample_type=["conv"], dropout=[],
        dynamic_thresholding_ratio=[], flip_sin_to_cos=[], freq_shift=[], in_channels=[],
        layers_per_block=[], mid_block_scale_factor=[1], mid_block_type=["UNetMidBlock2D"],
        norm_eps=[], norm_num_groups=[], num_train_timesteps=[None, T],
        out_channels=[unet["in_channels"]], prediction_type=["epsilon"],
        rescale_betas_zero_snr=[False], resnet_time_scale_shift=["default"], sample_max_value=[],
        sample_size=[], steps_offset=[], thresholding=[False], time_embedding_type=["positional"],
        timestep_spacing=[],  # all are the same for all steps; for fewer --sample_steps decides
        up_block_types=[[kind.replace("Down", "Up") for kind in down[::-1]]],
        upsample_type=["conv"], variance_type=["fixed_large", "fixed_small_log", "fixed_small"])
    for name, value in {"attention_head_dim": 8, **scheduler, **unet}.items():  # 8: their default
        few = possible.get(name, [None])
        if few and value not in few and not name.startswith("_"):
            fail(f"--init_from {source}: its {name} is {value}, here that is {few[-1]}")
    args = dict(in_channels=unet["in_channels"], channels=width, mults=mults, attention=attention,
                blocks=unet["layers_per_block"], groups=unet["norm_num_groups"],
                dropout=unet.get("dropout", 0.0), eps=unet["norm_eps"], shift=unet["freq_shift"],
                cos_first=unet["flip_sin_to_cos"], symmetric=unet["downsample_padding"] == 1)
    settings = dict(TIMESTEPS=T, SCHEDULE="linear" if linear else "cosine",
                    VARIANCE=scheduler.get("variance_type", "fixed_small").split("_")[1])
    try:
        weights = read_weights(fetch(source, "diffusion_pytorch_model.safetensors"))
    except OSError:  # there is none
        weights = read_weights(fetch(source, "diffusion_pytorch_model.bin"))
    return args, unet["sample_size"], settings, weights


def read_improved(source):
    """A state dict of UNetModel with one head, as DLStudio ships it; the shapes tell its sizes."""
    weights = read_weights(Path(source))
    shape = weights["input_blocks.0.0.weight"].shape
    width, channels = shape[0], shape[1]
    if len(weights["out.2.weight"]) != channels:
        fail(f"--init_from {source}: it learned variances, too; here they are fixed")
    outputs = {int(name.split(".")[1]): len(weight) for name, weight in weights.items()
               if re.fullmatch(r"input_blocks\.\d+\.0\.in_layers\.2\.weight", name)}
    firsts = [n for n in outputs if n - 1 not in outputs]  # blocks that begin a level
    args = dict(in_channels=channels, channels=width, mults=[outputs[n] // width for n in firsts],
                attention=[f"input_blocks.{n}.1.qkv.weight" in weights for n in firsts],
                blocks=len(outputs) // len(firsts), groups=32, dropout=0.0, eps=1e-5, shift=0,
                cos_first=True, symmetric=True,
                all_skips="input_blocks.1.0.skip_connection.weight" in weights)
    return args, 64, dict(TIMESTEPS=1000, SCHEDULE="linear", VARIANCE="small"), weights


def translate(weights, blocks):
    """Weights by their names there -> by their names here."""
    def place(m):  # side, level, kind of layer, which of them
        n = int(m[2]) * (blocks + 1 + (m[1] == "up")) + int(m[4])
        return f"{m[1]}.{n}" + ".attention" * (m[3] == "attentions")

    def up(m):  # improved-diffusion counts blocks on over all levels, and upsamplings with them
        return f"up.{int(m[1]) + int(m[1]) // (blocks + 1) + m[2].endswith('conv')}"

    rules = {
        r"(\w+)samplers\.0\.conv": lambda m: f"resnets.{blocks + (m[1] == 'up')}",
        r"(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)": place,
        r"mid_block\.resnets": "middle", r"mid_block\.attentions\.0": "middle.0.attention",
        r"time_embedding\.linear_1": "time.0", r"time_embedding\.linear_2": "time.2",
        r"time_emb_proj": "time", r"conv_shortcut": "skip", r"group_norm": "norm",

        r"^time_embed\.": "time.", r"^input_blocks\.0\.0": "conv_in",
        r"^((in|out)put_blocks\.\d+|middle_block)\.1\.(norm|qkv|proj_out)": r"\1.0.attention.\3",
        r"^input_blocks\.(\d+)\.0(\.op)?": lambda m: f"down.{int(m[1]) - 1}",
        r"^output_blocks\.(\d+)\.(0|\d\.conv)": up,
        r"^middle_block\.0": "middle.0", r"^middle_block\.2": "middle.1",
        r"in_layers\.0": "norm1", r"in_layers\.2": "conv1", r"emb_layers\.1": "time",
        r"out_layers\.0": "norm2", r"out_layers\.[23]": "conv2", r"skip_connection": "skip",
        r"conv_norm_out|^out\.0": "norm_out", r"^out\.2": "conv_out",

        r"attention\.(to_)?([qkv])(uery|ey|alue)?\.": r"attention.\2.",
        r"attention\.(to_out\.0|proj_attn|proj_out)": "attention.out"}
    named = {}
    for name, weight in weights.items():
        for there, here in rules.items():
            name = re.sub(there, here, name)
        named[name] = weight.float().flatten(1) if weight.ndim == 3 else weight.float()  # 1d convs
    for name in [n for n in named if ".attention.q." in n]:  # here q, k and v are one layer
        parts = [named.pop(name.replace(".q.", f".{part}.")) for part in "qkv"]
        named[name.replace(".q.", ".qkv.")] = torch.cat(parts)
    return named


def fetch(source, name):
    """The path of a file in a folder, or of one from a hub repository, downloaded once."""
    if Path(source).is_dir():
        return Path(source, name)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        raise OSError("there is no such file or folder")
    path = Path(torch.hub.get_dir(), "checkpoints", source.replace("/", "--"), name)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        url = f"https://huggingface.co/{source}/resolve/main/{name}"
        torch.hub.download_url_to_file(url, str(path))
    return path


def read_weights(path):
    """The state dict in a file of torch's or of safetensors' format; nothing in it can run."""
    try:
        if path.suffix != ".safetensors":
            return torch.load(path, map_location="cpu", weights_only=True)
        return read_safetensors(bytearray(path.read_bytes()))
    except OSError:
        raise
    except Exception as error:  # a damaged or hostile file raises nearly anything
        raise ValueError(f"{path} is no whole file of weights ({error!r}); if it was downloaded, "
                         "delete it, and it will be once more") from error


def read_safetensors(file):
    """The length of a header, in 8 bytes; the header, in JSON; tensors, without gap or overlap."""
    start = 8 + int.from_bytes(file[:8], "little")
    if start > min(len(file), 10**8):
        raise ValueError("the header is too long")
    header, data, tensors, at = json.loads(file[8:start]), file[start:], {}, 0
    header.pop("__metadata__", None)
    dtypes = dict(F64=torch.float64, F32=torch.float32, F16=torch.float16, BF16=torch.bfloat16)
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape, (begin, end) = dtypes[entry["dtype"]], entry["shape"], entry["data_offsets"]
        if begin != at or end != at + math.prod(shape) * dtype.itemsize or end > len(data):
            raise ValueError(f"{name} does not lie where it should")
        tensors[name] = torch.frombuffer(data[begin:end], dtype=dtype).view(shape)
        at = end
    return tensors


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
