"""The demo's checkpoints: written once, whole or not at all, and restored by both slots' own loaders."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from action.policy import ActionPolicy
from demo import checkpoints, scene
from demo.checkpoints import DIMS, MODEL_CONFIG, ensure_checkpoints, random_leaves, train_tokenizer
from hosting.policy import CheckpointError
from pi0.orbax import OrbaxParams
from pi0.param_tree import model_dims, model_shapes
from pi0.tokenizer import TOKENIZER_FILE, PromptTokenizer
from planner import SubtaskGenerator


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("demo") / "checkpoints"
    assert ensure_checkpoints(directory) == (directory / "planner", directory / "action")
    return directory


def tree(directory: Path) -> dict[str, int]:
    return {path.relative_to(directory).as_posix(): path.stat().st_mtime_ns for path in directory.rglob("*") if path.is_file()}


def test_the_planner_restores(directory: Path) -> None:
    generator = SubtaskGenerator.load(directory / "planner", max_generation_tokens=4)
    obs = scene.observation(0)
    subtask = generator.generate(obs["prompt"], obs["images"])
    assert 1 <= len(subtask.token_ids) <= 4 and np.isfinite(subtask.logprob)


def test_the_action_policy_restores_and_moves_with_the_prompt(directory: Path) -> None:
    policy = ActionPolicy.load(MODEL_CONFIG, directory / "action", num_steps=2)
    obs = scene.observation(0)
    actions, again, other = (policy.infer({**obs, "prompt": prompt}, seed=0)["actions"] for prompt in ("stack", "stack", "wipe the table"))
    assert actions.shape == (50, 14) and np.isfinite(actions).all()
    np.testing.assert_array_equal(actions, again)
    assert np.abs(actions - other).max() > 1e-4


def test_both_formats_hold_the_same_model(directory: Path) -> None:
    planner = OrbaxParams(directory / "planner")
    assert model_dims(planner.shapes()) == DIMS
    stored = [ActionPolicy.load(MODEL_CONFIG, path, num_steps=1, tokenizer=directory / "action" / TOKENIZER_FILE) for path in both(directory)]
    obs = scene.observation(1)
    first, second = (policy.infer(obs, seed=1)["actions"] for policy in stored)
    np.testing.assert_allclose(first, second, rtol=0, atol=1e-5)


def both(directory: Path) -> tuple[Path, Path]:
    """The action checkpoint, and the planner's with the norm stats that it has no use for itself."""
    mixed = directory.parent / "mixed"
    if not mixed.exists():
        mixed.mkdir()
        (mixed / "params").symlink_to(directory / "planner" / "params")
        (mixed / "assets").symlink_to(directory / "action" / "assets")
    return directory / "action", mixed


def test_a_second_call_writes_nothing(directory: Path) -> None:
    before = tree(directory)
    ensure_checkpoints(directory)
    assert tree(directory) == before
    assert not list(directory.parent.glob("*.partial*"))


def test_the_tokenizer_is_the_same_each_time_and_paligemmas_kind(directory: Path, tmp_path: Path) -> None:
    first, second = train_tokenizer(), train_tokenizer()
    assert first == second == (directory / "planner" / TOKENIZER_FILE).read_bytes() == (directory / "action" / TOKENIZER_FILE).read_bytes()
    (tmp_path / TOKENIZER_FILE).write_bytes(first)
    tokenizer = PromptTokenizer(tmp_path / TOKENIZER_FILE)
    assert tokenizer.vocab_size <= DIMS.backbone.vocab_size
    for task in scene.TASKS:
        ids = tokenizer.planner_prompt(task, "Task: {task}. Subtask: ").ids
        assert tokenizer.decode(ids[1:]) == f"Task: {task}. Subtask: ", "the demo's words survive the tokenizer"


def test_the_weights_are_the_same_each_time_and_none_is_trivial() -> None:
    first, second = random_leaves(DIMS, seed=3), random_leaves(DIMS, seed=3)
    assert {name: leaf.shape for name, leaf in first.items()} == model_shapes(DIMS)
    for name, leaf in first.items():
        np.testing.assert_array_equal(leaf, second[name])
        assert leaf.std() > 0 and np.isfinite(leaf).all(), name


@pytest.mark.parametrize("step", ["train_tokenizer", "random_leaves", "write_norm_stats"])
def test_an_interrupted_write_leaves_nothing_that_looks_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    def interrupt(*arguments: object, **named: object) -> None:
        raise KeyboardInterrupt

    directory = tmp_path / "demo"
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, step, interrupt)
        with pytest.raises(KeyboardInterrupt):
            ensure_checkpoints(directory)
    assert not directory.exists()
    planner, action = ensure_checkpoints(directory)
    assert OrbaxParams(planner) and (action / "model.safetensors").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]


@pytest.mark.parametrize("content", ["foreign", "older version", "not JSON", "a file"])
def test_what_is_not_ours_is_refused_and_left_alone(tmp_path: Path, content: str) -> None:
    directory = tmp_path / "demo"
    if content == "a file":
        directory.write_text("precious")
    else:
        directory.mkdir()
        (directory / "thesis.txt").write_text("precious")
        if content != "foreign":
            (directory / "demo.json").write_text(json.dumps({"version": 0}) if content == "older version" else "{")
    with pytest.raises(CheckpointError) as error:
        ensure_checkpoints(directory)
    assert str(error.value) == (f"{directory} exists but holds no demo checkpoints of this version; remove it, or choose another with --directory")
    assert (directory if content == "a file" else directory / "thesis.txt").read_text() == "precious"
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError) as error:
        ensure_checkpoints(tmp_path / "file" / "demo")
    assert str(error.value) == f"cannot write {tmp_path}/file/demo: Not a directory; choose another with --directory"
