"""data.py: image sets, their cache, damaged files, batches, pictures, the log."""
import csv
import hashlib
import io
import os
import shutil
import struct
import zipfile
from pathlib import Path
from unittest.mock import Mock
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image

import data

OFFLINE = Mock(side_effect=URLError("no network"))


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def encode(color, mode="RGB", kind="PNG"):
    """The bytes of an image file of one colour."""
    file = io.BytesIO()
    Image.new(mode, (20, 20), color).save(file, kind)
    return file.getvalue()


def write(folder, files):
    for name, content in files.items():
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def brightness(images):
    return images.float().mean((1, 2, 3)).tolist()


# ---- image sets


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("inner", [".", "img_align_celeba"])
def test_celeba_layouts(zipped, inner):
    folder = "data/celeba/img_align_celeba"
    write(f"{folder}/{inner}", {f"{i:06}.png": encode((i, i, i)) for i in (3, 2, 1)})
    if zipped:
        shutil.make_archive(folder, "zip", folder)
        shutil.rmtree(folder)
    images, labels = data.load("celeba", 64)
    assert images.shape == (3, 3, 64, 64)
    assert brightness(images) == [1, 2, 3]
    assert labels is None


def test_celeba_is_downloaded_and_its_hash_checked(monkeypatch):
    write("a", {"1.png": encode("red")})
    archive = Path(shutil.make_archive("a", "zip", "a")).read_bytes()
    response = Mock(url=None, length=None)
    advice = "put img_align_celeba.zip into data/celeba, or try --data toy-faces"
    for urlopen in (OFFLINE, Mock(return_value=response)):  # the second file is a wrong one
        monkeypatch.setattr("urllib.request.urlopen", urlopen)
        with pytest.raises(OSError, match=advice):
            data.load("celeba", 16)
        assert not os.listdir("data/celeba")
    monkeypatch.setattr(data, "CELEBA_MD5", hashlib.md5(archive).hexdigest())
    assert len(data.load("celeba", 16)[0]) == 1
