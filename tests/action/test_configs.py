from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import action
from action.configs import CONFIGS, PolicyConfig, get_config
from action.embodiments import EMBODIMENTS
from pi0.errors import ConfigError
from tests.golden_data import GOLDEN

# config: (kind, horizon, text tokens, state in the prompt, robot, asset, quantiles, relative columns, default prompt)
_ALOHA_DELTA = "11111101111110"
_DROID_DELTA = "11111110"
_LIBERO_DELTA = "1111110"
_LIBERO_ASSET = "physical-intelligence/libero"
EXPECTED = {
    "pi0_aloha": ("pi0", 50, 48, False, "aloha", "trossen", False, _ALOHA_DELTA, None),
    "pi05_aloha": ("pi05", 50, 200, True, "aloha", "trossen", True, _ALOHA_DELTA, None),
    "pi0_aloha_towel": ("pi0", 50, 48, False, "aloha", "trossen", False, _ALOHA_DELTA, "fold the towel"),
    "pi0_aloha_tupperware": (
        "pi0", 50, 48, False, "aloha", "trossen", False, _ALOHA_DELTA, "open the tupperware and put the food on the plate",
    ),
    "pi0_droid": ("pi0", 10, 48, False, "droid", "droid", False, None, None),
    "pi05_droid": ("pi05", 15, 200, True, "droid", "droid", True, None, None),
    "pi0_libero": ("pi0", 50, 48, False, "libero", _LIBERO_ASSET, False, _LIBERO_DELTA, None),
    "pi0_libero_low_mem_finetune": ("pi0", 50, 48, False, "libero", _LIBERO_ASSET, False, _LIBERO_DELTA, None),
    "pi05_libero": ("pi05", 10, 200, False, "libero", _LIBERO_ASSET, True, None, None),
    "pi0_aloha_pen_uncap": ("pi0", 50, 48, False, "aloha", "trossen", False, _ALOHA_DELTA, "uncap the pen"),
    "pi05_aloha_pen_uncap": ("pi05", 50, 200, True, "aloha", "trossen", True, _ALOHA_DELTA, "uncap the pen"),
    "pi05_full_droid_finetune": ("pi05", 16, 200, True, "droid", "droid", True, _DROID_DELTA, None),
    "pi05_droid_finetune": ("pi05", 16, 200, True, "droid", "droid", True, None, None),
    "pi0_aloha_sim": ("pi0", 50, 48, False, "aloha", "lerobot/aloha_sim_transfer_cube_human", False, None, "Transfer cube"),
    "paligemma_diffusion_droid": ("pi0", 10, 48, False, "droid", "droid", False, None, None),
    "pi05_droid_jointpos_polaris": ("pi05", 15, 200, True, "droid", "droid", True, _DROID_DELTA, None),
    "pi0_droid_jointpos_polaris": ("pi0", 10, 100, False, "droid", "droid", False, _DROID_DELTA, None),
    "pi0_droid_jointpos_100k_polaris": ("pi0", 10, 100, False, "droid", "droid", False, _DROID_DELTA, None),
}  # fmt: skip

FAST = [
    "pi0_fast_droid", "pi0_fast_libero", "pi0_fast_libero_low_mem_finetune", "pi0_fast_full_droid_finetune", "pi0_fast_droid_jointpos_polaris",
    "paligemma_binning_droid", "paligemma_binning_droid_jointpos", "paligemma_fast_droid", "paligemma_fast_specialist_droid", "paligemma_vq_droid",
]  # fmt: skip
DEBUG = ["debug", "debug_restore", "debug_pi05"]


def test_every_config_of_the_reference_is_there() -> None:
    assert set(CONFIGS) == set(EXPECTED)
    assert len(EXPECTED) + len(FAST) + len(DEBUG) == 31


@pytest.mark.parametrize("name", EXPECTED)
def test_config_has_the_values_of_the_reference(name: str) -> None:
    config = get_config(name)
    mask = None if config.delta_mask is None else "".join("1" if relative else "0" for relative in config.delta_mask)
    assert EXPECTED[name] == (
        config.kind, config.action_horizon, config.max_token_len, config.discrete_state_input, config.embodiment.name, config.asset_id,
        config.use_quantiles, mask, config.default_prompt,
    )  # fmt: skip
    assert config.name == name
    assert config.embodiment.name in EMBODIMENTS
    with_reset_pose = {"pi0_aloha", "pi05_aloha", "pi0_aloha_towel", "pi0_aloha_tupperware"}
    assert dict(config.policy_metadata) == ({"reset_pose": [0, -1.5, 1.5, 0, 0, 0]} if name in with_reset_pose else {})


@pytest.mark.parametrize("path", sorted((GOLDEN / "policy").glob("*.npz")), ids=lambda path: path.stem)
def test_config_agrees_with_what_openpi_recorded(path) -> None:  # type: ignore[no-untyped-def]
    with np.load(path) as file:
        meta = json.loads(str(file["meta_json"]))
    config = get_config(meta["config"])
    assert config.asset_id == meta["asset_id"]
    assert config.use_quantiles == meta["use_quantile_norm"]
    assert config.action_horizon == meta["action_horizon"]
    assert config.max_token_len == meta["max_token_len"]
    assert config.discrete_state_input == meta["discrete_state_input"]


def test_delta_mask_is_never_wider_than_the_robot() -> None:
    for config in CONFIGS.values():
        if config.delta_mask is not None:
            assert len(config.delta_mask) == config.embodiment.action_dim <= config.embodiment.state_dim


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pi05_droit", "action.model_config_name: there is no config 'pi05_droit'; did you mean 'pi05_droid'?"),
        ("pi0_aloha_tuperware", "action.model_config_name: there is no config 'pi0_aloha_tuperware'; did you mean 'pi0_aloha_tupperware'?"),
        *(
            (name, f"action.model_config_name: '{name}' is a pi0-FAST config; not supported yet, use a pi0 or pi0.5 config and checkpoint")
            for name in FAST
        ),
        *(
            (name, f"action.model_config_name: '{name}' is a debug config; it has no robot and no norm stats, so it cannot be served")
            for name in DEBUG
        ),
    ],
)
def test_config_that_cannot_be_served(name: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        get_config(name)
    assert str(caught.value) == message


def test_name_like_no_other_lists_them_all() -> None:
    with pytest.raises(ConfigError) as caught:
        get_config("resnet")
    assert str(caught.value).startswith("action.model_config_name: there is no config 'resnet'; expected one of ")
    for name in CONFIGS:
        assert name in str(caught.value)


ROBOT = """
from action import PolicyConfig
from action.embodiments import Droid

PI05_UR5 = PolicyConfig(name="ur5", kind="pi05", embodiment=Droid(), asset_id="ur5e", action_horizon=8, max_token_len=99, discrete_state_input=True)
PI05_UR10 = PI05_UR5
text = "no config"
"""


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory from which modules are imported during the test."""
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("my_robot", "my_robots", "my_robots.ur5"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


class TestOneOfYourOwn:
    def test_is_the_object_itself(self, modules: Path) -> None:
        (modules / "my_robot.py").write_text(ROBOT)
        config = get_config("my_robot:PI05_UR5")
        assert isinstance(config, PolicyConfig) and config is sys.modules["my_robot"].PI05_UR5 and config.name == "ur5"

    def test_may_lie_in_a_package(self, modules: Path) -> None:
        (modules / "my_robots").mkdir()
        (modules / "my_robots" / "ur5.py").write_text(ROBOT)
        assert get_config("my_robots.ur5:PI05_UR10").action_horizon == 8

    @pytest.mark.parametrize("name", ["a:", ":B", ":", "a:B:C", "my-robot:A", "my_robot.py:A", "robots/my_robot:A", "a:B.c", ".a:B"])
    def test_malformed(self, name: str) -> None:
        with pytest.raises(ConfigError) as caught:
            get_config(name)
        assert str(caught.value) == (
            f"action.model_config_name: got {name!r}, expected module:NAME, such as my_robot:PI05_UR5 for PI05_UR5 = PolicyConfig(…) in my_robot.py"
        )

    @pytest.mark.parametrize(("name", "missing"), [("my_robots:A", "my_robots"), ("my_robots.a:A", "my_robots"), ("my_robot.a:A", "my_robot.a")])
    def test_no_such_module(self, modules: Path, name: str, missing: str) -> None:
        (modules / "my_robot.py").write_text(ROBOT)
        with pytest.raises(ConfigError) as caught:
            get_config(name)
        assert str(caught.value) == (
            f"action.model_config_name: there is no module {missing!r} for {name!r}; start the server in the directory that it lies in, install it, "
            "or name its directory in PYTHONPATH"
        )

    @pytest.mark.parametrize(
        ("code", "problem"),
        [
            ("import no_such_driver", "ModuleNotFoundError: No module named 'no_such_driver' ({file}, line 1)"),
            ("\nfrom action import Nothing", "ImportError: cannot import name 'Nothing' from 'action' ({init}) ({file}, line 2)"),
            ("1 / 0", "ZeroDivisionError: division by zero ({file}, line 1)"),
            ("raise ValueError('two\\nlines')", "ValueError: two lines ({file}, line 1)"),
            ("import sys; sys.exit('bye')", "SystemExit: bye ({file}, line 1)"),
            ("def", "SyntaxError: invalid syntax (my_robot.py, line 1)"),
        ],
    )
    def test_a_module_that_fails_is_not_taken_for_one_that_is_missing(self, modules: Path, code: str, problem: str) -> None:
        (modules / "my_robot.py").write_text(code)
        with pytest.raises(ConfigError) as caught:
            get_config("my_robot:PI05_UR5")
        expected = problem.format(file=modules / "my_robot.py", init=action.__file__)
        assert str(caught.value) == f"action.model_config_name: the module 'my_robot' of 'my_robot:PI05_UR5' cannot be imported: {expected}"
        assert caught.value.__cause__ is not None

    @pytest.mark.parametrize(
        ("attribute", "problem"),
        [
            ("PI05_UR6", "is not there; did you mean my_robot:PI05_UR5?"),
            ("ROBOT", "is not there; it has PI05_UR5, PI05_UR10"),
            ("text", "is of type str, expected a PolicyConfig; it has PI05_UR5, PI05_UR10"),
            ("Droid", "is of type type, expected a PolicyConfig; it has PI05_UR5, PI05_UR10"),
        ],
    )
    def test_no_such_config_in_it(self, modules: Path, attribute: str, problem: str) -> None:
        (modules / "my_robot.py").write_text(ROBOT)
        with pytest.raises(ConfigError) as caught:
            get_config(f"my_robot:{attribute}")
        assert str(caught.value) == f"action.model_config_name: {attribute} of 'my_robot' ({modules / 'my_robot.py'}) {problem}"

    def test_a_module_without_any(self, modules: Path) -> None:
        (modules / "my_robot.py").write_text("ROBOT = None")
        with pytest.raises(ConfigError, match=r"is of type NoneType, .*; it has no PolicyConfig at all; write ROBOT = PolicyConfig\(…\) there$"):
            get_config("my_robot:ROBOT")
        with pytest.raises(ConfigError, match=r"^action.model_config_name: A of 'sys' \(a module without a file\) is not there; it has no "):
            get_config("sys:A")


def test_names_and_robots_can_be_looked_up_without_torch() -> None:
    imports = "import sys, action, action.configs, action.embodiments, action.processing, demo.robot"
    code = f"{imports}; sys.exit('torch' in sys.modules or 'jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
