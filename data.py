"""Image sets in, batches and picture files out: what the scripts share that is not about a model.

    images, labels = load("celeba", 64)        # uint8 (N, 3, 64, 64), memory-mapped; None
    get_batch = Batches(images, labels, 128)
    x, y = get_batch(step=0)                   # float (128, 3, 64, 64) in [-1, 1]; None

A set is decoded once into a uint8 array (N, H, W, C) under data_dir and memory-mapped: no worker
processes, and memory does not grow with the set. Mistakes of users raise ValueError or OSError."""
import csv
import glob
import hashlib
import importlib.util
import io
import json
import os
import re
import signal
import sys
import time
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

CELEBA_URL = "https://s3-us-west-1.amazonaws.com/udacity-dlnfd/datasets/celeba.zip"
CELEBA_MD5 = "00d2c5bc6d35e252742224ab0c1e8fcb"
TOY_COUNT = 10_000  # images in a toy set


# ---- load: any source -> one uint8 array


def load(name, size, data_dir="data", limit=0):
    """Images, uint8 (N, C, size, size), and labels, int64 (N,), or None if there are none.

    name: celeba, mnist, toy-faces or toy-digits, or the path of a folder, .zip, .npy or .npz
    size: images are cropped to the largest centred square, then resized to size x size pixels
    limit: only the first `limit` images; 0 = all
    """
    from torchvision.transforms.v2.functional import center_crop, resize  # slow to import

    data_dir = Path(data_dir)
    path = Path(name).expanduser()
    if name == "celeba":
        source = find_celeba(data_dir / "celeba")
        array, labels = load_files(source, name, size, data_dir)
    elif name == "mnist":
        array, labels = load_mnist(data_dir)
    elif name in ("toy-faces", "toy-digits"):
        array, labels = draw_toys(name, size, limit or TOY_COUNT)
    elif not path.exists():
        raise ValueError(f"no data {name}: give celeba, mnist, toy-faces, toy-digits or a path")
    elif path.suffix.lower() in (".npy", ".npz"):
        array, labels = read_array(path), None
    else:
        array, labels = load_files(path, path.stem, size, data_dir)
    images = torch.from_numpy(array)[:limit or None].permute(0, 3, 1, 2)
    if images.shape[2:] != (size, size):  # mnist, or an array of another size
        images = center_crop(images, min(images.shape[2:]))
        images = resize(images, [size, size])
    if labels is not None:
        labels = torch.from_numpy(labels)[:limit or None]
    return images, labels


@contextmanager
def replacing(path):
    """The name of a file to write beside `path`. It is renamed to `path` if all goes well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".{os.getpid()}-{path.name}")  # another run may write the same file
    try:
        yield tmp
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)


def cached(path, items, decode):
    """The array (N, H, W, C) of decode(item) for all items, memory-mapped, and a list of the items.
    It is made once, as the file `path`. Items that decode() returns None for are left out."""
    list_path = path.with_suffix(".json")
    if not path.exists():
        print(f"preparing {path} (once)", file=sys.stderr)
        kept = []
        with replacing(path) as tmp, ThreadPoolExecutor() as pool:
            for item, pixels in zip(items, pool.map(decode, items)):
                if pixels is None:
                    continue
                if not kept:
                    shape = (len(items), *pixels.shape)
                    array = np.lib.format.open_memmap(tmp, "w+", np.uint8, shape)
                array[len(kept)] = pixels
                kept.append(item)
            report_skipped(sorted(set(items) - set(kept)), len(items))
            if len(kept) < len(items):
                with replacing(tmp) as shorter:
                    np.save(shorter, array[:len(kept)])
            with replacing(list_path) as list_tmp:  # in place before the array is
                list_tmp.write_text(json.dumps(kept))
    array = np.load(path, mmap_mode="c")  # c: torch asks for a writable array
    return array, json.loads(list_path.read_text())


def report_skipped(skipped, total):
    """Name the files that could not be read, on stderr. ValueError if no other file is left."""
    if len(skipped) == total:
        raise ValueError("the data has no readable image")
    if skipped:
        names = ", ".join(skipped[:5])
        print(f"skipped {len(skipped)} of {total} files, unreadable: {names}", file=sys.stderr)


# ---- files and arrays


def load_files(path, name, size, data_dir):
    """The images of a folder, searched recursively, or of a .zip. Class sub-folders are labels."""
    names, open_file = list_files(path)
    cache = data_dir / f"{name}{size}-{fingerprint(path, names)}.npy"
    grey = not cache.exists() and all(is_grey(open_file, file) for file in names)

    def decode(file):
        try:
            image = read_image(open_file(file), "L" if grey else "RGB", size)
        except Exception:  # a damaged file makes Pillow raise nearly anything
            return None
        image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
        return np.asarray(image).reshape(size, size, -1)

    array, names = cached(cache, names, decode)
    return array, folder_labels(names)


def list_files(path):
    """The names of all files in a folder or .zip, and a function from a name to its path or file.
    Hidden files are left out. A .zip is read in memory: it does not matter where its paths lead."""
    if path.is_dir():
        names = glob.glob("**", root_dir=path, recursive=True)
        names = [name for name in names if (path / name).is_file()]
        return sorted(names), lambda name: path / name
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise ValueError(f"{path} is not a folder, a whole .zip, a .npy or a .npz") from error
    names = [name for name in archive.namelist() if not re.search(r"/$|^\.|/\.", name)]
    return sorted(names), lambda name: io.BytesIO(archive.read(name))


def fingerprint(path, names):
    """Eight characters that change when a file changes its name, size or time."""
    states = [path.resolve(), *names]
    for file in [path / name for name in names] if path.is_dir() else [path]:
        stat = file.stat()
        states += [stat.st_size, stat.st_mtime_ns]
    return hashlib.sha256(repr(states).encode()).hexdigest()[:8]


def read_image(file, mode="RGB", size=None):
    """An image file -> an upright Pillow image. ValueError on 16-bit images.
    size: a large JPEG may be read at a fraction of its size, if that is at least 2 * size."""
    image = Image.open(file)
    if image.mode.startswith(("I", "F")):
        raise ValueError("16-bit images are not read: Pillow would clip them")
    if size:
        image.draft(mode, (2 * size, 2 * size))
    return ImageOps.exif_transpose(image).convert(mode)


def is_grey(open_file, name):
    """Whether an image file has no colour, or cannot be read."""
    try:
        return Image.open(open_file(name)).mode in ("1", "L", "LA", "I", "I;16", "F")
    except Exception:  # read_image() will raise it again
        return True


def folder_labels(names):
    """Class numbers in the order of folder names, if every file is in a class folder; else None."""
    folders = [Path(name).parts[:-1] for name in names]
    depth = len(os.path.commonprefix(folders))  # a folder around all files is not a class
    folders = ["".join(folder[depth:depth + 1]) for folder in folders]
    classes, labels = np.unique(folders, return_inverse=True)
    return labels if len(classes) > 1 and "" not in classes else None


def read_array(path):
    """A .npy, memory-mapped, or arr_0 of a .npz: uint8 (N, H, W, C), or (N, H, W) with C = 1."""
    try:
        array = np.load(path, mmap_mode="c", allow_pickle=False)
        array = array if isinstance(array, np.ndarray) else array["arr_0"]
    except Exception as error:  # a damaged file makes NumPy raise nearly anything
        raise ValueError(f"{path} is not a readable array: {error}") from error
    array = array[..., None] if array.ndim == 3 else array
    if array.dtype != np.uint8 or array.shape[3:] not in ((1,), (3,)) or not array.size:
        raise ValueError(f"{path} is {array.dtype} {array.shape}: give uint8 (N, H, W, 1 or 3)")
    return array


def find_celeba(home):
    """The folder or .zip of CelebA under `home`; it is downloaded if there is neither."""
    for path in (home / "img_align_celeba", home / "img_align_celeba.zip"):
        if path.exists():
            return path
    from torchvision.datasets.utils import download_url  # slow to import

    with replacing(path) as tmp:
        try:
            download_url(CELEBA_URL, str(home), tmp.name, CELEBA_MD5)
        except (OSError, RuntimeError) as error:  # no network, or another checksum
            raise OSError(f"cannot download CelebA ({error}): put img_align_celeba.zip into "
                          f"{home}, or try --data toy-faces") from error
    return path


def load_mnist(data_dir):
    """The 60,000 training digits, downloaded and read by torchvision."""
    from torchvision.datasets import MNIST

    try:
        digits = MNIST(str(data_dir), download=True)
    except (OSError, RuntimeError, ValueError, AssertionError) as error:  # offline, or damaged
        raise OSError(f"cannot get MNIST: put its four files into {data_dir / 'MNIST' / 'raw'}, or "
                      "try --data toy-digits") from error
    return digits.data.numpy()[..., None], digits.targets.numpy()


def draw_toys(name, size, count):
    """A set that needs no download: drawn faces, or digits, of which number i shows i mod 10."""
    if name == "toy-faces":
        return np.stack([draw_face(i, size) for i in range(count)]), None
    return np.stack([draw_digit(i, size) for i in range(count)]), np.arange(count) % 10


def draw_digit(number, size):
    """The digit number mod 10, of random place, form and brightness: uint8 (size, size, 1)."""
    rng = np.random.default_rng(number)
    image = Image.new("L", (64, 64))
    font = ImageFont.load_default(48)
    ink = int(rng.integers(150, 256))
    pen = ImageDraw.Draw(image)
    pen.text((32, 32), str(number % 10), ink, font, anchor="mm", stroke_width=1)
    # pixel p of the result shows point matrix @ p + shift: turned, sheared and scaled
    matrix = (np.eye(2) + rng.uniform(-0.25, 0.25, (2, 2))) * 52 / size
    shift = 32 - matrix @ rng.uniform(0.45 * size, 0.55 * size, 2)
    affine = np.column_stack([matrix, shift]).flatten()
    image = image.transform(
        (size, size), Image.Transform.AFFINE, affine, Image.Resampling.BICUBIC)
    return np.asarray(image)[..., None]


def draw_face(number, size):
    """A cartoon face of random shape and colours: uint8 (size, size, 3)."""
    rng = np.random.default_rng(number)
    hue, dull, light, tone = rng.integers((0, 20, 25, 35), (360, 70, 75, 80))
    wall = f"hsl({hue}, {dull}%, {light}%)"
    shirt = f"hsl({360 - hue}, {dull}%, {90 - light}%)"
    skin = f"hsl(25, {dull}%, {tone}%)"
    hair = f"hsl(35, {dull}%, {100 - light}%)"
    w = rng.uniform(0.2, 0.28)
    h = rng.uniform(0.29, 0.35)
    gap = rng.uniform(0.09, 0.12)
    long = rng.uniform(0, 0.4)
    ellipses = [  # x, y, radius in x and y, colour; (0, 0) is the middle, 1 the picture's side
        (0, 0.58, 0.42, 0.28, shirt),
        (0, long, w + 0.07, h * 0.8, hair),
        (0, -0.05, w + 0.06, h + 0.06, hair),
        (0, 0, w, h, skin),
        (0, 0.16, 0.09, 0.03, "brown"),
    ]
    for x in (-gap, gap):
        ellipses.append((x, -0.05, 0.06, 0.045, "white"))
        ellipses.append((x, -0.05, 0.03, 0.03, "navy"))
    image = Image.new("RGB", (4 * size, 4 * size), wall)
    pen = ImageDraw.Draw(image)
    for x, y, rx, ry, colour in ellipses:
        box = np.array((x - rx, y - ry, x + rx, y + ry)) + 0.5
        pen.ellipse((4 * size * box).tolist(), colour)
    pixels = np.asarray(image.reduce(4))  # drawn at four times the size, for smooth edges
    shadow = np.linspace(*rng.uniform(0.6, 1.2, 2), size)[:, None]
    return (pixels * shadow).clip(0, 255).astype(np.uint8)


# ---- batches


class Batches:
    """x, y = get_batch(step): the batch of any step, which depends on (seed, step) alone.
    x: float (B, C, H, W) in [-1, 1]; y: int64 (B,), or None without labels; both on the device

    An epoch, len(get_batch) steps, has an order of its own and drops its last partial batch; a set
    smaller than a batch is one short batch. flip: mirror half of each batch."""

    def __init__(self, images, labels, batch_size, seed=0, flip=False, device="cpu",
                 memory_format=torch.channels_last):
        on_cuda = torch.device(device).type == "cuda"
        if on_cuda and images.nbytes < torch.cuda.mem_get_info(device)[0] / 2:
            images = images.to(device)  # the whole set, as uint8: no copies in a step
        self.pin = on_cuda and images.is_cpu  # else a batch is copied while the GPU works
        self.rows = images.permute(0, 2, 3, 1)  # as load() stores them: an image is contiguous
        self.labels = None if labels is None else labels.to(images.device)
        self.size = min(batch_size, len(images))
        self.seed, self.flip = seed, flip
        self.device, self.memory_format = device, memory_format
        self.epoch = None

    def __len__(self):
        return len(self.rows) // self.size

    def __call__(self, step):
        epoch, i = divmod(step, len(self))
        if epoch != self.epoch:
            generator = torch.Generator().manual_seed(self.seed * 10**7 + epoch)
            order = torch.randperm(len(self.rows), generator=generator)  # the same on all devices
            self.order, self.epoch = order.to(self.rows.device), epoch
        chosen = self.order[i * self.size:(i + 1) * self.size]
        x = self.to_device(self.rows.index_select(0, chosen))
        y = None
        if self.labels is not None:
            y = self.to_device(self.labels[chosen])
        x = x.permute(0, 3, 1, 2).float().div_(127.5).sub_(1)
        if self.flip:
            half = (len(x) + step % 2) // 2  # in turn more and less than half, if len(x) is odd
            x[:half] = x[:half].flip(3)
        return x.contiguous(memory_format=self.memory_format), y

    def to_device(self, batch):
        batch = batch.pin_memory() if self.pin else batch
        return batch.to(self.device, non_blocking=self.pin)


# ---- picture files


def to_uint8(x):
    """Images in [-1, 1] -> uint8, the inverse of what Batches does."""
    x = (x.float() + 1) * 127.5
    return x.round().clamp(0, 255).byte()


def remove_images(folder):
    """Remove what save_images() wrote, and nothing else."""
    for file in folder.glob("[0-9]" * 6 + ".png"):
        file.unlink()


def save_images(images, folder, first):
    """Write uint8 images (N, C, H, W) as 000000.png and so on; the first has the number `first`."""
    for number, image in enumerate(images, first):
        save_image(image, folder / f"{number:06}.png")


def save_grid(images, path, columns=8):
    """Write uint8 images (N, C, H, W) as one picture, row by row."""
    from torchvision.utils import make_grid

    save_image(make_grid(images, columns), path)


def save_image(image, path):
    """Write one uint8 image (C, H, W)."""
    pixels = image.cpu().permute(1, 2, 0).squeeze(2).numpy()
    with replacing(path) as tmp:
        Image.fromarray(pixels).save(tmp)


def save_gif(folder, path):
    """An animation of epoch_0001.png and so on; of many files, every second, third, ..."""
    files = sorted(folder.glob("epoch_*.png"))
    frames = [Image.open(file) for file in files[::len(files) // 60 + 1]]
    with replacing(path) as tmp:
        frames[0].save(tmp, save_all=True, append_images=frames[1:], duration=150)


def save_plot(path, xlabel, yscale="linear", **panels):
    """Curves in panels side by side: title=dict(label=(x values, y values), ...)."""
    try:
        from matplotlib.figure import Figure  # not pyplot: no window, no global state
    except ImportError:
        warnings.warn("no plots are drawn: matplotlib is not installed")  # shown once
        return
    figure = Figure(figsize=(5 * len(panels), 3.2), layout="tight")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for ax, (title, curves) in zip(axes, panels.items()):
        for label, (x, y) in curves.items():
            ax.plot(x, y, label=label)
        ax.set(title=title, xlabel=xlabel, yscale=yscale)
        ax.legend()
    with replacing(path) as tmp:
        figure.savefig(tmp)


def density(values, low):
    """The distribution of values between low and 1, as x and y for save_plot()."""
    y, edges = np.histogram(values.float().cpu(), 30, (low, 1), density=True)
    return edges[:-1], y


# ---- a run: its log, its checkpoints, its end


class Log:
    """The rows of log.csv, which are also printed, and kept in the checkpoint.
    names: of the values that write() takes; step, rows: of the run so far, when it is resumed."""

    def __init__(self, path, names, step, rows):
        self.path, self.names, self.rows = path, names, rows
        self.columns = ["step", "epoch", "seconds", "images_per_s", *names]
        self.last_step, self.last_time = step, time.perf_counter()
        self.seconds = rows[-1][2] if rows else 0.0  # not counting the time between two sittings

    def write(self, step, total, epoch, batch_size, values, note=""):
        now = time.perf_counter()
        passed = now - self.last_time
        rate = (step - self.last_step) * batch_size / passed
        self.seconds += passed
        self.last_step, self.last_time = step, now
        values = [round(value, 6) for value in values]
        self.rows.append([step, epoch, round(self.seconds, 1), round(rate, 2), *values])
        with replacing(self.path) as tmp:
            with open(tmp, "w", newline="") as file:
                csv.writer(file).writerows([self.columns, *self.rows])
        shown = "  ".join(f"{name} {value:.3f}" for name, value in zip(self.names, values))
        print(f"epoch {epoch}  step {step}/{total}  {shown}  {rate:.0f} images/s{note}", flush=True)

    def curves(self, *names):
        """Columns over steps, for save_plot()."""
        columns = dict(zip(self.columns, zip(*self.rows)))
        return {name: (columns["step"], columns[name]) for name in names}


def restore(parts, ckpt):
    """Load state dicts into networks and optimizers. Flags given now win over old settings."""
    try:
        for name, part in parts.items():
            part.load_state_dict(ckpt[name])
    except (KeyError, RuntimeError, ValueError) as error:
        raise ValueError("the checkpoint does not fit these networks: leave out flags that change "
                         "them, or train anew with another --out_dir") from error
    for opt in parts.values():
        if isinstance(opt, torch.optim.Optimizer):
            opt.param_groups[0].update(opt.defaults)
            for weight, state in opt.state.items():
                for key, value in state.items():  # fused Adam needs them laid out as the weight
                    if value.shape == weight.shape:
                        state[key] = torch.empty_like(weight).copy_(value)


def catch_signals():
    """A list that fills when Ctrl-C or SIGTERM asks the run to stop. A second one ends it."""
    stop = []

    def note(number, frame):
        stop.append(number)
        set_handlers(signal.SIG_DFL)
        os.write(1, b"stopping after this step; Ctrl-C again ends the run at once\n")

    set_handlers(note)
    return stop


def set_handlers(handler):
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


# ---- the device


def pick_device(name="auto", dtype="auto", compiled=False):
    """--device, --dtype and --compile -> a torch.device, and whether to use bfloat16 and compile.
    auto: the first of cuda, mps and cpu that there is; bfloat16 on CUDA of capability 8.0 up."""
    if dtype not in ("auto", "bfloat16", "float32"):
        raise ValueError(f"--dtype {dtype}: give bfloat16, float32 or auto")
    if name == "auto":
        name = "cpu"
        if torch.cuda.is_available():
            name = "cuda"
        elif torch.backends.mps.is_available() and "RANK" not in os.environ:
            name = "mps"  # not under torchrun: gloo, by which processes talk, does not know it
    try:
        device = torch.device(name)
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))  # set by torchrun
            torch.backends.cudnn.benchmark = True  # shapes do not change from step to step
            torch.set_float32_matmul_precision("high")
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} does not work: {error}") from error
    if device.type != "cuda":
        return device, dtype == "bfloat16", False
    if compiled and not importlib.util.find_spec("triton"):
        warnings.warn("torch.compile is off: Triton is not installed")
        compiled = False
    capable = torch.cuda.get_device_capability() >= (8, 0)
    return device, dtype == "bfloat16" or dtype == "auto" and capable, compiled
