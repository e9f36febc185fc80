"""The privacy audit: what is obfuscated, what comes back, what counts as leaked, and how a stopped audit goes on."""

import csv
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from skymask_gpu.engine.inversion import Minimised, RowGradients
from skymask_gpu.federation.config import ModelConfig
from skymask_gpu.federation.leak import attacking, pictures, recording
from skymask_gpu.federation.leak.attacking import Batch, attacked, batches, check_attackers, first_trials
from skymask_gpu.federation.leak.config import ATTACKERS, Audit, LeakConfig, LeakData, Strengths, read_audit
from skymask_gpu.federation.leak.judging import Line, interval, lines, lookalikes
from skymask_gpu.federation.leak.obfuscation import METHODS, UNTOUCHED, Obfuscation
from skymask_gpu.federation.leak.recording import VICTIMS, attack_all, read_records
from skymask_gpu.federation.leak.thresholds import STEPS, bound_of_none, counting_bound, next_trials, thresholds
from skymask_gpu.federation.leak.victims import Victims
from skymask_gpu.federation.models import MODELS, build_model
from skymask_gpu.federation.transforms.obfuscation import OBFUSCATIONS, Clip, Draws, Mask, Noise, Prune

SMALL = Audit(
    leak=LeakConfig(victims=3, side=12, evaluations=120, attackers=("naive", "aware")),
    privacy=Strengths(mask=(0.9,), clip=(0.9,)),
)


@pytest.fixture(scope="module")
def example(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The example, shortened, and the folder that its command wrote."""
    folder = tmp_path_factory.mktemp("leak")
    text = (checkout / "examples" / "leak.toml").read_text()
    for long, short in (("victims = 32", "victims = 3"), ("evaluations = 300", "evaluations = 10"), ("side = 16", "side = 12")):
        assert long in text
        text = text.replace(long, short)
    (folder / "leak.toml").write_text(text)
    return folder / "leak.toml", folder / "out"


def planned(audit: Audit, victims: Victims) -> list[Batch]:
    return batches(audit, victims, first_trials(audit))


# --- obfuscation ----------------------------------------------------------------------------------

LAYERS = {"weight": slice(0, 100), "bias": slice(100, 300)}


def gradients() -> Tensor:
    return torch.randn(4, 300, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("mask", Mask(strength=0.4)),
        ("clip", Clip(strength=0.4, relative=True)),
        ("prune", Prune(strength=0.4)),
        ("noise", Noise(strength=0.4, relative=True)),
    ],
)
def test_victims_send_what_clients_of_a_run_send(method: str, settings: object) -> None:
    rows, draws = gradients(), Draws(3, 0, torch.arange(4))
    sent = Obfuscation(method, 0.4).sent(rows, draws, LAYERS)
    assert torch.equal(rows, gradients()), "the gradients are needed for other strengths"
    assert torch.equal(sent, OBFUSCATIONS[method](rows, draws, LAYERS, settings))
    assert UNTOUCHED.sent(rows, draws, LAYERS) is rows


@pytest.mark.parametrize("method", METHODS)
def test_what_the_aware_attacker_knows_is_true(method: str) -> None:
    rows, obfuscation = gradients(), Obfuscation(method, 0.5)
    sent = obfuscation.sent(rows, Draws(3, 0, torch.arange(4)), LAYERS)
    known = obfuscation.known(sent, [100, 200])
    if method == "noise":
        assert torch.equal(known.low, sent)
    else:
        assert ((known.low <= rows) & (rows <= known.high)).all()
        assert (known.low < known.high).any()
        assert (known.low == known.high).any()


# --- attacks --------------------------------------------------------------------------------------


def test_who_knows_the_mask_sees_what_the_naive_attacker_does_not() -> None:
    victims = Victims.build(SMALL)
    check_attackers(SMALL, victims)
    ticks: list[None] = []
    (batch,) = planned(SMALL, victims)
    records = attacked(SMALL, victims, batch, lambda: ticks.append(None))
    table = {(line.setting.label, line.attacker): line for line in lines(records)}
    assert len(ticks) == 120
    assert len(table) == 6
    for attacker in ("naive", "aware"):
        assert table["none", attacker].leaked == 1
        assert table["none", attacker].identified == 1
        assert table["none", attacker].mse < 1e-3
    assert table["mask 0.9", "aware"].leaked == 1
    assert table["mask 0.9", "naive"].recognised == 0
    assert table["clip 0.9", "aware"].leaked == 1
    assert table["clip 0.9", "naive"].leaked == 0
    assert all(line.labels == 1 for line in table.values())
    # the stored image is the one that was compared
    (own,) = [one for one in records if (one["obfuscation"], one["attacker"]) == ("none", "naive")]
    stored = torch.tensor([row["image"] for row in own["victims"]]).view_as(victims.images[:, 0])
    torch.testing.assert_close(stored, victims.images[:, 0], rtol=0, atol=0.2)


def test_the_images_are_pixels_and_their_gradients_those_of_autograd() -> None:
    victims = Victims.build(replace(SMALL, leak=LeakConfig(victims=4, side=12)))
    assert (float(victims.images.min()), float(victims.images.max()) <= 1) == (0.0, True)
    for image, label, gradient in zip(victims.images[:, 0], victims.labels[:, 0], victims.gradients, strict=True):
        victims.module.zero_grad()
        nn.functional.cross_entropy(victims.module(image[None]), label[None]).backward()
        wanted = torch.cat([one.grad.reshape(-1) for one in victims.module.parameters() if one.grad is not None])
        torch.testing.assert_close(gradient, wanted)
    assert victims.others is not None
    assert (victims.others != torch.arange(4)).all()
    assert Victims.build(replace(SMALL, leak=LeakConfig(victims=1, side=12))).others is None


def test_who_sees_no_gradient_finds_a_smooth_image_of_no_victim() -> None:
    audit = replace(SMALL, leak=replace(SMALL.leak, attackers=("prior",), tv=1e-3))
    victims = Victims.build(audit)
    check_attackers(audit, victims)
    assert first_trials(audit) == [(UNTOUCHED, "prior")], "no obfuscation changes what it finds"
    (batch,) = planned(audit, victims)
    (record,) = attacked(audit, victims, batch)
    # other gradients change nothing
    others = replace(victims, gradients=victims.gradients.flip(1))
    assert attacked(audit, others, batch) == [record]
    (line,) = lines([record])
    assert (line.leaked, line.labels) == (0, 0)
    image = torch.tensor(record["victims"][0]["image"]).view(12, 12)
    assert image.diff(dim=0).abs().mean() < 0.05 < victims.images[0, 0, 0].diff(dim=0).abs().mean()


def test_the_best_restart_is_chosen_by_its_matching_loss() -> None:
    points = torch.arange(8.0).view(4, 2)
    losses = torch.tensor([3.0, 1.0, torch.inf, torch.inf])
    best = attacking._best(
        Minimised(points, losses, torch.tensor([5, 6, 1, 1]), ["change", "target", "diverged", "diverged"]), 2
    )
    assert best.images.tolist() == [[2.0, 3.0], [4.0, 5.0]]
    assert (best.loss, best.evaluations, best.end) == ([1.0, None], [11, 2], ["target", "diverged"])


def test_restarts_and_small_batches_give_a_line_per_victim(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attacking, "_MOST_ROWS", 4)
    leak = replace(SMALL.leak, evaluations=5, restarts=2)
    audit = replace(SMALL, leak=leak, privacy=Strengths(mask=(0.5,)))
    victims = Victims.build(audit)
    made = planned(audit, victims)
    assert [[(piece.block, list(piece.victims)) for piece in batch] for batch in made] == [
        *[[(0, [0, 1])]] * 4,
        *[[(1, [2])]] * 4,
    ]
    records = [record for batch in made for record in attacked(audit, victims, batch)]
    assert [line.victims for line in lines(records)] == [3] * 4
    assert {row["evaluations"] for record in records for row in record["victims"]} == {10}


def test_a_linear_first_layer_needs_no_search() -> None:
    leak = LeakConfig(victims=4, side=12, attackers=("rank1",))
    audit = replace(SMALL, model=ModelConfig(name="mlp"), leak=leak, privacy=Strengths(mask=(0.5,)))
    victims = Victims.build(audit)
    check_attackers(audit, victims)
    records = [record for batch in planned(audit, victims) for record in attacked(audit, victims, batch)]
    assert all(row["mse"] < 1e-9 and row["end"] == "closed form" for record in records for row in record["victims"])


# --- judging --------------------------------------------------------------------------------------


def test_the_interval_leaves_out_what_has_a_chance_of_less_than_a_fortieth() -> None:
    from scipy.stats import binom

    for hits, trials in ((0, 16), (3, 16), (16, 16), (128, 128)):
        least, most = interval(hits, trials)
        assert least <= hits / trials <= most
        if hits:
            assert binom.sf(hits - 1, trials, least) == pytest.approx(0.025)
        if hits < trials:
            assert binom.cdf(hits, trials, most) == pytest.approx(0.025)


def test_a_wrong_image_may_be_a_leak_without_any_attack() -> None:
    victims = Victims.build(SMALL)
    assert victims.others is not None
    assert lookalikes(victims) == []
    images = victims.images.clone()
    images[victims.others[1]] = 0.5 * images[1] + 0.1
    assert 1 in lookalikes(replace(victims, images=images))
    assert lookalikes(replace(victims, images=images, others=None)) == []


def trial(method: str, strength: float, leaks: bool, attacker: str = "naive") -> dict:
    """What one victim's attack writes."""
    row = {"ssim": 0.91 if leaks else 0.3, "ssim_wrong": None, "mse": 0.0, "identified": False, "label": 1}
    row |= {"label_found": 1, "evaluations": 1, "end": "change"}
    return {"obfuscation": method, "strength": strength, "attacker": attacker, "victims": [row]}


def judged(trials: list[dict]) -> list[Line]:
    return lines([trial("none", 0.0, True), *trials])


def test_the_weakest_strength_has_no_leak_above_it() -> None:
    trials = [trial("clip", s, leaks) for s, leaks in ((0.1, False), (0.9, True), (0.7, False), (0.5, True), (0.3, False))]
    table = judged(trials)
    # a smaller quantile clips more
    assert [line.strength for line in table[1:]] == [0.9, 0.7, 0.5, 0.3, 0.1]
    (found,) = thresholds(table, 0.93)
    assert (found.leaks_at, found.strength, found.undefended, found.counting) == (0.5, 0.3, 1.0, None)
    assert found.at_most == pytest.approx(0.95)
    (found,) = thresholds(judged(trials[1:4]), 0.93)
    assert (found.leaks_at, found.strength, found.at_most) == (0.5, None, None)
    (found,) = thresholds(judged([trial("mask", 0.01, False)]), 0.93)
    assert (found.leaks_at, found.strength, found.counting) == (None, 0.01, 0.93)


def test_the_bound_of_none_is_what_none_would_have_a_chance_of_one_in_twenty_at() -> None:
    from scipy.stats import binom

    for trials in (1, 32, 128):
        assert binom.pmf(0, trials, bound_of_none(trials)) == pytest.approx(0.05)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.51, 0.99, 1.0])
def test_a_search_ends_at_the_strength_that_stops_leaks(method: str, share: float) -> None:
    """The pretended leak stops at a strength that lies at this share of the way along the grid."""
    grid = METHODS[method].grid
    weak, strong = (Obfuscation(method, grid[at]) for at in (0, -1))
    ends = [one.strength for one in (weak, strong)]
    stop = ends[0] * (ends[1] / ends[0]) ** share if METHODS[method].is_log else ends[0] + share * (ends[1] - ends[0])
    stops = Obfuscation(method, stop)
    audit = replace(SMALL, leak=LeakConfig(attackers=("naive",)), privacy=Strengths(**{method: "search"}))
    tried = [one for one, _ in first_trials(audit)]
    assert tried == [UNTOUCHED, *(Obfuscation(method, one) for one in grid)]
    steps = 0
    while trials := next_trials(audit, judged([trial(method, one.strength, one < stops) for one in tried[1:]])):
        ((middle, attacker),) = trials
        assert attacker == "naive"
        assert middle not in tried
        tried, steps = [*tried, middle], steps + 1
    (found,) = thresholds(judged([trial(method, one.strength, one < stops) for one in tried[1:]]), 0.0)
    assert steps <= STEPS
    if share == 0:
        assert (steps, found.leaks_at, found.strength) == (0, None, grid[0])
    else:
        assert found.leaks_at is not None
        assert found.strength is not None
        assert Obfuscation(method, found.leaks_at) < stops <= Obfuscation(method, found.strength)
        near = found.leaks_at / found.strength if METHODS[method].is_log else found.leaks_at - found.strength
        assert 1 / 1.05 < near < 1.05 if METHODS[method].is_log else abs(near) < 0.0025


def test_a_search_stops_where_all_strengths_leak_and_asks_for_each_attacker_alone() -> None:
    # the control sees no mask, so none is searched for it
    audit = replace(SMALL, leak=LeakConfig(), privacy=Strengths(mask="search", noise=(0.1, 0.2)))
    assert "prior" in audit.leak.attackers
    grid = METHODS["mask"].grid
    trials = [trial("mask", one, True, "aware") for one in grid]
    trials += [trial("mask", one, one < 0.1, "naive") for one in grid] + [trial("none", 0.0, True, "aware")]
    trials += [trial("noise", one, one < 0.15, name) for one in (0.1, 0.2) for name in ("naive", "aware")]
    assert next_trials(audit, judged(trials)) == [(Obfuscation("mask", 0.125), "naive")]


def test_the_bound_from_counting_is_that_of_the_formula() -> None:
    """LeNet has 7,536 numbers of convolutions on MNIST, and 588 features that any of 10 classes shows."""
    victims = Victims.build(SMALL)
    for shape, wanted in (((1, 28, 28), 0.93), ((3, 32, 32), 0.71)):
        own = replace(victims, module=build_model("lenet", shape, 10, 0), images=torch.zeros(1, 1, *shape))
        bound = counting_bound(own)
        assert bound == pytest.approx(wanted, abs=0.01)
        convolutions = sum(one.numel() for name, one in own.module.named_parameters() if not name.startswith("fc"))
        features = own.module.fc.in_features
        left = convolutions * (1 - bound) + features * (1 - bound**10) + 10 * (1 - bound ** (features + 1)) - 1
        assert left == pytest.approx(torch.Size(shape).numel(), abs=0.01)
    none = replace(victims, module=nn.Linear(1, 2), images=torch.zeros(1, 1, 1, 28, 28))
    assert counting_bound(none) == 0


# --- the file -----------------------------------------------------------------------------------


def test_the_page_and_the_examples_have_files_that_can_be_read(checkout: Path, tmp_path: Path) -> None:
    page = (checkout / "docs" / "privacy.md").read_text()
    (tmp_path / "page.toml").write_text(page.split("```toml\n")[1].split("```")[0])
    assert read_audit(tmp_path / "page.toml").privacy.obfuscations()[1] == Obfuscation("mask", 0.01)
    for table, settings in SMALL.settings().items():
        for key in settings if isinstance(settings, dict) else [table]:
            assert f"{key} = " in page, key
    assert all(f"`{attacker}`" in page for attacker in ATTACKERS)
    for path in (checkout / "examples").glob("leak*.toml"):
        read_audit(path)


# --- the command ----------------------------------------------------------------------------------


def test_the_example_runs_and_a_stopped_audit_goes_on_to_the_same_bytes(
    example: tuple[Path, Path], run: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, out = example
    # two batches, so that one is done and one is not
    monkeypatch.setattr(attacking, "_MOST_ROWS", 21)
    code, printed = run("leak", config, "--out", out)
    assert code == 0, printed
    assert "attacker's best case" in printed
    results = (
        "leak.csv",
        "leak.md",
        "thresholds.csv",
        "thresholds.md",
        "thresholds.tex",
        "curves.png",
        "faces.png",
        "leak.html",
    )
    before = {name: (out / name).read_bytes() for name in (VICTIMS, *results)}
    with (out / "leak.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [(line["obfuscation"], line["strength"], line["attacker"]) for line in table[:4]] == [
        ("none", "0.0", "aware"), ("none", "0.0", "naive"), ("none", "0.0", "prior"), ("mask", "0.01", "aware"),
    ]  # fmt: skip
    assert len(table) == 13
    page = before["leak.html"].decode()
    assert page.count('src="data:image/png;base64,') == 2
    assert not re.search(r'(?:src|href)="(?!data:)', page), "the page needs no other file"
    for text in ("attacker&#39;s best case", "<td>mask 0.9</td><td>aware</td>", "<th>strongest leak</th>", "max-width: 72rem"):
        assert text in page
    page = before["leak.md"].decode()
    assert "who sees no gradient, reaches a similarity of 0.9 for 0.0% of the images" in page
    assert "has a similarity of 0.9 with the right one for 0 of 3 victims: a perfect" in page
    page = before["thresholds.md"].decode()
    assert re.search(r"\| clip \| naive \| [\d.]+% \| none \| 0.9 \| 63.2% \|", page), "0.632 is 1 minus the third root of 0.05"
    assert re.search(r"\| mask \| naive \| .* \| 100.0% \| 0.98 \|", page)
    code, printed = run("leak", config, "--out", out)
    assert (code, "holds results already; go on with --resume" in printed) == (2, True)
    # killed in the middle of the second batch, with half a line
    whole = before[VICTIMS].splitlines(keepends=True)
    (out / VICTIMS).write_bytes(b"".join(whole[:8]) + whole[8][:50])
    attacks: list[int] = []
    original = attacking.minimise
    monkeypatch.setattr(attacking, "minimise", lambda *a, **k: attacks.append(len(a[1])) or original(*a, **k))
    code, printed = run("leak", config, "--out", out, "--resume")
    assert code == 0, printed
    assert attacks == [18]
    assert {name: (out / name).read_bytes() for name in before} == before
    config.write_text(config.read_text().replace("mask = [0.01, 0.9]", "mask = [0.01]"))
    code, printed = run("leak", config, "--out", out, "--resume")
    assert (code, "made with other settings (privacy); use another folder or --overwrite" in printed) == (2, True)
    code, printed = run("leak", config, "--out", out, "--overwrite")
    assert code == 0, printed
    assert len(read_records(out)) == 11


def test_a_stopped_search_goes_on_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be stopped within a step of the search. The pretended leaks end at a mask of 0.6 (naive) and 0.97 (aware)."""
    audit = replace(SMALL, privacy=Strengths(mask="search", clip=(0.9,)))
    victims = Victims.build(audit)
    stops = {"naive": 0.6, "aware": 0.97}

    def pretended(audit: Audit, victims: Victims, batch: Batch, tick: object) -> list[dict]:
        one = {piece.key: trial("mask", 0.5, piece.obfuscation.strength < stops[piece.attacker]) for piece in batch}
        # how many are attacked together shows in the results, as rounding would
        return [piece.record([row | {"mse": len(batch)} for row in one[piece.key]["victims"]]) for piece in batch]

    monkeypatch.setattr(recording, "attacked", pretended)
    monkeypatch.setattr(attacking, "_MOST_ROWS", 12)
    whole = tmp_path / "whole"
    whole.mkdir()
    steps = list(attack_all(audit, victims, whole))
    assert [step.turn for step in steps] == [0] * 5 + [1, 2, 3, 4, 5, 6, 7]
    found = {one.attacker: one for one in thresholds(lines(read_records(whole)), 0.0) if one.obfuscation == "mask"}
    assert (found["naive"].leaks_at, found["naive"].strength) == (0.5985, 0.6008)
    assert (found["aware"].leaks_at, found["aware"].strength) == (0.9675, 0.97)
    content = (whole / VICTIMS).read_bytes()
    # in the middle of the first trials, and before each line of the search
    ends = [len(b"".join(content.splitlines(keepends=True)[:count])) for count in range(len(content.splitlines()))]
    for size in (ends[7] + 30, *ends[len(first_trials(audit)) :]):
        part = tmp_path / str(size)
        part.mkdir()
        (part / VICTIMS).write_bytes(content[:size])
        list(attack_all(audit, victims, part))
        assert (part / VICTIMS).read_bytes() == content, size


def test_faces_of_a_search_are_those_that_it_ended_between(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    audit = replace(SMALL, leak=replace(SMALL.leak, attackers=ATTACKERS), privacy=Strengths(mask="search", noise=(0.1,)))
    victims = Victims.build(audit)
    trials = [trial("mask", one, one < 0.1) for one in METHODS["mask"].grid]
    trials += [trial("mask", one, True, "aware") for one in METHODS["mask"].grid]
    trials += [trial("none", 0.0, True, name) for name in ("naive", "aware", "prior")] + [trial("noise", 0.1, True)]
    for one in trials:
        one["victims"][0]["image"] = victims.images[0, 0].flatten().tolist()
    shown: list[str] = []
    monkeypatch.setattr(pictures, "_draw_sheet", lambda rows, path: shown.extend(label for label, *_ in rows))
    table = lines(trials)
    pictures.plot_faces(audit, victims, trials, thresholds(table, 0.0), tmp_path / "faces.png")
    strengths = ["mask 0.05, naive", "mask 0.2, naive", "mask 0.999, aware", "noise 0.1, naive"]
    assert shown == ["original", "none, aware", "none, naive", *strengths, "none, prior"]
    # strengths that only one attacker faced are no hole in the curves
    pictures.plot_curves(audit, [*table, *lines([trial("mask", 0.125, False)])], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    (tmp_path / VICTIMS).write_text('{"block": -1}\n')
    with pytest.raises(
        ValueError, match=r'victims.jsonl, line 1 must be .* whole number "block" of at least 0, got "block": -1'
    ):
        next(attack_all(SMALL, Victims.build(SMALL), tmp_path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[leak]\nvictims = 0", "leak.victims must be at least 1, got 0"),
        ("[leak]\nattackers = ['naiv']", r"leak.attackers must be one of .*, got 'naiv'; did you mean 'naive'"),
        ("[leak]\nattackers = []", "leak.attackers must be a list of different names"),
        ("[leak]\ntv = -1.0", "leak.tv must be finite and at least 0, got -1.0"),
        ("[leak]\nside = -1", "leak.side must be a number of pixels"),
        ("[privacy]\nmask = [1.0]", "privacy.mask must be above 0 and below 1, got 1.0"),
        ("[privacy]\nclip = [0.0]", "privacy.clip must be above 0 and below 1, got 0.0"),
        ("[privacy]\nnoise = [-0.1]", "privacy.noise must be above 0, got -0.1"),
        ("[privacy]\nnoise = [nan]", "privacy.noise must be above 0, got nan"),
        ("[privacy]\nclip = 'serach'", "privacy.clip must be a list of strengths, or 'search', got 'serach'"),
        ("[privacy]\nclip = 0.5", "privacy.clip must be a list of numbers, got 0.5"),
        ("[privacy]\nprune = [0.5, 0.5]", "privacy.prune must be a list of different strengths"),
        ("[leak]\nobserve = 'updates'", "leak.observe must be one of gradient, update, got 'updates'; did you mean 'update'"),
        ("[local]\nepochs = 1", "local.epochs must be 0 in an audit, got 1"),
        ("[local]\nlr = 0.0", "local.lr must be finite and above 0, got 0.0"),
        ("seed = -1", "seed must be between 0 and"),
        ("[privacy]\nmaks = [0.5]", "unknown key privacy.maks; did you mean privacy.mask"),
    ],
)
def test_a_wrong_setting_has_one_clear_error(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "leak.toml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_audit(tmp_path / "leak.toml")


def test_what_cannot_be_attacked_is_refused_with_the_remedy() -> None:
    for leak, message in (
        (LeakConfig(victims=2000, side=12), "leak.victims must be at most 1437, the training images of 'digits', got 2000"),
        (LeakConfig(victims=2), r"leak.side must be at least 11, .* for the images of \(8, 8\) pixels of 'digits', got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            Victims.build(replace(SMALL, leak=leak))
    audit = replace(SMALL, leak=LeakConfig(victims=2, side=12, attackers=("rank1",)))
    with pytest.raises(ValueError, match=r"'lenet' must begin \(for leak.attackers 'rank1'\) with a linear layer, got Conv2d"):
        check_attackers(audit, Victims.build(audit))
    data = Victims.build(SMALL)
    assert LeakData().dataset == "digits"

    class Stepped(nn.Module):
        """Its gradient is that of the sign of a pixel, which no small change of the image changes."""

        def __init__(self, input_shape: tuple[int, ...], num_classes: int) -> None:
            super().__init__()
            self.fc = nn.Linear(torch.Size(input_shape).numel(), num_classes)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.fc((inputs.flatten(1) - 0.5).sign())

    class Broken(Stepped):
        def forward(self, inputs: Tensor) -> Tensor:
            return super().forward(inputs) * torch.nan

    MODELS.register("stepped")(Stepped)
    MODELS.register("broken")(Broken)
    try:
        stepped = replace(SMALL, model=ModelConfig(name="stepped"))
        with pytest.raises(ValueError, match="'stepped' has no second derivative; take lenet"):
            check_attackers(stepped, Victims.build(stepped))
        with pytest.raises(ValueError, match=r"'broken' gives victims \[0, 1, 2\] a gradient with NaN or Inf"):
            Victims.build(replace(SMALL, model=ModelConfig(name="broken")))
    finally:
        MODELS.remove("stepped")
        MODELS.remove("broken")
    assert RowGradients(data.module).num_params == data.gradients.shape[1]
    assert json.dumps(SMALL.settings())
