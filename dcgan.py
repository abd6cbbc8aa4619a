"""DCGAN: images from noise (Radford, Metz & Chintala 2015, https://arxiv.org/abs/1511.06434).

Two convolutional networks compete: the discriminator D learns to tell images of a data set from
generated ones, the generator G to turn random numbers into images that D takes for real.

    python dcgan.py                               # CelebA at 64 px, into out/dcgan
    python dcgan.py --data path/to/photos         # your own: a folder, .zip, .npy or .npz
    python dcgan.py --resume --epochs 50          # go on from out/dcgan/ckpt.pt
    python dcgan.py --sample 1000                 # write images to out/dcgan/generated

Measured: 25,000 faces at 64 px, 15 epochs, 30 minutes on 2 CPU cores with --dtype bfloat16.
To train on your own tensor, replace data.load(...) in main() by tensor, None: uint8 (N, C, H, W).
"""
import argparse
import copy
import math
import os
import re
import signal
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import softplus

# ---- config: every constant is also a flag, e.g. --batch_size 64 --no-flip

DATA = "celeba"         # celeba, mnist, toy-faces, toy-digits; or a folder, .zip, .npy or .npz
DATA_DIR = "data"       # where the named sets are found, downloaded and cached
OUT_DIR = "out/dcgan"   # where the run writes
IMAGE_SIZE = 64         # pixels a side: 16, 32, 64, 128 or 256
LIMIT = 0               # only the first N images; 0 = all
FLIP = True             # mirror images at random; for digits, use --no-flip
EPOCHS = 25             # stop after N epochs, those before a resume among them
MAX_STEPS = 0           # stop after N steps, if that is sooner; 0 = no limit
BATCH_SIZE = 128        # images in a step
LR = 2e-4               # learning rate of both Adam optimizers
BETA1 = 0.5             # Adam: decay of the average gradient
BETA2 = 0.999           # Adam: decay of the average squared gradient
LATENT = 100            # numbers in z, the noise that becomes an image
WIDTH = 64              # channels of the layers next to the image; doubled in each layer, up to 8x
EMA = 0.999             # decay of the averaged G that samples come from; 0 = the latest G
SEED = 0                # of initial weights, noise and the order of images
DEVICE = "auto"         # cuda, mps or cpu; auto = the first of them that there is
DTYPE = "auto"          # bfloat16 or float32; auto = bfloat16 on GPUs that support it
COMPILE = True          # use torch.compile (on CUDA only)
LOG_EVERY = 50          # steps between two rows of the log
SAMPLE_EVERY = 1        # epochs between two grids of samples; 0 = none
FID = 0                 # after training, FID of N samples against N images; 0 = none
RESUME = False          # go on from ckpt.pt in OUT_DIR
SAMPLE = 0              # do not train; write N images to OUT_DIR/generated, in place of older ones

# ---- networks: layers halve or double height and width (section 3 and figure 1)


def layer_channels(image_size, width):
    """Channels at half the image's size, a quarter, ..., 4x4. For 64 px: 64, 128, 256, 512."""
    if image_size not in (16, 32, 64, 128, 256):
        raise ValueError(f"--image_size {image_size}: give 16, 32, 64, 128 or 256")
    return [width * min(2**i, 8) for i in range(int(math.log2(image_size)) - 2)]


class Generator(nn.Module):
    """z (B, latent) from N(0, 1) -> images (B, channels, image_size, image_size) in [-1, 1]."""

    def __init__(self, image_size=64, channels=3, latent=100, width=64):
        super().__init__()
        widths = layer_channels(image_size, width)[::-1]
        layers = [
            nn.ConvTranspose2d(latent, widths[0], 4, bias=False),               # 4x4
            nn.BatchNorm2d(widths[0]),
            nn.ReLU(True),
        ]
        for a, b in zip(widths, widths[1:]):
            layers += [
                nn.ConvTranspose2d(a, b, 4, stride=2, padding=1, bias=False),   # 8x8, 16x16, ...
                nn.BatchNorm2d(b),
                nn.ReLU(True),
            ]
        layers += [nn.ConvTranspose2d(widths[-1], channels, 4, stride=2, padding=1, bias=False)]
        layers += [nn.Tanh()]
        self.layers = nn.Sequential(*layers)
        self.apply(init_weights)

    def forward(self, z):
        return self.layers(z[:, :, None, None])


class Discriminator(nn.Module):
    """Images (B, channels, image_size, image_size) -> logits (B,), where D(x) = sigmoid(logit)."""

    def __init__(self, image_size=64, channels=3, width=64):
        super().__init__()
        widths = layer_channels(image_size, width)
        layers = [nn.Conv2d(channels, widths[0], 4, stride=2, padding=1, bias=False)]  # half
        layers += [nn.LeakyReLU(0.2, True)]
        for a, b in zip(widths, widths[1:]):
            layers += [
                nn.Conv2d(a, b, 4, stride=2, padding=1, bias=False),             # ..., 8x8, 4x4
                nn.BatchNorm2d(b),
                nn.LeakyReLU(0.2, True),
            ]
        layers += [nn.Conv2d(widths[-1], 1, 4, bias=False)]                      # 1x1
        self.layers = nn.Sequential(*layers)
        self.apply(init_weights)

    def forward(self, x):
        return self.layers(x).view(len(x))


def init_weights(layer):
    """Standard deviation 0.02: around 0 for convolutions (section 4), 1 for BatchNorm's scales."""
    if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(layer.weight, 0.0, 0.02)
    elif isinstance(layer, nn.BatchNorm2d):
        nn.init.normal_(layer.weight, 1.0, 0.02)


# ---- losses (Goodfellow et al. 2014, https://arxiv.org/abs/1406.2661): binary cross-entropy
# With D = sigmoid(logit): -log D = softplus(-logit) and -log(1 - D) = softplus(logit).


def loss_d(real_logit, fake_logit):
    """Minus what D maximizes: log D(x) + log(1 - D(G(z))) (Algorithm 1)."""
    return softplus(-real_logit).mean() + softplus(fake_logit).mean()


def loss_g(fake_logit):
    """-log D(G(z)), whose gradient does not vanish where D is sure (section 3)."""
    return softplus(-fake_logit).mean()


# ---- train or sample


def main(settings, ckpt):
    """settings: the constants, for the checkpoint; ckpt: what a run starts from, or None."""
    import data  # here, so that the networks above can be imported with torch alone

    out = Path(OUT_DIR)
    if not ckpt and (out / "ckpt.pt").exists():
        sys.exit(f"error: {out} holds a run: give --resume to go on, or another --out_dir")
    try:  # what can fail because of a flag or a file
        device, bfloat16, compiled = data.pick_device(DEVICE, DTYPE, COMPILE)
        # on MPS, the gradient of BatchNorm is wrong with channels last
        layout = torch.contiguous_format if device.type == "mps" else torch.channels_last
        if SAMPLE:
            shape = ckpt["shape"]
        else:
            images, _ = data.load(DATA, IMAGE_SIZE, DATA_DIR, LIMIT)
            shape = list(images.shape[1:])
            get_batch = data.Batches(images, None, BATCH_SIZE, SEED, FLIP, device, layout)
        if FID and not SAMPLE:
            import fid
            inception = fid.Inception().to(device)  # now, and not after training: it may fail
        torch.manual_seed(SEED)
        G = Generator(IMAGE_SIZE, shape[0], LATENT, WIDTH).to(device, memory_format=layout)
        D = Discriminator(IMAGE_SIZE, shape[0], WIDTH).to(device, memory_format=layout)
        ema = copy.deepcopy(G).eval().requires_grad_(False)
        opt_G = torch.optim.Adam(G.parameters(), LR, (BETA1, BETA2), fused=True)
        opt_D = torch.optim.Adam(D.parameters(), LR, (BETA1, BETA2), fused=True)
        parts = dict(G=G, D=D, ema=ema, opt_G=opt_G, opt_D=opt_D)
        if ckpt:
            data.restore(parts, ckpt)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")

    @torch.no_grad()
    def generate(count):
        """Yield uint8 batches of samples 0, 1, ... count - 1; (SEED, i) alone decides batch i."""
        for i in range(math.ceil(count / 64)):
            # seeds count down from the end of SEED's range; those of steps count up
            generator = torch.Generator().manual_seed((SEED + 1) * 10**7 - 1 - i)
            z = torch.randn(64, LATENT, generator=generator).to(device)
            yield data.to_uint8(ema(z))[:count - 64 * i]

    if SAMPLE:
        data.remove_images(out / "generated")
        for i, batch in enumerate(generate(SAMPLE)):
            data.save_images(batch, out / "generated", first=64 * i)
            if i == 0:
                data.save_grid(batch, out / "generated.png")
        print(f"wrote {SAMPLE} images to {out / 'generated'}")
        return

    # running averages of loss_D, loss_G, D(x) and D(G(z)), on the device until a row of the log
    average = torch.zeros(4, device=device)
    step, rows = 0, []
    if ckpt:
        average.copy_(ckpt["average"])
        step, rows = ckpt["step"], ckpt["log"]
    names = ("loss_D", "loss_G", "D(x)", "D(G(z))")
    log = data.Log(out / "log.csv", names, step, rows)
    if compiled:
        G.compile()
        D.compile()
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=bfloat16)
    total = min(EPOCHS * len(get_batch), MAX_STEPS or math.inf)
    done = step >= total
    stop = data.catch_signals()  # a list, empty until Ctrl-C
    saved_at = time.time()

    while not done:
        x, _ = get_batch(step)
        torch.manual_seed(SEED * 10**7 + step)  # the noise of a step depends on (SEED, step) alone

        # D step
        with autocast:
            fake = G(torch.randn(len(x), LATENT, device=device))
            real_logit, fake_logit = D(x).float(), D(fake.detach()).float()
        d = loss_d(real_logit, fake_logit)
        opt_D.zero_grad()
        d.backward()
        opt_D.step()

        # G step, on the same generated images
        D.requires_grad_(False)
        with autocast:
            logit = D(fake).float()
        g = loss_g(logit)
        opt_G.zero_grad()
        g.backward()
        opt_G.step()
        D.requires_grad_(True)

        with torch.no_grad():
            decay = min(EMA, (1 + step) / (10 + step))  # low at first: initial weights fade soon
            for mean, value in zip(ema.state_dict().values(), G.state_dict().values()):
                if value.is_floating_point():  # weights, and the statistics of BatchNorm
                    mean.lerp_(value, 1 - decay)
            step += 1
            p_real, p_fake = real_logit.sigmoid(), fake_logit.sigmoid()
            values = torch.stack([d, g, p_real.mean(), p_fake.mean()])
            average.lerp_(values, max(0.05, 1 / step))  # over about 20 steps

        done = step >= total or bool(stop)
        epoch = math.ceil(step / len(get_batch))
        epoch_ends = step % len(get_batch) == 0
        log_now = step == 1 or step % LOG_EVERY == 0
        save_now = done or epoch_ends or time.time() - saved_at > 600
        if log_now or save_now:  # only here does the loop wait for the GPU
            tensors = [average, *G.parameters(), *D.parameters()]
            if not all(tensor.isfinite().all() for tensor in tensors):
                sys.exit(f"error: training diverged by step {step}: try a lower --lr "
                         f"(an earlier checkpoint in {out} stays as it was)")
        if log_now:
            values = average.tolist()
            note = "  D wins: see README" if values[2] > 0.98 and values[3] < 0.02 else ""
            log.write(step, total, epoch, len(x), values, note)
        if save_now:
            state = {name: part.state_dict() for name, part in parts.items()}
            state.update(model=Path(__file__).stem, step=step, average=average, log=log.rows,
                         config=settings, shape=shape)
            torch.save(state, out / "ckpt.pt.tmp")
            os.replace(out / "ckpt.pt.tmp", out / "ckpt.pt")  # so that ckpt.pt is always whole
            saved_at = time.time()
        if SAMPLE_EVERY and not stop and (done or (epoch_ends and epoch % SAMPLE_EVERY == 0)):
            picture = f"epoch_{epoch:04}.png"
            data.save_grid(torch.cat(list(generate(64))), out / "samples" / picture)
            data.save_gif(out / "samples", out / "samples.gif")
            data.save_plot(out / "loss.png", "step", loss=log.curves("loss_D", "loss_G"),
                           D=log.curves("D(x)", "D(G(z))"))
            data.save_plot(
                out / "prob" / picture, "value",
                D=dict(real=data.density(p_real, 0), generated=data.density(p_fake, 0)),
                pixels=dict(real=data.density(x, -1), generated=data.density(fake.detach(), -1)))

    data.set_handlers(signal.SIG_DFL)
    if stop:
        print(f"stopped at step {step} and saved: go on with --resume --out_dir {out}")
        sys.exit(128 + stop[0])
    print(f"done at step {step}, saved in {out / 'ckpt.pt'}")
    if FID:
        distance = fid.compare(generate(FID), images, FID, SEED, inception)
        print(f"FID {distance:.4f} of {FID} samples")


# ---- flags


def parse_flags(argv=None):
    """The settings by name, and the checkpoint that --resume or --sample starts from, or None.
    A flag wins over the checkpoint, and that over the constants at the top of this file."""
    source = Path(__file__).read_text("utf-8")
    comments = dict(re.findall(r"^([A-Z]\w*) = .+?  # (.+)$", source, re.M))
    settings = {name: globals()[name] for name in comments}
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=argparse.SUPPRESS, argument_default=argparse.SUPPRESS, allow_abbrev=False)
    for name, default in settings.items():
        kind = dict(type=type(default))
        if isinstance(default, bool):
            kind = dict(action=argparse.BooleanOptionalAction)
        flag = f"--{name.lower()}"
        spellings = {flag: None, flag.replace("_", "-"): None}  # a dict has no doubles
        parser.add_argument(*spellings, dest=name, **kind,
                            help=f"{comments[name]} (default: {default})")
    flags = vars(parser.parse_args(argv))
    not_zero = "IMAGE_SIZE EPOCHS BATCH_SIZE LR LATENT WIDTH LOG_EVERY SAMPLE".split()
    for name, value in flags.items():
        limit = 1 if name in ("EMA", "BETA1", "BETA2") else 2**32
        if isinstance(value, str):
            continue
        if not 0 <= value < limit or value == 0 and name in not_zero:
            parser.error(f"--{name.lower()} {value} is out of range: {comments[name]}")

    settings.update(flags)
    if not settings["RESUME"] and not settings["SAMPLE"]:
        return settings, None
    path = Path(settings["OUT_DIR"], "ckpt.pt")
    if not path.exists():
        parser.error(f"there is no {path}: train first, or give the --out_dir of a run")
    try:
        ckpt = torch.load(path, map_location="cpu", weights_only=True)
        if ckpt["model"] != Path(__file__).stem:
            raise ValueError(f"it belongs to {ckpt['model']}, or to an older version")
    except Exception as error:  # torch raises nearly anything on a damaged file
        parser.error(f"{path} is not a checkpoint of this script: {error!r}")
    local = "DATA_DIR OUT_DIR DEVICE DTYPE COMPILE MAX_STEPS FID RESUME SAMPLE LABEL".split()
    settings.update({k: v for k, v in ckpt["config"].items() if k not in local})  # as in the run
    settings.update(flags)
    return settings, ckpt


if __name__ == "__main__":
    settings, ckpt = parse_flags()
    globals().update(settings)
    main(settings, ckpt)
