from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest

from pi0.errors import CheckpointError
from pi0.param_tree import LAYERS, LLM, BackboneDims, ExpertDims, VisionDims, backbone_dims
from planner.restore import restore, restore_from
from tests.golden_data import CHECKPOINTS
from tests.pi0.orbax_files import write_orbax
from tests.planner.golden_planner import ALL_PIECES
from tests.planner.oracle import RandomParams

FLOAT32 = np.dtype(np.float32)
SMALL = BackboneDims(VisionDims(12, 2, 2, 6, 16, 56, 16), ExpertDims(20, 24), 64, 2, 4, 2, 6)
IDS = np.arange(64, dtype=np.int32)


def save_orbax(directory: Path, source: RandomParams, *, trailing_value: bool, extra: dict[str, Any] | None = None) -> None:
    tree: dict[str, Any] = {}
    for name, leaf in [*((name, source.read(name)) for name in source), *(extra or {}).items()]:
        *parents, last = [*name.split("/"), "value"] if trailing_value else name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    ocp.PyTreeCheckpointer().save(directory.absolute(), {"params": tree})


def assert_same(left: Any, right: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, left, right)


def test_all_stored_forms_give_the_same_weights() -> None:
    root = CHECKPOINTS / "pi05_orbax"
    expected, dims = restore(root, ALL_PIECES, FLOAT32)
    assert (dims.vlm.width, dims.depth, dims.heads, dims.kv_heads, dims.head_dim) == (96, 3, 6, 1, 16)
    assert_same(restore(root / "params", ALL_PIECES, FLOAT32)[0], expected)
    sharded, _ = restore(CHECKPOINTS / "pi05_orbax_bf16_sharded", ALL_PIECES, FLOAT32)
    assert_same(sharded, expected)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(sharded.language))


@pytest.mark.parametrize("trailing_value", [True, False])
def test_both_key_forms_and_unread_action_leaves(tmp_path: Path, trailing_value: bool) -> None:
    source = RandomParams(SMALL)
    # An action leaf with nonsense values: it must not even be looked at.
    action = {"action_in_proj/kernel": np.zeros((3, 3)), f"{LAYERS}/mlp_1/linear": np.zeros(1), f"{LLM}/final_norm_1/scale": np.zeros(2)}
    save_orbax(tmp_path / "params", source, trailing_value=trailing_value, extra=action)
    restored, dims = restore(tmp_path, IDS, FLOAT32)
    assert dims == SMALL
    assert_same(restored, restore_from(source, IDS, FLOAT32, where="memory")[0])


def test_weights_are_laid_out_for_the_products_that_use_them() -> None:
    source = RandomParams(SMALL)
    blocks = restore_from(source, IDS, FLOAT32, where="memory")[0].language.blocks
    q, kv = (source.read(f"{LAYERS}/attn/{name}/w") for name in ("q_einsum", "kv_einsum"))
    gating = source.read(f"{LAYERS}/mlp/gating_einsum")
    np.testing.assert_array_equal(blocks.qkv[1, :, 6:12], q[1, 1])
    np.testing.assert_array_equal(blocks.qkv[0, :, 24:30], kv[0, 0, 0])
    np.testing.assert_array_equal(blocks.qkv[0, :, 42:48], kv[0, 1, 1])
    np.testing.assert_array_equal(blocks.gate, gating[:, 0])
    np.testing.assert_array_equal(blocks.up, gating[:, 1])


def test_the_head_holds_the_allowed_rows_only() -> None:
    ids = np.array([1, 5, 40], np.int32)
    params, _ = restore_from(RandomParams(SMALL), ids, FLOAT32, where="memory")
    np.testing.assert_array_equal(params.head, np.asarray(params.language.embedding)[ids])


@pytest.mark.parametrize("stored", ["pi05_orbax", "pi05_orbax_bf16_sharded"])
def test_every_weight_has_the_wanted_dtype(stored: str) -> None:
    params, _ = restore(CHECKPOINTS / stored, ALL_PIECES, np.dtype(jnp.bfloat16))
    leaves = [leaf for leaf in jax.tree.leaves(params) if leaf.dtype != jnp.int32]
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.bfloat16)}


def test_missing_unexpected_and_misshapen_leaves_are_all_listed() -> None:
    source = RandomParams(SMALL)
    shapes = source.shapes()
    del shapes[f"{LAYERS}/mlp/linear"]
    shapes["PaliGemma/llm/surprise"] = (3,)
    shapes[f"{LLM}/final_norm/scale"] = (21,)
    with pytest.raises(CheckpointError) as error:
        restore_from(source, IDS, FLOAT32, where="here")
    message = str(error.value)
    assert message.startswith("here")
    assert f"missing (1): {LAYERS}/mlp/linear" in message
    assert "unexpected (1): PaliGemma/llm/surprise" in message
    assert f"wrong shape (1): {LLM}/final_norm/scale is (21,), expected (20,)" in message


def test_a_leaf_that_fixes_a_dimension_is_named_when_it_is_missing() -> None:
    source = RandomParams(SMALL)
    del source.shapes()[f"{LLM}/embedder/input_embedding"]
    with pytest.raises(CheckpointError, match=r"^here: leaf PaliGemma/llm/embedder/input_embedding is missing"):
        restore_from(source, IDS, FLOAT32, where="here")


def test_a_tokenizer_larger_than_the_embedding_is_refused_before_anything_is_read() -> None:
    class Unread(RandomParams):
        def read(self, name: str, dtype: Any = None) -> Any:
            raise AssertionError(f"{name} was read")

    with pytest.raises(CheckpointError, match=r"the embedding has 64 rows, but the tokenizer has a token 64"):
        restore_from(Unread(SMALL), np.arange(65, dtype=np.int32), FLOAT32, where="here")
    with pytest.raises(CheckpointError, match=r"the embedding has 64 rows, but the tokenizer has a token 64"):
        restore_from(Unread(SMALL), IDS, FLOAT32, tokens=65, where="here")


def test_stored_dtypes_may_differ_from_leaf_to_leaf_but_are_all_floating_point(tmp_path: Path) -> None:
    source, dtypes = RandomParams(SMALL), (np.float16, ml_dtypes.bfloat16, np.float32, np.float64)
    tree = {name: source.read(name).astype(dtypes[index % 4]) for index, name in enumerate(source)}
    write_orbax(tmp_path / "mixed" / "params", tree)
    assert {leaf.dtype for leaf in jax.tree.leaves(restore(tmp_path / "mixed", IDS, FLOAT32)[0])} == {FLOAT32, np.dtype(np.int32)}
    name = f"{LAYERS}/mlp/linear"
    write_orbax(tmp_path / "quantised" / "params", tree | {name: tree[name].astype(np.int8)})
    with pytest.raises(CheckpointError, match=rf"leaf {name} of .* is int8, expected one of float16, bfloat16, float32, float64$"):
        restore(tmp_path / "quantised", IDS, FLOAT32)


def test_no_checkpoint_there_is_a_checkpoint_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no Orbax checkpoint"):
        restore(tmp_path, IDS, FLOAT32)


MEASURE = """
import re, sys
import numpy as np
import planner, jax, jax.numpy as jnp, tensorstore
from planner.restore import parameter_bytes, restore

def resident(field):
    with open("/proc/self/status") as status:
        return int(re.search(field + r":\\s+(\\d+) kB", status.read())[1]) * 1024

jax.block_until_ready(jnp.take(jnp.ones((4, 4)), jnp.arange(2), axis=0))
before = resident("VmRSS")
params, _ = restore(sys.argv[1], np.arange(2, 9000, dtype=np.int32), np.dtype(np.float32))
print((resident("VmHWM") - before) / parameter_bytes(params))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the process's memory from /proc, which only Linux has")
def test_peak_memory_while_loading_stays_near_the_weights(tmp_path: Path) -> None:
    # Leaves in the proportions of the real model: the largest one has two fifths of all weights.
    dims = BackboneDims(VisionDims(256, 6, 4, 64, 1024, 14, 256), ExpertDims(512, 4096), 16_384, 4, 8, 1, 64)
    source = RandomParams(dims)
    assert backbone_dims(source.shapes()) == dims
    save_orbax(tmp_path / "params", source, trailing_value=False)
    # Leaves this small stay in malloc's arenas after use; at real sizes they are mapped, and given back, one by one.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000", "JAX_PLATFORMS": "cpu"}
    measured = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)], env=environment, capture_output=True, text=True, check=True, timeout=120
    )
    assert 0.9 < float(measured.stdout) <= 1.3, measured.stdout
