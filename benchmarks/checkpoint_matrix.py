"""A checkpoint of every layout, loaded in every layout, of both engines.

Tiny models on real ranks (gloo, CPU), fp32. Each layout trains and saves at step 10; each layout then goes on from each
of these checkpoints to step 14, in a folder that holds nothing else. A cell is the greatest relative difference of the
four losses, and of their gradient norms, to one process that was never interrupted: five digits must agree.

    python -m benchmarks.checkpoint_matrix --out benchmarks/results/checkpoint_matrix.json   # and .md beside it
    python -m benchmarks.checkpoint_matrix --models gru trimodal --layouts "1 process" "dp2 ZeRO 3" "tp2 pp2"

The results are written after every case; with --resume, the cases that --out holds already are not run again. The exit
code is 1 where something disagrees.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import track

from benchmarks.common import save
from pretrain.checkpoint.steps import step_name
from tests.harness import RanksFailed
from tests.pretrain.parallel.runs import (
    MODELS,
    Curve,
    Datasets,
    build_datasets,
    difference,
    import_megatron,
    train_in,
)
from tests.pretrain.parallel.table import LAYERS, LAYOUTS, Layout

SAVED_AT, STEPS = 10, 14
LIMIT = 1e-5
SETTINGS = [LAYERS, f"checkpoint.save_every_steps={SAVED_AT}", "monitor.evaluate_rows=null"]
MATRIX = {"1 process": Layout(1, ("parallel.zero=0",))} | {
    name: LAYOUTS[name]
    for name in (
        "dp2 ZeRO 1",
        "dp2 ZeRO 2",
        "dp2 ZeRO 3",
        "tp2",
        "tp2 sp dp2 ZeRO 2",
        "cp2 dp2 ZeRO 3",
        "tp2 sp cp2",
        "megatron dp2 ZeRO 1",
        "pp2 1F1B",
        "pp2 interleaved dp2 ZeRO 1",
        "tp2 pp2",
    )
}


@dataclass(frozen=True)
class Case:
    model: str
    saved: str
    loaded: str


@dataclass(frozen=True)
class Found:
    """The greatest relative differences, or why there are none."""

    losses: float | None
    norms: float | None
    failure: str = ""

    @property
    def agrees(self) -> bool:
        return self.losses is not None and self.norms is not None and max(self.losses, self.norms) <= LIMIT

    def __str__(self) -> str:
        text = "failed" if self.losses is None else f"{max(self.losses, self.norms or 0.0):.1e}"
        return text if self.agrees else f"**{text}**"


class Runs:
    """Runs of one model, each layout's first one kept for its checkpoint."""

    def __init__(self, folder: Path, data: Datasets, model: str) -> None:
        self._folder, self._data, self._model = folder, data, model
        self._whole: dict[str, Curve] = {}

    def whole(self, layout: str) -> Curve:
        """Trained without a stop, with a checkpoint on the way."""
        if layout not in self._whole:
            self._whole[layout] = self._train(self._folder / layout, layout)
        return self._whole[layout]

    def continued(self, saved: str, loaded: str) -> Curve:
        """From the other's checkpoint, which is all that the run's folder holds."""
        self.whole(saved)
        folder, step = self._folder / "continued", Path("runs/tiny/checkpoints", step_name(SAVED_AT))
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self._folder / saved / step, folder / step)
        return self._train(folder, loaded)

    def _train(self, folder: Path, layout: str) -> Curve:
        one = MATRIX[layout]
        settings = [*SETTINGS, *one.settings]
        return train_in(folder, self._data, self._model, one.ranks, settings, STEPS)


def compare(runs: Runs, saved: str, loaded: str) -> Found:
    try:
        expected = after_the_save(runs.whole("1 process"))
        return Found(*difference(runs.continued(saved, loaded), expected))
    except RanksFailed as error:
        return Found(None, None, str(error))


def after_the_save(curve: Curve) -> Curve:
    logged = {key: value for key, value in curve.logged.items() if int(key.split()[0]) > SAVED_AT}
    return Curve(logged, curve.gradient_norms[SAVED_AT:])


def measure(chosen: list[Case], found: dict[Case, Found], out: Path | None, console: Console) -> None:
    """Add to what was found before."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = build_datasets(folder)
        import_megatron()
        runs = {case.model: Runs(folder / case.model, data, case.model) for case in chosen}
        for case in track(chosen, "loads", console=console):
            found[case] = compare(runs[case.model], case.saved, case.loaded)
            if not found[case].agrees:
                console.print(f"{case.model}, {case.saved} -> {case.loaded}: {found[case]}")
                console.print(found[case].failure, markup=False)
            write(found, out)


def write(found: dict[Case, Found], out: Path | None) -> None:
    if out is not None:
        rows = [asdict(case) | asdict(one) for case, one in found.items()]
        save({"saved_at": SAVED_AT, "steps": STEPS, "cases": rows}, out, quiet=True)
        out.with_suffix(".md").write_text(markdown(found), encoding="utf-8")


def read(out: Path) -> dict[Case, Found]:
    """What `write` has written."""
    found = {}
    for record in json.loads(out.read_text(encoding="utf-8"))["cases"]:
        case = Case(*(record.pop(key) for key in ("model", "saved", "loaded")))
        found[case] = Found(**record)
    return found


def markdown(found: dict[Case, Found]) -> str:
    """A table per model: who saved down, who loaded across."""
    lines = [
        "# Checkpoints between layouts",
        "",
        f"Saved at step {SAVED_AT} in the layout on the left, loaded in the one above, trained to step {STEPS}: the "
        "greatest relative difference of losses and gradient norms to one process without a stop. "
        f"Limit: {LIMIT:.0e}; bold: beyond it.",
    ]
    for model in dict.fromkeys(case.model for case in found):
        names = list(dict.fromkeys(case.loaded for case in found if case.model == model))
        lines += ["", f"## {model}", "", f"| saved, loaded | {' | '.join(names)} |"]
        lines += ["|---" * (1 + len(names)) + "|"]
        for saved in dict.fromkeys(case.saved for case in found if case.model == model):
            cells = (str(found.get(Case(model, saved, loaded), "-")) for loaded in names)
            lines += [f"| {saved} | {' | '.join(cells)} |"]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=[*MODELS], default=["sigmoid"])
    parser.add_argument("--layouts", nargs="+", choices=[*MATRIX], default=[*MATRIX], metavar="LAYOUT")
    parser.add_argument("--out", type=Path, default=None, help="write JSON here, and Markdown beside it")
    parser.add_argument("--resume", action="store_true", help="keep what --out holds already")
    arguments = parser.parse_args()
    console = Console(highlight=False, soft_wrap=True)
    chosen = [
        Case(model, saved, loaded)
        for model in arguments.models
        for saved in arguments.layouts
        for loaded in arguments.layouts
    ]
    found = read(arguments.out) if arguments.resume and arguments.out and arguments.out.exists() else {}
    measure([case for case in chosen if case not in found], found, arguments.out, console)
    console.print(markdown(found), markup=False)
    disagreeing = sum(not one.agrees for one in found.values())
    sys.exit(f"{disagreeing} of {len(found)} disagree" if disagreeing else 0)


if __name__ == "__main__":
    main()
