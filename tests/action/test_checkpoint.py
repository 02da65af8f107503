"""Loading: every format gives the same weights, and whatever is wrong with a checkpoint is said in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from action.checkpoint import load_model, open_checkpoint
from pi0.errors import CheckpointError
from tests.action.synthetic import CPU, ODD_DIMS, PI0_CHECKPOINTS, PI05_CHECKPOINTS, head_counts, random_weights, write_safetensors
from tests.golden_data import CHECKPOINTS
from tests.pi0.orbax_files import random_tree, write_orbax

DIMS = ODD_DIMS["pi05, grouped heads"]
PI0_DIMS = ODD_DIMS["pi0, one layer"]
EXPERT = "paligemma_with_expert.gemma_expert.model"
TEXT = "paligemma_with_expert.paligemma.model.language_model"
TOWER = "paligemma_with_expert.paligemma.model.vision_tower.vision_model"

Weights = dict[str, Tensor]


def load(path: Path, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return dict(load_model(path, dtype=dtype, device=CPU).named_parameters())


@pytest.mark.parametrize("paths", [PI05_CHECKPOINTS, PI0_CHECKPOINTS], ids=["pi05", "pi0"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_format_gives_the_same_parameters(paths: tuple[Path, ...], dtype: torch.dtype) -> None:
    first, *others = (load(path, dtype) for path in paths)
    for other in others:
        assert other.keys() == first.keys()
        for name, parameter in first.items():
            torch.testing.assert_close(other[name], parameter, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("path", [*PI05_CHECKPOINTS, *PI0_CHECKPOINTS], ids=lambda path: path.name)
def test_dimensions_are_read_off_the_weights(path: Path) -> None:
    dims = open_checkpoint(path).dims
    facts = json.loads((path / "tiny_model.json").read_text())
    backbone, vision = dims.backbone, dims.backbone.vision
    assert (dims.kind, dims.action_dim, backbone.vocab_size) == (facts["model_type"], facts["action_dim"], facts["vocab_size"])
    assert facts["vlm"] == {
        "width": backbone.vlm.width,
        "depth": backbone.depth,
        "mlp_dim": backbone.vlm.mlp_dim,
        "num_heads": backbone.heads,
        "num_kv_heads": backbone.kv_heads,
        "head_dim": backbone.head_dim,
    }
    assert (facts["action_expert"]["width"], facts["action_expert"]["mlp_dim"]) == (dims.expert.width, dims.expert.mlp_dim)
    assert {key: facts["siglip"][key] for key in ("width", "depth", "mlp_dim", "num_heads", "patch_size")} == {
        "width": vision.width,
        "depth": vision.depth,
        "mlp_dim": vision.mlp_dim,
        "num_heads": vision.heads,
        "patch_size": vision.patch,
    }


def test_the_params_directory_itself_is_a_checkpoint() -> None:
    root, params = (load(path) for path in (CHECKPOINTS / "pi0_orbax", CHECKPOINTS / "pi0_orbax" / "params"))
    for name, parameter in root.items():
        torch.testing.assert_close(params[name], parameter, rtol=0, atol=0)


@pytest.mark.parametrize("name", ODD_DIMS)
def test_both_kinds_of_file_give_the_dimensions_they_were_written_with(name: str, tmp_path: Path) -> None:
    dims = ODD_DIMS[name]
    write_orbax(tmp_path / "orbax" / "params", random_tree(dims))
    write_safetensors(tmp_path / "torch", random_weights(dims), head_counts(dims))
    assert open_checkpoint(tmp_path / "orbax").dims == open_checkpoint(tmp_path / "torch").dims == dims


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float64])
def test_every_floating_point_dtype_loads(stored: torch.dtype, tmp_path: Path) -> None:
    weights = {name: tensor.to(stored) for name, tensor in random_weights(PI0_DIMS).items()}
    model = load_model(write_safetensors(tmp_path, weights, head_counts(PI0_DIMS)), dtype=torch.float32, device=CPU)
    slots = {name: slot for name, slot in model.slots().items() if not slot.is_meta}
    assert slots.keys() < weights.keys()
    for name, slot in slots.items():
        torch.testing.assert_close(slot, weights[name].float(), rtol=0, atol=0)


def test_the_last_prefix_layer_keeps_its_keys_and_values_only(tmp_path: Path) -> None:
    model = load_model(write_safetensors(tmp_path, random_weights(DIMS), head_counts(DIMS)), dtype=torch.float32, device=CPU)
    last = f"{TEXT}.layers.{DIMS.backbone.depth - 1}"
    unread = {name for name, slot in model.slots().items() if slot.is_meta}
    assert unread == {f"{TEXT}.norm.weight", f"{last}.post_attention_layernorm.weight"} | {
        f"{last}.{name}.weight" for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    }


def renamed(old: str, new: str) -> Callable[[Weights], None]:
    def change(weights: Weights) -> None:
        for name in [name for name in weights if name.startswith(old)]:
            weights[new + name.removeprefix(old)] = weights.pop(name)

    return change


def extended(**tensors: tuple[int, ...]) -> Callable[[Weights], None]:
    return lambda weights: weights.update({name: torch.zeros(shape) for name, shape in tensors.items()})


def reshaped(name: str, *shape: int) -> Callable[[Weights], None]:
    return extended(**{name: shape})


def without(prefix: str) -> Callable[[Weights], None]:
    def change(weights: Weights) -> None:
        names = [name for name in weights if name.startswith(prefix)]
        assert names
        for name in names:
            del weights[name]

    return change


def tied_head(weights: Weights) -> None:
    weights["paligemma_with_expert.paligemma.lm_head.weight"] = weights.pop(f"{TEXT}.embed_tokens.weight")


def other_head(weights: Weights) -> None:
    weights["paligemma_with_expert.paligemma.lm_head.weight"] = weights[f"{TEXT}.embed_tokens.weight"] + 1


ALIASES: dict[str, tuple[str, Callable[[Weights], None]]] = {
    "leading model.": ("pi05", renamed("", "model.")),
    "embedding as tied head": ("pi05", tied_head),
    "embedding and another head": ("pi05", other_head),
    "unused expert head": ("pi05", extended(**{"paligemma_with_expert.gemma_expert.lm_head.weight": (77, 26)})),
    "pi0's name for the time MLP": ("pi05", renamed("time_mlp", "action_time_mlp")),
    "pi0.5's name for the time MLP": ("pi0", renamed("action_time_mlp", "time_mlp")),
    "left-over state projection": ("pi05", extended(**{"state_proj.weight": (26, 7), "state_proj.bias": (26,)})),
    "left-over plain norms": ("pi05", extended(**{f"{EXPERT}.layers.1.input_layernorm.weight": (26,), f"{EXPERT}.norm.weight": (26,)})),
}


@pytest.mark.parametrize("name", ALIASES)
def test_lerobot_spellings_load_the_same(name: str, tmp_path: Path) -> None:
    kind, change = ALIASES[name]
    dims = DIMS if kind == "pi05" else PI0_DIMS
    weights = random_weights(dims)
    expected = load(write_safetensors(tmp_path / "plain", weights, head_counts(dims)))
    change(weights)
    found = load(write_safetensors(tmp_path / "alias", weights, head_counts(dims)))
    for parameter, value in expected.items():
        torch.testing.assert_close(found[parameter], value, rtol=0, atol=0, msg=parameter)


def test_what_is_left_out_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights = random_weights(DIMS)
    ALIASES["left-over state projection"][1](weights)
    with caplog.at_level("INFO"):
        load(write_safetensors(tmp_path, weights, head_counts(DIMS)))
    assert "left out 2 tensors that pi0.5 does not have: state_proj.bias, state_proj.weight" in caplog.text


BAD_WEIGHTS: dict[str, tuple[Callable[[Weights], None], str]] = {
    "missing tensor": (without(f"{EXPERT}.layers.1.mlp.down_proj"), rf"missing \(1\): {EXPERT}.layers.1.mlp.down_proj.weight$"),
    "missing layer": (without(f"{TEXT}.layers.1."), r"missing \(9\): "),
    "missing first layer": (without(f"{TEXT}.layers.0."), rf"has no tensor {TEXT}.layers.0.self_attn.q_proj.weight"),
    "missing embedding": (without(f"{TEXT}.embed_tokens"), rf"has no tensor {TEXT}.embed_tokens.weight"),
    "missing time MLP": (without("time_mlp_out"), r"missing \(2\): time_mlp_out.bias, time_mlp_out.weight$"),
    "missing norm of the last layer": (
        without(f"{TEXT}.layers.2.post_attention_layernorm"),
        rf"missing \(1\): {TEXT}.layers.2.post_attention_layernorm.weight$",
    ),
    "extra tensor": (extended(extra=(2,)), r"unexpected \(1\): extra$"),
    "PEFT adapter": (
        extended(**{f"{EXPERT}.layers.0.self_attn.q_proj.lora_A.weight": (2, 26)}),
        rf"unexpected \(1\): {EXPERT}.layers.0.self_attn.q_proj.lora_A.weight$",
    ),
    "wrong shape": (reshaped("action_out_proj.weight", 26, 7), r"wrong shape \(1\): action_out_proj.weight is \(26, 7\), expected \(7, 26\)$"),
    "wrong shape of a tensor that is never read": (
        reshaped(f"{TEXT}.norm.weight", 35),
        rf"wrong shape \(1\): {TEXT}.norm.weight is \(35,\), expected \(36,\)$",
    ),
    "wrong rank": (reshaped("action_in_proj.weight", 26), r"tensor action_in_proj.weight of .* has shape \[26\], expected 2 axes"),
    "empty tensor": (reshaped(f"{TEXT}.embed_tokens.weight", 0, 36), r"has shape \[0, 36\], expected 2 axes, none of them empty"),
    "positions of another image size": (
        reshaped(f"{TOWER}.embeddings.position_embedding.weight", 50, 40),
        "has 50 positions, but 32-pixel patches of a 224×224 image are 49; only 224-pixel towers are supported",
    ),
    "proprioceptive memory": (
        extended(**{"proprio_history_proj.weight": (36, 7), "proprio_history_proj.bias": (36,)}),
        r"uses LeRobot's proprioceptive memory \(proprio_history_proj.bias, proprio_history_proj.weight\), which is not supported",
    ),
    "the same name twice": (extended(**{"model.action_in_proj.bias": (26,)}), "holds action_in_proj.bias twice"),
    "no action expert": (without(EXPERT), rf"is not a pi0 or pi0.5 model: neither {EXPERT}.norm.weight nor .norm.dense.weight is among its"),
    "whole numbers": (
        lambda weights: weights.update({"action_in_proj.bias": torch.zeros(26, dtype=torch.int8)}),
        "tensor action_in_proj.bias of .* is I8, expected one of F16, BF16, F32, F64",
    ),
}


@pytest.mark.parametrize("name", BAD_WEIGHTS)
def test_wrong_tensors_are_listed(name: str, tmp_path: Path) -> None:
    change, message = BAD_WEIGHTS[name]
    weights = random_weights(DIMS)
    change(weights)
    write_safetensors(tmp_path, weights, head_counts(DIMS))
    with pytest.raises(CheckpointError, match=message) as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


def heads(**changes: Any) -> dict[str, Any]:
    declared = head_counts(DIMS)
    return {part: {**declared[part], **changes.get(part, {})} for part in declared}


BAD_SIDE_FILES: dict[str, tuple[str, str, str]] = {
    "no JSON": ("model_dims.json", "{", r"model_dims.json is not JSON: "),
    "no object": ("model_dims.json", "[]", r"model_dims.json holds a list, expected a JSON object"),
    "heads that do not fit": (
        "model_dims.json",
        json.dumps(heads(vlm={"head_dim": 12})),
        "vlm has 6 heads and 2 kv heads of 12, but the weights have 60 query and 20 key features",
    ),
    "vision heads that do not divide": (
        "model_dims.json",
        json.dumps(heads(vlm={"num_heads": 3, "num_kv_heads": 1, "head_dim": 20}) | {"siglip": {"num_heads": 7}}),
        "7 vision heads do not divide the tower's 30 query features",
    ),
    "a count that is no number": (
        "model_dims.json",
        json.dumps(heads(siglip={"num_heads": "5"})),
        "siglip.num_heads is '5', expected a positive whole number",
    ),
    "a missing count": ("model_dims.json", '{"vlm": {"num_heads": 6}}', "vlm.num_kv_heads is None, expected a positive whole number"),
    "a part that is no object": ("model_dims.json", '{"vlm": 6}', "vlm.num_heads is None, expected a positive whole number"),
    "no vision heads": (
        "model_dims.json",
        json.dumps({"vlm": head_counts(DIMS)["vlm"]}),
        r'write {"siglip": {"num_heads": "…"}} to .*/model_dims.json$',
    ),
    "another LeRobot policy": ("config.json", '{"type": "act"}', r"says type 'act', but the weights .* pi05 model; supported types are pi0, pi05$"),
    "another time embedding": ("config.json", '{"type": "pi05", "max_period": 8.0}', r"says max_period 8.0; only models with 4.0 are supported"),
    "the other LeRobot policy": ("config.json", '{"type": "pi0"}', "says type 'pi0', but the weights beside it are those of a pi05 model"),
    "a broken config": ("config.json", "type: pi05", "config.json is not JSON"),
}


@pytest.mark.parametrize("name", BAD_SIDE_FILES)
def test_wrong_side_files_are_errors(name: str, tmp_path: Path) -> None:
    file, content, message = BAD_SIDE_FILES[name]
    write_safetensors(tmp_path, random_weights(DIMS), head_counts(DIMS))
    (tmp_path / file).write_text(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


def test_head_counts_that_shapes_cannot_tell_have_to_be_said(tmp_path: Path) -> None:
    write_safetensors(tmp_path, random_weights(DIMS), None)
    with pytest.raises(CheckpointError, match=r"vision tower of width 40 is not in the file; write .* to .*/model_dims.json"):
        load(tmp_path)


def test_unknown_fields_of_a_config_are_ignored(tmp_path: Path) -> None:
    write_safetensors(tmp_path, random_weights(DIMS), head_counts(DIMS) | {"comment": "mine"})
    (tmp_path / "config.json").write_text('{"type": "pi05", "a_new_field": {"deep": [1]}}')
    load(tmp_path)


def test_a_truncated_or_foreign_file_is_damaged(tmp_path: Path) -> None:
    source = (CHECKPOINTS / "pi0_pytorch" / "model.safetensors").read_bytes()
    for content in (source[: len(source) // 2], source[:4], b"", b"PK\x03\x04" + bytes(100), source + b"tail"):
        (tmp_path / "model.safetensors").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"is damaged or not a safetensors file: .*; fetch it again$") as caught:
            load(tmp_path)
        assert "\n" not in str(caught.value)


def test_a_file_of_another_model_says_what_is_in_it(tmp_path: Path) -> None:
    save_file({"backbone.weight": torch.zeros(2)}, str(tmp_path / "model.safetensors"))
    with pytest.raises(CheckpointError, match=r"is not a pi0 or pi0.5 model: .* its 1 tensors \(backbone.weight, …\)$"):
        load(tmp_path)


def test_a_directory_without_a_checkpoint_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"expected model.safetensors .* or params/_METADATA \(JAX\), found nothing$"):
        load(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match=r"found pytorch_model.bin$"):
        load(tmp_path)
    with pytest.raises(CheckpointError, match=r"checkpoint directory .*/nowhere does not exist$"):
        load(tmp_path / "nowhere")


def _drop(tree: dict[str, Any]) -> None:
    del tree["time_mlp_in/bias"]


def _add(tree: dict[str, Any]) -> None:
    tree["state_proj/bias"] = np.zeros(26, np.float32)


def _misshape(tree: dict[str, Any]) -> None:
    tree["time_mlp_in/kernel"] = np.zeros((26, 25), np.float32)


def _integers(tree: dict[str, Any]) -> None:
    tree["time_mlp_in/bias"] = np.zeros(26, np.int32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop, r"missing \(1\): time_mlp_in/bias$"),
        (_add, r"unexpected \(1\): state_proj/bias$"),
        (_misshape, r"wrong shape \(1\): time_mlp_in/kernel is \(26, 25\), expected \(26, 26\)$"),
        (_integers, "leaf time_mlp_in/bias of .* is int32, expected one of float16, bfloat16, float32, float64$"),
    ],
)
def test_wrong_orbax_leaves_are_listed(change: Callable[[dict[str, Any]], None], message: str, tmp_path: Path) -> None:
    tree: dict[str, Any] = dict(random_tree(DIMS))
    change(tree)
    write_orbax(tmp_path / "params", tree)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


def test_safetensors_comes_before_orbax(tmp_path: Path) -> None:
    shutil.copytree(CHECKPOINTS / "pi05_orbax", tmp_path / "both")
    write_safetensors(tmp_path / "both", random_weights(PI0_DIMS), head_counts(PI0_DIMS))
    assert open_checkpoint(tmp_path / "both").dims == PI0_DIMS


def test_only_two_dtypes_are_offered() -> None:
    with pytest.raises(ValueError, match=r"dtype is torch.float16, expected one of torch.float32, torch.bfloat16"):
        load_model(PI0_CHECKPOINTS[0], dtype=torch.float16, device=CPU)


def test_the_golden_lerobot_file_has_both_names_of_the_embedding() -> None:
    """Else the alias tests above would be all that covers LeRobot's spelling."""
    names = load_file(str(CHECKPOINTS / "pi05_lerobot" / "model.safetensors")).keys()
    assert all(name.startswith("model.") for name in names)
    assert {f"model.{TEXT}.embed_tokens.weight", "model.paligemma_with_expert.paligemma.lm_head.weight"} <= set(names)
