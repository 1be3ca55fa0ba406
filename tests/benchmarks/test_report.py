"""The report on invented results: the reported changes, the figures, and the content of the page."""

import copy
import json
import re
import sys
from pathlib import Path

import pytest

from benchmarks.__main__ import main
from benchmarks.report import page, tables
from benchmarks.report.compare import compare
from benchmarks.tools import measurements
from tests import ROOT

ENVIRONMENT = {
    "date": "2026-01-02T03:04:05+00:00",
    "commit": "0123456789abcdef",
    "uncommitted changes": False,
    "device": "cpu",
    "backend": "cpu",
    "threads": 2,
    "torch isa": "AVX2",
    "load average at start": 0.5,
    "load average at end": 0.5,
    "versions": {"torch": "2.13.0"},
    "devices": {"cpu": "a processor, 2 cores", "cuda": "none"},
    "native module": {"cpu kernels": "avx2"},
}


def measurement(provider: str, ms: float, spread: float = 0.1, bench: str = "batch_norm", **more: object) -> dict:
    """A measurement of one provider; ``spread`` is the width of p20 to p80 relative to the median."""
    label = {"bench": bench, "op": "bn_add_relu", "shape": "stage1", "layout": "nchw", "dtype": "fp32"}
    label |= {"size": [128, 16, 32, 32], "tensor_bytes": 8 << 20, "mode": "call", "provider": provider}
    return label | {"median_ms": ms, "p20_ms": ms * (1 - spread / 2), "p80_ms": ms * (1 + spread / 2)} | more


def results(*rows: dict, **environment: object) -> dict:
    contents = {"format": 1, "quick": False, "environment": ENVIRONMENT | environment, "rows": list(rows)}
    return measurements.with_targets(copy.deepcopy(contents))


def changes_of(old: list[dict], new: list[dict]) -> dict[str, tuple[float, bool]]:
    result, noise = compare(results(*old), results(*new))
    return {change.measurement["provider"]: (pytest.approx(change.times), change.beyond(noise)) for change in result}


def test_a_change_is_beyond_the_noise_where_the_ranges_do_not_overlap() -> None:
    assert changes_of([measurement("bnkern", 1.0)], [measurement("bnkern", 1.2)]) == {"bnkern": (1.2, True)}
    assert changes_of([measurement("bnkern", 1.0)], [measurement("bnkern", 0.8)]) == {"bnkern": (0.8, True)}
    assert changes_of([measurement("bnkern", 1.0)], [measurement("bnkern", 1.2, spread=0.5)]) == {
        "bnkern": (1.2, False)
    }


def test_a_small_change_does_not_count() -> None:
    assert changes_of([measurement("bnkern", 1.0, spread=0)], [measurement("bnkern", 1.02, spread=0)]) == {
        "bnkern": (1.02, False)
    }


def test_the_change_of_the_peers_is_attributed_to_the_machine() -> None:
    """If all take twice the time, nothing changed. If only the peers do, bnkern became twice as fast."""
    old = [measurement("bnkern", 1.0), measurement("eager", 3.0), measurement("eager in place", 2.0)]
    all_slower = [measurement("bnkern", 2.0), measurement("eager", 6.0), measurement("eager in place", 4.0)]
    assert changes_of(old, all_slower) == {
        "bnkern": (1.0, False),
        "eager": (1.0, False),
        "eager in place": (1.0, False),
    }
    peers_slower = [measurement("bnkern", 1.0), measurement("eager", 6.0), measurement("eager in place", 4.0)]
    assert changes_of(old, peers_slower)["bnkern"] == (0.5, True)


def test_noise_is_the_difference_between_the_peers() -> None:
    """Each peer of a case changed by another factor, so a change of bnkern must be larger to count."""
    cases = [f"stage{k}" for k in range(20)]
    old = [
        measurement(provider, 1.0) | {"shape": case} for case in cases for provider in ("bnkern", "eager", "compile")
    ]
    times = {"bnkern": 1.4, "eager": 1.0, "compile": 1.25}
    new = [measurement(r["provider"], times[r["provider"]]) | {"shape": r["shape"]} for r in old]
    changes, noise = compare(results(*old), results(*new))
    assert noise == pytest.approx(1.25)
    ours = [change for change in changes if not change.is_peer]
    assert [change.times for change in ours] == pytest.approx([1.4 / 1.125] * 20)
    assert not any(change.beyond(noise) for change in ours) and all(change.beyond(1.2) for change in ours)


def test_peers_of_another_torch_are_not_used_for_drift() -> None:
    old = results(measurement("bnkern", 1.0), measurement("eager", 3.0))
    new = results(measurement("bnkern", 1.0), measurement("eager", 6.0), versions={"torch": "2.14.0"})
    changes, noise = compare(old, new)
    assert [change.times for change in changes] == [1.0, 2.0] and noise == 1.0


def test_measurements_in_only_one_file_are_not_compared() -> None:
    missing = measurement("attorch", 1.0)
    del missing["median_ms"]
    assert (
        changes_of([measurement("bnkern", 1.0), missing], [measurement("bnkern", 1.0, bench="forward"), missing]) == {}
    )


def measurements_of_each_kind() -> list[dict]:
    """Measurements of every kind that has a figure."""
    speedup = {"speedup": {"eager": 2.0, "best": 2.0}, "error": {"y": 1e-7}}
    moved = {"bytes": 1 << 24, "gb_per_s": 20.0, "share_of_copy": 0.8, "outputs": "reused"}
    rows = [
        measurement("bnkern", 1.0, **speedup),
        measurement("eager", 2.0, **speedup),
        measurement("compile", 4.0, **speedup),
    ]
    rows += [
        measurement("bnkern", 1.0, bench="moments", **moved),
        measurement("copy", 5.0, bench="moments", gb_per_s=25.0),
    ]
    for axis, value, ms in (("N", 2, 0.1), ("N", 8, 0.3), ("depth", 8, 20.0), ("depth", 20, 50.0)):
        for provider in ("bnkern", "eager"):
            shape = {"shape": f"{axis}{value}", "axis": axis, "value": value}
            rows.append(measurement(provider, ms, bench="growth", **speedup) | shape)
    bytes_of = {"saved_bytes": 10_000_000, "peak_bytes": 30_000_000}
    for provider in ("bnkern", "eager"):
        label = measurement(provider, 1.0, bench="memory_of_networks") | {"op": "resnet110"} | bytes_of
        rows.append({name: value for name, value in label.items() if not name.endswith("_ms")})
    return rows


def test_report_holds_tables_figures_and_the_comparison(tmp_path: Path, monkeypatch, capsys) -> None:
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text(measurements.dump(results(measurement("bnkern", 2.0), measurement("eager", 2.0))))
    new.write_text(measurements.dump(results(*measurements_of_each_kind())))
    monkeypatch.setattr(sys, "argv", ["benchmarks", "report", str(new), str(old), "--out", str(tmp_path / "out")])
    main()
    assert capsys.readouterr().out.strip() == str(tmp_path / "out" / "report.html")
    text = (tmp_path / "out" / "report.md").read_text()
    html = (tmp_path / "out" / "report.html").read_text()
    figures = {path.stem for path in (tmp_path / "out" / "figures").iterdir()}
    assert figures == {"speedups", "roof", "growth-N", "growth-depth", "memory", "changes"}
    for name in figures:
        assert f"](figures/{name}.svg)" in text
        assert html.count(f'id="{name}-') > 3  # inlined, with unique ids
    assert "1 faster beyond" in text and "| 0.50 | 2 | 1 | 1.00 | faster |" in text
    assert html.count("<svg") == len(figures)
    assert not re.search(r'(src|href)="http', html)  # self-contained
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    before = html
    main()
    assert (tmp_path / "out" / "report.html").read_text() == before  # the same results, the same bytes


def test_report_omits_missing_measurements(tmp_path: Path) -> None:
    page.report(results(measurement("bnkern", 1.0, bench="step"), measurement("eager", 2.0, bench="step")), tmp_path)
    assert list((tmp_path / "figures").iterdir()) == []
    assert "Training steps" in (tmp_path / "report.html").read_text()


def test_table_marks_wrong_results_and_lists_missing_providers_once() -> None:
    rows = [
        measurement("bnkern", 1.0, error={"y": 1e-7}, speedup={"best": 2.0}),
        measurement("eager", 2.0, error={"y": 2e-7}),
        measurement("inplace_abn", 1.5, error={"y": 1e-3}),
        measurement("FlagGems", 1.5, error={"y": float("nan")}),
        measurement("attorch", 0) | {"missing": "not there"},
    ]
    text = tables.markdown(results(*rows))
    cells = next(line for line in text.splitlines() if line.startswith("| bn_add_relu stage1")).split(" | ")
    assert "wrong" not in cells[1] and "wrong" not in cells[2]
    assert cells[3].endswith("1e-03 **wrong**") and cells[4].endswith("**wrong**")
    assert "Missing: attorch (not there)." in text


def test_merge_keeps_the_last_measurement_and_refuses_another_machine(tmp_path: Path) -> None:
    first = results(measurement("bnkern", 1.0), measurement("eager", 2.0))
    second = results(measurement("bnkern", 3.0), measurement("bnkern", 5.0, bench="forward"))
    merged = measurements.merged([first, second])
    assert [(r["bench"], r["provider"], r["median_ms"]) for r in merged["rows"]] == [
        ("batch_norm", "bnkern", 3.0),
        ("batch_norm", "eager", 2.0),
        ("forward", "bnkern", 5.0),
    ]
    with pytest.raises(ValueError, match="differ in commit"):
        measurements.merged([first, results(commit="another")])
    path = tmp_path / "r.json"
    path.write_text(measurements.dump(merged))
    assert json.loads(path.read_text()) == merged


def test_committed_results_have_an_environment_and_make_a_page(tmp_path: Path) -> None:
    files = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
    assert files
    for path in files:
        result = json.loads(path.read_text())
        assert result["format"] == measurements.FORMAT and not result["quick"]
        assert re.search(rf"-{result['environment']['date'][:10]}(-[a-z]+)?$", path.stem)  # MACHINE-DATE[-PART]
        assert re.fullmatch("[0-9a-f]{40}", result["environment"]["commit"])
        assert {"torch", "python"} <= result["environment"]["versions"].keys()
        assert page.report(result, tmp_path / path.stem).exists()
