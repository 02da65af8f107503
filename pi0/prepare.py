"""The two commands that make a checkpoint directory from published parts, once, verified and never half-written."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pi0.archive import MAX_BYTES, extract_tar
from pi0.errors import CheckpointError, DownloadError
from pi0.hub import DEFAULT_REVISION, FileNotInRepoError, HubFiles, hub_file
from pi0.locations import WEIGHTS, check_safetensors
from pi0.lora import LoraMerged
from pi0.manifest import MANIFEST, Manifest, describe, load_manifest
from pi0.norm_stats import load_norm_stats
from pi0.orbax import OrbaxParams
from pi0.param_tree import backbone_dims, backbone_shapes, check_shapes, is_action_leaf
from pi0.progress import Progress, no_progress
from pi0.remote import Bucket, RemoteFile, download
from pi0.staging import content, locked, partial, publish, recover, require_space, tidy

logger = logging.getLogger(__name__)

NORM_STATS = "norm_stats.json"


@dataclass(frozen=True)
class PrepareResult:
    """What a prepare command left.

    Attributes:
        directory: the checkpoint, ready for ``checkpoint_dir``.
        manifest: where it came from, and size and hash of each file.
        reused: whether it was complete already and nothing was fetched.
    """

    directory: Path
    manifest: Manifest
    reused: bool


def prepare_planner_checkpoint(
    *,
    hf_repo: str = "Hebbian-Robotics/pi05_subtask",
    tar_path_in_repo: str = "jax/pi05_subtask.tar",
    output_dir: Path,
    force_download: bool = False,
    progress: Progress = no_progress,
    max_bytes: int = MAX_BYTES,
) -> PrepareResult:
    """Fetches an archive of a JAX checkpoint from the hub and unpacks it into ``output_dir``.

    Every weight is read once before the directory appears. A complete directory made from the same archive is returned at
    once, without a network, unless ``force_download``. Whatever happens, an old ``output_dir`` stays until the new one is complete.

    Raises:
        DownloadError: the archive cannot be fetched or does not verify.
        CheckpointError: the archive is unsafe or not a planner checkpoint, or ``output_dir`` holds something else.
    """
    source = {"hf_repo": hf_repo, "tar_path_in_repo": tar_path_in_repo}

    def build(work: Path, new: Path) -> Mapping[str, str]:
        file, commit = hub_file(hf_repo, tar_path_in_repo)
        archive = work / "download" / tar_path_in_repo
        download(HubFiles(hf_repo, DEFAULT_REVISION, (file,)), [file], work / "download", progress=progress, label=f"{hf_repo}/{tar_path_in_repo}")
        require_space(work, file.size)
        extract_tar(archive, new, max_bytes=max_bytes, progress=progress)
        check_planner_checkpoint(new, progress=progress)
        return {"commit": commit}

    return _prepare(output_dir, source, build, lambda manifest: None, force_download=force_download, progress=progress)


def prepare_checkpoint(
    *,
    model_id: str = "lerobot/pi05_base",
    openpi_assets_uri: str = "gs://openpi-assets/checkpoints/pi05_base/assets",
    output_dir: Path,
    required_asset_id: str = "trossen",
    force_download: bool = False,
    progress: Progress = no_progress,
) -> PrepareResult:
    """Joins LeRobot weights from the hub with openpi's norm stats (a bucket URI or a local directory) in ``output_dir``.

    The result holds ``model.safetensors``, ``config.json`` and ``assets/<asset id>/norm_stats.json`` for every asset there is.
    Guarantees as for :func:`prepare_planner_checkpoint`.

    Raises:
        DownloadError: something cannot be fetched or does not verify.
        CheckpointError: the weights are in several files, an asset is missing or broken, or ``output_dir`` holds something else.
    """
    source = {"model_id": model_id, "openpi_assets_uri": openpi_assets_uri}

    def build(work: Path, new: Path) -> Mapping[str, str]:
        # The assets first: they are small, and a wrong asset id should not show after 14 GB.
        assets = Bucket(openpi_assets_uri)
        stats = [file for file in assets.files if file.path.endswith(f"/{NORM_STATS}")]
        _require_asset(required_asset_id, [file.path for file in stats], openpi_assets_uri)
        config, weights, commit = _lerobot_files(model_id)
        download(assets, stats, work / "assets", progress=progress, label="norm stats")
        repo = HubFiles(model_id, DEFAULT_REVISION, (config, weights))
        download(repo, repo.files, work / "weights", progress=progress, label=f"{model_id} weights")
        new.mkdir()
        for file in repo.files:
            (work / "weights" / file.path).rename(new / file.path)
        (work / "assets").rename(new / "assets")
        _check_lerobot_checkpoint(new, [asset_id(file.path) for file in stats])
        return {"commit": commit}

    def check_asset(manifest: Manifest) -> None:
        paths = [name.removeprefix("assets/") for name in manifest.files if name.startswith("assets/")]
        _require_asset(required_asset_id, paths, str(output_dir))

    return _prepare(output_dir, source, build, check_asset, force_download=force_download, progress=progress)


def check_planner_checkpoint(directory: Path, *, progress: Progress = no_progress) -> None:
    """Requires ``directory`` to be a JAX checkpoint that a planner can be restored from; reads every leaf, one at a time.

    Raises:
        CheckpointError: lists what is missing, misshapen or unreadable.
    """
    params = OrbaxParams(directory)
    shapes = LoraMerged(params).shapes()
    backbone = {name: shape for name, shape in shapes.items() if not is_action_leaf(name)}
    check_shapes(backbone, backbone_shapes(backbone_dims(shapes)), str(directory))
    for count, name in enumerate(params, start=1):
        params.read(name)
        progress(count, len(params), "checking weights")


def asset_id(stats_path: str) -> str:
    """``<asset id>/norm_stats.json`` → the asset id, which may have slashes of its own."""
    return stats_path.removesuffix(NORM_STATS).strip("/")


def _prepare(
    output_dir: Path,
    source: Mapping[str, str],
    build: Callable[[Path, Path], Mapping[str, str]],
    check_reused: Callable[[Manifest], None],
    *,
    force_download: bool,
    progress: Progress,
) -> PrepareResult:
    """Runs ``build(work, new)``, which makes the directory ``new`` and returns what to add to the source, and publishes ``new``."""
    # Through a link to where the directory really is: renames beside the link would replace the link.
    target = output_dir.expanduser().resolve()
    if not force_download and (manifest := _complete(target, source)):
        check_reused(manifest)
        tidy(target, MANIFEST)
        return PrepareResult(target, manifest, reused=True)
    with locked(target):
        recover(target, MANIFEST)
        if not force_download:
            if manifest := _complete(target, source):
                check_reused(manifest)
                return PrepareResult(target, manifest, reused=True)
            _require_replaceable(target, source)
        elif target.exists() and not target.is_dir():
            raise CheckpointError(f"{target} is a file, expected a directory; choose another output directory")
        work, new = partial(target), content(target)
        if new.exists():
            shutil.rmtree(new)
        work.mkdir(exist_ok=True)
        try:
            manifest = describe(new, {**source, **build(work, new)}, progress=progress)
        except DownloadError:
            # The files that came whole are kept, so that the next run continues.
            if not any(work.iterdir()):
                work.rmdir()
            raise
        except CheckpointError as error:
            shutil.rmtree(work)
            raise CheckpointError(str(error).replace(str(new), str(target))) from error
        manifest.save(new, MANIFEST)
        publish(target, MANIFEST)
    return PrepareResult(target, manifest, reused=False)


def _complete(target: Path, source: Mapping[str, str]) -> Manifest | None:
    """The record of ``target`` if it was made from ``source`` and every file is there with its size."""
    manifest = load_manifest(target, MANIFEST)
    if manifest is None or not _same_source(manifest, source):
        return None
    problems = manifest.problems(target)
    if problems:
        logger.warning("%s was prepared before, but %s; fetching it again", target, problems[0])
        return None
    return manifest


def _same_source(manifest: Manifest, source: Mapping[str, str]) -> bool:
    return all(manifest.source.get(key) == value for key, value in source.items())


def _require_replaceable(target: Path, source: Mapping[str, str]) -> None:
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not target.is_dir():
        raise CheckpointError(f"{target} is a file, expected a directory; choose another output directory")
    manifest = load_manifest(target, MANIFEST)
    if manifest is None:
        raise CheckpointError(
            f"{target} exists and was not made by this command; choose another output directory, or force the download to have it moved aside"
        )
    if not _same_source(manifest, source):
        made_from = ", ".join(f"{key} {value}" for key, value in manifest.source.items())
        raise CheckpointError(f"{target} was prepared from {made_from}; choose another output directory, or force the download to replace it")


def _lerobot_files(model_id: str) -> tuple[RemoteFile, RemoteFile, str]:
    try:
        weights, commit = hub_file(model_id, WEIGHTS)
    except FileNotInRepoError as missing:
        try:
            hub_file(model_id, f"{WEIGHTS}.index.json")
        except FileNotInRepoError:
            raise missing from None
        raise CheckpointError(
            f"{model_id} has its weights in several files ({WEIGHTS}.index.json), which is not supported; merge them into one {WEIGHTS}"
        ) from None
    config, config_commit = hub_file(model_id, "config.json")
    if config_commit != commit:
        raise DownloadError(f"{model_id} changed while it was being looked at (commits {commit[:12]} and {config_commit[:12]}); run it again")
    return config, weights, commit


def _check_lerobot_checkpoint(directory: Path, asset_ids: list[str]) -> None:
    check_safetensors(directory / WEIGHTS)
    try:
        config = json.loads((directory / "config.json").read_text())
    except ValueError as error:
        raise CheckpointError(f"{directory / 'config.json'} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{directory / 'config.json'} holds a {type(config).__name__}, expected an object")
    for asset in asset_ids:
        load_norm_stats(directory, asset, quantiles=False)


def _require_asset(required: str, stats_paths: list[str], where: str) -> None:
    there = sorted(asset_id(path) for path in stats_paths)
    if required not in there:
        raise CheckpointError(f"no norm stats for asset {required!r} in {where}; there are: {', '.join(there) or 'none'}")
