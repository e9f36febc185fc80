"""Reports of synthetic runs: no training, every number in the tables worked out by hand."""

import csv
import json
import re
import statistics
import subprocess
import sys
import xml.etree.ElementTree as ET
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib import image

from skymask_gpu.io.files import read_tensors, write_tensors
from skymask_gpu.report import COLUMNS, FinishedRun, failed_cells, load_run, load_runs, write_report
from skymask_gpu.report.sweep import arrange
from skymask_gpu.report.tables import block_tables, latex_text, markdown_text

BASE: dict[str, Any] = {
    "seed": 0,
    "rounds": 3,
    "server_lr": 1.0,
    "checkpoint_every": 1,
    "data": {"dataset": "mnist", "data_dir": "", "clients": 20, "partition": "bias", "bias": 0.5, "alpha": 0.5},
    "model": {"name": "cnn"},
    "local": {"lr": 0.1},
    "attack": {"name": "min-max", "share": 0.2, "direction": "std"},
    "defence": {"rule": "skymask", "assumed_malicious": -1},
}


def config(**changes: Any) -> dict[str, Any]:
    """``BASE`` with dotted keys changed, written ``attack__name="none"``; no attack has no share."""
    result = deepcopy(BASE)
    for key, value in changes.items():
        *tables, last = key.split("__")
        target = result
        for table in tables:
            target = target[table]
        target[last] = value
    if result["attack"]["name"] == "none":
        result["attack"]["share"] = 0.0
    return result


def write_run(
    folder: Path,
    settings: dict[str, Any],
    accuracy: list[float | None],
    fpr: list[float | None] | None = None,
    fnr: list[float | None] | None = None,
    asr: list[float | None] | None = None,
    seconds: list[float] | None = None,
) -> Path:
    """A run's folder as ``run`` leaves it behind, one list entry a round."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"name": folder.name, **settings}))
    nothing = [None] * len(accuracy)
    lines = [
        {
            "run": folder.name, "round": number, "accuracy": accuracy[number], "attack_success_rate": (asr or nothing)[number],
            "participants": 20, "kept": 16, "false_positive_rate": (fpr or nothing)[number],
            "false_negative_rate": (fnr or nothing)[number], "rejected": [0],
        }
        for number in range(len(accuracy))
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    times = [{"round": i, "local_training": 2 * s, "aggregation": s} for i, s in enumerate(seconds or [0.5] * len(accuracy))]
    (folder / "times.jsonl").write_text("".join(json.dumps(line) + "\n" for line in times))
    return folder


def write_masks(folder: Path, malicious: int = 4, clients: int = 20) -> None:
    generator = torch.Generator().manual_seed(0)
    bad = torch.arange(clients) < malicious
    scores = torch.randn(clients + 1, 2, generator=generator)
    scores[:clients][bad] += 6
    tensors = {
        "evidence": torch.rand(clients, 3, generator=generator) * 0.4 + 0.5 * bad[:, None],
        "keep_share": torch.rand(clients, generator=generator) * 0.2 + 0.4 * ~bad,
        "agreement": torch.rand(clients, generator=generator) - bad.float(),
        "clients": torch.arange(clients),
        "scores": scores,
        "malicious": bad,
        "benign": ~bad,
    }
    layers = json.dumps(["conv1.weight", "conv2.weight", "fc.weight"])
    write_tensors(folder / "masks.safetensors", tensors, {"round": "2", "layers": layers})


def cell_texts(table: Any) -> dict[tuple[str, str], str]:
    return {
        (attack, rule): f"*{cell.text}*" if cell.best else cell.text
        for attack, cells in table.rows
        for rule, cell in zip(table.rules, cells, strict=True)
    }


# --- one run -------------------------------------------------------------------------------------


def test_row_of_a_run(tmp_path: Path) -> None:
    """Round 1 counts for no rate; the last evaluated round counts for accuracy and ASR; seconds are a median."""
    run = load_run(
        write_run(
            tmp_path / "SkyMask",
            config(rounds=4),
            accuracy=[0.1, 0.5, 0.875, None],
            fpr=[1.0, 0.0, 0.1, 0.2],
            fnr=[1.0, None, 0.25, 0.5],
            asr=[0.9, 0.8, 0.25, None],
            seconds=[9.0, 0.1, 0.3, 0.2],
        )
    )
    assert COLUMNS == ("run", "rule", "attack", "accuracy", "FPR", "FNR", "ASR", "s/round")
    assert run.row() == ("SkyMask", "skymask", "min-max 4/20", "87.5%", "10.0%", "37.5%", "25.0%", "0.250")
    assert run.worst_rate("false_positive_rate") == 0.2
    assert run.median_seconds("local_training") == 0.5


def test_row_of_a_run_that_knows_little(tmp_path: Path) -> None:
    """Cut short before anything was evaluated, a rule that judges no client, no times, no attack."""
    folder = write_run(tmp_path / "a", config(attack__name="none", defence__rule="median", rounds=5), [None, None])
    (folder / "times.jsonl").unlink()
    assert load_run(folder).row() == ("a", "median", "none", "- (2 of 5 rounds)", "-", "-", "-", "-")


def test_the_only_round_counts_for_rates(tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path / "a", config(rounds=1), [0.5], fpr=[0.125], fnr=[0.25]))
    assert run.row()[4:6] == ("12.5%", "25.0%")


# --- folders -------------------------------------------------------------------------------------


def test_load_runs_finds_runs_at_any_depth_sorted_by_path(tmp_path: Path) -> None:
    for name in ("cells/b", "cells/a", "z"):
        write_run(tmp_path / name, config(), [0.5])
    write_run(tmp_path / "cells" / "begun", config(), [])
    (tmp_path / "cells" / "begun" / "metrics.jsonl").write_text('{"round": 0, "accu')
    (tmp_path / "notes").mkdir()
    assert [run.folder.relative_to(tmp_path).as_posix() for run in load_runs(tmp_path)] == ["cells/a", "cells/b", "z"]
    (alone,) = load_runs(tmp_path / "z")
    assert alone.name == "z"


def test_load_runs_says_that_there_is_none_and_what_failed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"{re.escape(str(tmp_path))}: no run found: .*`skymask-gpu run` or `sweep` wrote"):
        load_runs(tmp_path)
    (tmp_path / "cells" / "x").mkdir(parents=True)
    (tmp_path / "cells" / "x" / "error.txt").write_text("ValueError: data.clients is 0\n\nTraceback\n")
    with pytest.raises(ValueError, match=r"1 failed, the first, x, with: ValueError: data\.clients is 0; give"):
        load_runs(tmp_path)


def test_failed_cells_are_their_first_lines(tmp_path: Path) -> None:
    for name, text in (("b", "second\nmore\n"), ("a", "\nfirst\n"), ("c", "")):
        (tmp_path / "cells" / name).mkdir(parents=True)
        (tmp_path / "cells" / name / "error.txt").write_text(text)
    assert failed_cells(tmp_path) == [("a", "first"), ("b", "second"), ("c", "(no message)")]


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("config.json", "{", r"config\.json is no JSON"),
        ("config.json", "[]", r"config\.json must hold a run's settings, got list"),
        ("metrics.jsonl", "{]\n", r"metrics\.jsonl, line 1 is no JSON"),
        ("times.jsonl", '{"aggregation": 1}\n', r"times\.jsonl, line 1 must be a JSON object with a whole number \"round\""),
    ],
)
def test_a_broken_file_is_named(file: str, text: str, message: str, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", config(), [0.5])
    (folder / file).write_text(text)
    with pytest.raises(ValueError, match=message):
        load_runs(tmp_path)


def test_times_of_a_resumed_run_count_once_and_only_with_a_record(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", config(), [0.5, 0.5, 0.5])
    lines = [(0, 1.0), (1, 50.0), (1, 2.0), (2, 3.0), (3, 70.0)]
    (folder / "times.jsonl").write_text("".join(json.dumps({"round": r, "aggregation": s}) + "\n" for r, s in lines))
    run = load_run(folder)
    assert [times["aggregation"] for times in run.times] == [1.0, 2.0, 3.0]
    assert run.median_seconds("local_training") is None


# --- blocks --------------------------------------------------------------------------------------


def test_cells_are_means_and_sample_deviations_over_seeds(tmp_path: Path) -> None:
    for seed, accuracy in enumerate([0.8, 0.9, 0.7]):
        write_run(tmp_path / f"s{seed}", config(seed=seed), [0.1, 0.2, accuracy])
        # the seed, the folder of the data and the pace of saving and testing are no settings
        other = config(seed=seed, data__data_dir=f"/d{seed}", checkpoint_every=seed + 1, evaluate_every=seed + 1)
        write_run(tmp_path / f"f{seed}", {**other, "defence": {"rule": "fedavg"}}, [0.1, 0.2, accuracy / 2])
    (block,) = arrange(load_runs(tmp_path)).blocks
    table = block_tables(block)[0]
    assert table.caption == "Accuracy (%), mean ± sample standard deviation over 3 seeds"
    # deviations -10, 0, 10: variance (100 + 0 + 100) / 2
    assert cell_texts(table) == {("min-max", "fedavg"): "40.0 ± 5.0", ("min-max", "skymask"): "80.0 ± 10.0"}
    assert block.title == "mnist, cnn, bias 0.5, 20 clients, 20% attackers"


def test_blocks_by_setting_rows_by_attack_columns_by_rule(tmp_path: Path) -> None:
    """Each headline setting makes blocks; runs without attackers stand in the blocks of all shares of their own setting."""
    number = 0

    def add(accuracy: float, **changes: Any) -> None:
        nonlocal number
        number += 1
        write_run(tmp_path / f"r{number:02d}", config(**changes), [0.0, 0.0, accuracy])

    add(0.95, attack__name="none", defence__rule="fedavg")
    add(0.11)
    add(0.12, attack__share=0.4)
    add(0.13, attack__name="trim", defence__rule="krum")
    add(0.14, data__clients=50)
    add(0.15, data__partition="dirichlet", data__alpha=0.1)
    add(0.16, data__bias=0.9)
    add(0.17, data__dataset="digits", model__name="mlp")
    sweep = arrange(load_runs(tmp_path))
    assert sweep.left_out == []
    assert {block.title: cell_texts(block_tables(block)[0]) for block in sweep.blocks} == {
        "digits, mlp, bias 0.5, 20 clients, 20% attackers": {("min-max", "skymask"): "17.0"},
        "mnist, cnn, bias 0.5, 20 clients, 20% attackers": {
            ("none", "fedavg"): "95.0", ("none", "krum"): "-", ("none", "skymask"): "-",
            ("min-max", "fedavg"): "-", ("min-max", "krum"): "-", ("min-max", "skymask"): "11.0",
            ("trim", "fedavg"): "-", ("trim", "krum"): "13.0", ("trim", "skymask"): "-",
        },
        "mnist, cnn, bias 0.5, 20 clients, 40% attackers": {
            ("none", "fedavg"): "95.0", ("none", "skymask"): "-", ("min-max", "fedavg"): "-", ("min-max", "skymask"): "12.0",
        },
        "mnist, cnn, bias 0.5, 50 clients, 20% attackers": {("min-max", "skymask"): "14.0"},
        "mnist, cnn, bias 0.9, 20 clients, 20% attackers": {("min-max", "skymask"): "16.0"},
        "mnist, cnn, dirichlet 0.1, 20 clients, 20% attackers": {("min-max", "skymask"): "15.0"},
    }  # fmt: skip


def test_no_other_setting_is_averaged_over(tmp_path: Path) -> None:
    """Any other key that differs is named: in the block's title, the row of its attack, or the column of its rule."""
    write_run(tmp_path / "a", config(), [0, 0, 0.1])
    write_run(tmp_path / "b", config(local__lr=0.5), [0, 0, 0.2])
    write_run(tmp_path / "c", config(attack__direction="sign"), [0, 0, 0.3])
    write_run(tmp_path / "d", config(defence__assumed_malicious=4), [0, 0, 0.4])
    # keys that differ from attack to attack, or from rule to rule, label nothing
    write_run(
        tmp_path / "e",
        config(attack={"name": "trim", "share": 0.2, "layers": ["a"]}, defence={"rule": "krum", "k": 1}),
        [0, 0, 0.5],
    )
    # a key of a partition that does not read it, or of an attack that is none, is no setting
    write_run(tmp_path / "f", config(data__alpha=9.0, defence={"rule": "krum", "k": 1}), [0, 0, 0.6])
    none = config(attack__name="none", attack__direction="unit", defence={"rule": "krum", "k": 1})
    write_run(tmp_path / "g", none, [0, 0, 0.7])
    blocks = arrange(load_runs(tmp_path)).blocks
    minus, four = "skymask (assumed_malicious=-1)", "skymask (assumed_malicious=4)"
    std, sign = "min-max (direction=std)", "min-max (direction=sign)"
    found = {
        block.title.removeprefix("mnist, cnn, bias 0.5, 20 clients, 20% attackers, "): {
            cell: text for cell, text in cell_texts(block_tables(block)[0]).items() if text != "-"
        }
        for block in blocks
    }
    assert found == {
        "local.lr = 0.1": {
            (std, minus): "10.0", (sign, minus): "30.0", (std, four): "40.0", ("trim", "krum"): "50.0", (std, "krum"): "*60.0*",
            ("none", "krum"): "70.0",
        },
        "local.lr = 0.5": {(std, minus): "20.0"},
    }  # fmt: skip


def test_unfinished_and_repeated_runs_are_left_out_and_named(tmp_path: Path) -> None:
    write_run(tmp_path / "a", config(), [0, 0, 0.5])
    write_run(tmp_path / "b", config(), [0, 0, 0.9])
    write_run(tmp_path / "c", config(seed=1), [0, 0.9])
    sweep = arrange(load_runs(tmp_path))
    assert sweep.left_out == [("c", "2 of 3 rounds"), ("b", "same settings and seed as a")]
    (block,) = sweep.blocks
    table = block_tables(block)[0]
    assert cell_texts(table) == {("min-max", "skymask"): "50.0"}
    assert table.caption == "Accuracy (%), one seed"


def test_numbers_of_seeds_are_shown_where_they_differ(tmp_path: Path) -> None:
    for seed in range(2):
        write_run(tmp_path / f"a{seed}", config(seed=seed), [0, 0, 0.5])
    write_run(tmp_path / "b", config(defence__rule="krum"), [0, 0, 0.4])
    write_run(tmp_path / "c", config(defence__rule="flame"), [None, None, None])
    (block,) = arrange(load_runs(tmp_path)).blocks
    table = block_tables(block)[0]
    assert table.caption == "Accuracy (%), mean ± sample standard deviation over seeds, whose number is n"
    assert [cell.text for cell in table.rows[0][1]] == ["n/a", "40.0 (n = 1)", "50.0 ± 0.0 (n = 2)"]


def test_the_best_rule_is_bold_plain_averaging_aside(tmp_path: Path) -> None:
    for attack, accuracies in {
        "trim": {"fedavg": 0.99, "krum": 0.9004, "median": 0.9001, "skymask": 0.8},  # equal as shown
        "lie": {"krum": 0.5, "skymask": 0.6},
        "ipm": {"fedavg": 0.5, "skymask": 0.6},  # nothing to compare
    }.items():
        for rule, accuracy in accuracies.items():
            write_run(tmp_path / f"{attack} {rule}", config(attack__name=attack, defence__rule=rule), [0, 0, accuracy])
    (block,) = arrange(load_runs(tmp_path)).blocks
    assert [(attack, [cell.best for cell in cells]) for attack, cells in block_tables(block)[0].rows] == [
        ("ipm", [False] * 4),
        ("lie", [False, False, False, True]),
        ("trim", [False, True, True, False]),
    ]
    assert block.rules == ["fedavg", "krum", "median", "skymask"]


def test_rates_and_backdoors(tmp_path: Path) -> None:
    """Means over rounds 2 and 3, then over seeds; the worst of all; rounds and rules without a rate; ASR where there is one."""
    for seed, (fpr, fnr) in enumerate([([1.0, 0.0, 0.1], [1.0, 0.2, 0.4]), ([1.0, 0.3, 0.0], [1.0, None, 0.5])]):
        write_run(
            tmp_path / f"a{seed}", config(seed=seed, attack__name="lie-backdoor"), [0, 0, 0.5], fpr, fnr, [0.9, 0.8, 0.1 * seed]
        )
    write_run(tmp_path / "b", config(attack__name="none"), [0, 0, 0.5], [0.0, 0.0, 0.5])
    write_run(tmp_path / "c", config(attack__name="none", defence__rule="median"), [0, 0, 0.5])
    (block,) = arrange(load_runs(tmp_path)).blocks
    _, rates, success = block_tables(block)
    # FPR: (0.05 + 0.15) / 2; FNR: (0.3 + 0.5) / 2
    assert cell_texts(rates) == {
        ("none", "median"): "n/a",
        ("none", "skymask"): "25.0 / n/a [50.0 / n/a]",
        ("lie-backdoor", "median"): "-",
        ("lie-backdoor", "skymask"): "10.0 / 40.0 [30.0 / 50.0]",
    }
    assert cell_texts(success) == {("lie-backdoor", "median"): "-", ("lie-backdoor", "skymask"): "5.0 ± 7.1"}


# --- files ---------------------------------------------------------------------------------------

ODD = r"50%_x<b>$a_$|\#&~^{"


def test_markdown_file(tmp_path: Path) -> None:
    write_run(tmp_path / "a", config(), [0, 0, 0.5], [0, 0, 0], [0, 0, 0])
    write_run(tmp_path / "b", config(defence__rule="krum"), [0, 0, 0.25])
    write_run(tmp_path / "c", config(attack__name="none"), [0, 0, 0.75])
    write_run(tmp_path / "d", config(seed=5), [0])
    text = markdown_text("my_sweep", arrange(load_runs(tmp_path)), [("x_y", "ValueError: a|b")])
    after = text[text.index("## mnist") :]
    assert text.startswith("# my\\_sweep\n")
    assert after == (
        "## mnist, cnn, bias 0.5, 20 clients, 20% attackers\n\n"
        "Accuracy (%), one seed:\n\n"
        "| attack | krum | skymask |\n| --- | ---: | ---: |\n| none | - | 75.0 |\n| min-max | 25.0 | **50.0** |\n\n"
        "FPR / FNR (%), mean \\[worst round\\]:\n\n"
        "| attack | krum | skymask |\n| --- | ---: | ---: |\n| none | - | n/a |\n| min-max | n/a | 0.0 / 0.0 [0.0 / 0.0] |\n\n"
        "## Left out\n\n- d: 1 of 3 rounds\n\n## Failed\n\n- x\\_y: ValueError: a\\|b\n"
    )


def test_markdown_escapes_what_would_break_a_table(tmp_path: Path) -> None:
    write_run(tmp_path / "a", config(attack__name=ODD, defence__rule="a|b"), [0, 0, 0.5])
    text = markdown_text("t", arrange(load_runs(tmp_path)), [])
    row = next(line for line in text.splitlines() if line.startswith("| 50%"))
    assert len(re.findall(r"(?<!\\)\|", row)) == 3
    assert re.sub(r"\\(.)", r"\1", row.split(" | ")[0].removeprefix("| ")) == ODD
    assert "<b>" not in text


def test_latex_file(tmp_path: Path) -> None:
    """Braces match, each row has its cells, nothing special is left bare, and wide tables are scaled."""
    odd = ODD.replace("{", "}{")
    write_run(tmp_path / "a", config(attack__name=odd, defence__rule="a_1"), [0, 0, 0.5], [0, 0, 0], [0, 0, 0])
    write_run(tmp_path / "b", config(attack__name=odd, defence__rule="a_1", seed=1), [0, 0, 0.5])
    write_run(tmp_path / "c", config(attack__name=odd, defence__rule="a_2"), [0, 0, 0.25])
    text = latex_text("my\n50%", arrange(load_runs(tmp_path)), [("x", "a%\\b")])
    body = [line for line in text.splitlines() if line and not line.startswith("%")]
    assert text.startswith("% my 50%\n")
    assert "% failed: x: a%\\b\n" in text
    assert (
        r"50\%\_x\textless{}b\textgreater{}\$a\_\$\textbar{}\textbackslash{}\#\&\textasciitilde{}\textasciicircum{}\}\{ "
        r"& \textbf{50.0 $\pm$ 0.0 (n = 2)} & 25.0 (n = 1) \\"
    ) in body
    assert r"\caption{FPR / FNR (\%), mean [worst round]: mnist, cnn, bias 0.5, 20 clients, 20\% attackers}" in body
    joined = "\n".join(body)
    bare = re.sub(r"\\[\\{}#$%&_]", "", joined)
    depth = 0
    for character in bare:
        depth += {"{": 1, "}": -1}.get(character, 0)
        assert depth >= 0
    assert depth == 0
    assert not set("%_#~^<>|") & set(bare)
    rows = [line for line in body if line.endswith(r"\\")]
    assert [len(re.findall(r"(?<!\\)&", row)) for row in rows] == [2] * 4
    assert joined.count(r"\begin{tabular}{lrr}") == 2
    for environment in ("table", "tabular"):
        assert joined.count(rf"\begin{{{environment}}}") == joined.count(rf"\end{{{environment}}}") == 2
    assert "resizebox" not in joined


def test_latex_scales_wide_tables_and_flushes_many(tmp_path: Path) -> None:
    for number in range(4):
        # 9 + 4 * 7 characters of accuracies, 9 + 4 * 25 of rates
        write_run(tmp_path / f"rule{number}", config(defence__rule=f"rule{number}"), [0, 0, 0.5], [1, 0, 0.5], [1, 0.5, 0.5])
    for number in range(6):
        write_run(tmp_path / f"clients{number}", config(data__clients=100 + number), [0, 0, 0.5])
    text = latex_text("t", arrange(load_runs(tmp_path)), [])
    assert text.count("\\resizebox{\\linewidth}{!}{%\n\\begin{tabular}{lrrrr}") == text.count("\\resizebox") == 1
    assert text.count("\\end{tabular}}\n") == 1
    assert text.count("\\begin{table}") == 7 * 2
    assert text.count("\\clearpage") == 1


def test_csv_file_has_a_line_a_run_with_all_that_differs(tmp_path: Path) -> None:
    write_run(
        tmp_path / "cells" / "a, b",
        config(seed=3),
        [0.1, 0.5, 0.25],
        [1, 0.0, 0.5],
        [1, 0.25, 0.75],
        [None, 0.5, None],
        [4, 1, 2],
    )
    write_run(tmp_path / "cells" / "c", config(local__lr=0.5, rounds=4, attack__name="none"), [0.5])
    write_report("t", load_runs(tmp_path), tmp_path)
    with (tmp_path / "tables.csv").open(encoding="utf-8", newline="") as file:
        first, second = csv.DictReader(file)
    assert first == {
        "run": "a, b", "folder": "cells/a, b", "data.dataset": "mnist", "model.name": "cnn", "data.partition": "bias",
        "data.bias": "0.5", "data.alpha": "0.5", "data.clients": "20", "attack.name": "min-max", "attack.share": "0.2",
        "defence.rule": "skymask", "local.lr": "0.1", "seed": "3", "rounds": "3", "rounds_done": "3", "accuracy": "0.25",
        "mean_fpr": "0.25", "worst_fpr": "0.5", "mean_fnr": "0.5", "worst_fnr": "0.75", "attack_success_rate": "0.5",
        "backdoor_lifespan": "", "worst_class_accuracy": "",
        "median_aggregation_seconds": "2", "median_local_training_seconds": "4",
    }  # fmt: skip
    assert second["local.lr"] == "0.5"
    assert (second["rounds"], second["rounds_done"], second["mean_fpr"], second["worst_fnr"]) == ("4", "1", "", "")


def test_report_of_a_single_run(tmp_path: Path) -> None:
    write_masks(write_run(tmp_path / "odd", {**config(), "name": ODD}, [0.1, None, 0.5], [0, 0, 0.1], [1, 0, 0]))
    report = write_report(f"{ODD}'s", load_runs(tmp_path), tmp_path)
    names = {name: path.name for name, path in report.paths().items()}
    assert names == {
        "markdown": "tables.md", "csv": "tables.csv", "latex": "tables.tex", "rounds": "rounds.png",
        "verdicts": "verdicts.png", "rejections": "rejections.png", "masks": "masks.png",
        "witnesses": "witnesses.png", "evidence": "evidence.png", "page": "report.html",
    }  # fmt: skip
    page = report.page.read_text(encoding="utf-8")
    assert "<b>$" not in page
    assert f"<h1>{ODD.replace('&', '&amp;').replace('<', '&lt;').replace('>', '&gt;')}&#39;s</h1>" in page
    assert "<td>50.0%</td>" in page
    assert page.count("data:image/png;base64,") == 6
    assert "http" not in page
    # well-formed, so nothing of a name is taken for markup
    ET.fromstring(re.sub(r"<(meta|img)([^>]*)>", r"<\1\2/>", page.removeprefix("<!doctype html>")))
    for name in ("rounds", "verdicts", "rejections", "masks", "witnesses", "evidence"):
        assert_picture(tmp_path / f"{name}.png")


def test_pictures_leave_the_backend_of_a_notebook_alone() -> None:
    script = (
        "import sys, matplotlib\n"
        "matplotlib.use('svg')\n"
        "import skymask_gpu.profile, skymask_gpu.report.plots\n"
        "assert matplotlib.get_backend() == 'svg'\n"
        "assert 'matplotlib.pyplot' not in sys.modules, 'pyplot keeps its figures in a global list'\n"
    )
    subprocess.run([sys.executable, "-P", "-c", script], check=True)


def assert_picture(path: Path) -> None:
    """A PNG of some size that shows lines or fields of several colours, not an empty page."""
    pixels = image.imread(path)[..., :3]
    assert min(pixels.shape[:2]) > 300
    colours = {tuple(colour) for colour in (pixels[::3, ::3].reshape(-1, 3) * 15).astype(int).tolist()}
    assert sum(max(colour) - min(colour) > 5 for colour in colours) >= 2
    assert 0.002 < (pixels.mean(-1) < 0.9).mean() < 0.9


def grid(folder: Path, attacks: tuple[str, ...], shares: tuple[float, ...], clients: tuple[int, ...], seeds: int = 2) -> None:
    for attack in attacks:
        for share in shares if attack != "none" else (0.0,):
            for count in clients:
                for rule in ("fedavg", "median", "skymask"):
                    for seed in range(seeds):
                        settings = config(
                            seed=seed, attack__name=attack, attack__share=share, data__clients=count, defence__rule=rule
                        )
                        accuracy = [0.2 + 0.1 * seed, 0.9 if seed else None, 0.5 + 0.2 * seed]
                        judges = rule != "median"
                        fnr = [1.0, share, share + 0.1 * seed] if judges and attack != "none" else None
                        name = f"{attack}-{share}-{count}-{rule}-{seed}"
                        write_run(folder / "cells" / name, settings, accuracy, [0.5, 0, count / 1000] if judges else None, fnr)


def test_report_of_a_sweep(tmp_path: Path) -> None:
    grid(tmp_path, ("none", "min-max"), (0.2, 0.4), (100, 200))
    for name in ("min-max-0.2-100-skymask-0", "min-max-0.4-200-skymask-1"):
        write_masks(tmp_path / "cells" / name)
    (tmp_path / "cells" / "broken").mkdir()
    (tmp_path / "cells" / "broken" / "error.txt").write_text("ValueError: <no> data_dir\n")
    report = write_report("sweep", load_runs(tmp_path), tmp_path)
    pictures = [path for path in report.paths().values() if path.suffix == ".png"]
    assert sorted(path.stem for path in pictures) == [
        "evidence", "masks", "rates_by_clients", "rates_by_share", "rejections", "rounds", "witnesses"
    ]  # fmt: skip
    for path in pictures:
        assert_picture(path)
    page = report.page.read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 7
    assert "36 runs; <code>tables.csv</code>" in page
    assert "<details>" not in page, "with so many runs there is no part for each"
    assert "<caption>Accuracy (%), mean ± sample standard deviation over 2 seeds</caption>" in page
    assert "<b>broken</b>: ValueError: &lt;no&gt; data_dir" in page
    assert "- broken: ValueError: \\<no\\> data\\_dir\n" in report.markdown.read_text(encoding="utf-8")
    assert "% failed: broken: ValueError: <no> data_dir\n" in report.latex.read_text(encoding="utf-8")
    assert not list(tmp_path.glob(".*")), "nothing temporary is left"

    # with fewer runs, what can no longer be shown is gone
    runs = [run for run in load_runs(tmp_path) if run.name.startswith("min-max-0.2-100-fedavg")]
    assert set(write_report("part", runs, tmp_path).paths()) == {
        "markdown", "csv", "latex", "rounds", "verdicts", "rejections", "page"
    }  # fmt: skip
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["rejections.png", "rounds.png", "verdicts.png"]
    assert (tmp_path / "report.html").read_text(encoding="utf-8").count("<details>") == 4


def test_write_report_wants_a_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="runs must hold one run at least"):
        write_report("t", [], tmp_path)


# --- pictures ------------------------------------------------------------------------------------


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The figures that were saved, by file name; nothing is written."""
    from skymask_gpu.report import plots

    saved: dict[str, Any] = {}
    monkeypatch.setattr(plots, "save", lambda figure, path: saved.update({path.stem: figure}))
    return saved


def lines_of(axes: Any) -> list[tuple[list[float], list[float]]]:
    return [(line.get_xdata().tolist(), [round(y, 6) for y in line.get_ydata().tolist()]) for line in axes.lines]


def panels_by_title(figure: Any) -> dict[str, Any]:
    return {axes.get_title(): axes for axes in figure.axes}


def test_rounds_show_the_mean_and_the_spread_over_seeds(tmp_path: Path, figures: dict[str, Any]) -> None:
    from skymask_gpu.report.plots import plot_rounds

    grid(tmp_path, ("none", "min-max"), (0.2, 0.4), (100,))
    runs = load_runs(tmp_path)
    plot_rounds(runs, arrange(runs), tmp_path / "rounds.png")
    figure = figures["rounds"]
    panels = panels_by_title(figure)
    assert list(panels) == ["none", "min-max\n20% attackers", "min-max\n40% attackers"], "no attack once for all shares"
    for axes in panels.values():
        # rounds 1 and 3 were evaluated by both seeds: 20 and 30, then 50 and 70
        assert lines_of(axes) == [([1, 3], [25.0, 60.0])] * 3
        heights = axes.collections[0].get_paths()[0].vertices[:, 1]
        assert max(heights) == pytest.approx(60 + statistics.stdev([50, 70]))
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["fedavg", "median", "skymask"]


def test_rounds_of_a_few_runs_are_lines_of_which_none_hides_another(tmp_path: Path, figures: dict[str, Any]) -> None:
    from skymask_gpu.report.plots import plot_rounds

    write_run(tmp_path / "_one", config(), [0.1, None, 0.5], [0.2, 0.0, 0.1], [1.0, None, 0.5])
    write_run(tmp_path / "two", config(defence__rule="median"), [0.3])
    runs = load_runs(tmp_path)
    plot_rounds(runs, arrange(runs), tmp_path / "rounds.png")
    (accuracy,) = figures["rounds"].axes
    assert lines_of(accuracy) == [([1, 3], [10.0, 50.0]), ([1], [30.0])]
    under, over = accuracy.lines
    assert under.get_linewidth() > over.get_linewidth()
    assert under.get_markersize() > over.get_markersize()
    assert [text.get_text() for text in accuracy.get_legend().get_texts()] == ["_one", "two"]


def test_rates_by_share_and_by_clients(tmp_path: Path, figures: dict[str, Any]) -> None:
    from skymask_gpu.report.plots import plot_rates

    grid(tmp_path, ("none", "min-max", "trim"), (0.2, 0.4), (100, 200))
    sweep = arrange(load_runs(tmp_path))
    assert plot_rates(sweep, "share", tmp_path / "share.png")
    fpr_minmax, fpr_trim, fnr_minmax, fnr_trim = figures["share"].axes[:4]  # of 100 clients
    assert [axes.get_title() for axes in (fpr_minmax, fpr_trim)] == ["min-max", "trim"]
    # fedavg and skymask; median judges nobody. FPR: mean of 0 and 10%; FNR: of share, and of share and 10% more, on average
    assert lines_of(fpr_trim) == [([20, 40], [5.0, 5.0])] * 2
    assert lines_of(fnr_minmax) == lines_of(fnr_trim) == [([20, 40], [22.5, 42.5])] * 2
    assert len(figures["share"].axes) == 8
    assert [row.get_suptitle() for row in figures["share"].subfigs] == [
        "mnist, cnn, bias 0.5, 100 clients", "mnist, cnn, bias 0.5, 200 clients",
    ]  # fmt: skip

    assert plot_rates(sweep, "clients", tmp_path / "clients.png")
    assert lines_of(figures["clients"].axes[0]) == [([100, 200], [5.0, 10.0])] * 2
    assert "20% attackers" in figures["clients"].subfigs[0].get_suptitle()


def test_no_rates_without_two_values_of_one_setting(tmp_path: Path, figures: dict[str, Any]) -> None:
    """Two shares, but of different numbers of clients, are no line; nor are rules that judge nobody."""
    from skymask_gpu.report.plots import plot_rates

    write_run(tmp_path / "a", config(), [0, 0, 0.5], [0, 0, 0])
    write_run(tmp_path / "b", config(attack__share=0.4, data__clients=50), [0, 0, 0.5], [0, 0, 0])
    write_run(tmp_path / "c", config(attack__share=0.4, defence__rule="median"), [0, 0, 0.5])
    runs = load_runs(tmp_path)
    for chosen in (runs[:2], [runs[2]]):
        assert not plot_rates(arrange(chosen), "share", tmp_path / "share.png")
        assert not plot_rates(arrange(chosen), "clients", tmp_path / "clients.png")
    medians = [
        FinishedRun({**run.config, "defence": {"rule": "median"}}, run.folder, runs[2].records, [])
        for run in (runs[0], runs[2])
    ]
    assert not plot_rates(arrange(medians), "share", tmp_path / "share.png")
    assert figures == {}


def test_witnesses_are_drawn_per_client_with_the_rejected_ones_ringed(tmp_path: Path, figures: dict[str, Any]) -> None:
    from skymask_gpu.report.plots import plot_masks, plot_witnesses

    write_masks(write_run(tmp_path / "a", config(), [0, 0, 0.5]))
    runs = load_runs(tmp_path)
    assert plot_witnesses(runs, tmp_path / "witnesses.png")
    (axes,) = figures["witnesses"].axes
    stored, _ = read_tensors(tmp_path / "a" / "masks.safetensors")
    points = torch.stack([stored["keep_share"], stored["agreement"]], 1)
    honest, attackers, rejected = (torch.from_numpy(drawn.get_offsets().data) for drawn in axes.collections)
    torch.testing.assert_close(honest.float(), points[~stored["malicious"]])
    torch.testing.assert_close(attackers.float(), points[stored["malicious"]])
    torch.testing.assert_close(rejected.float(), points[~stored["benign"]])
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["honest client (16)", "attacker (4)", "rejected (4)"]
    # older versions stored no witnesses: the picture of the masks is still made
    old = {name: value for name, value in stored.items() if name not in ("keep_share", "agreement")}
    write_tensors(tmp_path / "a" / "masks.safetensors", old, {"round": "2"})
    assert not plot_witnesses(runs, tmp_path / "witnesses.png")
    assert plot_masks(runs, tmp_path / "masks.png")


def test_evidence_marks_who_was_rejected(tmp_path: Path, figures: dict[str, Any]) -> None:
    from skymask_gpu.report.plots import plot_evidence

    write_masks(write_run(tmp_path / "a", config(), [0, 0, 0.5]))
    stored, texts = read_tensors(tmp_path / "a" / "masks.safetensors")
    benign = ~stored["malicious"]
    benign[7] = False
    write_tensors(tmp_path / "a" / "masks.safetensors", {**stored, "benign": benign}, texts)
    assert plot_evidence(load_runs(tmp_path), tmp_path / "evidence.png")
    axes = figures["evidence"].axes[0]
    (crosses,) = axes.collections
    # The four attackers are on top, then the honest client that is rejected.
    assert crosses.get_offsets().data[:, 1].tolist() == [0, 1, 2, 3, 4]
    assert axes.get_ylabel() == "clients, the 4 attackers on top; crosses: rejected"


def test_masks_of_many_runs_are_one_per_attack_of_the_lowest_seed(tmp_path: Path, figures: dict[str, Any]) -> None:
    from skymask_gpu.report.plots import plot_masks

    for attack in ("trim", "lie", "ipm"):
        for seed in (2, 1, 3):
            settings = {**config(attack__name=attack, seed=seed), "name": f"{attack}, seed {seed}"}
            write_masks(write_run(tmp_path / f"{attack}{9 - seed}", settings, [0, 0, 0.5]))
    runs = load_runs(tmp_path)
    assert plot_masks(runs, tmp_path / "masks.png")
    assert list(panels_by_title(figures["masks"])) == [
        f"{attack}, seed 1: masks of round 3" for attack in ("ipm", "lie", "trim")
    ]
    assert figures["masks"].get_suptitle() == "3 of the 9 runs that have masks: one per attack, with the lowest seed"
    assert plot_masks(runs[:6], tmp_path / "masks.png")
    assert len(figures["masks"].axes) == 6, "six runs are all shown"
    assert not figures["masks"].get_suptitle()
