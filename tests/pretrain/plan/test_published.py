"""The planner against published runs: what `python -m benchmarks.plan_published` promises."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.plan_published import COUNTED, SHIPPED, START, halves, judge, main
from benchmarks.published.rows import RUNS, read_rows
from pretrain.plan.constants import origins

ROWS, _ = read_rows(RUNS)
LINES = RUNS.read_text().splitlines()


def test_the_shipped_constants_predict_the_rows() -> None:
    figures = judge([row for row in ROWS if row.quality in COUNTED], SHIPPED).figures()
    assert figures["median"] < 0.05
    assert figures["p90"] < 0.12
    assert figures["rows"] == 161


def test_what_is_fitted_says_so() -> None:
    for name in START:
        plain, _, software = name.partition("@")
        origin = origins(software or "pytorch")[plain]
        assert origin.kind == "fitted", name
    assert {origin.kind for origin in origins().values()} == {"fitted", "measured", "assumed"}


def test_no_model_is_in_both_halves() -> None:
    first, second = halves(ROWS)
    assert len(first) + len(second) == len(ROWS)
    assert not {row.model for row in first} & {row.model for row in second}


def rows_file(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


def test_other_rows_end_in_the_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--rows", str(rows_file(tmp_path / "rows.csv", *LINES[:6]))])
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last.startswith("median ")
    assert last.endswith(" over 5 rows")
    assert last.count(" %") == 3


def test_rows_that_cannot_be_are_named_left_out_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd_gpu = LINES[1].replace(",h100,", ",b300,", 1)
    odd_layout = LINES[2].replace(",256,8,50,", ",257,8,50,", 1)
    main(["--rows", str(rows_file(tmp_path / "rows.csv", LINES[0], odd_gpu, odd_layout, LINES[3]))])
    out = " ".join(capsys.readouterr().out.split())
    assert "line 2 (mosaic-h100-70b-s2048-g512-mb8-ga1): gpu 'b300'" in out
    assert "line 3 (mosaic-h100-70b-s2048-g256-mb8-ga1): micro x accum x replicas = 2056 rows per step" in out
    assert "2 of 3 rows left out" in out
    assert out.endswith("over 1 rows")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([LINES[0].replace("tok_s_gpu", "speed"), LINES[1]], "lacks the columns tok_s_gpu"),
        ([LINES[0]], "no row can be used: it has none"),
        ([LINES[0], LINES[1].replace(",A,", ",C,")], "all rows are of quality C"),
    ],
)
def test_files_that_cannot_be_used(lines: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=message):
        main(["--rows", str(rows_file(tmp_path / "rows.csv", *lines))])


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(SystemExit, match=r"nowhere\.csv: cannot be read"):
        main(["--rows", "nowhere.csv"])
