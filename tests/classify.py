"""How good are generated digits? A classifier of MNIST reads them.

    python cgan.py --sample 10000 && python tests/classify.py out/cgan/generated
    python tests/classify.py out/gan/generated --unlabelled

It prints how many images are read with a probability above 0.9, and the share of the rarest digit.
Of images with all classes in turn (image i shows digit i mod 10), it also prints how many are read
as that digit, and the mean distance between images of a digit, relative to that of real ones. With
--unlabelled, it prints the share of each digit instead.

The classifier is trained once, for some minutes, on the 60,000 training digits. It should read 99 %
or more of the 10,000 test digits.
"""
import argparse
import sys
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


def train(net, data_dir, device):
    get_batch = data.Batches(*data.load("mnist", 28, data_dir), 128, device=device)
    total = 3 * len(get_batch)  # three epochs
    opt = torch.optim.Adam(net.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, 4e-3, total)
    for step in range(total):
        x, y = get_batch(step)
        opt.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        opt.step()
        schedule.step()


@torch.no_grad()
def classify(net, images, device):
    """Probabilities (N, 10) of uint8 images (N, 1, 28, 28)."""
    batches = [batch.to(device) / 127.5 - 1 for batch in images.split(1000)]
    return torch.cat([net(batch).softmax(1).cpu() for batch in batches])


def spread(images):
    return torch.pdist(images[:1000].flatten(1).float()).mean()  # mean distance of two images


def by_digit(values, form):
    return ", ".join(f"{digit}: {value:{form}}" for digit, value in enumerate(values))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", help="folder, .zip, .npy or .npz of 28 px digits")
    parser.add_argument("--unlabelled", action="store_true", help="no digit was asked for")
    parser.add_argument("--data_dir", default="data")
    parser.add_argument("--classifier", default="out/classifier.pt")
    args = parser.parse_args()

    images, _ = data.load(args.images, 28, args.data_dir)
    device, path = data.pick_device()[0], Path(args.classifier)
    torch.manual_seed(0)
    net = make_network().to(device)
    if not path.exists():
        print("training the classifier (once)", file=sys.stderr)
        train(net, args.data_dir, device)
        with data.replacing(path) as tmp:
            torch.save(net.state_dict(), tmp)
    net.eval().load_state_dict(torch.load(path, device, weights_only=True))

    test = MNIST(args.data_dir, train=False)
    right = classify(net, test.data[:, None], device).argmax(1) == test.targets
    print(f"classifier: {right.float().mean():.2%} of {len(right):,} test digits right")
    probability, digit = classify(net, images, device).max(1)
    sure = (probability > 0.9).float().mean()
    print(f"{len(images):,} images, {sure:.2%} read with a probability above 0.9")
    shares = digit.bincount(minlength=10) / len(digit)
    print(f"rarest digit: {shares.min():.2%} ({shares.argmin()})")
    if args.unlabelled:
        print("of each digit:", by_digit(shares, ".1%"))
        return
    asked = torch.arange(len(images)) % 10
    right = (digit == asked).float()
    print(f"read as asked: {right.mean():.2%}; by digit:",
          by_digit([right[asked == c].mean() for c in range(10)], ".1%"))
    real, labels = data.load("mnist", 28, args.data_dir)
    ratios = [spread(images[asked == c]) / spread(real[labels == c]) for c in range(10)]
    print(f"distance within a digit, relative to real ones: {sum(ratios) / 10:.2f}; by digit:",
          by_digit(ratios, ".2f"))


if __name__ == "__main__":
    main()
