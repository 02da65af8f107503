from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import action
from action import ActionPolicy
from action.configs import CONFIGS
from action.policy import _model_input
from action.sampler import ModelInput
from hosting.policy import Policy, PromptPreview, Warmable
from pi0.errors import CheckpointError, ConfigError, ObservationError, PolicyError, PromptTooLongError
from tests.action.policy_cases import COMBINED_CASES, POLICY_CASES, echo_policy, golden_call, processor
from tests.golden_data import CHECKPOINTS, TOKENIZER

FORMATS = {"pi05": ("pi05_orbax", "pi05_pytorch", "pi05_lerobot"), "pi0": ("pi0_orbax", "pi0_pytorch")}


@cache
def load(config: str, checkpoint: str, dtype: str = "float32", **options: Any) -> ActionPolicy:
    return ActionPolicy.load(config, CHECKPOINTS / checkpoint, tokenizer=TOKENIZER, dtype=dtype, device="cpu", **options)


def with_formats(cases: list[str]) -> list[tuple[str, str]]:
    return [(case, name) for case in cases for name in FORMATS["pi05" if "pi05" in case else "pi0"]]


def rms(x: NDArray[np.floating[Any]]) -> float:
    return float(np.sqrt(np.mean(np.square(x))))


class TestSameActionsAsOpenpi:
    @pytest.mark.parametrize(("case", "checkpoint"), with_formats(POLICY_CASES))
    def test_float32(self, case: str, checkpoint: str) -> None:
        call = golden_call(case)
        reply = load(call.meta["config"], checkpoint).infer(call.observation, noise=call.noise)
        assert set(reply) == {"actions", "policy_timing"}
        assert reply["actions"].dtype == np.float64
        np.testing.assert_allclose(reply["actions"], call.arrays["actions"], atol=2e-4, rtol=0)
        assert list(reply["policy_timing"]) == ["infer_ms"]
        assert isinstance(reply["policy_timing"]["infer_ms"], float)

    @pytest.mark.parametrize(("case", "checkpoint"), with_formats(POLICY_CASES))
    def test_bfloat16(self, case: str, checkpoint: str) -> None:
        call = golden_call(case)
        actions = load(call.meta["config"], checkpoint, "bfloat16").infer(call.observation, noise=call.noise)["actions"]
        for reference in ("actions", "actions_bfloat16", "actions_bfloat16_torch"):
            difference = actions - call.arrays[reference]
            assert np.abs(difference).max() <= 0.15, reference
            assert rms(difference) <= 0.03, reference
        assert np.abs(actions - call.arrays["actions"]).max() > 1e-5, "bfloat16 was asked for, but the result is float32's"

    @pytest.mark.parametrize(("case", "checkpoint"), with_formats(COMBINED_CASES))
    def test_action_half_of_combined_calls(self, case: str, checkpoint: str) -> None:
        call = golden_call(case)
        policy = load(call.meta["config"], checkpoint)
        alone = policy.infer(call.observation, noise=call.noise)["actions"]
        np.testing.assert_allclose(alone, call.arrays["actions_action_only"], atol=2e-4, rtol=0)
        rewritten = call.observation | {"prompt": call.meta["prompt_given_to_action_policy"]}
        np.testing.assert_allclose(policy.infer(rewritten, noise=call.noise)["actions"], call.arrays["actions"], atol=2e-4, rtol=0)

    def test_sharded_bfloat16_checkpoint(self) -> None:
        call = golden_call("pi05_droid__hwc_uint8")
        actions = load("pi05_droid", "pi05_orbax_bf16_sharded").infer(call.observation, noise=call.noise)["actions"]
        np.testing.assert_allclose(actions, call.arrays["actions"], atol=2e-4, rtol=0)

    def test_checkpoint_given_as_params(self) -> None:
        call = golden_call("pi0_droid__hwc_uint8")
        actions = load("pi0_droid", "pi0_orbax/params").infer(call.observation, noise=call.noise)["actions"]
        np.testing.assert_allclose(actions, call.arrays["actions"], atol=2e-4, rtol=0)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_runs(name: str) -> None:
    config = CONFIGS[name]
    policy = load(name, f"{config.kind}_orbax", num_steps=1, default_prompt="go")
    observation = policy.example_observation(np.random.default_rng(0))
    del observation["prompt"]
    assert policy.infer(observation, seed=0)["actions"].shape == (config.action_horizon, config.embodiment.action_dim)


@pytest.mark.parametrize("case", ["pi05_libero__hwc_uint8", "pi0_droid__hwc_uint8", "pi05_aloha__full_uint8_224"])
def test_prompt_length_does_not_change_the_actions(case: str) -> None:
    call = golden_call(case)
    policy = load(call.meta["config"], FORMATS["pi05" if "pi05" in case else "pi0"][0])
    prepared = policy._processor.prepare(call.observation)
    used, longest = len(prepared.prompt.ids), policy.config.max_token_len
    assert used < longest
    noise = np.asarray(call.noise, np.float32).reshape(1, *policy._noise_shape)
    chunks = [policy._sampler.sample(_model_input([prepared], length), noise) for length in (used, longest)]
    np.testing.assert_allclose(chunks[0], chunks[1], atol=1e-5, rtol=0)


def test_a_prompt_is_padded_to_a_program_where_there_are_programs() -> None:
    """Else to the longest of the batch: padding costs and gives nothing."""
    for compiled in (False, True):
        policy, sampler = echo_policy("pi05_droid", compiled=compiled)
        example = policy.example_observation(np.random.default_rng(0))
        policy.infer_batch([example | {"prompt": "pick"}, example | {"prompt": "pick up the red cup"}])
        lengths = [len(policy._processor.prepare(example | {"prompt": text}).prompt.ids) for text in ("pick", "pick up the red cup")]
        assert sampler.calls[0][0].tokens.shape == (2, policy._processor.bucket(max(lengths)) if compiled else max(lengths))


class TestBatch:
    def test_rows_are_single_calls(self) -> None:
        policy = load("pi05_droid", "pi05_orbax")
        calls = [golden_call(case) for case in POLICY_CASES if case.startswith("pi05_droid")]
        observations = [calls[0].observation, calls[1].observation | {"prompt": "pick up the red cup " * 8}, calls[2].observation]
        lengths = {len(policy._processor.prepare(row).prompt.ids) for row in observations}
        assert len(lengths) > 1
        noise = [call.noise for call in calls]
        for row, reply in enumerate(policy.infer_batch(observations, noise=noise)):
            single = policy.infer(observations[row], noise=noise[row])
            np.testing.assert_allclose(reply["actions"], single["actions"], atol=1e-5, rtol=0)

    def test_cameras_may_differ(self) -> None:
        policy = load("pi05_aloha", "pi05_orbax")
        calls = [golden_call("pi05_aloha__float_chw_missing_cams"), golden_call("pi05_aloha__full_uint8_224")]
        replies = policy.infer_batch([call.observation for call in calls], noise=np.stack([call.noise for call in calls]))
        for call, reply in zip(calls, replies, strict=True):
            np.testing.assert_allclose(reply["actions"], call.arrays["actions"], atol=2e-4, rtol=0)

    def test_nothing_in_nothing_out(self) -> None:
        policy, sampler = echo_policy("pi0_droid")
        assert policy.infer_batch([]) == []
        assert not sampler.calls

    def test_error_says_which_observation(self) -> None:
        policy, sampler = echo_policy("pi0_droid")
        good = policy.example_observation(np.random.default_rng(0))
        bad = {key: value for key, value in good.items() if key != "prompt"}
        with pytest.raises(ObservationError, match=r"^observation 1 of the batch of 3: prompt: missing"):
            policy.infer_batch([good, bad, good])
        with pytest.raises(PromptTooLongError, match=r"^observation 0 of the batch of 2: prompt: has"):
            policy.infer_batch([good | {"prompt": "go " * 100}, good])
        with pytest.raises(ObservationError, match=r"^prompt: missing"):
            policy.infer_batch([bad])
        assert not sampler.calls


class TestBatchSizes:
    """Compiled models are called with powers of two of rows, so that few programs serve every batch."""

    @staticmethod
    def called(compiled: bool, count: int, *, max_batch: int | None = None) -> list[int]:
        """Rows of the model calls that ``count`` observations make."""
        policy, sampler = echo_policy("pi0_droid", compiled=compiled)
        if max_batch is not None:
            policy.warmup(max_batch=max_batch)
            sampler.calls.clear()
        assert len(policy.infer_batch([policy.example_observation(np.random.default_rng(0))] * count)) == count
        assert all(len(array) == len(noise) for inputs, noise in sampler.calls for array in vars(inputs).values())
        return [len(noise) for _, noise in sampler.calls]

    @pytest.mark.parametrize(("count", "rows"), [(1, [1]), (2, [2]), (3, [4]), (4, [4]), (5, [8]), (9, [16])])
    def test_compiled(self, count: int, rows: list[int]) -> None:
        assert self.called(True, count) == rows

    @pytest.mark.parametrize(
        ("max_batch", "count", "rows"),
        [(1, 1, [1]), (1, 3, [1, 1, 1]), (3, 3, [4]), (4, 5, [4, 1]), (4, 11, [4, 4, 4]), (6, 6, [8]), (8, 13, [8, 8])],
    )
    def test_compiled_and_warmed_up(self, max_batch: int, count: int, rows: list[int]) -> None:
        assert self.called(True, count, max_batch=max_batch) == rows

    def test_eager_computes_nothing_that_was_not_asked_for(self) -> None:
        assert [self.called(False, count, max_batch=1) for count in (1, 3, 5)] == [[1], [3], [5]]

    def test_more_than_the_largest(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("action.policy.MAX_BATCH", 4)
        assert self.called(False, 9) == [4, 4, 1]
        assert self.called(True, 7) == [4, 4]
        assert self.called(True, 9, max_batch=100) == [4, 4, 1]

    def test_noise_and_replies_do_not_depend_on_the_filling(self) -> None:
        for compiled in (False, True):
            policy, sampler = echo_policy("pi0_droid", compiled=compiled)
            observations = [policy.example_observation(np.random.default_rng(row)) for row in range(5)]
            together = policy.infer_batch(observations, seeds=range(5))
            drawn = np.concatenate([noise for _, noise in sampler.calls])
            for row, reply in enumerate(together):
                np.testing.assert_array_equal(drawn[row], np.random.default_rng(row).standard_normal((10, 32), np.float32))
                np.testing.assert_array_equal(reply["actions"], policy.infer(observations[row], seed=row)["actions"])

    def test_rows_that_fill_up_are_the_last_one(self) -> None:
        policy, sampler = echo_policy("pi0_droid", compiled=True)
        policy.infer_batch([policy.example_observation(np.random.default_rng(row)) for row in range(5)], seeds=range(5))
        ((inputs, noise),) = sampler.calls
        for array in (*vars(inputs).values(), noise):
            np.testing.assert_array_equal(array[5:], np.stack([array[4]] * 3))
            assert not np.array_equal(inputs.images[3], inputs.images[4])

    def test_each_model_call_has_the_prompt_length_of_its_own_rows(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("action.policy.MAX_BATCH", 2)
        policy, sampler = echo_policy("pi0_droid")
        short = policy.example_observation(np.random.default_rng(0)) | {"prompt": "go"}
        policy.infer_batch([short, short, short | {"prompt": "go " * 20}])
        assert [inputs.tokens.shape for inputs, _ in sampler.calls] == [(2, 4), (1, 42)]

    def test_nothing_is_compiled_after_warmup(self, monkeypatch: pytest.MonkeyPatch) -> None:
        graphs: list[torch.fx.GraphModule] = []

        def backend(graph: torch.fx.GraphModule, example_inputs: list[torch.Tensor]) -> Callable[..., Any]:
            graphs.append(graph)
            return graph.forward

        torch_compile = torch.compile
        monkeypatch.setattr(torch, "compile", lambda function, *, mode, **options: torch_compile(function, backend=backend, **options))
        torch.compiler.reset()
        policy = load.__wrapped__("pi0_aloha", "pi0_orbax", num_steps=2, compile_mode="default")
        eager = load("pi0_aloha", "pi0_orbax", num_steps=2)
        policy.warmup(max_batch=3)
        assert len(graphs) == 2 * len({1, 2, 4}) * len({16, 48}), "a prefix and a step for each batch size and prompt length"
        graphs.clear()
        whole = policy.example_observation(np.random.default_rng(0))
        cameras = list(whole["images"])
        observations = [
            whole | {"prompt": "go " * words, "images": {name: whole["images"][name] for name in cameras[:count]}, "state": whole["state"] * row / 5}
            for row, (words, count) in enumerate([(1, 1), (20, 2), (3, 4), (1, 3), (20, 1)])
        ]
        for count in (1, 2, 3, 4, 5):
            replies = policy.infer_batch(observations[:count], seeds=range(count))
            for row, reply in enumerate(replies):
                np.testing.assert_allclose(reply["actions"], eager.infer(observations[row], seed=row)["actions"], atol=1e-5, rtol=0)
        assert graphs == []
        policy._max_rows = 8
        policy.infer_batch(observations)
        assert len(graphs) == 2, "the counter must see compilations"
        torch.compiler.reset()

    @pytest.mark.parametrize(("config", "checkpoint"), [("pi0_droid", "pi0_orbax"), ("pi05_droid", "pi05_orbax")])
    @pytest.mark.parametrize("count", [3, 5])
    def test_a_filled_batch_is_its_rows(self, config: str, checkpoint: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
        policy = load(config, checkpoint)
        observations = [policy.example_observation(np.random.default_rng(row)) | {"prompt": "go " * (row * 5 + 1)} for row in range(count)]
        alone = [policy.infer(observation, seed=row)["actions"] for row, observation in enumerate(observations)]
        for filled in (False, True):
            monkeypatch.setattr(policy, "_compiled", filled)
            for reply, expected in zip(policy.infer_batch(observations, seeds=range(count)), alone, strict=True):
                np.testing.assert_allclose(reply["actions"], expected, atol=1e-5, rtol=0)


class TestNoise:
    def test_seed_is_deterministic_and_written_down(self) -> None:
        policy, sampler = echo_policy("pi0_droid")
        observation = policy.example_observation(np.random.default_rng(0))
        first, again, other = (policy.infer(observation, seed=seed)["actions"] for seed in (7, 7, 8))
        np.testing.assert_array_equal(first, again)
        assert not np.array_equal(first, other)
        np.testing.assert_array_equal(sampler.calls[0][1], np.random.default_rng(7).standard_normal((10, 32), np.float32)[None])

    def test_batch_seeds_are_single_seeds(self) -> None:
        policy, sampler = echo_policy("pi0_droid")
        observation = policy.example_observation(np.random.default_rng(0))
        policy.infer_batch([observation] * 2, seeds=[7, 8])
        for row, seed in enumerate((7, 8)):
            policy.infer(observation, seed=seed)
            np.testing.assert_array_equal(sampler.calls[0][1][row], sampler.calls[-1][1][0])

    def test_fresh_without_either(self) -> None:
        policy, sampler = echo_policy("pi0_droid")
        observation = policy.example_observation(np.random.default_rng(0))
        policy.infer(observation)
        policy.infer_batch([observation, observation])
        drawn = [row for _, noise in sampler.calls for row in noise]
        assert len(drawn) == 3
        assert not np.array_equal(drawn[0], drawn[1])
        assert not np.array_equal(drawn[1], drawn[2])

    def test_shapes(self) -> None:
        policy, _ = echo_policy("pi0_droid")
        observation = policy.example_observation(np.random.default_rng(0))
        noise = np.random.default_rng(0).normal(size=(10, 32))
        replies = [policy.infer(observation, noise=given)["actions"] for given in (noise, noise[None], noise.astype(np.float32))]
        np.testing.assert_array_equal(replies[0], replies[1])
        np.testing.assert_array_equal(replies[0], replies[2])

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"noise": np.zeros((10, 32)), "seed": 1}, "noise and seed were both given; give one of them"),
            ({"noise": np.zeros((9, 32))}, "noise: got shape [9, 32] and dtype float64, expected [10, 32] floats (horizon, action_dim)"),
            ({"noise": np.zeros((2, 10, 32))}, "noise: got shape [2, 10, 32] and dtype float64, expected [10, 32] floats (horizon, action_dim)"),
            ({"noise": np.zeros((10, 32), int)}, "noise: got shape [10, 32] and dtype int64, expected [10, 32] floats (horizon, action_dim)"),
        ],
    )
    def test_misuse(self, arguments: dict[str, Any], message: str) -> None:
        policy, _ = echo_policy("pi0_droid")
        with pytest.raises(ValueError) as caught:  # noqa: PT011 - the whole message is compared
            policy.infer(policy.example_observation(np.random.default_rng(0)), **arguments)
        assert str(caught.value) == message

    def test_batch_misuse(self) -> None:
        policy, _ = echo_policy("pi0_droid")
        observation = policy.example_observation(np.random.default_rng(0))
        with pytest.raises(ValueError, match=r"^1 seeds for 2 observations; give one for each$"):
            policy.infer_batch([observation] * 2, seeds=[1])
        with pytest.raises(ValueError, match=r"^noise for 10 observations, but there are 2; give one \[H, A\] array for each$"):
            policy.infer_batch([observation] * 2, noise=np.zeros((10, 32)))


class TestReply:
    @pytest.mark.parametrize("name", ["pi0_aloha", "pi05_droid", "pi05_libero"])
    def test_the_observation_is_not_modified(self, name: str) -> None:
        policy, _ = echo_policy(name)
        observation = policy.example_observation(np.random.default_rng(0))
        untouched = policy.example_observation(np.random.default_rng(0))
        for value in (*observation.values(), *observation.get("images", {}).values()):
            if isinstance(value, np.ndarray):
                value.flags.writeable = False
        policy.infer(observation, seed=0)
        np.testing.assert_equal(observation, untouched)

    def test_a_cut_prompt_is_flagged(self) -> None:
        policy, _ = echo_policy("pi0_droid", on_long_prompt="truncate")
        observation = policy.example_observation(np.random.default_rng(0))
        replies = policy.infer_batch([observation, observation | {"prompt": "go " * 100}])
        assert [reply.get("prompt_truncated") for reply in replies] == [None, True]

    def test_every_array_starts_with_the_horizon(self) -> None:
        policy, _ = echo_policy("pi05_libero", on_long_prompt="truncate")
        reply = policy.infer(policy.example_observation(np.random.default_rng(0)) | {"prompt": "go " * 300})
        assert [key for key, value in reply.items() if isinstance(value, np.ndarray)] == ["actions"]
        assert len(reply["actions"]) == policy.config.action_horizon

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_actions_that_are_not_finite_never_reach_a_robot(self, value: float) -> None:
        policy, _ = echo_policy("pi0_droid")
        noise = np.zeros((10, 32), np.float32)
        noise[3, 2] = value
        with pytest.raises(PolicyError) as caught:
            policy.infer(policy.example_observation(np.random.default_rng(0)), noise=noise)
        assert str(caught.value) == "1 of 80 action values are NaN or infinite; check the checkpoint's weights and norm stats"

    def test_the_batch_goes_to_the_model_in_its_types(self) -> None:
        policy, sampler = echo_policy("pi05_aloha")
        example = policy.example_observation(np.random.default_rng(0))
        policy.infer_batch([example] * 2)
        length = len(policy._processor.prepare(example).prompt.ids)
        inputs: ModelInput = sampler.calls[0][0]
        shapes = {name: (array.shape, str(array.dtype)) for name, array in vars(inputs).items()}
        assert shapes == {
            "images": ((2, 3, 224, 224, 3), "uint8"),
            "image_masks": ((2, 3), "bool"),
            "tokens": ((2, length), "int32"),
            "token_mask": ((2, length), "bool"),
            "state": ((2, 32), "float32"),
        }


class TestMetadata:
    def test_aloha(self) -> None:
        policy, _ = echo_policy("pi0_aloha")
        assert set(policy.metadata) == {"reset_pose", "image_specs", "action_horizon"}
        assert policy.metadata["reset_pose"] == [0, -1.5, 1.5, 0, 0, 0]
        assert policy.metadata["action_horizon"] == 50
        assert policy.metadata["image_specs"][0] == {"path": ["images", "cam_high"], "target_shape": [3, 224, 224], "dtype": "uint8"}

    @pytest.mark.parametrize("name", CONFIGS)
    def test_is_plain_data(self, name: str) -> None:
        policy, _ = echo_policy(name)
        assert json.loads(json.dumps(policy.metadata)) == policy.metadata

    def test_is_a_copy(self) -> None:
        policy, _ = echo_policy("pi0_aloha")
        policy.metadata["reset_pose"].append("changed")
        policy.metadata["image_specs"].clear()
        assert policy.metadata["reset_pose"] == [0, -1.5, 1.5, 0, 0, 0]
        assert len(policy.metadata["image_specs"]) == 4

    def test_default_prompt(self) -> None:
        assert echo_policy("pi0_droid")[0].default_prompt is None
        assert echo_policy("pi0_aloha_sim")[0].default_prompt == "Transfer cube"
        assert echo_policy("pi0_aloha_sim", default_prompt="stack")[0].default_prompt == "stack"


class TestWarmup:
    def test_runs_the_lengths_that_requests_need(self) -> None:
        policy, sampler = echo_policy("pi05_aloha", compiled=True)
        policy.warmup()
        assert [inputs.tokens.shape for inputs, _ in sampler.calls] == [(1, length) for length in (48, 112, 200)]

    def test_runs_once_where_nothing_is_compiled(self) -> None:
        policy, sampler = echo_policy("pi05_aloha")
        policy.warmup()
        assert [inputs.tokens.shape[0] for inputs, _ in sampler.calls] == [1]

    def test_runs_the_batch_sizes_that_requests_need(self) -> None:
        policy, sampler = echo_policy("pi0_droid", compiled=True)
        policy.warmup(max_batch=5)
        assert [inputs.tokens.shape for inputs, _ in sampler.calls] == [(rows, length) for rows in (1, 2, 4, 8) for length in (16, 48)]
        eager, sampler = echo_policy("pi0_droid")
        eager.warmup(max_batch=5)
        assert [len(noise) for _, noise in sampler.calls] == [1]

    def test_no_batch_at_all_is_a_mistake(self) -> None:
        with pytest.raises(ValueError, match=r"^max_batch is 0, expected at least 1$"):
            echo_policy("pi0_droid")[0].warmup(max_batch=0)

    def test_on_a_real_model(self) -> None:
        load("pi0_droid", "pi0_orbax").warmup()


class TestPreview:
    def test_is_what_a_request_gives_the_model(self) -> None:
        policy, sampler = echo_policy("pi0_droid")
        preview = policy.preview_prompt("  Pick_up the\ncup ")
        assert preview["text"] == "Pick up the cup\n"
        policy.infer(policy.example_observation(np.random.default_rng(0)) | {"prompt": "  Pick_up the\ncup "})
        inputs = sampler.calls[0][0]
        assert preview["token_ids"] == inputs.tokens[0][inputs.token_mask[0]].tolist()
        assert (preview["tokens"], preview["max_tokens"], preview["not_fitting"]) == (len(preview["token_ids"]), 48, "")

    def test_pi05_shows_the_widest_state(self) -> None:
        policy, _ = echo_policy("pi05_droid")
        preview = policy.preview_prompt("pick up the cup")
        assert preview["text"] == f"Task: pick up the cup, State: {' '.join(['255'] * 8)};\nAction: "
        assert preview["max_tokens"] == 200
        rng = np.random.default_rng(0)
        for _ in range(50):
            prompt = policy._processor.prepare(policy.example_observation(rng) | {"prompt": "pick up the cup"}).prompt
            assert prompt.needed <= preview["tokens"]

    def test_what_does_not_fit(self) -> None:
        policy, _ = echo_policy("pi0_droid")
        task = "pick up the cup " * 20
        preview = policy.preview_prompt(task)
        assert preview["tokens"] == len(preview["token_ids"]) > preview["max_tokens"] == 48
        assert preview["not_fitting"] and preview["text"].endswith(preview["not_fitting"])
        with pytest.raises(PromptTooLongError, match=f"has {preview['tokens']} tokens"):
            policy.infer(policy.example_observation(np.random.default_rng(0)) | {"prompt": task})

    @pytest.mark.parametrize("name", ["pi0_droid", "pi05_libero"])
    def test_is_a_prompt_preview_for_json(self, name: str) -> None:
        policy, sampler = echo_policy(name)
        assert isinstance(policy, PromptPreview) and isinstance(policy, Warmable)
        preview = policy.preview_prompt("pick up the cup")
        assert json.loads(json.dumps(preview)) == preview
        assert set(preview) == {"text", "token_ids", "tokens", "max_tokens", "not_fitting"}
        assert not sampler.calls


class TestLoad:
    @pytest.mark.parametrize(
        ("config", "checkpoint", "message"),
        [
            ("pi05_droid", "pi0_orbax", "config 'pi05_droid' is for a pi05 model, but the checkpoint {root} is a pi0 one; use a pi0 config"),
            ("pi0_droid", "pi05_pytorch", "config 'pi0_droid' is for a pi0 model, but the checkpoint {root} is a pi05 one; use a pi05 config"),
        ],
    )
    def test_model_of_the_other_kind(self, config: str, checkpoint: str, message: str) -> None:
        with pytest.raises(CheckpointError) as caught:
            load(config, checkpoint)
        assert str(caught.value) == message.format(root=CHECKPOINTS / checkpoint)

    def test_no_norm_stats(self) -> None:
        with pytest.raises(CheckpointError, match=r"^no norm stats for asset 'trossen': .* \(assets in this checkpoint: droid\)"):
            load("pi05_aloha", "pi05_orbax_bf16_sharded")

    def test_norm_stats_without_quantiles(self, tmp_path: Path) -> None:
        shutil.copytree(CHECKPOINTS / "pi05_orbax" / "assets", tmp_path / "assets", copy_function=shutil.copyfile)
        stats = tmp_path / "assets" / "droid" / "norm_stats.json"
        entry = {"mean": [0.0] * 8, "std": [1.0] * 8}
        stats.write_text(json.dumps({"norm_stats": {"state": entry, "actions": entry}}))
        with pytest.raises(CheckpointError, match="q01 and q99 are required"):
            ActionPolicy.load("pi05_droid", tmp_path, tokenizer=TOKENIZER)

    def test_no_weights(self, tmp_path: Path) -> None:
        shutil.copytree(CHECKPOINTS / "pi05_orbax" / "assets", tmp_path / "assets", copy_function=shutil.copyfile)
        with pytest.raises(CheckpointError):
            ActionPolicy.load("pi05_droid", tmp_path, tokenizer=TOKENIZER)

    def test_tokenizer_beside_the_checkpoint(self, tmp_path: Path) -> None:
        for part in ("params", "assets"):
            (tmp_path / part).symlink_to(CHECKPOINTS / "pi0_orbax" / part)
        shutil.copyfile(TOKENIZER, tmp_path / TOKENIZER.name)
        call = golden_call("pi0_droid__hwc_uint8")
        policy = ActionPolicy.load("pi0_droid", str(tmp_path), dtype=torch.float32, device="cpu")
        np.testing.assert_allclose(policy.infer(call.observation, noise=call.noise)["actions"], call.arrays["actions"], atol=2e-4, rtol=0)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"model_config_name": "pi06_droid"}, "action.model_config_name: there is no config 'pi06_droid'; did you mean 'pi0_droid'?"),
            ({"dtype": "float16"}, "action.dtype: got 'float16', expected one of float32, bfloat16"),
            ({"dtype": torch.float64}, "action.dtype: got torch.float64, expected one of float32, bfloat16"),
            ({"device": "gpu"}, "action.device: 'gpu' is not a device of PyTorch; expected cpu, cuda or cuda:<index>"),
            ({"num_steps": 0}, "action.num_steps: got 0, expected at least 1"),
            (
                {"compile_mode": "fast"},
                "compile mode: got 'fast', expected None (eager), auto, or one of default, reduce-overhead, max-autotune, max-autotune-no-cudagraphs",
            ),
        ],
    )
    def test_bad_settings(self, arguments: dict[str, Any], message: str) -> None:
        good: dict[str, Any] = {"model_config_name": "pi0_droid", "checkpoint_dir": CHECKPOINTS / "pi0_orbax", "tokenizer": TOKENIZER}
        with pytest.raises(ConfigError) as caught:
            ActionPolicy.load(**good | arguments)
        assert str(caught.value) == message

    def test_cuda_index_that_is_not_there(self) -> None:
        with pytest.raises(ConfigError, match=r"^action.device: 'cuda:63' is not there \(PyTorch sees \d+ CUDA devices\)"):
            ActionPolicy.load("pi0_droid", CHECKPOINTS / "pi0_orbax", tokenizer=TOKENIZER, device="cuda:63")

    def test_tokenizer_of_a_larger_vocabulary(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("action.policy.PromptTokenizer", _WideTokenizer)
        with pytest.raises(CheckpointError) as caught:
            ActionPolicy.load("pi0_droid", CHECKPOINTS / "pi0_orbax", tokenizer=TOKENIZER, device="cpu")
        assert str(caught.value) == (
            f"tokenizer {TOKENIZER} has 257152 tokens, but the model embeds 1024; give the tokenizer that the checkpoint was trained with"
        )

    def test_defaults_on_this_machine(self) -> None:
        policy = ActionPolicy.load("pi0_droid", CHECKPOINTS / "pi0_orbax", tokenizer=TOKENIZER)
        call = golden_call("pi0_droid__hwc_uint8")
        actions = policy.infer(call.observation, noise=call.noise)["actions"]
        limit = 0.15 if torch.cuda.is_available() else 2e-4
        np.testing.assert_allclose(actions, call.arrays["actions"], atol=limit, rtol=0)


class _WideTokenizer:
    vocab_size = 257152

    def __init__(self, path: Path) -> None:
        self.path = path


def test_bad_observation_leaves_the_policy_usable() -> None:
    policy = load("pi0_droid", "pi0_orbax")
    call = golden_call("pi0_droid__hwc_uint8")
    with pytest.raises(ObservationError):
        policy.infer({"prompt": "only"})
    np.testing.assert_allclose(policy.infer(call.observation, noise=call.noise)["actions"], call.arrays["actions"], atol=2e-4, rtol=0)


def test_fulfils_the_contract_of_a_policy() -> None:
    assert isinstance(echo_policy("pi0_droid")[0], Policy)


def test_package_exports() -> None:
    assert action.ActionPolicy is ActionPolicy
    assert set(action.__all__) == {"CONFIGS", "ActionPolicy", "PolicyConfig", "get_config", "set_num_threads"}
    with pytest.raises(AttributeError, match="has no attribute 'FastPolicy'"):
        _ = action.FastPolicy


def test_paligemma_diffusion_droid_takes_the_width_of_its_checkpoint() -> None:
    assert processor("paligemma_diffusion_droid").prepare(CONFIGS["pi0_droid"].embodiment.example(np.random.default_rng(0))).model_state.shape == (
        32,
    )
