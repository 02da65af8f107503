"""``pi0.orbax`` against the golden checkpoints and against trees written here."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from pi0.errors import CheckpointError
from pi0.orbax import OrbaxParams, params_directory
from tests.golden_data import CHECKPOINTS
from tests.pi0.orbax_files import write_orbax

TREE = {
    "a/kernel": np.arange(6, dtype=np.float32).reshape(2, 3),
    "attention/value/kernel": np.full((4,), 1.5, dtype=np.float32),
    "b": np.array([1.0, -2.0], dtype=ml_dtypes.bfloat16),
}


def test_both_key_forms_of_the_same_weights_read_the_same() -> None:
    with_value = OrbaxParams(CHECKPOINTS / "pi05_orbax")
    without_value = OrbaxParams(CHECKPOINTS / "pi05_orbax_bf16_sharded")
    assert len(with_value) == 51
    assert with_value.shapes() == without_value.shapes()
    for name in with_value:
        assert with_value.dtype(name) == np.float32
        assert without_value.dtype(name) == ml_dtypes.bfloat16
        np.testing.assert_array_equal(with_value.read(name), without_value.read(name, np.dtype(np.float32)), err_msg=name)


def test_the_checkpoint_root_and_its_params_directory_are_the_same_checkpoint() -> None:
    root = CHECKPOINTS / "pi0_orbax"
    assert params_directory(root) == params_directory(root / "params") == root / "params"
    assert list(OrbaxParams(root)) == list(OrbaxParams(root / "params"))


def test_a_cast_while_reading_rounds_to_nearest_even() -> None:
    params = OrbaxParams(CHECKPOINTS / "pi0_orbax")
    name = "PaliGemma/llm/embedder/input_embedding"
    exact = params.read(name)
    rounded = params.read(name, np.dtype(ml_dtypes.bfloat16))
    assert rounded.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(rounded, exact.astype(ml_dtypes.bfloat16))
    assert not np.array_equal(rounded.astype(np.float32), exact)


@pytest.mark.parametrize("trailing", ["value", None])
def test_only_a_common_trailing_value_is_dropped(tmp_path: Path, trailing: str | None) -> None:
    params = OrbaxParams(write_orbax(tmp_path / "params", TREE, trailing=trailing))
    assert set(params) == set(TREE)
    assert "a/kernel" in params
    assert "a" not in params
    for name, value in TREE.items():
        assert params.shape(name) == value.shape
        np.testing.assert_array_equal(params.read(name), value)


@pytest.mark.parametrize("name", ["with space", "name@refs%2Fpr%2F1", "run#3", "what?", "größe[0]"])
def test_a_path_may_hold_any_character(tmp_path: Path, name: str) -> None:
    params = OrbaxParams(write_orbax(tmp_path / name / "params", TREE))
    np.testing.assert_array_equal(params.read("a/kernel"), TREE["a/kernel"])


def test_a_leaf_that_does_not_exist_is_named(tmp_path: Path) -> None:
    params = OrbaxParams(write_orbax(tmp_path / "params", TREE))
    with pytest.raises(CheckpointError, match="has no leaf a/bias"):
        params.read("a/bias")


def test_a_listed_leaf_without_data_is_an_error(tmp_path: Path) -> None:
    directory = write_orbax(tmp_path / "params", TREE)
    metadata = json.loads((directory / "_METADATA").read_text())
    metadata["tree_metadata"]["('params', 'ghost', 'value')"] = {}
    (directory / "_METADATA").write_text(json.dumps(metadata))
    with pytest.raises(CheckpointError, match="cannot open leaf ghost of"):
        OrbaxParams(directory).read("ghost")


def test_lost_data_files_are_an_error_and_not_zeros(tmp_path: Path) -> None:
    shutil.copytree(CHECKPOINTS / "pi0_orbax", tmp_path / "copy")
    for data in (tmp_path / "copy" / "params").rglob("d/*"):
        data.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"cannot (open|read) leaf .* of "):
        OrbaxParams(tmp_path / "copy").read("action_in_proj/kernel")


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ("not json", "is not Orbax tree metadata"),
        ("[]", "is not Orbax tree metadata"),
        ("{}", "is not Orbax tree metadata"),
        ('{"tree_metadata": {"a b": {}}}', "is not Orbax tree metadata"),
        ('{"tree_metadata": {}}', "lists no parameters"),
        ('{"tree_metadata": {"()": {}}}', "lists no parameters"),
        ("{\"tree_metadata\": {\"('opt_state', 'a')\": {}}}", "leaf opt_state/a is not below the top-level key 'params'"),
        ('{"tree_metadata": {"(\'params\', \'a\')": {}}, "use_zarr3": true}', "zarr v3 storage is not supported"),
    ],
)
def test_unusable_metadata_is_an_error_of_one_line(tmp_path: Path, metadata: str, message: str) -> None:
    (tmp_path / "_METADATA").write_text(metadata)
    (tmp_path / "manifest.ocdbt").touch()
    with pytest.raises(CheckpointError, match=message) as caught:
        OrbaxParams(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_directory_that_is_no_checkpoint_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="expected a file params/_METADATA"):
        OrbaxParams(tmp_path)
    (tmp_path / "_METADATA").write_text("{\"tree_metadata\": {\"('params', 'a')\": {}}}")
    with pytest.raises(CheckpointError, match=r"no manifest\.ocdbt"):
        OrbaxParams(tmp_path)
