"""What the tests share: a tiny data set, and a way to run a script."""
import os
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)  # the networks here are too small for more
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}  # of processes that a test starts

TINY = {  # flags that make a step take milliseconds
    "dcgan": "--image_size 16 --width 4 --latent 8 --batch_size 8".split(),
    "cgan": "--image_size 16 --width 4 --latent 8 --batch_size 8 --no-conditional".split(),
    "ddpm": ("--image_size 16 --channels 16 --mults 1 2 --attention 8 --batch_size 8 "
             "--timesteps 30").split(),
}


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """48 smooth random colour images of 16 px as a .npy file: six batches of eight."""
    path = tmp_path_factory.mktemp("data") / "images.npy"
    small = torch.rand(48, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    large = torch.nn.functional.interpolate(small, size=16, mode="bilinear")
    np.save(path, large.mul(255).byte().permute(0, 2, 3, 1).numpy())
    return path


@pytest.fixture
def run(images, monkeypatch):
    """run("dcgan", out_dir, *flags): the script in this process, as by `python dcgan.py flags`.

    A new run takes the tiny flags above and draws no pictures, unless its flags say otherwise. The
    script may also be the path of an edited copy. Returns the script's global names at its end.
    """
    def run(script, out, *flags, data=images):
        path = ROOT / f"{script}.py" if script in TINY else Path(script)
        flags = ["--out_dir", out, "--log_every", 2, "--sample_every", 0, *flags]
        if "--resume" not in flags and "--sample" not in flags:
            flags = ["--data", data, *TINY[path.stem], *flags]
        monkeypatch.setattr(sys, "argv", [str(path), *[str(flag) for flag in flags]])
        return runpy.run_path(str(path), run_name="__main__")

    return run


class Payload:
    """Unpickled, it creates the file "executed"."""

    def __reduce__(self):
        return Path.touch, (Path("executed"),)


def checkpoint(out):
    return torch.load(out / "ckpt.pt", weights_only=True)


def tensors(state):
    """All tensors in nested dicts and lists, in order."""
    if isinstance(state, dict):
        state = list(state.values())
    if isinstance(state, list):
        return [tensor for part in state for tensor in tensors(part)]
    return [state] if isinstance(state, torch.Tensor) else []


def same(a, b):
    """Whether two checkpoints hold the same tensors, bit for bit."""
    pairs = zip(tensors(a), tensors(b), strict=True)
    return all(torch.equal(one, other) for one, other in pairs)


def log_rows(out):
    """The rows of log.csv as text, without time."""
    lines = (out / "log.csv").read_text("utf-8").splitlines()
    return [line.split(",")[:2] + line.split(",")[3:] for line in lines]


def pictures(folder):
    """The bytes of all pictures in a folder, by file name."""
    return {file.name: file.read_bytes() for file in folder.glob("*.png")}
