"""How good are generated digits? A classifier of MNIST, trained once for some minutes, reads them.

    python tests/classify.py out/cgan/generated out/conditional/generated   # a row for each
    python tests/classify.py --unlabelled out/gan/generated

A row shows how many images are read with a probability above 0.9, and, where image i was to show
digit i mod 10, how many are read as that digit."""
import argparse
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn
from torchvision.datasets import MNIST

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import data  # noqa: E402


def make_network():
    """Images (B, 1, 28, 28) in [-1, 1] -> logits (B, 10)."""
    layers = []
    for a, b in ((1, 32), (32, 64), (64, 64)):
        layers += [nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.3), nn.Linear(64 * 3 * 3, 10))


def train(net, batches, epochs=3):
    total = epochs * len(batches)
    opt = torch.optim.Adam(net.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, 4e-3, total)
    for x, y in map(batches, range(total)):
        opt.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        opt.step()
        schedule.step()


@torch.no_grad()
def classify(net, images, device):
    """Of uint8 images (N, 1, 28, 28): the digit that is read and its probability, both (N,)."""
    logits = [net(batch.to(device) / 127.5 - 1) for batch in images.split(1000)]
    probability, digit = torch.cat(logits).softmax(1).max(1)
    return digit.cpu(), probability.cpu()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", nargs="+", help="folders, .zip, .npy or .npz of 28 px digits")
    parser.add_argument("--unlabelled", action="store_true", help="no digit was asked for")
    parser.add_argument("--data_dir", default="data")
    parser.add_argument("--classifier", default="out/classifier.pt")
    args = parser.parse_args()
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    path = Path(args.classifier)
    torch.manual_seed(0)
    net = make_network().to(device)
    real, labels = data.load("mnist", 28, args.data_dir)
    if not path.exists():
        train(net, data.Batches(real, labels, 128, device=device))
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(net.state_dict(), path)
    net.eval().load_state_dict(torch.load(path, device, weights_only=True))
    test = MNIST(args.data_dir, train=False)
    digit, _ = classify(net, test.data[:, None], device)
    right = (digit == test.targets).float().mean()
    print(f"classifier: {right:.2%} of {len(test):,} test digits right\n")
    print("| images | | p > 0.9 | read as asked |\n|---|--:|--:|--:|")
    for source in args.images:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:
            images = data.load(source, 28, cache)[0].clone()
        digit, probability = classify(net, images, device)
        asked = (digit == torch.arange(len(digit)) % 10).float().mean()
        print(f"| {source} | {len(digit):,} | {(probability > 0.9).float().mean():.1%} "
              f"| {'' if args.unlabelled else f'{asked:.1%}'} |", flush=True)


if __name__ == "__main__":
    main()
