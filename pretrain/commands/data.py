"""`triptych data ...`: make, check and look at datasets."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pretrain.commands.options import with_options
from pretrain.commands.pair_options import EncodingOptions

if TYPE_CHECKING:
    from data_pipelines.prepare.text import Built
    from data_pipelines.storage.dataset import Dataset

app = typer.Typer(no_args_is_help=True, help="Make, check and look at datasets.", rich_markup_mode="rich")

Out = Annotated[Path, typer.Option(help="Folder to write; it appears when the build is complete.")]
TokenizerSpec = Annotated[
    str, typer.Option(help="bytes, bpe:N (trained on this text), a tokenizer.json, or a dataset folder.")
]
Fraction = Annotated[float, typer.Option(help="Share of documents held out for validation.")]
ShardSize = Annotated[float, typer.Option(help="Size of one shard file in MB.")]
Seed = Annotated[int, typer.Option(help="Decides which documents are held out.")]
Force = Annotated[bool, typer.Option("--force", help="Replace the dataset that is in --out.")]
Strict = Annotated[
    bool,
    typer.Option("--strict", help="Refuse where anything would be left out or lost, instead of telling it."),
]
EndOfText = Annotated[
    str | None,
    typer.Option(
        help="The special token of a tokenizer.json that ends a text. Default: a usual name for it."
    ),
]
Folder = Annotated[Path, typer.Argument(help="A dataset folder.", show_default=False)]


@app.command()
def demo(
    out: Annotated[
        Path | None, typer.Option(help="Folder to write. Default: data/demo, or data/digits with --digits.")
    ] = None,
    digits: Annotated[
        bool, typer.Option("--digits", help="Five small datasets of text, images and sounds of digits.")
    ] = False,
    tokenizer: TokenizerSpec = "bpe:4096",
    megabytes: Annotated[float, typer.Option(help="At most so much text.")] = 12.0,
    validation_fraction: Fraction = 0.05,
    seed: Seed = 0,
    force: Force = False,
) -> None:
    """Build a dataset from this Python's standard library: real text, no download.

    With --digits: number words and arithmetic, handwritten digits and dual tones for masked diffusion; of the other
    options only --seed and --force count.

    Example: triptych data demo --out data/demo

    Example: triptych data demo --digits --out data/digits
    """
    if digits:
        _demo_digits(out or Path("data/digits"), seed, force)
        return
    out = out or Path("data/demo")
    from data_pipelines.prepare.demo import build_demo
    from data_pipelines.prepare.text import BuildOptions

    options = BuildOptions(tokenizer, validation_fraction, 256, seed, force)
    with _progress() as report:
        built = build_demo(out, options, megabytes, report)
    _print_built(built)


def _demo_digits(out: Path, seed: int, force: bool) -> None:
    from data_pipelines.digits.build import DigitOptions, build_digits
    from data_pipelines.tokens.modalities import load_modalities

    with _progress() as report:
        datasets = build_digits(out, DigitOptions(seed=seed, force=force), report)
    typer.echo(f"{out}: {load_modalities(out / 'text-to-image').describe()}")
    for name, dataset in datasets.items():
        if name == "text":
            typer.echo(f"{dataset.path}:")
        _print_splits(dataset)


@app.command()
def build(
    source: Annotated[
        Path, typer.Argument(help="A text file, .jsonl, .jsonl.gz, .json, .tar, or a folder of such files.")
    ],
    out: Out,
    tokenizer: TokenizerSpec = "bpe:8192",
    validation_fraction: Fraction = 0.05,
    shard_megabytes: ShardSize = 256.0,
    seed: Seed = 0,
    force: Force = False,
    strict: Strict = False,
    end_of_text: EndOfText = None,
) -> None:
    """Tokenise your own text.

    Each line of a .jsonl file is one document ({"text": "..."}), a .json file is one such object or a list of them,
    every other file is one document. A single plain file is split into a training part and a validation part at its
    end. What is left out, and characters that the tokenizer lacks, are counted with an example.

    Example: triptych data build my_texts/ --out data/mine --tokenizer bpe:8192
    """
    from data_pipelines.prepare.text import BuildOptions
    from data_pipelines.prepare.text import build as run_build

    options = BuildOptions(tokenizer, validation_fraction, shard_megabytes, seed, force, strict, end_of_text)
    with _progress() as report:
        built = run_build(source, out, options, report)
    _print_built(built)


@app.command()
@with_options(encoding=EncodingOptions)
def pairs(
    source: Annotated[
        Path,
        typer.Argument(
            help="A .tar(.gz), or a folder of such shards and of files KEY.txt or .json with KEY.png, .jpg, .wav ..."
        ),
    ],
    out: Out,
    encoding: EncodingOptions,
    validation_fraction: Fraction = 0.05,
    shard_megabytes: ShardSize = 256.0,
    seed: Seed = 0,
    force: Force = False,
    strict: Strict = False,
) -> None:
    """Encode captions with images or sounds, one dataset for each task.

    Images are turned as their EXIF orientation says, and what is transparent is laid on white. What is left out or
    changed is counted with an example. OUT/reconstruction has a picture and a sound as the codecs give them back.

    Example: triptych data pairs photos/ --out data/photos --image-codec patch:1024:8 --tokenizer data/demo
    """
    from data_pipelines.prepare.pair_options import PairOptions
    from data_pipelines.prepare.pairs import build_pairs

    tasks = tuple(name.strip() for name in encoding.tasks.split(",") if name.strip())
    options = PairOptions(
        **{**vars(encoding), "tasks": tasks},
        validation_fraction=validation_fraction,
        shard_megabytes=shard_megabytes,
        seed=seed,
        force=force,
        strict=strict,
    )
    with _progress() as report:
        built = build_pairs(source, out, options, report)
    typer.echo(f"{out}: {built.modalities.describe()}; text slot {built.text_slot}")
    for dataset in built.datasets.values():
        _print_splits(dataset)
    told = [built.found.describe(), *built.report.lines(), *(one.describe() for one in built.reconstructions)]
    for line in filter(None, told):
        typer.echo(f"  {line}")
    if built.removed:
        typer.echo(f"  removed what killed builds had left: {', '.join(map(str, built.removed))}")


@app.command()
def tokenize(
    source: Annotated[
        Path, typer.Argument(help="A raw .tar or .tar.gz shard (.txt or .json members) or a folder of them.")
    ],
    out: Out,
    tokenizer: TokenizerSpec,
    validation_fraction: Fraction = 0.05,
    shard_megabytes: ShardSize = 256.0,
    seed: Seed = 0,
    force: Force = False,
    strict: Strict = False,
    end_of_text: EndOfText = None,
) -> None:
    """Tokenise raw webdataset shards.

    Example: triptych data tokenize raw_shards/ --out data/mine --tokenizer data/demo
    """
    from data_pipelines.errors import DataError
    from data_pipelines.prepare.text import BuildOptions, build_from_files
    from data_pipelines.raw.files import find_source, is_tar
    from data_pipelines.raw.report import Report

    told = Report()
    files = find_source(source, out, told.left_out).files
    shards = [path for path in files if is_tar(path)]
    if not shards:
        raise DataError(f"{source}: no .tar shards here. Text and .jsonl files are for data build.")
    for path in files:
        if not is_tar(path):
            told.left_out.add(str(path), "no tar shard (data build reads all files)")
    options = BuildOptions(tokenizer, validation_fraction, shard_megabytes, seed, force, strict, end_of_text)
    with _progress() as report:
        built = build_from_files(shards, out, options, report, told)
    _print_built(built)


@app.command()
def index(folder: Annotated[Path, typer.Argument(help="A folder with .tar shards.")]) -> None:
    """Build the shards' indices again.

    Example: triptych data index data/demo
    """
    from data_pipelines.inspection.lint import rebuild_indices

    with _progress() as report:
        count = rebuild_indices(folder, report)
    typer.echo(f"{folder}: {count} indices written.")


@app.command()
def lint(
    folder: Folder,
    as_json: Annotated[bool, typer.Option("--json", help="Print the problems as JSON.")] = False,
) -> None:
    """Read every byte of a dataset and report all damage. Exit code 1 if there is any.

    Example: triptych data lint data/demo
    """
    from data_pipelines.inspection.lint import damage_json
    from data_pipelines.inspection.lint import lint as find_damage

    with _progress() as report:
        problems = find_damage(folder, report)
    if as_json:
        typer.echo(damage_json(problems))
    else:
        for problem in problems:
            typer.echo(str(problem))
        typer.echo(f"{folder}: {len(problems)} problem(s)." if problems else f"{folder}: no problems.")
    raise typer.Exit(1 if problems else 0)


@app.command()
def stats(
    folder: Folder,
    samples: Annotated[int, typer.Option(help="Show the beginnings of so many documents of each split.")] = 1,
    sequence_length: Annotated[
        int | None, typer.Option(min=1, help="Also tell how much padding rows of whole documents have.")
    ] = None,
) -> None:
    """Documents, tokens, lengths and samples of a dataset.

    Example: triptych data stats data/demo --samples 3
    """
    from rich.console import Console
    from rich.markup import escape

    from data_pipelines.inspection.stats import describe_split, padding_share, sample_texts
    from data_pipelines.storage.dataset import open_dataset
    from data_pipelines.tokens.tokenizer_loading import load_tokenizer
    from pretrain.commands.data_tables import histogram_table, split_table

    dataset, tokenizer, console = open_dataset(folder), load_tokenizer(folder), Console()
    console.print(f"[bold]{escape(str(folder))}[/]  {tokenizer.describe()}  {dataset.fingerprint[:12]}")
    described = [describe_split(dataset, name) for name in dataset.splits]
    console.print(split_table(described))
    if sequence_length is not None:
        for name in dataset.splits:
            share = padding_share(dataset, name, sequence_length)
            console.print(
                f"{name}: {share:.1%} of rows of {sequence_length} tokens of whole documents is padding"
            )
    for split in described:
        console.print(histogram_table(split))
    for name in dataset.splits:
        for text in sample_texts(dataset, tokenizer, name, samples):
            console.rule(f"{name}, the beginning of a document", align="left")
            console.print(escape(text), highlight=False)


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on the terminal's error stream; the function takes (what, done, total)."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        tasks: dict[str, int] = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                for task in bar.tasks:
                    bar.update(task.id, completed=task.total)
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done, total=total)  # type: ignore[arg-type]

        yield report
        for task in bar.tasks:
            bar.update(task.id, completed=task.total)


def _print_splits(dataset: Dataset) -> None:
    if dataset.ranges is not None:
        typer.echo(f"{dataset.path}:")
    for name, split in dataset.splits.items():
        typer.echo(
            f"  {name}: {split.documents:,} documents, {split.tokens:,} tokens, {split.text_bytes:,} bytes, "
            f"{len(split.shards)} shard(s)"
        )


def _print_built(built: Built) -> None:
    dataset = built.dataset
    typer.echo(f"{dataset.path}: {built.tokenizer.describe()}, fingerprint {dataset.fingerprint[:12]}")
    _print_splits(dataset)
    if built.removed:
        names = ", ".join(str(path) for path in built.removed)
        typer.echo(f"  removed what killed builds had left: {names}")
    for line in built.report.lines():
        typer.echo(f"  {line}")
    if built.vocabulary_shortfall:
        typer.echo(f"  {built.vocabulary_shortfall}")
    if "validation" in dataset.splits:
        from pretrain.typed import override, typed

        example = Path("configs/sigmoid/demo.yaml")
        if not example.is_file():  # beside the packages, where they were installed from a checkout
            example = Path(__file__).resolve().parents[2] / example
        if example.is_file():
            typer.echo(f"Train on it: {typed('train', example, override('data.path', dataset.path))}")
        else:
            typer.echo(
                f"Train on it: give {shlex.quote(override('data.path', dataset.path))} to a config's "
                f"`{typed('train', '--help')}`"
            )
    else:
        typer.echo(
            "Training needs a validation split, and this dataset has none. To get one, build again with more documents "
            "or a longer text, and a --validation-fraction that holds some of it out (--force replaces this one)."
        )
