"""Each of the examples runs, shortened, on real images (or, where those cannot be had, on files of the same layout)."""

import csv
import dataclasses
import importlib.util
import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from skymask_gpu.federation.attacks import ATTACKS
from skymask_gpu.federation.config import RunConfig, read_config, read_grid
from skymask_gpu.federation.datasets import Dataset, load_dataset
from skymask_gpu.federation.playing import play
from skymask_gpu.federation.rules import RULES
from skymask_gpu.federation.simulation import Federation

# these are no runs; test_board.py, test_leak.py and test_arena.py read them
OTHERS = ("board", "leak")
ARENAS = ("arena", "arena_short", "backdoors_trained", "masked_mean")
EXAMPLES = [path.stem for path in sorted((Path(__file__).parents[2] / "examples").glob("*.toml"))]
EXAMPLES = [name for name in EXAMPLES if not name.startswith(OTHERS) and name not in ARENAS]


def read_runs(path: Path) -> list[RunConfig]:
    return read_grid(path) if "[grid]" in path.read_text() else read_config(path)


@pytest.fixture(scope="session")
def dataset_of(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Dataset]:
    """A data set by name, its first samples only."""
    made: dict[str, Dataset] = {}

    def load(name: str) -> Dataset:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            if name in ("mnist", "fashion-mnist"):
                folder = data_dir / "mnist"  # the same layout
            elif name.startswith("cifar"):
                write_cifar(data_dir / "cifar10" / "cifar10-jpeg.tar.xz", folder, fine=name == "cifar100")
            elif name == "har":
                write_har(folder)
            made[name] = shortened(load_dataset(name, folder))
        return made[name]

    return load


def shortened(dataset: Dataset) -> Dataset:
    subjects = dataset.train_subjects
    return dataclasses.replace(
        dataset,
        train_inputs=dataset.train_inputs[:3000],
        train_labels=dataset.train_labels[:3000],
        test_inputs=dataset.test_inputs[:100],
        test_labels=dataset.test_labels[:100],
        train_subjects=None if subjects is None else subjects[:3000],
    )


def write_cifar(archive: Path, folder: Path, *, fine: bool) -> None:
    """Real CIFAR-10 images (through JPEG) in the binary layout, the first of each class; labels modulo 100 for CIFAR-100's."""
    if not archive.exists():
        pytest.skip(f"no real data: no {archive}")
    image = pytest.importorskip("PIL.Image", reason="JPEG files need Pillow")
    records: list[bytes] = []
    classes: dict[str, int] = {}
    with tarfile.open(archive) as files:
        for member in files:
            if not member.name.endswith(".jpg"):
                continue
            label = classes.setdefault(member.name.split("/")[-2], len(classes))
            if int(Path(member.name).stem) % 100:
                continue
            data = files.extractfile(member)
            assert data is not None
            pixels = np.asarray(image.open(io.BytesIO(data.read())).convert("RGB")).transpose(2, 0, 1).tobytes()
            records.append(bytes([label] * (1 + fine)) + pixels)
            if len(records) >= 500:
                break
    if fine:
        target = folder / "cifar-100-binary"
        target.mkdir()
        (target / "train.bin").write_bytes(b"".join(records))
        (target / "test.bin").write_bytes(b"".join(records[:50]))
        return
    target = folder / "cifar-10-batches-bin"
    target.mkdir()
    for part in range(5):
        (target / f"data_batch_{part + 1}.bin").write_bytes(b"".join(records[part::5]))
    (target / "test_batch.bin").write_bytes(b"".join(records[:50]))


def write_har(folder: Path) -> None:
    """30 subjects, six activities, 561 features, in the layout of the CSV pair."""
    draw = np.random.default_rng(0)
    activities = ["LAYING", "SITTING", "STANDING", "WALKING", "WALKING_DOWNSTAIRS", "WALKING_UPSTAIRS"]
    for name, subjects in (("train.csv", range(1, 22)), ("test.csv", range(22, 31))):
        with (folder / name).open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow([*(f"feature {i}" for i in range(561)), "subject", "Activity"])
            for subject in subjects:
                for sample in range(24):
                    features = draw.normal(sample % 6 / 3, 1, 561).round(3)
                    rows.writerow([*features, subject, activities[sample % 6]])


def shorten(config: RunConfig) -> RunConfig:
    clients = 30 if config.data.partition == "subject" else 20
    return dataclasses.replace(
        config,
        rounds=1,
        # The one round is attacked, whenever the example's attackers come.
        attack=config.attack.in_every_round(),
        data=dataclasses.replace(config.data, clients=clients, root_samples=30),
        local=dataclasses.replace(config.local, steps=1, batch_size=4),
    )


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs(name: str, checkout: Path, tmp_path: Path, dataset_of: Callable[[str], Dataset]) -> None:
    runs = read_runs(checkout / "examples" / f"{name}.toml")
    dataset = dataset_of(runs[0].data.dataset)
    # the first, the last and one between; the attacks_* ones together try every rule
    offset = EXAMPLES.index(name)
    for config in {
        runs[0].name: runs[0],
        runs[-1].name: runs[-1],
        runs[offset % len(runs)].name: runs[offset % len(runs)],
    }.values():
        (record,) = play(Federation.build(shorten(config), dataset), tmp_path / config.name)
        assert 0 <= record["accuracy"] <= 1
        assert record["participants"] == shorten(config).data.clients


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_takes_a_round_on_mnist(
    rule: str, checkout: Path, tmp_path: Path, dataset_of: Callable[[str], Dataset]
) -> None:
    cells = [cell for name in ("attacks_mnist", "rules_mnist") for cell in read_runs(checkout / "examples" / f"{name}.toml")]
    (config,) = [c for c in cells if c.attack.name == "min-max" and c.defence.rule == rule]
    (record,) = play(Federation.build(shorten(config), dataset_of("mnist")), tmp_path)
    assert record["accuracy"] > 0


def test_the_examples_name_every_attack_and_rule(checkout: Path) -> None:
    runs = [run for name in EXAMPLES for run in read_runs(checkout / "examples" / f"{name}.toml")]
    assert {run.attack.name for run in runs} == set(ATTACKS)
    assert {run.defence.rule for run in runs} == set(RULES)
    assert len(read_runs(checkout / "examples" / "malicious_shares.toml")) == 120
    assert torch.tensor([run.data.clients for run in runs]).max() == 500


def test_adapters_of_a_frozen_transformer_are_judged(checkout: Path, capsys: pytest.CaptureFixture) -> None:
    spec = importlib.util.spec_from_file_location("lora_vit", checkout / "examples" / "lora_vit.py")
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    example.ROUNDS = 1
    example.main()
    before, sizes, round_1 = capsys.readouterr().out.splitlines()
    assert "1,354 parameters of 19,114" in sizes
    assert "16 of 20 clients kept, 4 rejected (0, 1, 2, 3)" in round_1
    assert float(round_1.split()[-1].rstrip("%")) > float(before.split()[-1].rstrip("%")), "it has learnt"
