"""data.py: every kind of source, the cache, damaged files, batches."""
import hashlib
import io
import json
import os
import struct
import sys
import zipfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

import data


def photo(color, size=(178, 218), mode="RGB", kind="JPEG", **options):
    """The bytes of an image file of one colour."""
    file = io.BytesIO()
    Image.new(mode, size, color).save(file, kind, **options)
    return file.getvalue()


def huge_png():
    """A small file that says it has 40,000 x 40,000 pixels."""
    def chunk(kind, body):
        sum_of_it = zlib.crc32(kind + body)
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", sum_of_it)

    size = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def write(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def zipped(path, files):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def brightness(images):
    return [round(v) for v in images.float().mean((1, 2, 3)).tolist()]


# ---- celeba and mnist


FACES = {f"{i:06}.jpg": photo((i * 50,) * 3) for i in range(1, 4)}


@pytest.mark.parametrize("layout", ["folder", "nested", "zip", "zip of a folder"])
def test_celeba_layouts(layout, tmp_path):
    home = tmp_path / "celeba"
    if layout == "folder":  # torchvision's
        write(home / "img_align_celeba", FACES)
    if layout == "nested":  # Kaggle's
        write(home / "img_align_celeba" / "img_align_celeba", FACES)
        write(home, {"list_attr_celeba.csv": b"not needed"})
    if layout == "zip":
        zipped(home / "img_align_celeba.zip", FACES)
    if layout == "zip of a folder":  # the official one
        inside = {f"img_align_celeba/{name}": content for name, content in FACES.items()}
        zipped(home / "img_align_celeba.zip", inside)
    images, labels = data.load("celeba", 64, tmp_path)
    assert images.shape == (3, 3, 64, 64) and images.dtype == torch.uint8 and labels is None
    assert brightness(images) == [50, 100, 150]
    cache = np.load(tmp_path / "celeba64.npy", mmap_mode="r")
    assert cache.shape == (3, 64, 64, 3) and (cache == images.permute(0, 2, 3, 1).numpy()).all()


def test_centre_crop_and_antialiased_resize(tmp_path):
    pixels = np.zeros((218, 178, 3), np.uint8)
    pixels[20:198] = 100  # the centred square, 178 x 178
    pixels[20:198:2, :, :] += 100  # lines of one pixel: their mean is 150
    write(tmp_path / "a", {})
    (tmp_path / "a").mkdir(exist_ok=True)
    Image.fromarray(pixels).save(tmp_path / "a" / "x.png")
    images, _ = data.load(str(tmp_path / "a"), 32, tmp_path)
    inner = images[0, :, 2:-2, 2:-2].float()
    assert abs(inner - 150).max() < 12  # without antialiasing: 100 or 200


def test_celeba_download_is_checked(tmp_path, monkeypatch):
    source = zipped(tmp_path / "source.zip", FACES)

    def download(url, path):
        assert url.startswith("https://")
        with open(path, "wb") as file:
            file.write(source.read_bytes())

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    with pytest.raises(OSError, match="damaged.*toy-faces"):
        data.load("celeba", 16, tmp_path)
    assert not any((tmp_path / "celeba").iterdir())
    monkeypatch.setattr(data, "CELEBA_MD5", hashlib.md5(source.read_bytes()).hexdigest())
    assert len(data.load("celeba", 16, tmp_path)[0]) == 3
    assert [p.name for p in (tmp_path / "celeba").iterdir()] == ["img_align_celeba.zip"]


def test_celeba_offline_says_what_to_do(tmp_path, monkeypatch):
    def download(url, path):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    with pytest.raises(OSError, match="put img_align_celeba.zip into .*celeba"):
        data.load("celeba", 16, tmp_path)


def test_a_cache_alone_serves(tmp_path):
    source = zipped(tmp_path / "celeba" / "img_align_celeba.zip", FACES)
    images, _ = data.load("celeba", 16, tmp_path)
    source.unlink()
    assert data.load("celeba", 16, tmp_path)[0].equal(images)
    (tmp_path / "celeba16.json").unlink()  # as when the array alone was copied here
    assert data.load("celeba", 16, tmp_path)[0].equal(images)


def test_mnist_from_its_files(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    digits = np.arange(5 * 784, dtype=np.uint32).reshape(5, 28, 28).astype(np.uint8)
    pixels = struct.pack(">4I", 2051, 5, 28, 28) + digits.tobytes()
    classes = struct.pack(">2I", 2049, 5) + bytes([5, 0, 4, 1, 9])
    for part in ("train", "t10k"):
        write(raw, {f"{part}-images-idx3-ubyte": pixels, f"{part}-labels-idx1-ubyte": classes})
    images, labels = data.load("mnist", 28, tmp_path)
    assert images.shape == (5, 1, 28, 28) and (images[:, 0].numpy() == digits).all()
    assert labels.tolist() == [5, 0, 4, 1, 9]
    images, labels = data.load("mnist", 32, tmp_path, limit=3)
    assert images.shape == (3, 1, 32, 32) and labels.tolist() == [5, 0, 4]


# ---- toy sets


def test_toy_sets_are_the_same_every_time_and_no_two_alike(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "TOYS", 300)
    for name, channels in (("toy-faces", 3), ("toy-digits", 1)):
        images, labels = data.load(name, 32, tmp_path / "a")
        again, _ = data.load(name, 32, tmp_path / "b")
        assert images.shape == (300, channels, 32, 32) and images.equal(again)
        assert len({image.numpy().tobytes() for image in images}) == 300
        assert images.float().std(0).mean() > 20  # they vary, pixel by pixel
        assert labels is None if channels == 3 else labels.tolist() == list(range(10)) * 30


def test_toy_digits_are_told_apart_by_their_nearest_mean(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "TOYS", 1000)
    images, labels = data.load("toy-digits", 28, tmp_path)
    x = images.flatten(1).float()
    means = torch.stack([x[:500][labels[:500] == c].mean(0) for c in range(10)])
    read = torch.cdist(x[500:], means).argmin(1)
    assert (read == labels[500:]).float().mean() > 0.7  # chance is 0.1


# ---- one's own files


def test_own_folder_with_classes_modes_and_strange_names(tmp_path):
    folder = write(tmp_path / "my photos, ü", {
        "cat/b.png": photo((200, 0, 0), kind="PNG"), "cat/a.webp": photo((99, 99, 99), kind="WEBP"),
        "dog/in/ÿ.bmp": photo((0, 0, 90), kind="BMP"), "dog/.dot.png": photo("red", kind="PNG")})
    images, labels = data.load(str(folder), 16, tmp_path / "cache dir")
    assert images.shape == (3, 3, 16, 16) and labels.tolist() == [0, 0, 1]
    assert brightness(images) == [99, 67, 30]
    assert data.load(str(folder), 16, tmp_path / "cache dir", limit=1)[1].tolist() == [0]


@pytest.mark.parametrize("names, labels", [
    (["a/1.png", "b/2.png"], [0, 1]), (["top/a/1.png", "top/b/2.png"], [0, 1]),
    (["a/1.png", "a/2.png"], None), (["1.png", "b/2.png"], None), (["1.png"], None),
    (["10/1.png", "9/1.png", "9/x/2.png"], [0, 1, 1]), ([], None)])
def test_folder_labels(names, labels):
    assert data.folder_labels(names) == labels


def test_channels_are_those_of_the_data(tmp_path):
    grey = {"a.png": photo(70, mode="L", kind="PNG"), "b.jpg": photo(130, mode="L")}
    write(tmp_path / "grey", grey)
    assert data.load(str(tmp_path / "grey"), 16, tmp_path)[0].shape == (2, 1, 16, 16)
    write(tmp_path / "mixed", {**grey, "c.png": photo("red", kind="PNG")})
    assert data.load(str(tmp_path / "mixed"), 16, tmp_path)[0].shape == (3, 3, 16, 16)


def test_sixteen_bits_alpha_palette_and_rotation(tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    Image.fromarray(np.full((20, 20), 40_000, np.uint16)).save(folder / "1.png")
    Image.new("RGBA", (20, 20), (0, 0, 0, 0)).save(folder / "2.png")  # clear: white shows through
    Image.new("P", (20, 20), 0).save(folder / "3.png")
    turned = Image.new("RGB", (20, 20), "white")
    turned.paste((0, 0, 0), (0, 0, 20, 10))  # black above, to be turned by 180 degrees
    exif = Image.Exif()
    exif[0x0112] = 3
    turned.save(folder / "4.jpg", exif=exif, quality=100)
    images, _ = data.load(str(folder), 20, tmp_path)
    assert brightness(images)[:3] == [40_000 // 257, 255, 0]
    assert images[3, :, :8].min() > 240 and images[3, :, -8:].max() < 15


def test_unreadable_files_are_named_and_skipped(tmp_path, capsys):
    good = photo((50, 50, 50), kind="PNG")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    cut = io.BytesIO()
    Image.fromarray(noise).save(cut, "PNG")
    files = {"good.png": good, "truncated.png": cut.getvalue()[:4000], "empty.jpg": b"",
             "notes.txt": b"text", "bomb.png": huge_png()}
    for source in (write(tmp_path / "a", files), zipped(tmp_path / "a.zip", files)):
        images, _ = data.load(str(source), 16, tmp_path)
        assert brightness(images) == [50]
        message = capsys.readouterr().err
        assert "skipped 4 of 5 files" in message and str(source) in message
        assert all(name in message for name in files if name != "good.png")
    with pytest.raises(ValueError, match="no readable image"):
        data.load(str(write(tmp_path / "b", {"notes.txt": b"text"})), 16, tmp_path)
    assert not list(tmp_path.glob("b-*"))


def test_a_zip_is_read_in_memory_and_bombs_are_not(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "BIGGEST", 10_000)
    files = {"../../escaped.png": photo("red", kind="PNG"), "/abs.png": photo("red", kind="PNG"),
             "__MACOSX/._a.png": b"", "bomb.bmp": photo("red", kind="BMP")}
    images, _ = data.load(str(zipped(tmp_path / "in" / "a.zip", files)), 16, tmp_path / "cache")
    assert len(images) == 2
    assert not list(tmp_path.rglob("*.png")) and not (tmp_path.parent / "escaped.png").exists()


def test_arrays(tmp_path):
    rng = np.random.default_rng(0)
    colour = rng.integers(0, 256, (6, 20, 20, 3), np.uint8)
    np.save(tmp_path / "colour.npy", colour)
    np.savez(tmp_path / "grey.npz", arr_0=colour[..., 0], other=np.zeros(3))
    images, labels = data.load(str(tmp_path / "colour.npy"), 20, tmp_path)
    assert (images.permute(0, 2, 3, 1).numpy() == colour).all() and labels is None
    assert not list(tmp_path.glob("*.json"))  # nothing to prepare
    assert data.load(str(tmp_path / "colour.npy"), 10, tmp_path)[0].shape == (6, 3, 10, 10)
    images, _ = data.load(str(tmp_path / "grey.npz"), 20, tmp_path)
    assert images.shape == (6, 1, 20, 20) and (images[:, 0].numpy() == colour[..., 0]).all()
    wrong = [np.zeros((2, 4, 4, 3)), np.zeros((2, 4, 4, 2), np.uint8), np.zeros(5, np.uint8),
             np.zeros((0, 4, 4, 3), np.uint8), np.array([{}], dtype=object)]
    for array in wrong:
        np.save(tmp_path / "wrong.npy", array, allow_pickle=True)
        with pytest.raises(ValueError, match="wrong.npy"):
            data.load(str(tmp_path / "wrong.npy"), 4, tmp_path)


# ---- the cache


def test_the_cache_is_used_until_its_source_changes(tmp_path, monkeypatch):
    folder = write(tmp_path / "a", {"1.png": photo("red", kind="PNG")})
    made = []
    decode = data.decode
    monkeypatch.setattr(data, "decode", lambda *a: made.append(1) or decode(*a))
    for _ in range(2):
        images, _ = data.load(str(folder), 16, tmp_path)
        assert len(images) == 1
    assert len(made) == 1  # decoded once
    write(folder, {"2.png": photo("blue", kind="PNG")})
    assert len(data.load(str(folder), 16, tmp_path)[0]) == 2
    os.utime(folder / "1.png", (1, 2**31))  # the same size, another time
    made.clear()
    data.load(str(folder), 16, tmp_path)
    assert len(made) == 2
    cache = next(tmp_path.glob("a-*.npy"))
    for half in (cache.read_bytes()[:-5], b""):  # as no run of ours leaves it
        cache.write_bytes(half)
        made.clear()
        assert len(data.load(str(folder), 16, tmp_path)[0]) == 2 and len(made) == 2


def test_a_file_that_moves_to_another_class_takes_its_label_along(tmp_path):
    folder = write(tmp_path / "a", {f"{c}/{i}.png": photo("red", kind="PNG")
                                    for c in ("cat", "dog") for i in range(2)})
    assert data.load(str(folder), 16, tmp_path)[1].tolist() == [0, 0, 1, 1]
    (folder / "cat" / "1.png").rename(folder / "dog" / "3.png")
    assert data.load(str(folder), 16, tmp_path)[1].tolist() == [0, 1, 1, 1]


def test_hidden_folders_dangling_links_and_damaged_archives(tmp_path):
    folder = write(tmp_path / "a", {"x/1.png": photo("red", kind="PNG"), ".git/y.png": b"hidden",
                                    "x/.ipynb_checkpoints/1.png": photo("red", kind="PNG")})
    if sys.platform != "win32":
        (folder / "x" / "link.png").symlink_to("nowhere.png")
    assert len(data.load(str(folder), 16, tmp_path)[0]) == 1
    archive = zipped(tmp_path / "a.zip", {"1.png": photo("red", kind="PNG"), ".a/2.png": b"hidden"})
    assert len(data.load(str(archive), 16, tmp_path)[0]) == 1
    whole = archive.read_bytes()
    for damaged in (whole[:-30], whole[:-60] + bytes(38) + whole[-22:]):
        archive.write_bytes(damaged)
        with pytest.raises(ValueError, match="a.zip"):
            data.load(str(archive), 16, tmp_path)


def test_damaged_mnist_files_are_one_message(tmp_path):
    write(tmp_path / "MNIST" / "raw", {
        f"{part}-{kind}-ubyte": b"" for part in ("train", "t10k")
        for kind in ("images-idx3", "labels-idx1")})
    with pytest.raises(OSError, match="put its files anew"):
        data.load("mnist", 28, tmp_path)


def test_the_cache_is_mapped_and_never_written_to(tmp_path):
    folder = write(tmp_path / "a", {"1.png": photo((9, 9, 9), kind="PNG")})
    data.load(str(folder), 16, tmp_path)
    assert isinstance(data.read_array(next(tmp_path.glob("*.npy"))), np.memmap)
    images, _ = data.load(str(folder), 16, tmp_path)
    images += 1
    assert data.load(str(folder), 16, tmp_path)[0].unique().tolist() == [9]


def test_folders_of_one_name_do_not_meet(tmp_path):
    for i, place in enumerate(("x", "y")):
        write(tmp_path / place / "photos", {"1.png": photo((i * 90,) * 3, kind="PNG")})
    for _ in range(2):
        for i, place in enumerate(("x", "y")):
            images, _ = data.load(str(tmp_path / place / "photos"), 16, tmp_path)
            assert brightness(images) == [i * 90]


def test_what_fails_half_way_leaves_nothing(tmp_path):
    def full(tmp):
        tmp.write_bytes(b"half")
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space"):
        data.cached(tmp_path / "a.npy", {}, full)
    assert not list(tmp_path.iterdir())


def test_two_builders_at_once_do_no_harm(tmp_path):
    folder = write(tmp_path / "a", {"1.png": photo((9, 9, 9), kind="PNG")})

    def build(tmp):  # while this one builds, another process comes and is done first
        result = data.save_decoded(tmp, folder, 16, (), 100)
        pid = os.getpid
        os.getpid = lambda: pid() + 1
        try:
            data.cached(tmp_path / "a.npy", {"n": 1},
                        lambda other: data.save_decoded(other, folder, 16, (), 100))
        finally:
            os.getpid = pid
        return result

    array, _ = data.cached(tmp_path / "a.npy", {"n": 1}, build)
    assert array.shape == (1, 16, 16, 3) and (array == 9).all()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "a.json", "a.npy"]
    assert json.loads((tmp_path / "a.json").read_text())["made_from"] == {"n": 1}


# ---- batches


def numbered(n):
    """Images whose every pixel tells their number; labels likewise."""
    images = torch.arange(n, dtype=torch.uint8)[:, None, None, None].repeat(1, 3, 4, 4)
    return images, torch.arange(n)


def test_an_epoch_is_a_permutation_that_seed_and_epoch_decide():
    images, labels = numbered(103)

    def order(seed, epoch, **options):
        pairs = data.batches(images, labels, 10, seed, epoch, **options)
        return [number for _, y in pairs for number in y.tolist()]

    first = order(0, 0)
    assert len(first) == 100 and len(set(first)) == 100 and first != sorted(first)
    torch.manual_seed(5)  # no other randomness plays a part, nor is any used up
    state = torch.get_rng_state()
    assert order(0, 0) == first == order(0, 0, flip=True)
    assert torch.get_rng_state().equal(state)
    assert order(0, 1) != first != order(1, 0)
    assert order(0, 0, start=4) == first[40:]
    assert order(0, 0, start=10) == []
    seen = {i for epoch in range(10) for i in order(0, epoch)}
    assert seen == set(range(103))  # who is dropped changes from epoch to epoch


def test_values_go_from_minus_one_to_one_and_back():
    images = torch.arange(256, dtype=torch.uint8).view(4, 1, 8, 8)
    x, y = next(data.batches(images, None, 4, 0, 0))
    assert x.dtype == torch.float32 and x.min() == -1 and x.max() == 1 and y is None
    rows = {row.numpy().tobytes() for row in data.to_uint8(x)}
    assert rows == {row.numpy().tobytes() for row in images}


def test_flip_mirrors_half_of_the_images():
    images = torch.zeros(1000, 1, 2, 2, dtype=torch.uint8)
    images[..., 0] = 255
    x = torch.cat([x for x, _ in data.batches(images, None, 100, 0, 0, flip=True)])
    mirrored = (x[:, 0, 0, 1] == 1).float().mean()
    assert 0.45 < mirrored < 0.55
    assert ((x[:, 0, :, 0] != x[:, 0, :, 1]).all())
    again = torch.cat([x for x, _ in data.batches(images, None, 100, 0, 0, flip=True)])
    assert x.equal(again)
    x = torch.cat([x for x, _ in data.batches(images, None, 100, 0, 0)])
    assert (x[:, 0, :, 0] == 1).all()
    ones = [x for x, _ in data.batches(images, None, 1, 0, 0, flip=True)]
    assert sum((x[0, 0, 0, 1] == 1).item() for x in ones) == 500  # batches of one image, too


def test_a_set_smaller_than_a_batch_is_one_short_batch():
    images, labels = numbered(3)
    (batch,) = data.batches(images, labels, 10, 0, 0)
    assert len(batch[0]) == 3 and sorted(batch[1].tolist()) == [0, 1, 2]


# ---- pictures


def test_gif_has_sixty_frames_at_most(tmp_path):
    folder = tmp_path / "samples"
    folder.mkdir()
    for i in range(130):
        Image.new("L", (8, 8), 2 * i % 256 if i < 128 else 255).save(folder / f"epoch_{i:04}.png")
    data.save_gif(folder, tmp_path / "a.gif")
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames == 60
        gif.seek(59)
        assert np.asarray(gif.convert("L")).mean() == 255  # the last one is always among them


def test_a_grid_that_is_cut_short_leaves_the_one_before(tmp_path, monkeypatch):
    grid, save = tmp_path / "epoch_0001.png", Image.Image.save
    data.save_grid(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), grid)
    before = grid.read_bytes()

    def half(image, path, *format):
        save(image, path, *format)
        os.truncate(path, 40)
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", half)
    with pytest.raises(KeyboardInterrupt):
        data.save_grid(torch.ones(4, 1, 8, 8, dtype=torch.uint8), grid)
    assert grid.read_bytes() == before and list(tmp_path.iterdir()) == [grid]


def test_pictures_of_ones_own_stay_and_are_no_samples(tmp_path):
    samples, generated = tmp_path / "samples", tmp_path / "generated"
    data.save_grid(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), samples / "epoch_0001.png")
    generated.mkdir()
    Image.new("RGB", (40, 30)).save(generated / "mine.png")
    (samples / "mine.png").write_bytes(b"no picture")
    data.save_images([torch.ones(3, 1, 8, 8, dtype=torch.uint8)], generated)
    data.save_gif(samples, tmp_path / "samples.gif")
    assert Image.open(tmp_path / "generated.png").size == (3 * 10 + 2, 12)
    assert Image.open(generated / "mine.png").size == (40, 30)
    assert Image.open(tmp_path / "samples.gif").n_frames == 1


def test_grid_is_row_by_row(tmp_path):
    images = torch.arange(6, dtype=torch.uint8).mul(40).view(6, 1, 1, 1).repeat(1, 3, 4, 4)
    data.save_grid(images, tmp_path / "new" / "grid.png", columns=3)
    pixels = np.asarray(Image.open(tmp_path / "new" / "grid.png"))
    assert [pixels[y, x, 0] for y in (4, 10) for x in (4, 10, 16)] == [0, 40, 80, 120, 160, 200]


@pytest.mark.parametrize("capability", ["AVX2", "AVX512"])
def test_bfloat16_on_a_cpu_without_it_is_warned_of(capability, monkeypatch, capsys):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    cpu = torch.device("cpu")
    assert data.pick_bfloat16("bfloat16", cpu)
    assert ("float32" in capsys.readouterr().err) == (capability == "AVX2")
    assert not data.pick_bfloat16("float32", cpu) and not data.pick_bfloat16("auto", cpu)
    assert not capsys.readouterr().err
