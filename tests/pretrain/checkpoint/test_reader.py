"""A trained model out of a run folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from data_pipelines.tokens.bytes_tokenizer import BytesTokenizer
from models import families
from pretrain.checkpoint import CheckpointStore, Fragment, Placement, TrainingState, manifest
from pretrain.checkpoint_reader import load_trained_model
from pretrain.config import load_config
from pretrain.run_folder import RunFolder


@pytest.mark.parametrize("step", [None, 3])
def test_every_file_is_checked_once(
    step: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config("configs/sigmoid/demo.yaml", ["model.layers=1", "model.width=48"])
    config = config.replace(model=config.model.resolved(vocabulary=320, sequence_length=64))
    folder = RunFolder(tmp_path)
    folder.create()
    folder.save_tokenizer(BytesTokenizer())
    model = families[config.model.family].build(config.model)
    fragments = []
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter)
        flat, shape = parameter.detach().view(-1), tuple(parameter.shape)
        tensors = {"master": flat, "exp_avg": flat, "exp_avg_sq": flat}
        fragments.append(Fragment(name, shape, 0, tensors, torch.tensor(3.0), Placement.whole(shape)))
    store = CheckpointStore(folder.checkpoints, group=None, keep_last=1, asynchronous=False)
    store.save(3, TrainingState(fragments, {"step": 3, "config": config.to_dict()}))

    read: list[str] = []
    original = manifest.checksum_of_file

    def checksum_of_file(path: Path) -> int:
        read.append(path.name)
        return original(path)

    monkeypatch.setattr(manifest, "checksum_of_file", checksum_of_file)
    trained = load_trained_model(folder, step, device="cpu")
    assert sorted(read) == [".metadata", "__0_0.distcp", "meta.json"]
    assert trained.step == 3
    for name, parameter in trained.model.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name))
