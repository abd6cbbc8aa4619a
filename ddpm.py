"""DDPM: images from noise, step by step (Ho et al. 2020, https://arxiv.org/abs/2006.11239).

T small steps turn an image into noise. A U-Net learns to predict the noise in a noisy image; with
it, noise becomes an image. DDIM (Song et al. 2020, https://arxiv.org/abs/2010.02502) is faster.

    python ddpm.py                                               # MNIST, into out/ddpm
    python ddpm.py --data celeba --out_dir out/faces             # faces; needs a GPU
    python ddpm.py --sample 2048 --sample_steps 100              # write images, in 100 steps each
    python ddpm.py --sample 64 --sample_steps 50 --sampler ddim
    python ddpm.py --conditional --out_dir out/conditional       # learn the labels, too
    python ddpm.py --sample 10 --label 7 --guidance 2 --out_dir out/conditional
    python ddpm.py --init_from google/ddpm-cifar10-32 --sample 64 --out_dir out/cifar10
    torchrun --nproc_per_node=4 ddpm.py --data celeba --out_dir out/faces

Measured: 10 epochs, --conditional; a classifier recognizes all of 1,000 samples with guidance 2.
To train on your own tensor, replace data.load(...) in main() by tensor, None: uint8 (N, C, H, W).
"""
import argparse
import copy
import datetime
import math
import os
import re
import signal
import sys
import time
from pathlib import Path

import torch
from torch import distributed, nn
from torch.nn import functional as F

# ---- config: every constant is also a flag, e.g. --timesteps 100 --mults 1 2 2 4

DATA = "mnist"          # celeba, mnist, toy-faces, toy-digits; or a folder, .zip, .npy or .npz
DATA_DIR = "data"       # where the named sets are found, downloaded and cached
OUT_DIR = "out/ddpm"    # where the run writes
IMAGE_SIZE = 28         # pixels a side
LIMIT = 0               # only the first N images; 0 = all
FLIP = False            # mirror images at random; not for digits
EPOCHS = 10             # stop after N epochs, those before a resume among them
MAX_STEPS = 0           # stop after N steps, if that is sooner; 0 = no limit
BATCH_SIZE = 128        # images in a step, over all processes together
LR = 1e-3               # Adam: learning rate after warm-up; it decays to 0 over all epochs
BETA1 = 0.9             # Adam: decay of the average gradient
BETA2 = 0.999           # Adam: decay of the average squared gradient
TIMESTEPS = 1000        # T, the number of steps from an image to noise
SCHEDULE = "linear"     # how the noise grows: linear (Ho et al.) or cosine (Nichol & Dhariwal)
CHANNELS = 32           # of the U-Net at full size
MULTS = (1, 2, 4)       # channels of each level, as multiples of CHANNELS; each has half the size
BLOCKS = 1              # residual blocks in each level
ATTENTION = (7,)        # image sizes whose levels have attention; the middle always has it
DROPOUT = 0.0           # in residual blocks
CONDITIONAL = False     # give the network the labels
EMA = 0.999             # decay of the averaged weights that samples come from; 0 = no averaging
SAMPLER = "ddpm"        # with --sample and --fid: ddpm or ddim
SAMPLE_STEPS = 0        # take only N of the T steps, evenly spaced; 0 = all
VARIANCE = "small"      # of a ddpm step: small (of the posterior) or large (beta)
ETA = 0.0               # noise in a ddim step, from 0 = none to 1 = as much as in ddpm
GUIDANCE = 1.0          # weight of the label in conditional samples; 1 = no guidance
SEED = 0                # of initial weights, noise and the order of images
DEVICE = "auto"         # cuda, mps or cpu; auto = the first of them that there is
DTYPE = "auto"          # bfloat16 or float32; auto = bfloat16 on GPUs that support it
COMPILE = True          # use torch.compile (on CUDA only)
LOG_EVERY = 50          # steps between two rows of the log
SAMPLE_EVERY = 1        # epochs between two grids of samples, of 50 steps each; 0 = none
FID = 0                 # after training, FID of N samples against N images; 0 = none
RESUME = False          # go on from ckpt.pt in OUT_DIR
SAMPLE = 0              # do not train; write N images to OUT_DIR/generated, in place of older ones
LABEL = ""              # with --sample: classes in turn, e.g. 7 or 2,0,2,6; default: all in turn
INIT_FROM = ""          # public weights: a hub repository, a folder like one, or diffusion.pt

# EMA stays 0.999, an average over about 1,000 steps: samples are good after 10,000 training steps
PRESETS = {
    "celeba": dict(IMAGE_SIZE=64, FLIP=True, EPOCHS=100, LR=2e-4, CHANNELS=64, MULTS=(1, 2, 3, 4),
                   BLOCKS=2, ATTENTION=(8, 16)),
}

# ---- network: the U-Net of Ho et al. (appendix B)


def embed_time(t, channels, cos_first=False):
    """t (B,) -> (B, channels): sines and cosines, with frequencies from 1 down to 1/10000.
    cos_first: as in improved-diffusion, which also stops one frequency before 1/10000"""
    half = channels // 2
    steps = half if cos_first else half - 1
    frequencies = torch.exp(-math.log(10000) / steps * torch.arange(half, device=t.device))
    angles = t[:, None] * frequencies
    parts = [angles.sin(), angles.cos()]
    return torch.cat(parts[::-1] if cos_first else parts, 1)


def zero_init(layer):
    """With weights of zero, a residual branch adds nothing at first, and the output is zero."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class ResBlock(nn.Module):
    """x (B, a, H, W), time embedding (B, time_dim) -> (B, b, H, W): two convolutions, attention."""

    def __init__(self, a, b, time_dim, attention, groups, dropout, eps, conv_skip):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, a, eps)
        self.conv1 = nn.Conv2d(a, b, 3, padding=1)
        self.time = nn.Linear(time_dim, b)
        self.norm2 = nn.GroupNorm(groups, b, eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero_init(nn.Conv2d(b, b, 3, padding=1))
        self.skip = nn.Conv2d(a, b, 1) if a != b or conv_skip else nn.Identity()
        self.attention = Attention(b, groups, eps) if attention else nn.Identity()

    def forward(self, x, time):
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time(time)[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.attention(self.skip(x) + h)


class Attention(nn.Module):
    """Self-attention between all pixels, with one head and a skip connection."""

    def __init__(self, channels, groups, eps):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = zero_init(nn.Linear(channels, channels))

    def forward(self, x):
        h = self.norm(x).flatten(2).transpose(1, 2)                     # (B, H * W, C)
        q, k, v = self.qkv(h)[:, None].chunk(3, dim=-1)                 # (B, 1, H * W, C)
        h = self.out(F.scaled_dot_product_attention(q, k, v)[:, 0])
        return x + h.transpose(1, 2).view(x.shape)


class Downsample(nn.Conv2d):
    """Half the size, by a convolution of stride 2. margins: of zeros, for F.pad. time: unused."""

    def __init__(self, channels, margins):
        super().__init__(channels, channels, 3, stride=2)
        self.margins = margins

    def forward(self, x, time):
        return super().forward(F.pad(x, self.margins))


class Upsample(nn.Conv2d):
    """Twice the size: every pixel becomes 2x2 pixels, then a convolution. time: unused."""

    def __init__(self, channels):
        super().__init__(channels, channels, 3, padding=1)

    def forward(self, x, time):
        return super().forward(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class UNet(nn.Module):
    """Noisy images (B, C, H, W), t (B,) in 0 ... T - 1, labels (B,) or None -> noise (B, C, H, W).
    channels, mults: level i has channels * mults[i] channels, at 1 / 2**i of the image's size
    blocks: residual blocks in each level on the way down; one more on the way up
    attention: for each level, whether its blocks have attention
    groups, eps: of GroupNorm. With one channel in a group it would remove the time embedding, which
        is one number for each channel
    classes: number of labels; the label `classes` stands for "no label"
    dlstudio: with the details in which the network of DLStudio's diffusion.pt differs"""

    def __init__(self, in_channels=1, channels=32, mults=(1, 2, 4), blocks=1,
                 attention=(False, False, True), groups=8, dropout=0.0, eps=1e-6, classes=0,
                 dlstudio=False):
        super().__init__()
        self.args = dict(
            in_channels=in_channels, channels=channels, mults=mults, blocks=blocks,
            attention=attention, groups=groups, dropout=dropout, eps=eps, classes=classes,
            dlstudio=dlstudio)  # to build the network again
        time_dim = 4 * channels

        def block(a, b, attention):
            return ResBlock(a, b, time_dim, attention, groups, dropout, eps, conv_skip=dlstudio)

        self.time = nn.Sequential(nn.Linear(channels, time_dim), nn.SiLU(),
                                  nn.Linear(time_dim, time_dim))
        self.conv_in = nn.Conv2d(in_channels, channels, 3, padding=1)
        a, skips = channels, [channels]         # channels: of the last layer, of all to be joined
        self.down = nn.ModuleList()
        for level, mult in enumerate(mults):
            for _ in range(blocks):
                self.down.append(block(a, channels * mult, attention[level]))
                a = channels * mult
                skips.append(a)
            if level < len(mults) - 1:
                self.down.append(Downsample(a, (1, 1, 1, 1) if dlstudio else (0, 1, 0, 1)))
                skips.append(a)
        self.middle = nn.ModuleList([block(a, a, True), block(a, a, False)])
        self.up = nn.ModuleList()
        for level, mult in reversed(list(enumerate(mults))):
            for _ in range(blocks + 1):
                self.up.append(block(a + skips.pop(), channels * mult, attention[level]))
                a = channels * mult
            if level > 0:
                self.up.append(Upsample(a))
        self.norm_out = nn.GroupNorm(groups, a, eps)
        self.conv_out = zero_init(nn.Conv2d(a, in_channels, 3, padding=1))
        if classes:
            self.label = nn.Embedding(classes + 1, time_dim)

    def forward(self, x, t, y=None):
        time = embed_time(t, self.args["channels"], self.args["dlstudio"])
        time = self.time(time.to(x.dtype))
        if y is not None:
            time = time + self.label(y)
        time = F.silu(time)
        x = self.conv_in(x)
        skips = [x]
        for layer in self.down:
            x = layer(x, time)
            skips.append(x)
        for layer in self.middle:
            x = layer(x, time)
        for layer in self.up:
            if isinstance(layer, ResBlock):
                x = torch.cat([x, skips.pop()], 1)
            x = layer(x, time)
        return self.conv_out(F.silu(self.norm_out(x)))

    @classmethod
    def from_pretrained(cls, source, dropout=0.0):
        """A U-Net with public weights, in eval mode. ValueError if they are not of this U-Net.
        source: a hub repository or a folder with a UNet2DModel of diffusers (which must be
            installed), or a file like DLStudio's diffusion.pt"""
        read = read_dlstudio if Path(source).is_file() else read_diffusers
        try:
            args, weights, theirs = read(source)
            net = cls(**args, dropout=dropout).eval()
            net.load_state_dict(dict(zip(net.state_dict(), weights, strict=True)))
            if theirs:
                compare_outputs(net, theirs)
        except Exception as error:  # diffusers and torch raise nearly anything on other networks
            raise ValueError(f"--init_from {source} (for a hub repository or a folder, pip install "
                             f"diffusers): {str(error)[:200]!r}") from error
        return net


# ---- diffusion, in the symbols of the paper: x_t is the image x_0 after t of T steps


def make_alpha_bar(schedule, T):
    """alpha_bar_t for t = 0 ... T, float64: the share of the variance of x_0 that is left in x_t.
    schedule: linear (Ho et al., section 4), with betas from 1e-4 to 0.02 for T = 1000, or cosine
        (Nichol & Dhariwal 2021, https://arxiv.org/abs/2102.09672, eq. 17)"""
    if schedule == "linear":
        if T <= 20:
            raise ValueError(f"--timesteps {T}: the linear schedule needs 21 or more")
        beta = torch.linspace(1e-4, 0.02, T, dtype=torch.float64) * 1000 / T
    else:
        t = torch.linspace(0, 1, T + 1, dtype=torch.float64)
        f = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
        beta = (1 - f[1:] / f[:-1]).clamp(max=0.999)
    return torch.cat([torch.ones(1, dtype=torch.float64), (1 - beta).cumprod(0)])


def add_noise(x_0, t, eps, scales):
    """x_t ~ q(x_t | x_0) (eq. 4), for x_0 and eps ~ N(0, 1), both (B, C, H, W), and t (B,).
    scales: sqrt(alpha_bar) and sqrt(1 - alpha_bar), (2, T + 1)"""
    signal_scale, noise_scale = scales[:, t, None, None, None]
    return signal_scale * x_0 + noise_scale * eps


def ddpm_step(x_t, x_0, a_t, a_s):
    """Mean and variance of q(x_s | x_t, x_0) for s < t (eq. 6 and 7, where s = t - 1).
    a_t, a_s: alpha_bar at t and at s"""
    beta = 1 - a_t / a_s  # of all steps between s and t together
    mean = (a_s**0.5 * beta * x_0 + (a_t / a_s)**0.5 * (1 - a_s) * x_t) / (1 - a_t)
    return mean, beta * (1 - a_s) / (1 - a_t)


def ddim_step(x_t, x_0, a_t, a_s, eta):
    """Mean and variance of x_s given x_t and x_0, for s < t (Song et al. 2020, eq. 12 and 16)."""
    eps = (x_t - a_t**0.5 * x_0) / (1 - a_t)**0.5  # the prediction, unless x_0 was clipped
    variance = eta**2 * (1 - a_s) / (1 - a_t) * (1 - a_t / a_s)
    return a_s**0.5 * x_0 + (1 - a_s - variance)**0.5 * eps, variance


@torch.no_grad()
def sample(net, x, alpha_bar, num_steps, sampler="ddpm", variance="small", eta=0.0,
           noise=torch.randn_like, path=None):
    """x_T, noise (B, C, H, W) -> x_0, images in [-1, 1] (Algorithm 2), in num_steps of the T steps.
    net: a function of x_t and t, (B,) in 0 ... T - 1, that predicts eps
    sampler, variance, eta: see the flags above; noise(x) draws noise of the shape of x
    path: a list, if given, to which x_T, ..., x_0 are appended"""
    times = torch.linspace(len(alpha_bar) - 1, 0, num_steps + 1, dtype=torch.float64)
    times = times.round().long().tolist()
    a = alpha_bar.tolist()
    if path is not None:
        path.append(x)
    for t, s in zip(times, times[1:]):
        eps = net(x, torch.full((len(x),), t - 1, device=x.device)).to(x.dtype)
        x_0 = (x - (1 - a[t])**0.5 * eps) / a[t]**0.5                  # eq. 15
        x_0 = x_0.clamp(-1, 1)  # so that errors do not grow
        if sampler == "ddim":
            x, var = ddim_step(x, x_0, a[t], a[s], eta)
        else:
            x, var = ddpm_step(x, x_0, a[t], a[s])
            if variance == "large" and s > 0:
                var = 1 - a[t] / a[s]
        if var > 0:
            x = x + var**0.5 * noise(x)
        if path is not None:
            path.append(x)
    return x


def guide(net, y, guidance):
    """A function of x_t and t that predicts eps for labels y (B,) by classifier-free guidance (Ho &
    Salimans 2022, https://arxiv.org/abs/2207.12598, eq. 6 with guidance = 1 + w)."""
    def predict(x, t):
        if guidance == 1:
            return net(x, t, y)
        none = torch.full_like(y, net.args["classes"])
        eps = net(torch.cat([x, x]), torch.cat([t, t]), torch.cat([none, y]))
        eps_none, eps_label = eps.chunk(2)
        return eps_none + guidance * (eps_label - eps_none)

    return predict


# ---- train or sample


def main(settings, ckpt):
    """settings: the constants, for the checkpoint; ckpt: what a run starts from, or None."""
    import data  # here, so that the network above can be imported with torch alone

    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    out = Path(OUT_DIR)
    if not ckpt and not SAMPLE and (out / "ckpt.pt").exists():
        sys.exit(f"error: {out} holds a run: give --resume to go on, or another --out_dir")
    try:  # what can fail because of a flag or a file
        if SAMPLE_STEPS > TIMESTEPS or ETA > 1 or CHANNELS % 2:
            raise ValueError(f"give --sample_steps <= {TIMESTEPS}, --eta <= 1, an even --channels")
        if LABEL and not SAMPLE:
            raise ValueError("--label goes with --sample")
        device, bfloat16, compiled = data.pick_device(DEVICE, DTYPE, COMPILE)
        # channels last is faster, but not for GroupNorm in bfloat16 on the CPU, and wrong on MPS
        contiguous = device.type == "mps" or device.type == "cpu" and bfloat16
        layout = torch.contiguous_format if contiguous else torch.channels_last
        alpha_bar = make_alpha_bar(SCHEDULE, TIMESTEPS)
        if world > 1:
            backend = "nccl" if device.type == "cuda" else "gloo"
            distributed.init_process_group(backend, timeout=datetime.timedelta(hours=6))
        if not SAMPLE:
            if rank > 0:
                distributed.barrier()  # waits for the first process, which prepares the data
            images, labels = data.load(DATA, IMAGE_SIZE, DATA_DIR, LIMIT)
            if rank == 0 and world > 1:
                distributed.barrier()  # lets the others go on
            if CONDITIONAL and labels is None:
                raise ValueError(f"{DATA} has no labels: leave out --conditional")
            if BATCH_SIZE % world or len(images) < world:
                raise ValueError(f"--batch_size must be a multiple of {world} processes")
            share = slice(rank, len(images) // world * world, world)  # shares of one size
            get_batch = data.Batches(images[share], labels[share] if CONDITIONAL else None,
                                     BATCH_SIZE // world, SEED, FLIP, device, layout)
        if FID and not SAMPLE and rank == 0:
            import fid
            inception = fid.Inception().to(device)  # now, and not after training: it may fail
        torch.manual_seed(SEED)
        if ckpt:
            net = UNet(**{**ckpt["args"], "dropout": DROPOUT})
        elif INIT_FROM:
            net = UNet.from_pretrained(INIT_FROM, DROPOUT).train()
        else:
            net = UNet(
                in_channels=images.shape[1],
                channels=CHANNELS,
                mults=MULTS,
                blocks=BLOCKS,
                attention=[IMAGE_SIZE // 2**level in ATTENTION for level in range(len(MULTS))],
                groups=math.gcd(CHANNELS // 4, 8),  # up to 8, of four channels or more
                dropout=DROPOUT,
                classes=int(labels.max()) + 1 if CONDITIONAL else 0,
            )
        shape = [net.args["in_channels"], IMAGE_SIZE, IMAGE_SIZE]
        classes = net.args["classes"]
        multiple = 2 ** (len(net.args["mults"]) - 1)
        if IMAGE_SIZE % multiple or not SAMPLE and images.shape[1] != shape[0]:
            raise ValueError(f"images need {shape[0]} channels and a multiple of {multiple} pixels")
        known = [str(label) for label in range(classes)]
        asked = LABEL.split(",") if LABEL else known
        if not set(asked) <= set(known) or GUIDANCE != 1 and not classes:
            raise ValueError(f"--label, --guidance: {out} has {classes} classes, counted from 0")
        net.to(device, memory_format=layout)
        ema = copy.deepcopy(net).eval().requires_grad_(False)
        opt = torch.optim.Adam(net.parameters(), LR, (BETA1, BETA2), fused=True)
        parts = dict(net=net, ema=ema, opt=opt)
        if ckpt:
            data.restore(parts, ckpt)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=bfloat16)
    batch_size = min(BATCH_SIZE, 64)  # of samples
    asked = torch.tensor([int(label) for label in asked])
    columns = len(asked) if len(asked) > 1 else 8  # of a grid: a class in each column

    def draw(i, path=None, **how):
        """Batch i of samples, uint8. (SEED, i, batch_size) alone decides its noise."""
        generator = torch.Generator(device).manual_seed((SEED + 1) * 10**7 - 1 - i)
        x = torch.empty(batch_size, *shape, device=device, memory_format=layout)
        x.normal_(generator=generator)
        y = None
        if classes:
            numbers = torch.arange(batch_size * i, batch_size * (i + 1))
            y = asked[numbers % len(asked)].to(device)
        with autocast:
            return data.to_uint8(sample(
                guide(ema, y, GUIDANCE), x, alpha_bar, path=path,
                noise=lambda x: torch.empty_like(x).normal_(generator=generator), **how))

    def generate(count, **how):
        """Yield batches of samples 0, 1, ... count - 1."""
        for i in range(math.ceil(count / batch_size)):
            yield draw(i, **how)[:count - batch_size * i]

    chosen = dict(num_steps=SAMPLE_STEPS or TIMESTEPS, sampler=SAMPLER, variance=VARIANCE, eta=ETA)
    if compiled and SAMPLE + FID >= 1000:  # else compiling takes longer than it saves
        ema.compile()
    if SAMPLE:
        if rank == 0:
            data.remove_images(out / "generated")
        if world > 1:
            distributed.barrier()
        for i in range(rank, math.ceil(SAMPLE / batch_size), world):
            batch = draw(i, **chosen)[:SAMPLE - batch_size * i]
            data.save_images(batch, out / "generated", first=batch_size * i)
            print(f"wrote images up to {batch_size * i + len(batch) - 1} in {out / 'generated'}")
            if i == 0:
                data.save_grid(batch, out / "generated.png", columns)
        return

    # running averages, by quarter of t, of the sum of losses and the number of images
    average = torch.zeros(2, 4, device=device)
    step, rows = 0, []
    if ckpt:
        average.copy_(ckpt["average"])
        step, rows = ckpt["step"], ckpt["log"]
    names = ("loss", "loss_q1", "loss_q2", "loss_q3", "loss_q4")
    log = data.Log(out / "log.csv", names, step, rows)
    if compiled:
        net.compile()
    model = nn.parallel.DistributedDataParallel(net) if world > 1 else net
    scales = torch.stack([alpha_bar, 1 - alpha_bar]).sqrt().float().to(device)
    decay_steps = EPOCHS * len(get_batch)
    total = min(decay_steps, MAX_STEPS or math.inf)
    done = step >= total
    stop = [] if world > 1 else data.catch_signals()  # torchrun ends its processes itself
    saved_at = time.time()

    while not done:
        x_0, y = get_batch(step)
        # (SEED, step) alone decides the noise of a step; under torchrun, (SEED, step, rank)
        torch.manual_seed((SEED * 10**7 + step) * world + rank)
        if classes:  # "no label" for a tenth of the images, for classifier-free guidance
            y = torch.where(torch.rand(len(y), device=device) < 0.1, classes, y)

        # Algorithm 1; the network counts t from 0
        t = torch.randint(1, TIMESTEPS + 1, (len(x_0),), device=device)
        eps = torch.randn_like(x_0)
        x_t = add_noise(x_0, t, eps, scales)
        with autocast:
            predicted = model(x_t, t - 1, y)
        losses = (eps - predicted).square().mean((1, 2, 3))             # (B,)
        warm_up = min(1, (step + 1) / 200)
        for group in opt.param_groups:
            group["lr"] = LR * warm_up * (1 + math.cos(math.pi * step / decay_steps)) / 2
        opt.zero_grad()
        losses.mean().backward()                                        # eq. 14
        opt.step()

        with torch.no_grad():
            decay = min(EMA, (1 + step) / (10 + step))  # low at first: initial weights fade soon
            torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - decay)
            step += 1
            quarter = F.one_hot((t - 1) * 4 // TIMESTEPS, 4).float()    # (B, 4)
            average.lerp_(torch.stack([losses @ quarter, quarter.sum(0)]), max(0.05, 1 / step))

        done = step >= total or bool(stop)
        epoch = math.ceil(step / len(get_batch))
        epoch_ends = step % len(get_batch) == 0
        log_now = step == 1 or step % LOG_EVERY == 0
        save_now = done or epoch_ends or time.time() - saved_at > 600
        if rank > 0:
            continue
        if log_now or save_now:  # only here does the loop wait for the GPU
            if not all(tensor.isfinite().all() for tensor in [average, *net.parameters()]):
                sys.exit(f"error: training diverged by step {step}: try a lower --lr "
                         f"(an earlier checkpoint in {out} stays as it was)")
        if log_now:
            sums, counts = average.cpu()
            loss = sums.sum() / counts.sum()
            values = [loss.item(), *(sums / counts).tolist()]
            log.write(step, total, epoch, BATCH_SIZE, values)
        if save_now:
            state = {name: part.state_dict() for name, part in parts.items()}
            state.update(model=Path(__file__).stem, step=step, average=average, log=log.rows,
                         config=settings, args=net.args)
            torch.save(state, out / "ckpt.pt.tmp")
            os.replace(out / "ckpt.pt.tmp", out / "ckpt.pt")  # so that ckpt.pt is always whole
            saved_at = time.time()
        if SAMPLE_EVERY and not stop and (done or (epoch_ends and epoch % SAMPLE_EVERY == 0)):
            # DDIM with eta = 1: with eta = 0, the errors of a young network add up
            path, num_steps = [], min(50, TIMESTEPS)  # path: the first batch comes first in it
            count = 10 * columns if classes else 64
            batches = generate(count, num_steps=num_steps, sampler="ddim", eta=1.0, path=path)
            picture = out / "samples" / f"epoch_{epoch:04}.png"
            data.save_grid(torch.cat(list(batches)), picture, columns)
            data.save_gif(out / "samples", out / "samples.gif")
            shown = [path[i * num_steps // 10][:8] for i in range(11)]  # from x_T to x_0
            shown = torch.stack(shown, 1).flatten(0, 1)
            data.save_grid(data.to_uint8(shown), out / "denoise.png", columns=11)
            data.save_plot(out / "loss.png", "step", "log", loss=log.curves(*names))

    data.set_handlers(signal.SIG_DFL)
    if rank > 0:
        return
    if stop:
        print(f"stopped at step {step} and saved: go on with --resume --out_dir {out}")
        sys.exit(128 + stop[0])
    print(f"done at step {step}, saved in {out / 'ckpt.pt'}")
    if FID:
        distance = fid.compare(generate(FID, **chosen), images, FID, SEED, inception)
        print(f"FID {distance:.4f} of {FID} samples")


# ---- public weights: the same U-Net by other authors


def read_diffusers(source):
    """Arguments of UNet, a UNet2DModel's weights in the order of UNet's, and the UNet2DModel."""
    from diffusers import UNet2DModel

    theirs = UNet2DModel.from_pretrained(source).eval()
    modules = [theirs.time_embedding, theirs.conv_in]
    for part in (*theirs.down_blocks, theirs.mid_block, *theirs.up_blocks):
        attentions = getattr(part, "attentions", [])
        for i, resnet in enumerate(part.resnets):
            modules += [resnet, *attentions[i:i + 1]]
        modules += getattr(part, "downsamplers", None) or []
        modules += getattr(part, "upsamplers", None) or []
    modules += [theirs.conv_norm_out, theirs.conv_out]
    weights = []
    for module in modules:
        if hasattr(module, "to_q"):  # here q, k and v are one layer
            qkv = [module.to_q, module.to_k, module.to_v]
            weights += module.group_norm.parameters()
            weights.append(torch.cat([layer.weight for layer in qkv]))
            weights.append(torch.cat([layer.bias for layer in qkv]))
            weights += module.to_out.parameters()
        else:
            weights += module.parameters()
    config = theirs.config
    width = config.block_out_channels[0]
    args = dict(
        in_channels=config.in_channels, channels=width, blocks=config.layers_per_block,
        mults=[w // width for w in config.block_out_channels],
        attention=["Attn" in kind for kind in config.down_block_types],
        groups=config.norm_num_groups, eps=config.norm_eps)
    return args, weights, theirs


def read_dlstudio(path):
    """Arguments of UNet, and the weights of improved-diffusion's UNetModel with one head.
    A state dict of it is in the order of UNet's; the sizes follow from the shapes."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    width, in_channels = state["input_blocks.0.0.weight"].shape[:2]
    names = [f"input_blocks.{i}.0.in_layers.2.weight" for i in range(100)]
    widths = {i: len(state[name]) for i, name in enumerate(names) if name in state}
    firsts = [i for i in widths if i - 1 not in widths]  # the first block of each level
    args = dict(
        in_channels=in_channels, channels=width, blocks=len(widths) // len(firsts),
        mults=[widths[i] // width for i in firsts],
        attention=[f"input_blocks.{i}.1.qkv.weight" in state for i in firsts],
        groups=32, eps=1e-5, dlstudio=True)
    # attention there is of 1d convolutions, whose weights have a third dimension of size 1
    weights = [w.squeeze(2) if w.ndim == 3 else w for w in state.values()]
    return args, weights, None


def compare_outputs(net, theirs):
    """ValueError if a UNet and a UNet2DModel give different outputs for a random input."""
    size = 2 ** len(net.args["mults"])  # leaves 2x2 pixels at the lowest level
    x = torch.randn(2, net.args["in_channels"], size, size)
    t = torch.tensor([1, 500])
    with torch.no_grad():
        ours, expected = net(x, t), theirs(x, t).sample
    if not (ours - expected).abs().max() < 1e-3 * expected.abs().max():
        raise ValueError("its network gives other outputs than UNet")


def pretrained_settings(source):
    """What comes with public weights besides the network, and a learning rate for fine-tuning."""
    if Path(source).is_file():  # DLStudio's
        return dict(IMAGE_SIZE=64, LR=1e-4)
    from diffusers import DDPMScheduler, UNet2DModel

    scheduler = DDPMScheduler.from_pretrained(source)
    T, config = len(scheduler.betas), scheduler.config
    for schedule in ("linear", "cosine"):
        alpha_bar = make_alpha_bar(schedule, T)[1:].float()
        same = torch.allclose(alpha_bar, scheduler.alphas_cumprod, rtol=1e-3, atol=1e-6)
        if same and config.prediction_type == "epsilon":
            size = UNet2DModel.load_config(source)["sample_size"]
            variance = "large" if config.variance_type == "fixed_large" else "small"
            return dict(IMAGE_SIZE=size, LR=1e-4, TIMESTEPS=T, SCHEDULE=schedule, VARIANCE=variance)
    raise ValueError("its betas are not those of either schedule, or it does not predict eps")


# ---- flags


def parse_flags(argv=None):
    """The settings by name, and the checkpoint that --resume or --sample starts from, or None.
    A flag wins over the checkpoint or public weights, these over the preset of the data set, and
    the preset over the constants at the top of this file."""
    source = Path(__file__).read_text("utf-8")
    comments = dict(re.findall(r"^([A-Z]\w*) = .+?  # (.+)$", source, re.M))
    settings = {name: globals()[name] for name in comments}
    choices = dict(
        SCHEDULE=["linear", "cosine"], SAMPLER=["ddpm", "ddim"], VARIANCE=["small", "large"])
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=argparse.SUPPRESS, argument_default=argparse.SUPPRESS, allow_abbrev=False)
    for name, default in settings.items():
        kind = dict(type=type(default), choices=choices.get(name))
        if isinstance(default, bool):
            kind = dict(action=argparse.BooleanOptionalAction)
        elif isinstance(default, tuple):
            kind = dict(type=int, nargs="+")
        flag = f"--{name.lower()}"
        spellings = {flag: None, flag.replace("_", "-"): None}  # a dict has no doubles
        parser.add_argument(*spellings, dest=name, **kind,
                            help=f"{comments[name]} (default: {default})")
    flags = vars(parser.parse_args(argv))
    not_zero = "IMAGE_SIZE EPOCHS BATCH_SIZE LR TIMESTEPS CHANNELS MULTS BLOCKS LOG_EVERY SAMPLE"
    for name, value in flags.items():
        if isinstance(value, list):
            flags[name] = tuple(value)
        if isinstance(value, str):
            continue
        limit = 1 if name in ("EMA", "BETA1", "BETA2", "DROPOUT") else 2**32
        for number in value if isinstance(value, list) else [value]:
            if not 0 <= number < limit or number == 0 and name in not_zero.split():
                parser.error(f"--{name.lower()} {number} is out of range: {comments[name]}")

    settings.update(PRESETS.get(flags.get("DATA", DATA), {}))
    settings.update(flags)
    path, ckpt = Path(settings["OUT_DIR"], "ckpt.pt"), None
    try:
        if settings["INIT_FROM"] and settings["RESUME"]:
            raise ValueError("it starts a new run: leave it out to go on with one")
        elif settings["INIT_FROM"]:
            saved = pretrained_settings(settings["INIT_FROM"])
        elif settings["RESUME"] or settings["SAMPLE"]:
            ckpt = torch.load(path, map_location="cpu", weights_only=True)
            if ckpt["model"] != Path(__file__).stem:
                raise ValueError(f"it belongs to {ckpt['model']}, or to an older version")
            saved = ckpt["config"]
        else:
            return settings, None
    except ImportError:
        parser.error("--init_from needs diffusers here: pip install diffusers")
    except Exception as error:  # torch and diffusers raise nearly anything on a damaged file
        hint = "" if path.exists() else ": train first, or give the --out_dir of a run"
        parser.error(f"cannot start from {settings['INIT_FROM'] or path}{hint} ({error!r})")
    for name in "TIMESTEPS SCHEDULE CHANNELS MULTS BLOCKS ATTENTION CONDITIONAL".split():
        if name in flags and flags[name] != saved.get(name):
            parser.error(f"--{name.lower()} cannot be changed: leave it out")
    # what does not come from the checkpoint
    local = "DATA_DIR OUT_DIR DEVICE DTYPE COMPILE MAX_STEPS FID RESUME SAMPLE LABEL INIT_FROM"
    settings.update({k: v for k, v in saved.items() if k not in local.split()})
    settings.update(flags)
    return settings, ckpt


if __name__ == "__main__":
    settings, ckpt = parse_flags()
    globals().update(settings)
    main(settings, ckpt)
    if distributed.is_initialized():
        distributed.barrier()  # until the first process is done
        distributed.destroy_process_group()
