"""The mean of chosen rows, with and without factors: twin, compiled CPU path and Triton kernel against float64."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from skymask_gpu.kernels.mean import chosen_mean, chosen_mean_reference

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# odd, prime, smaller than a block, a whole block, several blocks and row splits
SIZES = [(1, 1), (3, 5), (2, 8), (9, 256), (17, 263), (131, 1031)]

backends = pytest.mark.parametrize("name", ["triton", "cpu", "twin"])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def backend(name: str) -> Callable[..., Tensor]:
    """``(rows_RP, chosen_R, factors_R=None) -> mean_P``."""
    from skymask_gpu.kernels.mean import cpu, triton

    def on_cpu(rows_RP: Tensor, chosen_R: Tensor, factors_R: Tensor | None = None) -> Tensor:
        return cpu.chosen_mean(rows_RP.cpu(), chosen_R.cpu(), _or_ones(factors_R, chosen_R).cpu()).to(DEVICE)

    def on_triton(rows_RP: Tensor, chosen_R: Tensor, factors_R: Tensor | None = None) -> Tensor:
        return triton.chosen_mean(rows_RP, chosen_R, _or_ones(factors_R, chosen_R))

    return {"cpu": on_cpu, "triton": on_triton, "twin": chosen_mean_reference}[name]


def _or_ones(factors_R: Tensor | None, chosen_R: Tensor) -> Tensor:
    return chosen_R.float() if factors_R is None else factors_R


def make_factors(num_rows: int) -> Tensor:
    """Some longer, some shorter, one that turns a row around, and every fifth 0."""
    factors_R = torch.rand(num_rows, generator=torch.Generator().manual_seed(num_rows)) * 3
    factors_R[0] = -0.5
    factors_R[4::5] = 0
    return factors_R.to(DEVICE)


def make_rows(size: tuple[int, int], dtype: torch.dtype, pad: int = 0) -> tuple[Tensor, Tensor]:
    """Rows ``pad`` elements apart, NaN between them and in all rows that are not chosen; two in three are."""
    num_rows, num_params = size
    generator = torch.Generator().manual_seed(num_rows + num_params)
    chosen_R = torch.arange(num_rows) % 3 != 1
    rows = torch.full((num_rows, num_params + pad), torch.nan)
    rows[chosen_R, :num_params] = torch.randn(int(chosen_R.sum()), num_params, generator=generator) + 0.1
    return rows.to(DEVICE, dtype)[:, :num_params], chosen_R.to(DEVICE)


def assert_is_mean(name: str, mean_P: Tensor, rows_RP: Tensor, chosen_R: Tensor, factors_R: Tensor | None = None) -> None:
    """Each addition rounds by half a unit, and each product with a factor does once; the number of additions in a row is
    known, but for that of torch in the twin.
    """
    from skymask_gpu.kernels.mean import triton

    enters_R = chosen_R & (_or_ones(factors_R, chosen_R) != 0)
    scaled_RP = rows_RP[enters_R].double() * _or_ones(factors_R, chosen_R)[enters_R, None].double()
    want_P = scaled_RP.sum(0) / chosen_R.sum()
    assert mean_P.dtype == torch.float64
    # a program adds its rows in BLOCK_R lanes and then the lanes in pairs; the programs' sums in float64
    in_lane = triton.split_rows(*rows_RP.shape) // triton.BLOCK_R
    lanes = math.log2(triton.BLOCK_R)
    additions = {"triton": in_lane + lanes, "twin": len(rows_RP), "cpu": 0}[name]
    products = int(factors_R is not None and name != "cpu")
    eps_32, eps_64 = torch.finfo(torch.float32).eps, torch.finfo(torch.float64).eps
    relative = ((additions + products) * eps_32 + (len(rows_RP) + 3) * eps_64) / 2
    assert ((mean_P - want_P).abs() <= relative * scaled_RP.abs().sum(0) / chosen_R.sum()).all()


@backends
@dtypes
@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"R{s[0]}-P{s[1]}")
@pytest.mark.parametrize("pad", [0, 3, 8])
@pytest.mark.usefixtures("poisoned_memory")
def test_the_mean_of_chosen_rows_in_which_others_leave_no_trace(
    name: str, size: tuple[int, int], dtype: torch.dtype, pad: int
) -> None:
    rows_RP, chosen_R = make_rows(size, dtype, pad)
    assert_is_mean(name, backend(name)(rows_RP, chosen_R), rows_RP, chosen_R)


@backends
@dtypes
@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"R{s[0]}-P{s[1]}")
@pytest.mark.usefixtures("poisoned_memory")
def test_each_chosen_row_counts_as_much_as_its_factor_says(name: str, size: tuple[int, int], dtype: torch.dtype) -> None:
    rows_RP, chosen_R = make_rows(size, dtype, pad=3)
    factors_R = make_factors(len(rows_RP))
    rows_RP[factors_R == 0] = torch.nan  # such a row is not read, but counts as chosen
    factors_R[~chosen_R] = torch.nan  # and what it says of a row that is not chosen does not matter
    assert_is_mean(name, backend(name)(rows_RP, chosen_R, factors_R), rows_RP, chosen_R, factors_R)


@backends
@dtypes
def test_factors_of_one_change_no_bit(name: str, dtype: torch.dtype) -> None:
    rows_RP, chosen_R = make_rows((131, 1031), dtype)
    run = backend(name)
    assert torch.equal(run(rows_RP, chosen_R, torch.ones(len(rows_RP), device=DEVICE)), run(rows_RP, chosen_R))


def test_factors_may_lie_apart() -> None:
    rows_RP, chosen_R = make_rows((30, 50), torch.float32)
    factors_R = make_factors(60)[::2]
    assert torch.equal(chosen_mean(rows_RP, chosen_R, factors_R), chosen_mean(rows_RP, chosen_R, factors_R.contiguous()))


@backends
@pytest.mark.parametrize("programs", [1, 1000])
def test_shares_of_the_rows_add_up(name: str, programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("skymask_gpu.kernels.mean.triton.ENOUGH_PROGRAMS", programs)
    rows_RP, chosen_R = make_rows((200, 40), torch.float32)
    assert_is_mean(name, backend(name)(rows_RP, chosen_R), rows_RP, chosen_R)


@backends
def test_many_rows_stay_accurate(name: str) -> None:
    rows_RP, chosen_R = make_rows((3000, 24), torch.float32)
    assert_is_mean(name, backend(name)(rows_RP, chosen_R), rows_RP, chosen_R)


@backends
def test_all_rows(name: str) -> None:
    rows_RP = torch.randn(70, 300, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    everyone_R = torch.ones(70, dtype=torch.bool, device=DEVICE)
    assert_is_mean(name, backend(name)(rows_RP, everyone_R), rows_RP, everyone_R)


@backends
def test_nobody_is_nan(name: str) -> None:
    rows_RP, chosen_R = make_rows((5, 20), torch.float32)
    assert backend(name)(rows_RP, torch.zeros_like(chosen_R)).isnan().all()


@backends
def test_addresses_beyond_two_to_the_31_elements(name: str) -> None:
    """Rows 2**30 elements apart, the third one beyond 2**31; the memory between them is never touched."""
    if torch.device(DEVICE).type == "cuda" and torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of GPU memory")
    generator = torch.Generator().manual_seed(0)
    near_RP = torch.randn(4, 24, generator=generator).to(DEVICE, torch.bfloat16)
    stride = 2**30 + 8
    far_RP = torch.empty(3 * stride + 24, dtype=torch.bfloat16, device=DEVICE).as_strided((4, 24), (stride, 1)).copy_(near_RP)
    chosen_R = torch.tensor([True, False, True, True], device=DEVICE)
    assert torch.equal(backend(name)(far_RP, chosen_R), backend(name)(near_RP, chosen_R))


def test_the_twin_goes_over_the_columns_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("skymask_gpu.kernels.mean.reference._CHUNK_ELEMENTS", 60)
    rows_RP, chosen_R = make_rows((20, 50), torch.float32)
    assert_is_mean("twin", chosen_mean_reference(rows_RP, chosen_R), rows_RP, chosen_R)


def test_bad_arguments_are_named() -> None:
    rows_RP, chosen_R = torch.zeros(4, 6), torch.ones(4, dtype=torch.bool)
    for wrong in (rows_RP[0], rows_RP[:, :0], rows_RP.double()):
        with pytest.raises(ValueError, match=r"rows must be non-empty \(R, P\) float32 or bfloat16, got"):
            chosen_mean(wrong, chosen_R)
    with pytest.raises(ValueError, match=r"rows must have unit column stride, got strides \(1, 6\)"):
        chosen_mean(rows_RP.T, torch.ones(6, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"chosen must be \(4,\) bool, got \(4,\) torch.int64; use .to\(torch.bool\)"):
        chosen_mean(rows_RP, torch.arange(4))
    with pytest.raises(ValueError, match=r"factors must be \(4,\) float32, got \(4,\) torch.float64; use .to\(torch.float32\)"):
        chosen_mean(rows_RP, chosen_R, torch.ones(4, dtype=torch.float64))
