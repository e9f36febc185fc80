"""Profiles of a round of SkyMask: from Python, and by ``skymask-gpu profile``."""

import csv
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from skymask_gpu import Aggregation, SkyMask
from skymask_gpu.cli import app
from skymask_gpu.cli import profile as cli_profile
from skymask_gpu.engine import Clustering, MaskTraining, profiling
from skymask_gpu.engine.profiling import OTHER, Recording, recording
from skymask_gpu.federation.attacks import AttackConfig
from skymask_gpu.federation.clients import LocalTraining
from skymask_gpu.federation.config import DataConfig, DefenceConfig, RunConfig, read_config
from skymask_gpu.federation.simulation import Federation
from skymask_gpu.profile import FirstRound, choose_run, profile_rounds

ALWAYS = {"collect", "root", "mask steps", "model passes", "bits", "distances", "clustering", "average", OTHER}


def play(run: RunConfig) -> tuple[Federation, FirstRound]:
    federation = Federation.build(run)
    return federation, FirstRound.play(federation, lambda what: None)


@pytest.fixture(scope="module")
def small() -> tuple[Federation, FirstRound]:
    """20 clients on digits, of which 4 attack, and what they send first."""
    local, attack = LocalTraining(steps=5, batch_size=16), AttackConfig(name="min-max", share=0.2)
    return play(RunConfig(data=DataConfig(clients=20, root_samples=50), local=local, attack=attack))


def judge(small: tuple[Federation, FirstRound], **options: Any) -> Aggregation:
    federation, sent = small
    root, labels = federation.parts[-1], federation.dataset.train_labels
    inputs = federation.dataset.train_inputs[root]
    defence = SkyMask(federation.module, inputs, labels[root], training=MaskTraining(steps=4), **options)
    return defence.aggregate(sent.updates, sent.info.global_params, sent.info.root_update)


def test_a_profile_is_made_when_asked_for_and_changes_no_result(
    small: tuple[Federation, FirstRound], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profiling, "_COPY_BYTES", 2**20)
    plain, profiled = judge(small), judge(small, profile=True)
    assert plain.profile is None
    assert profiled.profile is not None
    assert set(profiled.profile.phases) == ALWAYS
    assert profiled.profile.seconds == pytest.approx(sum(cost.seconds for cost in profiled.profile.phases.values()))
    assert profiled.profile.copy_bandwidth > 1e6
    assert profiled.seconds.keys() == plain.seconds.keys()
    assert torch.equal(profiled.update, plain.update)
    assert torch.equal(profiled.masks.bits, plain.masks.bits)
    assert profiled.rejected == plain.rejected


def test_the_average_reads_the_rows_that_are_kept(
    small: tuple[Federation, FirstRound], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profiling, "_COPY_BYTES", 2**20)
    # This rule finds the four, which send the same.
    result = judge(small, profile=True, clustering=Clustering(rule="two-stage"))
    assert result.profile is not None
    assert 0 < int(result.benign.sum()) < 20
    assert result.profile.phases["average"].num_bytes == int(result.benign.sum()) * 4810 * 4
    assert result.profile.phases["collect"].num_bytes >= 20 * 4810 * 4


def test_without_a_profile_nothing_is_recorded_and_nothing_waits(
    small: tuple[Federation, FirstRound], monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*args: object, **kwargs: object) -> None:
        raise AssertionError("this is for profiles only")

    monkeypatch.setattr(Recording, "__init__", forbidden)
    monkeypatch.setattr(torch.cuda, "synchronize", forbidden)
    monkeypatch.setattr(torch.profiler, "record_function", forbidden)
    assert judge(small).profile is None
    with pytest.raises(AssertionError, match="profiles only"):
        judge(small, profile=True)


def test_the_whole_is_the_time_that_passes_but_for_looking_at_memory(small: tuple[Federation, FirstRound]) -> None:
    _, sent = small
    with recording(sent.updates.device) as record:
        start = time.perf_counter()
        sent.judge()
        passed = time.perf_counter() - start
    seconds = record.profile(1.0).seconds
    assert passed <= seconds + record._memory_seconds
    assert record._memory_seconds < seconds < 2 * passed + 0.5


def test_some_of_the_clients_have_the_same_share_of_attackers(small: tuple[Federation, FirstRound]) -> None:
    _, sent = small
    assert sent.client_counts == [5, 10, 20]
    some = sent.with_clients(10)
    clients = some.info.clients.tolist()
    assert len(set(clients)) == 10
    assert sum(client < 4 for client in clients) == 2
    assert torch.equal(some.updates, sent.updates[clients])
    assert replace(sent, updates=sent.updates[:1]).client_counts == [1]


# --- the demo -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder that the command wrote for the demo, and what it printed."""
    folder = tmp_path_factory.mktemp("demo") / "profile"
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(profiling, "_COPY_BYTES", 2**20)
        monkeypatch.setattr(cli_profile, "console", Console(width=160))
        done = CliRunner().invoke(app, ["profile", str(checkout / "examples" / "demo.toml"), "--out", str(folder)])
    assert done.exit_code == 0, done.output + str(done.exception)
    return folder, done.output


def test_the_demos_files_say_the_same(demo: tuple[Path, str]) -> None:
    folder, printed = demo
    assert {path.name for path in folder.iterdir()} == {"profile.json", "profile.csv", "profile.png", "trace.json"}
    about = json.loads((folder / "profile.json").read_text())
    assert (about["run"], about["num_params"]) == ("SkyMask, attacked", 4810)
    assert [entry["clients"] for entry in about["rounds"]] == [25, 50, 100]
    with (folder / "profile.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for entry in about["rounds"]:
        phases = {row["phase"]: row for row in rows if row["clients"] == str(entry["clients"])}
        assert set(phases) == set(entry["phases"]) >= ALWAYS
        assert sum(float(row["share_of_round"]) for row in phases.values()) == pytest.approx(1)
        for name, cost in entry["phases"].items():
            assert float(phases[name]["seconds"]) == cost["seconds"]
            assert name in printed
    for words in (
        "the server's first round, N = 100",
        "all clients' local training (not the server's)",
        "GB/s",
        "lower bounds",
    ):
        assert words in printed
    assert f"{about['rounds'][-1]['accounted']:.1%} of" in printed
    assert f"{1000 * about['local_training_seconds']:,.1f}" in printed
    assert (folder / "profile.png").read_bytes().startswith(b"\x89PNG")


def test_the_chrome_trace_shows_the_phases(demo: tuple[Path, str]) -> None:
    events = json.loads((demo[0] / "trace.json").read_text())["traceEvents"]
    annotated = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    assert set(annotated) >= ALWAYS
    assert annotated.count("model passes") == 20


def test_results_are_not_overwritten(demo: tuple[Path, str], checkout: Path) -> None:
    again = CliRunner().invoke(app, ["profile", str(checkout / "examples" / "demo.toml"), "--out", str(demo[0])])
    assert isinstance(again.exception, ValueError)
    assert "--out" in str(again.exception)
    assert "name another folder" in str(again.exception)


def test_the_phases_account_for_the_demos_server_round(demo: tuple[Path, str], checkout: Path) -> None:
    accounted = json.loads((demo[0] / "profile.json").read_text())["rounds"][-1]["accounted"]
    if accounted < 0.95:
        # other processes on the same cores can only lower it
        _, sent = play(choose_run(read_config(checkout / "examples" / "demo.toml")))
        accounted = max(profile_rounds(sent, lambda what: None)[-1].profile.accounted for _ in range(3))
    assert accounted >= 0.95


def test_another_rule_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    config = tmp_path / "run.toml"
    config.write_text('[defence]\nrule = "krum"\n')
    done = CliRunner().invoke(app, ["profile", str(config), "--out", str(tmp_path / "out")])
    assert str(done.exception) == (
        "defence.rule must be 'skymask' to be profiled, got krum; set rule = \"skymask\" under [defence]"
    )
    assert not (tmp_path / "out").exists()
    assert choose_run([RunConfig(defence=DefenceConfig(rule="krum")), RunConfig(name="mine")]).name == "mine"
