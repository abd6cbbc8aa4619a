"""DDPM: images out of noise, step by step (Ho et al. 2020, https://arxiv.org/abs/2006.11239).

T small steps turn an image into noise. A U-Net learns to tell the noise in a noisy image; with it
the steps can be taken backwards, and pure noise becomes a new image. DDIM (Song et al. 2020,
https://arxiv.org/abs/2010.02502) takes fewer, longer steps with the same network.

    python ddpm.py                                # digits: MNIST, into out/ddpm
    python ddpm.py --data celeba --out_dir out/faces
    python ddpm.py --sample 2048 --sample_steps 100              # write images, in 100 steps each
    python ddpm.py --sample 2048 --sample_steps 50 --sampler ddim
    python ddpm.py --data path/to/photos --image_size 64 --out_dir out/photos

To train on a tensor of your own, use it in main() in place of what data.load() returns.
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
BATCH_SIZE = 128        # images a step
LR = 1e-3               # Adam: learning rate
BETA1 = 0.9             # Adam: decay of the gradients' mean; 0 = no memory
BETA2 = 0.999           # Adam: decay of the mean of their squares
TIMESTEPS = 1000        # T: steps from an image to noise
SCHEDULE = "linear"     # how the noise grows: linear (Ho et al.) or cosine (Nichol & Dhariwal)
CHANNELS = 32           # of the U-Net's first level
MULTS = (1, 2, 4)       # channels of each level, as multiples of that; each halves the image's size
BLOCKS = 1              # residual blocks a level on the way down; one more on the way up
ATTENTION = (7,)        # attention in levels of these sizes, in pixels, if there are any; 0 = none
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
SAMPLE_EVERY = 1        # epochs between two grids of samples, by ddim in 50 steps; 0 = none
FID = 0                 # at the end: FID of so many samples against the data; 0 = none
RESUME = False          # go on from ckpt.pt in out_dir; with --sample: where that stopped
SAMPLE = 0              # do not train: write so many images, 1 or more, to out_dir/generated
CHECKPOINT = ""         # for --sample: the checkpoint, if it is not ckpt.pt in out_dir

PRESETS = {
    "celeba": dict(IMAGE_SIZE=64, FLIP=True, EPOCHS=100, LR=2e-4, EMA=0.9999, CHANNELS=64,
                   MULTS=(1, 2, 3, 4), BLOCKS=2, ATTENTION=(8, 16)),
    "toy-faces": dict(IMAGE_SIZE=32, FLIP=True, ATTENTION=(8,)),
}
FIXED = {"DATA", "IMAGE_SIZE", "LIMIT", "FLIP", "BATCH_SIZE", "TIMESTEPS", "SCHEDULE", "CHANNELS",
         "MULTS", "BLOCKS", "ATTENTION"}  # in a checkpoint
LOCAL = {"DATA_DIR", "OUT_DIR", "MAX_STEPS", "DEVICE", "DTYPE", "COMPILE", "LOG_EVERY",
         "SAMPLE_EVERY", "RESUME", "SAMPLE", "CHECKPOINT"}  # never taken from a checkpoint

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

    settings = {**config(), **PRESETS.get(given.get("DATA", DATA), {}), **given}
    if settings["CHECKPOINT"] and not settings["SAMPLE"]:
        fail("--checkpoint goes with --sample; --resume goes on from ckpt.pt in --out_dir")
    if settings["RESUME"] or settings["SAMPLE"]:
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


def embed_time(t, channels):
    """Times (B,) -> (B, channels): sines, then cosines, of frequencies from 1 down to 1/10000."""
    half = channels // 2
    frequency = torch.exp(-math.log(10000) / (half - 1) * torch.arange(half, device=t.device))
    angle = t[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], 1)


class ResBlock(nn.Module):
    """Two convolutions with the time added in between, past which the input skips; attention."""

    def __init__(self, a, b, attention, time, groups, dropout):
        super().__init__()
        self.norm1, self.norm2 = (nn.GroupNorm(groups, c, eps=1e-6) for c in (a, b))
        self.conv1 = nn.Conv2d(a, b, 3, padding=1)
        self.conv2 = zero(nn.Conv2d(b, b, 3, padding=1))
        self.time = nn.Linear(time, b)
        self.dropout = nn.Dropout(dropout)
        self.skip = nn.Conv2d(a, b, 1) if a != b else nn.Identity()
        self.attention = Attention(b, groups) if attention else nn.Identity()

    def forward(self, x, t):
        h = self.conv1(F.silu(self.norm1(x))) + self.time(t)[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.attention(self.skip(x) + h)


class Attention(nn.Module):
    """Every pixel looks at every other one: single-head self-attention, past which x skips."""

    def __init__(self, channels, groups):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = zero(nn.Linear(channels, channels))

    def forward(self, x):
        h = self.norm(x).flatten(2).transpose(1, 2)                           # (B, H W, C)
        q, k, v = self.qkv(h)[:, None].chunk(3, -1)                           # (B, 1, H W, C)
        h = self.out(F.scaled_dot_product_attention(q, k, v)[:, 0])
        return x + h.transpose(1, 2).view(x.shape)


class Downsample(nn.Conv2d):
    """Half the size: a convolution of stride 2, with zeros to the right and below."""

    def __init__(self, channels):
        super().__init__(channels, channels, 3, stride=2)

    def forward(self, x, t):
        return super().forward(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Conv2d):
    """Twice the size: each pixel becomes 2x2, then a convolution.

    Its 3x3 weights meet only 2x2 different pixels. To sum those that meet the same one beforehand
    gives a transposed convolution of 4x4 weights: the same, with half of the multiplications.
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
    groups: of GroupNorm; must divide channels
    """

    def __init__(self, in_channels=1, channels=32, mults=(1, 2, 4), blocks=1,
                 attention=(False, False, True), groups=8, dropout=0.0):
        super().__init__()
        self.channels, self.multiple = channels, 2 ** (len(mults) - 1)
        widths = [channels * m for m in mults]
        time = 4 * channels
        self.time = nn.Sequential(nn.Linear(channels, time), nn.SiLU(), nn.Linear(time, time))
        self.conv_in = nn.Conv2d(in_channels, channels, 3, padding=1)

        def block(a, b, attention):
            return ResBlock(a, b, attention, time, groups, dropout)

        self.down, a = nn.ModuleList(), channels
        skips = [a]                                                           # channels of each
        for i, b in enumerate(widths):
            for _ in range(blocks):
                self.down.append(block(a, b, attention[i]))
                a = b
                skips.append(a)
            if i < len(widths) - 1:
                self.down.append(Downsample(a))
                skips.append(a)
        self.middle = nn.ModuleList([block(a, a, True), block(a, a, False)])
        self.up = nn.ModuleList()
        for i, b in reversed(list(enumerate(widths))):
            for _ in range(blocks + 1):
                self.up.append(block(a + skips.pop(), b, attention[i]))
                a = b
            if i:
                self.up.append(Upsample(a))
        self.norm_out = nn.GroupNorm(groups, a, eps=1e-6)
        self.conv_out = zero(nn.Conv2d(a, in_channels, 3, padding=1))

    def forward(self, x, t):
        if x.shape[2] % self.multiple or x.shape[3] % self.multiple:
            raise ValueError(f"images of {x.shape[2]}x{x.shape[3]}: give multiples of "
                             f"{self.multiple}, which this U-Net's levels can halve")
        t = F.silu(self.time(embed_time(t, self.channels).to(x.dtype)))
        x = self.conv_in(x)
        skips = [x]
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


def zero(layer):
    """Start from weights of zero: each residual branch, and the whole U-Net, does nothing yet."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


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
    """x_t ~ q(x_t | x_0) (eq. 4); x_0 and eps ~ N(0, 1) are (B, C, H, W), t is (B,), on the CPU."""
    a = alpha_bar[t].view(-1, 1, 1, 1)
    like = dict(device=x_0.device, dtype=x_0.dtype, non_blocking=True)
    return a.sqrt().to(**like) * x_0 + (1 - a).sqrt().to(**like) * eps


def ddpm_step(x_t, x_0, a_t, a_s):
    """Mean and variance of q(x_s | x_t, x_0) for s < t (eq. 6 and 7, where s = t - 1)."""
    beta = 1 - a_t / a_s
    mean = (a_s**0.5 * beta * x_0 + (a_t / a_s)**0.5 * (1 - a_s) * x_t) / (1 - a_t)
    return mean, beta * (1 - a_s) / (1 - a_t)


def ddim_step(x_t, x_0, a_t, a_s, eta):
    """Mean and variance of x_s for s < t (Song et al. 2020, eq. 12 and 16)."""
    eps = (x_t - a_t**0.5 * x_0) / (1 - a_t)**0.5
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
        eps = net(x, torch.full((len(x),), t - 1, device=x.device)).to(x.dtype)  # t - 1: see main()
        # What the network knows is the score, the way towards more likely images: 2011.13456
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


# ---- train and sample


def main():
    import data  # not at the top: the network above needs nothing but torch

    device = data.pick_device(DEVICE)
    autocast = torch.autocast(device.type, torch.bfloat16, data.pick_bfloat16(DTYPE, device))
    out = Path(OUT_DIR)
    ckpt = load(CHECKPOINT or out / "ckpt.pt") if RESUME or SAMPLE else None
    if EMA >= 1 or DROPOUT >= 1 or ETA > 1 or FID == 1:
        fail("--ema and --dropout must be less than 1, --eta 1 at most, and --fid 2 or more")
    for name, allowed in dict(SCHEDULE=("linear", "cosine"), SAMPLER=("ddpm", "ddim"),
                              VARIANCE=("small", "large")).items():
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
    if not ckpt and (out / "ckpt.pt").exists():
        fail(f"{out} holds a run: give --resume to go on with it, or another --out_dir")
    if SAMPLE:
        shape = ckpt["images"]
    else:
        images, _ = data.load(DATA, IMAGE_SIZE, DATA_DIR, LIMIT, device)
        shape = list(images.shape)
        if ckpt and ckpt["images"] != shape:
            fail(f"{DATA} is {shape} now; the checkpoint was trained on {ckpt['images']}")

    torch.manual_seed(SEED)
    layout = dict(device=device, memory_format=data.best_layout(device))
    sizes = [IMAGE_SIZE // 2**i for i in range(len(MULTS))]
    attention = [size in ATTENTION for size in sizes]
    groups = math.gcd(128, CHANNELS) // 4 or 1  # 4 channels each, or more: one would lose the time
    net = UNet(shape[1], CHANNELS, MULTS, BLOCKS, attention, groups, DROPOUT).to(**layout)
    ema = copy.deepcopy(net).eval().requires_grad_(False)  # the network that we sample with
    adam = dict(lr=LR, betas=(BETA1, BETA2))
    opt = torch.optim.Adam(net.parameters(), **adam, fused=True)
    parts = dict(net=net, ema=ema, opt=opt)
    if ckpt:
        try:
            for name, part in parts.items():
                part.load_state_dict(ckpt[name])
        except (KeyError, RuntimeError, ValueError) as error:
            raise ValueError("the checkpoint does not fit this network") from error
        for group in opt.param_groups:
            group.update(adam)  # a flag given now wins over the checkpoint
    compiled = data.pick_compile(COMPILE, device)
    fast_net, fast_ema = (torch.compile(net), torch.compile(ema)) if compiled else (net, ema)

    quick = dict(steps=min(50, TIMESTEPS), sampler="ddim")
    chosen = dict(steps=SAMPLE_STEPS or TIMESTEPS, sampler=SAMPLER, variance=VARIANCE, eta=ETA)
    at_once = min(BATCH_SIZE, 16) if device.type == "cpu" else BATCH_SIZE

    def draw(first, count, **how):
        """Samples `first`, `first` + 1, ... as floats (count, C, H, W)."""
        seeds = [(SEED + 1) * 10**7 - 1 - i for i in range(first, first + count)]  # steps count up
        generators = [torch.Generator(device).manual_seed(s) for s in seeds]  # (seed, i) decides

        def noise(x=None):
            one = [torch.randn(shape[1:], generator=g, device=device) for g in generators]
            return torch.stack(one).to(**layout)

        with autocast:
            return sample(fast_ema, noise(), alpha_bar, noise=noise, **how)

    def generate(count, first=0, **how):
        """Yield uint8 batches of samples `first`, ... `count` - 1."""
        for i in range(first, count, at_once):  # whole ones: last bits depend on a batch's size
            yield data.to_uint8(draw(i, at_once, **how))[:count - i]

    if SAMPLE:
        made_by = dict(chosen, seed=SEED, trained=ckpt["step"], at_once=at_once)
        kept = data.kept_images(out / "generated", made_by, RESUME)
        first = min(kept, SAMPLE) // at_once * at_once
        data.save_images(generate(SAMPLE, first, **chosen), out / "generated", first=first)
        print(f"wrote {SAMPLE} images to {out / 'generated'} and a grid to {out / 'generated.png'}")
        return 0

    if FID:  # now, for there is no use in training first if its weights are missing
        import fid

        inception = fid.Inception().to(device)

    steps_per_epoch = max(1, len(images) // BATCH_SIZE)
    total = min(EPOCHS * steps_per_epoch, MAX_STEPS or math.inf)
    # sums since the log's last row: steps, loss; loss and images by quarter of t
    step, seconds, sums = 0, 0.0, torch.zeros(10, device=device)
    if ckpt:
        step, seconds, sums = ckpt["step"], ckpt["seconds"], ckpt["sums"].to(device)
    out.mkdir(parents=True, exist_ok=True)
    names = ("loss", "loss_q1", "loss_q2", "loss_q3", "loss_q4")
    log = data.Log(out / "log.csv", names, step, seconds)

    def checkpoint():
        if not all(t.isfinite().all() for t in [sums, *net.parameters()]):
            fail(f"training diverged by step {step}: a loss is not finite; try a lower --lr "
                 f"(the last checkpoint in {out} stays as it was)")
        state = {name: part.state_dict() for name, part in parts.items()}
        save(out / "ckpt.pt", **state, config=config(), images=shape, step=step,
             epoch=step // steps_per_epoch, seconds=log.seconds(), sums=sums)

    def pictures(name):
        data.save_grid(torch.cat(list(generate(64, **quick))), out / "samples" / name)
        path = []
        draw(0, at_once, **quick, path=path)
        shown = [path[i * (len(path) - 1) // 10][:8] for i in range(11)]  # from x_T to x_0
        data.save_grid(data.to_uint8(torch.stack(shown, 1).flatten(0, 1)), out / "denoise.png", 11)
        data.save_curves(out / "log.csv", out / "loss.png", "log")

    if not ckpt:
        checkpoint()  # claims the folder, and finds out now if the disk is full
    stop = data.catch_signals()
    levels = ", ".join(f"{size}x{size} {CHANNELS * m} channels" + " with attention" * a
                       for size, m, a in zip(sizes, MULTS, attention))
    print(f"U-Net: {levels}; {sum(p.numel() for p in net.parameters()):,} weights", flush=True)
    pairs = list(zip(ema.parameters(), net.parameters()))
    one = torch.ones(1, device=device)

    while step < total and not stop:
        epoch, start = divmod(step, steps_per_epoch)
        saved_at = time.time()
        for x_0, _ in data.batches(images, None, BATCH_SIZE, SEED, epoch, device, FLIP, start):
            torch.manual_seed(SEED * 10**7 + step)  # (seed, step) decides a step: --resume is exact

            # Algorithm 1: tell the noise in x_t, for any t in 1 ... T; the network counts from 0
            t = torch.randint(1, TIMESTEPS + 1, (len(x_0),))
            quarter = F.one_hot((t - 1) * 4 // TIMESTEPS, 4).T.float().to(device, non_blocking=True)
            eps = torch.randn_like(x_0)
            x_t = add_noise(x_0, t, eps, alpha_bar)
            with autocast:
                guess = fast_net(x_t, (t - 1).to(device, non_blocking=True)).float()
            errors = (eps - guess).square().mean((1, 2, 3))  # of each image
            loss = errors.mean()                             # eq. 14
            opt.zero_grad()
            loss.backward()
            opt.step()

            with torch.no_grad():
                decay = min(EMA, (1 + step) / (10 + step))  # warm-up: the initial weights go soon
                for e, p in pairs:
                    e.lerp_(p, 1 - decay)
                sums += torch.cat([one, loss[None], quarter @ errors, quarter.sum(1)])
            step += 1

            if step == 1 or step % LOG_EVERY == 0:
                count, total_loss, *quarters = sums.tolist()  # the one place that waits for the GPU
                if not math.isfinite(total_loss):
                    checkpoint()  # which says so
                quarters = [a / b if b else math.nan for a, b in zip(quarters, quarters[4:])]
                log.write(step, total, epoch + 1, len(x_0), [total_loss / count, *quarters])
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
        fake = fid.statistics(generate(FID, **chosen), inception)
        distance = fid.frechet_distance(*fake, *real)
        print(f"FID {distance:.4f} of {FID} samples against {shape[0]} images")
    return 128 + stop[0] if stop else 0


if __name__ == "__main__":
    try:
        globals().update(parse_flags())
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
