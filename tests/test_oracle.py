"""The samplers of ddpm.py on data N(0, 0.2^2), where the best prediction of eps is known exactly.

    python tests/test_oracle.py     # the std of 100,000 samples; the right value is 0.2

So the table shows the error of the sampler alone, without the error of a network.
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ddpm import make_alpha_bar, sample  # noqa: E402

STD = 0.2
WAYS = {(1, 1): "DDPM", (0, 1): "DDIM", (0, 2): "DPM-Solver++(2M)", (1, 2): "stochastic 2M"}


def exact_eps(alpha_bar, mean=0.0, std=STD):
    """E[eps | x_t] for data N(mean, std^2): eps and x_t are jointly Gaussian."""
    def predict(x, t):
        a = alpha_bar[t].view(-1, 1)
        return (1 - a).sqrt() * (x - a.sqrt() * mean) / (a * std**2 + 1 - a)
    return predict


def sample_std(eta, order, num_steps, num):
    """The std of `num` samples, with the linear schedule."""
    torch.manual_seed(0)
    alpha_bar = make_alpha_bar("linear", 1000)
    for x in sample(exact_eps(alpha_bar), torch.randn(num, 1), alpha_bar, num_steps, eta, order):
        pass
    return x.std().item()


def test_order_2_is_closer_with_50_steps():
    for eta in (0, 1):
        errors = [abs(sample_std(eta, order, 50, 20_000) - STD) for order in (1, 2)]
        assert errors[1] < errors[0] / 2


if __name__ == "__main__":
    steps = (10, 20, 50, 100, 1000)
    print(f"{'eta, order':26}", *[f"{n:>6}" for n in steps], " steps")
    for (eta, order), name in WAYS.items():
        row = [f"{sample_std(eta, order, n, 100_000):6.3f}" for n in steps]
        print(f"{f'{eta}, {order}  {name}':26}", *row)
