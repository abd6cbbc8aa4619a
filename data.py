"""Images in, batches and picture files out: what the scripts share that is not about a model.

    images, labels = load("celeba", 64)        # uint8 (N, 3, 64, 64), memory-mapped; None
    for x, y in batches(images, labels, 128, seed=0, epoch=0):
        ...                                    # x: float (128, 3, 64, 64) in [-1, 1]

A set is decoded once, into a plain uint8 array (N, H, W, C) under data_dir, and mapped into memory
from then on. An epoch is a random permutation of its rows: nothing is decoded, no worker runs, and
memory does not grow with the set. A tensor of your own serves batches() as well as load()'s.

A user's mistake raises ValueError or OSError with a message that says what to do.
"""
import csv
import functools
import hashlib
import importlib.util
import inspect
import io
import itertools
import json
import os
import signal
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

CELEBA = "https://s3-us-west-1.amazonaws.com/udacity-dlnfd/datasets/celeba.zip"  # a public mirror
CELEBA_MD5 = "00d2c5bc6d35e252742224ab0c1e8fcb"  # of the official img_align_celeba.zip
TOYS = 10_000                                    # images in a toy set
BIGGEST = 2**28                                  # bytes; a larger file in a .zip is a bomb
GREY = ("1", "L", "LA", "I", "I;16", "F")        # Pillow's modes without colour


# ---- load: any source -> one uint8 array


def load(name, size, data_dir="data", limit=0, device="cpu"):
    """All images of a set, and their labels.

    name: celeba, mnist, toy-faces, toy-digits, or the path of a folder, .zip, .npy or .npz
    size: pixels a side; images are cropped to a square at the centre, then resized
    limit: the first so many images only; 0 = all
    device: on CUDA the images go there as a whole, if they take up less than half of what is free
    Returns images, uint8 (N, C, size, size), and labels, int64 (N,), or None if there are none.
    """
    data_dir, path = Path(data_dir), Path(name).expanduser()
    if name == "mnist":
        array, labels = load_mnist(size, data_dir)
    elif name == "celeba":
        array, labels = load_celeba(size, data_dir)
    elif name in ("toy-faces", "toy-digits"):
        draw = draw_faces if name == "toy-faces" else draw_digits
        code = hashlib.sha256(inspect.getsource(draw).encode()).hexdigest()
        array, labels = cached(data_dir / f"{name}{size}.npy", dict(size=size, n=TOYS, code=code),
                               lambda tmp: save_drawn(tmp, draw, size))
    elif not path.exists():
        raise ValueError(f"no data {name}: give celeba, mnist, toy-faces, toy-digits or a path")
    elif path.suffix.lower() in (".npy", ".npz"):
        array, labels = load_array(path, size, own_cache(path, size, data_dir))
    else:
        array, labels = load_files(path, size, own_cache(path, size, data_dir))
    limit = limit or len(array)
    images = torch.from_numpy(array[:limit]).permute(0, 3, 1, 2)
    labels = None if labels is None else torch.tensor(labels[:limit])
    if torch.device(device).type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        images = images.to(device) if images.nbytes < free / 2 else images
    return images, labels


def cached(path, made_from, make):
    """The array at `path`, memory-mapped, and its labels, which lie in a .json beside it.

    make(tmp) writes the array and returns labels and unreadable files. It is called only if there
    is no such array yet, or the one there was made from something else.
    """
    beside = path.with_suffix(".json")
    try:
        notes = json.loads(beside.read_text("utf-8"))
        if notes["made_from"] == made_from:
            return np.load(path, mmap_mode="c"), notes["labels"]  # c: torch wants it writable
    except (OSError, ValueError, KeyError, EOFError):
        pass  # not there, or not whole: make it
    print(f"preparing {path} (once)", file=sys.stderr)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as tmp:
        labels, unreadable = make(tmp)
    with replacing(beside) as tmp:
        notes = dict(made_from=made_from, labels=labels, unreadable=unreadable)
        tmp.write_text(json.dumps(notes), "utf-8")
    return np.load(path, mmap_mode="c"), labels


@contextmanager
def replacing(path):
    """The name of a file to write beside `path`; it takes that place only when all went well."""
    tmp = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield tmp
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)


def own_cache(path, size, data_dir):
    """Where images of one's own are cached: folders of the same name do not meet."""
    path = path.resolve()
    return data_dir / f"{path.stem}-{hashlib.sha256(str(path).encode()).hexdigest()[:8]}-{size}.npy"


def load_celeba(size, data_dir):
    """CelebA as torchvision or Kaggle lay it out under data_dir/celeba, or from the mirror."""
    cache, home = data_dir / f"celeba{size}.npy", data_dir / "celeba"
    found = [p for p in (home / "img_align_celeba", home / "img_align_celeba.zip") if p.exists()]
    if not found and cache.exists():
        return read_array(cache), None  # a cache that was brought here without its source
    if not found:
        from torchvision.datasets.utils import check_md5  # slow to import: only where it is used

        found = [home / "img_align_celeba.zip"]
        home.mkdir(parents=True, exist_ok=True)
        with replacing(found[0]) as tmp:
            advice = f"put img_align_celeba.zip into {home}, or try --data toy-faces"
            try:
                torch.hub.download_url_to_file(CELEBA, str(tmp))
            except OSError as error:
                raise OSError(f"cannot download CelebA ({error}): {advice}") from error
            if not check_md5(str(tmp), CELEBA_MD5):
                raise OSError(f"the download of CelebA is damaged: try again, or {advice}")
    return load_files(found[0], size, cache, (".jpg", ".jpeg", ".png"))


def load_mnist(size, data_dir):
    """The 60,000 training digits, read by torchvision, which fetches them if need be."""
    from torchvision.datasets import MNIST

    try:
        digits = MNIST(str(data_dir), download=True)
    except (RuntimeError, ValueError, AssertionError) as error:  # no network, or damaged files
        raise OSError(f"cannot get MNIST ({error}): put its files anew into "
                      f"{data_dir / 'MNIST' / 'raw'}, or try --data toy-digits") from error
    array, labels = digits.data.numpy()[..., None], digits.targets.tolist()
    if size == array.shape[1]:
        return array, labels
    return cached(data_dir / f"mnist{size}.npy", dict(size=size, n=len(array)),
                  lambda tmp: save_resized(tmp, array, size, labels))


def read_array(path):
    """A .npy, memory-mapped, or arr_0 of a .npz: uint8 (N, H, W, C), or (N, H, W) with C = 1."""
    try:
        array = np.load(path, mmap_mode="c", allow_pickle=False)
        if not isinstance(array, np.ndarray):
            array = array["arr_0" if "arr_0" in array else array.files[0]]
    except (OSError, ValueError, LookupError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is no array that can be read") from error
    array = array[..., None] if array.ndim == 3 else array
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] not in (1, 3) or not array.size:
        raise ValueError(f"{path} is {array.dtype} {array.shape}: give uint8 (N, H, W, 1 or 3)")
    return array


def load_array(path, size, cache):
    """A .npy or .npz of images."""
    array = read_array(path)
    if array.shape[1:3] == (size, size):
        return array, None
    return cached(cache, dict(stamp(path), size=size), lambda tmp: save_resized(tmp, array, size))


def load_files(path, size, cache, suffixes=()):
    """The images of a folder, searched recursively, or of a .zip."""
    made_from = dict(stamp(path), size=size, crop="centre")
    return cached(cache, made_from,
                  lambda tmp: save_decoded(tmp, path, size, suffixes, made_from["bytes"]))


def stamp(path):
    """What tells the states of a file or folder apart: names, sizes and times of its files."""
    files = walk(path) if path.is_dir() else [path]
    states = [(str(f.relative_to(path)), os.stat(f)) for f in files]
    digest = hashlib.sha256(repr([(n, s.st_size, s.st_mtime_ns) for n, s in states]).encode())
    return dict(source=str(path.resolve()), files=len(files), state=digest.hexdigest(),
                bytes=sum(s.st_size for _, s in states))


def walk(folder):
    """All files below a folder, hidden ones and links to nothing aside, in the order of names."""
    files = (Path(top, f) for top, _, names in os.walk(folder, followlinks=True) for f in names)
    return sorted(f for f in files if not is_hidden(f.relative_to(folder)) and f.exists())


def is_hidden(path):
    """.DS_Store, .ipynb_checkpoints/a.png, __MACOSX/a.png and the like."""
    return any(part.startswith(".") and part != ".." or part == "__MACOSX" for part in path.parts)


def listing(path):
    """The names of all files in a folder or .zip, in order, and a function: name -> its bytes."""
    if path.is_dir():
        names = [f.relative_to(path).as_posix() for f in walk(path)]
        return names, lambda name: (path / name).read_bytes()
    try:
        archive = zipfile.ZipFile(path)  # read in memory: it does not matter where its paths point
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is no folder, whole .zip, .npy or .npz") from error
    sizes = {i.filename: i.file_size for i in archive.infolist() if not i.is_dir()}
    names = sorted(n for n in sizes if not is_hidden(Path(n)))
    return names, lambda name: archive.read(name) if sizes[name] <= BIGGEST else b""


def say_unreadable(path, unreadable, total):
    """Name the files that were skipped, on stderr."""
    if unreadable:
        print(f"{path}: skipped {len(unreadable)} of {total} files as unreadable:",
              ", ".join(unreadable[:5]) + ", ..." * (len(unreadable) > 5), file=sys.stderr)
    if len(unreadable) == total:
        raise ValueError(f"no readable image in {path}")


def save_decoded(tmp, path, size, suffixes, total_bytes):
    """Decode a folder or .zip into the array file `tmp`; returns labels and unreadable files."""
    names, read = listing(path)
    names = [n for n in names if not suffixes or n.lower().endswith(suffixes)]

    def is_grey(name):
        try:
            return Image.open(io.BytesIO(read(name))).mode in GREY
        except Exception:  # Pillow raises nearly anything; pixels() will name the file
            return True

    def pixels(some):
        rows = []
        for name in some:
            try:
                rows.append(decode(read(name), size, mode))
            except Exception as error:  # a damaged file makes Pillow raise nearly anything
                rows.append(f"{name} ({type(error).__name__})")
        return rows

    mode = "L" if all(map(is_grey, names)) else "RGB"  # the first colour image ends the search
    kept, unreadable = [], []
    with open(tmp, "wb") as file, ThreadPoolExecutor(os.cpu_count()) as pool:
        # files of a few kB decode faster in one loop than threads take turns at Python's lock
        run = pool.map if total_bytes > 4096 * len(names) else map
        write_header(file, (len(names), size, size, len(mode)))
        for start in range(0, len(names), 1024):
            some = names[start:start + 1024]
            rows = itertools.chain(*run(pixels, [some[i:i + 32] for i in range(0, len(some), 32)]))
            for name, row in zip(some, rows):
                if isinstance(row, str):
                    unreadable.append(row)
                else:
                    kept.append(name)
                    file.write(row.tobytes())
        say_unreadable(path, unreadable, len(names))
        file.seek(0)
        write_header(file, (len(kept), size, size, len(mode)))
    return folder_labels(kept), unreadable


def write_header(file, shape):
    """The .npy header of a uint8 array; NumPy pads it, so one of another length fits its place."""
    header = dict(descr="|u1", fortran_order=False, shape=shape)
    np.lib.format.write_array_header_1_0(file, header)


def folder_labels(names):
    """A label for each file if folders sort them into classes, in the order of names; else None."""
    parents = [name.split("/")[:-1] for name in names]
    depth = len(os.path.commonprefix(parents))  # a folder around all files is no class
    folders = ["".join(parent[depth:depth + 1]) for parent in parents]
    classes = sorted(set(folders))
    return [classes.index(f) for f in folders] if len(classes) > 1 and "" not in classes else None


def decode(encoded, size, mode):
    """The bytes of an image file -> uint8 (size, size, channels): upright, square, antialiased."""
    image = Image.open(io.BytesIO(encoded))
    image.draft(mode, (2 * size, 2 * size))  # a large JPEG is read at a fraction of its size
    image = ImageOps.exif_transpose(image)
    image = to_8_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return resize(image.convert(mode), size)


def to_8_bits(image):
    """Scale grey levels of 16 bits to 8; Pillow's own conversion would clip them."""
    if not image.mode.startswith("I"):
        return image
    return Image.fromarray((np.asarray(image) / 257).clip(0, 255).astype(np.uint8))


def resize(image, size):
    """A Pillow image -> uint8 (size, size, channels): its largest centred square, antialiased."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    array = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box))
    return array.reshape(size, size, -1)


def picture(array):
    """uint8 (H, W, 1 or 3) -> a Pillow image."""
    return Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)


def save_resized(tmp, array, size, labels=None):
    """Resize an array (N, H, W, C) into the array file `tmp`; returns its labels."""
    with open(tmp, "wb") as file:
        write_header(file, (len(array), size, size, array.shape[3]))
        for image in array:
            file.write(resize(picture(image), size).tobytes())
    return labels, []


# ---- batches


def batches(images, labels, batch_size, seed, epoch, device="cpu", flip=False, start=0):
    """One epoch in batches: x, float (B, C, H, W) in [-1, 1], and y, (B,) or None, on the device.

    The order depends on (seed, epoch) alone, and so does `flip`: it mirrors half of each batch.
    start: the first so many batches are left out, as after a resume in mid-epoch. The last partial
    batch is dropped; a set smaller than a batch is one short batch.
    """
    generator = torch.Generator().manual_seed(seed * 10**7 + epoch)  # the same on every device
    order = torch.randperm(len(images), generator=generator).to(images.device)
    labels = None if labels is None else labels.to(images.device)
    on_cuda = torch.device(device).type == "cuda"  # elsewhere, non_blocking copies may be damaged
    rows = images.permute(0, 2, 3, 1)  # as load() lays them out: an image is one piece of memory
    for i in range(start, max(1, len(images) // batch_size)):
        chosen = order[i * batch_size:(i + 1) * batch_size]
        x, y = rows.index_select(0, chosen), None if labels is None else labels[chosen]
        if flip:
            half = (len(x) + i % 2) // 2  # the order is random, so any half will do
            x[:half] = x[:half].flip(2)
        if x.is_cpu and on_cuda:  # too large a set for the GPU: a batch crosses as uint8, while
            x = x.pin_memory()    # the GPU works
        x, y = x.to(device, non_blocking=on_cuda), None if y is None else y.to(device)
        x = x.permute(0, 3, 1, 2).float().div_(127.5).sub_(1)
        yield x.contiguous() if x.device.type == "mps" else x, y  # see best_layout()


# ---- toy sets, drawn here: for a first run and for tests, without a download


def draw_faces(size):
    """Yield uint8 (n, size, size, 3), TOYS faces in all, each of its own looks and background."""
    traits = torch.rand(TOYS, 64, generator=torch.Generator().manual_seed(0))
    line = (torch.arange(size) + 0.5) / size * 2 - 1
    for some in traits.split(max(1, 2**21 // size**2)):
        columns = iter(some[:, :, None, None].unbind(1))  # a trait is a number in [0, 1] a face

        def pick(low=0.0, high=1.0):
            return low + (high - low) * next(columns)  # (n, 1, 1)

        def colour(*spans):
            return torch.stack([pick(*span) for span in spans], 1)  # (n, 3, 1, 1)

        def ellipse(cx, cy, rx, ry):  # nearly the distance from its edge, negative inside
            return ((((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2).sqrt() - 1) * (rx * ry) ** 0.5

        def paint(distance, tint, strength=1.0, blur=1.0):  # the edge is a ramp, `blur` pixels wide
            nonlocal canvas
            cover = (0.5 - distance * size / 2 / blur).clamp(0, 1) * strength
            canvas = canvas + (tint - canvas) * cover[:, None]

        both = torch.maximum  # of two distances: where the shapes overlap
        white, black = torch.tensor(0.96), torch.tensor(0.06)

        x, y, angle = line[None, None, :], line[None, :, None], pick(0, 6.3)
        ramp = ((x * angle.cos() + y * angle.sin()) * 0.35 + 0.5)[:, None]
        canvas = torch.lerp(colour(*[(0.1, 0.9)] * 3), colour(*[(0.1, 0.9)] * 3), ramp)

        tilt, zoom, turn = pick(-0.2, 0.2), pick(1.1, 1.4), pick(-0.14, 0.14)
        x, y = x - pick(-0.1, 0.1), y - pick(-0.05, 0.1)
        x, y = x * tilt.cos() + y * tilt.sin(), y * tilt.cos() - x * tilt.sin()
        x, y = x / zoom, y / zoom
        tone, warm, dark, red = pick(0.25, 1), pick(-0.04, 0.04), pick(0, 0.9) ** 1.5, pick(0, 0.5)
        skin = torch.stack([0.3 + 0.66 * tone, 0.17 + 0.64 * tone + warm,
                            0.1 + 0.6 * tone - warm], 1)
        hair = torch.stack([dark * (1 + red * 0.3) + 0.06, dark * (0.85 - red * 0.4) + 0.04,
                            dark * (0.6 - red * 0.5) + 0.03], 1).clamp(0, 1)
        cloth, width, height = colour(*[(0.05, 0.95)] * 3), pick(0.4, 0.5), pick(0.54, 0.64)

        hairy, length, volume = (pick() > 0.07).float(), pick(), pick(0.04, 0.16)
        long, wide = hairy * (length > 0.5), width + volume
        paint(both(ellipse(0, -0.05, wide, height + volume), y - 0.05), hair, hairy)
        paint(both(x.abs() - wide, (y - length * 0.6).abs() - length * 0.6), hair, long)
        paint(ellipse(0, 1.25, 0.95 + width * 0.3, 0.5), cloth)
        paint(both(x.abs() - width * 0.5, (y - 0.65).abs() - 0.25), skin * 0.78)  # neck
        for side in (-1, 1):
            paint(ellipse(side * (width + 0.01) - turn * 0.3, 0.02, 0.08, 0.13), skin * 0.85)
        light = 1 + (x * pick(-0.35, 0.35) - y * 0.12)[:, None]
        taper = 1 - (1 - pick(0.8, 1.0)) * (y / height).clamp(0, 1) ** 2  # towards the chin
        paint(ellipse(0, 0, width * taper, height), (skin * light).clamp(0, 1))

        x = x - turn  # the features go with the turn of the head
        gap, level, wake = pick(0.17, 0.22), pick(-0.12, -0.02), pick(0.45, 1)
        eye, look = pick(0.085, 0.115), pick(-0.03, 0.03)
        iris = colour((0.1, 0.5), (0.15, 0.55), (0.1, 0.75))
        lift, slope, thick = pick(0.13, 0.19), pick(-0.25, 0.35), pick(0.018, 0.045)
        for side in (-1, 1):
            middle, across = side * gap, x - side * gap
            ball = ellipse(middle, level, eye, eye * 0.68 * wake)
            paint(ellipse(middle, level, eye * 1.15, eye * 0.75 * wake + 0.02), skin * 0.6)
            paint(ball, white)
            for part, tint in ((0.5, iris), (0.24, black)):
                paint(both(ellipse(middle + look, level, eye * part, eye * part), ball), tint)
            brow = y - level + lift - across * slope * side + (across / eye) ** 2 * 0.02
            paint(both(brow.abs() - thick, across.abs() - eye * 1.25), hair * 0.6)
        nose, broad = pick(0.1, 0.17), pick(0.05, 0.085)
        paint(ellipse(turn * 0.5, nose - 0.1, broad * 0.6, 0.16), (skin * 1.12).clamp(0, 1), 0.5, 3)
        paint(ellipse(turn * 0.5, nose + 0.03, broad, 0.032), skin * 0.62, 0.8)

        below, smile, lips = pick(0.29, 0.35), pick(-0.06, 0.14), pick(0.13, 0.22)
        gape = torch.where(pick() < 0.45, pick(0.03, 0.09), 0.0)
        bend, ends = y - below + smile * ((x / lips) ** 2 - 0.5), ((x / lips) ** 2 - 1) * 0.05
        round_off = (1 - (x / lips) ** 2).clamp(min=0).sqrt()
        tint = skin * colour((0.75, 0.95), (0.4, 0.65), (0.4, 0.7))
        paint(both(bend.abs() - (0.035 + gape) * round_off, ends), tint)
        paint(both((bend + gape * 0.1).abs() - gape * round_off * 0.9, ends), white)
        paint(both(bend.abs() - 0.009, ends), skin * 0.35, (gape == 0).float())

        beard, glasses = torch.where(pick() < 0.2, pick(0.3, 0.85), 0.0), (pick() < 0.2).float()
        jaw = both(ellipse(-turn, 0, width * taper, height), 0.12 - y + x ** 2 * 0.6)
        jaw = both(jaw, -ellipse(0, below, lips * 1.1, 0.09 + gape))
        paint(jaw, hair * 0.8, beard * (1 - long), 2)
        for side in (-1, 1):
            paint(ellipse(side * gap, level, 0.16, 0.135).abs() - 0.014, black, glasses)
        paint(both((y - level).abs() - 0.012, x.abs() - gap + 0.15), black, glasses)

        x, part, low, bow = x + turn, pick(-0.35, 0.35), pick(-0.42, -0.26), pick(-0.1, 0.9)
        fringe = y - low * height / 0.6 - bow * (x - part) ** 2
        strands = 1 + 0.14 * torch.sin(x * volume * 400 + part * 9)[:, None]
        paint(both(ellipse(0, -0.02, width + 0.02, height + 0.02), fringe), hair * strands, hairy)
        yield canvas.mul(255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()


STROKES = (  # the ten digits as lines through points (x, y), percent from the top left
    ((50, 5), (27, 15), (17, 50), (27, 85), (50, 95), (73, 85), (83, 50), (73, 15), (50, 5)),
    ((28, 25), (52, 6), (52, 95)),
    ((20, 25), (30, 9), (52, 5), (74, 13), (78, 32), (66, 52), (40, 74), (18, 95), (84, 95)),
    ((20, 12), (50, 5), (74, 13), (76, 32), (60, 46), (40, 48), (62, 51), (80, 66), (76, 86),
     (50, 96), (19, 87)),
    ((68, 95), (68, 5), (15, 66), (86, 66)),
    ((78, 6), (28, 6), (22, 46), (50, 40), (74, 49), (80, 69), (70, 89), (46, 96), (18, 88)),
    ((68, 6), (42, 20), (24, 48), (20, 73), (32, 91), (52, 96), (74, 87), (79, 70), (68, 54),
     (48, 50), (24, 66)),
    ((16, 7), (84, 7), (60, 48), (42, 95)),
    ((50, 48), (26, 37), (24, 17), (50, 5), (76, 17), (74, 37), (50, 48), (22, 63), (20, 84),
     (50, 96), (80, 84), (78, 63), (50, 48)),
    ((76, 34), (52, 50), (32, 46), (21, 30), (26, 13), (48, 4), (68, 9), (79, 27), (76, 54),
     (60, 95)),
)


def draw_digits(size):
    """Yield uint8 (n, size, size, 1), TOYS digits in all, number i a (i mod 10) of its own hand."""
    generator, longest = torch.Generator().manual_seed(0), max(map(len, STROKES))
    points = torch.tensor([s + s[-1:] * (longest - len(s)) for s in STROKES]) / 50 - 1
    points = points.repeat(TOYS // 10, 1, 1)  # (TOYS, longest, 2) in [-1, 1]
    points = points + 0.05 * torch.randn(points.shape, generator=generator)
    wide, high, slant, turn, right, down, thick, ink = torch.rand(8, TOYS, 1, generator=generator)
    x, y = points[..., 0] * (0.4 + 0.25 * wide), points[..., 1] * (0.55 + 0.2 * high)
    x, turn = x - y * (slant - 0.35) * 0.7, (turn - 0.5) * 0.5
    x, y = x * turn.cos() - y * turn.sin(), y * turn.cos() + x * turn.sin()
    points = torch.stack([x + (right - 0.5) * 0.2, y + (down - 0.5) * 0.2], -1)
    thick, ink = 0.04 + 0.1 * thick, 0.75 + 0.25 * ink
    line = (torch.arange(size) + 0.5) / size * 2 - 1
    pixels = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1).view(1, -1, 2)
    for some in torch.arange(TOYS).split(max(1, 2**18 // size**2)):
        nearest = torch.full((len(some), size * size), 9.0)  # of all segments, to each pixel
        for a, b in zip(points[some].unbind(1), points[some, 1:].unbind(1)):
            a, along = a[:, None], (b - a)[:, None]
            t = ((pixels - a) * along).sum(-1) / along.square().sum(-1).clamp(min=1e-9)
            nearest = nearest.minimum((pixels - a - t.clamp(0, 1)[..., None] * along).norm(dim=-1))
        canvas = (0.5 + (thick[some] - nearest) * size / 3).clamp(0, 1) * ink[some]
        yield canvas.mul(255).round().byte().view(-1, size, size, 1).numpy()


def save_drawn(tmp, draw, size):
    """Write a toy set into the array file `tmp`; returns its labels."""
    with open(tmp, "wb") as file:
        for chunk in draw(size):
            if not file.tell():
                write_header(file, (TOYS, *chunk.shape[1:]))
            file.write(chunk.tobytes())
    return [i % 10 for i in range(TOYS)] if draw is draw_digits else None, []


# ---- picture files


def to_uint8(x):
    """Images in [-1, 1] -> uint8: the way back from batches()."""
    return x.float().add(1).mul(127.5).round().clamp(0, 255).byte()


def save_images(batches, folder, columns=8):
    """Write uint8 batches (B, C, H, W) as folder/000000.png and so on, and a grid of 64 beside it.

    What an earlier call left in the folder goes, and nothing else.
    """
    remove_images(folder, 0)
    first = 0
    for batch in batches:
        write_images(batch, folder, first)
        first += len(batch)
    save_overview(folder, columns)


def remove_images(folder, first):
    """What write_images() left in the folder, whole or not, from number `first` on."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [file for file in folder.glob("[0-9]" * 6 + ".png*")
             if int(file.name[:6]) >= first or file.suffix != ".png"]
    if files:
        print(f"removing {len(files)} images of an earlier --sample from {folder}", file=sys.stderr)
    for file in files:
        file.unlink()


def write_images(batch, folder, first):
    """Write uint8 images (B, C, H, W), the first of them as number `first`."""
    for i, image in enumerate(batch.permute(0, 2, 3, 1).cpu().numpy(), first):
        with replacing(folder / f"{i:06}.png") as tmp:
            picture(image).save(tmp, "PNG")


def save_overview(folder, columns=8):
    """A grid of the first 64 images that write_images() left in the folder, beside it."""
    files = sorted(folder.glob("[0-9]" * 6 + ".png"))[:64]
    shown = [np.asarray(Image.open(file)) for file in files]
    shown = torch.from_numpy(np.stack(shown)).view(len(shown), *shown[0].shape[:2], -1)
    save_grid(shown.permute(0, 3, 1, 2), folder.with_suffix(".png"), columns)


def keep_images(folder, count, made_by):
    """Leave the images of an earlier call, up to number `count`, if they were made alike.

    made_by: a dict of what decides the images; it stays beside the folder, as a .json
    """
    note = folder.with_suffix(".json")
    if count and note.exists() and json.loads(note.read_text("utf-8")) != made_by:
        raise ValueError(f"{folder} was made otherwise, see {note}: leave out --resume, and it is "
                         "made anew")
    remove_images(folder, count if note.exists() else 0)
    with replacing(note) as tmp:
        tmp.write_text(json.dumps(made_by), "utf-8")


def missing_images(folder, count, batch_size):
    """The numbers at which those batches of images 0 ... `count` - 1 begin that are not whole."""
    there = [(folder / f"{i:06}.png").exists() for i in range(count)]
    return [i for i in range(0, count, batch_size) if not all(there[i:i + batch_size])]


def save_grid(images, path, columns=8):
    """Write uint8 images (N, C, H, W) as one picture, row by row."""
    from torchvision.utils import make_grid

    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as tmp:  # save_gif() reads it in a later run
        Image.fromarray(make_grid(images.cpu(), columns).permute(1, 2, 0).numpy()).save(tmp, "PNG")


def save_gif(folder, path, frames=60):
    """epoch_0001.png and so on as an animation, evenly thinned out to 60 frames."""
    files = sorted(folder.glob("epoch_*.png"))
    if len(files) > frames:
        files = [files[i * (len(files) - 1) // (frames - 1)] for i in range(frames)]
    if files:
        first, *rest = map(Image.open, files)
        first.save(path, save_all=True, append_images=rest, duration=150, loop=0)


@functools.cache
def plots():
    """matplotlib's Figure, or None where it is missing, which is said once."""
    try:
        from matplotlib.figure import Figure  # not pyplot: no window, no global state
    except ImportError:
        print("no plots are drawn: matplotlib is not installed", file=sys.stderr)
        return None
    return Figure


def save_curves(log, path, scale="linear"):
    """Plot a log.csv over its steps: losses to the left, the rest to the right."""
    with open(log, encoding="utf-8", newline="") as file:
        rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
    if not rows or not plots():
        return
    names = list(rows[0])[4:]  # after step, epoch, seconds, images_per_s
    losses = [n for n in names if n.startswith("loss")]
    panels = [p for p in (losses, [n for n in names if n not in losses]) if p]
    plot = plots()(figsize=(5 * len(panels), 3.2), layout="constrained")
    for axes, panel in zip(plot.subplots(1, len(panels), squeeze=False)[0], panels):
        for name in panel:
            axes.plot([r["step"] for r in rows], [r[name] for r in rows], label=name, linewidth=1)
        axes.set(xlabel="step", yscale=scale, ylim=(0 if scale == "linear" else None, None))
        axes.grid(alpha=0.3)
        axes.legend()
    plot.savefig(path, dpi=100)


def save_histograms(p_real, p_fake, x_real, x_fake, path):
    """Plot what D makes of real and generated images, and the densities of their pixel values."""
    if not plots():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    plot = plots()(figsize=(10, 3.2), layout="constrained")
    left, right = plot.subplots(1, 2)
    for axes, real, fake, low in ((left, p_real, p_fake, 0), (right, x_real, x_fake, -1)):
        for values, label in ((real, "real"), (fake, "generated")):
            values = values.float().cpu().flatten().numpy()
            axes.hist(values, 64, range=(low, 1), density=True, alpha=0.55, label=label)
        axes.set(ylabel="density")
        axes.legend()
    left.set(xlabel="D: probability that the image is real", title=path.stem.replace("_", " "))
    right.set(xlabel="pixel value", title="pixels")
    plot.savefig(path, dpi=100)


# ---- a run: its log, its device, its end


class Log:
    """log.csv, cut back to `step` when opened, and the same rows as lines on the screen."""

    def __init__(self, path, columns, step, seconds):
        self.path, self.columns, self.step, rows = path, columns, step, []
        self.last, self.began = time.perf_counter(), time.perf_counter() - seconds
        if step and path.exists():
            with open(path, encoding="utf-8", newline="") as file:
                rows = [row for row in csv.reader(file) if len(row) == 4 + len(columns)]
            rows = [row for row in rows[1:] if int(row[0]) <= step]
        with replacing(path) as tmp, open(tmp, "w", encoding="utf-8", newline="") as file:
            header = ["step", "epoch", "seconds", "images_per_s", *columns]
            csv.writer(file).writerows([header, *rows])

    def seconds(self):
        """Since the run began, the time before a resume included, between sittings not."""
        return time.perf_counter() - self.began

    def write(self, step, total, epoch, batch_size, values, note=""):
        """One row: what the columns' means are since the last one."""
        now = time.perf_counter()
        rate = (step - self.step) * batch_size / max(now - self.last, 1e-9)
        self.step, self.last = step, now
        row = [step, epoch, f"{self.seconds():.1f}", f"{rate:.1f}", *(f"{v:.6g}" for v in values)]
        with open(self.path, "a", encoding="utf-8", newline="") as file:
            csv.writer(file).writerow(row)
        shown = "  ".join(f"{name} {value:.3f}" for name, value in zip(self.columns, values))
        print(f"epoch {epoch}  step {step}/{total}  {shown}  {rate:.0f} images/s{note}", flush=True)


def catch_signals(patient=False):
    """A list that fills when Ctrl-C or SIGTERM asks the run to stop; the second one ends it.

    patient: it does not, for torchrun sends one after each Ctrl-C, and kills after 30 seconds
    """
    stop = []

    def note(number, frame):
        stop.append(number)
        if not patient:
            release_signals()
            # not print(): the signal may come in the middle of one
            os.write(1, b"stopping after this step or picture; once more ends it at once\n")

    signal.signal(signal.SIGINT, note)
    signal.signal(signal.SIGTERM, note)
    return stop


def release_signals():
    """Ctrl-C and SIGTERM end the program again."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def pick_device(name="auto"):
    """--device as a torch.device; auto is the first of cuda, mps and cpu that is there."""
    if name == "auto":
        mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"  # under torchrun, a GPU for each process
    try:
        if name.split(":")[0] not in ("cuda", "mps", "cpu"):
            raise RuntimeError("give cuda, mps, cpu or auto")
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"no device {name} here: {str(error).splitlines()[0]}") from error
    if name.startswith("cuda"):
        torch.cuda.set_device(name)
        torch.backends.cudnn.benchmark = True  # shapes do not change from step to step
        torch.set_float32_matmul_precision("high")
    return torch.device(name)


def pick_bfloat16(name, device):
    """--dtype: whether to autocast to bfloat16; auto does so on CUDA of capability 8.0 or more."""
    if name not in ("auto", "bfloat16", "float32"):
        raise ValueError(f"--dtype {name}: give bfloat16, float32 or auto")
    fast = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    if name == "bfloat16" and device.type == "cpu":
        if torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "NO AVX", "AVX2"):
            print("--dtype bfloat16: this CPU is not made for it; float32 is 10 times as fast",
                  file=sys.stderr)
    return name == "bfloat16" or name == "auto" and fast


def pick_compile(wanted, device):
    """--compile: whether to; only on CUDA, where Triton is installed and knows the GPU."""
    if not wanted or device.type != "cuda":
        return False
    able = importlib.util.find_spec("triton") and torch.cuda.get_device_capability(device) >= (7, 0)
    if not able:
        print("torch.compile is off: it needs Triton and a GPU of capability 7.0", file=sys.stderr)
    return bool(able)


def best_layout(device):
    """How convolutions like images in memory; on MPS, BatchNorm's gradient is wrong in it."""
    return torch.contiguous_format if device.type == "mps" else torch.channels_last
