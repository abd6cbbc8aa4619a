"""What the tests share: a tiny data set, and two ways to run a script."""
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)  # the nets here are too small for more, and CI machines are shared

TINY = {  # flags that make a script take milliseconds a step
    "dcgan": ["--image_size", "16", "--width", "4", "--latent", "8", "--batch_size", "8"],
    "cgan": ["--image_size", "16", "--width", "4", "--latent", "8", "--batch_size", "8",
             "--no-conditional"],
    "ddpm": ["--image_size", "16", "--channels", "8", "--mults", "1", "2", "--attention", "8",
             "--batch_size", "8", "--timesteps", "30"],
}


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """48 smooth random colour images of 16 px as an .npy file: six batches of eight."""
    path = tmp_path_factory.mktemp("data") / "images.npy"
    small = torch.rand(48, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    large = torch.nn.functional.interpolate(small, size=16, mode="bilinear")
    np.save(path, large.mul(255).byte().permute(0, 2, 3, 1).numpy())
    return path


@pytest.fixture
def run(images):
    """run(module, out_dir, *flags): a script's main() in this process; returns its exit status.

    A new run takes the tiny flags above and draws no pictures, unless its flags say otherwise.
    """
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]

    def run(module, out, *flags, data=images):
        flags = ["--out_dir", str(out), "--log_every", "2", "--sample_every", "0", *map(str, flags)]
        if not {"--resume", "--sample"} & set(flags):
            flags = ["--data", str(data), *TINY[module.__name__], *flags]
        with pytest.MonkeyPatch.context() as patch:
            for name, value in module.parse_flags(flags).items():
                patch.setattr(module, name, value)
            return module.main()

    yield run
    for number, handler in zip((signal.SIGINT, signal.SIGTERM), before):
        signal.signal(number, handler)


def command(script, *flags, **options):
    """The arguments of subprocess.run and Popen for `python script flags`."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return dict(args=[sys.executable, str(ROOT / f"{script}.py"), *map(str, flags)], env=env,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def checkpoint(out):
    return torch.load(out / "ckpt.pt", weights_only=True)


def tensors(state, prefix=""):
    """All tensors of a nested state, by path."""
    if isinstance(state, torch.Tensor):
        return {prefix: state}
    items = dict(enumerate(state)) if isinstance(state, (list, tuple)) else state
    items = items.items() if isinstance(items, dict) else ()
    return {k: v for name, part in items for k, v in tensors(part, f"{prefix}/{name}").items()}


def same(a, b):
    """Whether two checkpoints hold the same tensors, bit for bit."""
    a, b = tensors(a), tensors(b)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def log_rows(out):
    """log.csv without the columns of time."""
    lines = (out / "log.csv").read_text("utf-8").splitlines()
    return [line.split(",")[:2] + line.split(",")[4:] for line in lines]
