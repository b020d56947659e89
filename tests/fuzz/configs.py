"""Fuzzers of configs, overrides, and what lies in a run's folder: manifests, metadata, meta, vocabularies, codecs.

A config that is taken must read back as itself; of a checkpoint that is taken, no weight may differ.
"""

from __future__ import annotations

import json
import os
import pickle
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from data_pipelines.codecs import PatchCodec, load_codec
from data_pipelines.tokens.bytes_tokenizer import BytesTokenizer
from data_pipelines.tokens.modalities import combine, load_modalities
from data_pipelines.tokens.vocabulary import load_vocabulary
from launch.progress import read_progress
from pretrain.checkpoint import CheckpointStore, Fragment, Placement, TrainingState
from pretrain.checkpoint.manifest import MANIFEST_NAME
from pretrain.checkpoint.steps import list_steps
from pretrain.checkpoint.weights import load_weights
from pretrain.checkpoint_meta import as_of_today, check_meta
from pretrain.config import config_from_dict, load_config, load_resolved
from pretrain.config.merge import merged_values
from pretrain.run_folder import RunFolder
from tests.fuzz.base import Finding, Fuzzer, chosen, mutated, refusals_name, require

DEMOS = ("sigmoid/demo", "softmax/demo", "mamba2/demo", "pararnn/gru/demo", "trimodal/demo")
STEP = "step_00000003"
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 3, 7, 10**9, 10**30, 0.5, 1e-30, 1e30, float("nan"), float("inf"), "", "x", "auto",
    "1e-3", "true", "???", "${run.name}", "${run", "${oc.env:HOME}", "${.}", "é\u2028", "a" * 3000, [], [1],
    ["a", None], {}, {"a": 1}, {"path": "x"}, [[[[1]]]], {"a": {"b": {"c": []}}},
)  # fmt: skip
TEXTS = (
    "[", "{", "}", "]", ":", "- ", "&a ", "*a ", "<<: ", "? ", "| \n", "!!python/name:os.system ", "!!binary ", "\t",
    "\x00", "%YAML 9\n", "---\n", "...\n", "'", '"', "#", "${", "}", "1e400", "0x", "09", "\ufeff", "\u2028", "[" * 60,
)  # fmt: skip


@cache
def resolved(name: str) -> dict[str, Any]:
    return load_config(f"configs/{name}.yaml").to_dict()


@cache
def whole_text(name: str) -> bytes:
    return yaml.safe_dump(merged_values(Path(f"configs/{name}.yaml")), sort_keys=False).encode()


def reads_back(config: Any) -> None:
    require(config_from_dict(config.to_dict(), "again") == config, "the config does not read back as itself")


def config_bytes(seed: int, folder: Path) -> None:
    """A config's bytes, mutated, or with YAML's own signs put in."""
    random = np.random.default_rng(seed)
    content, path = whole_text(chosen(random, DEMOS)), folder / "some.yaml"
    if random.random() < 0.5:
        content = mutated(content, random)
    else:
        for _ in range(int(random.integers(1, 4))):
            place = int(random.integers(len(content)))
            content = content[:place] + chosen(random, TEXTS).encode() + content[place:]
    path.write_bytes(content)
    with refusals_name(path):
        config = load_config(path)
    reads_back(config)
    (folder / "resolved.yaml").write_text(config.to_yaml(), encoding="utf-8")
    require(load_resolved(folder / "resolved.yaml") == config, "what is written is read as another config")
    require("oc.env" not in config.to_yaml() or b"\\${" in content, "the environment was read")


def config_values(seed: int, folder: Path) -> None:
    """A valid config of which some settings have another value, of any kind."""
    random = np.random.default_rng(seed)
    values = json.loads(json.dumps(resolved(chosen(random, DEMOS))))
    for _ in range(int(random.integers(1, 4))):
        place = values
        while True:
            key = chosen(random, list(place))
            if not isinstance(place[key], dict) or not place[key] or random.random() >= 0.9:
                break
            place = place[key]
        before = place[key]
        near = type(before) in (int, float) and random.random() < 0.7
        place[key] = before * chosen(random, [2, 1, 3, 100]) if near else chosen(random, VALUES)
    with refusals_name("here"):
        config = config_from_dict(values, "here")
    reads_back(config)
    text = config.to_yaml()
    require(
        "NaN" not in text and ".nan" not in text and ".inf" not in text, "a number that is none was taken"
    )


def overrides(seed: int, folder: Path) -> None:
    """Overrides with any key and any value, as they come from a command line."""
    random = np.random.default_rng(seed)
    name = chosen(random, DEMOS)
    given = []
    for _ in range(int(random.integers(1, 4))):
        section = chosen(random, list(resolved(name)))
        key = chosen(random, list(resolved(name)[section]))
        whole = (
            f"{section}.{key}"
            if random.random() < 0.8
            else chosen(random, [section, f"{section}.{key}.x", "x", ""])
        )
        value = chosen(random, VALUES)
        text = value if isinstance(value, str) else json.dumps(value)
        text = text if random.random() < 0.7 else text + chosen(random, TEXTS)
        sign = "=" if random.random() < 0.95 else ""
        given.append(f"{whole}{sign}{text}")
    path = f"configs/{name}.yaml"
    with refusals_name(path):
        reads_back(load_config(path, given))


# ------------------------------------------------------------------------------------------- checkpoints


@cache
def checkpoint() -> tuple[dict[str, bytes], dict[str, torch.Tensor]]:
    """The files of a small step, and its weights."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        store = CheckpointStore(Path(folder), group=None, keep_last=1, asynchronous=False)
        weights = {"a": torch.arange(12.0).view(4, 3), "b": torch.arange(5.0) - 2}
        fragments = []
        for name, value in weights.items():
            flat, shape = value.reshape(-1), tuple(value.shape)
            tensors = {"master": flat, "exp_avg": flat + 1, "exp_avg_sq": flat + 2}
            fragments.append(Fragment(name, shape, 0, tensors, torch.tensor(3.0), Placement.whole(shape)))
        meta = {
            "step": 3,
            "tokens": 9,
            "cursor": {},
            "hooks": {},
            "tokenizer": "x",
            "config": resolved(DEMOS[0]),
        }
        store.save(3, TrainingState(fragments, meta))
        return {path.name: path.read_bytes() for path in (Path(folder) / STEP).iterdir()}, weights


def write_step(folder: Path, files: dict[str, bytes], *, signed: bool = True) -> Path:
    step = folder / "checkpoints" / STEP
    step.mkdir(parents=True)
    for name, content in files.items():
        (step / name).write_bytes(content)
    if signed:
        manifest = json.loads(files[MANIFEST_NAME])
        for name in manifest["files"]:
            content = (step / name).read_bytes()
            manifest["files"][name] = {"bytes": len(content), "crc32": zlib.crc32(content)}
        (step / MANIFEST_NAME).write_text(json.dumps(manifest))
    return step


def load_and_compare(step: Path) -> None:
    _, wanted = checkpoint()
    found = {name: torch.full_like(value, -1) for name, value in wanted.items()}
    load_weights(step, found)
    for name, value in wanted.items():
        require(torch.equal(found[name], value), f"{name} was loaded with other values")


def changed_json(value: Any, random: np.random.Generator) -> Any:
    """The same with one inner value another one, removed, or put under another key."""
    if not isinstance(value, dict | list) or not value or random.random() < 0.15:
        return chosen(
            random,
            [*VALUES, "../../x", "/etc/hostname", ".", MANIFEST_NAME, "\ud800", "a\0b", 2**63, -(2**70)],
        )
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = chosen(random, keys)
    if random.random() < 0.2:
        made = dict(value) if isinstance(value, dict) else list(value)
        del made[key]
        return made
    if isinstance(value, dict) and random.random() < 0.2:
        name = chosen(random, ["../x", "/etc/hostname", "x", ""])
        return {**value, name: value[key]}
    made = dict(value) if isinstance(value, dict) else list(value)
    made[key] = changed_json(value[key], random)
    return made


def altered(content: bytes, random: np.random.Generator) -> bytes:
    if random.random() < 0.4:
        return mutated(content, random)
    return json.dumps(changed_json(json.loads(content), random)).encode()


def manifests(seed: int, folder: Path) -> None:
    random = np.random.default_rng(seed)
    files = dict(checkpoint()[0])
    files[MANIFEST_NAME] = altered(files[MANIFEST_NAME], random)
    step = write_step(folder, files, signed=False)
    for info in list_steps(step.parent, checksums=True):
        require(
            # A file that is missing is named as the manifest calls it, which may be anything.
            info.problem is None or "." in info.problem or " is missing or unreadable: " in info.problem,
            "a problem without a file",
        )
    with refusals_name(step):
        load_and_compare(step)


def metas(seed: int, folder: Path) -> None:
    """meta.json: it becomes a config, or is refused."""
    random = np.random.default_rng(seed)
    files = dict(checkpoint()[0])
    files["meta.json"] = altered(files["meta.json"], random)
    step = write_step(folder, files)
    with refusals_name(step, "meta.json"):
        meta = as_of_today(CheckpointStore.read_meta(step))
        check_meta(meta, step, resumed=True)
        config_from_dict(meta["config"], origin=str(step))


class Marker:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def metadata_files(seed: int, folder: Path) -> None:
    """`.metadata`: its bytes mutated, or other objects in it. Nothing is executed, and no weight differs."""
    random = np.random.default_rng(seed)
    files, marker = dict(checkpoint()[0]), folder / "executed"
    if random.random() < 0.6:
        files[".metadata"] = mutated(files[".metadata"], random)
    else:
        found = pickle.loads(files[".metadata"])
        other = chosen(
            random, [Marker(marker), None, 3, "x", [], (1, 2), b"", {}, os.system, type, torch.Size([1])]
        )
        place = chosen(
            random, ["entry", "key", "info", "planner", "size", "chunks", "whole", "path", "offset"]
        )
        entry = next(iter(found.state_dict_metadata.values()))
        info = next(iter(found.storage_data.values()))
        if place == "entry":
            found.state_dict_metadata[next(iter(found.state_dict_metadata))] = other
        elif place == "key":
            found.storage_data[other if other.__hash__ else 1] = info
        elif place == "info":
            found.storage_data[next(iter(found.storage_data))] = other
        elif place == "planner":
            found.planner_data = other
        elif place in ("size", "chunks"):
            setattr(entry, place, other)
        elif place in ("path", "offset"):
            setattr(info, {"path": "relative_path"}.get(place, place), other)
        files[".metadata"] = pickle.dumps(other if place == "whole" else found)
    step = write_step(folder, files)
    try:
        with refusals_name(step):
            found_weights = {name: torch.zeros_like(value) for name, value in checkpoint()[1].items()}
            load_weights(step, found_weights)
    finally:
        if marker.exists():
            raise Finding("it was executed")


# ------------------------------------------------------------------------------------------- the run's folder


@cache
def tokenizer_folder() -> dict[str, bytes]:
    """vocabulary.json and a codec, as a run keeps them."""
    import tempfile

    random = np.random.default_rng(0)
    pictures = [random.integers(0, 255, (4, 4)).astype(np.uint8) for _ in range(30)]
    made = combine(BytesTokenizer(), PatchCodec.train(pictures, codes=8, patch=2))
    with tempfile.TemporaryDirectory() as folder:
        entry = made.save(Path(folder))
        (Path(folder) / "entry.json").write_text(json.dumps(entry))
        return {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def write_files(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def vocabularies(seed: int, folder: Path) -> None:
    random = np.random.default_rng(seed)
    files = dict(tokenizer_folder())
    files["vocabulary.json"] = altered(files["vocabulary.json"], random)
    write_files(folder, files)
    with refusals_name(folder):
        found = load_vocabulary(folder)
        assert found is not None
        require(found.size > 0 and found.describe()["vocabulary"] == found.size, "sizes that do not add up")
        load_modalities(folder).text_ids("abc")


def codec_files(seed: int, folder: Path) -> None:
    random = np.random.default_rng(seed)
    files = dict(tokenizer_folder())
    name = chosen(random, ["codecs/image/codec.json", "codecs/image/weights.safetensors"])
    files[name] = altered(files[name], random) if name.endswith("json") else mutated(files[name], random)
    write_files(folder, files)
    with refusals_name(folder):
        codec = load_codec(folder / "codecs" / "image")
        codec.decode([np.zeros(4, np.int64)])
    require(files[name] == tokenizer_folder()[name] or json.loads(
        (folder / "codecs/image/codec.json").read_bytes()) == json.loads(tokenizer_folder()["codecs/image/codec.json"]),
        "a changed codec was taken")  # fmt: skip


def run_folders(seed: int, folder: Path) -> None:
    """config.yaml and the tokenizer's entry of a run, as evaluate, generate and status read them."""
    random = np.random.default_rng(seed)
    run = RunFolder(folder)
    text = yaml.safe_dump(resolved(chosen(random, DEMOS))).encode()
    run.config.write_bytes(mutated(text, random) if random.random() < 0.8 else text)
    write_files(
        run.tokenizer, {"entry.json": altered(json.dumps({"kind": "bytes", "file": None}).encode(), random)}
    )
    with refusals_name(folder):
        run.trains_a_task()
        read_progress(folder)
        run.load_tokenizer()


FUZZERS = [
    Fuzzer("config-bytes", config_bytes),
    Fuzzer("config-values", config_values),
    Fuzzer("overrides", overrides),
    Fuzzer("manifests", manifests),
    Fuzzer("metas", metas),
    Fuzzer("metadata", metadata_files),
    Fuzzer("vocabularies", vocabularies),
    Fuzzer("run-codecs", codec_files),
    Fuzzer("run-folders", run_folders),
]
