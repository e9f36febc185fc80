"""Updates in blocks, in memory or on disk, give what one tensor gives."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from skymask_gpu.engine import ClientBlocks, FlatModel, MaskTraining, train_masks

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


def test_other_solvers_stack_blocks_in_memory_and_refuse_those_on_disk(
    problem: tuple[Tensor, FlatModel], tmp_path: Path
) -> None:
    rows_RP, loss = problem
    want = train_masks(rows_RP, loss.initial_params, loss, solver="fused")
    blocks = ClientBlocks(rows_RP.split(11))
    assert torch.equal(train_masks(blocks, loss.initial_params, loss, solver="fused").bits, want.bits)
    disk = on_disk(tmp_path, rows_RP, [20, 20])
    with pytest.raises(ValueError, match="solver 'fused' wants the updates in one tensor, these are on disk"):
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
