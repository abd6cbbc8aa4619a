"""data.py: image sets, labels, damaged files, the cache, arrays, named sets, batches, pictures."""
import hashlib
import io
import os
import resource
import shutil
import zipfile
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import Payload
from PIL import Image

import data


@pytest.fixture(autouse=True)
def in_an_empty_folder_and_offline(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr("urllib.request.urlopen", Mock(side_effect=OSError("no network")))


def save(path, color, mode="L"):
    """Write an image of one colour; the name's ending decides the format."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (20, 20), color).save(path)


def load(*args, **kwargs):
    """The brightness of each image, and the labels."""
    images, labels = data.load(*args, **kwargs)
    return images.float().mean((1, 2, 3)).tolist(), None if labels is None else labels.tolist()


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("folder", ["my set", "data/celeba/img_align_celeba"])
@pytest.mark.parametrize("names, expected", [
    (["img_align_celeba/1.png", "img_align_celeba/2.png"], None),
    (["1.png", "b/2.png", "c/3.png"], None), (["a/1.png", "a/b/2.png", "c/3.png"], None),
    (["in/cät [1]/x/1.bmp", "in/dog's, 2/1.png", "in/dog's, 2/2.webp"], [1, 0, 0]),
    (["test/cat/a.png", "test/dog/a.png", "train/cat/a.png", "train/dog/b.png"], [0, 1, 0, 1]),
    (["1/a.png", "10/a.png", "11/a.png", "2/a.png", "3/a.png"], [0, 3, 4, 1, 2])])
def test_folders_and_zips(names, expected, folder, zipped, capsys):
    for i, name in enumerate(names):
        save(f"{folder}/{name}", (i, i, i), "RGB")
    for hidden in (".a.png", ".git/a.png", "b/.ipynb_checkpoints/a.png"):
        save(f"{folder}/{hidden}", 99)
    Path(folder, "link.png").symlink_to("nowhere.png")
    source = folder
    if zipped:
        source = shutil.make_archive(folder, "zip", folder)
        shutil.rmtree(folder)
    if "celeba" in folder:
        source = "celeba"
        save("celeba/1.png", 9)  # a named set takes precedence
    assert load(source, 16) == (list(range(len(names))), expected)
    assert data.load(source, 16)[0].shape[1:] == (3, 16, 16)
    shown = capsys.readouterr().err
    assert all(f"{y} = {Path(name).parent.name}" in shown for name, y in zip(names, expected or []))


def test_links_to_folders_are_followed_once_and_runs_are_no_images(capsys):
    save("a/cat/1.png", 1)
    save("a/dog/2.png", 2)
    save("elsewhere/3.png", 3)
    save("a/out/samples/1.png", 4)
    Path("a/out/ckpt.pt").touch()
    for name, target in (("cat/again", "."), ("dog/up", ".."), ("pet", "cat"),
                         ("x", "../elsewhere"), ("y", "../elsewhere")):
        Path("a", name).symlink_to(target)
    assert load("a", 16) == ([1, 2, 3], [0, 1, 2])
    assert "0 = cat, 1 = dog, 2 = x" in capsys.readouterr().err


def test_a_zip_is_read_in_memory_and_each_name_once(tmp_path):
    save("a.png", 7)
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile("in.zip", "w") as archive:
        for name in ("./a/c.png", "a/b.png", "a/b.png", "../b.png", "n" * 300 + ".png"):
            archive.writestr(name, Path("a.png").read_bytes())
    assert load("in.zip", 16)[0] == [7] * 3  # ../b.png counts as hidden
    assert not list(tmp_path.rglob("b.png"))


def test_transparency_is_composited_on_white():
    """A black square, on a ground that is transparent and nearly black."""
    image = Image.new("RGBA", (24, 24), (1, 1, 1, 0))
    image.paste((0, 0, 0, 255), (8, 8, 16, 16))
    Path("a").mkdir()
    image.convert("LA").save("a/1.png")
    image.save("a/2.png")
    image.save("a/3.webp", lossless=True)
    image.save("a/4.gif")  # a palette with a transparent colour
    image.quantize(2).save("a/5.png")
    image.convert("L").save("a/6.png", transparency=1)
    image.convert("RGB").save("a/7.png", transparency=(1, 1, 1))
    images, _ = data.load("a", 24)
    assert images.shape == (7, 3, 24, 24)
    assert ((images == 0).sum((1, 2, 3)) == 3 * 64).all()
    assert ((images == 255).sum((1, 2, 3)) == 3 * (24 * 24 - 64)).all()


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


def test_a_set_is_grey_only_if_all_of_its_images_are():
    Path("a/annotations").mkdir(parents=True)
    for i in range(5):
        Path(f"a/annotations/{i}.xml").write_text("<xml>")
    for i in range(20):
        save(f"a/grey/{i}.png", i, "1" if i == 7 else "L")
    assert data.load("a", 4)[0].shape == (20, 1, 4, 4)
    for i in range(40):
        save(f"a/images/{i}.jpg", "red", "RGB")
    images, _ = data.load("a", 4)
    assert images.shape == (60, 3, 4, 4)
    assert images[-1].float().mean((1, 2)).tolist() == pytest.approx([255, 0, 0], abs=2)


def test_limit_takes_evenly_spaced_files_and_decodes_no_other(monkeypatch):
    for i in range(18):
        save(f"a/{'abc'[i // 6]}/{i:02}.png", i)
    np.save("a.npy", np.arange(18, dtype=np.uint8).repeat(36).reshape(18, 6, 6))
    decode = Mock(wraps=data.decode_image)
    monkeypatch.setattr(data, "decode_image", decode)
    assert load("a", 6, limit=6) == ([0, 3, 6, 9, 12, 15], [0, 0, 1, 1, 2, 2])
    assert decode.call_count == 6
    assert load("a.npy", 6, limit=6)[0] == [0, 3, 6, 9, 12, 15]
    assert load("a", 4, limit=19)[0] == load("a.npy", 4, limit=19)[0] == list(range(18))


def zip_with(flag=0, method=0):
    """A .zip of one image whose headers claim this flag and this compression method."""
    with zipfile.ZipFile("a.zip", "w") as archive:
        archive.write("good/1.png")
    content = bytearray(Path("a.zip").read_bytes())
    for place in (6, content.index(b"PK\1\2") + 8):
        content[place], content[place + 2] = flag, method
    Path("a.zip").write_bytes(content)
    return "a.zip"


def test_what_cannot_be_read_is_named_with_the_reason(monkeypatch, capsys):
    save("good/1.png", 7)
    save("bad/deep.png", 300, "I;16")
    Image.new("L", (99, 99)).save("bad/huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 700)
    Path("bad/program.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    Path("bad/text.txt").write_text("text")
    for make, reason in (
            (lambda: "bad", "deep.png: .*8 bits.*huge.png: .*pixels.*program.png: a program"
                            ".*text.txt: .*identify"),
            (lambda: zip_with(flag=1), "1.png: .*password"),
            (lambda: zip_with(method=9), "1.png: .*compression")):
        with pytest.raises(data.Error, match=reason) as error:
            data.load(make(), 16)
        assert len(str(error.value).splitlines()) == 1
    assert not os.listdir("data")
    save("bad/good.png", 7)
    assert load("bad", 16)[0] == [7]
    err = capsys.readouterr().err
    assert "4 of 5" in err and "deep.png" in err


def test_a_wrong_source_is_one_line_and_no_pickle_is_executed():
    Path("folder").mkdir()
    np.savez("pickle.npz", np.array([Payload()]))
    np.save("pickle.npy", np.array([Payload()]))
    np.save("float.npy", np.zeros((2, 4, 4, 3)))
    for cut in ("cut.zip", "cut.npy"):
        Path(cut).write_bytes(b"PK\3\4")
    shapes = [(0, 4, 4, 3), (2, 4, 4, 2), (64, 64, 3), (3, 64, 64), (64, 64, 4), (64, 64)]
    for shape in shapes:
        np.save(f"{shape}.npy", np.zeros(shape, np.uint8))
    for name in ["nowhere", "folder", "cut.zip", "pickle.npz", *Path().glob("*.npy")]:
        with pytest.raises(data.Error) as error:
            data.load(str(name), 4)
        assert len(str(error.value).splitlines()) == 1, name
    assert not Path("executed").exists() and not list(Path("data").glob("*"))


def test_a_tilde_is_the_home_folder_and_names_may_be_long():
    folder = "ä" * 120
    save(f"home/{folder}/{'n' * 200}/{'n' * 200}.png", 7)
    assert load(f"~/{folder}", 16, "~/cache")[0] == [7]
    assert os.listdir("home/cache") and not Path("~").exists()


def test_the_cache_serves_until_its_source_changes(monkeypatch):
    decode = Mock(wraps=data.decode_image)
    monkeypatch.setattr(data, "decode_image", decode)

    def loaded():
        decode.reset_mock()
        return *load("a", 16), decode.called

    for i, name in enumerate(("a/cat/1.bmp", "a/dog/2.bmp")):
        save(name, i)
        os.utime(name, (2, 2))
    assert loaded() == ([0, 1], [0, 1], True)
    assert loaded() == ([0, 1], [0, 1], False)
    os.rename("a/cat", "a/zebra")
    assert loaded() == ([1, 0], [0, 1], True)
    os.utime("a/dog/2.bmp", (1, 1))  # another time, and nothing else
    assert loaded() == ([1, 0], [0, 1], True)
    images, _ = data.load("a", 16)
    images += 1  # in memory only
    assert loaded() == ([1, 0], [0, 1], False)


def test_a_full_disk_leaves_no_part_of_a_cache():
    for i in range(40):
        save(f"a/{i:02}.png", i)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))  # 40 images take 30,720 bytes
    try:
        with pytest.raises(OSError):
            data.load("a", 16)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not os.listdir("data")
    assert load("a", 16)[0] == list(range(40))


def test_celeba_is_downloaded_from_either_address_and_its_hash_checked(monkeypatch):
    class Response(io.BytesIO):
        url = length = None

    save("a/1.png", 7)
    archive = Path(shutil.make_archive("a", "zip", "a")).read_bytes()
    served = dict(zip(data.CELEBA_URLS, (b"<html>moved</html>", archive)))
    monkeypatch.setattr("urllib.request.urlopen",
                        lambda request: Response(served[request.full_url]))
    with pytest.raises(data.Error, match="img_align_celeba.zip into data/celeba"):  # another hash
        data.load("celeba", 16)
    assert not os.listdir("data/celeba")
    monkeypatch.setattr(data, "CELEBA_MD5", hashlib.md5(archive).hexdigest())
    assert load("celeba", 16)[0] == [7]


def test_mnist():
    def write(images, labels):
        for part in ("train", "t10k"):
            Path(f"data/MNIST/raw/{part}-images-idx3-ubyte").write_bytes(images)
            Path(f"data/MNIST/raw/{part}-labels-idx1-ubyte").write_bytes(labels)

    header = np.array([2051, 3, 28, 28], ">i4").tobytes()
    for prepare in (lambda: None, lambda: write(header + bytes(5), header)):  # offline; damaged
        prepare()
        with pytest.raises(data.Error, match="four files into data/MNIST/raw"):
            data.load("mnist", 28)
    digits = np.arange(3 * 784).astype(np.uint8)
    write(header + digits.tobytes(), np.array([2049, 3], ">i4").tobytes() + bytes([5, 0, 9]))
    assert (data.load("mnist", 28)[0].flatten().numpy() == digits).all()
    images, labels = data.load("mnist", 32, limit=2)
    assert (images.shape, labels.tolist()) == ((2, 1, 32, 32), [5, 0])


def test_an_epoch_is_a_permutation_decided_by_seed_and_epoch():
    labels = torch.arange(103)
    images = labels.byte().view(103, 1, 1, 1)

    def order(epoch, **kwargs):
        batches = data.Batches(images, labels, 10, **kwargs)
        return torch.cat([batches(10 * epoch + step)[1] for step in range(len(batches))]).tolist()

    state, first = torch.get_rng_state(), order(0)
    assert len(first) == len(set(first)) == 100
    assert state.equal(torch.get_rng_state())
    torch.manual_seed(5)
    assert first == order(0) == order(0, flip=True)
    assert order(1) != first != order(0, seed=1) != order(1)
    batches = data.Batches(images, labels, 10)
    batches(25)
    x, y = batches(3)  # steps may come in any order
    assert y.tolist() == first[30:40]
    assert ((x.flatten() + 1) * 127.5).round().equal(y.float())


def test_a_small_set_is_one_batch_and_flip_mirrors_half_of_the_images():
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    batches = data.Batches(images, None, 10)
    x, y = batches(5)
    assert (len(batches), x.min(), x.max(), y) == (1, -1, 1, None)
    assert ((x + 1) * 127.5).round().equal(images.float())
    images = torch.tensor([0, 255], dtype=torch.uint8).expand(1000, 1, 2, 2)
    batches = data.Batches(images, None, batch_size=5, flip=True)
    x = torch.cat([batches(step)[0] for step in range(200)])
    assert x[..., 0].equal(-x[..., 1])
    assert (x[:, 0, 0, 0] == 1).sum() == 500
