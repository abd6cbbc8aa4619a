"""FID, the Fréchet Inception Distance (Heusel et al. 2017, https://arxiv.org/abs/1706.08500).

How far apart two sets of images are: an Inception network turns each image into 2048 features,
each set becomes a Gaussian over them, and FID is the Fréchet distance of the two. Less is better.
Network, resizing and arithmetic are those of pytorch-fid, so the numbers are too.

    python fid.py out/dcgan/generated data/celeba64.npy     # prints one line: FID 12.3456
    python fid.py path/to/photos --save photos.npz          # statistics, to be used as an input
    python fid.py generated.zip photos.npz --num 10000

An input is a folder or .zip of images, a .npy or .npz of uint8 images (N, H, W, C), a .npz of
statistics (mu, sigma), celeba or mnist. As a library:

    from fid import Inception, frechet_distance, statistics
    inception = Inception().to("cuda")
    frechet_distance(*statistics(fakes, inception), *statistics(reals, inception))
"""
import argparse
import hashlib
import io
import math
import os
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import scipy.linalg
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import inception

URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
       "pt_inception-2015-12-05-6726825d.pth")  # a port of the TensorFlow graph of the paper
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"


# ---- network: torchvision's Inception v3, where the graph of 2015-12-05 differs written out again


def average(x):
    """Deviation 1: a mean at the border leaves the padding out of its count."""
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


class A(inception.InceptionA):
    def _forward(self, x):
        return [self.branch1x1(x),
                self.branch5x5_2(self.branch5x5_1(x)),
                self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x))),
                self.branch_pool(average(x))]


class C(inception.InceptionC):
    def _forward(self, x):
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        return [self.branch1x1(x),
                self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x))),
                self.branch7x7dbl_5(self.branch7x7dbl_4(double)),
                self.branch_pool(average(x))]


class E(inception.InceptionE):
    pool = staticmethod(average)

    def _forward(self, x):
        a, b = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        return [self.branch1x1(x),
                self.branch3x3_2a(a), self.branch3x3_2b(a),
                self.branch3x3dbl_3a(b), self.branch3x3dbl_3b(b),
                self.branch_pool(self.pool(x))]


class LastE(E):
    """Deviation 2: in the last block it is the maximum, as in the graph that FID began with."""
    pool = staticmethod(lambda x: F.max_pool2d(x, 3, 1, 1))


class Inception(inception.Inception3):
    """uint8 images (B, 1 or 3, H, W), or a list of them of any sizes -> features (B, 2048).

    weights: the state dict of pytorch-fid's port, a file; "" fetches it into torch.hub's cache
    """

    def __init__(self, weights=""):
        super().__init__(1008, aux_logits=False, init_weights=False)  # deviation 3: 1008 classes
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = A(192, 32), A(256, 64), A(288, 64)
        self.Mixed_6b, self.Mixed_6c = C(768, 128), C(768, 160)
        self.Mixed_6d, self.Mixed_6e = C(768, 160), C(768, 192)
        self.Mixed_7b, self.Mixed_7c = E(1280), LastE(2048)
        path = Path(weights or fetch_weights())
        try:
            content = path.read_bytes()
            self.load_state_dict(torch.load(io.BytesIO(content), "cpu", weights_only=True))
        except OSError:
            raise
        except Exception as error:  # torch raises nearly anything on a file that is not its own
            raise ValueError(f"{path} does not hold the weights of pytorch-fid's Inception: "
                             f"get them from {URL}") from error
        self.digest = hashlib.sha256(content).hexdigest()
        self.eval().requires_grad_(False)
        for block in list(self.modules()):  # convolutions that do what BatchNorm does after them
            if isinstance(block, inception.BasicConv2d):
                fused = nn.utils.fuse_conv_bn_eval(block.conv.double(), block.bn.double())
                block.conv, block.bn = fused.float(), nn.Identity()
        self.fc = nn.Identity()  # the features before the classes
        self.to(memory_format=torch.channels_last)

    def forward(self, images):
        parts = images if isinstance(images, (list, tuple)) else [images]
        if any(part.dtype != torch.uint8 for part in parts):
            raise ValueError(f"Inception takes uint8 images, 0 to 255, not {parts[0].dtype}")
        weight = self.Conv2d_1a_3x3.conv.weight
        # deviation 4: resized without antialiasing, to [-1, 1]
        parts = [F.interpolate(part.to(weight) / 255, (299, 299), mode="bilinear")
                 for part in parts]
        x = torch.cat([part.expand(-1, 3, -1, -1) for part in parts]) * 2 - 1
        return super().forward(x.contiguous(memory_format=torch.channels_last))


def fetch_weights():
    """The weights in torch.hub's cache; they are downloaded, and their hash checked, once."""
    path = Path(torch.hub.get_dir(), "checkpoints", URL.split("/")[-1])
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(URL, str(path), SHA256)
        except (OSError, RuntimeError) as error:  # no network; another hash
            raise OSError(f"cannot download Inception's weights ({error}): get {URL} and put it "
                          f"into {path.parent}, or name it with --weights") from error
    return path


# ---- the two Gaussians and their distance


def statistics(images, inception, batch_size=64):
    """Mean (2048,) and covariance (2048, 2048) of the features of images, in float64.

    images: a uint8 array (N, H, W, C), a uint8 tensor (N, C, H, W), or an iterator of uint8 batches
            (B, C, H, W) or of lists of (1, C, H, W) of any sizes
    Sums are all that is kept, so memory does not grow with N. ValueError on fewer than two images.
    """
    if isinstance(images, np.ndarray):
        images = torch.from_numpy(images).permute(0, 3, 1, 2)
    batches = images.split(batch_size) if isinstance(images, torch.Tensor) else images
    count, shift = 0, None
    for batch in batches:
        x = inception(batch)
        x = (x.cpu() if x.device.type == "mps" else x).double()  # MPS has no float64
        if shift is None:
            shift = x.mean(0)  # sums around it, not around 0, lose no digits
            total, products = torch.zeros_like(shift), torch.zeros_like(torch.outer(shift, shift))
        x = x - shift
        count += len(x)
        total += x.sum(0)
        products.addmm_(x.T, x)
    if count < 2:
        raise ValueError(f"{count} image{'' if count else 's'}: a covariance needs two or more")
    mean = total / count
    covariance = (products - count * torch.outer(mean, mean)) / (count - 1)  # unbiased
    return (mean + shift).cpu().numpy(), covariance.cpu().numpy()


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)) (Heusel et al., eq. 6)."""
    mu1, sigma1, mu2, sigma2 = (np.asarray(a, np.float64) for a in (mu1, sigma1, mu2, sigma2))
    if not mu1.shape * 2 == mu2.shape * 2 == sigma1.shape == sigma2.shape:
        raise ValueError(f"statistics of other dimensions: mu {mu1.shape} and {mu2.shape}, "
                         f"sigma {sigma1.shape} and {sigma2.shape}")
    if not all(np.isfinite(a).all() for a in (mu1, sigma1, mu2, sigma2)):
        raise ValueError("the statistics are not finite")
    values, vectors = np.linalg.eigh(sigma1)
    smallest, largest = np.linalg.eigvalsh(sigma2)[[0, -1]]
    if values[0] > 1e-10 * values[-1] and smallest > 1e-10 * largest:
        trace = np.trace(scipy.linalg.sqrtm(sigma1 @ sigma2)).real
    else:  # a singular product need have no root, so sqrtm may fail; its eigenvalues have roots,
        half = vectors * np.sqrt(values.clip(0)) @ vectors.T  # and are those of a symmetric matrix
        trace = np.sqrt(np.linalg.eigvalsh(half @ sigma2 @ half).clip(0)).sum()
    distance = (mu1 - mu2) @ (mu1 - mu2) + np.trace(sigma1) + np.trace(sigma2) - 2 * trace
    return max(float(distance), 0.0)  # rounding may leave -1e-10 of two equal sets


def sampling_bias(sigma, n1, n2):
    """What FID is to be expected between n1 and n2 images of one and the same distribution.

    To first order in 1/n, for Gaussians: the means contribute tr(sigma) (1/n1 + 1/n2). With D the
    error of a covariance, E D_ij^2 = (l_i l_j + [i = j] l_i^2) / n in sigma's eigenvectors, and the
    distance of covariances is sum_ij D_ij^2 / (2 (l_i + l_j)) to second order in D. Below some
    thousand images the eigenvalues of a sample are too few and the result is too small.
    """
    values = np.linalg.eigvalsh(sigma).clip(1e-12)
    pairs = np.outer(values, values) / np.add.outer(values, values)
    return (1 / n1 + 1 / n2) * (values.sum() + (pairs.sum() + np.trace(pairs)) / 2)


def cached_statistics(images, inception, folder):
    """statistics() of a tensor, kept in a file whose name is the hash of the images and weights."""
    digest = hashlib.sha256(inception.digest.encode() + str(tuple(images.shape)).encode())
    for chunk in images.permute(0, 2, 3, 1).split(1024):
        digest.update(chunk.cpu().contiguous().numpy())
    path = Path(folder, f"fid-{digest.hexdigest()[:32]}.npz")
    if not path.exists():
        save_statistics(path, *statistics(images, inception))
    return load_statistics(path)


def save_statistics(path, mu, sigma):
    """Write what pytorch-fid reads: mu and sigma in a .npz; written beside, then renamed."""
    tmp = Path(f"{path}.{os.getpid()}.tmp")
    tmp.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(tmp, "wb") as file:
            np.savez(file, mu=mu, sigma=sigma)
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)


def load_statistics(path):
    """mu and sigma of a .npz, or None if it holds something else."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return (file["mu"], file["sigma"]) if {"mu", "sigma"} <= set(file.files) else None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is no .npz file that can be read") from error


# ---- inputs


def open_input(name, args):
    """Known statistics, or None, an iterator of batches for statistics() and how many images.

    Images of one size are a uint8 batch, mixed sizes a list, to be resized one by one.
    """
    import data

    path = Path(name).expanduser()
    known = load_statistics(path) if path.suffix == ".npz" and path.exists() else None
    if known:
        return known, None, 0
    if name in ("celeba", "mnist"):  # through data.py, so that both sides get the same crop
        size = args.image_size or (64 if name == "celeba" else 28)
        images, _ = data.load(name, size, args.data_dir)
    elif not path.exists():
        raise ValueError(f"no such input: {name}")
    elif path.suffix.lower() in (".npy", ".npz"):
        images = torch.from_numpy(data.read_array(path)).permute(0, 3, 1, 2)
    else:
        names, read = data.listing(path)
        if name == args.inputs[0] and any(n.lower().endswith((".jpg", ".jpeg")) for n in names):
            print(f"warning: {name} holds JPEG files: if these are generated images, write PNG, "
                  "for JPEG changes FID", file=sys.stderr)
        chosen = subset(len(names), args, name)
        chosen_names = [names[i] for i in chosen]
        return None, read_files(chosen_names, read, args.batch_size, path), len(chosen)
    chosen = subset(len(images), args, name)
    return None, (images[some] for some in chosen.split(args.batch_size)), len(chosen)


def subset(total, args, name):
    """The indices of args.num out of `total` images, or all, in rising order."""
    if args.num > total:
        raise ValueError(f"--num {args.num}: {name} has {total} images")
    order = torch.randperm(total, generator=torch.Generator().manual_seed(args.seed))
    return order[:args.num or total].sort().values


def read_files(names, read, batch_size, path):
    """Decode image files as pytorch-fid does, a batch ahead of the network."""
    import data
    from PIL import Image

    unreadable, notes = [], set()

    def decode(name):
        try:
            image = Image.open(io.BytesIO(read(name)))
            if image.mode.startswith("I"):
                notes.add("16-bit images are scaled to 8 bits")
            if image.has_transparency_data:
                notes.add("transparency is ignored")
            pixels = np.array(data.to_8_bits(image).convert("RGB"))
            return torch.from_numpy(pixels).permute(2, 0, 1)[None]
        except Exception as error:  # a damaged file makes Pillow raise nearly anything
            unreadable.append(f"{name} ({type(error).__name__})")

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        parts = [names[i:i + batch_size] for i in range(0, len(names), batch_size)] or [[]]
        ahead = pool.map(decode, parts[0])
        for following in [*parts[1:], []]:
            images = [image for image in ahead if image is not None]
            ahead = pool.map(decode, following)
            if len({image.shape for image in images}) == 1:
                yield torch.cat(images)
            elif images:
                yield images
    for note in sorted(notes):
        print(f"{path}: {note}", file=sys.stderr)
    data.say_unreadable(path, unreadable, len(names))


# ---- command


def watched(batches, name, total, numbers):
    """Pass batches on, say on stderr how far they are, and add their images to `numbers`."""
    count, began, line = 0, time.time(), ""
    for batch in batches:
        yield batch  # the network is done with it when the next one is asked for
        count += len(batch)
        rate = count / (time.time() - began)
        line = f"{name}: {count:,} of {total:,} images, {rate:.1f} images/s"
        if sys.stderr.isatty():
            print(f"\r{line}, {(total - count) / rate:.0f} s left   ", end="", file=sys.stderr)
    numbers.append(count)
    print("\r" * sys.stderr.isatty() + line, file=sys.stderr)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)

    def fail(message):
        raise ValueError(message)

    def count(text):
        return int(text) if int(text) > 0 else fail(f"{text}: give 1 or more")

    parser.error = fail
    option = parser.add_argument
    option("inputs", nargs="+", help="one input with --save, or two, the generated one first")
    option("--weights", default="", help="Inception's state dict; fetched once when not given")
    option("--save", default="", metavar="FILE.npz", help="write the statistics of one input")
    option("--num", type=count, default=0, help="a random subset of so many images of each input")
    option("--seed", type=int, default=0, help="decides the subset (default: %(default)s)")
    option("--batch_size", "--batch-size", type=count, default=64, help="(default: %(default)s)")
    option("--device", default="auto", help="cuda, mps or cpu (default: the first that is there)")
    option("--data_dir", "--data-dir", default="data", help="of celeba and mnist")
    option("--image_size", "--image-size", type=count, default=0, help="of celeba and mnist")
    args = parser.parse_args()
    if len(args.inputs) != (1 if args.save else 2):
        fail("give two inputs, or one and --save FILE.npz")

    import data

    inputs = [open_input(name, args) for name in args.inputs]  # a mistake in the second shows now
    network, gaussians, numbers = None, [], []
    for name, (known, batches, total) in zip(args.inputs, inputs):
        if known:
            gaussians.append(known)
            numbers.append(math.inf)  # of how many images, the file does not say
            continue
        network = network or Inception(args.weights).to(data.pick_device(args.device))
        gaussians.append(statistics(watched(batches, name, total, numbers), network))
    if args.save:
        save_statistics(args.save, *gaussians[0])
        return
    distance = frechet_distance(*gaussians[0], *gaussians[1])
    if min(numbers) < 10_000:
        _, sigma = gaussians[numbers.index(max(numbers))]
        print(f"warning: so few images bias FID upwards, by {sampling_bias(sigma, *numbers):.2g} "
              "or more; compare it only with FIDs of as many images", file=sys.stderr)
    print(f"FID {distance:.4f}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
