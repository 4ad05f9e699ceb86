"""Tables and plots: means, spreads, differences by seed, and where they are put."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tools.evidence import tables
from tools.evidence.plots import running_mean
from tools.evidence.sweep import load_sweep, report


def test_the_spread_is_a_standard_deviation() -> None:
    values = [0.91, 0.98, 0.96]
    spread = np.std(np.array(values), ddof=1)
    expected = f"{np.mean(values):.3f} ± {spread:.3f}"
    assert tables.mean_with("deviation", values, 3) == expected == "0.950 ± 0.036"
    assert tables.mean_with("deviation", [0.5], 2) == "0.50"


def test_the_interval_covers_the_mean_as_often_as_it_says() -> None:
    # 2.776 is the 97.5 % quantile of Student's t with 4 degrees of freedom in printed tables.
    values = [1.0, 2.0, 3.0, 4.0, 5.0]
    expected = 2.776 * np.std(values, ddof=1) / np.sqrt(5)
    assert tables.interval(values) == pytest.approx(expected, rel=2e-4)
    assert tables.mean_with("interval", values, 1) == "3.0 ± 2.0"
    rng = np.random.default_rng(0)
    draws = rng.normal(size=(2000, 5))
    covered = [abs(row.mean()) <= tables.interval(row.tolist()) for row in draws]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.015)  # three standard errors
    with pytest.raises(ValueError, match="at least two"):
        tables.interval([1.0])


def by_problem(arm: str, seed: int | None, values: list[float]) -> dict[str, Any]:
    return {"arm": arm, "seed": seed, "x": 0.0, "by_problem": {"x": values}}


def test_the_bootstrap_draws_seeds_and_problems() -> None:
    """Of one seed it is the binomial's normal interval; seeds widen it as they differ."""
    solved = np.arange(400) < 100
    cell = tables.Cell(arm="one", key="x", scale=100.0, digits=2)
    text = cell.render([by_problem("one", 1, solved.astype(float).tolist())], "bootstrap")
    mean, low, high = (float(word.strip("()")) for word in text.replace("to", "").split())
    half = 196 * np.sqrt(0.25 * 0.75 / 400)
    assert mean == 25.0
    assert (low, high) == (pytest.approx(25 - half, abs=0.4), pytest.approx(25 + half, abs=0.4))
    same = [by_problem("one", seed, [0.5] * 10) for seed in (1, 2, 3)]
    assert cell.render(same, "bootstrap") == "50.00 (50.00 to 50.00)"
    differ = [by_problem("one", seed, [value] * 10) for seed, value in ((1, 0.0), (2, 1.0))]
    assert cell.render(differ, "bootstrap") == "50.00 (0.00 to 100.00)"


def test_a_difference_is_taken_problem_by_problem_and_seed_by_seed() -> None:
    hard = [0.0, 1.0] * 20
    results = [
        by_problem("start", None, hard),
        by_problem("one", 1, [value + 0.25 for value in hard]),
        by_problem("one", 2, [value + 0.25 for value in hard]),
        by_problem("two", 1, [value + 0.5 for value in hard]),
        by_problem("two", 2, [value + 0.5 for value in hard]),
    ]
    cell = tables.Cell(arm="two", key="x", digits=2, minus=tables.Minus(arm="one"))
    assert cell.render(results, "bootstrap") == "0.25 (0.25 to 0.25)", "no problem adds spread"
    against = cell.model_copy(update={"minus": tables.Minus(arm="start")})
    assert against.render(results, "bootstrap") == "0.50 (0.50 to 0.50)"
    itself = cell.model_copy(update={"minus": tables.Minus(arm="two")})
    assert itself.render(results, "bootstrap") == ""
    assert cell.render(results[1:4], "bootstrap") == "", "an arm of other seeds is not compared"
    absent = cell.model_copy(update={"key": "y"})
    assert absent.render(results, "bootstrap") == ""


def test_a_table() -> None:
    table = tables.markdown_table(["arm", "loss"], [["none", "1.0"]])
    assert table == "| arm | loss |\n| --- | ---: |\n| none | 1.0 |\n"


def test_running_mean_looks_back() -> None:
    assert running_mean([1.0, 3.0, 5.0, 7.0], 2) == [1.0, 2.0, 4.0, 6.0]


def test_the_tables_go_between_the_markers(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    first, last = tables.MARKERS
    page.write_text(f"before\n{first}\nold\n{last}\nafter\n")
    for _ in range(2):  # the same again
        tables.insert(page, "| new |\n")
        assert page.read_text() == f"before\n{first}\n\n| new |\n\n{last}\nafter\n"
    page.write_text("no markers")
    with pytest.raises(ValueError, match="expected one line"):
        tables.insert(page, "")
    docs = Path(__file__).resolve().parents[3] / "docs" / "rl_ablation.md"
    assert all(docs.read_text("utf-8").count(marker) == 1 for marker in tables.MARKERS)


# ---- the pages -----------------------------------------------------------------------------------


def render(name: str, results: list[dict[str, Any]], out: Path) -> dict[str, list[str]]:
    """Draw the plots; return the cells of each line by its title, of the last table that has it."""
    costs = {"cpu_s": 30.0, "wall_s": 60.0, "peak_gb": 1.0}
    sweep = load_sweep(name)
    text = report(sweep, [{**costs, **result} for result in results], out, out)
    assert (out / "table.md").read_text("utf-8") == text
    for plot in sweep.plots:
        assert (out / plot).read_bytes().startswith(b"\x89PNG")
    lines = [line.strip("|\n").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return {line[0].strip(): [cell.strip() for cell in line[1:]] for line in lines}


def test_balance_compares_seed_by_seed(tmp_path: Path) -> None:
    keys = ("load_cv", "load_max", "dead_experts", "router_entropy", "router_cosine")
    arms = list(load_sweep("balance").arms)
    results = [
        {
            "arm": arm, "seed": seed, "load_cv_by_step": [1.0, 0.5],
            **{f"moe/{key}": float(seed) for key in keys},
            "validation_loss": seed + (0.0 if arm == "nothing" else 0.25 * seed),
        }
        for arm in arms
        for seed in ((1, 3) if arm == "nothing" else (3, 1))  # pairs go by seed, not order
    ]  # fmt: skip
    lines = render("balance", results, tmp_path)
    assert list(lines)[2:] == arms
    two = ["2.00 ± 1.41", "2.0 ± 1.4", "2.0 ± 1.4", "2.00 ± 1.41", "2.000 ± 1.414"]
    assert lines["nothing"] == [*two, "2.000 ± 1.414", ""]
    # Seed by seed 0.25 and 0.75: half a nat on average, less spread than the losses have.
    assert all(lines[arm] == [*two, "2.500 ± 1.768", "0.500 ± 0.354"] for arm in arms[1:])


def test_long_context_reads_two_arms_under_the_last_base(tmp_path: Path) -> None:
    results = [
        {
            "arm": arm, "seed": seed, "by_distance": {"12": 1.0, "24": 0.5},
            **{f"accuracy_{n}": 0.5 + seed / 10 for n in (64, 128, 256, 512)},
            **{f"swapped_{n}": 0.25 for n in (64, 128, 256, 512)},
        }
        for arm in load_sweep("long_context").arms
        for seed in (0, 1)
    ]  # fmt: skip
    lines = render("long_context", results, tmp_path)
    assert lines["short-only"] == ["55.0 ± 7.1"] * 4
    assert lines["short-only, read under 2600"] == ["25.0 ± 0.0"] * 4


def rl_result(arm: str, seed: int | None, accuracy: float) -> dict[str, Any]:
    return {
        "arm": arm, "seed": seed, "accuracy": accuracy,
        "accuracy/aiw": accuracy, "accuracy/boolean": accuracy, "elsewhere": 0.25, "loose": 0.8,
        "kl_completion": 1.0, "kl_token": 0.05, "entropy": 0.1, "length": 20.0, "truncated": 0.0,
        "greedy_length": 21.0, "greedy_truncated": 0.02, "curve/reward": [0.5, 0.6],
        "curve/solved": [0.5, 0.4], "curve/length": [20.0, 30.0],
    }  # fmt: skip


def test_rl_shows_gains_over_the_start_and_differences_by_seed(tmp_path: Path) -> None:
    gains = {"group": 0.1, "online": 0.2}
    arms = ["sft", "group", "online", "random", "loose-group"]
    starts = [rl_result("start", None, 0.5), rl_result("loose-start", None, 0.5)]
    trained = [
        rl_result(arm, seed, 0.5 + gains.get(arm, 0.0) + 0.01 * seed)
        for arm in arms
        for seed in (2, 1)
    ]
    lines = render("rl", trained, tmp_path)
    assert lines["group-relative policy gradient"][:2] == ["80.0 ± 0.0", "51.5 ± 6.4"]
    sweep = load_sweep("rl")
    text = sweep.tables[0].render([*starts, *trained])
    lines = {line.split(" | ")[0]: line.split(" | ")[1:] for line in text.splitlines()}
    assert lines["| the start"][:5] == ["50.0", "", "", "", "1.00"]
    # Two seeds that differ by a point: half an interval is 12.706 * 0.7071 / sqrt(2).
    assert lines["| UPO, online pairs"][:3] == ["71.5 ± 6.4", "21.5 ± 6.4", "10.0 ± 0.0"]
    assert lines["| group-relative policy gradient"][2] == ""
    assert lines["| random rewards"][2] == "-10.0 ± 0.0"
    assert "| PPO with a critic" not in lines  # it was not run


def test_a_stage_of_the_main_job_is_held_to_the_one_before_and_rl_to_its_rivals(
    tmp_path: Path,
) -> None:
    table = next(t for t in load_sweep("tiny_seeds").tables if "trained in" in t.columns)
    assert table.rows is not None

    def solved(stage: str, **domains: float) -> dict[str, Any]:
        found = {**dict.fromkeys([*(table.rows or {}), "all"], 0.4), **domains}
        values = {f"{stage}/{name}/2": [value, value] for name, value in found.items()}
        return {"by_problem": values}

    def joined(*parts: dict[str, Any]) -> dict[str, Any]:
        return {"by_problem": {k: v for part in parts for k, v in part["by_problem"].items()}}

    results: list[dict[str, Any]] = []
    for seed in (1, 2):
        stages = joined(
            solved("sft"),
            solved("rl-logic", logic=0.5),
            solved("rl-math-code", logic=0.48, math=0.6),
            solved("rl-general", logic=0.47, math=0.6, science=0.55),
        )
        results.append({"arm": "pipeline", "seed": seed, **stages})
        results.append({"arm": "rejection", "seed": seed, **solved("sft", logic=0.41)})
        results.append({"arm": "demonstrations", "seed": seed, **solved("sft", logic=0.45)})

    def cells(rendered: str) -> dict[str, list[str]]:
        rows = [line.strip("| ").split(" | ") for line in rendered.splitlines() if "|" in line]
        return {row[0]: [cell.split(" (")[0] for cell in row[1:]] for row in rows}

    lines = cells(table.render(results))
    assert lines["logic"] == ["rl-logic", "40.0", "10.0", "-3.0"]
    assert lines["math"][1:] == ["40.0", "20.0", "0.0"]
    assert lines["science"][1:3] == ["40.0", "15.0"]
    lines = cells(load_sweep("tiny_seeds").tables[0].render(results))
    assert lines["logic"] == ["40.0", "47.0", "45.0", "41.0", "7.0", "2.0", "6.0"]
