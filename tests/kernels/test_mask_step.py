"""The fused mask step, on every backend that runs here, against its plain twin in float64."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from skymask_gpu import kernels
from skymask_gpu.kernels import first_step_reference, last_step_reference, next_step_reference

triton = pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# odd, prime, smaller than a block, a whole block, several blocks and row splits
SHAPES = [(1, 1), (3, 5), (2, 8), (7, 31), (9, 256), (17, 263), (67, 520), (130, 1031)]
DTYPES = [torch.float32, torch.bfloat16]
EPS = torch.finfo(torch.float32).eps


def backend(name: str) -> ModuleType:
    if name == "triton":
        from skymask_gpu.kernels.mask_step import triton as mask_step

        return mask_step
    from skymask_gpu.kernels.mask_step import cpu as cpu_mask_step

    return cpu_mask_step


def device_of(name: str) -> str:
    return DEVICE if name == "triton" else "cpu"


def make_inputs(shape: tuple[int, int], dtype: torch.dtype, device: str, pad: int = 0) -> dict[str, Tensor]:
    """Updates whose steps are partly clipped and partly not, of which rows are ``pad`` elements apart."""
    num_rows, num_params = shape
    generator = torch.Generator().manual_seed(num_rows * 1000 + num_params)
    updates_RP = torch.full((num_rows, num_params + pad), torch.nan)[:, :num_params]
    updates_RP.copy_(torch.randn(shape, generator=generator) * 1e-2)
    if pad == 0:
        updates_RP = updates_RP.contiguous()
    padded = torch.full((num_rows, num_params + pad), torch.nan, dtype=dtype, device=device)
    padded[:, :num_params] = updates_RP
    updates_RP = padded[:, :num_params] if pad else padded.contiguous()
    real = torch.float64 if dtype == torch.float64 else torch.float32
    slope_P = (torch.randn(num_params, generator=generator) * 500).to(device, real)
    mean_P = updates_RP.double().mean(0).to(real)
    logits_RP = (torch.randn(shape, generator=generator) * 3).to(device, real)
    return {"updates_RP": updates_RP, "logits_RP": logits_RP, "slope_P": slope_P, "mean_P": mean_P}


def in_float64(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.double().clone() for name, tensor in inputs.items()}


def nudged(inputs: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Every number of float64 inputs moved up or down by the relative precision of float32."""
    generator = torch.Generator().manual_seed(seed)
    signs = {name: 2 * torch.randint(0, 2, x.shape, generator=generator).to(x) - 1 for name, x in inputs.items()}
    return {name: x * (1 + EPS * signs[name]) for name, x in inputs.items()}


def assert_as_good_as_float32(
    got: dict[str, Tensor], inputs: dict[str, Tensor], step: Callable[[dict[str, Tensor]], dict[str, Tensor]]
) -> None:
    """``got`` is as near to ``step`` in float64 as float32 allows: twice what rounding its inputs and results moves it by.

    How much that is depends on the numbers (differences of nearly equal ones lose digits) and is found out here.
    """
    want = step(inputs)
    moved = [step(nudged(inputs, seed)) for seed in range(8)]
    for name, exact in want.items():
        noise = max(float((each[name] - exact).norm()) for each in moved)
        tolerance = 2 * (noise + EPS * float(exact.norm())) / float(exact.norm())
        assert_close(name, got[name], exact, tolerance)


def assert_close(name: str, got: Tensor, want: Tensor, tolerance: float) -> None:
    """Relative L2 error, and its place where it is largest."""
    got, want = got.double().cpu(), want.double().cpu()
    assert got.shape == want.shape, f"{name}: shape {got.shape}, wanted {want.shape}"
    assert torch.isfinite(got).all(), f"{name}: {int((~torch.isfinite(got)).sum())} values are not finite"
    error = (got - want).norm() / want.norm().clamp_min(1e-30)
    at = int((got - want).abs().argmax())
    worst = f"worst at {at}: {got.flatten()[at]} for {want.flatten()[at]}"
    assert error <= tolerance, f"{name}: relative error {error:.2e}, {worst}"


cases = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"R{s[0]}-P{s[1]}")
backends = pytest.mark.parametrize("name", ["triton", "cpu"])


@backends
@cases
@shapes
@pytest.mark.parametrize("pad", [0, 3, 8])
@pytest.mark.usefixtures("poisoned_memory")
def test_next_step_equals_its_twin(name: str, shape: tuple[int, int], dtype: torch.dtype, pad: int) -> None:
    inputs = make_inputs(shape, dtype, device_of(name), pad)
    twin = in_float64(inputs)
    gate_sum, weighted_sum = backend(name).next_step(**inputs, full_step=1.0)
    got = {"logits": inputs["logits_RP"], "gate_sum": gate_sum, "weighted_sum": weighted_sum}
    assert_as_good_as_float32(got, twin, next_step_in_float64)


def next_step_in_float64(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    inputs = in_float64(inputs)
    gate_sum, weighted_sum = next_step_reference(**inputs, full_step=1.0)
    return {"logits": inputs["logits_RP"], "gate_sum": gate_sum, "weighted_sum": weighted_sum}


@backends
@cases
@shapes
@pytest.mark.usefixtures("poisoned_memory")
def test_first_step_reads_no_logits(name: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    inputs = make_inputs(shape, dtype, device_of(name))
    twin = in_float64(inputs)
    inputs["logits_RP"].fill_(torch.nan)
    gate_sum, weighted_sum = backend(name).first_step(**inputs, init=0.75, full_step=0.5)
    got = {"logits": inputs["logits_RP"], "gate_sum": gate_sum, "weighted_sum": weighted_sum}

    def first_step_in_float64(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        inputs = in_float64(inputs)
        gate_sum, weighted_sum = first_step_reference(**inputs, init=0.75, full_step=0.5)
        return {"logits": inputs["logits_RP"], "gate_sum": gate_sum, "weighted_sum": weighted_sum}

    assert_as_good_as_float32(got, twin, first_step_in_float64)


@backends
@cases
@shapes
@pytest.mark.parametrize("from_init", [False, True], ids=["stored", "from-init"])
@pytest.mark.parametrize("keep", [False, True], ids=["drop", "keep"])
@pytest.mark.usefixtures("poisoned_memory")
def test_last_step_emits_packed_bits(
    name: str, shape: tuple[int, int], dtype: torch.dtype, from_init: bool, keep: bool
) -> None:
    inputs = make_inputs(shape, dtype, device_of(name))
    twin = in_float64(inputs)
    want_RP = twin["logits_RP"]
    before_RP = torch.full_like(want_RP, 0.3) if from_init else want_RP.clone()
    # A gate is off by up to 4 roundings (its exponential 2, a sum, a quotient), its derivative by one
    # more; a difference, a product and a difference follow: 8 roundings of the largest term.
    per_gate_RP = twin["slope_P"] * (twin["updates_RP"] - twin["mean_P"])
    bound_RP = 8 * EPS * (1 + before_RP.abs() + per_gate_RP.abs())
    settings = {"init": 0.3, "full_step": 1.0, "threshold": 0.2}
    want_bits = last_step_reference(
        twin["updates_RP"], None if from_init else want_RP, twin["slope_P"], twin["mean_P"], **settings, logits_out_RP=want_RP
    )
    logits_RP = inputs.pop("logits_RP")
    stored_RP = None if from_init else logits_RP.clone()
    out_RP = torch.full_like(logits_RP, torch.nan) if keep else None
    bits = backend(name).last_step(**inputs, logits_RP=stored_RP, **settings, logits_out_RP=out_RP)
    assert bits.shape == want_bits.shape
    # float32 may round a logit across the threshold; away from it every bit is the same, and padding bits are 0
    doubtful_RP = (want_RP - 0.2).abs() <= bound_RP
    assert int(((bits ^ want_bits) & ~last_step_bits(doubtful_RP)).count_nonzero()) == 0
    # logits lie some units apart, and the bound is 1e-5: hardly one in 10,000 is in doubt
    assert int(doubtful_RP.count_nonzero()) <= 1 + want_RP.numel() // 1000
    if out_RP is not None:
        assert ((out_RP - want_RP).abs() <= bound_RP).all()
    if stored_RP is not None:
        assert torch.equal(stored_RP, logits_RP), "the stored logits must stay as they are"


def last_step_bits(flags_RP: Tensor) -> Tensor:
    zeros = torch.zeros(flags_RP.shape[1], dtype=torch.float64, device=flags_RP.device)
    return last_step_reference(flags_RP.double(), flags_RP.double(), zeros, zeros, init=0.0, full_step=0.0, threshold=0.5)


@backends
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
def test_a_full_step_from_one_is_exactly_zero_and_bit_zero(name: str, dtype: torch.dtype) -> None:
    """lr * clip equals the initial logit: a clipped step down lands on the threshold, a clipped step up on 2."""
    device = device_of(name)
    updates_RP = torch.tensor([[1.0, -1.0, 0.0]] * 5, dtype=dtype, device=device)
    slope_P = torch.full((3,), 1e30, device=device)
    mean_P = torch.zeros(3, device=device)
    logits_RP = torch.full((5, 3), torch.nan, device=device)
    full_step = 1e7 * 1e-7
    backend(name).first_step(updates_RP, logits_RP, slope_P, mean_P, init=1.0, full_step=full_step)
    assert logits_RP.cpu().tolist() == [[0.0, 2.0, 1.0]] * 5
    bits = backend(name).last_step(
        updates_RP, None, slope_P, mean_P, init=1.0, full_step=full_step, threshold=0.0, logits_out_RP=logits_RP
    )
    assert logits_RP.cpu().tolist() == [[0.0, 2.0, 1.0]] * 5
    assert bits.cpu().tolist() == [[0b110]] * 5


@backends
def test_addresses_beyond_two_to_the_31_elements(name: str) -> None:
    """Rows 2**30 elements apart, the third one beyond 2**31; the memory between them is never touched."""
    device = device_of(name)
    if device == "cuda" and torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of GPU memory")
    num_params, stride = 24, 2**30 + 8
    small = make_inputs((4, num_params), torch.float32, device)

    def far_apart(tensor: Tensor) -> Tensor:
        far = torch.empty(3 * stride + num_params, dtype=tensor.dtype, device=device).as_strided(tensor.shape, (stride, 1))
        return far.copy_(tensor)

    far = {**small, "updates_RP": far_apart(small["updates_RP"]), "logits_RP": far_apart(small["logits_RP"])}
    got = backend(name).next_step(**far, full_step=1.0)
    want = backend(name).next_step(**small, full_step=1.0)
    assert torch.equal(far["logits_RP"], small["logits_RP"])
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    bits_far = backend(name).last_step(**far, init=0.0, full_step=1.0, threshold=0.0)
    assert torch.equal(bits_far, backend(name).last_step(**small, init=0.0, full_step=1.0, threshold=0.0))


@backends
@pytest.mark.parametrize("num_rows", [2000])
def test_sums_of_many_rows_stay_accurate(name: str, num_rows: int) -> None:
    inputs = make_inputs((num_rows, 40), torch.float32, device_of(name))
    twin = in_float64(inputs)
    gate_sum, _ = backend(name).next_step(**inputs, full_step=1.0)
    # no more than two roundings, however many rows were added up
    assert_close("gate_sum", gate_sum, next_step_in_float64(twin)["gate_sum"], 2 * EPS)


def test_float64_on_the_cpu_is_float64() -> None:
    inputs = make_inputs((67, 520), torch.float64, "cpu")
    twin = in_float64(inputs)
    got = kernels.next_step(**inputs, full_step=1.0)
    want = next_step_reference(**twin, full_step=1.0)
    assert_close("logits", inputs["logits_RP"], twin["logits_RP"], 1e-14)
    for name, a, b in zip(("gate_sum", "weighted_sum"), got, want, strict=True):
        assert_close(name, a, b, 1e-13)


def test_the_number_of_threads_changes_no_bit() -> None:
    before = torch.get_num_threads()
    results = []
    try:
        for num_threads in (1, 3):
            torch.set_num_threads(num_threads)
            inputs = make_inputs((20, 5000), torch.float32, "cpu")
            results.append((*kernels.next_step(**inputs, full_step=1.0), inputs["logits_RP"]))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def _swap(**changes: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda inputs: {**inputs, **changes}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_swap(slope_P=torch.zeros(4)), r"slope must be \(5,\) float32, got \(4,\)"),
        (
            _swap(mean_P=torch.zeros(5, dtype=torch.float64)),
            r"mean must be \(5,\) float32, got \(5,\) torch.float64; use .to\(torch.float32\)",
        ),
        (_swap(logits_RP=torch.zeros(3, 4)), r"logits must be \(3, 5\) float32, got \(3, 4\)"),
        (_swap(updates_RP=torch.zeros(5)), "updates must be non-empty"),
        (_swap(updates_RP=torch.zeros(3, 5, dtype=torch.int32)), "updates must be .*float32.*, got .*torch.int32"),
        (_swap(updates_RP=torch.zeros(5, 3).T), "updates must have unit column stride"),
        (_swap(logits_RP=torch.zeros(5).expand(3, 5)), "logits must have .* rows that do not overlap"),
        (_swap(slope_P=torch.zeros(10)[::2]), "slope must be contiguous, got strides"),
    ],
    ids=["slope", "mean", "logits", "one-dimensional", "integers", "transposed", "overlapping", "every second"],
)
def test_bad_arguments_are_named(change: Callable[[dict[str, Any]], dict[str, Any]], message: str) -> None:
    inputs = change(make_inputs((3, 5), torch.float32, "cpu"))
    with pytest.raises(ValueError, match=message):
        kernels.next_step(**inputs, full_step=1.0)


def test_a_missing_compiler_is_a_reason_and_not_a_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "numba is not installed" in str(kernels.why_not(torch.device("cpu"), torch.float32))
    assert "triton is not installed" in str(kernels.why_not(torch.device("cuda"), torch.float32))
    assert "no kernel for device type 'meta'" in str(kernels.why_not(torch.device("meta"), torch.float32))
