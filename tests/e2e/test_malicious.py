"""Runs and datasets from somebody else: nothing in them is executed, whatever opens them.

Each exploit is a real one: with the readers that libraries have for these files, opening it would create a file. Sizes
and checksums are right, as whoever alters a checkpoint would make them.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from pretrain.checkpoint.manifest import MANIFEST_NAME
from pretrain.exit_codes import EXIT_DONE, EXIT_USER_ERROR
from tests.e2e import trimodal
from tests.e2e.training import Ended, run_forked, train_rank, write_config
from tests.harness import run_ranks

STEP = "step_00000006"


class Exploit:
    """Unpickled, it creates a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


@pytest.fixture(scope="module")
def text_run(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A folder with a run stopped at step 6 of 12, and its config."""
    folder = tmp_path_factory.mktemp("text")
    shutil.copytree(corpus, folder / "data")
    run_ranks(1, train_rank, write_config(folder, folder / "data"), [], 6)
    return folder


@pytest.fixture(scope="module")
def diffusion_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("diffusion")
    trimodal.build_pairs(folder / "data")
    run_ranks(1, train_rank, trimodal.write_tiny_config(folder, folder / "data"), ["run.steps=2"])
    return folder


class Scene:
    """A copy of a run, to be altered."""

    def __init__(self, source: Path, folder: Path) -> None:
        shutil.copytree(source, folder)
        self.folder, self.run = folder, folder / "runs" / "tiny"
        kind = trimodal.write_tiny_config if (folder / "data" / "text").is_dir() else write_config
        self.config = kind(folder, folder / "data")
        self.marker = folder / "executed"

    @property
    def step(self) -> Path:
        return max(path for path in (self.run / "checkpoints").iterdir() if path.name.startswith("step_"))

    def sign(self, step: Path | None = None) -> None:
        """Make the manifest fit what lies there now."""
        step = step or self.step
        manifest = json.loads((step / MANIFEST_NAME).read_text())
        for name in manifest["files"]:
            content = (step / name).read_bytes()
            manifest["files"][name] = {"bytes": len(content), "crc32": zlib.crc32(content)}
        (step / MANIFEST_NAME).write_text(json.dumps(manifest))

    def alter_all(self, alter: Callable[[Path], object]) -> None:
        for step in (self.run / "checkpoints").glob("step_*"):
            alter(step)
            self.sign(step)


@pytest.fixture
def scene(text_run: Path, tmp_path: Path) -> Scene:
    return Scene(text_run, tmp_path / "scene")


@pytest.fixture
def pictures(diffusion_run: Path, tmp_path: Path) -> Scene:
    return Scene(diffusion_run, tmp_path / "pictures")


def triptych_in(folder: Path, *arguments: str, **variables: str) -> Ended:
    """The command as typed in `folder`, which is on the path of imports too."""

    def settle() -> None:
        os.chdir(folder)
        sys.path[:0] = [str(folder)]
        os.environ.update(variables)

    return run_forked(*arguments, before=settle)


def openers(scene: Scene) -> dict[str, list[str]]:
    """Every command that opens a checkpoint."""
    run = str(scene.run)
    return {
        "evaluate": ["evaluate", run],
        "generate": ["generate", run, "--tokens", "2"],
        "generate --step": ["generate", run, "--tokens", "2", "--step", str(int(scene.step.name[5:]))],
        "train": ["train", str(scene.config), "--quiet", "run.steps=12"],
        "checkpoint list": ["checkpoint", "list", run],
        "checkpoint verify": ["checkpoint", "verify", run],
        "data stats": ["data", "stats", str(scene.folder / "data")],
    }


def refused_by(scene: Scene, verbs: list[str], *expected: str, others: bool = True) -> None:
    """others: the other commands execute nothing either, and end without a traceback."""
    commands = openers(scene)
    for verb in [*verbs, *(sorted(set(commands) - set(verbs)) if others else [])]:
        ended = run_forked(*commands[verb])
        assert not scene.marker.exists(), f"{verb} executed it"
        assert "Traceback" not in ended.errors, ended.errors
        if verb in verbs:
            assert ended.code == EXIT_USER_ERROR, (verb, ended)
            for text in expected:
                assert text in ended.errors, (verb, ended.errors)


LOADERS = ["evaluate", "generate", "generate --step", "train"]


# ------------------------------------------------------------------------------------------- the checkpoint


def with_exploit(metadata: Any, marker: Path, place: str) -> bytes:
    exploit: Any = Exploit(marker)
    if place == "whole":
        return pickle.dumps(exploit)
    if place == "planner data":
        metadata.planner_data = exploit
    elif place == "an entry":
        metadata.state_dict_metadata["master.more"] = exploit
    elif place == "a key":
        metadata.storage_data[MetadataIndex("more")] = exploit
    elif place == "properties":
        next(iter(metadata.state_dict_metadata.values())).properties.dtype = exploit
    return pickle.dumps(metadata)


@pytest.mark.parametrize("place", ["whole", "planner data", "an entry", "a key", "properties"])
def test_a_pickle_in_the_metadata(scene: Scene, place: str) -> None:
    def alter(step: Path) -> None:
        metadata = pickle.loads((step / ".metadata").read_bytes())
        (step / ".metadata").write_bytes(with_exploit(metadata, scene.marker, place))

    scene.alter_all(alter)
    pickle.loads((scene.step / ".metadata").read_bytes())
    assert scene.marker.exists(), "the exploit is none"
    scene.marker.unlink()
    refused_by(scene, LOADERS, ".metadata is not trusted", "names posix.system")


PROTOCOL_0 = {
    "eval": b'cbuiltins\neval\n(S\'open("{marker}", "w")\'\ntR.',
    "a dotted name": b"\x80\x04\x8c\x05torch\x94\x8c\x0cSize.__new__\x94\x93.",
    "the serialiser's globals": b"\x80\x04\x8c\x13torch.serialization\x94\x8c\x04load\x94\x93.",
    "another class of DCP's": b"cpathlib\nPosixPath.write_text\n.",
    "attributes of a class": (
        b"ctorch.distributed.checkpoint.metadata\nMetadata\n(N}S'__hash__'\nctorch\nSize\nstb."
    ),
    "no pickle": b"hello",
    "nothing": b"",
    "a number": b"K\x05.",
    "cut off": b"\x80\x04\x95\xff\xff\xff\x00\x00\x00\x00\x00",
    "bytes that promise too much": b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.",
}


@pytest.mark.parametrize("content", PROTOCOL_0.values(), ids=PROTOCOL_0)
def test_hand_made_metadata(scene: Scene, content: bytes) -> None:
    filled = content.replace(b"{marker}", str(scene.marker).encode())
    scene.alter_all(lambda step: (step / ".metadata").write_bytes(filled))
    refused_by(scene, LOADERS, ".metadata")


@pytest.mark.parametrize("prefix", ["exp_avg.", "step.", "master."])
def test_a_stored_object_in_place_of_a_tensor(scene: Scene, prefix: str) -> None:
    """DCP loads what is marked as bytes by `torch.load(weights_only=False)`."""

    def alter(step: Path) -> None:
        metadata = pickle.loads((step / ".metadata").read_bytes())
        buffer = io.BytesIO()
        torch.save(Exploit(scene.marker), buffer)
        file = step / "__0_0.distcp"
        start = file.stat().st_size
        file.write_bytes(file.read_bytes() + buffer.getvalue())
        name = next(name for name in metadata.state_dict_metadata if name.startswith(prefix))
        metadata.state_dict_metadata[name] = BytesStorageMetadata()
        template = next(iter(metadata.storage_data.values()))
        info = type(template)("__0_0.distcp", start, len(buffer.getvalue()))
        metadata.storage_data = {
            index: old for index, old in metadata.storage_data.items() if index.fqn != name
        } | {MetadataIndex(name): info}
        (step / ".metadata").write_bytes(pickle.dumps(metadata))

    scene.alter_all(alter)
    refused_by(scene, LOADERS if prefix == "master." else ["train"])


def test_a_pickle_in_a_tensor_file(scene: Scene) -> None:
    def alter(step: Path) -> None:
        buffer = io.BytesIO()
        torch.save(Exploit(scene.marker), buffer)
        metadata = pickle.loads((step / ".metadata").read_bytes())
        for info in metadata.storage_data.values():
            info.offset, info.length = 0, len(buffer.getvalue())
        (step / ".metadata").write_bytes(pickle.dumps(metadata))
        (step / "__0_0.distcp").write_bytes(buffer.getvalue())

    scene.alter_all(alter)
    torch.load(scene.step / "__0_0.distcp", weights_only=False)
    assert scene.marker.exists(), "the exploit is none"
    scene.marker.unlink()
    refused_by(scene, LOADERS, "cannot be loaded")


def test_a_pickle_in_a_ranks_state(scene: Scene) -> None:
    scene.alter_all(lambda step: torch.save({"cpu": Exploit(scene.marker)}, step / "rank_00000.bin"))
    refused_by(scene, ["train"], "random state cannot be read")


@pytest.mark.parametrize("content", [b"", b"x", pickle.dumps({"cpu": 3})])
def test_a_ranks_state_that_is_none(scene: Scene, content: bytes) -> None:
    scene.alter_all(lambda step: (step / "rank_00000.bin").write_bytes(content))
    refused_by(scene, ["train"], "random state cannot be read")


def test_metadata_that_names_a_file_outside(scene: Scene) -> None:
    outside = scene.folder / "outside.distcp"
    torch.save(torch.zeros(3), outside)

    def alter(step: Path) -> None:
        metadata = pickle.loads((step / ".metadata").read_bytes())
        for info in metadata.storage_data.values():
            info.relative_path = "../../../../outside.distcp"
        (step / ".metadata").write_bytes(pickle.dumps(metadata))

    scene.alter_all(alter)
    refused_by(scene, LOADERS, "../../../../outside.distcp", "the manifest does not have")


# ------------------------------------------------------------------------------------------- the manifest


def files_of(step: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((step / MANIFEST_NAME).read_text())["files"]
    return found


def write_files(step: Path, files: Any) -> None:
    manifest = json.loads((step / MANIFEST_NAME).read_text())
    (step / MANIFEST_NAME).write_text(json.dumps({**manifest, "files": files}))


def record(path: Path) -> dict[str, int]:
    content = path.read_bytes()
    return {"bytes": len(content), "crc32": zlib.crc32(content)}


def linked(step: Path) -> dict[str, Any]:
    data = step / "__0_0.distcp"
    target = data.rename(step.parent.parent / f"{step.name}.moved")
    data.symlink_to(target)
    return files_of(step)


def beside(step: Path, name: str) -> dict[str, Any]:
    return {**files_of(step), name: record(Path("/etc/hostname"))}


MANIFESTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "nothing listed": (lambda step: {}, "lists 0 files, without meta.json and .metadata"),
    "no metadata": (
        lambda step: {k: v for k, v in files_of(step).items() if k != ".metadata"},
        "without .metadata",
    ),
    "a path upwards": (
        lambda step: beside(step, "../../../../../../../../../../../../etc/hostname"),
        "is no file of the step's folder",
    ),
    "an absolute path": (lambda step: beside(step, "/etc/hostname"), "is no file of the step's folder"),
    "the folder itself": (lambda step: beside(step, "."), "is no file of the step's folder"),
    "a subfolder": (lambda step: beside(step, "a/b"), "is no file of the step's folder"),
    "a null byte": (lambda step: beside(step, "a\0b"), "is no file of the step's folder"),
    "a lone surrogate": (lambda step: beside(step, "\ud800"), "is no file of the step's folder"),
    "itself": (lambda step: beside(step, MANIFEST_NAME), "is no file of the step's folder"),
    "a symbolic link": (linked, "__0_0.distcp is a symbolic link"),
}


@pytest.mark.parametrize(("files", "message"), MANIFESTS.values(), ids=MANIFESTS)
def test_manifests_that_are_no_whole_step(scene: Scene, files: Callable[[Path], Any], message: str) -> None:
    for step in (scene.run / "checkpoints").glob("step_*"):
        write_files(step, files(step))
    refused_by(scene, LOADERS)
    for verb in ("list", "verify"):
        ended = run_forked("checkpoint", verb, str(scene.run))
        assert ended.code == 1 and message in " ".join(ended.output.split()), ended
    ended = run_forked("train", str(scene.config), "--quiet")
    assert message in ended.errors


def test_a_pipe_in_place_of_a_file_is_not_waited_for(scene: Scene) -> None:
    for step in (scene.run / "checkpoints").glob("step_*"):
        (step / "meta.json").unlink()
        os.mkfifo(step / "meta.json")
    refused_by(scene, ["evaluate", "train"], "no plain file")


@pytest.mark.parametrize("content", ["[" * 100_000, "[]", "nul", "{}", '{"step": []}', '{"files": [1]}'])
def test_manifests_that_are_none(scene: Scene, content: str) -> None:
    for step in (scene.run / "checkpoints").glob("step_*"):
        (step / MANIFEST_NAME).write_text(content)
    refused_by(scene, LOADERS, MANIFEST_NAME)


# ------------------------------------------------------------------------------------------- meta and config


METAS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "deep": lambda meta: "[" * 100_000,
    "a list": lambda meta: [meta],
    "no config": lambda meta: {key: value for key, value in meta.items() if key != "config"},
    "a config that is text": lambda meta: {**meta, "config": "x"},
    "a model that is a list": lambda meta: {**meta, "config": {**meta["config"], "model": [1]}},
    "a step that is text": lambda meta: {**meta, "step": "6"},
    "a resolver": lambda meta: {
        **meta,
        "config": {**meta["config"], "run": {**meta["config"]["run"], "steps": "${oc.env:HOME}"}},
    },
    "an unknown family": lambda meta: {
        **meta,
        "config": {**meta["config"], "model": {**meta["config"]["model"], "family": "os:system"}},
    },
    "a huge model": lambda meta: {
        **meta,
        "config": {**meta["config"], "model": {**meta["config"]["model"], "width": 10**12}},
    },
}


@pytest.mark.parametrize("change", METAS.values(), ids=METAS)
def test_metas_that_are_none(scene: Scene, change: Callable[[dict[str, Any]], Any]) -> None:
    def alter(step: Path) -> None:
        found = change(json.loads((step / "meta.json").read_text()))
        (step / "meta.json").write_text(found if isinstance(found, str) else json.dumps(found))

    scene.alter_all(alter)
    refused_by(scene, ["evaluate", "generate"])


NO_STATE: tuple[Any, ...] = (None, [], {"evaluation": 3}, "x")
NO_STATES: list[tuple[str, Any]] = [
    (key, value)
    for key in ("cursor", "hooks", "tokens", "tokenizer")
    for value in NO_STATE
    if (key, value) != ("tokenizer", "x")  # another tokenizer, which is told as such
]


@pytest.mark.parametrize(("key", "value"), NO_STATES)
def test_a_meta_that_a_run_cannot_go_on_from(scene: Scene, key: str, value: Any) -> None:
    def alter(step: Path) -> None:
        meta = json.loads((step / "meta.json").read_text())
        (step / "meta.json").write_text(json.dumps({**meta, key: value}))

    scene.alter_all(alter)
    refused_by(scene, ["train"], others=value is None)


COUNTS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "a row that no number holds": lambda meta: {"cursor": {**meta["cursor"], "row": 10**30}},
    "fewer tokens than none": lambda meta: {"tokens": -5},
    "another step than its name": lambda meta: {"step": meta["step"] + 1},
    "sums that are lists": lambda meta: {
        "hooks": {**meta["hooks"], "metrics": {**meta["hooks"]["metrics"], "loss_sum": []}}
    },
    "a count that is text": lambda meta: {"hooks": {**meta["hooks"], "finite": {"skipped": "a"}}},
}


@pytest.mark.parametrize("change", COUNTS.values(), ids=COUNTS)
def test_numbers_that_no_save_writes(
    scene: Scene, change: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    def alter(step: Path) -> None:
        meta = json.loads((step / "meta.json").read_text())
        (step / "meta.json").write_text(json.dumps({**meta, **change(meta)}))

    scene.alter_all(alter)
    refused_by(scene, ["train"], "meta.json")


EVIL_YAML = "run: !!python/object/apply:os.system ['touch {marker}']\n"


def test_python_objects_in_configs(scene: Scene) -> None:
    evil = EVIL_YAML.format(marker=scene.marker)
    (scene.run / "config.yaml").write_text(evil)
    (scene.run / "launch").mkdir()
    (scene.run / "launch" / "config.yaml").write_text(evil)
    (scene.run / "launch" / "job.json").write_text(
        json.dumps({"name": "x", "nodes": 1, "jobs": [], "settings": {}, "first_attempt": 1})
    )
    for verb in (["evaluate"], ["generate", "--tokens", "2"], ["checkpoint", "list"]):
        ended = run_forked(*verb[:1], *(verb[1:2] if verb[0] == "checkpoint" else []), str(scene.run))
        assert not scene.marker.exists() and "Traceback" not in ended.errors, ended
    ended = run_forked("status", "--runs", str(scene.run.parent))
    assert not scene.marker.exists() and "Traceback" not in ended.errors, ended
    assert "config.yaml" in ended.output + ended.errors
    scene.config.write_text(evil)
    for name in ("train", "plan", "launch"):
        ended = run_forked(name, str(scene.config))
        assert ended.code == EXIT_USER_ERROR and not scene.marker.exists(), ended
        assert "Traceback" not in ended.errors and ended.errors.count("\n") == 1


# ------------------------------------------------------------------------------------------- the tokenizer


@pytest.mark.parametrize("file", ["../../../outside", "/etc/hostname", "entry.json", ["x"], 3])
def test_a_tokenizer_that_lies_elsewhere(scene: Scene, file: Any) -> None:
    entry = scene.run / "tokenizer" / "entry.json"
    entry.write_text(json.dumps({**json.loads(entry.read_text()), "file": file}))
    refused_by(scene, ["evaluate", "generate"], "entry.json", "only tokenizer.json beside it is read")


@pytest.mark.parametrize("content", ["[" * 100_000, "[]", "{}", "x"])
def test_a_tokenizer_entry_that_is_none(scene: Scene, content: str) -> None:
    (scene.run / "tokenizer" / "entry.json").write_text(content)
    refused_by(scene, ["evaluate", "generate"], "entry.json: damaged")


def test_another_tokenizer_in_the_runs_folder(scene: Scene) -> None:
    from data_pipelines.tokens.tokenizer_training import train_bpe

    folder = scene.run / "tokenizer"
    entry = train_bpe(["some words of a text"], 257).save(folder)
    (folder / "entry.json").write_text(json.dumps(entry))
    refused_by(scene, ["evaluate", "generate"], "trained with the tokenizer")


# ------------------------------------------------------------------------------------------- codecs


EVIL_MODULE = """
import pathlib
pathlib.Path({marker!r}).touch()
class Codec:
    @classmethod
    def load(cls, folder):
        return cls()
"""


@pytest.mark.parametrize("kind", ["evil:Codec", "evil.inner:Codec"])
def test_a_codec_that_is_code_in_the_folder(pictures: Scene, kind: str) -> None:
    """On the path of imports, as it is where somebody works in that folder."""
    assert not {"evil", "evil.inner"} & set(sys.modules)
    evil = EVIL_MODULE.format(marker=str(pictures.marker))
    places = [pictures.run / "tokenizer" / "codecs" / "image"]
    places += [path.parent for path in (pictures.folder / "data").glob("*/codecs/image/codec.json")]
    for place in places:
        content = json.loads((place / "codec.json").read_text())
        (place / "codec.json").write_text(json.dumps({**content, "kind": kind}))
        (place / "evil").mkdir()
        (place / "evil" / "__init__.py").write_text(evil)
        (place / "evil" / "inner.py").write_text(evil)
    run = str(pictures.run)
    commands = {
        "evaluate": ["evaluate", run],
        "generate": ["generate", run, "--task", "text-to-image", "--prompt", "one"],
        "train": ["train", str(pictures.config), "run.name=other", "--quiet"],
        "resume": ["train", str(pictures.config), "--quiet"],
        "data stats": ["data", "stats", str(pictures.folder / "data" / "text-to-image")],
        "data lint": ["data", "lint", str(pictures.folder / "data" / "text-to-image")],
    }
    for name, arguments in commands.items():
        place = places[0] if name in ("evaluate", "generate", "resume") else places[-1]
        ended = triptych_in(place, *arguments)
        assert not pictures.marker.exists(), f"{name} executed it"
        assert "Traceback" not in ended.errors, ended
        if not name.startswith("data"):
            assert ended.code == EXIT_USER_ERROR and "export TRIPTYCH_CODECS=evil" in ended.errors, ended
    module = kind.partition(":")[0]
    ended = triptych_in(places[0], *commands["evaluate"], TRIPTYCH_CODECS=module)
    assert pictures.marker.exists(), "where the user says so, it is imported"


def test_a_run_that_is_as_it_was(scene: Scene, pictures: Scene) -> None:
    """What is refused above is not refused for another reason."""
    for run, more in ((scene, ["--tokens", "2"]), (pictures, ["--task", "text-to-image", "--prompt", "one"])):
        assert run_forked("evaluate", str(run.run)).code == EXIT_DONE
        assert run_forked("generate", str(run.run), *more).code in (EXIT_DONE, EXIT_USER_ERROR)
    run_forked("train", str(scene.config), "--quiet")
    assert run_forked("checkpoint", "verify", str(scene.run)).code == EXIT_DONE
