from __future__ import annotations

import json
import logging
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pi0.errors import CheckpointError, DownloadError
from pi0.manifest import MANIFEST, load_manifest
from pi0.norm_stats import load_norm_stats
from pi0.orbax import OrbaxParams
from pi0.prepare import PrepareResult, check_planner_checkpoint, prepare_checkpoint, prepare_planner_checkpoint
from tests.bucket_stand_in import Buckets, bucket_stand_in
from tests.hub_stand_in import Hub, Repo, hub_stand_in
from tests.pi0.fetching import LEROBOT, ORBAX, directory_files, leftovers, start_python, tar_of

PLANNER_REPO = "Hebbian-Robotics/pi05_subtask"
TAR = "jax/pi05_subtask.tar"
ASSETS = "openpi-assets/checkpoints/pi05_base/assets"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with hub_stand_in() as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        running.repos[PLANNER_REPO] = Repo({TAR: tar_of(ORBAX), "README.md": b"# subtasks"})
        running.repos["lerobot/pi05_base"] = Repo({name: (LEROBOT / name).read_bytes() for name in ("model.safetensors", "config.json")})
        yield running


@pytest.fixture
def buckets(monkeypatch: pytest.MonkeyPatch) -> Iterator[Buckets]:
    with bucket_stand_in() as running:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", running.url)
        running.add_directory(ASSETS, ORBAX / "assets")
        yield running


def replace_tar(hub: Hub, directory: Path) -> None:
    hub.repos[PLANNER_REPO].files[TAR] = tar_of(directory)


def edited_copy(tmp_path: Path) -> Path:
    """Another complete checkpoint, told apart by one more file."""
    import shutil

    copy = tmp_path / "edited"
    shutil.copytree(ORBAX, copy)
    (copy / "second.txt").write_text("the second version")
    return copy


class TestPlanner:
    def test_fetches_unpacks_verifies_and_records(self, hub: Hub, tmp_path: Path) -> None:
        steps: list[str] = []
        result = prepare_planner_checkpoint(output_dir=tmp_path / "out", progress=lambda done, total, label: steps.append(label))
        assert result.directory == tmp_path / "out"
        assert not result.reused
        made = directory_files(tmp_path / "out")
        manifest = json.loads(made.pop(MANIFEST))
        assert made == directory_files(ORBAX)
        assert manifest["source"] == {"hf_repo": PLANNER_REPO, "tar_path_in_repo": TAR, "commit": hub.repos[PLANNER_REPO].commit}
        assert {name: entry["size"] for name, entry in manifest["files"].items()} == {name: len(content) for name, content in made.items()}
        assert manifest["created_by"].startswith("tandem-vla ")
        assert leftovers(tmp_path) == {"out"}
        assert list(dict.fromkeys(steps)) == [f"{PLANNER_REPO}/{TAR}", "unpacking", "checking weights", "hashing"]
        golden, ours = OrbaxParams(ORBAX), OrbaxParams(tmp_path / "out")
        for name in golden:
            np.testing.assert_array_equal(ours.read(name), golden.read(name))

    def test_a_second_run_asks_nobody(self, hub: Hub, tmp_path: Path) -> None:
        first = prepare_planner_checkpoint(output_dir=tmp_path / "out")
        hub.requests.clear()
        second = prepare_planner_checkpoint(output_dir=tmp_path / "out")
        assert second == PrepareResult(first.directory, first.manifest, reused=True)
        assert hub.requests == []

    def test_force_download_fetches_what_is_there_now(self, hub: Hub, tmp_path: Path) -> None:
        prepare_planner_checkpoint(output_dir=tmp_path / "out")
        replace_tar(hub, edited_copy(tmp_path))
        assert prepare_planner_checkpoint(output_dir=tmp_path / "out").reused
        assert not prepare_planner_checkpoint(output_dir=tmp_path / "out", force_download=True).reused
        assert (tmp_path / "out/second.txt").exists()
        assert leftovers(tmp_path) == {"out", "edited"}, "the old directory was ours to remove"

    @pytest.mark.parametrize("damage", ["missing", "cut"])
    def test_a_damaged_directory_is_fetched_again(self, hub: Hub, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
        prepare_planner_checkpoint(output_dir=tmp_path / "out")
        victim = tmp_path / "out/params/_METADATA"
        if damage == "missing":
            victim.unlink()
        else:
            victim.write_bytes(victim.read_bytes()[:-1])
        with caplog.at_level(logging.WARNING):
            assert not prepare_planner_checkpoint(output_dir=tmp_path / "out").reused
        assert "params/_METADATA" in caplog.text
        assert victim.read_bytes() == (ORBAX / "params/_METADATA").read_bytes()

    def test_a_link_to_the_output_directory_stays_a_link(self, hub: Hub, tmp_path: Path) -> None:
        (tmp_path / "volume").mkdir()
        (tmp_path / "link").symlink_to(tmp_path / "volume")
        prepare_planner_checkpoint(output_dir=tmp_path / "link")
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "volume/params/_METADATA").is_file()


class TestUserFiles:
    def test_a_directory_of_the_user_is_refused(self, hub: Hub, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out/thesis.txt").write_text("precious")
        with pytest.raises(CheckpointError, match=r"out exists and was not made by this command; choose another"):
            prepare_planner_checkpoint(output_dir=tmp_path / "out")
        assert hub.requests == []
        assert directory_files(tmp_path / "out") == {"thesis.txt": b"precious"}

    def test_force_moves_it_aside(self, hub: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out/thesis.txt").write_text("precious")
        with caplog.at_level(logging.WARNING):
            prepare_planner_checkpoint(output_dir=tmp_path / "out", force_download=True)
        (backup,) = tmp_path.glob("out.bak-*")
        assert directory_files(backup) == {"thesis.txt": b"precious"}
        assert str(backup) in caplog.text

    @pytest.mark.parametrize("change", ["added", "edited"])
    def test_so_is_ours_once_the_user_has_changed_it(self, hub: Hub, tmp_path: Path, change: str) -> None:
        prepare_planner_checkpoint(output_dir=tmp_path / "out")
        name = "notes.txt" if change == "added" else "assets/droid/norm_stats.json"
        (tmp_path / "out" / name).write_text("precious")
        prepare_planner_checkpoint(output_dir=tmp_path / "out", force_download=True)
        (backup,) = tmp_path.glob("out.bak-*")
        assert (backup / name).read_text() == "precious"

    def test_an_empty_directory_is_used(self, hub: Hub, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        prepare_planner_checkpoint(output_dir=tmp_path / "out")
        assert leftovers(tmp_path) == {"out"}

    @pytest.mark.parametrize("force", [False, True])
    def test_a_file_is_refused(self, hub: Hub, tmp_path: Path, force: bool) -> None:
        (tmp_path / "out").write_text("precious")
        with pytest.raises(CheckpointError, match="out is a file, expected a directory"):
            prepare_planner_checkpoint(output_dir=tmp_path / "out", force_download=force)
        assert (tmp_path / "out").read_text() == "precious"

    def test_another_checkpoint_is_not_replaced_unasked(self, hub: Hub, tmp_path: Path) -> None:
        prepare_planner_checkpoint(output_dir=tmp_path / "out")
        before = directory_files(tmp_path / "out")
        with pytest.raises(CheckpointError, match=f"was prepared from hf_repo {PLANNER_REPO}.*force the download to replace it"):
            prepare_planner_checkpoint(output_dir=tmp_path / "out", hf_repo="someone/else")
        assert directory_files(tmp_path / "out") == before


def with_file(name: str, content: bytes | None) -> dict[str, bytes]:
    files = directory_files(ORBAX)
    if content is None:
        del files[name]
    else:
        files[name] = content
    return files


CHUNK = max((path for path in ORBAX.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size).relative_to(ORBAX).as_posix()
METADATA = json.loads((ORBAX / "params/_METADATA").read_text())


def without_leaf(part: str) -> bytes:
    kept = {key: value for key, value in METADATA["tree_metadata"].items() if part not in key}
    assert len(kept) < len(METADATA["tree_metadata"])
    return json.dumps(METADATA | {"tree_metadata": kept}).encode()


BROKEN = [
    ("no params", {"99/README": b"hello"}, "no Orbax checkpoint in"),
    ("no _METADATA", with_file("params/_METADATA", None), "no Orbax checkpoint in"),
    ("broken _METADATA", with_file("params/_METADATA", b"{"), "is not Orbax tree metadata"),
    ("empty _METADATA", with_file("params/_METADATA", b'{"tree_metadata": {}}'), "lists no parameters"),
    ("no manifest", with_file("params/manifest.ocdbt", None), "no manifest.ocdbt"),
    ("missing chunk file", with_file(CHUNK, None), "cannot"),
    ("cut chunk file", with_file(CHUNK, (ORBAX / CHUNK).read_bytes()[:100]), "cannot"),
    ("damaged chunk file", with_file(CHUNK, bytes(255 - byte for byte in (ORBAX / CHUNK).read_bytes())), "cannot"),
    ("missing leaf", with_file("params/_METADATA", without_leaf("MlpBlock_0")), "MlpBlock_0"),
]


@pytest.mark.parametrize(("files", "message"), [pytest.param(files, message, id=name) for name, files, message in BROKEN])
def test_an_archive_without_a_whole_checkpoint_is_refused(hub: Hub, tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    prepare_planner_checkpoint(output_dir=tmp_path / "out")
    before = directory_files(tmp_path / "out")
    for name, content in files.items():
        (tmp_path / "broken" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "broken" / name).write_bytes(content)
    replace_tar(hub, tmp_path / "broken")
    with pytest.raises(CheckpointError) as raised:
        prepare_planner_checkpoint(output_dir=tmp_path / "out", force_download=True)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
    assert "partial-tandem" not in str(raised.value)
    assert directory_files(tmp_path / "out") == before
    assert leftovers(tmp_path) == {"out", "broken"}, "a bad archive is not kept"
    replace_tar(hub, ORBAX)
    assert not prepare_planner_checkpoint(output_dir=tmp_path / "out", force_download=True).reused


def test_a_bomb_is_refused_by_the_bound(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"over the limit of 100\.0 kB"):
        prepare_planner_checkpoint(output_dir=tmp_path / "out", max_bytes=100_000)
    assert leftovers(tmp_path) == set()


def test_check_planner_checkpoint_accepts_both_golden_trees() -> None:
    for name in ("pi05_orbax", "pi0_orbax"):
        check_planner_checkpoint(ORBAX.parent / name)


class TestHubFailures:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"hf_repo": "no/such"}, "no repository no/such on .*; check the id, and set HF_TOKEN if it is private"),
            ({"hf_repo": "no such repo"}, "'no such repo' is not a repository id; expected <organisation>/<name>"),
            ({"hf_repo": "me/private"}, "no repository me/private on"),
            ({"hf_repo": "me/gated"}, "me/gated on .* is gated: accept its conditions"),
            ({"tar_path_in_repo": "jax/other.tar"}, rf"{PLANNER_REPO} \(revision main\) has no jax/other.tar"),
        ],
    )
    def test_says_what_is_wrong_in_one_line(self, hub: Hub, tmp_path: Path, arguments: dict[str, str], message: str) -> None:
        hub.repos["me/private"] = Repo({TAR: b""}, private=True)
        hub.repos["me/gated"] = Repo({TAR: b""}, gated=True)
        with pytest.raises(DownloadError, match=message) as raised:
            prepare_planner_checkpoint(output_dir=tmp_path / "out", **arguments)
        assert "\n" not in str(raised.value)
        assert leftovers(tmp_path) == set()

    def test_a_token_opens_a_private_repository(self, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        hub.repos["me/private"] = Repo({TAR: tar_of(ORBAX)}, private=True)
        monkeypatch.setenv("HF_TOKEN", "hf_right")
        assert not prepare_planner_checkpoint(hf_repo="me/private", output_dir=tmp_path / "out").reused

    def test_no_connection(self, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
        with pytest.raises(DownloadError, match=r"cannot fetch .*Connection refused; check the network and HF_ENDPOINT") as raised:
            prepare_planner_checkpoint(output_dir=tmp_path / "out")
        assert "\n" not in str(raised.value)

    def test_a_server_that_is_no_hub(self, buckets: Buckets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HF_ENDPOINT", buckets.url)
        with pytest.raises(DownloadError, match="cannot fetch"):
            prepare_planner_checkpoint(output_dir=tmp_path / "out")

    @pytest.mark.parametrize("fault", ["500", "drop", "truncate"])
    def test_hiccups_are_overcome(self, hub: Hub, tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("time.sleep", lambda seconds: None)
        hub.faults[TAR] = [fault]  # type: ignore[list-item]
        prepare_planner_checkpoint(output_dir=tmp_path / "out")
        assert hub.faults[TAR] == []
        assert (tmp_path / "out/params/_METADATA").is_file()

    @pytest.mark.parametrize(
        ("fault", "message"), [("short", "cannot fetch .* of size"), ("tamper", "has sha256 .*, expected"), ("403", "cannot fetch")]
    )
    def test_wrong_bytes_are_noticed_and_the_next_run_succeeds(self, hub: Hub, tmp_path: Path, fault: str, message: str) -> None:
        prepare_planner_checkpoint(output_dir=tmp_path / "out")
        before = directory_files(tmp_path / "out")
        replace_tar(hub, edited_copy(tmp_path))
        hub.faults[TAR] = [fault]  # type: ignore[list-item]
        with pytest.raises(DownloadError, match=message) as raised:
            prepare_planner_checkpoint(output_dir=tmp_path / "out", force_download=True)
        assert "\n" not in str(raised.value)
        assert directory_files(tmp_path / "out") == before
        prepare_planner_checkpoint(output_dir=tmp_path / "out", force_download=True)
        assert (tmp_path / "out/second.txt").exists()
        assert leftovers(tmp_path) == {"out", "edited"}


KILLED = """
import os, signal, sys
from pathlib import Path
import pi0.prepare, pi0.staging
die = lambda *arguments, **named: os.kill(os.getpid(), signal.SIGKILL)
moment = sys.argv[2]
if "." in moment:
    module, name = moment.rsplit(".", 1)
    setattr(sys.modules[module], name, die)
def progress(done, total, label):
    if label.startswith(moment) and done > 0:
        die()
pi0.prepare.prepare_planner_checkpoint(output_dir=Path(sys.argv[1]), force_download=True, progress=progress)
"""


@pytest.mark.parametrize(
    "moment",
    [
        PLANNER_REPO,
        "unpacking",
        "checking weights",
        "hashing",
        "pi0.staging.exchange",
        "pi0.staging._dispose",
        "pi0.staging._is_ours",
    ],
)
def test_killed_at_any_moment_the_directory_is_whole_and_the_next_run_succeeds(hub: Hub, tmp_path: Path, moment: str) -> None:
    prepare_planner_checkpoint(output_dir=tmp_path / "out")
    old = directory_files(tmp_path / "out")
    replace_tar(hub, edited_copy(tmp_path))
    child = start_python(KILLED, str(tmp_path / "out"), moment)
    _, stderr = child.communicate()
    assert child.returncode == -signal.SIGKILL, stderr

    now = directory_files(tmp_path / "out")
    manifest = load_manifest(tmp_path / "out", MANIFEST)
    assert manifest is not None
    assert manifest.problems(tmp_path / "out") == []
    assert now == old or "second.txt" in now
    check_planner_checkpoint(tmp_path / "out")

    prepare_planner_checkpoint(output_dir=tmp_path / "out", force_download=True)
    assert (tmp_path / "out/second.txt").exists()
    assert leftovers(tmp_path) == {"out", "edited"}


def test_what_a_killed_run_left_is_tidied_by_a_run_that_needs_nothing(hub: Hub, tmp_path: Path) -> None:
    prepare_planner_checkpoint(output_dir=tmp_path / "out")
    start_python(KILLED, str(tmp_path / "out"), "pi0.staging._dispose").communicate()
    assert "out.replaced-tandem" in leftovers(tmp_path)
    assert prepare_planner_checkpoint(output_dir=tmp_path / "out").reused
    assert leftovers(tmp_path) == {"out"}


def test_a_killed_run_keeps_the_archive_for_the_next(hub: Hub, tmp_path: Path) -> None:
    start_python(KILLED, str(tmp_path / "out"), "checking weights").communicate()
    assert hub.gets(TAR) == 1
    prepare_planner_checkpoint(output_dir=tmp_path / "out")
    assert hub.gets(TAR) == 1


def test_two_processes_fetch_once(hub: Hub, tmp_path: Path) -> None:
    code = """
import logging, sys
from pathlib import Path
from pi0.prepare import prepare_planner_checkpoint
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
logging.getLogger("httpx2").setLevel(logging.WARNING)
print("reused", prepare_planner_checkpoint(output_dir=Path(sys.argv[1])).reused)
"""
    hub.hold[TAR] = threading.Event()
    first = start_python(code, str(tmp_path / "out"))
    assert hub.reached.wait(60)
    second = start_python(code, str(tmp_path / "out"))
    assert second.stdout is not None
    assert "another process is fetching" in second.stdout.readline()
    hub.hold[TAR].set()
    outputs = [child.communicate()[0] for child in (first, second)]
    assert [child.returncode for child in (first, second)] == [0, 0]
    assert "reused False" in outputs[0]
    assert "reused True" in outputs[1]
    assert hub.gets(TAR) == 1


class TestLeRobot:
    def test_joins_weights_and_norm_stats(self, hub: Hub, buckets: Buckets, tmp_path: Path) -> None:
        result = prepare_checkpoint(output_dir=tmp_path / "out")
        assert result.manifest.source == {
            "model_id": "lerobot/pi05_base",
            "openpi_assets_uri": f"gs://{ASSETS}",
            "commit": hub.repos["lerobot/pi05_base"].commit,
        }
        made = directory_files(tmp_path / "out")
        del made[MANIFEST]
        weights = {name: (LEROBOT / name).read_bytes() for name in ("model.safetensors", "config.json")}
        assert made == weights | {f"assets/{name}": content for name, content in directory_files(ORBAX / "assets").items()}
        assert "state" in load_norm_stats(tmp_path / "out", "physical-intelligence/libero", quantiles=True)
        assert leftovers(tmp_path) == {"out"}

    def test_a_second_run_asks_nobody(self, hub: Hub, buckets: Buckets, tmp_path: Path) -> None:
        prepare_checkpoint(output_dir=tmp_path / "out")
        hub.requests.clear()
        buckets.requests.clear()
        assert prepare_checkpoint(output_dir=tmp_path / "out", required_asset_id="droid").reused
        with pytest.raises(
            CheckpointError, match=r"no norm stats for asset 'mars' in .*/out; there are: droid, physical-intelligence/libero, trossen"
        ):
            prepare_checkpoint(output_dir=tmp_path / "out", required_asset_id="mars")
        assert hub.requests == buckets.requests == []

    def test_assets_may_be_a_local_directory(self, hub: Hub, tmp_path: Path) -> None:
        prepare_checkpoint(output_dir=tmp_path / "out", openpi_assets_uri=str(ORBAX / "assets"))
        assert (tmp_path / "out/assets/trossen/norm_stats.json").is_file()

    def test_a_missing_asset_is_told_before_the_weights_are_fetched(self, hub: Hub, buckets: Buckets, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"no norm stats for asset 'mars' in gs://.*; there are: droid, .*, trossen"):
            prepare_checkpoint(output_dir=tmp_path / "out", required_asset_id="mars")
        assert hub.requests == []
        assert leftovers(tmp_path) == set()

    def test_nothing_at_the_assets_location(self, hub: Hub, buckets: Buckets, tmp_path: Path) -> None:
        with pytest.raises(DownloadError, match="nothing at gs://openpi-assets/elsewhere; check the bucket and the path"):
            prepare_checkpoint(output_dir=tmp_path / "out", openpi_assets_uri="gs://openpi-assets/elsewhere")

    @pytest.mark.parametrize(
        ("name", "content", "error", "message"),
        [
            ("model.safetensors", (LEROBOT / "model.safetensors").read_bytes()[:-1], CheckpointError, "its header describes .*: it is incomplete"),
            ("model.safetensors", b"<html>" * 10, CheckpointError, "is not a safetensors file"),
            ("model.safetensors", None, DownloadError, r"has no model\.safetensors"),
            ("config.json", b"{", CheckpointError, r"config\.json is not JSON"),
            ("config.json", b"[]", CheckpointError, r"config\.json holds a list, expected an object"),
            ("config.json", None, DownloadError, r"has no config\.json"),
        ],
    )
    def test_bad_weights(
        self, hub: Hub, buckets: Buckets, tmp_path: Path, name: str, content: bytes | None, error: type[Exception], message: str
    ) -> None:
        files = hub.repos["lerobot/pi05_base"].files
        if content is None:
            del files[name]
        else:
            files[name] = content
        with pytest.raises(error, match=message) as raised:
            prepare_checkpoint(output_dir=tmp_path / "out")
        assert "\n" not in str(raised.value)
        assert not (tmp_path / "out").exists()

    def test_split_weights_are_named_as_such(self, hub: Hub, buckets: Buckets, tmp_path: Path) -> None:
        hub.repos["big/model"] = Repo({"model.safetensors.index.json": b"{}", "config.json": b"{}"})
        with pytest.raises(CheckpointError, match=r"big/model has its weights in several files .*not supported; merge them"):
            prepare_checkpoint(model_id="big/model", output_dir=tmp_path / "out")

    def test_broken_norm_stats(self, hub: Hub, buckets: Buckets, tmp_path: Path) -> None:
        buckets.objects[f"{ASSETS}/droid/norm_stats.json"] = b'{"norm_stats": 3}'
        with pytest.raises(CheckpointError, match=r"droid/norm_stats\.json is not a norm-stats file"):
            prepare_checkpoint(output_dir=tmp_path / "out")
        assert leftovers(tmp_path) == set()

    @pytest.mark.parametrize(("fault", "message"), [("404", "cannot fetch"), ("short", "cut short|cannot fetch"), ("tamper", "has md5")])
    def test_bucket_faults_leave_nothing_half_done(self, hub: Hub, buckets: Buckets, tmp_path: Path, fault: str, message: str) -> None:
        buckets.faults[f"{ASSETS}/droid/norm_stats.json"] = [fault]  # type: ignore[list-item]
        with pytest.raises(DownloadError, match=message):
            prepare_checkpoint(output_dir=tmp_path / "out")
        assert not (tmp_path / "out").exists()
        assert not prepare_checkpoint(output_dir=tmp_path / "out").reused
        assert leftovers(tmp_path) == {"out"}
