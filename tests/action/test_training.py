"""Training looks at a policy as serving does: the same model, the same numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from action.checkpoint import load_model
from action.export import save_model, tower_leaves
from action.model import Pi0Model
from action.plain import PlainModel
from action.sampler import FlowSampler, ModelInput
from action.training import (
    Encoded,
    Muon,
    PromptFacts,
    PromptReadout,
    Readout,
    Trainer,
    encode,
    flow_loss,
    grow_patches,
    orthogonal,
    prompt_loss,
    readout_loss,
    shrink_patches,
)
from pi0.param_tree import IMG, BackboneDims, ExpertDims, ModelDims, VisionDims
from tests.action.synthetic import CPU, PI05_CHECKPOINTS, head_counts, random_weights, write_safetensors

DIMS = ModelDims(
    kind="pi05",
    backbone=BackboneDims(VisionDims(24, 2, 3, 8, 24, 32, 49), ExpertDims(36, 50), 77, depth=3, heads=4, kv_heads=1, head_dim=10),
    expert=ExpertDims(26, 30),
    action_dim=7,
)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_safetensors(tmp_path / "first", random_weights(DIMS), head_counts(DIMS))


def batch(rows: int, side: int = 224) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(2)
    images = torch.from_numpy(rng.integers(0, 256, (rows, 1, side, side, 3), np.uint8))
    tokens = torch.from_numpy(rng.integers(3, 70, (rows, 6), np.int32))
    mask = torch.from_numpy(np.arange(6) < rng.integers(2, 7, (rows, 1)))
    return images, tokens, mask, torch.from_numpy(rng.uniform(-1, 1, (rows, 5, 7)).astype(np.float32))


def encoded(model: Pi0Model, rows: int) -> Encoded:
    images, tokens, mask, actions = batch(rows)
    return encode(model, images, tokens, mask, horizon=actions.shape[1])


def facts(rows: int) -> PromptFacts:
    """Of the prompts of :func:`batch`: one word of each row is known, half of them have a point."""
    points, classes = torch.full((rows, 6, 2), torch.nan), torch.full((rows, 6), -1)
    points[::2, 1], classes[:, 1] = torch.tensor([0.25, 0.75]), 2
    ends = batch(rows)[2].sum(1) - 1
    return PromptFacts(points, classes, ends, torch.full((rows, 2), 0.5), torch.arange(rows) % 2)


def test_the_loss_is_that_of_the_plain_formulas(checkpoint: Path) -> None:
    images, tokens, mask, actions = batch(2)
    model = load_model(checkpoint, dtype=torch.float32, device=CPU)
    context = encode(model, images, tokens, mask, horizon=5).context
    loss = flow_loss(model, context, actions, draws=3, generator=torch.Generator().manual_seed(4))

    generator = torch.Generator().manual_seed(4)
    noise = torch.randn((6, 5, 7), generator=generator)
    times = torch.rand(6, generator=generator) ** (2 / 3) * 0.999 + 0.001
    plain = PlainModel.load(checkpoint)
    errors = []
    for draw in range(6):
        row = draw // 3
        inputs = ModelInput(
            images=np.concatenate([images[row : row + 1].numpy(), np.zeros((1, 2, 224, 224, 3), np.uint8)], axis=1),
            image_masks=np.array([[True, False, False]]),
            tokens=tokens[row : row + 1].numpy(),
            token_mask=mask[row : row + 1].numpy(),
            state=np.zeros((1, 7), np.float32),
        )
        x_t = times[draw] * noise[draw] + (1 - times[draw]) * actions[row]
        velocity = plain.evaluate(inputs, x_t[None], float(times[draw])).velocity[0]
        errors.append((velocity - (noise[draw] - actions[row])).square().mean())
    assert loss.item() == pytest.approx(torch.stack(errors).mean().item(), rel=1e-4)


def test_every_weight_that_is_read_gets_a_gradient(checkpoint: Path) -> None:
    model = load_model(checkpoint, dtype=torch.float32, device=CPU).requires_grad_(True)
    flow_loss(model, encoded(model, 2).context, batch(2)[3], draws=2, generator=torch.Generator().manual_seed(0)).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()] == []


def test_what_is_read_off_a_prompt_is_what_the_last_layer_is_given(checkpoint: Path) -> None:
    model = load_model(checkpoint, dtype=torch.float32, device=CPU)
    words, context = encoded(model, 2).words, encoded(model, 2).context
    values = model.vlm_last.kv(words).chunk(2, dim=-1)[1].detach()
    stored = context.cache[-1].values[:, :, -5 - 6 : -5]  # which no rotation changes  # type: ignore[attr-defined]
    torch.testing.assert_close(stored[:, 0], values, rtol=1e-5, atol=1e-5)
    assert not model.vlm_last._forward_pre_hooks


def test_reading_off_a_prompt_counts_only_what_is_known(checkpoint: Path) -> None:
    model = load_model(checkpoint, dtype=torch.float32, device=CPU)
    words = encoded(model, 2).words.detach()
    readout = PromptReadout(words.shape[-1], 4, generator=torch.Generator().manual_seed(0))
    told, ends = words @ readout.word, words[torch.arange(2), facts(2).end] @ readout.end
    loss, metrics = prompt_loss(words, readout, facts(2))
    point = (told[0, 1, :2] - torch.tensor([0.25, 0.75])).square().mean()
    target = (ends[:, :2] - 0.5).square().mean()
    cross_entropy = torch.nn.functional.cross_entropy
    expected = 10 * (point + target) + cross_entropy(told[:, 1, 2:], torch.tensor([2, 2])) + cross_entropy(ends[:, 2:], torch.tensor([0, 1]))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert metrics["target"] == pytest.approx(target.sqrt().item(), rel=1e-5)
    assert metrics["right"] == (told[:, 1, 2:].argmax(-1) == 2).float().mean()


def test_a_language_model_learns_what_words_mean_before_anything_moves(checkpoint: Path) -> None:
    model = load_model(checkpoint, dtype=torch.float32, device=CPU).requires_grad_(True)
    model.vision.requires_grad_(False)
    expert = model.expert_blocks[0].qkv.weight.clone()
    readout = PromptReadout(DIMS.backbone.vlm.width, 4, generator=torch.Generator().manual_seed(0))
    trainer = Trainer([model.embedding, model.vlm_blocks, model.vlm_last.attention_norm, readout], 40, rate=1e-2)
    losses = []
    for _ in range(40):
        loss, _ = prompt_loss(encoded(model, 2).words, readout, facts(2))
        trainer.step(loss)
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
    assert torch.equal(model.expert_blocks[0].qkv.weight, expert)


@pytest.mark.parametrize("shape", [(24, 60), (9, 31), (31, 9)])
def test_updates_are_made_orthogonal(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 1e-3
    update = orthogonal(matrix)
    assert update.shape == matrix.shape
    spread = torch.linalg.svdvals(update)
    assert spread.min() > 0.6 and spread.max() < 1.3
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    assert torch.nn.functional.cosine_similarity(update.flatten(), (left @ right).flatten(), dim=0) > 0.97


def test_stacked_projections_are_updated_one_by_one() -> None:
    stacked, alone = torch.nn.Parameter(torch.zeros(12, 8)), [torch.nn.Parameter(torch.zeros(rows, 8)) for rows in (8, 4)]
    gradient = torch.randn(12, 8, generator=torch.Generator().manual_seed(0))
    stacked.grad, alone[0].grad, alone[1].grad = gradient, gradient[:8], gradient[8:]
    for matrices in ({stacked: [8, 4]}, {alone[0]: [8], alone[1]: [4]}):
        Muon(matrices, lr=0.1).step()
    torch.testing.assert_close(stacked.detach(), torch.cat([part.detach() for part in alone]))
    assert stacked.abs().max() > 0


def test_blocks_matrices_get_orthogonal_updates_and_the_rest_adams(checkpoint: Path) -> None:
    model = load_model(checkpoint, dtype=torch.float32, device=CPU).requires_grad_(True)
    trainer = Trainer([model], 4, rate=1e-3)
    adam, muon = trainer._optimisers
    names = {parameter: name for name, parameter in model.named_parameters()}
    of_muon = {names[parameter] for group in muon.param_groups for parameter in group["params"]}
    of_adam = {names[parameter] for group in adam.param_groups for parameter in group["params"]}
    assert of_muon | of_adam == set(names.values()) and not of_muon & of_adam
    assert {"vlm_blocks.0.qkv.weight", "vlm_last.kv.weight", "expert_blocks.2.gate_up.weight", "vision.blocks.1.fc2.weight"} <= of_muon
    assert {"embedding.weight", "action_in.weight", "expert_blocks.0.attention_norm.dense.weight"} <= of_adam
    assert isinstance(muon, Muon)
    rows = dict(zip((names[parameter] for parameter in muon.param_groups[0]["params"]), muon._rows, strict=True))
    assert rows["vlm_blocks.0.qkv.weight"] == [40, 10, 10] and rows["vlm_last.kv.weight"] == [10, 10]
    assert rows["expert_blocks.0.gate_up.weight"] == [30, 30] and rows["expert_blocks.0.down.weight"] == [26]


def test_times_are_the_references_law() -> None:
    """Beta(1.5, 1) has the distribution function t^1.5."""
    from action.training import _times

    times = _times(100_000, torch.Generator().manual_seed(0))
    assert times.min() >= 0.001 and times.max() <= 1.0
    for t in (0.2, 0.5, 0.9):
        assert (times <= t * 0.999 + 0.001).float().mean().item() == pytest.approx(t**1.5, abs=0.006)


def test_small_pictures_give_what_large_ones_give(checkpoint: Path) -> None:
    model = load_model(checkpoint, dtype=torch.float32, device=CPU)
    small = batch(2, side=56)[0][:, 0]
    large = small.repeat_interleave(4, 1).repeat_interleave(4, 2)
    full = model.vision(large)
    shrink_patches(model, 4)
    torch.testing.assert_close(model.vision(small), full, rtol=0, atol=1e-4)
    grow_patches(model, 4)
    torch.testing.assert_close(model.vision(large), full, rtol=0, atol=1e-4)
    assert model.vision.patch == 32


def test_what_is_saved_acts_as_what_was_in_memory(checkpoint: Path, tmp_path: Path) -> None:
    model = load_model(checkpoint, dtype=torch.float32, device=CPU)
    (tmp_path / "saved").mkdir()
    save_model(model, tmp_path / "saved")
    again = load_model(tmp_path / "saved", dtype=torch.float32, device=CPU)
    images, tokens, mask, actions = batch(2)
    inputs = ModelInput(np.repeat(images.numpy(), 3, 1), np.ones((2, 3), np.bool_), tokens.numpy(), mask.numpy(), np.zeros((2, 7), np.float32))
    noise = actions.numpy()
    np.testing.assert_array_equal(FlowSampler(again).sample(inputs, noise), FlowSampler(model).sample(inputs, noise))


def test_the_towers_leaves_are_those_that_were_read() -> None:
    """Off a JAX checkpoint and back."""
    from action.orbax_reader import OrbaxParams

    stored = OrbaxParams(PI05_CHECKPOINTS[0])
    leaves = tower_leaves(load_model(PI05_CHECKPOINTS[0], dtype=torch.float32, device=CPU))
    assert leaves.keys() == {name for name in stored if name.startswith(IMG)}
    for name, leaf in leaves.items():
        np.testing.assert_array_equal(leaf, stored.read(name), err_msg=name)


def test_a_policy_learns(checkpoint: Path) -> None:
    """A single observation and chunk, learnt by heart."""
    model = load_model(checkpoint, dtype=torch.float32, device=CPU).requires_grad_(True)
    model.vision.requires_grad_(False)
    seen = {name: parameter.clone() for name, parameter in model.vision.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    trainer = Trainer([model], 60, rate=5e-3, averaging=0.5)
    losses = []
    for _ in range(60):
        loss = flow_loss(model, encoded(model, 1).context, batch(1)[3], draws=8, generator=generator)
        trainer.step(loss)
        losses.append(loss.item())
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])
    last = model.action_out.weight.clone()
    trainer.take_averages()
    assert not torch.equal(model.action_out.weight, last), "the average is not the last value"
    assert all(torch.equal(parameter, seen[name]) for name, parameter in model.vision.named_parameters())


def test_reading_off_counts_only_what_is_there() -> None:
    readout = Readout(8, 3, 4, generator=torch.Generator().manual_seed(0))
    tokens = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))
    points, classes = readout(tokens)
    known = torch.full((2, 3), -1)
    known[0, 1] = classes[0, 1].argmax()
    there = torch.full((2, 3, 2), torch.nan)
    there[1, 2] = points[1, 2].detach() + 0.5
    loss, metrics = readout_loss(tokens, readout, there, known)
    assert metrics["rms"] == pytest.approx(0.5) and metrics["right"] == 1.0
    cross_entropy = -classes[0, 1].log_softmax(-1)[known[0, 1]].item()
    assert loss.item() == pytest.approx(10 * 0.25 + cross_entropy, rel=1e-5)


def test_the_learning_rate_rises_and_falls() -> None:
    layer = torch.nn.Linear(2, 2)
    trainer = Trainer([layer], 40, rate=1.0, warm_up=4)
    rates = []
    for _ in range(40):
        rates.append(trainer._schedules[0].get_last_lr()[0])
        trainer.step(layer(torch.ones(1, 2)).sum())
    assert rates[:5] == pytest.approx([0, 0.25, 0.5, 0.75, 1.0]) and rates[4:] == sorted(rates[4:], reverse=True) and rates[-1] < 0.01
