"""Updates in blocks, in memory or on disk, give what one tensor gives."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from skymask_gpu.engine import SOLVERS, ClientBlocks, FlatModel, MaskTraining, train_masks

NUM_ROWS = 40


@pytest.fixture(scope="module")
def problem() -> tuple[Tensor, FlatModel]:
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        module = nn.Sequential(nn.Linear(5, 70), nn.Tanh(), nn.Linear(70, 3))
    loss = FlatModel(module, torch.randn(12, 5, generator=generator), torch.arange(12) % 3)
    return torch.randn(NUM_ROWS, loss.num_params, generator=generator) * 0.05, loss


def on_disk(folder: Path, rows_RP: Tensor, sizes: list[int]) -> ClientBlocks:
    for number, block in enumerate(rows_RP.split(sizes)):
        save_file({"updates": block.contiguous()}, folder / f"{number:03}.safetensors")
    return ClientBlocks.from_folder(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("sizes", [[40], [1, 30, 7, 2], [39, 1]], ids=str)
def test_blocks_in_memory_and_on_disk_give_what_one_tensor_gives(
    dtype: torch.dtype, sizes: list[int], problem: tuple[Tensor, FlatModel], tmp_path: Path
) -> None:
    rows_RP, loss = problem[0].to(dtype), problem[1]
    config = MaskTraining(steps=12, min_improvement=-1e9)
    want = train_masks(rows_RP, loss.initial_params, loss, config=config, solver="collapsed", keep_logits=True)
    assert want.cuts is not None
    assert not want.cuts.constant.all()
    assert want.cuts.several.any(), "the full replay must be seen at work"
    for blocks in (ClientBlocks(rows_RP.split(sizes)), on_disk(tmp_path, rows_RP, sizes)):
        got = train_masks(blocks, loss.initial_params, loss, config=config, solver="collapsed", keep_logits=True)
        assert torch.equal(got.bits, want.bits)
        assert got.losses == want.losses
        assert torch.equal(got.logits, want.logits)  # type: ignore[arg-type]
        for name in ("position", "left", "constant", "several"):
            assert torch.equal(getattr(got.cuts, name), getattr(want.cuts, name))


def test_other_solvers_take_blocks_in_memory_and_refuse_those_on_disk(
    problem: tuple[Tensor, FlatModel], tmp_path: Path
) -> None:
    rows_RP, loss = problem
    want = train_masks(rows_RP, loss.initial_params, loss, solver="fused")
    blocks = ClientBlocks(rows_RP.split(11))
    assert torch.equal(train_masks(blocks, loss.initial_params, loss, solver="fused").bits, want.bits)
    disk = on_disk(tmp_path, rows_RP, [20, 20])
    with pytest.raises(ValueError, match="solver 'fused' wants the updates in memory, these are on disk"):
        train_masks(disk, loss.initial_params, loss, solver="fused")
    masks = train_masks(disk, loss.initial_params, loss)
    assert (masks.solver, masks.solver_reason) == ("collapsed", "auto: the updates are on disk")


def test_blocks_select_append_stack_and_pick_rows(problem: tuple[Tensor, FlatModel], tmp_path: Path) -> None:
    rows_RP = problem[0]
    keep = torch.arange(NUM_ROWS) % 3 > 0
    keep[:10] = False
    last = torch.full((rows_RP.shape[1],), 7.0)
    want = torch.cat([rows_RP[keep], last[None]])
    wanted = [0, 3, len(want) - 1]
    for blocks in (ClientBlocks(rows_RP.split([10, 30])), on_disk(tmp_path, rows_RP, [10, 30])):
        changed = blocks.select(keep).with_last(last)
        assert len(changed) == len(want)
        assert torch.equal(torch.cat(list(changed)), want)
        assert torch.equal(torch.cat(list(changed)), want), "blocks are read more than once"
        picked = list(changed.each(wanted))
        assert [number for number, _ in picked] == wanted
        assert torch.equal(torch.stack([row for _, row in picked]), want[wanted])
        assert torch.equal(changed.stack(), want)
        assert changed.stack().stride(0) % 8 == 0
        assert len(blocks) == NUM_ROWS, "the original is as it was"


def test_a_large_file_is_read_in_pieces(
    problem: tuple[Tensor, FlatModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows_RP = problem[0]
    monkeypatch.setattr("skymask_gpu.engine.client_blocks._BLOCK_BYTES", 4 * rows_RP.shape[1] * 15)
    blocks = on_disk(tmp_path, rows_RP, [NUM_ROWS])
    assert blocks.sizes == (15, 15, 10)
    assert torch.equal(torch.cat(list(blocks)), rows_RP)


def test_blocks_that_do_not_fit_are_named(tmp_path: Path) -> None:
    for bad in ([], [torch.zeros(3)], [torch.zeros(0, 4)], ["rows"]):
        with pytest.raises(ValueError, match="blocks must be non-empty"):
            ClientBlocks(bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="blocks must agree in P, dtype and device"):
        ClientBlocks([torch.zeros(3, 4), torch.zeros(3, 5)])
    with pytest.raises(ValueError, match=r"folder: no \*.safetensors file in"):
        ClientBlocks.from_folder(tmp_path)
    save_file({"updates": torch.zeros(2, 4)}, tmp_path / "a.safetensors")
    save_file({"updates": torch.zeros(2, 5)}, tmp_path / "b.safetensors")
    with pytest.raises(
        ValueError, match=r"must agree in P and dtype, got a.safetensors: 4 parameters in F32; b.safetensors: 5"
    ):
        ClientBlocks.from_folder(tmp_path)
    save_file({"updates": torch.zeros(2, 4), "more": torch.zeros(1)}, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match=r"b.safetensors must hold one non-empty \(n, P\) tensor, it holds"):
        ClientBlocks.from_folder(tmp_path)
    (tmp_path / "b.safetensors").write_bytes(b"cut short")
    with pytest.raises(ValueError, match=r"b.safetensors is no safetensors file"):
        ClientBlocks.from_folder(tmp_path)
    (tmp_path / "b.safetensors").unlink()
    save_file({"updates": torch.zeros(2, 4, dtype=torch.float64)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="must be float32 or bfloat16, got F64"):
        ClientBlocks.from_folder(tmp_path)


# --- any stride, and readers that lie -----------------------------------------------------------------------------------


def laid_out_otherwise(rows_RP: Tensor) -> dict[str, Tensor]:
    """The same values in other places of the memory."""
    padded = torch.full((rows_RP.shape[0], 2 * rows_RP.shape[1]), torch.nan)
    padded[:, ::2] = rows_RP
    imaginary = torch.complex(torch.zeros_like(rows_RP), -rows_RP)
    return {
        "columns first": rows_RP.t().contiguous().t(),
        "every other column": padded[:, ::2],
        "rows turned round": rows_RP.flip(0).contiguous().flip(0),
        "sign still to be applied": torch._neg_view(-rows_RP),
        "imaginary part of a conjugate": imaginary.conj().imag,
        "part of a gradient's graph": rows_RP.clone().requires_grad_(),
    }


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_tensor_of_any_strides_gives_the_same_masks(solver: str, problem: tuple[Tensor, FlatModel]) -> None:
    rows_RP, loss = problem
    config = MaskTraining(steps=2)
    want = train_masks(rows_RP, loss.initial_params, loss, config=config, solver=solver)
    for name, other_RP in laid_out_otherwise(rows_RP).items():
        assert torch.equal(other_RP.detach(), rows_RP), name
        got = train_masks(other_RP, loss.initial_params, loss, config=config, solver=solver)
        assert torch.equal(got.bits, want.bits), name
    blocks = ClientBlocks(rows_RP.t().contiguous().t().split([1, 30, 9]))
    assert torch.equal(train_masks(blocks, loss.initial_params, loss, config=config, solver=solver).bits, want.bits)
    in_parts = ClientBlocks.from_reader(
        [20, 20], rows_RP.shape[1], torch.float32, rows_RP.t().contiguous().t().split(20).__getitem__
    )
    if solver == "collapsed":
        assert torch.equal(train_masks(in_parts, loss.initial_params, loss, config=config).bits, want.bits)


@pytest.mark.parametrize("solver", SOLVERS)
def test_one_row_expanded_and_one_column_are_rows_like_others(solver: str) -> None:
    row_1P = torch.linspace(-1, 1, 9)[None]
    loss = lambda params: (params**2).sum()  # noqa: E731
    expanded = train_masks(row_1P.expand(7, 9), torch.ones(9), loss, solver=solver)
    assert torch.equal(expanded.bits, train_masks(row_1P.repeat(7, 1), torch.ones(9), loss, solver=solver).bits)
    table = torch.linspace(-1, 1, 70).reshape(10, 7)
    column = train_masks(table[:, 2:3], torch.ones(1), loss, solver=solver)
    assert torch.equal(column.bits, train_masks(table[:, 2:3].clone(), torch.ones(1), loss, solver=solver).bits)


@pytest.mark.parametrize(
    ("lie", "got"),
    [
        (lambda block: block[:-1], r"\(2, 5\) torch.float32 on cpu"),
        (lambda block: torch.cat([block, block]), r"\(6, 5\) torch.float32 on cpu"),
        (lambda block: block[:, :-1], r"\(3, 4\) torch.float32 on cpu"),
        (lambda block: block.repeat(1, 4), r"\(3, 20\) torch.float32 on cpu"),
        (lambda block: block.double(), r"\(3, 5\) torch.float64 on cpu"),
        (lambda block: block.bfloat16(), r"\(3, 5\) torch.bfloat16 on cpu"),
        (lambda block: block.to("meta"), r"\(3, 5\) torch.float32 on meta"),
        (lambda block: block.to_sparse(), "a torch.sparse_coo tensor"),
        (lambda block: torch.nested.nested_tensor(list(block)), "a nested tensor"),
        (lambda block: block.numpy(), "a ndarray"),
        (lambda block: None, "a NoneType"),
    ],
    ids=[
        "fewer-rows",
        "more-rows",
        "fewer-columns",
        "more-columns",
        "wider",
        "narrower",
        "meta",
        "sparse",
        "nested",
        "numpy",
        "none",
    ],
)
def test_a_reader_that_lies_is_found_at_every_reading(lie: Any, got: str) -> None:
    honest, lying = torch.ones(3, 5), False

    def read(number: int) -> Any:
        return lie(honest) if lying and number == 1 else honest

    blocks = ClientBlocks.from_reader([3, 3], 5, torch.float32, read, names=["a", "the second"])
    keep = torch.tensor([True, False, True, False, True, True])
    derived = [blocks, blocks.select(keep), blocks.with_last(torch.zeros(5)), blocks.minus(torch.zeros(5))]
    for some in derived:
        assert torch.cat(list(some)).shape[1] == 5
    lying = True
    for some in derived:
        with pytest.raises(ValueError, match=rf"updates: block 1 \(the second\) must be a dense \(3, 5\) .* got {got}"):
            list(some)
        with pytest.raises(ValueError, match=r"block 1 \(the second\)"):
            list(some.each([len(some) - 2 if some is derived[2] else len(some) - 1]))
        with pytest.raises(ValueError, match=r"block 1 \(the second\)"):
            some.stack()


def test_a_file_that_changes_between_two_readings_is_named(problem: tuple[Tensor, FlatModel], tmp_path: Path) -> None:
    """Wider rows written where compiled code expects narrower ones would be written past the end of its memory."""
    rows_RP, loss = problem
    for other_RP in (rows_RP.repeat(1, 4), rows_RP[:, :7], rows_RP[:3], rows_RP.double(), -rows_RP):
        blocks = on_disk(tmp_path, rows_RP, [20, 20])
        calls = 0

        def replacing(params_P: Tensor, other_RP: Tensor = other_RP) -> Tensor:
            nonlocal calls
            calls += 1
            if calls == 1:
                save_file({"updates": other_RP.contiguous()}, tmp_path / "new")
                (tmp_path / "new").rename(tmp_path / "001.safetensors")
            return loss(params_P)

        with pytest.raises(ValueError, match=r"folder: .*001\.safetensors has changed since it was first read"):
            train_masks(blocks, loss.initial_params, replacing)
        assert calls, "the first pass over the updates was without fault"
    blocks = on_disk(tmp_path, rows_RP, [20, 20])
    (tmp_path / "000.safetensors").unlink()
    with pytest.raises(ValueError, match=r"000\.safetensors has changed"):
        list(blocks)


def test_blocks_without_rows_or_that_are_no_dense_tensors_are_refused() -> None:
    for sizes, num_params in (([], 5), ([3, 0], 5), ([3], 0)):
        with pytest.raises(ValueError, match="sizes and num_params must be at least 1"):
            ClientBlocks.from_reader(sizes, num_params, torch.float32, lambda number: torch.ones(3, 5))
    for bad in (torch.ones(3, 5).to_sparse(), torch.nested.nested_tensor([torch.ones(5)] * 3), None):
        with pytest.raises(ValueError, match="blocks must be non-empty, dense"):
            ClientBlocks([bad])  # type: ignore[list-item]
