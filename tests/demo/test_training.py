"""What the demo's models are trained on, and the whole of their training in a few steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from demo.expert import HORIZON, targets
from demo.instructions import FAMILIES, SUBTASKS, WORDINGS, Instruction, random_instruction, say, sentence
from demo.sampling import for_action, for_planner, training_rng
from demo.training.batches import ANSWER_SLOTS, PLACES, QUERIES, Batches, pictures, readout_targets
from demo.training.run import TrainingError, train_demo
from demo.training.start import DIMS, first_leaves
from demo.training.tokenizer import VOCABULARY, train_tokenizer
from demo.world import ABSENT, COLOURS, lay_out
from pi0.param_tree import LLM, model_shapes
from pi0.tokenizer import EOS_ID, TOKENIZER_FILE, PromptTokenizer
from tests.e2e.process import run


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PromptTokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / TOKENIZER_FILE
    path.write_bytes(train_tokenizer())
    return PromptTokenizer(path)


@pytest.fixture
def batches(tokenizer: PromptTokenizer) -> Batches:
    return Batches(tokenizer, training_rng(3))


def test_the_tokenizer_is_the_same_each_time(tokenizer: PromptTokenizer) -> None:
    assert train_tokenizer() == tokenizer.path.read_bytes()
    assert tokenizer.vocab_size == VOCABULARY


def test_every_word_of_the_table_is_one_token(tokenizer: PromptTokenizer) -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        (rims,), (present,) = lay_out(rng, 1, sortable=np.array([True]))
        text = say(random_instruction(rng, FAMILIES[rng.integers(4)], rims, present), rng)
        words = text.replace(",", " ,").replace(".", " .").split()
        assert len(tokenizer.encode(text)) == len(words), text
    for text in SUBTASKS:
        assert len(tokenizer.encode(text)) == len(text.split()), text


def test_a_number_of_the_state_is_one_token_each(tokenizer: PromptTokenizer) -> None:
    prompt = "pick up the red block"
    few, many = (tokenizer.action_prompt(prompt, 99, state=np.full(width, 0.37)) for width in (1, 9))
    assert many.needed == few.needed + 8
    assert len({tokenizer.encode(f" {number}")[0] for number in range(256)}) == 256


def test_anything_printable_can_be_said(tokenizer: PromptTokenizer) -> None:
    text = "".join(map(chr, range(32, 127)))
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_planners_batch(batches: Batches, tokenizer: PromptTokenizer) -> None:
    rows = batches.planner(64)
    assert rows.images.shape == (64, 56, 56, 3) and rows.images.dtype == np.uint8
    for prompt, answer, probed in zip(rows.prompt, rows.answer, rows.probed, strict=True):
        text = tokenizer.decode(prompt)
        assert text.startswith("Task: ") and text.endswith(". Subtask: ")
        assert tokenizer.decode(answer) in SUBTASKS and EOS_ID in answer and len(answer) == ANSWER_SLOTS
        colours = [colour for colour in COLOURS if f" {colour}" in text]
        assert (probed >= 0).sum() >= len(colours) and probed.max() < PLACES


def test_the_probe_is_asked_about_what_the_prompt_names(tokenizer: PromptTokenizer) -> None:
    samples = for_planner(training_rng(8), 32)  # the same stream
    rows = Batches(tokenizer, training_rng(8)).planner(32)
    for row, (prompt, probed) in enumerate(zip(rows.prompt, rows.probed, strict=True)):
        for number, colour in enumerate(COLOURS):
            (token,) = tokenizer.encode(f" {colour}")
            assert set(probed[prompt == token]) <= {int(samples.scenes.place[row, number])}


def test_action_batches_of_both_prompt_forms(batches: Batches, tokenizer: PromptTokenizer) -> None:
    for with_task in (False, True):
        rows = batches.action(32, with_task=with_task)
        assert rows.actions.shape == (32, HORIZON, 3) and rows.actions.dtype == np.float32 and np.abs(rows.actions).max() <= 1.2
        texts = [tokenizer.decode(ids[mask]) for ids, mask in zip(rows.tokens, rows.token_mask, strict=True)]
        assert all((". Subtask: " in text) == with_task for text in texts)
        assert all(any(subtask in text for subtask in SUBTASKS[:-1]) for text in texts)


def test_what_is_to_be_read_off_an_action_prompt(tokenizer: PromptTokenizer) -> None:
    samples = for_action(training_rng(8), 32)  # the same stream
    rows = Batches(tokenizer, training_rng(8)).action(32, with_task=True)
    target, finished = targets(samples.scenes, samples.subtasks)
    np.testing.assert_allclose(rows.target, target, rtol=1e-6)
    assert rows.finished.tolist() == finished.tolist() and 0 < finished.sum() < 32
    colour_of = {tokenizer.encode(f" {colour}")[0]: number for number, colour in enumerate(COLOURS)}
    for row, (tokens, points, places) in enumerate(zip(rows.tokens, rows.points, rows.places, strict=True)):
        for token, point, place in zip(tokens, points, places, strict=True):
            number = colour_of.get(int(token))
            assert place == (-1 if number is None else samples.scenes.place[row, number])
            if number is None or place == ABSENT:
                assert np.isnan(point).all()
            else:
                np.testing.assert_allclose(point, samples.scenes.position[row, number], rtol=1e-6)


def test_the_flat_baseline_is_told_only_the_instruction(batches: Batches, tokenizer: PromptTokenizer) -> None:
    rows = batches.flat(64)
    texts = [tokenizer.decode(ids[mask]) for ids, mask in zip(rows.tokens, rows.token_mask, strict=True)]
    assert not any("Subtask" in text or "pick up" in text for text in texts)
    assert {family for family in FAMILIES if any(_sounds_like(family, text) for text in texts)} == set(FAMILIES)


def _sounds_like(family: str, text: str) -> bool:
    marks = {"seq": " then", "every": "left bin, State", "sort": "colo", "others": " others "}
    return marks[family] in text


def test_what_is_to_be_read_off_a_picture(batches: Batches) -> None:
    scenes = for_planner(training_rng(1), 128).scenes
    points, classes = readout_targets(scenes)
    assert points.shape == (128, QUERIES, 2) and classes.shape == (128, QUERIES) and pictures(scenes).shape == (128, 56, 56, 3)
    np.testing.assert_array_equal(np.isnan(points[:, : len(COLOURS), 0]), ~scenes.present)
    np.testing.assert_array_equal(classes[:, : len(COLOURS)], scenes.place)
    assert classes.max() < PLACES and np.isnan(points[:, -3:]).all()


def test_first_leaves_are_a_whole_model(tokenizer: PromptTokenizer) -> None:
    numbers = {tokenizer.encode(f" {number}")[0]: number for number in range(256)}
    leaves = first_leaves(5, numbers)
    assert {name: leaf.shape for name, leaf in leaves.items()} == model_shapes(DIMS)
    again = first_leaves(5, numbers)
    assert all(np.array_equal(leaf, again[name]) for name, leaf in leaves.items())
    code = leaves[f"{LLM}/embedder/input_embedding"][list(numbers)]
    near, far = np.linalg.norm(code[100] - code[101]), np.linalg.norm(code[100] - code[180])
    assert near < 0.5 * far, "near numbers look alike"


def test_all_wordings_are_trained() -> None:
    said = {text.lower().rstrip(".") for text in for_planner(training_rng(2), 4000).instructions}
    assert said >= {
        sentence(Instruction(family, bin=bin_), wording) for wording in range(WORDINGS) for family, bin_ in (("sort", None), ("every", 1))
    }


@pytest.mark.timeout(400)  # four processes that import and compile; the rest of a minute on two free cores
def test_the_whole_training_in_a_few_steps(tmp_path: Path) -> None:
    """Both packages' training code, the processes, the record; and that what comes out is served as any checkpoint."""
    done = run("train-demo", "--output", str(tmp_path / "trained"), "--effort", "0.001", "--seed", "5", timeout_s=400)
    assert done.returncode == 0, done.stderr
    record: dict[str, Any] = json.loads(done.stdout)
    assert record == json.loads((tmp_path / "trained" / "training.json").read_text())
    assert record["seed"] == 5 and record["command"] == "python main.py train-demo --seed 5 --effort 0.001"
    assert record["stages"].keys() == {"vision", "planner", "action", "flat"}
    assert sorted(entry.name for entry in (tmp_path / "trained").iterdir() if entry.is_dir()) == ["action", "flat", "planner"]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["trained"]

    from action import ActionPolicy
    from demo.robot import PI05_TABLE
    from planner import SubtaskGenerator

    obs = {**PI05_TABLE.embodiment.example(np.random.default_rng(0)), "prompt": "sort the blocks by color"}
    for name in ("action", "flat"):
        reply = ActionPolicy.load(PI05_TABLE, tmp_path / "trained" / name).infer(obs, seed=0)
        assert reply["actions"].shape == (12, 3)
    assert isinstance(SubtaskGenerator.load(tmp_path / "trained" / "planner").infer(obs)["subtask"]["text"], str)


def test_nothing_is_trained_over_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(TrainingError, match="exists; nothing is trained over it"):
        train_demo(tmp_path, seed=0, effort=1.0, console=Console())


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match=r"cannot write .*; choose another with --output"):
        train_demo(tmp_path / "file" / "trained", seed=0, effort=1.0, console=Console())


def test_a_stage_that_fails_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("demo.training.run.STEPS", {"vision": -1, "planner": 1, "action": 1, "flat": 1})
    monkeypatch.setattr("demo.training.run._Run", _failing_run())
    with pytest.raises(TrainingError, match=r"stage vision ended with 3: the reason"):
        train_demo(tmp_path / "trained", seed=0, effort=1.0, console=Console())
    assert not (tmp_path / "trained").exists()


def _failing_run() -> Any:
    import sys

    from demo.training.run import _Run

    class Failing(_Run):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self._command = [sys.executable, "-c", "import sys; print('the reason', file=sys.stderr); sys.exit(3)"]

    return Failing
