"""From captions with images or sounds to datasets of pairs, one for each task, with one vocabulary.

Two passes: the first checks every sample (`pair_survey.py`), from which is learned what is to be learned, tokenizer and
codecs (`pair_modalities.py`); the second encodes and writes (`pair_encoding.py`).
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_pipelines.prepare.pair_encoding import encode_samples, text_target_tokens
from data_pipelines.prepare.pair_modalities import choose_modalities, choose_tasks
from data_pipelines.prepare.pair_options import PairOptions
from data_pipelines.prepare.pair_survey import Progress, survey_samples
from data_pipelines.prepare.pair_writer import PairWriter
from data_pipelines.prepare.reconstruction import Reconstruction, write_reconstruction
from data_pipelines.raw.files import find_source
from data_pipelines.raw.report import Report
from data_pipelines.raw.samples import Found
from data_pipelines.storage.dataset import Dataset, open_dataset
from data_pipelines.storage.whole_folders import make_partial, publish, refuse_used
from data_pipelines.tokens.modalities import Modalities, load_modalities


@dataclass(frozen=True)
class BuiltPairs:
    """What was made: the datasets by task.

    report: what was left out, changed or lost.
    found: how many samples there were, and where.
    reconstructions: what the codecs lose, by modality.
    """

    datasets: dict[str, Dataset]
    modalities: Modalities
    text_slot: int
    removed: list[Path]
    report: Report
    found: Found
    reconstructions: list[Reconstruction]


def build_pairs(
    source: Path | str, out: Path | str, options: PairOptions, progress: Progress | None = None
) -> BuiltPairs:
    """Build `out`/TASK for each task from captions with images or sounds (or their codes).

    A sample is held out for validation by the hash of its key, in all tasks alike.

    Raises:
        DataError: a sample without its caption, undecodable, or with codes outside of its codec's range; codecs or
            tokenizer other than the vocabulary's; an option out of range; an output folder in use.
    """
    options.check()
    out, told, found = Path(out), Report(), Found()
    refuse_used(out, options.force)
    show = progress or (lambda what, done, total: None)
    given = load_modalities(options.vocabulary) if options.vocabulary else None
    files = find_source(Path(source), out, told.left_out)
    removed, partial = make_partial(out)
    try:
        survey = survey_samples(files, options, (told, found), show)
        if options.strict:
            told.refuse()
        show("learning tokenizer and codecs", 0, 1)
        modalities = choose_modalities(survey, options, given)
        tasks = choose_tasks(survey, options, modalities.vocabulary)
        slot = text_target_tokens(files, options, modalities)
        show("learning tokenizer and codecs", 1, 1)
        writers = _writers(partial, tasks, modalities, slot, options)
        judged = encode_samples(files, writers, (modalities, options, survey), told, show)
        if options.strict:
            told.refuse()
        for writer in writers.values():
            writer.close()
        reconstructions = [
            write_reconstruction(partial, modalities, *one) for one in judged.items() if one[1]
        ]
        publish(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    datasets = {task: open_dataset(out / task) for task in tasks}
    return BuiltPairs(datasets, modalities, slot, removed, told, found, reconstructions)


def _writers(
    partial: Path, tasks: Sequence[str], modalities: Modalities, slot: int, options: PairOptions
) -> dict[str, PairWriter]:
    writers = {}
    for task in tasks:
        (partial / task).mkdir()
        bytes_each = int(options.shard_megabytes * 1e6)
        writers[task] = PairWriter(partial / task, task, modalities, slot, bytes_each)
    return writers
