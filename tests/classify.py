"""How good are generated digits? A classifier of MNIST, trained once for some minutes, reads them.

    python tests/classify.py out/cgan/generated out/conditional/generated   # a row for each
    python tests/classify.py --unlabelled out/gan/generated

A row shows how many images are read with a probability above 0.9, the share of the rarest digit,
and the Frechet distance between the classifier's features of the images and of the 10,000 test
digits (compare it only between equally many images). Where image i shows digit i mod 10, it also
shows how many are read as that digit, and the variety: the mean distance between images of a digit,
relative to real ones."""
import argparse
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn
from torchvision.datasets import MNIST

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import data  # noqa: E402
import fid  # noqa: E402


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
    """Of uint8 images (N, 1, 28, 28): features (N, 576), and probabilities (N, 10)."""
    batches = [batch.to(device) / 127.5 - 1 for batch in images.split(1000)]
    features = torch.cat([net[:-1](batch) for batch in batches])
    return features.cpu(), net[-1](features).softmax(1).cpu()


def spread(images):
    return torch.pdist(images[:1000].flatten(1).float()).mean()  # mean distance of two images


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
    test_features, probability = classify(net, test.data[:, None], device)
    right = (probability.argmax(1) == test.targets).float().mean()
    print(f"classifier: {right:.2%} of {len(test):,} test digits right\n")
    reference = fid.statistics(test_features.split(1000), nn.Identity())
    real_spread = [spread(real[labels == digit]) for digit in range(10)]
    print("| images | | p > 0.9 | rarest digit | Frechet distance | read as asked | variety |\n"
          "|---|--:|--:|--:|--:|--:|--:|")
    for source in args.images:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:
            images = data.load(source, 28, cache)[0].clone()
        features, probability = classify(net, images, device)
        statistics = fid.statistics(features.split(1000), nn.Identity())
        probability, digit = probability.max(1)
        shares = digit.bincount(minlength=10) / len(digit)
        print(f"| {source} | {len(images):,} | {(probability > 0.9).float().mean():.2%} "
              f"| {shares.min():.2%} ({shares.argmin()}) "
              f"| {fid.frechet_distance(*statistics, *reference):.1f} |", end="")
        if args.unlabelled:
            print(" | |")
        else:
            asked = torch.arange(len(images)) % 10
            ratios = [spread(images[asked == c]) / real_spread[c] for c in range(10)]
            print(f" {(digit == asked).float().mean():.2%} | {sum(ratios) / 10:.2f} |", flush=True)


if __name__ == "__main__":
    main()
