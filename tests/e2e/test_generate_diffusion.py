"""`triptych generate` and `evaluate --choices` of a run of masked diffusion, and its samples during training."""

from __future__ import annotations

import json
import shutil
import wave
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from pretrain.commands.generate import refuse_vain_guidance
from pretrain.config import load_config
from pretrain.config.objective import MaskedDiffusionSection
from pretrain.errors import UserError
from pretrain.exit_codes import EXIT_DONE, EXIT_USER_ERROR
from pretrain.generate.lengths import load_lengths
from pretrain.generate.media import write_image, write_sound
from pretrain.generate.settings import SamplerSettings
from pretrain.hooks.samples import DiffusionSampleHook
from pretrain.run_data import open_diffusion
from tests.e2e.training import run_forked, train_rank
from tests.e2e.trimodal import WORDS, build_pairs, picture, sound, write_tiny_config
from tests.harness import run_ranks


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on two ranks that sampled together under ZeRO 3."""
    folder = tmp_path_factory.mktemp("diffusion")
    build_pairs(folder / "data")
    config = write_tiny_config(folder, folder / "data")
    ended = run_ranks(2, train_rank, config, ["parallel.zero=3"])
    assert all(one.done for one in ended)
    return folder / "runs" / "tiny"


def test_samples_are_in_tensorboard(trained: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(trained / "tensorboard"), size_guidance={"tensors": 0})
    events.Reload()
    tags = events.Tags()
    assert tags["images"] == ["samples/text-to-image"]
    assert [event.step for event in events.Images("samples/text-to-image")] == [2, 4]
    sounds = events.Audio("samples/text-to-audio/0")
    assert [event.step for event in sounds] == [2, 4] and sounds[0].sample_rate == 8000
    texts = [f"samples/{name}/text_summary" for name in ("text", "image-to-text", "audio-to-text")]
    assert set(texts) <= set(tags["tensors"])
    (told,) = events.Tensors("samples/image-to-text/text_summary")[-1].tensor_proto.string_val
    assert told.decode().count("(true: ") == 9


def test_codes_without_a_codec_are_said_to_have_no_samples(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    build_pairs(tmp_path / "data")
    for codecs in (tmp_path / "data").glob("*/codecs"):
        shutil.rmtree(codecs / "image")
    data = open_diffusion(load_config(write_tiny_config(tmp_path, tmp_path / "data")))
    hook = DiffusionSampleHook(data, 1)
    run = SimpleNamespace(ranks=SimpleNamespace(is_main=True), folder=SimpleNamespace(tokenizer=tmp_path))
    hook.before_training(run)  # type: ignore[arg-type]
    assert [record.getMessage() for record in caplog.records] == [
        "no samples of text-to-image: the data holds codes, and no codec to decode them with"
    ]
    assert "text-to-image" in load_lengths(tmp_path)


def test_how_long_targets_are_is_kept(trained: Path) -> None:
    lengths = json.loads((trained / "tokenizer" / "target_lengths.json").read_text())
    # Two codebooks with a delay: three frames take four columns.
    expected = {
        "text": "6",
        "text-to-image": "4",
        "image-to-text": "2",
        "text-to-audio": "8",
        "audio-to-text": "2",
    }
    assert {task: next(iter(counts)) for task, counts in lengths.items()} == expected


def test_pictures(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "two.png"
    words = ("--task", "text-to-image", "--prompt", "two", "--out", str(out))
    assert run_forked("generate", str(trained), *words).code == EXIT_DONE
    first = np.asarray(Image.open(out))
    assert first.shape == (4, 4) and first.dtype == np.uint8
    assert run_forked("generate", str(trained), *words).code == EXIT_DONE
    assert np.array_equal(np.asarray(Image.open(out)), first), "the same seed, the same picture"
    several = run_forked("generate", str(trained), *words, "--count", "3", "--guidance", "1.5")
    assert several.output.split() == [str(tmp_path / f"two-{number}.png") for number in range(3)]
    sheet = run_forked(
        "generate", str(trained), *words, "--count", "3", "--sheet", "--sampler", "first_hitting"
    )
    assert sheet.code == EXIT_DONE and Image.open(out).size == (2 * 18 + 2, 2 * 18 + 2)


def test_sounds(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "two.wav"
    words = ("--task", "text-to-audio", "--prompt", "two", "--out", str(out), "--steps", "3", "--gumbel", "1")
    assert run_forked("generate", str(trained), *words).code == EXIT_DONE
    with wave.open(str(out)) as file:
        assert (file.getframerate(), file.getnchannels(), file.getnframes()) == (8000, 1, 656)


def test_texts(trained: Path, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    write_image(tmp_path / "in.png", picture(1, random))
    write_sound(tmp_path / "in.wav", sound(1, random), 8000)
    for source, path in (("image", "in.png"), ("audio", "in.wav")):
        ended = run_forked(
            "generate", str(trained), "--task", f"{source}-to-text", f"--{source}", str(tmp_path / path)
        )
        assert ended.code == EXIT_DONE and set(ended.output.split()) <= set(WORDS), ended
    begun = run_forked("generate", str(trained), "--task", "text", "--count", "2", "--remask", "0.1")
    assert begun.code == EXIT_DONE and len(begun.output.splitlines()) == 2
    filled = run_forked("generate", str(trained), "--prompt", "one plus [MASK] equals one")
    words = filled.output.split()
    assert words[:2] == ["one", "plus"] and words[3:] == ["equals", "one"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--task", "text-to-image", "--prompt", "two"], "--out: missing; name the .png file"),
        (
            ["--task", "text-to-image", "--image", "x.png", "--out", "y.png"],
            "--image: text-to-image takes --prompt",
        ),
        (["--task", "image-to-text"], "--image: missing"),
        (["--task", "text-to-smell", "--prompt", "x"], "--task text-to-smell: one of text, text-to-image"),
        (["--task", "text-to-image", "--prompt", "two", "--out", "no/such/a.png"], "there is no such folder"),
        (["--guidance", "2"], "--guidance 2: free text has no condition"),
        (["--sampler", "ancestral", "--score", "margin"], "score = margin"),
        (["--prompt", "[MASK]", "--tokens", "3"], "--tokens: the prompt's [MASK]s"),
        (["--prompt", "zebra"], "zebra"),
        (["--prompt", "one", "--tokens", "9"], "every text target that this run learned from fills 6 tokens"),
        (["--task", "text-to-image", "--prompt", "two", "--out", "a.picture"], "write to a .png"),
        (["--task", "text-to-image", "--prompt", "two", "--out", "."], "--out .: is a folder"),
    ],
)
def test_options_that_do_not_fit_are_named(trained: Path, options: list[str], message: str) -> None:
    ended = run_forked("generate", str(trained), *options)
    assert ended.code == EXIT_USER_ERROR and message in ended.errors and "Traceback" not in ended.errors, (
        ended
    )


def test_guidance_needs_condition_dropout() -> None:
    def section(**values: object) -> MaskedDiffusionSection:
        return MaskedDiffusionSection(kind="masked_diffusion", **values)  # type: ignore[arg-type]

    guided = SamplerSettings(guidance=2.0)
    refuse_vain_guidance(guided, "text-to-image", section())
    with pytest.raises(UserError, match="objective.condition_dropout = 0"):
        refuse_vain_guidance(guided, "text-to-image", section(condition_dropout=0))
    refuse_vain_guidance(SamplerSettings(), "text-to-image", section(condition_dropout=0))
    with pytest.raises(UserError, match="objective.whole_modality = 0"):
        refuse_vain_guidance(guided, "text-to-image", section(condition="joint"))


def test_questions_are_answered(trained: Path, tmp_path: Path) -> None:
    write_image(tmp_path / "in.png", picture(1, np.random.default_rng(0)))
    questions = [
        {"task": "image-to-text", "condition": "in.png", "choices": list(WORDS[:4]), "answer": "one"},
        {"task": "text", "prompt": "one plus zero equals", "choices": ["one", "two"], "answer": 0},
    ]
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(map(json.dumps, questions)))
    for by in ("elbo", "confidence"):
        ended = run_forked("evaluate", str(trained), "--choices", str(path), "--by", by, "--json")
        assert ended.code == EXIT_DONE, ended
        result = json.loads(ended.output)
        assert {task: one["count"] for task, one in result["accuracy"].items()} == {
            "image-to-text": 1,
            "text": 1,
        }
        assert [len(one["nats"]) for one in result["questions"]] == [4, 2]
    table = run_forked("evaluate", str(trained), "--choices", str(path))
    assert table.code == EXIT_DONE and "95 % interval" in table.output


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1: not JSON"),
        ('{"task": "text", "choices": ["a"], "answer": 0}', "line 1: choices must be a list of two or more"),
        ('{"task": "smell", "choices": ["a", "b"], "answer": 0}', "line 1: task 'smell' is not one of"),
        ('{"task": "text", "choices": ["one", "two"], "answer": "six"}', "line 1: answer 'six' is neither"),
        (
            '{"task": "image-to-text", "choices": ["one", "two"], "answer": 0}',
            "line 1: image-to-text needs a condition",
        ),
        ('{"task": "text", "choices": ["one", "two"], "right": 0}', "an object with keys of"),
        (
            '{"task": "image-to-text", "condition": "x.png", "choices": ["one", "two"], "answer": 0}',
            "x.png: cannot be read",
        ),
        (
            '{"task": "text", "prompt": "one plus", "choices": ["zebra", "two"], "answer": 1}',
            "line 1: 'one plus zebra': the tokenizer has no token",
        ),
        (
            '{"task": "text", "prompt": "one plus one", "choices": ["one one one", "two"], "answer": 1}',
            "line 1: a choice makes a text of 6 tokens and end-of-text; this run's texts have 6",
        ),
    ],
)
def test_a_bad_question_is_named(trained: Path, tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text(line + "\n")
    ended = run_forked("evaluate", str(trained), "--choices", str(path))
    assert ended.code == EXIT_USER_ERROR and message in ended.errors and "Traceback" not in ended.errors, (
        ended
    )
