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


def brightness(images):
    return images.float().mean((1, 2, 3)).tolist()


def load(*args, **kwargs):
    """The brightness of each image, and the labels."""
    images, labels = data.load(*args, **kwargs)
    return brightness(images), None if labels is None else labels.tolist()


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("folder", ["my set", "data/celeba/img_align_celeba"])
@pytest.mark.parametrize("names, expected", [
    (["img_align_celeba/1.png", "img_align_celeba/2.png"], None),
    (["1.png", "b/2.png", "c/3.png"], None), (["a/1.png", "a/b/2.png", "c/3.png"], None),
    (["in/cät [1]/x/1.bmp", "in/dog's, 2/1.png", "in/dog's, 2/2.webp"], [1, 0, 0]),
    (["test/cat/a.png", "test/dog/a.png", "training/cat/a.png", "training/dog/b.png"], [0, 1, 0, 1]),
    (["1/a.png", "10/a.png", "11/a.png", "2/a.png", "3/a.png"], [0, 3, 4, 1, 2])])
def test_folders_and_zips(names, expected, folder, zipped, capsys):
    for i, name in enumerate(names):
        save(f"{folder}/{name}", (i, i, i), "RGB")
    for hidden in (".a.png", ".git/a.png", "b/.ipynb_checkpoints/a.png"):
        save(f"{folder}/{hidden}", 99)
    Path(folder, "link.png").symlink_to("nowhere.png")
    source = shutil.make_archive(folder, "zip", folder) if zipped else folder
    if zipped:
        shutil.rmtree(folder)
    source = "celeba" if "celeba" in folder else source
    assert load(source, 16) == (list(range(len(names))), expected)
    assert data.load(source, 16)[0].shape[1:] == (3, 16, 16)
    shown = capsys.readouterr().err
    for name, label in zip(names, expected or []):
        assert f"{label} = {Path(name).parent.name}" in shown


def test_links_to_folders_are_followed_once(capsys):
    save("a/cat/1.png", 1)
    save("a/dog/2.png", 2)
    save("elsewhere/3.png", 3)
    for name, target in (("cat/again", "."), ("dog/up", ".."), ("ant", "cat"), ("pet", "cat"),
                         ("x", "../elsewhere"), ("y", "../elsewhere")):
        Path("a", name).symlink_to(target)
    assert load("a", 16) == ([1, 2, 3], [0, 1, 2])
    assert "0 = cat, 1 = dog, 2 = x" in capsys.readouterr().err


def test_a_zip_is_read_in_memory_and_each_name_once(tmp_path):
    save("a.png", 7)
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile("in.zip", "w") as archive:
        for name in ("a/b.png", "a/b.png", "../b.png", "/b.png", "n" * 300 + ".png"):
            archive.write("a.png", name)
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
    assert load("a", 4, limit=6) == ([0, 3, 6, 9, 12, 15], [0, 0, 1, 1, 2, 2])
    assert decode.call_count == 6
    assert load("a.npy", 6, limit=6)[0] == [0, 3, 6, 9, 12, 15]
    assert len(load("a", 4, limit=19)[0]) == len(load("a.npy", 6, limit=19)[0]) == 18


def zip_with(flag=0, method=0):
    """A .zip of one image whose headers claim this flag and this compression method."""
    with zipfile.ZipFile("a.zip", "w") as archive:
        archive.write("good/1.png")
    content = bytearray(Path("a.zip").read_bytes())
    for header, offset in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        place = content.index(header) + offset
        content[place], content[place + 2] = flag, method
    Path("a.zip").write_bytes(content)
    return "a.zip"


def test_what_cannot_be_read_is_named_with_the_reason(monkeypatch, capsys):
    save("good/1.png", 7)
    save("bad/deep.png", 300, "I;16")
    Image.new("L", (99, 99)).save("bad/huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 700)
    Path("bad/text.txt").write_text("text")
    for make, reason in (
            (lambda: "bad", "deep.png: .*8 bits.*huge.png: .*pixels.*text.txt: .*identify"),
            (lambda: zip_with(flag=1), "1.png: .*password"),
            (lambda: zip_with(method=9), "1.png: .*compression")):
        with pytest.raises(data.Error, match=reason) as error:
            data.load(make(), 16)
        assert len(str(error.value).splitlines()) == 1
    assert not os.listdir("data")
    save("bad/good.png", 7)
    assert load("bad", 16)[0] == [7]
    err = capsys.readouterr().err
    assert "3 of 4" in err and "deep.png" in err


def test_arrays():
    array = np.random.default_rng(0).integers(0, 256, (6, 20, 20, 3), np.uint8)
    np.save("colour.npy", array)
    np.savez("grey.npz", array[..., 0], other=np.zeros(3))
    assert (data.load("colour.npy", 20)[0].permute(0, 2, 3, 1).numpy() == array).all()
    assert (data.load("grey.npz", 20)[0][:, 0].numpy() == array[..., 0]).all()
    assert data.load("colour.npy", 16)[0].shape == (6, 3, 16, 16)


class Dangerous:
    def __reduce__(self):
        return Path.touch, (Path("executed"),)


WRONG = dict(  # arrays that are no sets of images
    pickle=np.array([Dangerous()]), float=np.zeros((2, 4, 4, 3)), empty=np.zeros((0, 4, 4, 3), "u1"),
    two=np.zeros((2, 4, 4, 2), "u1"), picture=np.zeros((64, 64, 3), "u1"),
    first=np.zeros((3, 64, 64), "u1"), rgba=np.zeros((64, 64, 4), "u1"), grey=np.zeros((64, 64), "u1"))


@pytest.mark.parametrize("name", [
    "nowhere", "cut.zip", "folder", "pickle.npz", "cut.npy", *[f"{key}.npy" for key in WRONG]])
def test_a_wrong_source_is_one_line_and_no_pickle_is_executed(name):
    Path("folder").mkdir()
    for key, array in WRONG.items():
        np.save(f"{key}.npy", array)
    np.savez("pickle.npz", WRONG["pickle"])
    for cut in ("cut.zip", "cut.npy"):
        Path(cut).write_bytes(b"PK\3\4")
    with pytest.raises(data.Error) as error:
        data.load(name, 4)
    assert len(str(error.value).splitlines()) == 1
    assert not Path("executed").exists()
    assert not list(Path("data").glob("*"))


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

    save("a/cat/1.bmp", 1)
    save("a/dog/2.bmp", 2)
    for name in ("a/cat/1.bmp", "a/dog/2.bmp"):
        os.utime(name, (2, 2))
    assert loaded() == ([1, 2], [0, 1], True)
    assert loaded() == ([1, 2], [0, 1], False)
    os.rename("a/cat", "a/zebra")
    assert loaded() == ([2, 1], [0, 1], True)
    save("a/dog/3.bmp", 3)
    assert loaded() == ([2, 3, 1], [0, 0, 1], True)
    os.utime("a/dog/3.bmp", (1, 1))  # another time, and nothing else
    assert loaded() == ([2, 3, 1], [0, 0, 1], True)
    images, _ = data.load("a", 16)
    images += 1  # in memory only
    assert loaded() == ([2, 3, 1], [0, 0, 1], False)


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


def test_two_builds_of_a_cache_at_once_do_no_harm(monkeypatch):
    decode, seen = data.decode_image, []

    def decode_image(root, name, **kwargs):
        if name == "2.png" and not seen:
            seen.append(name)
            with monkeypatch.context() as patch:  # another process builds it meanwhile
                patch.setattr(os, "getpid", lambda: 0)
                assert load("a", 16)[0] == [1, 2]
        return decode(root, name, **kwargs)

    save("a/1.png", 1)
    save("a/2.png", 2)
    monkeypatch.setattr(data, "decode_image", decode_image)
    assert load("a", 16)[0] == load("a", 16)[0] == [1, 2]
    assert seen and len(os.listdir("data")) == 2


def test_a_named_set_takes_precedence_over_a_folder_of_that_name():
    for name in data.NAMED:
        save(f"{name}/1.png", 9)
    save("data/celeba/img_align_celeba/1.png", 7)
    assert load("celeba", 16)[0] == [7]
    assert data.load("toy-digits", 16, limit=3)[0].shape == (3, 1, 16, 16)
    with pytest.raises(data.Error, match="MNIST"):  # offline
        data.load("mnist", 16)


def test_celeba_is_downloaded_from_either_address_and_its_hash_checked(monkeypatch):
    class Response(io.BytesIO):
        url = length = None

    advice = "img_align_celeba.zip into data/celeba"
    with pytest.raises(data.Error, match=advice):  # offline
        data.load("celeba", 16)
    save("a/1.png", 7)
    archive = Path(shutil.make_archive("a", "zip", "a")).read_bytes()
    served = dict.fromkeys(data.CELEBA_URLS, b"<html>moved</html>")
    monkeypatch.setattr("urllib.request.urlopen",
                        lambda request: Response(served[request.full_url]))
    with pytest.raises(data.Error, match=advice):  # another hash
        data.load("celeba", 16)
    assert not os.listdir("data/celeba")
    monkeypatch.setattr(data, "CELEBA_MD5", hashlib.md5(archive).hexdigest())
    served[data.CELEBA_URLS[1]] = archive
    assert load("celeba", 16)[0] == [7]


def test_mnist():
    def write(images, labels):
        for part in ("train", "t10k"):
            Path(f"data/MNIST/raw/{part}-images-idx3-ubyte").write_bytes(images)
            Path(f"data/MNIST/raw/{part}-labels-idx1-ubyte").write_bytes(labels)

    advice = "four files into data/MNIST/raw"
    with pytest.raises(data.Error, match=advice):  # offline
        data.load("mnist", 28)
    header = np.array([2051, 3, 28, 28], ">i4").tobytes()
    for damaged in (b"", b"<html>not found</html>", header + bytes(5)):
        write(damaged, damaged)
        with pytest.raises(data.Error, match=advice):
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


def test_an_epoch_is_a_permutation_decided_by_seed_and_epoch():
    labels = torch.arange(103)
    images = labels.byte().view(103, 1, 1, 1)

    def order(epoch, *args, **kwargs):
        batches = data.Batches(images, labels, 10, *args, **kwargs)
        steps = range(10 * epoch, 10 * epoch + len(batches))
        return torch.cat([batches(step)[1] for step in steps]).tolist()

    state = torch.get_rng_state()
    first = order(0)
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


def test_processes_share_a_batch():
    images = torch.arange(20, dtype=torch.uint8).view(20, 1, 1, 1)
    whole = data.Batches(images, None, 6, seed=3)
    for world in (2, 3):
        parts = [data.Batches(images, None, 6, seed=3, rank=r, world=world) for r in range(world)]
        assert len(parts[0]) == len(whole) == 3
        for step in (0, 4, 2):
            assert torch.cat([part(step)[0] for part in parts]).equal(whole(step)[0])
    with pytest.raises(data.Error, match="multiple of 4"):
        data.Batches(images, None, 6, rank=0, world=4)


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


def test_grid_is_row_by_row():
    images = torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1).expand(6, 3, 4, 4)
    data.save_grid(images, Path("new/grid.png"), columns=3)
    assert np.asarray(Image.open("new/grid.png"))[4::6, 4::6, 0].tolist() == [[0, 1, 2], [3, 4, 5]]
