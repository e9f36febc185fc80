"""Data sets, the root set and the partition."""

import gzip
from pathlib import Path

import pytest
import torch

from skymask_gpu.federation.data import load_dataset, split_root
from skymask_gpu.federation.partition import partition


def test_digits_is_bundled() -> None:
    digits = load_dataset("digits")
    assert digits.train_inputs.shape == (1437, 1, 8, 8)
    assert len(digits.test_labels) == 360
    assert digits.train_inputs.mean().abs() < 0.05


def test_mnist_reads_the_standard_files(mnist_dir: Path) -> None:
    mnist = load_dataset("mnist", mnist_dir)
    assert mnist.train_inputs.shape == (60_000, 1, 28, 28)
    assert mnist.test_inputs.shape == (10_000, 1, 28, 28)
    assert abs(mnist.train_inputs.mean().item()) < 1e-3
    assert abs(mnist.train_inputs.std().item() - 1) < 1e-3
    assert mnist.train_labels.bincount().tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]


def test_idx_files_may_be_plain(mnist_dir: Path, tmp_path: Path) -> None:
    for file in mnist_dir.glob("*.gz"):
        (tmp_path / file.stem).write_bytes(gzip.decompress(file.read_bytes()))
    assert torch.equal(load_dataset("mnist", tmp_path).test_labels, load_dataset("mnist", mnist_dir).test_labels)


def test_bad_data_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.dataset must be one of digits, mnist, got 'imagenet'"):
        load_dataset("imagenet")
    with pytest.raises(ValueError, match=r"data\.data_dir must name the folder that holds train-images-idx3-ubyte"):
        load_dataset("mnist")
    with pytest.raises(ValueError, match=r"data\.data_dir must hold train-images-idx3-ubyte or .*gz, neither is in"):
        load_dataset("mnist", tmp_path)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03" + b"\0\0\0\x02" * 3 + b"x")
    with pytest.raises(ValueError, match="train-images-idx3-ubyte is no whole IDX file"):
        load_dataset("mnist", tmp_path)


@pytest.mark.parametrize("num_samples", [100, 105])
def test_the_root_set_is_balanced_and_apart(num_samples: int, generator: torch.Generator) -> None:
    labels = load_dataset("digits").train_labels
    root, rest = split_root(labels, num_samples, generator)
    assert sorted(torch.cat([root, rest]).tolist()) == list(range(len(labels)))
    counts = labels[root].bincount(minlength=10)
    assert counts.max() - counts.min() <= (0 if num_samples % 10 == 0 else 1)
    with pytest.raises(ValueError, match=r"data\.root_samples must be between 1 and 1436, got 1437"):
        split_root(labels, 1437, generator)


def test_bias_q_sends_a_share_q_of_each_label_to_its_own_group(generator: torch.Generator) -> None:
    labels = torch.arange(60_000) % 10
    for bias in (0.1, 0.5, 0.9):
        parts = partition(labels, 50, bias, generator)
        assert sorted(torch.cat(parts).tolist()) == list(range(60_000))
        own = sum(int((labels[part] == client % 10).sum()) for client, part in enumerate(parts)) / 60_000
        assert abs(own - bias) < 0.01
        # what does not stay goes to each other group alike
        others = torch.stack([(labels[torch.cat(parts[1::10])] == label).sum() for label in range(10) if label != 1])
        assert others.float().std() / others.float().mean() < 0.12


def test_bad_partitions_are_named(generator: torch.Generator) -> None:
    labels = torch.arange(100) % 10
    with pytest.raises(ValueError, match=r"data\.bias must be between 0 and 1, got 2"):
        partition(labels, 20, 2, generator)
    with pytest.raises(ValueError, match=r"data\.clients must be at least 10, one a label, got 5"):
        partition(labels, 5, 0.5, generator)
    with pytest.raises(ValueError, match=r"of 90 clients would hold no sample"):
        partition(labels, 90, 0.5, generator)
