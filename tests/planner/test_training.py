"""Training looks at a planner as serving does: the same positions, masks and numbers."""

from __future__ import annotations

import math
from pathlib import Path

import jax
import numpy as np
import pytest

from pi0.param_tree import IMG, BackboneDims, ExpertDims, VisionDims
from pi0.tokenizer import TokenizedPrompt
from planner.decoder import Decoder
from planner.export import backbone_leaves, write_params
from planner.generator import pack
from planner.restore import restore_from
from planner.training import Probe, SubtaskBatch, SubtaskTrainer, optimiser, subtask_loss
from tests.planner.oracle import RandomParams

DIMS = BackboneDims(VisionDims(20, 2, 2, 10, 36, 32, 49), ExpertDims(24, 40), 60, 2, 4, 1, 8)
ALL = np.arange(60, dtype=np.int32)


def noise_images(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 224, 224, 3), np.uint8)


def test_the_loss_is_what_decoding_says_of_the_same_answer() -> None:
    source = RandomParams(DIMS, seed=3)
    params, dims = restore_from(source, ALL, np.dtype(np.float32), where="here")
    images = noise_images(2)
    prompts = [np.array([2, 5, 7, 11], np.int32), np.array([2, 40], np.int32)]
    cameras = [[image.astype(np.float32) / np.float32(127.5) - 1] for image in images]
    decoded = Decoder(params, dims)(pack([TokenizedPrompt(ids, len(ids), False) for ids in prompts], cameras), 6)
    lengths = [int(steps) + 1 for steps in decoded.decode_steps]
    answer = np.stack([np.where(np.arange(7) < length, np.resize(row, 7), 0) for row, length in zip(decoded.tokens[:, :7], lengths, strict=True)])
    assert (answer[:, :1] != 0).all() and all((row[:length] != 0).all() for row, length in zip(answer, lengths, strict=True)), (
        "choose another seed: pad is no answer"
    )
    prompt = np.zeros((2, 9), np.int32)
    for row, ids in enumerate(prompts):
        prompt[row, : len(ids)] = ids
    batch = SubtaskBatch(images, prompt, answer.astype(np.int32), np.full((2, 9), -1, np.int32))
    probe = Probe(np.zeros((24, 3), np.float32))
    with jax.default_matmul_precision("highest"):
        loss, metrics = subtask_loss(params.language, probe, params.vision, batch, dims=dims, probe_weight=0.5)
    assert float(loss) == pytest.approx(-float(decoded.logprob.sum()) / sum(lengths), abs=1e-3)
    assert float(metrics["right"]) == 1.0, "greedy decoding chose each of these tokens"

    wrong = answer.copy()
    wrong[1, lengths[1] - 1] = (wrong[1, lengths[1] - 1] + 1) % 60 or 1
    _, metrics = subtask_loss(params.language, probe, params.vision, batch.replace(answer=wrong.astype(np.int32)), dims=dims, probe_weight=0.5)
    assert float(metrics["right"]) == 0.5, "one token of one of two answers is another"


def test_the_probe_counts_where_it_is_asked() -> None:
    params, dims = restore_from(RandomParams(DIMS, seed=3), ALL, np.dtype(np.float32), where="here")
    batch = SubtaskBatch(noise_images(1), np.array([[2, 5, 7]], np.int32), np.array([[9, 1]], np.int32), np.array([[-1, 2, -1]], np.int32))
    blind = Probe(np.zeros((24, 3), np.float32))
    loss, metrics = subtask_loss(params.language, blind, params.vision, batch, dims=dims, probe_weight=0.5)
    assert float(metrics["probe"]) == pytest.approx(math.log(3), abs=1e-5)
    assert float(loss) == pytest.approx(float(metrics["loss"]) + 0.5 * math.log(3), abs=1e-4)


def test_the_leaves_are_those_that_were_read() -> None:
    source = RandomParams(DIMS, seed=1)
    params, dims = restore_from(source, ALL, np.dtype(np.float32), where="here")
    leaves = backbone_leaves(params.vision, params.language, dims)
    assert leaves.keys() == set(source)
    for name in source:
        np.testing.assert_array_equal(leaves[name], source.read(name, np.dtype(np.float32)), err_msg=name)


def test_fused_heads_are_refused() -> None:
    dims = BackboneDims(DIMS.vision, DIMS.vlm, 60, 2, 4, 4, 8)
    params, found = restore_from(RandomParams(dims), ALL, np.dtype(np.float32), where="here")
    with pytest.raises(ValueError, match="4 heads with as many key/value heads"):
        backbone_leaves(params.vision, params.language, found)


@pytest.mark.parametrize("steps", [1, 2, 1000])
def test_any_number_of_steps_has_a_schedule(steps: int) -> None:
    optimiser(steps, rate=1e-3)


@pytest.mark.parametrize("train_tower", [False, True])
def test_it_learns_from_small_pictures_what_it_answers_on_large_ones(tmp_path: Path, train_tower: bool) -> None:
    source = RandomParams(DIMS, seed=5)
    write_params(tmp_path / "params", {name: 0.3 * source.read(name) for name in source})
    assert not [file for file in (tmp_path / "params").iterdir() if file.is_file() and bytes(tmp_path) in file.read_bytes()]
    small = np.random.default_rng(1).integers(0, 256, (4, 56, 56, 3), np.uint8)
    answer = np.array([[10, 11, 1], [12, 1, 0], [13, 14, 1], [15, 1, 0]], np.int32)
    prompt = np.tile(np.array([[2, 20, 21]], np.int32), (4, 1))
    batch = SubtaskBatch(small, prompt, answer, np.full((4, 3), -1, np.int32))
    trainer = SubtaskTrainer(tmp_path, 60, 60, rate=0.02, scale=4, classes=3, probe_weight=0.5, seed=0, train_tower=train_tower, averaging=0.5)
    before = trainer.measure(batch)
    for _ in range(60):
        metrics = trainer.step(batch)
    assert metrics["loss"] < 0.2 * before["loss"]
    learnt = trainer.measure(batch)
    assert learnt["right"] == 1.0

    class Learnt(dict[str, np.ndarray]):
        def shapes(self) -> dict[str, tuple[int, ...]]:
            return {name: leaf.shape for name, leaf in self.items()}

        def read(self, name: str, dtype: np.dtype | None = None) -> np.ndarray:
            return self[name].astype(dtype)

    leaves = trainer.leaves()
    same = {name for name, leaf in leaves.items() if name.startswith(IMG) and np.allclose(leaf, 0.3 * source.read(name), atol=1e-6)}
    assert (f"{IMG}/head/kernel" in same) is not train_tower
    params, dims = restore_from(Learnt(leaves), ALL, np.dtype(np.float32), where="what was learnt")
    large = [[np.repeat(np.repeat(image, 4, 0), 4, 1).astype(np.float32) / np.float32(127.5) - 1] for image in small]
    decoded = Decoder(params, dims)(pack([TokenizedPrompt(row, 3, False) for row in prompt], large), 5)
    np.testing.assert_array_equal(decoded.tokens[:, :3], answer)
