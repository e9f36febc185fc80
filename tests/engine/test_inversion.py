"""Gradient inversion: rows equal to autograd, L-BFGS equal to PyTorch's row by row, and images that come back."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from skymask_gpu.engine.inversion import (
    SCALE,
    Known,
    Matching,
    RowGradients,
    input_from_linear_layer,
    labels_from_gradients,
    minimise,
    minimise_by_sign,
)
from skymask_gpu.engine.inversion.curvature import Curvature
from skymask_gpu.engine.similarity import ssim
from skymask_gpu.federation.models.lenet import LeNet


@pytest.fixture
def lenet() -> LeNet:
    torch.manual_seed(0)
    return LeNet((1, 12, 12), 10)


def generated(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


# --- rows -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("own_params", [False, True])
@pytest.mark.parametrize("soft", [False, True])
def test_rows_are_the_gradients_of_autograd_and_so_are_theirs(lenet: LeNet, own_params: bool, soft: bool) -> None:
    module = lenet.double()
    inputs = generated(4, 1, 12, 12)
    labels = generated(4, 10, seed=1).softmax(1) if soft else torch.tensor([3, 0, 9, 3])
    rows = RowGradients(module)
    assert rows.by_hand
    if own_params:
        rows = RowGradients(module, rows.params + 0.1 * generated(4, rows.num_params, seed=2))
    check_rows(module, rows, inputs, labels)


def started(module: nn.Module) -> nn.Module:
    """The module in float64, with the same parameters in each run."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.double().parameters():
        nn.init.uniform_(parameter.data, -0.5, 0.5, generator=generator)
    return module


def check_rows(module: nn.Module, rows: RowGradients, inputs: Tensor, labels: Tensor) -> None:
    """Gradients, and what they change with the inputs, are those of autograd, one row at a time."""
    inputs = inputs.detach().requires_grad_()
    got_BP = rows(inputs, labels)
    weights_BP = generated(len(inputs), rows.num_params, seed=3)
    (second,) = torch.autograd.grad((got_BP * weights_BP).sum(), inputs)
    for b in range(len(inputs)):
        params = {
            name: value.requires_grad_() for name, value in rows.unflatten(rows.of(torch.tensor([b])).params.view(-1)).items()
        }
        one = inputs[b : b + 1].detach().requires_grad_()
        loss = nn.functional.cross_entropy(torch.func.functional_call(module, params, (one,)), labels[b : b + 1])
        grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
        flat_P = torch.cat([grad.reshape(-1) for grad in grads])
        torch.testing.assert_close(got_BP[b], flat_P, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(
            second[b : b + 1], torch.autograd.grad((flat_P * weights_BP[b]).sum(), one)[0], rtol=1e-10, atol=1e-12
        )


@pytest.mark.parametrize(
    "layers",
    [
        # strides that leave a rest, kernels and paddings that are no squares
        [nn.Conv2d(2, 3, (3, 2), (2, 3), (1, 0)), nn.Sigmoid(), nn.Flatten(), nn.Linear(3 * 5 * 3, 4)],
        # a layer without bias, one without activation, and two linear layers
        [nn.Conv2d(2, 3, 4, 3, bias=False), nn.Conv2d(3, 2, 2), nn.Flatten(), nn.Linear(2, 5), nn.Sigmoid(), nn.Linear(5, 4)],
        # nothing but a linear layer, without bias; an activation before anything else
        [nn.Flatten(), nn.Linear(2 * 9 * 8, 4, bias=False)],
        [nn.Sigmoid(), nn.Flatten(), nn.Sigmoid(), nn.Linear(2 * 9 * 8, 4)],
    ],
)
def test_layers_that_follow_each_other_need_no_autograd(layers: list[nn.Module]) -> None:
    module = started(nn.Sequential(*layers))
    rows = RowGradients(module)
    assert rows.by_hand
    check_rows(module, rows, generated(3, 2, 9, 8), torch.tensor([3, 0, 1]))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.fc = nn.Conv2d(2, 2, 3, padding=1), nn.Linear(2 * 9 * 8, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.fc(torch.flatten(inputs + torch.sigmoid(self.body(inputs)), 1))


class Branching(Residual):
    """Its way depends on values, so that it cannot be traced."""

    def forward(self, inputs: Tensor) -> Tensor:
        if len(inputs) == 0:
            return inputs
        return self.fc(torch.flatten(self.body(inputs), 1))


def twice() -> nn.Module:
    one = nn.Conv2d(2, 2, 3, padding=1)
    return nn.Sequential(one, nn.Sigmoid(), one, nn.Flatten(), nn.Linear(2 * 9 * 8, 4))


def frozen() -> nn.Module:
    module = nn.Sequential(nn.Conv2d(2, 2, 3), nn.Flatten(), nn.Linear(2 * 7 * 6, 4))
    module[0].bias.requires_grad_(False)
    return module


def stretched() -> nn.Module:
    """Its weight is no parameter, but made of two before each call."""
    with pytest.warns(FutureWarning):
        return nn.Sequential(nn.Flatten(), nn.utils.weight_norm(nn.Linear(2 * 9 * 8, 4)))


@pytest.mark.parametrize(
    "build",
    [
        Residual,
        Branching,
        twice,
        frozen,
        stretched,
        lambda: nn.Sequential(nn.Conv2d(2, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(2 * 7 * 6, 4)),
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.Flatten(), nn.Linear(4 * 7 * 6, 4)),
        lambda: nn.Sequential(nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), nn.Flatten(), nn.Linear(2 * 9 * 8, 4)),
        lambda: nn.Sequential(nn.Linear(8, 3), nn.Flatten(), nn.Linear(2 * 9 * 3, 4)),
        lambda: nn.Sequential(nn.Flatten(2), nn.Linear(72, 4), nn.Flatten(), nn.Linear(8, 4)),
        lambda: nn.Sequential(nn.Conv2d(2, 4, (9, 8)), nn.Flatten()),
    ],
)
def test_other_models_are_left_to_autograd(build: Callable[[], nn.Module]) -> None:
    module = started(build())
    rows = RowGradients(module)
    assert not rows.by_hand
    check_rows(module, rows, generated(3, 2, 9, 8), torch.tensor([3, 0, 1]))


# --- L-BFGS ---------------------------------------------------------------------------------------


def valleys(curvature_BD: Tensor, centre_BD: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """Bent valleys, a different one per row, which L-BFGS needs many steps in."""

    def loss(points: Tensor, rows: Tensor) -> Tensor:
        off = points - centre_BD[rows]
        bent = off[:, 1:] - 0.3 * off[:, :-1] ** 2
        return (curvature_BD[rows] * off**2).sum(1) + 3 * bent.square().sum(1)

    return loss


def alone(loss: Callable[[Tensor, Tensor], Tensor], row: int, start_D: Tensor, steps: int, history: int) -> tuple[Tensor, int]:
    """PyTorch's L-BFGS on one row: its last point, and the number of evaluations."""
    point = start_D[None].clone().requires_grad_()
    optimiser = torch.optim.LBFGS([point], lr=0.5, max_iter=steps, max_eval=10 * steps, history_size=history)
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        optimiser.zero_grad()
        value = loss(point, torch.tensor([row])).sum()
        value.backward()
        return value

    optimiser.step(closure)
    return point.detach()[0], calls


def two_loops(pairs: list[tuple[Tensor, Tensor]], grad: Tensor) -> Tensor:
    """The plain recursion of Nocedal (1980) for one row, from its (step, turn) pairs, the oldest first."""
    direction, factors = -grad, []
    for step, turn in reversed(pairs):
        factors.append(step @ direction / (step @ turn))
        direction = direction - factors[-1] * turn
    step, turn = pairs[-1]
    direction = direction * (step @ turn) / (turn @ turn)
    for (step, turn), factor in zip(pairs, reversed(factors), strict=True):
        direction = direction + (factor - turn @ direction / (step @ turn)) * step
    return direction


def test_directions_are_those_of_the_two_loops() -> None:
    """Rows refuse points, learn nothing from some, forget all, and leave; more pairs come than there is room for."""
    num_rows, values, history = 5, 12, 4
    bend = generated(values, values) - 0.5
    hessian = bend @ bend.T + torch.eye(values, dtype=torch.float64)
    grad = torch.zeros(num_rows, values, dtype=torch.float64)
    curvature = Curvature(grad, history)
    pairs: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(num_rows)]
    left = torch.arange(num_rows)
    for turn in range(15):
        step = generated(num_rows, values, seed=turn)[left] - 0.5
        luck = generated(num_rows, seed=100 + turn)[left]
        accepted = luck > 0.2
        learnt = accepted & (luck > 0.4)
        reached = grad + step @ hessian
        curvature.learn(step, step @ hessian, reached, accepted, learnt)
        grad = torch.where(accepted[:, None], reached, grad)
        for row in learnt.nonzero()[:, 0].tolist():
            pairs[left[row]].append((step[row], step[row] @ hessian))
        if turn == 8:
            curvature.forget(left == 1)
            pairs[1].clear()
        if turn == 9:
            stays = left != 3
            curvature.keep(stays)
            left, grad = left[stays], grad[stays]
        for row, direction in zip(left.tolist(), curvature.direction(grad), strict=True):
            if pairs[row]:
                wanted = two_loops(pairs[row][-history:], grad[(left == row).nonzero()[0, 0]])
                torch.testing.assert_close(direction, wanted, rtol=1e-9, atol=1e-9)
    assert min(len(one) for number, one in enumerate(pairs) if number not in (1, 3)) > history


@pytest.mark.parametrize("history", [100, 5])
def test_each_row_moves_as_in_pytorch_alone(history: int) -> None:
    """16 rows, 50 steps, in float64; some rows start at their goal or near it, and stop early."""
    curvature, centre = 10 ** (2 * generated(16, 12) - 1.5), generated(16, 12, seed=1)
    start = generated(16, 12, seed=2) - 0.5
    start[3], start[7] = centre[3], centre[7] + 1e-5
    loss = valleys(curvature, centre)
    steps = 50
    wanted, calls = zip(*(alone(loss, row, start[row], steps, history) for row in range(16)), strict=True)
    # without line search the loss may rise, and minimise() gives out the best point instead of the last
    last: dict[int, Tensor] = {}

    def watched(points: Tensor, rows: Tensor) -> Tensor:
        last.update(zip(rows.tolist(), points.detach().clone(), strict=True))
        return loss(points, rows)

    found = minimise(watched, start, mode="torch", evaluations=steps, history=history, lr=0.5)
    assert found.evaluations.tolist() == list(calls)
    assert found.evaluations[3] == 1
    assert 1 < found.evaluations[7] < steps
    # PyTorch takes one more step after the last evaluation of a full run
    for row in range(16):
        if found.evaluations[row] < steps:
            torch.testing.assert_close(last[row], wanted[row], rtol=0, atol=1e-8)
    full = minimise(watched, start, mode="torch", evaluations=steps + 1, history=history, lr=0.5)
    for row in range(16):
        if full.evaluations[row] == steps + 1:
            torch.testing.assert_close(last[row], wanted[row], rtol=0, atol=1e-8)


def test_rows_do_not_touch_each_other() -> None:
    curvature, centre, start = 10 ** (2 * generated(6, 8) - 1), generated(6, 8, seed=1), generated(6, 8, seed=2)
    loss = valleys(curvature, centre)
    together = minimise(loss, start, evaluations=80)
    for row in range(6):
        single = minimise(lambda x, rows, row=row: loss(x, rows + row), start[row : row + 1], evaluations=80)
        torch.testing.assert_close(single.points[0], together.points[row], rtol=0, atol=1e-9)
        assert single.evaluations[0] == together.evaluations[row]


def test_safe_steps_never_lose_ground_and_a_row_that_breaks_leaves_the_others_alone() -> None:
    def loss(points: Tensor, rows: Tensor) -> Tensor:
        """Row 0 is a hole beside a cliff of NaN, row 1 is a parabola, row 2 is NaN everywhere."""
        kinds = (lambda x: x**2 - torch.log(x), lambda x: (x - 3) ** 2, lambda x: x * torch.nan)
        return torch.stack([kinds[row](x) for x, row in zip(points[:, 0], rows.tolist(), strict=True)])

    found = minimise(loss, torch.tensor([[0.01], [0.0], [1.0]], dtype=torch.float64), evaluations=60)
    torch.testing.assert_close(found.points[:2, 0], torch.tensor([0.5**0.5, 3.0], dtype=torch.float64), rtol=1e-5, atol=0)
    assert found.reasons[2] == "diverged"
    assert (found.points[2, 0], found.losses[2]) == (1.0, torch.inf)
    # steps three times too long are halved; without line search they lead further and further away
    goal, start = generated(4, 5, seed=3), generated(4, 5)
    bowl = lambda points, rows: (points - goal[rows]).square().sum(1)  # noqa: E731
    assert (minimise(bowl, start, lr=3.0, evaluations=80).losses < 1e-9).all()
    assert (minimise(bowl, start, lr=3.0, evaluations=80, mode="torch").losses > 1e-6).all()
    # a row without line search jumps over the cliff and says so
    assert minimise(loss, torch.tensor([[0.01]], dtype=torch.float64), mode="torch", lr=30.0).reasons == ["diverged"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"mode": "newton"}, "mode must be 'torch' or 'safe', got 'newton'"),
        ({"start": torch.zeros(3)}, r"start must be a floating tensor \(B, D\)"),
        ({"start": torch.zeros(3, 2, dtype=torch.int64)}, "start must be a floating tensor"),
        ({"evaluations": 0}, "evaluations and history must be at least 1, got 0 and 100"),
    ],
)
def test_wrong_arguments_have_one_clear_error(changed: dict, message: str) -> None:
    arguments = {"start": torch.zeros(3, 2), **changed}
    with pytest.raises(ValueError, match=message):
        minimise(lambda points, rows: points.sum(1), **arguments)


# --- what an attacker knows -----------------------------------------------------------------------


def test_what_is_known_holds_for_the_true_gradient_and_costs_nothing() -> None:
    """The truth lies in the intervals of every obfuscation; a wrong one does not."""
    true = generated(3, 40) - 0.5
    masked = torch.where(generated(3, 40, seed=1) < 0.5, true, 0.0)
    clipped = true.clamp(-0.2, 0.2)
    sizes = [25, 15]
    pruned = torch.cat(
        [part.where(part.abs() > part.abs().quantile(0.6, 1, keepdim=True), 0.0) for part in true.split(sizes, 1)], 1
    )
    for known in (Known.exactly(true), Known.masked(masked), Known.clipped(clipped, 0.2), Known.pruned(pruned, sizes)):
        assert ((known.low <= true) & (true <= known.high)).all()
        assert not ((known.low <= -true) & (-true <= known.high)).all()
    # a layer of which nothing is left tells nothing
    gone = pruned.clone()
    gone[0, 25:] = 0
    assert torch.isinf(Known.pruned(gone, sizes).high[0, 25:]).all()
    assert not torch.isnan(Known.pruned(gone, sizes).low).any()


def test_the_distance_is_how_far_a_gradient_lies_outside_of_its_interval(lenet: LeNet) -> None:
    """The loss and its slope are those of the plain formula, and so they stay when some rows leave."""
    rows = RowGradients(lenet.double())
    labels, points = torch.tensor([1, 2, 3]), generated(3, 144, seed=2)
    sent = rows(generated(3, 1, 12, 12), labels)
    for known in (Known.exactly(sent), Known.clipped(sent.clamp(-0.1, 0.1), 0.1)):
        matching = Matching(rows, known, labels, (1, 12, 12))
        for numbers in (torch.arange(3), torch.tensor([2, 0])):
            point = points[numbers].requires_grad_()
            gradient = rows(point.view(-1, 1, 12, 12), labels[numbers])
            outside = (known.low[numbers] - gradient).clamp_min(0) + (gradient - known.high[numbers]).clamp_min(0)
            wanted = SCALE * outside.square().sum(1) / known.squared_length()[numbers]
            got = matching(point, numbers)
            torch.testing.assert_close(got, wanted, rtol=1e-10, atol=0)
            slopes = [torch.autograd.grad(one.sum(), point, retain_graph=True)[0] for one in (got, wanted)]
            torch.testing.assert_close(*slopes, rtol=1e-9, atol=1e-12)


def test_each_row_has_its_own_prior_and_bound() -> None:
    rows = RowGradients(nn.Sequential(nn.Flatten(), nn.Linear(9, 3)).double())
    images, labels = generated(2, 1, 3, 3), torch.tensor([0, 2])
    sent = rows(images, labels)
    points, prior = generated(2, 9, seed=1), torch.tensor([0.0, 0.1])
    both = Matching(rows, Known.exactly(sent), labels, (1, 3, 3), tv=prior)(points, torch.arange(2))
    for row in range(2):
        alone = Matching(rows, Known.exactly(sent[row : row + 1]), labels[row : row + 1], (1, 3, 3), tv=float(prior[row]))
        torch.testing.assert_close(both[row], alone(points[row : row + 1], torch.tensor([0]))[0])
    bounds = sent.abs().amax(1, keepdim=True) * torch.tensor([[0.5], [1.0]])
    known = Known.clipped(sent.clamp(-bounds, bounds), bounds)
    assert torch.isinf(known.high - known.low).sum(1).tolist() == (sent.abs() >= bounds).sum(1).tolist()


def test_the_cosine_looks_at_directions_of_known_entries_only(lenet: LeNet) -> None:
    rows = RowGradients(lenet.double())
    images, labels = generated(3, 1, 12, 12), torch.tensor([1, 2, 3])
    true, numbers = rows(images, labels), torch.arange(3)
    masked = torch.where(generated(*true.shape, seed=1) < 0.5, true, 0.0)
    scaled = Matching(rows, Known.masked(7.0 * masked), labels, (1, 12, 12), distance="cosine")
    assert (scaled(images.flatten(1), numbers) < 1e-9).all()
    other = generated(3, 144, seed=2)
    wanted = 1 - nn.functional.cosine_similarity(rows(other.view_as(images), labels) * (masked != 0), masked)
    torch.testing.assert_close(scaled(other, numbers), SCALE * wanted, rtol=1e-9, atol=0)
    with pytest.raises(ValueError, match="distance must be 'l2' or 'cosine', got 'l1'"):
        Matching(rows, Known.exactly(true), labels, (1, 12, 12), distance="l1")


# --- images ---------------------------------------------------------------------------------------


def test_an_image_comes_back_from_its_gradient_and_from_half_of_it(lenet: LeNet) -> None:
    """Real digits, enlarged to 12 x 12, from gradients of one sample each; all rows are one batch."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    small = torch.tensor(digits.images[:6] / 16, dtype=torch.float32)[:, None]
    images = nn.functional.interpolate(small, (12, 12), mode="bilinear")
    labels = torch.tensor(digits.target[:6])
    rows = RowGradients(lenet)
    sent = rows(images, labels)
    masked = torch.where(torch.rand(sent.shape, generator=torch.Generator().manual_seed(1)) < 0.5, sent, 0.0)
    start = torch.rand(6, 144, generator=torch.Generator().manual_seed(2))
    for known, least in ((Known.exactly(sent), 0.9), (Known.masked(masked), 0.9)):
        loss = Matching(rows, known, labels, (1, 12, 12))
        found = minimise(loss, start, evaluations=500, target=1e-6)
        similar = ssim(images, found.points.view(-1, 1, 12, 12))
        assert (similar > least).sum() >= 5, similar
    # who takes the mask's zeros for true gets nothing
    naive = minimise(Matching(rows, Known.exactly(masked), labels, (1, 12, 12)), start, evaluations=200)
    assert (ssim(images, naive.points.view(-1, 1, 12, 12)) < 0.9).all()


def test_the_label_is_read_off_the_last_layer_also_through_a_mask(lenet: LeNet) -> None:
    labels = torch.arange(10).repeat(4)
    rows = RowGradients(lenet)
    sent = rows(generated(40, 1, 12, 12, dtype=torch.float32), labels)
    layers = rows.unflatten(sent)
    assert torch.equal(labels_from_gradients(layers["fc.weight"], layers["fc.bias"]), labels)
    masked = rows.unflatten(sent * (torch.rand(sent.shape, generator=torch.Generator().manual_seed(0)) > 0.8))
    found = labels_from_gradients(masked["fc.weight"], masked["fc.bias"])
    assert (found == labels).float().mean() >= 0.95


@pytest.mark.parametrize("kept", [1.0, 0.5, 0.1])
def test_a_linear_layer_gives_its_input_away_in_closed_form(kept: float) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10)).double()
    images, labels = 0.05 + generated(8, 1, 28, 28), torch.arange(8)
    rows = RowGradients(module)
    sent = rows(images, labels)
    masked = torch.where(generated(*sent.shape, seed=1) < kept, sent, 0.0)
    layers = rows.unflatten(masked)
    values, known = input_from_linear_layer(layers["1.weight"], layers["1.bias"])
    # a pixel is lost if every active unit lost it
    active = (rows.unflatten(sent)["1.weight"] != 0).any(2).sum(1)
    lost = (~known).double().mean(1)
    assert (lost <= (1 - kept) ** active + 5 * ((1 - kept) ** active / 784).sqrt() + 1e-12).all()
    torch.testing.assert_close(values[known], images.flatten(1)[known], rtol=0, atol=1e-9)


def test_adam_on_signs_moves_every_row_to_its_own_goal_within_the_box() -> None:
    goals = 2 * generated(5, 6) - 0.5
    found = minimise_by_sign(
        lambda x, rows: (x - goals[rows]).square().sum(1), torch.zeros(5, 6, dtype=torch.float64), evaluations=300
    )
    torch.testing.assert_close(found.points, goals.clamp(0, 1), rtol=0, atol=2e-3)
    with pytest.raises(ValueError, match="low below high"):
        minimise_by_sign(lambda x, rows: x.sum(1), torch.zeros(1, 1), low=1.0, high=0.0)
