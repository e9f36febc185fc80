"""Where the server's time goes in the first round of a federated run, for a few numbers of clients.

The round is what the server does: from the clients' updates to the verdict and the mean. The local
training of the clients, which a server does not do, is listed beside it. The results are written as
a JSON, a CSV and a PNG file and as a Chrome trace.
"""

import csv
import io
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from skymask_gpu.drawing import COLOURS, save, styled
from skymask_gpu.engine.profiling import OTHER, Profile, Recording, copy_bandwidth, recording
from skymask_gpu.federation.config import RunConfig
from skymask_gpu.federation.rules import RoundInfo, Rule, RuleResult
from skymask_gpu.federation.simulation import Federation
from skymask_gpu.io.files import write_text, write_whole

__all__ = ["NOTE", "FirstRound", "RoundProfile", "choose_run", "profile_rounds", "write_profiles", "write_trace"]

NOTE = (
    "time: without that of phases inside; bytes: computed from the sizes of what a phase has to read and write, without "
    "temporaries and activations, so they and the share of the copy bandwidth are lower bounds (above 100%: it stayed in the "
    "cache); peak: beyond what was held before the round"
)

# The round is repeated this often with the same updates. The one with the median time is reported.
_REPEATS = 5
# The colour of what is no phase of the server's round.
_GREY = "#bbbbbb"
_COLUMNS = ("clients", "phase", "seconds", "share_of_round", "calls", "bytes", "copy_share", "peak_bytes")


@dataclass(frozen=True)
class RoundProfile:
    """The profile of the server's round with ``num_clients`` clients, and the solver it used."""

    num_clients: int
    solver: str
    profile: Profile


def choose_run(runs: list[RunConfig]) -> RunConfig:
    """The first of a file's runs whose rule is SkyMask.

    Raises:
        ValueError: no run has this rule.
    """
    for run in runs:
        if run.defence.rule == "skymask":
            return run
    rules = ", ".join(dict.fromkeys(run.defence.rule for run in runs))
    raise ValueError(f"defence.rule must be 'skymask' to be profiled, got {rules}; set rule = \"skymask\" under [defence]")


@dataclass(frozen=True)
class FirstRound:
    """What the clients of the first round sent, and the rule that judges it.

    Attributes:
        rule: the rule of the run.
        updates: ``(N, P)``, after the attack.
        info: what the rule is told about the round besides.
        training_seconds: the time of all local training, that of the root model included.
    """

    rule: Rule
    updates: Tensor
    info: RoundInfo
    training_seconds: float

    @classmethod
    def play(cls, federation: Federation, progress: Callable[[str], None]) -> "FirstRound":
        """Play local training and the attack of round 1, as in any run."""
        kept = _KeptRound()
        played = replace(federation, rule=kept).play_round(0, federation.first_model(), progress)
        return cls(federation.rule, kept.updates, kept.info, played.seconds["local_training"])

    @property
    def client_counts(self) -> list[int]:
        """A quarter, half and all of the number of clients."""
        num_clients = len(self.updates)
        return sorted({-(-num_clients // 4), -(-num_clients // 2), num_clients})

    def with_clients(self, num_clients: int) -> "FirstRound":
        """The round with only ``num_clients`` evenly spaced clients.

        Attackers come first in the order, so even spacing keeps their share.
        """
        chosen = torch.linspace(0, len(self.updates) - 1, num_clients).round().long()
        info = replace(self.info, clients=self.info.clients[chosen])
        return replace(self, updates=self.updates[chosen.to(self.updates.device)], info=info)

    def judge(self) -> RuleResult:
        """Judge the clients once."""
        return self.rule(self.updates, self.info)


class _KeptRound:
    """Stands in for a rule, and keeps what the rule would be given."""

    updates: Tensor
    info: RoundInfo

    def __call__(self, updates_MP: Tensor, info: RoundInfo) -> RuleResult:
        self.updates, self.info = updates_MP, info
        return RuleResult(torch.zeros_like(info.global_params), None)

    def state(self) -> dict[str, Tensor]:
        return {}

    def restore(self, state: dict[str, Tensor]) -> None:
        pass


def profile_rounds(played: FirstRound, progress: Callable[[str], None]) -> list[RoundProfile]:
    """Profile the server's round for each number of clients.

    Each is preceded by one round that does not count, because it may compile kernels.
    """
    profiles = []
    for num_clients in played.client_counts:
        progress(f"judging {num_clients:,} clients")
        round_ = played.with_clients(num_clients)
        device = round_.updates.device
        result = round_.judge()
        records: list[Recording] = []
        for _ in range(_REPEATS):
            with recording(device) as record:
                round_.judge()
            records.append(record)
        bandwidth = copy_bandwidth(device)
        by_time = sorted((record.profile(bandwidth) for record in records), key=lambda profile: profile.seconds)
        profiles.append(RoundProfile(num_clients, result.record["solver"], by_time[_REPEATS // 2]))
    return profiles


def write_trace(played: FirstRound, path: Path) -> None:
    """Judge the round once more under torch.profiler, and write a Chrome trace.

    Open it in https://ui.perfetto.dev or chrome://tracing.
    """
    device = played.updates.device
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler, recording(device):
        played.judge()
    write_whole(path, lambda temporary: profiler.export_chrome_trace(str(temporary)))


def write_profiles(played: FirstRound, profiles: list[RoundProfile], config: RunConfig, folder: Path) -> None:
    """Write ``profile.json``, ``profile.csv`` and ``profile.png`` into ``folder``.

    The CSV file has one row per number of clients and phase.
    """
    about = {
        "what": "the server's round, the first of the run; local training is the simulated clients'",
        "note": NOTE,
        "run": config.name,
        "num_params": played.updates.shape[1],
        "device": _device_name(played.updates.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "local_training_seconds": played.training_seconds,
        "rounds": [
            {"clients": p.num_clients, "solver": p.solver, "accounted": p.profile.accounted, **asdict(p.profile)}
            for p in profiles
        ],
        "config": config.to_dict(),
    }
    write_text(folder / "profile.json", json.dumps(about, indent=2) + "\n")
    write_text(folder / "profile.csv", _csv(profiles))
    title = f"SkyMask, P = {played.updates.shape[1]:,}, {_device_name(played.updates.device)}"
    _plot(profiles, played.training_seconds, title, folder / "profile.png")


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"


def _csv(profiles: list[RoundProfile]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for p in profiles:
        for name, cost in p.profile.phases.items():
            share = cost.seconds / p.profile.seconds
            num_bytes = cost.num_bytes or None
            row = (p.num_clients, name, cost.seconds, share, cost.calls, num_bytes, cost.copy_share, cost.peak_bytes)
            writer.writerow(row)
    return text.getvalue()


def _plot(profiles: list[RoundProfile], training_seconds: float, title: str, path: Path) -> None:
    with styled(grid=False):
        figure = Figure(figsize=(9, 6.5), layout="constrained")
        phases, whole = figure.subplots(2, 1, gridspec_kw={"height_ratios": (5, 1)})
        _plot_phases(phases, profiles)
        _plot_whole(whole, profiles[-1], training_seconds)
        figure.suptitle(title)
        save(figure, path)


def _plot_phases(axes: Axes, profiles: list[RoundProfile]) -> None:
    """Draw one bar per number of clients, stacked from the times of the phases."""
    names = [*dict.fromkeys(name for p in reversed(profiles) for name in p.profile.phases if name != OTHER), OTHER]
    bottoms = [0.0] * len(profiles)
    for number, name in enumerate(names):
        costs = [p.profile.phases.get(name) for p in profiles]
        heights = [1000 * cost.seconds if cost else 0.0 for cost in costs]
        colour = _GREY if name == OTHER else COLOURS[number % len(COLOURS)]
        # The palette has seven colours; phases beyond that are hatched.
        hatch = "///" if number >= len(COLOURS) and name != OTHER else None
        axes.bar(
            range(len(profiles)), heights, 0.6, bottom=bottoms, color=colour, hatch=hatch, edgecolor="white", lw=0.3, label=name
        )
        bottoms = [a + b for a, b in zip(bottoms, heights, strict=True)]
    axes.set_xticks(range(len(profiles)), [f"N = {p.num_clients:,}\n{p.solver}" for p in profiles])
    axes.set(title="the server's round by phase", ylabel="milliseconds")
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), reverse=True)


def _plot_whole(axes: Axes, largest: RoundProfile, training_seconds: float) -> None:
    seconds = {f"the server, N = {largest.num_clients:,}": largest.profile.seconds, "local training of all": training_seconds}
    bars = axes.barh(list(seconds), [1000 * value for value in seconds.values()], 0.6, color=(COLOURS[0], _GREY))
    axes.bar_label(bars, [f"{1000 * value:,.0f} ms" for value in seconds.values()], padding=3)
    axes.margins(x=0.12)
    axes.set(title="beside the clients' local training, here side by side on the same device", xlabel="milliseconds")
