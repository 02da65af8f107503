"""Golden checkpoints with one thing wrong."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pi0.orbax import OrbaxParams
from tests.golden_data import CHECKPOINTS
from tests.pi0.orbax_files import write_orbax

Damage = Callable[[Path], None]


def copy(name: str, target: Path) -> Path:
    """A copy of a golden checkpoint that may be damaged."""
    shutil.copytree(CHECKPOINTS / name, target)
    return target


def remove(name: str) -> Damage:
    def apply(directory: Path) -> None:
        path = directory / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return apply


def write(name: str, content: str | bytes) -> Damage:
    def apply(directory: Path) -> None:
        (directory / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return apply


def cut(name: str, size: int) -> Damage:
    """Leaves the first ``size`` bytes."""
    return lambda directory: write(name, (directory / name).read_bytes()[:size])(directory)


def empty(directory: Path) -> None:
    shutil.rmtree(directory)
    directory.mkdir()


def a_file(directory: Path) -> None:
    shutil.rmtree(directory)
    directory.write_text("not a directory")


def gone(directory: Path) -> None:
    shutil.rmtree(directory)


def tensors(change: Callable[[dict[str, Any]], None]) -> Damage:
    """Rewrites ``model.safetensors`` with its tensors changed."""

    def apply(directory: Path) -> None:
        from safetensors.torch import load_file, save_file

        path = directory / "model.safetensors"
        stored = load_file(path)
        change(stored)
        save_file(stored, path)

    return apply


def leaves(change: Callable[[dict[str, Any]], None]) -> Damage:
    """Changes the leaves that an Orbax ``_METADATA`` lists; what is stored stays."""

    def apply(directory: Path) -> None:
        path = directory / "params" / "_METADATA"
        metadata = json.loads(path.read_text())
        change(metadata["tree_metadata"])
        path.write_text(json.dumps(metadata))

    return apply


def without_leaf(part: str) -> Damage:
    def change(tree: dict[str, Any]) -> None:
        keys = [key for key in tree if part in key]
        assert keys
        for key in keys:
            del tree[key]

    return leaves(change)


def stats(asset: str, change: Callable[[dict[str, Any]], None]) -> Damage:
    """Edits the norm stats of ``asset``."""

    def apply(directory: Path) -> None:
        path = directory / "assets" / asset / "norm_stats.json"
        document = json.loads(path.read_text())
        change(document["norm_stats"])
        path.write_text(json.dumps(document))

    return apply


def largest_data_file(directory: Path) -> Path:
    return max((path for path in (directory / "params").rglob("d/*") if path.is_file()), key=lambda path: path.stat().st_size)


def without_data(directory: Path) -> None:
    largest_data_file(directory).unlink()


def flipped_data(directory: Path) -> None:
    path = largest_data_file(directory)
    path.write_bytes(bytes(255 - byte for byte in path.read_bytes()))


def narrow(stored: Mapping[str, Any], width: int) -> None:
    for entry in stored.values():
        for name, values in entry.items():
            entry[name] = np.asarray(values)[:width].tolist()


def extra_leaf(name: str) -> Damage:
    """Stores one leaf more."""

    def apply(directory: Path) -> None:
        stored = OrbaxParams(directory)
        tree = {leaf: stored.read(leaf) for leaf in stored} | {name: np.zeros(2, np.float32)}
        shutil.rmtree(directory / "params")
        write_orbax(directory / "params", tree)

    return apply


def other_tokenizer(name: str) -> Damage:
    """A SentencePiece model with the library's own special ids."""

    def apply(directory: Path) -> None:
        import sentencepiece

        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(["a b c"]), model_writer=model, vocab_size=7, minloglevel=2)
        (directory / name).write_bytes(model.getvalue())

    return apply


def fewer_embeddings(stored: dict[str, Any]) -> None:
    """Keeps half the rows of the tied embedding."""
    name = "paligemma_with_expert.paligemma.lm_head.weight"
    stored[name] = stored[name][:512].clone()
