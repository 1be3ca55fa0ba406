"""The tables at the end of ``make gpu-check``, from the files in its folder."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.gpu import attempts, counters, device, profile, rules, targets
from benchmarks.gpu.parts import PARTS
from benchmarks.gpu.state import State
from benchmarks.tools import measurements

KINDS = ("tests", "failures", "errors", "skipped")  # of tests in a file of pytest


def measured(out: Path) -> list[dict]:
    """The measurements of all benchmarks. Of a case that was measured twice, the later one counts."""
    found = {}
    for part in PARTS:
        for path in attempts(out, f"bench-{part.name}.json"):
            found |= {(part.name, *measurements.key(m)): m for m in json.loads(path.read_text())["rows"]}
    return list(found.values())


def failed_tests(out: Path, state: State) -> dict[str, int | None]:
    """For each part of tests that ran: the number of failed tests, or None if it was stopped or ran none.

    A part can fail without a failed test, for example because a sanitizer found an error. It counts as one.
    """
    counts: dict[str, int | None] = {}
    for part in PARTS:
        record, files = state.last(part.name), attempts(out, f"{part.name}.xml")
        if record and files:
            suites = [suite.attrib for suite in ElementTree.parse(files[-1]).getroot().iter("testsuite")]
            count = {kind: sum(int(suite[kind]) for suite in suites) for kind in KINDS}
            failed = count["failures"] + count["errors"]
            ended = count["tests"] > count["skipped"] and record.result in ("ok", "FAILED")
            counts[part.name] = max(failed, record.result == "FAILED") if ended else None
    return counts


def _parts(out: Path, state: State) -> Iterator[str]:
    yield f"{'part':<24} {'result':<14} {'seconds':>7} {'planned':>7}"
    for part in PARTS:
        records = [record for record in state.records if record.part == part.name]
        result, seconds = (records[-1].result, f"{records[-1].seconds:.0f}") if records else ("has not run", "")
        yield f"{part.name:<24} {result:<14} {seconds:>7} {part.seconds or '':>7}"


def _device(out: Path, state: State) -> Iterator[str]:
    found = json.loads(attempts(out, "device.json")[-1].read_text())
    yield from device.table(found["occupancy"])
    for name, wrong in found["layouts"].items():
        yield f"  {name}: {'as in the PTX manual' if wrong == 0 else f'{wrong} values are elsewhere'}"


def _profile(out: Path, state: State) -> Iterator[str]:
    yield from profile.table(json.loads(attempts(out, "profile.json")[-1].read_text())["variants"])


def _counters(out: Path, state: State) -> Iterator[str]:
    yield from counters.table(json.loads(attempts(out, "counters.json")[-1].read_text()))


def _rule(out: Path, state: State) -> Iterator[str]:
    pairs = rules.pairs(measured(out))
    rule = rules.best(pairs)
    model, source = _device_of(out)
    path, devices = out / rules.TABLE.name, attempts(out, "device.json")
    clusters = json.loads(devices[-1].read_text()).get("clusters") if devices else None
    path.write_text(rules.table_with(model, rule, source, clusters))
    extremes = {0: "One kernel for every size", rules.NEVER: "Two kernels for every size"}
    description = extremes.get(rule.single_read_from, f"One kernel from {rule.single_read_from} bytes")
    yield f"{description}: {rule.loss:.3f} times the time of each call's faster strategy, over {len(pairs)} calls."
    yield f"Always one kernel: {rules.loss(0, pairs):.3f}. Always two: {rules.loss(rules.NEVER, pairs):.3f}."
    for label in ("forward, warm", "forward, cold", "backward, warm", "backward, cold"):
        for layout in ("nchw", "channels_last"):
            group = [p for p in pairs if p.name.startswith(label) and f" {layout} " in p.name]
            if group:
                by_rule, best = rules.loss(rule.single_read_from, group), rules.best(group).loss
                yield f"  {label}, {layout}: {by_rule:.3f}, and {best:.3f} by a rule of its own"
    numbers = (
        "not known, because the part device did not write them" if clusters is None else ", ".join(map(str, clusters))
    )
    yield f"Clusters of 2, 4 and 8 blocks at once: {numbers}."
    yield f"The table for {rules.TABLE.relative_to(rules.ROOT)} is in {path.name}."


def _device_of(out: Path) -> tuple[str, str]:
    """The name of the device model and the date of the measurement."""
    environment = json.loads(attempts(out, "bench-strategies.json")[0].read_text())["environment"]
    name = environment["devices"]["cuda:0"].split(", capability")[0]
    return name, f"make gpu-check, {environment['date'][:10]}, commit {environment['commit'][:10]}"


def _targets(out: Path, state: State) -> Iterator[str]:
    yield from targets.table(targets.Run(measured(out), failed_tests(out, state)))


SECTIONS: dict[str, tuple[str | None, Callable[[Path, State], Iterator[str]]]] = {
    "Device": ("device.json", _device),
    "Kernels of a ResNet-110 step": ("profile.json", _profile),
    "Counters": ("counters.json", _counters),
    "One kernel or two": ("bench-strategies.json", _rule),
    "Parts": (None, _parts),
    "Targets": (None, _targets),
}


def write(out: Path, state: State) -> str:
    """Writes and returns all tables for which there are results. An error in one does not prevent the others."""
    lines = []
    for title, (needed, section) in SECTIONS.items():
        if needed and not attempts(out, needed):
            continue
        lines += ["", f"== {title}", ""]
        try:
            lines += section(out, state)
        except Exception as error:  # the measurements must not be lost to an error here
            lines.append(f"cannot be shown: {type(error).__name__}: {error}")
    text = "\n".join(lines) + "\n"
    (out / "summary.txt").write_text(text)
    return text
