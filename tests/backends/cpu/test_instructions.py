"""The CPU kernels execute as many instructions as benchmarks/tools/instructions.json says."""

import json

import pytest

from benchmarks.tools import instructions


def dump(part: int, total: int) -> str:
    return f"# callgrind format\nversion: 1\npart: {part}\n\nevents: Ir\n\nfn=(1) f\n7 {total}\n\ntotals: {total}\n"


def test_dumps_are_read_in_the_order_of_their_parts() -> None:
    assert instructions.totals([dump(10, 7), dump(2, 5), dump(1, 3)]) == [3, 5, 7]
    with pytest.raises(ValueError, match="not a dump of callgrind"):
        instructions.totals(["events: Ir\n"])


def test_a_change_beyond_the_tolerance_is_named() -> None:
    table = {"same": 1000, "less": 1000, "more": 1000, "gone": 1}
    result = instructions.changed({"same": 1029, "less": 960, "more": 1040, "new": 1}, table)
    assert result == [
        "gone: not in the cases",
        "less: 1000 became 960, -4.0%",
        "more: 1000 became 1040, +4.0%",
        "new: not in the table",
    ]


def test_instruction_counts_match_the_table() -> None:
    """A lower count is also a failure, so that the table is updated and protects the improvement.

    After an intended change of the kernels run ``make instructions`` and review the changes of the table.
    """
    if reason := instructions.unavailable():
        pytest.skip(reason)
    table = json.loads(instructions.TABLE.read_text())
    if instructions.compiler() not in table:
        pytest.skip(
            f"{instructions.TABLE.name} has no counts of {instructions.compiler()}: make instructions adds them"
        )
    assert instructions.changed(instructions.count(), table[instructions.compiler()]) == []
