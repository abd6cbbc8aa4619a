"""data.py: image sets, their cache, damaged files, batches, pictures."""
import hashlib
import io
import os
import shutil
import zipfile
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image

import data


@pytest.fixture(autouse=True)
def in_an_empty_folder_and_offline(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("urllib.request.urlopen", Mock(side_effect=OSError("no network")))


def save(path, color, mode="L"):
    """Write an image of one colour; the name's ending decides the format."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (20, 20), color).save(path)


def brightness(images):
    return images.float().mean((1, 2, 3)).tolist()


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("folder", ["my set", "data/celeba/img_align_celeba"])
@pytest.mark.parametrize("names, expected", [
    (["1.png", "b/2.png"], None), (["img_align_celeba/1.png", "img_align_celeba/2.png"], None),
    (["in/cät [1]/x/1.bmp", "in/dog's, 2/1.png", "in/dog's, 2/2.webp"], [0, 1, 1]),
])
def test_folders_and_zips(names, expected, folder, zipped):
    for i, name in enumerate(names):
        save(f"{folder}/{name}", (i, i, i), "RGB")
    for hidden in (".a.png", ".git/a.png", "b/.ipynb_checkpoints/a.png"):
        save(f"{folder}/{hidden}", 99)
    Path(folder, "link.png").symlink_to("nowhere.png")
    source = shutil.make_archive(folder, "zip", folder) if zipped else folder
    if zipped:
        shutil.rmtree(folder)
    images, labels = data.load("celeba" if "celeba" in folder else source, 16)
    assert images.shape == (len(names), 3, 16, 16)
    assert brightness(images) == list(range(len(names)))
    assert expected == (None if labels is None else labels.tolist())


def test_celeba_is_downloaded_and_its_hash_checked(monkeypatch):
    class Response(io.BytesIO):
        url = length = None

    advice = "put img_align_celeba.zip into data/celeba, or try --data toy-faces"
    with pytest.raises(OSError, match=advice):  # offline
        data.load("celeba", 16)
    save("a/1.png", 7)
    archive = Path(shutil.make_archive("a", "zip", "a")).read_bytes()
    monkeypatch.setattr("urllib.request.urlopen", lambda request: Response(archive))
    with pytest.raises(OSError, match=advice):  # another hash
        data.load("celeba", 16)
    assert not os.listdir("data/celeba")
    monkeypatch.setattr(data, "CELEBA_MD5", hashlib.md5(archive).hexdigest())
    assert brightness(data.load("celeba", 16)[0]) == [7]


def test_mnist():
    def write(images, labels):
        for part in ("train", "t10k"):
            Path(f"data/MNIST/raw/{part}-images-idx3-ubyte").write_bytes(images)
            Path(f"data/MNIST/raw/{part}-labels-idx1-ubyte").write_bytes(labels)

    advice = "put its four files into data/MNIST/raw"
    with pytest.raises(OSError, match=advice):  # offline
        data.load("mnist", 28)
    header = np.array([2051, 3, 28, 28], ">i4").tobytes()
    for damaged in (b"", b"<html>not found</html>", header + bytes(5)):
        write(damaged, damaged)
        with pytest.raises(OSError, match=advice):
            data.load("mnist", 28)
    digits = np.arange(3 * 784).astype(np.uint8)
    classes = np.array([2049, 3], ">i4").tobytes() + bytes([5, 0, 9])
    write(header + digits.tobytes(), classes)
    assert (data.load("mnist", 28)[0].flatten().numpy() == digits).all()
    images, labels = data.load("mnist", 32, limit=2)
    assert (images.shape, labels.tolist()) == ((2, 1, 32, 32), [5, 0])


def test_toy_sets_are_reproducible_varied_and_recognisable():
    for name in ("toy-faces", "toy-digits"):
        images, labels = data.load(name, 28, limit=600)
        assert images.equal(data.load(name, 28, limit=600)[0])
        assert len(images.unique(dim=0)) == 600
    train, test = images.flatten(1).float().split(300)
    means = torch.stack([train[labels[:300] == digit].mean(0) for digit in range(10)])
    nearest = torch.cdist(test, means).argmin(1)
    assert (nearest == labels[300:]).float().mean() > 0.7  # chance is 0.1


def test_images_are_turned_upright_cropped_and_resized_with_antialiasing():
    pixels = np.zeros((240, 200), np.uint8)
    pixels[:20] = 255  # above the centred square
    pixels[120:220] = [[100], [200]] * 50  # lines of one pixel, of mean 150
    exif = Image.Exif()
    exif[0x0112] = 3  # orientation: upside down
    Path("a").mkdir()
    Image.fromarray(pixels).save("a/1.png", exif=exif)
    image = data.load("a", 32)[0][0, 0].float()
    assert abs(image[1:15] - 150).max() < 12
    assert image[17:31].max() < 12


def test_unreadable_files_are_named_and_skipped_and_a_zip_is_read_in_memory(tmp_path, capsys):
    save("a/grey.png", 7)
    save("a/red.png", "red", "RGB")
    save("a/deep.png", 9, "I;16")
    Path("a/cut.png").write_bytes(Path("a/red.png").read_bytes()[:50])
    Path("a/notes.txt").write_text("text")
    for source in ("a", shutil.make_archive("a", "zip", "a")):
        assert brightness(data.load(source, 16)[0]) == [7, 85]
        skipped = "skipped 3 of 5 files, unreadable: cut.png, deep.png, notes.txt"
        assert skipped in capsys.readouterr().err
    with zipfile.ZipFile("in.zip", "w") as archive:
        for name in ("../b.png", "/b.png", "a/../../b.png", "b.png"):
            archive.writestr(name, Path("a/grey.png").read_bytes())
    assert data.load("in.zip", 16)[0].shape[1:] == (1, 16, 16)  # one channel: all files are grey
    assert not list(tmp_path.rglob("b.png"))


def test_arrays():
    array = np.random.default_rng(0).integers(0, 256, (6, 20, 20, 3), np.uint8)
    np.save("colour.npy", array)
    np.savez("grey.npz", array[..., 0], other=np.zeros(3))
    assert (data.load("colour.npy", 20)[0].permute(0, 2, 3, 1).numpy() == array).all()
    assert (data.load("grey.npz", 20)[0][:, 0].numpy() == array[..., 0]).all()


@pytest.mark.parametrize("name", [
    "nowhere", "cut.zip", "empty", "object.npy", "object.npz", "float.npy", "2.npy", "none.npy"])
def test_a_wrong_source_is_a_message_and_no_pickle_is_executed(name):
    class Dangerous:
        def __reduce__(self):
            return Path.touch, (Path("executed"),)

    Path("cut.zip").write_bytes(b"PK\3\4")
    Path("empty").mkdir()
    np.save("object.npy", np.array([Dangerous()]))
    np.savez("object.npz", np.array([Dangerous()]))
    np.save("float.npy", np.zeros((2, 4, 4, 3)))
    np.save("2.npy", np.zeros((2, 4, 4, 2), np.uint8))  # channels
    np.save("none.npy", np.zeros((0, 4, 4, 3), np.uint8))
    with pytest.raises(ValueError, match="give|not a|no readable"):
        data.load(name, 4)
    assert not Path("executed").exists()
    assert not list(Path("data").glob("*"))


def test_the_cache_serves_until_its_source_changes(capsys):
    def prepare():
        images, labels = data.load("a", 16)
        return brightness(images), labels.tolist(), "preparing" in capsys.readouterr().err

    save("a/cat/1.png", 1)
    save("a/dog/2.png", 2)
    assert prepare() == ([1, 2], [0, 1], True)
    assert prepare() == ([1, 2], [0, 1], False)
    os.rename("a/cat", "a/zebra")
    assert prepare() == ([2, 1], [0, 1], True)
    save("a/dog/3.png", 3)
    assert prepare() == ([2, 3, 1], [0, 0, 1], True)
    os.utime("a/dog/3.png", (1, 1))  # another time, and nothing else
    assert prepare() == ([2, 3, 1], [0, 0, 1], True)


def test_a_cache_is_whole_when_its_build_fails_or_another_builds_it_too(monkeypatch):
    path = Path("new/a.npy")

    def paint(item):
        if item == "2" and os.getpid():  # another process, of number 0, builds it meanwhile
            with monkeypatch.context() as patch:
                patch.setattr(os, "getpid", lambda: 0)
                data.cached(path, ["1", "2"], paint)
        return np.full((4, 4, 1), int(item), np.uint8)

    with pytest.raises(ValueError, match="fails"):
        data.cached(path, ["1", "fails"], paint)
    assert not os.listdir("new")
    array, _ = data.cached(path, ["1", "2"], paint)
    assert sorted(os.listdir("new")) == ["a.json", "a.npy"]
    assert isinstance(array, np.memmap)
    array += 1  # in memory only
    assert np.load(path)[:, 0, 0, 0].tolist() == [1, 2]


def test_an_epoch_is_a_permutation_decided_by_seed_and_epoch():
    labels = torch.arange(103)
    images = labels.byte().view(103, 1, 1, 1)

    def order(epoch, seed=0, flip=False):
        get_batch = data.Batches(images, labels, 10, seed, flip)
        steps = range(10 * epoch, 10 * epoch + len(get_batch))
        return torch.cat([get_batch(step)[1] for step in steps]).tolist()

    state = torch.get_rng_state()
    first = order(0)
    assert len(first) == len(set(first)) == 100
    assert state.equal(torch.get_rng_state())
    torch.manual_seed(5)
    assert first == order(0) == order(0, flip=True)
    assert order(1) != first != order(0, seed=1)
    get_batch = data.Batches(images, labels, 10)
    get_batch(25)
    x, y = get_batch(3)  # steps may come in any order
    assert y.tolist() == first[30:40]
    assert data.to_uint8(x).flatten().equal(y.byte())


def test_a_small_set_is_one_batch_and_flip_mirrors_half_of_the_images():
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    get_batch = data.Batches(images, None, 10)
    x, y = get_batch(5)
    assert (len(get_batch), x.min(), x.max(), y) == (1, -1, 1, None)
    assert data.to_uint8(x).equal(images)
    images = torch.tensor([0, 255], dtype=torch.uint8).expand(1000, 1, 2, 2)
    get_batch = data.Batches(images, None, batch_size=5, flip=True)
    x = torch.cat([get_batch(step)[0] for step in range(200)])
    assert x[..., 0].equal(-x[..., 1])
    assert (x[:, 0, 0, 0] == 1).sum() == 500


def test_grid_is_row_by_row():
    images = torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1).expand(6, 3, 4, 4)
    data.save_grid(images, Path("new/grid.png"), columns=3)
    assert np.asarray(Image.open("new/grid.png"))[4::6, 4::6, 0].tolist() == [[0, 1, 2], [3, 4, 5]]
