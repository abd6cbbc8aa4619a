"""Image sets, batches and output files, shared by the scripts.

    images, labels = load("celeba", 64)        # uint8 (N, 3, 64, 64), memory-mapped; None
    batches = Batches(images, labels, 128)
    x, y = batches(0)                          # float (128, 3, 64, 64) in [-1, 1]; None

A folder or .zip is decoded once into a uint8 array (N, H, W, C) in a file under data_dir, which is
then memory-mapped: no worker processes, and memory does not grow with the set.
"""
import csv
import hashlib
import json
import os
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

CELEBA_URLS = (
    "https://s3.amazonaws.com/pytorch-tutorial-assets/img_align_celeba.zip",
    "https://s3-us-west-1.amazonaws.com/udacity-dlnfd/datasets/celeba.zip",
)
CELEBA_MD5 = "00d2c5bc6d35e252742224ab0c1e8fcb"
NAMED = ("celeba", "mnist", "toy-faces", "toy-digits")


class Error(Exception):
    """A mistake of the user, which the scripts print in one line."""


# ---- load: any source -> one uint8 array


def load(name, size, data_dir="data", limit=0):
    """Images, uint8 (N, C, size, size), and labels, int64 (N,), or None if there are none.

    name: celeba, mnist, toy-faces or toy-digits, or the path of a folder, .zip, .npy or .npz
    size: images are cropped to the largest centred square, then resized to size x size pixels
    limit: take only so many images, evenly spaced over the set; 0 = all
    Raises Error if there is no such set or no image in it.
    """
    data_dir, path, labels = Path(data_dir).expanduser(), Path(name).expanduser(), None
    if name not in NAMED and not (name and path.exists()):
        raise Error(f"no data {name}: give a folder, .zip, .npy or .npz, or {', '.join(NAMED)}")
    if size < 1:
        raise Error(f"images of {size} pixels: give 1 or more")
    if name == "celeba":
        array, labels = load_files(find_celeba(data_dir / "celeba"), name, size, data_dir, limit)
    elif name == "mnist":
        array, labels = load_mnist(data_dir)
    elif name == "toy-faces":
        array = draw_toys(draw_face, size, limit)
    elif name == "toy-digits":
        array = draw_toys(draw_digit, size, limit)
        labels = np.arange(len(array)) % 10
    elif path.suffix.lower() in (".npy", ".npz"):
        array = read_array(path)
    else:
        array, labels = load_files(path, path.stem, size, data_dir, limit)
    if 0 < limit < len(array):
        chosen = evenly_spaced(len(array), limit)
        array, labels = array[chosen], None if labels is None else labels[chosen]
    images = torch.from_numpy(array).permute(0, 3, 1, 2)
    if images.shape[2:] != (size, size):
        from torchvision.transforms.v2.functional import center_crop, resize  # slow to import

        images = resize(center_crop(images, min(images.shape[2:])), [size, size])
    return images, None if labels is None else torch.from_numpy(labels)


def evenly_spaced(total, num):
    return np.arange(num) * total // num


# ---- folders and .zip files


def load_files(path, name, size, data_dir, limit=0):
    """Images (N, size, size, C) and labels (N,) of a folder or .zip. They are decoded once."""
    names, root = list_files(path)
    if limit:  # from the files that look like images, if there are any
        known = Image.registered_extensions()
        names = [file for file in names if Path(file).suffix.lower() in known] or names
        names = [names[i] for i in evenly_spaced(len(names), min(limit, len(names)))]
    # a hidden file, so that the cache is not part of the set if data_dir is in its folder
    cache = data_dir / f".{name[:50]}{size}-{fingerprint(path, names)}.uint8"
    contents = cache.with_suffix(".json")  # written last: where it exists, the cache is whole
    if not (contents.exists() and cache.exists()):
        kept, channels = decode_all(names, root, size, cache)
        with replacing(contents) as tmp:
            tmp.write_text(json.dumps(dict(names=kept, channels=channels)))
    info = json.loads(contents.read_text())
    shape = len(info["names"]), size, size, 3
    array = np.memmap(cache, np.uint8, "c", shape=shape)  # c: writable in memory, for torch
    return array[..., :info["channels"]], folder_labels(info["names"])


def list_files(path):
    """The names of all files in a folder or .zip, sorted, and the root: root / name is a file.

    Hidden files are left out. A .zip is read in memory; nothing is unpacked to the disk.
    """
    if path.is_dir():
        names, root, seen, errors = [], path.resolve(), set(), []
        for folder, subfolders, files in os.walk(root, onerror=errors.append, followlinks=True):
            folder = Path(folder)
            subfolders.sort()
            if folder.resolve() in seen or "ckpt.pt" in files:
                subfolders.clear()  # a link to a folder that was read before; the folder of a run
                continue
            seen.add(folder.resolve())
            names += [(folder / file).relative_to(root).as_posix() for file in files
                      if (folder / file).is_file()]
        if errors:
            raise Error(f"cannot read {path}: {errors[0]}")
    else:
        try:
            root = zipfile.Path(path)
        except (zipfile.BadZipFile, OSError) as error:
            raise Error(f"{path} is not a folder, .zip, .npy or .npz: {error}") from error
        names = {name for name in root.root.namelist() if not name.endswith("/")}
    return sorted(name for name in names if "/." not in "/" + name.removeprefix("./")), root


def fingerprint(path, names):
    """Eight characters that change when a file changes its name, size or time."""
    files = [path / name for name in names] if path.is_dir() else [path]
    stats = [os.stat(file) for file in files]
    state = [str(path.resolve()), names, [(stat.st_size, stat.st_mtime_ns) for stat in stats]]
    return hashlib.sha256(repr(state).encode()).hexdigest()[:8]


def decode_all(names, root, size, cache):
    """Write the images, uint8 (size, size, 3) each, to the file `cache`. Returns the names of those
    that could be read, and the number of channels: 1 if all are grey, else 3."""
    kept, skipped, channels = [], [], 1
    with replacing(cache) as tmp, open(tmp, "wb") as file, ThreadPoolExecutor() as pool:
        decoded = pool.map(partial(decode_image, root, size=size), names)
        for name, (pixels, mode) in zip(names, tqdm(decoded, f"decoding into {cache}", len(names))):
            if pixels is None:
                skipped.append(f"{name}: {mode}")
                continue
            file.write(pixels.tobytes())
            kept.append(name)
            if mode not in ("1", "L", "LA", "La"):
                channels = 3
        report_skipped(skipped, len(names))
    return kept, channels


def decode_image(root, name, size=None):
    """An image as uint8 (H, W, 3), and its mode in Pillow's terms; or None and why it is not read.

    size: crop the largest centred square, and resize it; None = leave the image as it is
    """
    try:
        with (root / name).open("rb") as file, Image.open(file) as image:
            mode = image.mode
            if mode.startswith(("I", "F")):
                raise ValueError("more than 8 bits a channel, which Pillow would clip")
            if image.format == "EPS":
                raise ValueError("a program, which Ghostscript would run")
            if size:
                image.draft("RGB", (2 * size, 2 * size))  # decodes a large JPEG faster
            image = ImageOps.exif_transpose(image)
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = image.convert("RGB")
            if size:
                image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
            return np.array(image), mode
    except Exception as error:  # Pillow and zipfile raise many types on damaged files
        return None, error


def report_skipped(skipped, total):
    """Print what could not be read, and why. Raises Error if nothing could."""
    reasons = "; ".join(skipped[:5])
    if len(skipped) == total:
        raise Error(f"no readable image among {total} files. {reasons}")
    if skipped:
        print(f"skipped {len(skipped)} of {total} files: {reasons}", file=sys.stderr)


def folder_labels(names):
    """Class numbers (N,), by the names of the innermost folders. None if there are fewer than two
    names, or if files lie beside class folders."""
    folders = [PurePosixPath(name).parent for name in names]
    ancestors = {parent for folder in set(folders) for parent in folder.parents}
    classes = sorted({folder.name for folder in folders})
    if len(classes) < 2 or not ancestors.isdisjoint(folders):
        return None
    if all(name.isdecimal() for name in classes):
        classes.sort(key=int)
    print("classes:", ", ".join(f"{i} = {name}" for i, name in enumerate(classes)), file=sys.stderr)
    number = {name: i for i, name in enumerate(classes)}
    return np.array([number[folder.name] for folder in folders])


@contextmanager
def replacing(path):
    """A temporary name beside `path`. At the end it is renamed to `path`; on an error, removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".{os.getpid()}-{path.name}")  # another process may write the same file
    try:
        yield tmp
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)


# ---- arrays and named sets


def read_array(path):
    """A .npy, memory-mapped, or arr_0 of a .npz, as uint8 (N, H, W, C). C = 1 may be left out."""
    try:
        array = np.load(path, mmap_mode="c", allow_pickle=False)
        array = array if isinstance(array, np.ndarray) else array["arr_0"]
    except Exception as error:  # NumPy raises many types on damaged files
        raise Error(f"{path} is not a readable array: {error}") from error
    # (64, 64, 3) and (3, 64, 64) are one picture, and not 64 or 3 grey ones
    if array.ndim == 3 and array.shape[0] > 4 and array.shape[2] > 4:
        array = array[..., None]
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] not in (1, 3) or not array.size:
        raise Error(f"{path} is {array.dtype} {array.shape}: give uint8 (N, H, W, 1 or 3)")
    return array


def find_celeba(home):
    """The folder or .zip of CelebA's aligned images under `home`; downloads it if it is missing."""
    for path in (home / "img_align_celeba", home / "img_align_celeba.zip"):
        if path.exists():
            return path
    from torchvision.datasets.utils import download_url  # slow to import

    for url in CELEBA_URLS:
        try:
            with replacing(path) as tmp:
                download_url(url, str(home), tmp.name, CELEBA_MD5)
            return path
        except (OSError, RuntimeError) as error:  # no network, or another checksum
            reason = error
    raise Error(f"cannot download CelebA ({reason}): put img_align_celeba.zip into {home}, or try "
                "--data toy-faces")


def load_mnist(data_dir):
    """The 60,000 training digits, downloaded and read by torchvision."""
    from torchvision.datasets import MNIST

    try:
        digits = MNIST(str(data_dir), download=True)
    except Exception as error:  # no network, or damaged files
        raise Error(f"cannot read MNIST ({error}): put its four files into "
                    f"{data_dir / 'MNIST' / 'raw'}, or try --data toy-digits") from error
    return digits.data.numpy()[..., None], digits.targets.numpy()


def draw_toys(draw, size, limit):
    """A set that needs no download: 10,000 pictures by one of the functions below, or `limit`."""
    return np.stack([draw(number, size) for number in tqdm(range(limit or 10_000), "drawing")])


def draw_digit(number, size):
    """The digit number mod 10, at a random position, size and angle: uint8 (size, size, 1)."""
    rng = np.random.default_rng(number)
    x, y, font_size, angle, ink = rng.integers((26, 28, 42, -25, 150), (39, 37, 59, 26, 256))
    image = Image.new("L", (64, 64))
    font = ImageFont.load_default(font_size)
    ImageDraw.Draw(image).text((x, y), str(number % 10), int(ink), font, "mm", stroke_width=1)
    image = image.rotate(angle, Image.Resampling.BICUBIC)
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))[..., None]


def draw_face(number, size):
    """A cartoon face of random shape and colours: uint8 (size, size, 3)."""
    rng = np.random.default_rng(number)
    hue, skin, light = rng.integers((0, 40, 10), (360, 80, 60))
    w, h, gap = rng.uniform((0.2, 0.28, 0.09), (0.3, 0.36, 0.13))
    hair = f"hsl(35, 50%, {light}%)"
    ellipses = [  # x, y, radius in x and y, colour; (0, 0) is the middle, 1 the picture's side
        (0, 0.6, 0.42, 0.28, f"hsl({360 - hue}, 50%, {100 - light}%)"),
        (0, -0.05, w + 0.06, h + 0.06, hair),
        (0, 0, w, h, f"hsl(25, 50%, {skin}%)"),
        (0, 0.16, 0.09, 0.03, "brown"),
    ]
    for x in (-gap, gap):
        ellipses += [(x, -0.05, 0.06, 0.045, "white"), (x, -0.05, 0.03, 0.03, "navy")]
    image = Image.new("RGB", (4 * size, 4 * size), f"hsl({hue}, 50%, {skin}%)")
    pen = ImageDraw.Draw(image)
    for x, y, rx, ry, colour in ellipses:
        box = np.array((x - rx, y - ry, x + rx, y + ry)) + 0.5
        pen.ellipse((4 * size * box).tolist(), colour)
    return np.asarray(image.reduce(4))  # drawn at four times the size, for smooth edges


# ---- batches


class Batches:
    """x, y = batches(i): batch i = 0, 1, ... of endless epochs; (seed, i) alone decides it.

    x: float (B, C, H, W) in [-1, 1]; y: int64 (B,), or None without labels; both on the device
    Each epoch, of len(batches) batches, has its own order and drops its last partial batch. If the
    set is smaller than a batch, a batch is the whole set.
    flip: mirror half of each batch
    rank, world: each batch is divided into `world` equal parts; return part number `rank`
    """

    def __init__(self, images, labels, batch_size, seed=0, flip=False, device="cpu",
                 memory_format=torch.contiguous_format, rank=0, world=1):
        self.size = min(batch_size, len(images))
        if self.size < 1 or self.size % world:
            raise Error(f"batches of {self.size} images: give 1 or more, a multiple of {world}")
        on_cuda = torch.device(device).type == "cuda"
        if on_cuda and images.nbytes < torch.cuda.mem_get_info(device)[0] / 2:
            images = images.to(device)  # the whole set: then a step copies nothing to the GPU
        self.pin = on_cuda and images.is_cpu  # a batch is copied while the GPU works
        self.rows = images.permute(0, 2, 3, 1)  # (N, H, W, C), as load() keeps them
        self.labels = None if labels is None else labels.to(images.device)
        self.seed, self.flip, self.rank, self.world = seed, flip, rank, world
        self.device, self.memory_format = device, memory_format
        self.epoch = None

    def __len__(self):
        return len(self.rows) // self.size

    def __call__(self, i):
        epoch, position = divmod(i, len(self))
        if epoch != self.epoch:
            generator = torch.Generator().manual_seed(self.seed * 10**7 + epoch)
            order = torch.randperm(len(self.rows), generator=generator)  # the same on all devices
            self.order, self.epoch = order.to(self.rows.device), epoch
        share = self.size // self.world
        first = position * self.size + self.rank * share
        chosen = self.order[first:first + share]
        x = self.to_device(self.rows.index_select(0, chosen))
        y = None if self.labels is None else self.to_device(self.labels[chosen])
        x = x.permute(0, 3, 1, 2).float().div_(127.5).sub_(1)
        if self.flip:
            half = (len(x) + i % 2) // 2  # of an odd number, one more in every second batch
            x[:half] = x[:half].flip(3)
        return x.contiguous(memory_format=self.memory_format), y

    def to_device(self, batch):
        batch = batch.pin_memory() if self.pin else batch
        return batch.to(self.device, non_blocking=self.pin)


# ---- files


def save_samples(batches, num, out, columns=8):
    """Write `num` images, given in uint8 batches, to out/generated/000000.png, ..., in place of
    older ones, and a grid of the first batch to out/generated.png."""
    folder = out / "generated"
    for file in folder.glob("[0-9]" * 6 + ".png"):
        file.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    first = 0
    with tqdm(total=num, unit="image") as bar:
        for images in batches:
            for number, image in enumerate(images, first):
                save_image(image, folder / f"{number:06}.png")
            if first == 0:
                save_grid(images, out / "generated.png", columns)
            first += len(images)
            bar.update(len(images))
    print(f"wrote {num} images into {folder}")


def save_grid(images, path, columns=8):
    """Write uint8 images (N, C, H, W) as one picture, in full rows. columns=1 means 8."""
    from torchvision.utils import make_grid

    columns = columns if columns > 1 else 8  # callers give the number of their labels
    rows = max(1, len(images) // columns)
    save_image(make_grid(images[:rows * columns], columns), path)


def save_image(image, path):
    """Write one uint8 image (C, H, W)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image.cpu().permute(1, 2, 0).squeeze(2).numpy()).save(path)


def save_table(rows, path):
    """Write a list of dicts with the same keys as .csv. None is an empty field."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def save_curves(rows, path):
    """Plot the columns of the log, apart from epoch and time, over steps."""
    from matplotlib.figure import Figure  # not pyplot: no window, no global state

    if not rows:
        return
    figure = Figure(layout="tight")
    ax = figure.subplots()
    for name in list(rows[0])[3:]:
        ax.plot([row["step"] for row in rows], [row[name] for row in rows], label=name)
    ax.set(xlabel="step", yscale="log")
    figure.legend()
    figure.savefig(path)


def save_histograms(path, **panels):
    """Plot distributions. Panels: title=(tensor of real images, tensor of generated ones)."""
    from matplotlib.figure import Figure

    path.parent.mkdir(exist_ok=True)
    figure = Figure((5 * len(panels), 3.2), layout="tight")
    for ax, (title, tensors) in zip(figure.subplots(1, len(panels)), panels.items()):
        values = [x.detach().float().flatten().cpu() for x in tensors]
        ax.hist(values, bins=30, density=True, histtype="step", label=["real", "generated"])
        ax.set(title=title, xlabel="value", ylabel="density")
        ax.legend()
    figure.savefig(path)
