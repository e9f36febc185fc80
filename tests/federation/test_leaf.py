"""FEMNIST and Shakespeare in LEAF's layout, by writer and by role; the LSTM; runs whose clients are these people."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from skymask_gpu.federation import AttackConfig, DataConfig, Federation, ModelConfig, RunConfig, play
from skymask_gpu.federation.clients import LocalTraining
from skymask_gpu.federation.datasets import load_dataset
from skymask_gpu.federation.datasets.shakespeare import LETTERS, encoded
from skymask_gpu.federation.models import build_model, lstm

TEXT = "To be, or not to be: that is the question;\nWhether 'tis nobler in the mind to suffer [slings] & arrows!\n" * 3


def write_leaf(folder: Path, name: str, users: dict[str, tuple[list, list]]) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    data = {user: {"x": x, "y": y} for user, (x, y) in users.items()}
    content = {"users": list(users), "num_samples": [len(x) for x, _ in users.values()], "user_data": data}
    (folder / name).write_text(json.dumps(content))


def drawn(seed: int, count: int) -> tuple[list, list]:
    """Images with a bright stripe whose place is their class."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 4 + 8
    images = rng.random((count, 28, 28))
    images[np.arange(count), labels] += 3
    return images.reshape(count, 784).round(3).tolist(), labels.tolist()


def said(seed: int, count: int) -> tuple[list, list]:
    begins = np.random.default_rng(seed).integers(len(TEXT) - 81, size=count)
    return [TEXT[b : b + 80] for b in begins], [TEXT[b + 80] for b in begins]


def write_both(folder: Path, make: Any, per_user: int = 20) -> None:
    """Two training files with three users each, of whom one wrote nothing, and a test file."""
    write_leaf(folder, "train/a.json", {"f01": make(1, per_user), "f02": ([], []), "f00": make(2, per_user)})
    write_leaf(folder, "train/b.json", {"g01": make(3, per_user), "g02": make(4, per_user), "g00": make(5, per_user)})
    write_leaf(folder, "test/a.json", {"f01": make(6, 8), "g01": make(7, 4)})


def test_femnist_is_read_writer_by_writer(tmp_path: Path) -> None:
    write_both(tmp_path, drawn, 6)
    data = load_dataset("femnist", tmp_path)
    assert (data.train_inputs.shape, data.test_inputs.shape, data.num_classes) == ((30, 1, 28, 28), (12, 1, 28, 28), 62)
    assert data.train_inputs.dtype == torch.float32
    assert data.train_subjects is not None
    assert data.train_subjects.tolist() == [number for number in range(5) for _ in range(6)]
    images, labels = drawn(2, 6)  # f00, the second writer who wrote something
    raw = torch.tensor(images)
    assert data.train_labels[6:12].tolist() == labels
    everything = torch.tensor([row for seed in (1, 2, 3, 4, 5) for row in drawn(seed, 6)[0]])
    torch.testing.assert_close(data.train_inputs[6:12].flatten(1), (raw - everything.mean()) / everything.std())
    torch.testing.assert_close(data.train_inputs.mean(), torch.tensor(0.0), atol=1e-5, rtol=0)


def test_shakespeare_is_read_role_by_role(tmp_path: Path) -> None:
    write_both(tmp_path, said, 6)
    data = load_dataset("shakespeare", tmp_path)
    assert (data.train_inputs.shape, data.test_inputs.shape, data.num_classes) == ((30, 80), (12, 80), 81)
    assert data.train_inputs.dtype == torch.int32
    texts, nexts = said(3, 6)
    for row, (text, following) in enumerate(zip(texts, nexts, strict=True)):
        assert data.train_inputs[12 + row].tolist() == [LETTERS.index(letter) for letter in text]
        assert data.train_labels[12 + row] == LETTERS.index(following)
    assert encoded("z\té\U0001f600}").tolist() == [78, 80, 80, 80, 79]


SPOILT = [
    ("femnist", "{", "is no JSON file"),
    ("femnist", "[]", "must have users, and x and y of each in user_data"),
    ("femnist", '{"users": ["a"], "user_data": {}}', "must have users, and x and y of each in user_data"),
    ("femnist", {"a": ([[0.0] * 784], [])}, "user 'a' must have lists x and y of the same length"),
    ("femnist", {"a": ([[0.0] * 783], [1])}, r"user 'a': x must hold 784 finite grey values per image, .* \(1, 783\)"),
    ("femnist", {"a": ([[float("nan")] * 784], [1])}, "user 'a': x must hold 784 finite grey values"),
    ("femnist", {"a": ([["ink"] * 784], [1])}, "user 'a': could not convert string"),
    ("femnist", {"a": ([[0.0] * 784], [62])}, "user 'a': .*labels from 0 to 61, it has the label 62"),
    ("femnist", {"a": ([[0.0] * 784], [0.5])}, "user 'a': y must hold whole numbers"),
    ("femnist", {"a": ([], [])}, "holds no sample"),
    ("shakespeare", {"a": (["short"], ["t"])}, "user 'a': x must hold texts of 80 characters"),
    ("shakespeare", {"a": ([["t"] * 80], ["t"])}, "user 'a': x must hold texts of 80 characters"),
    ("shakespeare", {"a": (["t" * 80], ["to"])}, "user 'a': y must hold one character per text"),
]


@pytest.mark.parametrize(("name", "content", "message"), SPOILT)
def test_files_of_another_layout_are_named(name: str, content: Any, message: str, tmp_path: Path) -> None:
    write_both(tmp_path, drawn if name == "femnist" else said, 2)
    for path in (tmp_path / "train").glob("*.json"):
        path.unlink()
    if isinstance(content, str):
        (tmp_path / "train" / "b.json").write_text(content)
    else:
        write_leaf(tmp_path, "train/b.json", content)
    with pytest.raises(ValueError, match=rf"data\.data_dir: .*train.*{message}.*; clone github\.com/TalwalkarLab/leaf"):
        load_dataset(name, tmp_path)


def test_a_folder_without_files_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.data_dir must hold train/\*\.json, there is none in .*preprocess\.sh"):
        load_dataset("shakespeare", tmp_path)


# --- the LSTM -------------------------------------------------------------------------------------------------------------


def tokens(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randint(81, shape, generator=generator, dtype=torch.int32)


def test_the_lstm_is_that_of_torch(generator: torch.Generator) -> None:
    module = build_model("lstm", (80,), 81, seed=0).double()
    assert sum(p.numel() for p in module.parameters()) == 818_137
    torchs = nn.LSTM(8, 256, num_layers=2, batch_first=True).double()
    for layer in range(2):
        getattr(torchs, f"weight_ih_l{layer}").data = module.inputs[layer].weight.data
        getattr(torchs, f"bias_ih_l{layer}").data = module.inputs[layer].bias.data
        getattr(torchs, f"weight_hh_l{layer}").data = module.states[layer].weight.data
        getattr(torchs, f"bias_hh_l{layer}").data.zero_()
    texts = tokens(generator, 3, 20)
    want = module.fc(torchs(module.embed(texts))[0][:, -1])
    torch.testing.assert_close(module(texts), want)
    with pytest.raises(ValueError, match=r"'lstm' needs sequences \(length,\) of numbers, got samples of shape \(1, 8, 8\)"):
        build_model("lstm", (1, 8, 8), 10, seed=0)


def test_gradients_of_two_clients_with_text_equal_a_loop(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lstm, "_HIDDEN", 12)
    module = build_model("lstm", (9,), 81, seed=0).double()
    params_C = {
        key: torch.stack([p.detach(), p.detach() + 0.01 * torch.randn(p.shape, generator=generator, dtype=p.dtype)])
        for key, p in module.named_parameters()
    }
    inputs_CB, labels_CB = tokens(generator, 2, 4, 9), torch.arange(8).view(2, 4)

    def loss(params: dict[str, Tensor], inputs: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(module, params, (inputs,)), labels)

    together = vmap(grad(loss))(params_C, inputs_CB, labels_CB)
    for client in range(2):
        alone = grad(loss)({key: value[client] for key, value in params_C.items()}, inputs_CB[client], labels_CB[client])
        for key, gradient in alone.items():
            torch.testing.assert_close(together[key][client], gradient, rtol=1e-10, atol=1e-14)


# --- runs -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "model", "attack"), [("femnist", "mlp", "sign-flip"), ("shakespeare", "lstm", "label-flip")])
def test_a_run_whose_clients_are_these_people(
    name: str, model: str, attack: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lstm, "_HIDDEN", 12)
    write_both(tmp_path, drawn if name == "femnist" else said)
    data = DataConfig(dataset=name, data_dir=str(tmp_path), clients=5, partition="subject", root_samples=10)
    run = RunConfig(
        rounds=2,
        data=data,
        model=ModelConfig(name=model),
        local=LocalTraining(steps=2, batch_size=8),
        attack=AttackConfig(name=attack, share=0.2),
    )
    federation = Federation.build(run)
    subjects = federation.dataset.train_subjects
    assert subjects is not None
    assert [subjects[part].unique().tolist() for part in federation.parts[:5]] == [[0], [1], [2], [3], [4]]
    records = list(play(federation, tmp_path / "out"))
    assert [record["participants"] for record in records] == [5, 5]
    assert all(0 <= record["accuracy"] <= 1 for record in records)


def test_what_does_not_go_with_text_is_refused(tmp_path: Path) -> None:
    write_both(tmp_path, said)
    data = DataConfig(dataset="shakespeare", data_dir=str(tmp_path), clients=5, partition="subject", root_samples=10)
    with pytest.raises(ValueError, match=r"a backdoor's trigger needs images .* got samples of shape \(80,\)"):
        Federation.build(
            RunConfig(data=data, model=ModelConfig(name="lstm"), attack=AttackConfig(name="scaling-backdoor", share=0.2))
        )
    with pytest.raises(ValueError, match=r"root_inputs and root_labels do not fit the module"):
        Federation.build(RunConfig(data=data, model=ModelConfig(name="mlp")))
    with pytest.raises(ValueError, match=r"data\.clients must be 5 for data\.partition 'subject'"):
        Federation.build(RunConfig(data=DataConfig(**{**vars(data), "clients": 7}), model=ModelConfig(name="lstm")))


def test_a_model_of_ones_own_is_tried_with_numbers(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "from torch import nn\n\nclass Net(nn.Sequential):\n    def __init__(self):\n"
        "        super().__init__(nn.Embedding(81, 4), nn.Flatten(), nn.Linear(320, 81))\n"
    )
    build_model(f"{tmp_path}/own.py:Net", (80,), 81, seed=0, dtype=torch.int32)
    with pytest.raises(ValueError, match="Net does not take inputs"):
        build_model(f"{tmp_path}/own.py:Net", (80,), 81, seed=0)
