from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import sentencepiece
from jax.experimental.compilation_cache import compilation_cache

from hosting.policy import PromptPreview, Warmable
from pi0.errors import CheckpointError, ConfigError, ObservationError, PlannerError, PromptTooLongError
from pi0.orbax import OrbaxParams
from pi0.param_tree import backbone_dims, is_action_leaf
from pi0.tokenizer import PromptTokenizer
from planner import Subtask, SubtaskGenerator
from planner.decoder import Prefix, text_slots
from planner.drafts import NODES_PER_DRAFT
from planner.generator import pack
from planner.observation import prepare_cameras
from tests.golden_data import CHECKPOINTS, TOKENIZER
from tests.planner.golden_planner import CASE, CASES, arrays, images
from tests.planner.oracle import Oracle

PIXELS = np.zeros((224, 224, 3), np.uint8)
LONG_PROMPT = "pick up the cup " * 60
SHORT, LONG = text_slots(0)
_CACHE_OPTIONS = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs", "jax_persistent_cache_min_entry_size_bytes")
SHORT_CASES = ["case_03", "case_06", "case_13", "case_15"]


def load(checkpoint: str = "pi05_orbax", **options: Any) -> SubtaskGenerator:
    """Without drafts, so that what an answer takes does not depend on what was asked before."""
    return SubtaskGenerator.load(CHECKPOINTS / checkpoint, tokenizer=TOKENIZER, **{"drafts": 0, **options})


def as_flash(checkpoint: str = "pi05_orbax", **options: Any) -> SubtaskGenerator:
    return load(checkpoint, allowed_tokens="printable_ascii", missing_cameras="grey", on_long_prompt="truncate", **options)


@pytest.fixture(scope="module")
def flash() -> SubtaskGenerator:
    return as_flash()


@pytest.fixture(scope="module")
def generator() -> SubtaskGenerator:
    return load()


@contextmanager
def counted_compilations() -> Iterator[list[str]]:
    seen: list[str] = []
    active = True

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if active and event.endswith(("backend_compile_duration", "jaxpr_trace_duration")):
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seen
    finally:
        active = False


def generate_case(generator: SubtaskGenerator, name: str, **options: Any) -> Subtask:
    return generator.generate(CASE[name]["prompt"], images(name), generation_prompt_format=CASE[name]["prompt_format"], **options)


@pytest.mark.parametrize("checkpoint", ["pi05_orbax", "pi05_orbax_bf16_sharded"])
def test_every_golden_case_token_for_token(checkpoint: str, flash: SubtaskGenerator) -> None:
    generator = flash if checkpoint == "pi05_orbax" else as_flash(checkpoint, dtype="float32")
    assert len(CASES) == 20
    for case in CASES:
        subtask = generate_case(generator, case["name"])
        assert list(subtask.token_ids) == case["token_ids"], case["name"]
        assert subtask.text == case["text"], case["name"]
        assert subtask.decode_steps == len(subtask.token_ids) - 1


@pytest.fixture(scope="module")
def drafting() -> SubtaskGenerator:
    return as_flash(drafts=2)


def test_golden_cases_with_drafts_token_for_token(drafting: SubtaskGenerator) -> None:
    """Asked twice, so that the second answer was guessed; and with guesses that are another case's answers."""
    for case in CASES:
        first, again = (generate_case(drafting, case["name"]) for _ in range(2))
        misled = generate_case(drafting, case["name"], previous="pick up something else")
        assert list(first.token_ids) == list(again.token_ids) == list(misled.token_ids) == case["token_ids"], case["name"]
        guessed = min(2 * NODES_PER_DRAFT, len(case["token_ids"]) - 1)
        assert (again.accepted_tokens, again.decode_steps) == (guessed, len(case["token_ids"]) - 1 - guessed)
        assert again.logprob == pytest.approx(first.logprob, abs=2e-3) and again.margin == pytest.approx(first.margin, abs=2e-3)


def test_an_unchanged_subtask_takes_one_pass(drafting: SubtaskGenerator) -> None:
    name = "case_13"
    first = generate_case(drafting, name)
    told = generate_case(drafting, name, previous=first.text)
    assert (told.text, told.forward_passes, told.decode_steps, told.accepted_tokens) == (first.text, 1, 0, len(first.token_ids) - 1)


def test_each_row_of_a_batch_has_its_own_guesses(drafting: SubtaskGenerator) -> None:
    names = ["case_03", "case_06", "case_13"]
    prompts, cameras = [CASE[name]["prompt"] for name in names], [images(name) for name in names]
    answers = [CASE[name]["text"] for name in names]
    rows = drafting.generate_batch(prompts, cameras, previous=[answers[0], "nothing of the kind", None])
    assert [row.text for row in rows] == answers
    with pytest.raises(ValueError, match="3 prompts came with 1 previous subtasks; expected one per prompt"):
        drafting.generate_batch(prompts, cameras, previous=["one"])


def test_words_of_the_task_are_guessed() -> None:
    """Before anything was said, a task that holds the answer saves steps."""
    said = generate_case(load(), "case_13").text
    generator = load(drafts=1)
    subtask = generator.generate(f"wait, {said}", images("case_13"))
    assert subtask.drafted_tokens > 0, "a part of the task"
    assert generator.generate("", images("case_13")).drafted_tokens == 0, "there is nothing to guess from"


def test_golden_cases_in_bfloat16() -> None:
    generator = as_flash(dtype="bfloat16")
    decided = [case for case in CASES if case["min_margin_bfloat16"] >= 0.03]
    assert len(decided) >= 19
    for case in decided:
        assert list(generate_case(generator, case["name"]).token_ids) == case["token_ids"], case["name"]


def test_the_reference_vocabulary_rule_is_the_golden_one() -> None:
    allowed = PromptTokenizer(TOKENIZER).allowed_tokens("printable_ascii")
    np.testing.assert_array_equal(allowed, np.flatnonzero(arrays("vocab_mask")["allowed"]))


def test_text_mode_never_says_what_is_not_text(generator: SubtaskGenerator) -> None:
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(TOKENIZER))
    fitting = [case["name"] for case in CASES if case["image_keys"] and case["name"] != "case_19"]
    said = {token for name in fitting for token in generate_case(generator, name, max_generation_tokens=40).token_ids} - {1}
    assert len(said) > 30
    for token in said:
        piece = pieces.id_to_piece(token)
        assert not any((pieces.is_byte(token), pieces.is_control(token), pieces.is_unknown(token))), piece
        assert not re.fullmatch(r"<[^<>]+>", piece)
        assert piece.replace("\u2581", " ").isascii()


def test_masked_cameras_are_as_if_they_were_not_there(generator: SubtaskGenerator) -> None:
    stored = OrbaxParams(CHECKPOINTS / "pi05_orbax")
    dims = backbone_dims({name: shape for name, shape in stored.shapes().items() if not is_action_leaf(name)})
    oracle = Oracle(stored, dims)
    pieces = PromptTokenizer(TOKENIZER)
    allowed = pieces.allowed_tokens("text")
    names = ["case_07", "case_15", "case_04"]
    assert [len(prepare_cameras(images(name), "mask")) for name in names] == [1, 2, 3]
    # In one batch, so that the rows with fewer cameras have masked slots; alone, they have none.
    together = generator.generate_batch([CASE[name]["prompt"] for name in names], [images(name) for name in names], max_generation_tokens=4)
    for name, row in zip(names, together, strict=True):
        ids = pieces.planner_prompt(CASE[name]["prompt"], "Task: {task}. Subtask: ").ids.tolist()
        tokens, logprob, margin = oracle.generate(prepare_cameras(images(name), "mask"), ids, allowed, 4)
        assert margin > 1e-3
        alone = generator.generate(CASE[name]["prompt"], images(name), max_generation_tokens=4)
        for subtask in (row, alone):
            assert list(subtask.token_ids) == tokens, name
            assert subtask.logprob == pytest.approx(logprob, abs=2e-3)


def test_a_batch_says_what_its_rows_say_alone(flash: SubtaskGenerator) -> None:
    names = ["case_03", "case_04", "case_06", "case_08", "case_15"]
    rows = flash.generate_batch([CASE[name]["prompt"] for name in names], [images(name) for name in names])
    assert len(rows) == 5
    for name, row in zip(names, rows, strict=True):
        alone = generate_case(flash, name)
        assert (row.token_ids, row.text, row.decode_steps) == (alone.token_ids, alone.text, alone.decode_steps)
        assert list(row.token_ids) == CASE[name]["token_ids"]
        assert row.logprob == pytest.approx(alone.logprob, abs=2e-3)


def test_a_batch_larger_than_the_largest_program_runs_as_several(flash: SubtaskGenerator) -> None:
    names = [SHORT_CASES[row % 4] for row in range(17)]
    rows = flash.generate_batch([CASE[name]["prompt"] for name in names], [images(name) for name in names])
    assert [list(row.token_ids) for row in rows] == [CASE[name]["token_ids"] for name in names]


def test_no_row_gives_no_subtask_and_unequal_rows_are_an_error(generator: SubtaskGenerator) -> None:
    assert generator.generate_batch([], []) == []
    with pytest.raises(ValueError, match="2 prompts came with 1 maps of images"):
        generator.generate_batch(["a", "b"], [{"base_0_rgb": PIXELS}])


def test_prompt_buckets_change_no_token(flash: SubtaskGenerator) -> None:
    # A row in the large bucket takes the whole batch there.
    alone = generate_case(flash, "case_15")
    together = flash.generate_batch([CASE["case_15"]["prompt"], LONG_PROMPT], [images("case_15"), {}], max_generation_tokens=20)
    assert together[0].token_ids == alone.token_ids
    assert together[0].logprob == pytest.approx(alone.logprob, abs=2e-3)
    assert {(1, 3, SHORT), (2, 3, LONG)} <= set(flash._decoder.programs)


def test_nothing_is_compiled_after_warmup_whatever_the_limit(generator: SubtaskGenerator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generator, "_max_rows", generator._max_rows)
    generator.warmup()
    single = {program for program in generator._decoder.programs if program[0] == 1}
    assert single == {(1, cameras, slots) for cameras in (1, 2, 3) for slots in (SHORT, LONG)}
    long = " ".join(["cup"] * 60)
    with counted_compilations() as compiled:
        lengths = [len(generate_case(generator, "case_04", max_generation_tokens=limit).token_ids) for limit in (1, 2, 7, 256)]
        for count in (1, 2, 3):
            cameras = dict.fromkeys(("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")[:count], PIXELS)
            assert generator.generate("pick", cameras).token_ids
            assert generator.generate(long, cameras, generation_prompt_format="{task}").token_ids
    assert lengths[:3] == [1, 2, 7]
    assert lengths[3] >= 7
    assert compiled == []
    with counted_compilations() as compiled:
        jax.jit(lambda x: x + 1)(np.arange(3))
    assert compiled, "the counter must see compilations"


def test_nothing_is_compiled_after_warmup_whatever_the_batch(generator: SubtaskGenerator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generator, "_max_rows", generator._max_rows)
    generator.warmup(max_batch=2)
    assert set(generator._decoder.programs) >= {(batch, count, slots) for batch in (1, 2) for count in (1, 2, 3) for slots in (SHORT, LONG)}
    names = ["base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb"]
    rng = np.random.default_rng(0)
    rows = [
        (task, {name: rng.integers(0, 256, PIXELS.shape, np.uint8) for name in names[:count]})
        for task, count in [("pick", 1), (" ".join(["cup"] * 60), 1), ("put it down", 3), ("pick", 2), ("go", 1)]
    ]
    with counted_compilations() as compiled:
        alone = [generator.generate(task, seen, max_generation_tokens=6).token_ids for task, seen in rows]
        # More than it was warmed up for run as several.
        for first, end in [(0, 2), (1, 3), (2, 4), (3, 5), (0, 3), (0, 5)]:
            tasks, seen_by = zip(*rows[first:end], strict=True)
            together = generator.generate_batch(tasks, seen_by, max_generation_tokens=6)
            assert [row.token_ids for row in together] == alone[first:end]
    assert compiled == []


def test_warmup_of_grey_mode_needs_three_cameras_only(flash: SubtaskGenerator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash, "_max_rows", flash._max_rows)
    flash.warmup(max_batch=3)
    programs = set(flash._decoder.programs)
    assert programs >= {(batch, 3, slots) for batch in (1, 2, 4) for slots in (SHORT, LONG)}
    assert {cameras for _, cameras, _ in programs} == {3}
    with counted_compilations() as compiled:
        for tasks in (["pick", "go", "put it down"], ["pick", LONG_PROMPT, "go"]):
            assert len(flash.generate_batch(tasks, [{}] * 3, max_generation_tokens=3)) == 3
    assert compiled == []


def test_a_robot_with_fewer_cameras_has_fewer_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = load(cameras=2)
    shapes: list[tuple[int, int, int]] = []
    monkeypatch.setattr(generator._decoder, "compile", shapes.extend)
    monkeypatch.setattr(generator, "generate", lambda prompt, images, **_: shapes.append(tuple(images)))
    generator.warmup()
    assert shapes == [(1, 1, SHORT), (1, 1, LONG), (1, 2, SHORT), (1, 2, LONG), ("base_0_rgb", "left_wrist_0_rgb")]
    monkeypatch.undo()
    three = dict.fromkeys(("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb"), PIXELS)
    message = r"images: has 3 cameras \(base_0_rgb, left_wrist_0_rgb, right_wrist_0_rgb\), but planner.cameras allows 2; raise it"
    with pytest.raises(ObservationError, match=message):
        generator.generate("pick up the cup", three)


def test_compiled_programs_are_kept_for_the_next_process(tmp_path: Path) -> None:
    before = {name: getattr(jax.config, name) for name in _CACHE_OPTIONS}
    hits: list[str] = []
    active = True
    jax.monitoring.register_event_listener(lambda event, **_: hits.append(event) if active and event.endswith("/cache_hits") else None)
    compilation_cache.reset_cache()  # jax opens it once per process
    try:
        generator = load(cameras=1, compilation_cache=tmp_path / "compiled")
        generator._decoder.compile([(1, 1, SHORT)])
        assert any((tmp_path / "compiled").iterdir()) and not hits
        jax.clear_caches()  # as a new process begins
        load(cameras=1, compilation_cache=tmp_path / "compiled")._decoder.compile([(1, 1, SHORT)])
        assert hits
    finally:
        active = False
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


def test_warmup_has_a_largest_and_a_smallest_batch(generator: SubtaskGenerator, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, int, int]] = []
    compiling = generator._decoder.compile

    def single_rows(wanted: Iterable[tuple[int, int, int]]) -> None:
        shapes.extend(wanted)
        compiling(shape for shape in shapes if shape[0] == 1)

    monkeypatch.setattr(generator, "_max_rows", generator._max_rows)
    monkeypatch.setattr(generator._decoder, "compile", single_rows)
    generator.warmup(max_batch=100)
    assert {batch for batch, _, _ in shapes} == {1, 2, 4, 8}
    with pytest.raises(ValueError, match="a batch has 0 rows, expected 1 to 8"):
        generator.warmup(max_batch=0)


def test_a_preview_is_what_the_model_reads(generator: SubtaskGenerator, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Prefix] = []
    monkeypatch.setattr("planner.generator.pack", lambda *rows: read.append(pack(*rows)) or read[-1])
    assert isinstance(generator, PromptPreview) and isinstance(generator, Warmable)
    preview = generator.preview_prompt("Task: pick up the cup. Subtask: ")
    assert not read
    generator.generate("Pick up the cup.", {"base_0_rgb": PIXELS}, generation_prompt_format="Task: {task}. Subtask: ", max_generation_tokens=1)
    assert preview["text"] == "Task: pick up the cup. Subtask: "
    assert preview["token_ids"] == read[0].tokens[0, : read[0].lengths[0]].tolist()
    assert (preview["tokens"], preview["max_tokens"], preview["not_fitting"]) == (len(preview["token_ids"]), 200, "")
    # No format is applied to what is finished already.
    assert generator.preview_prompt("{task}")["text"] == "{task}"
    long = generator.preview_prompt(LONG_PROMPT)
    assert long["tokens"] == len(long["token_ids"]) > 200
    assert long["not_fitting"] and LONG_PROMPT.endswith(long["not_fitting"])


def test_a_shorter_limit_gives_a_prefix_of_the_longer_answer(generator: SubtaskGenerator) -> None:
    whole = generate_case(generator, "case_04")
    cut = generate_case(generator, "case_04", max_generation_tokens=5)
    assert cut.token_ids == whole.token_ids[:5]
    assert cut.decode_steps == 4


def test_over_long_prompts_are_errors_or_cut_and_flagged(generator: SubtaskGenerator, flash: SubtaskGenerator) -> None:
    with pytest.raises(PromptTooLongError, match=r"prompt: has \d+ tokens .* but 200 fit"):
        generator.generate(LONG_PROMPT, {"base_0_rgb": PIXELS})
    assert flash.generate(LONG_PROMPT, {}).prompt_truncated
    assert flash.infer({"prompt": LONG_PROMPT, "images": {}})["subtask"]["prompt_truncated"] is True
    assert not flash.generate("pick up the cup", {}).prompt_truncated


def test_infer_answers_with_plain_scalars(flash: SubtaskGenerator) -> None:
    reply = flash.infer({"prompt": CASE["case_13"]["prompt"], "images": images("case_13"), "state": np.zeros(14), "mode": "default"})
    assert set(reply) == {"subtask"}
    subtask = reply["subtask"]
    counts = dict.fromkeys(("forward_passes", "decode_steps", "drafted_tokens", "accepted_tokens"), int)
    sure = dict.fromkeys(("logprob", "mean_logprob", "margin", "confidence"), float)
    assert {key: type(value) for key, value in subtask.items()} == {"text": str, "ms": float, **counts, **sure}
    assert subtask["text"] == CASE["case_13"]["text"]
    assert subtask["decode_steps"] == len(CASE["case_13"]["token_ids"]) - 1
    assert subtask["forward_passes"] == subtask["decode_steps"] + 1
    assert subtask["mean_logprob"] == pytest.approx(subtask["logprob"] / len(CASE["case_13"]["token_ids"]))
    assert subtask["logprob"] < 0 < min(subtask["ms"], subtask["margin"])


@pytest.mark.parametrize("name", ["case_15", "case_16"])
def test_infer_takes_flat_images(flash: SubtaskGenerator, name: str) -> None:
    observation = {**images(name), "prompt": np.array(CASE[name]["prompt"])}
    assert flash.infer(observation)["subtask"]["text"] == CASE[name]["text"]


def test_infer_overrides_reach_one_request_only(flash: SubtaskGenerator) -> None:
    observation = {"prompt": CASE["case_04"]["prompt"], "images": images("case_04")}
    before = flash.infer(observation)["subtask"]
    changed = flash.infer(observation, generation_prompt_format="{task}!", max_generation_tokens=2)["subtask"]
    assert changed["decode_steps"] <= 1
    assert changed["text"] != before["text"]
    after = flash.infer(observation)["subtask"]
    assert (after["text"], after["decode_steps"]) == (before["text"], before["decode_steps"])


@pytest.mark.parametrize(
    "keys", [("observation/image", "observation/wrist_image"), ("cam_high", "cam_left_wrist"), ("head_camera", "left_wrist_camera")]
)
def test_every_embodiments_cameras_are_seen_as_the_models_own(generator: SubtaskGenerator, keys: tuple[str, str]) -> None:
    base, wrist = images("case_15").values()
    own = generator.generate("pick up the cup", {"base_0_rgb": base, "left_wrist_0_rgb": wrist})
    assert generator.generate("pick up the cup", {keys[0]: base, keys[1]: wrist}).token_ids == own.token_ids


def test_an_observation_without_a_known_camera_names_what_it_has(generator: SubtaskGenerator) -> None:
    with pytest.raises(ObservationError, match=r"found: webcam"):
        generator.infer({"prompt": "pick", "images": {"webcam": PIXELS}})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_generation_tokens": 0}, "max_generation_tokens: got 0, expected a whole number from 1 to 256"),
        ({"max_generation_tokens": 257}, "max_generation_tokens: got 257, expected a whole number from 1 to 256"),
        ({"max_generation_tokens": 2.0}, "max_generation_tokens: got 2.0, expected a whole number from 1 to 256"),
        ({"max_generation_tokens": True}, "max_generation_tokens: got True, expected a whole number from 1 to 256"),
        ({"generation_prompt_format": "Task"}, "generation_prompt_format: 'Task' must contain {task} and no other field"),
        ({"generation_prompt_format": "{task} {x}"}, "generation_prompt_format: '{task} {x}' must contain {task} and no other field"),
        ({"generation_prompt_format": "{task:>9}"}, "generation_prompt_format: '{task:>9}' must contain {task} and no other field"),
        ({"generation_prompt_format": "{task"}, "generation_prompt_format: '{task' is not a template (expected '}' before end of string)"),
    ],
)
def test_settings_out_of_range_are_config_errors(generator: SubtaskGenerator, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        generator.generate("pick", {"base_0_rgb": PIXELS}, **options)
    assert str(error.value).startswith(message)
    with pytest.raises(ConfigError) as at_load:
        load(**options)
    assert str(at_load.value) == str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"allowed_tokens": "all"}, "allowed_tokens: got 'all', expected one of text, printable_ascii"),
        ({"missing_cameras": "black"}, "missing_cameras: got 'black', expected one of mask, grey"),
        ({"on_long_prompt": "cut"}, "on_long_prompt: got 'cut', expected one of error, truncate"),
        ({"dtype": "float16"}, "dtype: got 'float16', expected one of float32, bfloat16"),
        ({"dtype": np.int8}, "dtype: got 'int8', expected one of float32, bfloat16"),
        ({"drafts": -1}, "drafts: got -1, expected a whole number from 0 to 8"),
        ({"drafts": 2.0}, "drafts: got 2.0, expected a whole number from 0 to 8"),
        ({"cameras": 4}, "cameras: got 4, expected a whole number from 1 to 3, or none"),
        ({"cameras": True}, "cameras: got True, expected a whole number from 1 to 3, or none"),
        (
            {"cameras": 1, "missing_cameras": "grey"},
            "cameras: cannot be set together with missing_cameras 'grey', which shows the model all of them; leave one of the two out",
        ),
    ],
)
def test_unknown_options_are_config_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(**options)
    assert str(error.value) == message


def test_weights_that_give_no_numbers_are_an_error_and_not_an_empty_subtask(generator: SubtaskGenerator, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = dataclasses.replace(generator._decoder.params, head=generator._decoder.params.head * np.nan)
    monkeypatch.setattr(generator._decoder, "params", broken)
    with pytest.raises(PlannerError, match="log-probabilities are NaN or infinite; check the checkpoint's weights"):
        generator.generate("pick up the cup", {"cam_high": PIXELS})


def test_a_tokenizer_that_is_not_there_is_a_checkpoint_error() -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        SubtaskGenerator.load(CHECKPOINTS / "pi05_orbax", tokenizer="nowhere.model")


def test_importing_the_planner_keeps_jax_from_reserving_the_gpu_and_torch_out() -> None:
    code = "import os, sys, planner; print(os.environ['XLA_PYTHON_CLIENT_PREALLOCATE'], 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2], timeout=120)
    assert done.stdout.split() == ["false", "False"]
