"""The benches run, and say with what."""
import json

import pytest
import torch

from tests import bench


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.parametrize("name", bench.BENCHES)
def test_a_bench_prints_a_ratio_for_each_case(name, capsys):
    bench.main([name, "--quick", "--rounds", "1", "--json"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    measured = {"recover": "drop 0", "scale": "few_mb", "precision": "squeeze"}.get(name, "ratio")
    assert rows and all(row["bench"] == name and row[measured] > 0 and row["torch"] == torch.__version__
                        for row in rows)


@pytest.mark.slow
def test_a_table_says_with_what_and_has_a_row_for_each_case(capsys):
    words = ["labels", "augment", "--quick", "--rounds", "1"]
    bench.main([*words, "--json"])
    rows = capsys.readouterr().out.splitlines()
    bench.main(words)
    first, *table = capsys.readouterr().out.splitlines()
    assert all(word in first for word in ("date 20", "threads 1", "torch")) and len(table) >= len(rows) + 4


def test_the_functions_of_a_round_take_turns_and_the_first_round_does_not_count():
    calls = []
    seconds = bench.interleaved([lambda: calls.append("a"), lambda: calls.append("b")], rounds=2)
    assert calls == ["a", "b"] * 3 and len(seconds) == 2
