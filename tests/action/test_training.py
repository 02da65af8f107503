"""Training looks at a policy as serving does: the same model, the same numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from action.checkpoint import load_model
from action.export import save_model, tower_leaves
from action.plain import PlainModel
from action.sampler import FlowSampler, ModelInput
from action.training import Readout, Trainer, flow_loss, grow_patches, readout_loss, shrink_patches
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


def test_the_loss_is_that_of_the_plain_formulas(checkpoint: Path) -> None:
    images, tokens, mask, actions = batch(2)
    model = load_model(checkpoint, dtype=torch.float32, device=CPU)
    loss = flow_loss(model, images, tokens, mask, actions, draws=3, generator=torch.Generator().manual_seed(4))

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
    flow_loss(model, *batch(2), draws=2, generator=torch.Generator().manual_seed(0)).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()] == []


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
        loss = flow_loss(model, *batch(1), draws=8, generator=generator)
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
        rates.append(trainer._schedule.get_last_lr()[0])
        trainer.step(layer(torch.ones(1, 2)).sum())
    assert rates[:5] == pytest.approx([0, 0.25, 0.5, 0.75, 1.0]) and rates[4:] == sorted(rates[4:], reverse=True) and rates[-1] < 0.01
