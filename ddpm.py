r"""DDPM: images from noise, step by step (Ho et al. 2020, https://arxiv.org/abs/2006.11239).

An image is turned into noise in T small steps. A U-Net learns to predict the noise in such a noisy
image. With its predictions, pure noise is turned back into an image.

    python ddpm.py                                             # MNIST, into out/ddpm
    python ddpm.py --sample 100 --sample_steps 50              # write images, in 50 steps each
    python ddpm.py --conditional --out_dir out/conditional     # with labels
    python ddpm.py --sample 10 --label 7 --guidance 2 --out_dir out/conditional
    python ddpm.py --data celeba --image_size 64 --flip --channels 64 --mults 1 2 3 4 --blocks 2 \
        --attention 16 --lr 2e-4 --epochs 100 --out_dir out/faces           # for a GPU
    torchrun --nproc_per_node=4 ddpm.py --batch_size 512 --out_dir out/four # on four of them
    python ddpm.py --init_from google/ddpm-cifar10-32 --sample 64 --out_dir out/cifar10

Measured: 10 epochs of MNIST took 2 h 30 min on one core of an AMD EPYC, with --dtype bfloat16. Of
320 samples in 20 steps, tests/classify.py recognizes 89 % as digits with p > 0.9.
"""
import argparse
import copy
import datetime
import functools
import importlib.util
import math
import os
import re
import sys
import time
from pathlib import Path

import torch
from torch import distributed, nn
from torch.nn import functional as F

# ---- settings of a run, kept in its checkpoint. Each is also a flag: --lr 1e-4 --mults 1 2 2 4

DATA = "mnist"          # celeba, mnist, toy-faces, toy-digits; or a folder, .zip, .npy or .npz
IMAGE_SIZE = 28         # height and width in pixels
LIMIT = 0               # use only N images, evenly spaced over the set; 0 = all
FLIP = False            # mirror half of the images; not for digits
EPOCHS = 10             # length of training, including the epochs before a resume
BATCH_SIZE = 128        # images in a training step, over all processes together
LR = 1e-3               # Adam's learning rate after warm-up; it falls to 0 by the last step
TIMESTEPS = 1000        # T, the number of noise steps
SCHEDULE = "linear"     # how noise grows: linear (Ho et al.) or cosine (Nichol & Dhariwal)
CHANNELS = 32           # channels of the U-Net at full size
MULTS = [1, 2, 4]       # channels of the levels, in multiples of CHANNELS; sizes halve each time
BLOCKS = 1              # residual blocks in each level on the way down; one more on the way up
ATTENTION = 7           # levels of at most this size have attention; the middle always has it
CONDITIONAL = False     # give the labels to the network
EMA = 0.999             # decay of the averaged weights that draw the samples; 0 = no averaging
DTYPE = "auto"          # bfloat16 or float32; auto = bfloat16 on GPUs that support it
SEED = 0                # decides initial weights, noise and the order of images
INIT_FROM = ""          # start from public weights: a Hugging Face repository, a folder or a file
run_keys = [key for key, value in globals().items()  # the constants above this line
            if key.isupper() and isinstance(value, (int, float, str, list))]

# ---- settings of this call

DATA_DIR = "data"       # where the named sets are found, downloaded and cached
OUT_DIR = "out/ddpm"    # the folder of the run
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
GUIDANCE = 1.0          # weight of the label in samples of a conditional network; 1 = no guidance
SAMPLE_STEPS = 100      # steps from noise to an image, at most TIMESTEPS
ETA = 1.0               # noise added in these steps: 1 = as much as in DDPM, 0 = none
ORDER = 2               # 1: DDPM if ETA is 1, DDIM if 0; 2: DPM-Solver++(2M), stochastic if ETA > 0

# ---- network: the U-Net of Ho et al. (appendix B)


def embed_time(t, channels):
    """t (B,) -> (B, channels): sines and cosines, with frequencies from 1 down to 1/10000."""
    half = channels // 2
    frequencies = torch.exp(-math.log(10000) / (half - 1) * torch.arange(half, device=t.device))
    angles = t[:, None] * frequencies                                   # (B, half)
    return torch.cat([angles.sin(), angles.cos()], 1)


def zero_init(layer):
    """With weights of zero, a residual branch adds nothing at first, and the output is zero."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class ResBlock(nn.Module):
    """x (B, c_in, H, W), time embedding (B, emb_dim) -> (B, c_out, H, W)."""

    def __init__(self, c_in, c_out, emb_dim, groups):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=1e-6)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.emb = nn.Linear(emb_dim, c_out)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=1e-6)
        self.conv2 = zero_init(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, emb):
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.emb(emb)[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return self.skip(x) + h


class Attention(nn.Module):
    """Self-attention between all pixels, one head, with a skip connection: (B, C, H, W) -> same."""

    def __init__(self, channels, groups):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = zero_init(nn.Linear(channels, channels))

    def forward(self, x):
        h = self.norm(x).flatten(2).transpose(1, 2)                     # (B, H * W, C)
        q, k, v = self.qkv(h)[:, None].chunk(3, dim=-1)                 # (B, 1, H * W, C)
        h = self.out(F.scaled_dot_product_attention(q, k, v)[:, 0])     # (B, H * W, C)
        return x + h.transpose(1, 2).view(x.shape)


class Stage(nn.Sequential):
    """Layers in a row. Residual blocks also get the time embedding."""

    def forward(self, x, emb):
        for layer in self:
            x = layer(x, emb) if isinstance(layer, ResBlock) else layer(x)
        return x


class UNet(nn.Module):
    """Noisy images (B, *shape), t (B,) in 1 ... T, labels y (B,) -> their noise (B, *shape).

    shape: (C, H, W), where H and W are multiples of 2**(len(mults) - 1)
    channels, mults, blocks, attention: as in the settings above
    classes: number of labels; 0 = none. The label -1, or no y, stands for "no label"
    groups: of GroupNorm. channels / groups must be 2 or more: GroupNorm subtracts the mean of each
        group, so with one channel in a group it would remove what the time embedding adds to it
    """

    def __init__(self, shape=(1, 28, 28), channels=32, mults=(1, 2, 4), blocks=1, attention=7,
                 classes=0, groups=8):
        super().__init__()
        self.shape, self.channels, self.classes = shape, channels, classes
        emb_dim = 4 * channels
        self.time = nn.Sequential(
            nn.Linear(channels, emb_dim), nn.SiLU(), nn.Linear(emb_dim, emb_dim))
        self.conv_in = nn.Conv2d(shape[0], channels, 3, padding=1)

        c, size = channels, shape[1]
        skips = [c]  # channels of conv_in's output and of each stage on the way down
        self.down = nn.ModuleList()
        for level, mult in enumerate(mults):
            for _ in range(blocks):
                stage = [ResBlock(c, channels * mult, emb_dim, groups)]
                c = channels * mult
                if size <= attention:
                    stage.append(Attention(c, groups))
                self.down.append(Stage(*stage))
                skips.append(c)
            if level < len(mults) - 1:
                # half the size, with zeros on the right and below
                self.down.append(Stage(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(c, c, 3, stride=2)))
                skips.append(c)
                size //= 2
        self.middle = Stage(
            ResBlock(c, c, emb_dim, groups), Attention(c, groups), ResBlock(c, c, emb_dim, groups))
        self.up = nn.ModuleList()
        for level, mult in reversed(list(enumerate(mults))):
            for i in range(blocks + 1):
                stage = [ResBlock(c + skips.pop(), channels * mult, emb_dim, groups)]
                c = channels * mult
                if size <= attention:
                    stage.append(Attention(c, groups))
                if i == blocks and level > 0:
                    stage += [nn.Upsample(scale_factor=2.0), nn.Conv2d(c, c, 3, padding=1)]
                    size *= 2
                self.up.append(Stage(*stage))
        self.norm_out = nn.GroupNorm(groups, c, eps=1e-6)
        self.conv_out = zero_init(nn.Conv2d(c, shape[0], 3, padding=1))
        if classes:
            self.label = nn.Embedding(classes + 1, emb_dim)

    def forward(self, x, t, y=None):
        # public networks, and the code of Ho et al., count t from 0
        emb = self.time(embed_time(t - 1, self.channels))               # (B, emb_dim)
        if self.classes:
            y = torch.full_like(t, -1) if y is None else y
            emb = emb + self.label(y + 1)
        emb = F.silu(emb)
        x = self.conv_in(x)
        skips = [x]
        for stage in self.down:
            x = stage(x, emb)
            skips.append(x)
        x = self.middle(x, emb)
        for stage in self.up:
            x = stage(torch.cat([x, skips.pop()], 1), emb)
        return self.conv_out(F.silu(self.norm_out(x)))


# ---- the method, in the symbols of the paper: x_t is the image x_0 after t of T noise steps


def make_alpha_bar(schedule, T):
    """alpha_bar_t for t = 0 ... T, float64: the share of the variance of x_0 that is left in x_t.

    schedule: linear (Ho et al., section 4), with betas from 1e-4 to 0.02 for T = 1000, or cosine
        (Nichol & Dhariwal 2021, https://arxiv.org/abs/2102.09672, eq. 17)
    """
    if schedule == "linear" and T > 20:
        beta = torch.linspace(1e-4, 0.02, T, dtype=torch.float64) * 1000 / T
    elif schedule == "cosine" and T > 0:
        t = torch.linspace(0, 1, T + 1, dtype=torch.float64)
        f = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
        beta = (1 - f[1:] / f[:-1]).clamp(max=0.999)
    else:
        raise ValueError(f"schedule {schedule} with T = {T}: give cosine, or linear with T > 20")
    return torch.cat([torch.ones(1, dtype=torch.float64), (1 - beta).cumprod(0)])


def add_noise(x_0, t, eps, scales):
    """x_t ~ q(x_t | x_0) (eq. 4), for images x_0 (B, C, H, W), t (B,) and noise eps ~ N(0, I).

    scales: sqrt(alpha_bar) and sqrt(1 - alpha_bar), (2, T + 1)
    """
    signal_scale, noise_scale = scales[:, t, None, None, None]
    return signal_scale * x_0 + noise_scale * eps


def train_step(net, opt, x_0, y, scales, autocast):
    """One update of the network (Algorithm 1). x_0: images (B, C, H, W); y: labels (B,) or None

    Returns the loss of each image and its t, both (B,).
    """
    T = scales.shape[1] - 1
    if y is not None:  # "no label" for a tenth of the images, for classifier-free guidance
        y = torch.where(torch.rand(len(y), device=y.device) < 0.1, -1, y)
    t = torch.randint(1, T + 1, (len(x_0),), device=x_0.device)
    eps = torch.randn_like(x_0)
    x_t = add_noise(x_0, t, eps, scales)
    with autocast:
        predicted = net(x_t, t, y)
    losses = (eps - predicted).square().mean((1, 2, 3))                 # eq. 14, (B,)
    opt.zero_grad()
    losses.mean().backward()
    opt.step()
    return losses.detach(), t


@torch.no_grad()
def update_ema(ema, net, decay):
    """ema = decay * ema + (1 - decay) * net"""
    torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - decay)


def predict_eps(net, x, t, y, guidance):
    """eps for labels y (B,), by classifier-free guidance (Ho & Salimans 2022,
    https://arxiv.org/abs/2207.12598, eq. 6 with guidance = 1 + w)."""
    if guidance == 1:
        return net(x, t, y)
    no_label = torch.full_like(y, -1)
    eps = net(torch.cat([x, x]), torch.cat([t, t]), torch.cat([no_label, y]))
    eps_no_label, eps_label = eps.chunk(2)
    return eps_no_label + guidance * (eps_label - eps_no_label)


def ddim_step(x_t, x_0, a_t, a_s, eta):
    """Mean and variance of x_s given x_t and an estimate of x_0, for s < t (Song et al. 2020,
    https://arxiv.org/abs/2010.02502, eq. 12 and 16). a_t, a_s: alpha_bar at t and s

    With eta = 1 it is DDPM's step, q(x_s | x_t, x_0) (Ho et al., eq. 6 and 7, where s = t - 1).
    """
    eps = (x_t - a_t**0.5 * x_0) / (1 - a_t)**0.5
    variance = eta**2 * (1 - a_s) / (1 - a_t) * (1 - a_t / a_s)
    return a_s**0.5 * x_0 + (1 - a_s - variance)**0.5 * eps, variance


@torch.no_grad()
def sample(net, x, alpha_bar, num_steps=100, eta=1.0, order=2):
    """From noise x_T (B, C, H, W) to images x_0 in [-1, 1]. Yields all states, x_T, ..., x_0.

    net: a function of x_t and t (B,) that predicts eps
    eta, order: 1, 1 is DDPM (Ho et al., Algorithm 2); 0, 1 is DDIM; 0, 2 is DPM-Solver++(2M)
        (Lu et al. 2022, https://arxiv.org/abs/2211.01095, Algorithm 2); 1, 2 its stochastic form
    """
    a = alpha_bar.tolist()
    log_snr = (alpha_bar / (1 - alpha_bar)).log().tolist()
    # even: on digits, steps even in log SNR or quadratic in t were not better (10, 20 and 50 steps)
    times = torch.linspace(len(a) - 1, 0, num_steps + 1).round().int().tolist()
    t_before, x_0_before = None, None
    yield x
    for t, s in zip(times, times[1:]):
        eps = net(x, torch.full((len(x),), t, device=x.device)).to(x.dtype)
        x_0 = ((x - (1 - a[t])**0.5 * eps) / a[t]**0.5).clamp(-1, 1)    # eq. 15
        estimate = x_0
        if order == 2 and t_before and s > 0:
            # x_0 at the middle of the step, on the line through the last two over log SNR
            h, h_before = log_snr[s] - log_snr[t], log_snr[t] - log_snr[t_before]
            estimate = x_0 + h / (2 * h_before) * (x_0 - x_0_before)
        t_before, x_0_before = t, x_0
        x, variance = ddim_step(x, estimate, a[t], a[s], eta)
        if variance > 0:
            x = x + variance**0.5 * torch.randn(x.shape, dtype=x.dtype, device=x.device)
        yield x


def to_uint8(x):
    """Images in [-1, 1] -> uint8."""
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).byte()


# ---- a run


def check_settings():
    """Exit if a setting would fail late, or silently give wrong images."""
    multiple = 2 ** (len(MULTS) - 1)
    if not INIT_FROM and (IMAGE_SIZE % multiple or CHANNELS % 16):
        sys.exit(f"error: {len(MULTS)} levels need a multiple of {multiple} as --image_size, and "
                 "GroupNorm a multiple of 16 as --channels")
    if min(SAMPLE_STEPS, BATCH_SIZE) < 1 or ORDER not in (1, 2) or not 0 <= ETA <= 1:
        sys.exit("error: give --sample_steps and --batch_size of 1 or more, --order 1 or 2, "
                 "--eta from 0 to 1")
    if GUIDANCE != 1 and not CONDITIONAL:
        sys.exit("error: --guidance needs a network that was trained with --conditional")
    if CONDITIONAL and INIT_FROM:
        sys.exit("error: --init_from takes networks without labels: leave out --conditional")


def pick_device():
    """The device, the memory layout of images, and autocast in the precision of the flags."""
    best = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    if "RANK" in os.environ and not torch.cuda.is_available():
        best = "cpu"  # gloo, the link between processes, does not know MPS
    device = torch.device(best if DEVICE == "auto" else DEVICE)
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))  # a GPU for each process
    auto = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    bfloat16 = dict(auto=auto, bfloat16=True, float32=False)
    if DTYPE not in bfloat16:
        sys.exit(f"error: --dtype {DTYPE}: give bfloat16, float32 or auto")
    # channels last is faster, but not for GroupNorm in bfloat16 on a CPU, and MPS has bugs with it
    slow = device.type == "mps" or device.type == "cpu" and bfloat16[DTYPE]
    layout = torch.contiguous_format if slow else torch.channels_last
    return device, layout, torch.autocast(device.type, torch.bfloat16, enabled=bfloat16[DTYPE])


def check_fixed(ckpt, fixed):
    """Exit if one of these values, which must stay as they are, differs from the checkpoint's."""
    for key, value in fixed.items():
        kept = ckpt["fixed"].get(key, value)  # an edited script may have new ones
        if value != kept:
            sys.exit(f"error: the run has {key} {kept}, now it is {value}: give the same flags "
                     "and data, or start a new run in another --out_dir")


def pick_labels(classes):
    """The class numbers of --label in a tensor; all classes by default."""
    if not LABEL:
        return torch.arange(max(classes, 1))  # without classes, the label 0, which is not used
    labels = LABEL.split(",")
    if not set(labels) <= {str(number) for number in range(classes)}:
        sys.exit(f"error: --label {LABEL}: there are {classes} classes, counted from 0")
    return torch.tensor([int(label) for label in labels])


def generate(net, alpha_bar, labels, num, device, autocast):
    """Yield `num` samples in batches: the images, uint8 (B, C, H, W), and a list of x_T, ..., x_0
    of the first eight. SEED, i and BATCH_SIZE decide the noise of batch i."""
    size = min(64, BATCH_SIZE)
    num_steps = min(SAMPLE_STEPS, len(alpha_bar) - 1)
    for i in range(math.ceil(num / size)):
        torch.manual_seed((SEED + 1) * 10**7 - 1 - i)  # never the seed of a training step
        x_T = torch.randn(size, *net.shape, device=device)
        y = labels[torch.arange(size * i, size * i + size) % len(labels)].to(device)
        predict = functools.partial(predict_eps, net, y=y, guidance=GUIDANCE)
        states = []
        with autocast:
            for x in sample(predict, x_T, alpha_bar, num_steps, ETA, ORDER):
                states.append(to_uint8(x[:8]))
        yield to_uint8(x)[:num - size * i], states


def learning_rate(step, total):
    """A warm-up of 200 steps to LR, and a cosine that ends near 0 at the last step."""
    return LR * min(1, step / 200) * (1 + math.cos(math.pi * (step - 1) / total)) / 2


def network_settings(channels, classes):
    """The arguments of UNet, for images with so many channels."""
    return dict(shape=[channels, IMAGE_SIZE, IMAGE_SIZE], channels=CHANNELS, mults=MULTS,
                blocks=BLOCKS, attention=ATTENTION, classes=classes)


def train(out, ckpt=None, pretrained=None):
    """Train a network, from the start, a checkpoint or public weights. Writes its files into `out`.

    pretrained: a network and its alpha_bar, as load_pretrained() returns them
    """
    from torch.nn.parallel import DistributedDataParallel
    from tqdm import tqdm

    import data

    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device, layout, autocast = pick_device()
    if world > 1:
        # a long timeout: at the end the others wait while process 0 computes the FID
        distributed.init_process_group(timeout=datetime.timedelta(days=1))
    if rank > 0:
        distributed.barrier()  # process 0 prepares the data; the others then read its files
    images, labels = data.load(DATA, IMAGE_SIZE, DATA_DIR, LIMIT)
    if rank == 0 and world > 1:
        distributed.barrier()
    if CONDITIONAL and labels is None:
        sys.exit(f"error: {DATA} has no labels: leave out --conditional")
    labels = labels if CONDITIONAL else None
    classes = int(labels.max()) + 1 if CONDITIONAL else 0
    sample_labels = pick_labels(classes)
    batches = data.Batches(images, labels, BATCH_SIZE, SEED, FLIP, device, layout, rank, world)

    torch.manual_seed(SEED)
    settings = network_settings(images.shape[1], classes)
    net, alpha_bar = pretrained or (UNet(**settings), make_alpha_bar(SCHEDULE, TIMESTEPS))
    net.to(device, memory_format=layout).train()
    ema = copy.deepcopy(net).eval()
    opt = torch.optim.Adam(net.parameters(), LR, fused=True)
    parts = dict(net=net, ema=ema, opt=opt)
    fixed = dict(settings, conditional=CONDITIONAL, timesteps=TIMESTEPS, schedule=SCHEDULE,
                 seed=SEED, batch_size=BATCH_SIZE, steps_per_epoch=len(batches))
    step, rows, began = 0, [], time.time()
    if ckpt:
        check_fixed(ckpt, fixed)
        step, rows = ckpt["step"], ckpt["rows"]
        began -= rows[-1]["time"]
        for name, part in parts.items():
            part.load_state_dict(ckpt[name])
        for weight, state in opt.state.items():
            for key in ("exp_avg", "exp_avg_sq"):  # fused Adam needs the layout of the weight
                state[key] = torch.empty_like(weight).copy_(state[key])
    scales = torch.stack([alpha_bar, 1 - alpha_bar]).sqrt().float().to(device)
    if COMPILE and device.type == "cuda" and importlib.util.find_spec("triton"):
        net.compile()
    model = DistributedDataParallel(net) if world > 1 else net

    out.mkdir(parents=True, exist_ok=True)
    total = min(EPOCHS * len(batches), MAX_STEPS or math.inf)
    saved, recent = 0, []  # when the last checkpoint was saved; losses since the last row
    bar = tqdm(range(step + 1, total + 1), initial=step, total=total, disable=rank > 0)
    for step in bar:
        x_0, y = batches(step - 1)
        # a resumed run draws the same noise, and each process noise of its own
        torch.manual_seed((SEED * 10**7 + step) * world + rank)
        opt.param_groups[0]["lr"] = learning_rate(step, EPOCHS * len(batches))
        losses, t = train_step(model, opt, x_0, y, scales, autocast)
        update_ema(ema, net, min(EMA, step / (step + 9)))  # at first, over a tenth of the steps
        if rank > 0:
            continue

        recent.append((losses, t))
        epoch = math.ceil(step / len(batches))
        if step % max(1, LOG_EVERY) == 0 or step == total:  # here the loop waits for the GPU
            losses, t = [torch.cat(values).cpu() for values in zip(*recent)]
            recent = []
            row = dict(loss=losses.mean().item())
            norm = nn.utils.get_total_norm(net.parameters()).item()
            if not math.isfinite(row["loss"] + norm):
                sys.exit(f"error: diverged by step {step}: try a lower --lr")
            for i in range(4):  # the quarters of 1 ... T; at first, one may be empty
                part = losses[(t - 1) * 4 // (len(alpha_bar) - 1) == i]
                row[f"loss_q{i + 1}"] = part.mean().item() if len(part) else None
            bar.set_postfix(row)
            rows.append(dict(step=step, epoch=epoch, time=time.time() - began, **row))
            data.save_table(rows, out / "log.csv")
            if step == total or time.time() - saved > SAVE_EVERY:
                ckpt = {name: part.state_dict() for name, part in parts.items()}
                ckpt["settings"] = {key: globals()[key] for key in run_keys}
                ckpt.update(script="ddpm", step=step, rows=rows, fixed=fixed, alpha_bar=alpha_bar)
                with data.replacing(out / "ckpt.pt") as tmp:  # a kill leaves the old one
                    torch.save(ckpt, tmp)
                saved = time.time()
        if SAMPLE_EVERY and (step == total or step % (SAMPLE_EVERY * len(batches)) == 0):
            samples = generate(ema, alpha_bar, sample_labels, 64, device, autocast)
            grid, states = next(samples)
            path = out / "samples" / f"epoch_{epoch:04}.png"
            data.save_grid(grid, path, len(sample_labels))
            shown = torch.stack([states[i * (len(states) - 1) // 10] for i in range(11)], 1)
            data.save_grid(shown.flatten(0, 1), out / "denoise.png", columns=11)
            data.save_curves(rows, out / "loss.png")

    if rank == 0:
        print(f"step {step} of {EPOCHS * len(batches)} is done, see {out}; to go on: --resume "
              f"--out_dir {out}; after the last step with a larger --epochs, from where the "
              "learning rate rises again")
        if FID:
            import fid
            samples = generate(ema, alpha_bar, sample_labels, FID, device, autocast)
            score = fid.compare((batch for batch, _ in samples), images, FID, SEED, device)
            print(f"FID {score:.4f} of {FID} samples")
    if world > 1:
        distributed.barrier()  # the others wait for process 0, which may still draw
        distributed.destroy_process_group()


def write_samples(out, ckpt=None, pretrained=None):
    """Write SAMPLE images of a run, or of a public network, into out/generated."""
    import data

    if "RANK" in os.environ:
        sys.exit("error: --sample runs in one process: start it without torchrun")
    device, layout, autocast = pick_device()
    net, alpha_bar = pretrained or (None, None)
    if ckpt:
        settings = network_settings(ckpt["fixed"]["shape"][0], ckpt["fixed"]["classes"])
        check_fixed(ckpt, dict(
            settings, conditional=CONDITIONAL, timesteps=TIMESTEPS, schedule=SCHEDULE))
        net, alpha_bar = net or UNet(**settings), ckpt["alpha_bar"]
        net.load_state_dict(ckpt["ema"])
    net.to(device, memory_format=layout).eval()
    labels = pick_labels(net.classes)
    samples = generate(net, alpha_bar, labels, SAMPLE, device, autocast)
    data.save_samples((batch for batch, _ in samples), SAMPLE, out, len(labels))


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
        elif isinstance(default, list):
            kind = dict(type=int, nargs="+")
        text = f"{comment} (default: {default})".replace("%", "%%")
        parser.add_argument("--" + key.lower(), dest=key, help=text, **kind)
    flags = vars(parser.parse_args())
    for key, value in flags.items():
        if isinstance(value, (int, float)) and value < 0:
            parser.error(f"--{key.lower()} {value}: it cannot be negative")
    return flags


# ---- public weights, loaded by the packages that made them


class Pretrained(nn.Module):
    """A network of another package, without labels, that is called like UNet."""

    def __init__(self, net, shape):
        super().__init__()
        self.net, self.shape, self.classes = net, shape, 0

    def forward(self, x, t, y=None):
        eps = self.net(x, t - 1)
        return eps if isinstance(eps, torch.Tensor) else eps.sample  # diffusers wraps it


def load_pretrained(source):
    """A public network, as a Pretrained, and its alpha_bar (T + 1,), float64. Exits if it cannot.

    source: a Hugging Face repository or a folder with a UNet2DModel of diffusers and its scheduler;
        or a file, the diffusion.pt of DLStudio
    """
    source = os.path.expanduser(source)
    try:
        return load_dlstudio(source) if os.path.isfile(source) else load_diffusers(source)
    except Exception as error:  # these packages raise many types
        sys.exit(f"error: cannot load --init_from {source}: {error!r:.500}. It needs pip install "
                 "diffusers; for a file, pip install DLStudio pymsgbox torchmetrics")


def load_dlstudio(path):
    from GenerativeDiffusion import UNetModel

    net = UNetModel(3, 128, 3, num_res_blocks=2, attention_resolutions=(4, 8),
                    channel_mult=(1, 2, 3, 4))
    net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return Pretrained(net, [3, 64, 64]), make_alpha_bar("linear", 1000)


def load_diffusers(source):
    from diffusers import DDPMScheduler, UNet2DModel

    folders = "unet", "scheduler"
    try:
        UNet2DModel.load_config(source, subfolder="unet")  # as DDPMPipeline writes it
    except OSError:
        folders = None, None  # both in one folder, as in google/ddpm-cifar10-32
    net, info = UNet2DModel.from_pretrained(
        source, subfolder=folders[0], low_cpu_mem_usage=False, output_loading_info=True)
    scheduler = DDPMScheduler.from_pretrained(source, subfolder=folders[1])
    config = net.config
    if (info["missing_keys"] or info["unexpected_keys"] or config.num_class_embeds
            or config.class_embed_type or config.in_channels != config.out_channels
            or config.time_embedding_type != "positional"
            or scheduler.config.prediction_type != "epsilon"):
        raise ValueError("it must predict eps from t, without labels and without learned variances,"
                         " and its weights must fit its config.json")
    alpha_bar = torch.cat([torch.ones(1), 1 - scheduler.betas]).double().cumprod(0)
    size = config.sample_size or IMAGE_SIZE
    return Pretrained(net, [config.in_channels, size, size]), alpha_bar


if __name__ == "__main__":
    import data

    flags = parse_flags()
    globals().update(flags)
    out, ckpt, pretrained = Path(OUT_DIR).expanduser(), None, None
    if RESUME or SAMPLE and "INIT_FROM" not in flags:
        try:
            ckpt = torch.load(out / "ckpt.pt", map_location="cpu", weights_only=True)
            assert ckpt["script"] == "ddpm", "of another script"
        except Exception as error:  # torch.load raises many types on a damaged file
            sys.exit(f"error: no checkpoint of this ddpm.py in {out}: {error!r:.80}. "
                     "Train first, or give another --out_dir")
        for key in run_keys:  # those of the run, except where a flag is given now
            value = ckpt["settings"].get(key, globals()[key])
            if key not in flags and value != globals()[key]:
                print(f"{key} = {value}, as in the run; in this file it is {globals()[key]}")
                globals()[key] = value
    elif (out / "ckpt.pt").exists():
        sys.exit(f"error: {out} holds a run: give --resume, or another --out_dir")
    if INIT_FROM:
        pretrained = load_pretrained(INIT_FROM)
        IMAGE_SIZE = pretrained[0].shape[1]
        print(f"network, image size ({IMAGE_SIZE}) and noise schedule are those of {INIT_FROM}")
    check_settings()
    try:
        write_samples(out, ckpt, pretrained) if SAMPLE else train(out, ckpt, pretrained)
    except data.Error as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(f"stopped: --resume --out_dir {out} continues from the last checkpoint, if any")
