import json
from pathlib import Path

import numpy as np
import pytest

from pi0.errors import CheckpointError
from pi0.norm_stats import Stats, load_norm_stats, normalize, unnormalize
from tests.golden_data import CHECKPOINTS, GOLDEN

NPZ = np.load(GOLDEN / "transforms" / "normalize.npz")
INDEX = json.loads(str(NPZ["index_json"]))


def stats(asset, key):
    return Stats(*(NPZ[f"{asset}/stats/{key}/{name}"] for name in ("mean", "std", "q01", "q99")))


@pytest.mark.parametrize("prefix", INDEX)
@pytest.mark.parametrize("key", ["state", "actions"])
def test_golden(prefix, key):
    asset, _, kind = prefix.rsplit("/", 2)
    quantiles = kind == "quantile"
    for function, name in ((normalize, "norm"), (unnormalize, "unnorm")):
        out, expected = function(NPZ[f"{prefix}/{name}_in/{key}"], stats(asset, key), quantiles=quantiles), NPZ[f"{prefix}/{name}_out/{key}"]
        assert out.dtype == expected.dtype == np.float64
        np.testing.assert_allclose(out, expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("path", sorted(CHECKPOINTS.glob("*/assets/**/norm_stats.json")), ids=str)
def test_golden_files_load(path: Path):
    root = next(p for p in path.parents if p.name == "assets").parent
    asset = str(path.parent.relative_to(root / "assets"))
    loaded = load_norm_stats(root, asset, quantiles=True)
    assert loaded.keys() == {"state", "actions"}
    assert load_norm_stats(root / "params", asset, quantiles=True)["state"].mean.tolist() == loaded["state"].mean.tolist()


def write(tmp_path, content):
    (tmp_path / "assets" / "a").mkdir(parents=True)
    (tmp_path / "assets" / "a" / "norm_stats.json").write_text(
        content if isinstance(content, str) else json.dumps({"norm_stats": {"state": content}})
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not a norm-stats file"),
        ("{}", "is not a norm-stats file"),
        ({"mean": [1.0]}, "state: mean and std are required"),
        ({"mean": [1.0], "std": [1.0, 2.0], "q01": [0.0], "q99": [1.0]}, "different lengths"),
        ({"mean": [1.0], "std": [1.0], "q01": None}, "q01 and q99 are required"),
        ({"mean": [float("nan")], "std": [1.0], "q01": [0.0], "q99": [1.0]}, "mean: expected a list of finite numbers, got NaN or infinity"),
        ({"mean": [[1.0]], "std": [1.0], "q01": [0.0], "q99": [1.0]}, "mean: expected a list of finite numbers, got shape"),
        ({"mean": ["x"], "std": [1.0], "q01": [0.0], "q99": [1.0]}, "is not a norm-stats file"),
    ],
)
def test_bad_files(tmp_path, content, message):
    write(tmp_path, content)
    with pytest.raises(CheckpointError, match=message):
        load_norm_stats(tmp_path, "a", quantiles=True)


def test_whole_numbers_null_quantiles_and_links(tmp_path):
    write(tmp_path, {"mean": [1, 2], "std": [1, 1], "q01": None, "q99": None, "count": 7})
    (tmp_path / "params").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "params")
    for path in (tmp_path, tmp_path / "params", tmp_path / "link"):
        loaded = load_norm_stats(path, "a", quantiles=False)["state"]
        assert loaded.mean.dtype == np.float64 and loaded.mean.tolist() == [1.0, 2.0] and loaded.q01 is None


def test_missing_asset_names_what_is_there():
    with pytest.raises(
        CheckpointError, match=r"no norm stats for asset 'ur5e'.*assets in this checkpoint: droid, physical-intelligence/libero, trossen"
    ):
        load_norm_stats(CHECKPOINTS / "pi05_orbax", "ur5e", quantiles=True)


def test_width_mismatches():
    narrow = Stats(np.zeros(4), np.ones(4), np.zeros(4), np.ones(4))
    with pytest.raises(CheckpointError, match="4 wide, but the data is 5 wide"):
        normalize(np.zeros(5), narrow, quantiles=False)
    with pytest.raises(CheckpointError, match="4 wide, but the model's actions are 3 wide"):
        unnormalize(np.zeros(3), narrow, quantiles=True)


def test_unknown_fields_are_ignored_and_quantiles_optional(tmp_path):
    write(tmp_path, {"mean": [1], "std": [2], "count": 7})
    loaded = load_norm_stats(tmp_path, "a", quantiles=False)["state"]
    assert loaded.mean.dtype == np.float64 and loaded.q01 is None
    with pytest.raises(CheckpointError, match="needs q01 and q99"):
        normalize(np.zeros(1), loaded, quantiles=True)
