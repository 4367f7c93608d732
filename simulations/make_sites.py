"""Split a data set into one file for each site of a federation on trial.

    python make_sites.py sites --names hospital-a hospital-b hospital-c --alpha 0.5

Every file is what a SuperNode's ``data-path`` points to: an ``.npz`` with ``images`` (bytes of
shape n, channels, height, width) and ``labels``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from fusion_simulation.data import DATASETS, dirichlet_partition, load_raw_split


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path, help="where the files go")
    parser.add_argument("--names", nargs="+", required=True, metavar="NAME", help="names of sites")
    parser.add_argument("--dataset", choices=sorted(DATASETS), default="digits")
    parser.add_argument("--data-dir", default="", help="torchvision's data folder")
    parser.add_argument("--alpha", type=float, default=0.5, help="of the Dirichlet partition")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    raw = load_raw_split(arguments.dataset, train=True, data_dir=arguments.data_dir)
    generator = np.random.default_rng(arguments.seed)
    shares = dirichlet_partition(
        raw.labels.numpy(), arguments.alpha, len(arguments.names), generator
    )
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for name, share in zip(arguments.names, shares, strict=True):
        own = raw.subset(share)
        path = arguments.folder / f"{name}.npz"
        np.savez_compressed(path, images=own.images.numpy(), labels=own.labels.numpy())
        counts = np.bincount(own.labels.numpy(), minlength=10)
        print(f"wrote {path}: {len(own)} images; of the labels {counts.tolist()}")


if __name__ == "__main__":
    main()
