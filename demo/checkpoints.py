"""Writes the demo's two checkpoints: a tiny random pi0.5 model in both formats, a tokenizer, norm stats.

The weights are random, so the words and actions are noise; everything around them is the real thing: the real formats, the real
loaders, the real architecture at a small size. (A trained pair takes their place later.)
"""

from __future__ import annotations

import io
import itertools
import json
import logging
import shutil
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pi0.errors import CheckpointError
from pi0.param_tree import ATTENTION, IMG, LLM, BackboneDims, ExpertDims, ModelDims, VisionDims, model_shapes
from pi0.tokenizer import TOKENIZER_FILE

logger = logging.getLogger(__name__)

MODEL_CONFIG = "pi05_aloha"
ASSET_ID = "trossen"
DIMS = ModelDims(
    kind="pi05",
    backbone=BackboneDims(
        vision=VisionDims(width=64, depth=2, heads=4, head_dim=16, mlp_dim=128, patch=14, tokens=256),
        vlm=ExpertDims(width=96, mlp_dim=192),
        vocab_size=512,
        depth=3,
        heads=4,
        kv_heads=1,
        head_dim=24,
    ),
    expert=ExpertDims(width=64, mlp_dim=128),
    action_dim=32,
)

_SEED = 33
_COMPLETE = "demo.json"
_COMPLETE_TEXT = json.dumps({"version": 1, "model_config_name": MODEL_CONFIG}) + "\n"


def ensure_checkpoints(directory: Path) -> tuple[Path, Path]:
    """(planner checkpoint, action checkpoint) below ``directory``, written on first use.

    Both are written beside ``directory`` and renamed into place, so an interrupted first run leaves nothing behind that looks complete.

    Raises:
        CheckpointError: ``directory`` holds something else, or cannot be written.
    """
    planner, action = directory / "planner", directory / "action"
    marker = directory / _COMPLETE
    if marker.is_file() and marker.read_text() == _COMPLETE_TEXT:
        return planner, action
    if directory.exists():
        raise CheckpointError(f"{directory} exists but holds no demo checkpoints of this version; remove it, or choose another with --directory")
    logger.info("writing the demo's checkpoints to %s", directory)
    scratch = directory.with_name(f"{directory.name}.partial-demo")
    shutil.rmtree(scratch, ignore_errors=True)  # of an interrupted run; nothing but this function writes there
    try:
        scratch.mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(f"cannot write {directory}: {error.strerror}; choose another with --directory") from error
    tokenizer = train_tokenizer()
    # Imported here, not above: both bring their slot's framework.
    from action.export import convert_to_safetensors
    from planner.export import write_params

    for name in ("planner", "action"):
        (scratch / name).mkdir()
        (scratch / name / TOKENIZER_FILE).write_bytes(tokenizer)
    write_params(scratch / "planner" / "params", random_leaves(DIMS, seed=_SEED))
    convert_to_safetensors(scratch / "planner", scratch / "action")
    write_norm_stats(scratch / "action")
    (scratch / _COMPLETE).write_text(_COMPLETE_TEXT)
    scratch.rename(directory)
    return planner, action


def random_leaves(dims: ModelDims, *, seed: int) -> dict[str, NDArray[np.float32]]:
    """A random value for every leaf of a model of ``dims``: matrices scaled by their fan-in, norms near the identity."""
    rng = np.random.default_rng(seed)
    leaves: dict[str, NDArray[np.float32]] = {}
    for name, shape in model_shapes(dims).items():
        value = rng.standard_normal(shape, dtype=np.float32)
        if name.endswith("LayerNorm_0/scale") or name.endswith("LayerNorm_1/scale") or name.endswith("encoder_norm/scale"):
            value = 1 + 0.1 * value
        elif name == f"{LLM}/final_norm/scale":
            value *= 2.0  # with the small embedding, so that the tied head does not merely repeat the last token
        elif name.endswith("input_embedding"):
            value *= 0.3 * shape[-1] ** -0.5
        elif name.endswith(("/scale", "/bias", "pos_embedding")):
            value *= 0.1
        else:
            value *= _fan_in(name, shape) ** -0.5
        leaves[name] = value
    return leaves


def _fan_in(name: str, shape: tuple[int, ...]) -> int:
    if name == f"{IMG}/embedding/kernel":
        return shape[0] * shape[1] * shape[2]
    if name.startswith(ATTENTION) or "attn_vec_einsum" in name:
        # (…, heads, head dim, width) projects the heads back; (…, width, heads, head dim) projects into them.
        return shape[-3] * shape[-2] if name.endswith(("out/kernel", "/w")) else shape[-3]
    return shape[-2]


def write_norm_stats(checkpoint_dir: Path) -> None:
    """Statistics under which robot units are [-1, 1] already."""
    stats = {"mean": [0.0] * 14, "std": [1.0] * 14, "q01": [-1.0] * 14, "q99": [1.0] * 14}
    path = checkpoint_dir / "assets" / ASSET_ID / "norm_stats.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"norm_stats": {"state": stats, "actions": stats}}, indent=2) + "\n")


def train_tokenizer() -> bytes:
    """A SentencePiece model with PaliGemma's special ids, trained on a few hundred robot instructions; the same bytes each time."""
    import sentencepiece

    verbs = ("pick up", "put down", "open", "close", "push", "move", "stack", "wipe", "hand over", "tidy")
    things = ("cup", "red block", "green block", "blue block", "plate", "drawer", "towel", "table", "bowl", "sponge")
    places = ("in the left bin", "in the right bin", "on the table", "next to the plate", "with the left arm")
    sentences = [" ".join(words) for words in itertools.product(verbs, ("the",), things, places)]
    numbers = " ".join(map(str, range(256)))
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*sentences, f"Task: tidy the table. Subtask: , State: {numbers};", "Action: "]),
        model_writer=model,
        model_type="bpe",
        vocab_size=DIMS.backbone.vocab_size,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        byte_fallback=True,
        split_digits=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        user_defined_symbols=["\n"],
        character_coverage=1.0,
        minloglevel=2,
    )
    return model.getvalue()
