"""How good are generated digits? A classifier of MNIST reads them.

    python cgan.py --sample 10000 && python tests/classify.py out/cgan/generated
    python tests/classify.py out/gan/generated --unlabelled

Of images that were written with all classes in turn (image i shows digit i mod 10) it prints how
many are read as the digit asked for, and how much samples of a digit differ: their mean distance,
relative to that of real ones. With --unlabelled: how often each digit occurs. In both cases: how
many are read with a probability above 0.9.

The classifier is a small convolutional network, trained once (about two minutes on 2 CPU cores) on
the 60,000 training digits and kept in out/classifier.pt; its accuracy on the 10,000 test digits is
printed and must be 99 % or more.
"""
import argparse
import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import data  # noqa: E402


def network():
    """Images (B, 1, 28, 28) in [-1, 1] -> logits (B, 10)."""
    def block(a, b):
        return [nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(True), nn.MaxPool2d(2)]

    return nn.Sequential(*block(1, 32), *block(32, 64), *block(64, 64), nn.Flatten(),
                         nn.Dropout(0.3), nn.Linear(64 * 9, 10))


def train(data_dir, device, epochs=3):
    images, labels = data.load("mnist", 28, data_dir, device=device)
    torch.manual_seed(0)
    net = network().to(device)
    steps = epochs * (len(images) // 128)
    opt = torch.optim.Adam(net.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, 4e-3, steps)
    for epoch in range(epochs):
        for x, y in data.batches(images, labels, 128, 0, epoch, device):
            opt.zero_grad()
            cross_entropy(net(x), y).backward()
            opt.step()
            schedule.step()
    return net


@torch.no_grad()
def probabilities(net, images):
    """uint8 (N, 1, 28, 28) -> (N, 10)."""
    device = next(net.parameters()).device
    parts = images.split(1000)
    return torch.cat([net(p.to(device) / 127.5 - 1).softmax(1).cpu() for p in parts])


def spread(images):
    """The mean distance between two of the images."""
    x = images[:1000].flatten(1).float()
    return torch.pdist(x).mean().item()


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", help="folder, .zip, .npy or .npz of 28 px digits")
    parser.add_argument("--unlabelled", action="store_true", help="no digit was asked for")
    parser.add_argument("--data_dir", default="data")
    parser.add_argument("--classifier", default="out/classifier.pt")
    args = parser.parse_args()

    device, path = data.pick_device(), Path(args.classifier)
    if path.exists():
        net = network().to(device)
        net.load_state_dict(torch.load(path, map_location=device, weights_only=True))
    else:
        print("training the classifier (once)", file=sys.stderr)
        net = train(args.data_dir, device)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(net.state_dict(), path)
    net.eval()

    from torchvision.datasets import MNIST

    test = MNIST(args.data_dir, train=False)
    right = probabilities(net, test.data[:, None]).argmax(1) == test.targets
    print(f"classifier: {right.float().mean():.2%} of {len(right):,} test digits right")
    images, _ = data.load(args.images, 28, args.data_dir)
    p = probabilities(net, images)
    sure, read = p.max(1)
    share = (sure > 0.9).float().mean()
    print(f"{len(images):,} images, {share:.2%} read with a probability above 0.9")
    if args.unlabelled:
        shares = read.bincount(minlength=10) / len(read)
        print("of each digit:", ", ".join(f"{i}: {s:.1%}" for i, s in enumerate(shares)))
        print(f"rarest digit: {shares.min():.2%}")
        return
    asked = torch.arange(len(images)) % 10
    hits = [(read[asked == c] == c).float().mean().item() for c in range(10)]
    print(f"read as asked: {(read == asked).float().mean():.2%}; by digit:",
          ", ".join(f"{c}: {h:.1%}" for c, h in enumerate(hits)))
    real, labels = data.load("mnist", 28, args.data_dir)
    ratios = [spread(images[asked == c]) / spread(real[labels == c]) for c in range(10)]
    print(f"distance within a digit, relative to real ones: {sum(ratios) / 10:.2f}; by digit:",
          ", ".join(f"{c}: {r:.2f}" for c, r in enumerate(ratios)))


if __name__ == "__main__":
    main()
