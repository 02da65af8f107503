"""``pi0.param_tree``: dimensions from shapes, and shapes from dimensions."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pi0.errors import CheckpointError
from pi0.orbax import OrbaxParams
from pi0.param_tree import (
    BackboneDims,
    ExpertDims,
    ModelDims,
    VisionDims,
    backbone_dims,
    backbone_shapes,
    check_shapes,
    is_action_leaf,
    model_dims,
    model_shapes,
)
from tests.golden_data import CHECKPOINTS

REAL_PI05 = ModelDims(
    kind="pi05",
    backbone=BackboneDims(
        vision=VisionDims(width=1152, depth=27, heads=16, head_dim=72, mlp_dim=4304, patch=14, tokens=256),
        vlm=ExpertDims(2048, 16384),
        vocab_size=257_152,
        depth=18,
        heads=8,
        kv_heads=1,
        head_dim=256,
    ),
    expert=ExpertDims(1024, 4096),
    action_dim=32,
)
REAL_PI0 = replace(REAL_PI05, kind="pi0")


@pytest.mark.parametrize(("dims", "leaves", "scalars"), [(REAL_PI05, 51, 3_353_433_872), (REAL_PI0, 50, 3_238_048_528)])
def test_the_published_models_have_the_known_number_of_leaves_and_scalars(dims: ModelDims, leaves: int, scalars: int) -> None:
    shapes = model_shapes(dims)
    assert len(shapes) == leaves
    assert sum(map(math.prod, shapes.values())) == scalars


@pytest.mark.parametrize("checkpoint", ["pi05_orbax", "pi05_orbax_bf16_sharded", "pi0_orbax"])
def test_golden_checkpoints_have_exactly_the_expected_shapes(checkpoint: str) -> None:
    shapes = OrbaxParams(CHECKPOINTS / checkpoint).shapes()
    dims = model_dims(shapes)
    assert dims.kind == checkpoint.split("_")[0]
    assert model_shapes(dims) == shapes
    assert backbone_shapes(dims.backbone) == {name: shape for name, shape in shapes.items() if not is_action_leaf(name)}


SIZES = st.integers(1, 40)


@given(st.data())
def test_dimensions_and_shapes_determine_each_other(data: st.DataObject) -> None:
    size = lambda: data.draw(SIZES)  # noqa: E731
    patch = data.draw(st.sampled_from([14, 16, 28, 32, 45, 224]))
    kv_heads = data.draw(st.integers(1, 4))
    dims = ModelDims(
        kind=data.draw(st.sampled_from(["pi0", "pi05"])),
        backbone=BackboneDims(
            vision=VisionDims(size(), size(), size(), size(), size(), patch, (224 // patch) ** 2),
            vlm=ExpertDims(size(), size()),
            vocab_size=size(),
            depth=size(),
            heads=kv_heads * data.draw(st.integers(1, 4)),
            kv_heads=kv_heads,
            head_dim=size(),
        ),
        expert=ExpertDims(size(), size()),
        action_dim=size(),
    )
    shapes = model_shapes(dims)
    assert model_dims(shapes) == dims
    assert backbone_dims(shapes) == dims.backbone
    check_shapes(shapes, model_shapes(dims), "the tree")


@pytest.mark.parametrize(
    ("leaf", "shape", "message"),
    [
        ("PaliGemma/img/embedding/kernel", None, "leaf PaliGemma/img/embedding/kernel is missing"),
        ("PaliGemma/llm/final_norm_1/Dense_0/kernel", None, "has no action expert"),
        ("action_in_proj/kernel", (32,), r"leaf action_in_proj/kernel has shape \(32,\), expected 2 axes"),
        ("PaliGemma/img/embedding/kernel", (0, 0, 3, 1152), r"shape \(0, 0, 3, 1152\): an axis is empty"),
        ("PaliGemma/img/pos_embedding", (1, 255, 1152), "has 255 positions, but 14-pixel patches of a 224×224 image are 256"),
    ],
)
def test_a_leaf_that_fixes_a_dimension_must_be_there(leaf: str, shape: tuple[int, ...] | None, message: str) -> None:
    shapes = model_shapes(REAL_PI05)
    if shape is None:
        del shapes[leaf]
    else:
        shapes[leaf] = shape
    with pytest.raises(CheckpointError, match=message):
        model_dims(shapes)


def test_check_shapes_lists_every_sort_of_difference_in_one_line() -> None:
    expected = {"a": (1,), "b": (2,), "c": (3, 3)}
    with pytest.raises(CheckpointError) as caught:
        check_shapes({"a": (1,), "c": (3, 4), "d": ()}, expected, "here")
    assert str(caught.value) == (
        "here does not fit the model its shapes describe; missing (1): b; unexpected (1): d; wrong shape (1): c is (3, 4), expected (3, 3)"
    )


def test_check_shapes_shortens_a_long_list() -> None:
    expected = {f"leaf_{index:02}": (1,) for index in range(40)}
    with pytest.raises(CheckpointError, match=r"missing \(40\): leaf_00, .*, leaf_11, and 28 more$"):
        check_shapes({}, expected, "here")
