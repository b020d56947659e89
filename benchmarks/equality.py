"""Every family in every layout against one process: how far losses and gradient norms are apart.

Tiny models on real ranks (gloo, CPU): 20 steps from the same first weights over the same rows. A cell is the greatest
relative difference of losses, training and validation, and of gradient norms.

fp32: the one process has no ZeRO and takes the whole batch at once. Five digits must agree: losses and norms within
1e-5. Adam's epsilon is 1e-6, lest what rounding makes of a gradient near zero be an update of full size.

bf16: the one process has ZeRO 1 (without it there are no exact masters). Losses must agree within 1e-3; norms are
reported. The batch is four times as large and the rate a fifth, for bf16's rounding of a few hundred tokens alone moves
losses by more: the row of one process that only takes its rows in smaller groups is the yardstick.

    python -m benchmarks.equality --out benchmarks/results/equality.json     # and equality.md beside it
    python -m benchmarks.equality --models gru lstm --layouts "tp2 sp" "cp2 summaries" --precisions fp32

The results are written after every case; with --resume, the cases that --out holds already are not trained again. The
exit code is 1 where something disagrees.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import track

from benchmarks.common import save
from tests.harness import RanksFailed
from tests.pretrain.parallel.runs import (
    MODELS,
    Datasets,
    References,
    build_datasets,
    difference,
    import_megatron,
    train_in,
)
from tests.pretrain.parallel.table import LAYERS, LAYOUTS

STEPS = 20
LOSS_LIMITS = {"fp32": 1e-5, "bf16": 1e-3}
NORM_LIMITS = {"fp32": 1e-5, "bf16": float("inf")}
BF16 = ["precision.dtype=bf16", "optim.lr=1e-3", "data.global_batch_rows=32"]
IN_BF16 = ("1 process, micro-batches", "dp2 ZeRO 1", "dp2 ZeRO 2", "dp2 ZeRO 3", "tp2", "cp2", "pp2 1F1B")


@dataclass(frozen=True)
class Case:
    precision: str
    model: str
    layout: str

    @property
    def shared(self) -> list[str]:
        """What the layout and the one process are both told."""
        common = [LAYERS, *LAYOUTS[self.layout].alone]
        return [*common, *BF16] if self.precision == "bf16" else common

    @property
    def sharded(self) -> list[str]:
        """bf16 has its masters in ZeRO's shards."""
        needs_zero = self.precision == "bf16" and "parallel.zero=0" in LAYOUTS[self.layout].settings
        return ["parallel.zero=1"] if needs_zero else []


@dataclass(frozen=True)
class Found:
    """The greatest relative differences, or why there are none."""

    losses: float | None
    norms: float | None
    failure: str = ""


def agrees(case: Case, found: Found) -> bool:
    if found.losses is None or found.norms is None:
        return False
    return found.losses <= LOSS_LIMITS[case.precision] and found.norms <= NORM_LIMITS[case.precision]


def described(case: Case, found: Found | None) -> str:
    """A cell of the table."""
    if found is None:
        return "-"
    text = "failed" if found.losses is None else f"{found.losses:.1e} / {found.norms:.1e}"
    return text if agrees(case, found) else f"**{text}**"


def cases(models: list[str], layouts: list[str], precisions: list[str]) -> list[Case]:
    return [
        Case(precision, model, layout)
        for precision in precisions
        for model in models
        for layout in layouts
        if LAYOUTS[layout].suits(model) and (precision == "fp32" or layout in IN_BF16)
    ]


def compare(case: Case, folder: Path, data: Datasets, alone: References) -> Found:
    """Train in the layout, and in one process unless that is known already."""
    layout = LAYOUTS[case.layout]
    alone_sharded = ["parallel.zero=1"] if case.precision == "bf16" else []
    try:
        expected = alone(case.model, [*case.shared, *alone_sharded], STEPS)
        settings = [*case.shared, *layout.settings, *case.sharded]
        curve = train_in(folder, data, case.model, layout.ranks, settings, STEPS)
    except RanksFailed as error:
        return Found(None, None, str(error))
    return Found(*difference(curve, expected))


def measure(chosen: list[Case], found: dict[Case, Found], out: Path | None, console: Console) -> None:
    """Add to what was found before."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = build_datasets(folder)
        alone = References(folder / "alone", data)
        import_megatron()
        for number, case in enumerate(track(chosen, "layouts", console=console)):
            found[case] = compare(case, folder / str(number), data, alone)
            if not agrees(case, found[case]):
                cell = described(case, found[case])
                console.print(f"{case.precision}, {case.model}, {case.layout}: {cell}", markup=False)
                console.print(found[case].failure, markup=False)
            write(found, out)


def write(found: dict[Case, Found], out: Path | None) -> None:
    if out is not None:
        rows = [asdict(case) | asdict(one) for case, one in found.items()]
        save({"steps": STEPS, "cases": rows}, out, quiet=True)
        out.with_suffix(".md").write_text(markdown(found), encoding="utf-8")


def read(out: Path) -> dict[Case, Found]:
    """What `write` has written."""
    found = {}
    for record in json.loads(out.read_text(encoding="utf-8"))["cases"]:
        case = Case(*(record.pop(key) for key in ("precision", "model", "layout")))
        found[case] = Found(**record)
    return found


def markdown(found: dict[Case, Found]) -> str:
    """A table per precision: layouts down, models across."""
    lines = ["# Layouts against one process", ""]
    lines += [
        f"Greatest relative difference of losses / of gradient norms over {STEPS} steps. Limits in fp32: "
        f"{LOSS_LIMITS['fp32']:.0e} / {NORM_LIMITS['fp32']:.0e}; in bf16: {LOSS_LIMITS['bf16']:.0e} for losses. "
        "Bold: beyond the limit.",
    ]
    for precision in dict.fromkeys(case.precision for case in found):
        models = dict.fromkeys(case.model for case in found if case.precision == precision)
        lines += ["", f"## {precision}", "", f"| layout | {' | '.join(models)} |"]
        lines += ["|---" * (1 + len(models)) + "|"]
        for layout in dict.fromkeys(case.layout for case in found if case.precision == precision):
            row = [Case(precision, model, layout) for model in models]
            cells = [described(case, found.get(case)) for case in row]
            lines += [f"| {layout} | {' | '.join(cells)} |"]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=[*MODELS], default=[*MODELS])
    parser.add_argument("--layouts", nargs="+", choices=[*LAYOUTS], default=[*LAYOUTS], metavar="LAYOUT")
    parser.add_argument("--precisions", nargs="+", choices=[*LOSS_LIMITS], default=[*LOSS_LIMITS])
    parser.add_argument("--out", type=Path, default=None, help="write JSON here, and Markdown beside it")
    parser.add_argument("--resume", action="store_true", help="keep what --out holds already")
    arguments = parser.parse_args()
    console = Console(highlight=False, soft_wrap=True)
    chosen = cases(arguments.models, arguments.layouts, arguments.precisions)
    found = read(arguments.out) if arguments.resume and arguments.out and arguments.out.exists() else {}
    measure([case for case in chosen if case not in found], found, arguments.out, console)
    console.print(markdown(found), markup=False)
    disagreeing = sum(not agrees(case, one) for case, one in found.items())
    sys.exit(f"{disagreeing} of {len(found)} disagree" if disagreeing else 0)


if __name__ == "__main__":
    main()
