"""FID, the Fréchet Inception Distance (Heusel et al. 2017, https://arxiv.org/abs/1706.08500).

It measures how far apart two sets of images are. An Inception network turns each image into 2048
features, a Gaussian is fitted to the features of each set, and FID is the squared Fréchet distance
between the two Gaussians: 0 for equal ones. Network, resizing and arithmetic are pytorch-fid's.

    python fid.py out/dcgan/generated celeba            # prints one line: FID 12.3456
    python fid.py path/to/photos --save photos.npz      # statistics, which can be an input
    python fid.py generated.zip photos.npz --num 10000

An input is a folder or .zip of images, a .npy or .npz of uint8 images (N, H, W, C), a .npz of
statistics (mu and sigma), celeba or mnist. As a library:

    from fid import Inception, frechet_distance, statistics
    inception = Inception().to("cuda")
    frechet_distance(*statistics(fakes, inception), *statistics(reals, inception))
"""
import argparse
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import scipy.linalg
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import inception as torchvision_inception

try:
    from data import Error  # a mistake of the user, which the scripts print in one line
except ImportError:  # a copied fid.py needs data.py for the command alone
    Error = ValueError

URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
       "pt_inception-2015-12-05-6726825d.pth")
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"

# ---- network: torchvision's Inception v3, changed where the TensorFlow graph of 2015-12-05 differs


class WithoutPadding(nn.Module):
    """Deviation 1 from torchvision: average pooling does not count the zeros of the padding, so
    torchvision's result is divided by the share of pixels that are not padding."""

    def forward(self, pooled):
        return pooled / F.avg_pool2d(torch.ones_like(pooled[:1, :1]), 3, stride=1, padding=1)


class LastBlock(torchvision_inception.InceptionE):
    """Deviation 2: the last block takes the maximum instead of the average."""

    def _forward(self, x):
        single = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        return [
            self.branch1x1(x),
            self.branch3x3_2a(single),
            self.branch3x3_2b(single),
            self.branch3x3dbl_3a(double),
            self.branch3x3dbl_3b(double),
            self.branch_pool(F.max_pool2d(x, 3, stride=1, padding=1)),
        ]


class Inception(torchvision_inception.Inception3):
    """uint8 images (B, 1 or 3, H, W), or a list of (1, C, H, W) of any sizes -> features (B, 2048).

    weights: a file with the state dict of pytorch-fid's network; by default it is downloaded once
    Raises Error if there are no such weights.
    """

    def __init__(self, weights=""):
        super().__init__(1008, aux_logits=False, init_weights=False)  # deviation 3: 1008 classes
        self.Mixed_7c = LastBlock(2048)
        path = Path(weights).expanduser() if weights else download_weights()
        try:
            self.load_state_dict(torch.load(path, "cpu", weights_only=True))
        except Exception as error:  # torch.load raises many types on a file that is not its own
            raise Error(f"{path} does not hold the weights of pytorch-fid's Inception "
                        f"({type(error).__name__}): get them from {URL}") from error
        self.eval().requires_grad_(False)
        for block in list(self.modules()):
            if isinstance(block, torchvision_inception.BasicConv2d):  # folds BatchNorm into it
                fused = nn.utils.fuse_conv_bn_eval(block.conv.double(), block.bn.double())
                block.conv, block.bn = fused.float(), nn.Identity()
            elif hasattr(block, "branch_pool") and block is not self.Mixed_7c:
                block.branch_pool = nn.Sequential(WithoutPadding(), block.branch_pool)
        self.fc = nn.Identity()
        self.to(memory_format=torch.channels_last)

    def forward(self, images):
        batches = images if isinstance(images, list) else images.split(16)  # photos may be large
        if any(batch.dtype != torch.uint8 for batch in batches):
            raise Error(f"Inception takes uint8 images, 0 to 255, not {batches[0].dtype}")
        weight = self.Conv2d_1a_3x3.conv.weight
        # deviation 4: resized without antialiasing, to [-1, 1]
        resized = [F.interpolate(batch.to(weight) / 255, (299, 299), mode="bilinear")
                   for batch in batches]
        x = torch.cat([batch.expand(-1, 3, -1, -1) for batch in resized]) * 2 - 1
        return super().forward(x.contiguous(memory_format=torch.channels_last))


def download_weights():
    """The path of the weights in torch.hub's cache. They are downloaded and checked once."""
    path = Path(torch.hub.get_dir(), "checkpoints", URL.split("/")[-1])
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(URL, str(path), SHA256)
        except (OSError, RuntimeError) as error:  # no network, or another hash
            raise Error(f"cannot download Inception's weights ({error}): get {URL} and put it into "
                        f"{path.parent}, or give fid.py --weights") from error
    return path


# ---- the two Gaussians and their distance


def statistics(batches, inception):
    """Mean (2048,) and covariance (2048, 2048) of the features of images, in float64.

    batches: an iterable of what Inception takes, or one uint8 tensor (N, C, H, W)
    Only sums are kept, so memory does not grow with N. Raises Error on fewer than two images.
    """
    if isinstance(batches, torch.Tensor):
        batches = batches.split(64)
    count, shift = 0, None
    for batch in batches:
        x = inception(batch)
        x = (x.cpu() if x.is_mps else x).double()  # MPS has no float64
        if shift is None:  # sums around a value near the mean lose no digits
            shift = x.mean(0)
            total, products = torch.zeros_like(shift), torch.zeros_like(torch.outer(shift, shift))
        x = x - shift
        count += len(x)
        total += x.sum(0)
        products += x.T @ x
    if count < 2:
        raise Error(f"{count} images: a covariance needs two or more")
    mean = total / count
    covariance = (products - count * torch.outer(mean, mean)) / (count - 1)  # unbiased
    return (mean + shift).cpu().numpy(), covariance.cpu().numpy()


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)) (Heusel et al., eq. 6).

    mu: means (D,); sigma: covariances (D, D). Raises Error if they are not, or not finite.
    """
    if not np.shape(mu1) * 2 == np.shape(mu2) * 2 == np.shape(sigma1) == np.shape(sigma2):
        shapes = [np.shape(part) for part in (mu1, sigma1, mu2, sigma2)]
        raise Error(f"these are not means (D,) and covariances (D, D): {shapes}")
    if not all(np.isfinite(part).all() for part in (mu1, sigma1, mu2, sigma2)):
        raise Error("the statistics are not finite")
    values, vectors = np.linalg.eigh(sigma1)
    others = np.linalg.eigvalsh(sigma2)
    if min(values[0], others[0]) < -1e-3 * max(values[-1], others[-1]):
        raise Error("a covariance has negative eigenvalues")
    if values[0] > 1e-10 * values[-1] and others[0] > 1e-10 * others[-1]:
        trace = np.trace(scipy.linalg.sqrtm(sigma1 @ sigma2)).real
    else:
        # With fewer images than features a covariance is singular, and sqrtm may fail. The product
        # has the eigenvalues of a symmetric matrix, whose roots always exist.
        root = vectors * np.sqrt(values.clip(0)) @ vectors.T
        trace = np.sqrt(np.linalg.eigvalsh(root @ sigma2 @ root).clip(0)).sum()
    distance = np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * trace
    return max(float(distance), 0.0)  # rounding may leave -1e-10 for two equal sets


def compare(samples, images, num, seed, device):
    """FID of uint8 batches of samples against `num` random images of a tensor (N, C, H, W)."""
    inception = Inception().to(device)
    parts = random_order(len(images), seed)[:num].split(64)
    real = statistics((images[part] for part in parts), inception)
    return frechet_distance(*statistics(samples, inception), *real)


def random_order(total, seed):
    return torch.randperm(total, generator=torch.Generator().manual_seed(seed))


# ---- command


def open_input(name, args):
    """What an input holds: its statistics, or None; batches of its images; their number."""
    import data

    path = Path(name).expanduser()
    if name not in data.NAMED and not (name and path.exists()):
        raise Error(f"there is no input {name}")
    if name not in data.NAMED and path.suffix.lower() == ".npz":
        try:
            with np.load(path, allow_pickle=False) as file:
                if {"mu", "sigma"} <= set(file.files):
                    return (file["mu"], file["sigma"]), None, 0
        except Exception as error:  # NumPy raises many types on damaged files
            raise Error(f"{path} is not a readable .npz: {error}") from error
    if name in data.NAMED:  # cropped and resized as for training
        size = args.image_size or (64 if "face" in name or name == "celeba" else 28)
        images, _ = data.load(name, size, args.data_dir)
    elif path.suffix.lower() in (".npy", ".npz"):
        images = torch.from_numpy(data.read_array(path)).permute(0, 3, 1, 2)
    else:
        images, root = data.list_files(path)
    if args.num > len(images):
        raise Error(f"--num {args.num}: {name} has {len(images)} images")
    order = random_order(len(images), args.seed) if args.num else torch.arange(len(images))
    total = args.num or len(images)
    if isinstance(images, list):  # of names; read_files() stops after args.num that it can read
        return None, read_files([images[i] for i in order], root, args.num, args.batch_size), total
    return None, (images[part] for part in order[:total].split(args.batch_size)), total


def read_files(names, root, num, batch_size):
    """Yield images in batches, a tensor (B, 3, H, W), or a list of (1, 3, H, W) if sizes differ.

    Stops after `num` images; 0 = all. What cannot be read is skipped, and does not count.
    """
    import data

    count, skipped = 0, []
    with ThreadPoolExecutor() as pool:
        for i in range(0, len(names), batch_size):
            part = names[i:i + batch_size]
            images = []
            decoded = pool.map(partial(data.decode_image, root), part)
            for name, (pixels, reason) in zip(part, decoded):
                if pixels is None:
                    skipped.append(f"{name}: {reason}")
                elif count < num or not num:
                    images.append(torch.from_numpy(pixels).permute(2, 0, 1)[None])
                    count += 1
            if images:
                same_size = len({image.shape for image in images}) == 1
                yield torch.cat(images) if same_size else images
            if count == num > 0:
                break
    data.report_skipped(skipped, len(names))
    if count < num:
        raise Error(f"--num {num}: there are {count} readable images")


def show_progress(batches, name, total):
    from tqdm import tqdm

    with tqdm(desc=name, total=total, unit="image") as bar:
        for batch in batches:
            yield batch
            bar.update(len(batch))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=argparse.SUPPRESS)
    add = parser.add_argument
    add("inputs", nargs="+", help="two inputs, or one with --save")
    add("--weights", default="", help="Inception's state dict; downloaded once if not given")
    add("--save", default="", metavar="FILE.npz", help="write the statistics of one input")
    add("--num", type=int, default=0, help="a random subset of N images of each input; 0 = all")
    add("--seed", type=int, default=0, help="decides the subset (default: %(default)s)")
    add("--batch_size", type=int, default=64, help="images at a time (default: %(default)s)")
    add("--device", default="auto", help="cuda, mps or cpu (default: a GPU if there is one)")
    add("--data_dir", default="data", help="where celeba and mnist are")
    add("--image_size", type=int, default=0, help="pixels of a named set; default: 64, digits 28")
    args = parser.parse_args()
    if len(args.inputs) != (1 if args.save else 2) or args.save in args.inputs:
        parser.error("give two inputs, or one and --save FILE.npz, another file")
    if args.num < 0 or args.batch_size < 1:
        parser.error("--num must be 0 or more, --batch_size 1 or more")

    inputs = [open_input(name, args) for name in args.inputs]  # finds mistakes before the work
    gpu = torch.accelerator.current_accelerator(check_available=True)
    device = gpu or "cpu" if args.device == "auto" else args.device
    inception, gaussians = None, []
    for name, (gaussian, batches, total) in zip(args.inputs, inputs):
        if gaussian is None:
            inception = inception or Inception(args.weights).to(device)
            gaussian = statistics(show_progress(batches, name, total), inception)
            if total < 10_000:
                print(f"{name}: fewer than 10,000 images make FID too high; compare it only with "
                      "FIDs of as many images", file=sys.stderr)
        gaussians.append(gaussian)
    if args.save:
        mu, sigma = gaussians[0]
        path = Path(args.save).expanduser()
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, mu=mu, sigma=sigma)
    else:
        print(f"FID {frechet_distance(*gaussians[0], *gaussians[1]):.4f}")


if __name__ == "__main__":
    try:
        main()
    except Error as error:
        sys.exit(f"error: {error}")
