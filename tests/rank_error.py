"""BiLP's rank error (arXiv:2305.18381, supplement Sec. 2): how far the ranks of real images by the Taylor
form of their treatment effect are from those by leaving each one out. The paper: 2.7 % on CIFAR-10 at 10
images a class.

python -m tests.rank_error --dataset cifar10 --ipc 10
python -m tests.rank_error                                  # on shapes: a minute, no download
"""
import argparse
import statistics

import torch
from torch import nn

from models import build_model
from utils.augment import normalize
from utils.data import describe, load_split
from utils.device import pick_device
from utils.dm import dm_loss, ite_norms
from utils.run import generator


def leave_one_out_norms(embed, synthetic, features):
    """||ITE||_2 of the N real images of a class with these features [N, d], as BiLP defines it
    (utils/dm.py: ite_norms), at the cost of N + 1 gradients; synthetic [n, 3, S, S] is D_s.   -> [N]"""
    synthetic = synthetic.detach().requires_grad_()
    embedded = embed(synthetic)

    def gradient(real):
        return torch.autograd.grad(dm_loss(real, embedded), synthetic, retain_graph=True)[0]

    whole = gradient(features)
    return torch.stack([(whole - gradient(torch.cat([features[:i], features[i + 1:]]))).norm()
                        for i in range(len(features))])


def rank_error(values, others):
    """sum |r_i - r'_i| / (N (N - 1)) over the ranks of two scores of N samples (BiLP, supplement Sec. 2): 0
    for the same order, 1/3 on average for a random one."""
    ranks, other_ranks = (scores.argsort().argsort() for scores in (values, others))
    return (ranks - other_ranks).abs().sum().item() / (len(values) * (len(values) - 1))


def rank_errors(split, mean_std, *, ipc, batch, products, seed=0):
    """The rank error of each class: `batch` of its images, for `ipc` others of them as synthetic images and a
    fresh ConvNet. mean_std [2, 3] on the device"""
    torch.manual_seed(generator("rank error", seed).initial_seed())
    network = build_model("convnet_w128", len(split.classes), split.image_size)
    embed = nn.Sequential(*list(network)[:-1]).to(mean_std.device).requires_grad_(False)
    for label in range(len(split.classes)):
        members = (split.labels.cpu() == label).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=generator("rank error", seed, label))]
        synthetic, real = (normalize(split.read(rows).to(mean_std.device), *mean_std)
                           for rows in (members[:ipc], members[ipc:ipc + batch]))
        with torch.no_grad():
            features = embed(real)
        yield rank_error(ite_norms(embed, synthetic, features, products),
                         leave_one_out_norms(embed, synthetic, features))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="shapes")
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--ipc", type=int, default=10)
    parser.add_argument("--batch", type=int, default=128, help="real images of a class that are ranked")
    parser.add_argument("--products", type=int, default=16,
                        help="directions of the Taylor form, see utils/dm.py")
    parser.add_argument("--classes", type=int, default=10, help="of so many classes, the first ones")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args(argv)
    device, split = pick_device(args.device, "fp32"), load_split(args.dataset, args.data_dir, "train")
    data = describe(args.dataset, args.data_dir)
    mean_std, errors = torch.tensor([data["mean"], data["std"]], device=device), []
    every = rank_errors(split, mean_std, ipc=args.ipc, batch=args.batch, products=args.products)
    for name, error in zip(split.classes[:args.classes], every):
        print(f"{name:<12} {100 * error:5.2f} %", flush=True)
        errors.append(error)
    print(f"{'mean':<12} {100 * statistics.fmean(errors):5.2f} %   (0 for equal ranks, 33.3 % for random "
          f"ones)")


if __name__ == "__main__":
    main()
