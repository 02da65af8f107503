from __future__ import annotations

import hashlib
import logging
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from pi0 import locations
from pi0.errors import CheckpointError, DownloadError
from pi0.manifest import CACHE_MANIFEST
from pi0.orbax import OrbaxParams
from tests.bucket_stand_in import Buckets, bucket_stand_in
from tests.golden_data import TOKENIZER
from tests.hub_stand_in import Hub, Repo, hub_stand_in
from tests.pi0.fetching import LEROBOT, ORBAX, directory_files, leftovers, start_python

URI = "gs://openpi-assets/checkpoints/pi05_base"
CACHED = "openpi-assets/checkpoints/pi05_base"


@pytest.fixture
def buckets(monkeypatch: pytest.MonkeyPatch) -> Iterator[Buckets]:
    with bucket_stand_in() as running:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", running.url)
        running.add_directory(CACHED, ORBAX)
        yield running


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with hub_stand_in() as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        running.repos["lerobot/pi05_base"] = Repo({name: (LEROBOT / name).read_bytes() for name in ("model.safetensors", "config.json")})
        yield running


def fetched(directory: Path) -> dict[str, bytes]:
    files = directory_files(directory)
    del files[CACHE_MANIFEST]
    return files


class TestLocal:
    def test_a_directory_is_itself(self, tmp_path: Path) -> None:
        assert locations.resolve(str(ORBAX), data_home=tmp_path) == ORBAX
        assert locations.resolve(ORBAX, data_home=tmp_path) == ORBAX
        assert not any(tmp_path.iterdir())

    def test_home_and_relative_paths(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "checkpoint").mkdir()
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.chdir(tmp_path)
        assert locations.resolve("~/checkpoint", data_home=tmp_path) == tmp_path / "checkpoint"
        assert locations.resolve("checkpoint", data_home=tmp_path) == tmp_path / "checkpoint"

    def test_default_data_home(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.delenv("OPENPI_DATA_HOME", raising=False)
        assert locations.default_data_home() == tmp_path / ".cache/openpi"
        monkeypatch.setenv("OPENPI_DATA_HOME", "~/data")
        assert locations.default_data_home() == tmp_path / "data"


BAD_URIS = [
    ("/no/such/place", "no such directory /no/such/place; check the path"),
    (str(ORBAX / "tiny_model.json"), r"tiny_model\.json \(it is a file\)"),
    ("ftp://host/checkpoint", "unknown scheme ftp://; expected a local path, gs://, s3:// or hf://"),
    ("file:///tmp", "unknown scheme file://"),
    ("gs://", "names no bucket; expected gs://<bucket>/<path>"),
    ("gs://bucket/../../etc", "points outside"),
    ("hf://lerobot", "names no repository; expected hf://<organisation>/<name>"),
    ("hf://a/b@main/../../../c", "points outside"),
]


@pytest.mark.parametrize(("uri", "message"), BAD_URIS)
def test_bad_locations(tmp_path: Path, uri: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as raised:
        locations.resolve(uri, data_home=tmp_path / "home")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize(
    ("uri", "path"),
    [
        (URI, CACHED),
        ("s3://b/c/", "b/c"),
        ("hf://org/name", "hf/org/name@main"),
        ("hf://org/name@v1/a/b", "hf/org/name@v1/a/b"),
        ("hf://org/name@refs%2Fpr%2F1", "hf/org/name@refs%2Fpr%2F1"),
    ],
)
def test_cache_layout(tmp_path: Path, uri: str, path: str) -> None:
    assert locations.cached_path(uri, tmp_path) == tmp_path / path


class TestBuckets:
    def test_fetches_a_checkpoint_once(self, buckets: Buckets, tmp_path: Path) -> None:
        buckets.objects[f"{CACHED}/train_state/huge"] = b"optimizer"
        buckets.objects[f"{CACHED}/params/"] = b""
        directory = locations.resolve(URI, data_home=tmp_path)
        assert directory == tmp_path / CACHED
        assert fetched(directory) == directory_files(ORBAX)
        assert leftovers(directory.parent) == {"pi05_base"}
        OrbaxParams(directory).read("action_in_proj/bias")
        buckets.requests.clear()
        assert locations.resolve(URI, data_home=tmp_path) == directory
        assert buckets.requests == []

    def test_params_alone(self, buckets: Buckets, tmp_path: Path) -> None:
        directory = locations.resolve(f"{URI}/params", data_home=tmp_path)
        assert fetched(directory) == directory_files(ORBAX / "params")

    def test_a_copy_that_openpi_made_is_used(self, buckets: Buckets, tmp_path: Path) -> None:
        import shutil

        shutil.copytree(ORBAX, tmp_path / CACHED)
        assert locations.resolve(URI, data_home=tmp_path) == tmp_path / CACHED
        assert buckets.requests == []

    def test_a_partial_copy_that_openpi_made_is_not(self, buckets: Buckets, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        """openpi moves failed downloads into place (reference/embodiments.md §9)."""
        import shutil

        shutil.copytree(ORBAX, tmp_path / CACHED)
        (tmp_path / CACHED / "params/manifest.ocdbt").unlink()
        with caplog.at_level(logging.WARNING):
            directory = locations.resolve(URI, data_home=tmp_path)
        assert fetched(directory) == directory_files(ORBAX)
        assert "is not complete (" in caplog.text
        assert len(list(directory.parent.glob("pi05_base.bak-*"))) == 1, "it has no record, so it may be the user's own"

    def test_a_damaged_copy_of_ours_is_fetched_again(self, buckets: Buckets, tmp_path: Path) -> None:
        directory = locations.resolve(URI, data_home=tmp_path)
        (directory / "params/_METADATA").unlink()
        assert fetched(locations.resolve(URI, data_home=tmp_path)) == directory_files(ORBAX)
        assert leftovers(directory.parent) == {"pi05_base"}

    def test_force_download_takes_what_is_there_now(self, buckets: Buckets, tmp_path: Path) -> None:
        directory = locations.resolve(URI, data_home=tmp_path)
        buckets.objects[f"{CACHED}/new"] = b"new"
        locations.resolve(URI, data_home=tmp_path, force_download=True)
        assert (directory / "new").read_bytes() == b"new"

    @pytest.mark.parametrize(
        ("fault", "message"), [("404", "cannot fetch gs://"), ("short", "cut short|cannot fetch"), ("tamper", "has md5 .*, expected")]
    )
    def test_a_failed_transfer_is_never_served(self, buckets: Buckets, tmp_path: Path, fault: str, message: str) -> None:
        directory = locations.resolve(URI, data_home=tmp_path)
        old = directory_files(directory)
        buckets.objects[f"{CACHED}/new"] = b"new"
        buckets.faults[f"{CACHED}/params/manifest.ocdbt"] = [fault]  # type: ignore[list-item]
        with pytest.raises(DownloadError, match=message) as raised:
            locations.resolve(URI, data_home=tmp_path, force_download=True)
        assert "\n" not in str(raised.value)
        assert directory_files(directory) == old
        locations.resolve(URI, data_home=tmp_path, force_download=True)
        assert (directory / "new").exists()
        assert leftovers(directory.parent) == {"pi05_base"}

    def test_the_next_run_fetches_only_what_is_missing(self, buckets: Buckets, tmp_path: Path) -> None:
        last = f"{CACHED}/tiny_model.json"
        buckets.faults[last] = ["404"]
        with pytest.raises(DownloadError):
            locations.resolve(URI, data_home=tmp_path)
        complete = len(directory_files(tmp_path / f"{CACHED}.partial-tandem/content"))
        buckets.requests.clear()
        locations.resolve(URI, data_home=tmp_path)
        downloads = [request for request in buckets.requests if request.startswith("/download/")]
        assert len(downloads) == len(directory_files(ORBAX)) - complete

    def test_what_changed_since_an_interrupted_run_is_fetched_anew(self, buckets: Buckets, tmp_path: Path) -> None:
        buckets.faults[f"{CACHED}/tiny_model.json"] = ["404"]
        with pytest.raises(DownloadError):
            locations.resolve(URI, data_home=tmp_path)
        name = "assets/droid/norm_stats.json"
        changed = buckets.objects[f"{CACHED}/{name}"].swapcase()
        buckets.objects[f"{CACHED}/{name}"] = changed
        assert (locations.resolve(URI, data_home=tmp_path) / name).read_bytes() == changed

    def test_nothing_there(self, buckets: Buckets, tmp_path: Path) -> None:
        with pytest.raises(DownloadError, match="nothing at gs://openpi-assets/checkpoints/pi9; check the bucket and the path"):
            locations.resolve("gs://openpi-assets/checkpoints/pi9", data_home=tmp_path)

    def test_not_a_checkpoint(self, buckets: Buckets, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=rf"{URI}/assets is not a checkpoint: expected params/_METADATA or model\.safetensors, found"):
            locations.resolve(f"{URI}/assets", data_home=tmp_path)

    def test_a_checkpoint_that_does_not_open(self, buckets: Buckets, tmp_path: Path) -> None:
        buckets.objects[f"{CACHED}/params/_METADATA"] = b"{}"
        with pytest.raises(DownloadError, match=f"{URI} was fetched, but is not a usable checkpoint: .*_METADATA is not Orbax tree metadata"):
            locations.resolve(URI, data_home=tmp_path)
        assert leftovers((tmp_path / CACHED).parent) == set()

    def test_object_names_cannot_leave_the_cache(self, buckets: Buckets, tmp_path: Path) -> None:
        buckets.objects[f"{CACHED}/../../../evil"] = b"evil"
        with pytest.raises(CheckpointError, match=r"evil' points outside the target directory"):
            locations.resolve(URI, data_home=tmp_path / "home")
        assert not (tmp_path / "evil").exists()

    def test_a_closed_bucket(self, buckets: Buckets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        buckets.denied.add("openpi-assets")
        monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "missing.json"))
        with pytest.raises(DownloadError, match=f"no access to {URI}, neither anonymously nor with this machine's credentials") as raised:
            locations.resolve(URI, data_home=tmp_path)
        assert "\n" not in str(raised.value)

    def test_a_missing_client_names_the_extra(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "gcsfs", None)
        monkeypatch.setitem(sys.modules, "gcsfs.core", None)
        with pytest.raises(CheckpointError, match=r'gs:// locations need one more package: pip install "tandem-vla\[gcs\]"'):
            locations.resolve(URI, data_home=tmp_path)


class TestS3:
    """Through fsspec's in-memory file system in the place of s3fs."""

    @pytest.fixture(autouse=True)
    def memory(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from fsspec.implementations.memory import MemoryFileSystem

        class Memory(MemoryFileSystem):  # type: ignore[misc]
            store: ClassVar[dict[str, object]] = {}
            pseudo_dirs: ClassVar[list[str]] = [""]

            @classmethod
            def _strip_protocol(cls, path: str) -> str:
                return "/" + path.removeprefix("s3://").strip("/")

            def find(self, path: str, **options: object) -> object:
                if not self.storage_options["anon"]:
                    raise PermissionError("Access Denied")
                return super().find(path, **options)

        monkeypatch.setitem(sys.modules["fsspec.registry"].__dict__["_registry"], "s3", Memory)
        filesystem = Memory(anon=True)
        for name, content in directory_files(ORBAX).items():
            filesystem.pipe_file(f"/bucket/run/1000/{name}", content)

    def test_anonymously_when_credentials_do_not_open_it(self, tmp_path: Path) -> None:
        directory = locations.resolve("s3://bucket/run/1000", data_home=tmp_path)
        assert directory == tmp_path / "bucket/run/1000"
        assert fetched(directory) == directory_files(ORBAX)


class TestHub:
    def test_fetches_a_repository_once(self, hub: Hub, tmp_path: Path) -> None:
        directory = locations.resolve("hf://lerobot/pi05_base", data_home=tmp_path)
        assert directory == tmp_path / "hf/lerobot/pi05_base@main"
        assert fetched(directory) == hub.repos["lerobot/pi05_base"].files
        hub.requests.clear()
        assert locations.resolve("hf://lerobot/pi05_base", data_home=tmp_path) == directory
        assert hub.requests == []

    def test_a_folder_at_a_commit(self, hub: Hub, tmp_path: Path) -> None:
        hub.repos["me/run"] = Repo({f"steps/1000/{name}": content for name, content in directory_files(ORBAX).items()} | {"steps/2000/x": b""})
        commit = hub.repos["me/run"].commit
        directory = locations.resolve(f"hf://me/run@{commit}/steps/1000", data_home=tmp_path)
        assert fetched(directory) == directory_files(ORBAX)

    @pytest.mark.parametrize(
        ("uri", "message"),
        [
            ("hf://no/such", "no repository no/such on"),
            ("hf://lerobot/pi05_base@v9", "lerobot/pi05_base has no revision 'v9'"),
            ("hf://lerobot/pi05_base/steps", r"lerobot/pi05_base \(revision main\) has no steps"),
            ("hf://me/archive", "found jax; it has the archive jax/x.tar: fetch it with prepare-planner-checkpoint"),
            ("hf://me/split", r"weights are split into several files, which is not supported: merge them into one model\.safetensors"),
        ],
    )
    def test_failures_in_one_line(self, hub: Hub, tmp_path: Path, uri: str, message: str) -> None:
        hub.repos["me/archive"] = Repo({"jax/x.tar": b""})
        hub.repos["me/split"] = Repo({"model.safetensors.index.json": b"{}", "model-00001-of-00002.safetensors": b""})
        with pytest.raises(CheckpointError, match=message) as raised:
            locations.resolve(uri, data_home=tmp_path)
        assert "\n" not in str(raised.value)

    def test_incomplete_weights(self, hub: Hub, tmp_path: Path) -> None:
        files = hub.repos["lerobot/pi05_base"].files
        files["model.safetensors"] = files["model.safetensors"][:-10]
        with pytest.raises(DownloadError, match=r"not a usable checkpoint: .*model\.safetensors has .* its header describes"):
            locations.resolve("hf://lerobot/pi05_base", data_home=tmp_path)

    def test_two_processes_fetch_once(self, hub: Hub, tmp_path: Path) -> None:
        code = """
import logging, sys
from pathlib import Path
from pi0.locations import resolve
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
logging.getLogger("httpx2").setLevel(logging.WARNING)
print(resolve("hf://lerobot/pi05_base", data_home=Path(sys.argv[1])))
"""
        hub.hold["model.safetensors"] = threading.Event()
        first = start_python(code, str(tmp_path))
        assert hub.reached.wait(60)
        second = start_python(code, str(tmp_path))
        assert second.stdout is not None
        assert "another process is fetching" in second.stdout.readline()
        hub.hold["model.safetensors"].set()
        for child in (first, second):
            assert child.communicate()[0].strip().endswith("hf/lerobot/pi05_base@main")
            assert child.returncode == 0
        assert hub.gets("model.safetensors") == 1

    @pytest.mark.parametrize("moment", ["hf://", "hashing", "publish"])
    def test_killed_while_fetching_again(self, hub: Hub, tmp_path: Path, moment: str) -> None:
        code = """
import os, signal, sys
from pathlib import Path
import pi0.locations
die = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
moment = sys.argv[2]
if moment == "publish":
    pi0.locations.publish = die
progress = lambda done, total, label: die() if label.startswith(moment) and done else None
pi0.locations.resolve("hf://lerobot/pi05_base", data_home=Path(sys.argv[1]), force_download=True, progress=progress)
"""
        directory = locations.resolve("hf://lerobot/pi05_base", data_home=tmp_path)
        old = directory_files(directory)
        hub.repos["lerobot/pi05_base"].files["README.md"] = b"new"
        child = start_python(code, str(tmp_path), moment)
        _, stderr = child.communicate()
        assert child.returncode == -signal.SIGKILL, stderr
        assert directory_files(directory) == old
        locations.resolve("hf://lerobot/pi05_base", data_home=tmp_path, force_download=True)
        assert fetched(directory) == hub.repos["lerobot/pi05_base"].files
        assert leftovers(directory.parent) == {"pi05_base@main"}


class TestSingleFiles:
    @pytest.fixture
    def tokenizer(self, buckets: Buckets, monkeypatch: pytest.MonkeyPatch) -> bytes:
        content = TOKENIZER.read_bytes()
        buckets.objects["big_vision/paligemma_tokenizer.model"] = content
        monkeypatch.setattr(locations, "TOKENIZER_SHA256", hashlib.sha256(content).hexdigest())
        return content

    def test_the_tokenizer_is_fetched_once(self, buckets: Buckets, tmp_path: Path, tokenizer: bytes) -> None:
        path = locations.cached_tokenizer(tmp_path)
        assert path == tmp_path / "big_vision/paligemma_tokenizer.model"
        assert path.read_bytes() == tokenizer
        assert leftovers(path.parent) == {path.name}
        buckets.requests.clear()
        assert locations.cached_tokenizer(tmp_path) == path
        assert buckets.requests == []

    def test_another_file_is_refused(self, buckets: Buckets, tmp_path: Path, tokenizer: bytes) -> None:
        buckets.objects["big_vision/paligemma_tokenizer.model"] = tokenizer[:-1] + b"\1"
        with pytest.raises(DownloadError, match=r"has sha256 .*, expected .*paligemma_tokenizer\.model into the checkpoint directory") as raised:
            locations.cached_tokenizer(tmp_path)
        assert "\n" not in str(raised.value)
        assert leftovers(tmp_path / "big_vision") == set()

    def test_a_damaged_copy_is_fetched_again_and_kept_aside(self, buckets: Buckets, tmp_path: Path, tokenizer: bytes) -> None:
        path = tmp_path / "big_vision/paligemma_tokenizer.model"
        path.parent.mkdir()
        path.write_bytes(tokenizer[:1000])
        assert locations.cached_tokenizer(tmp_path).read_bytes() == tokenizer
        assert [backup.stat().st_size for backup in path.parent.glob("*.bak-*")] == [1000]

    def test_a_directory_is_not_a_file(self, buckets: Buckets, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="is a directory, expected a file"):
            locations.fetch_file(URI, data_home=tmp_path)

    def test_only_buckets_have_single_files(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="expected a gs:// or s3:// file"):
            locations.fetch_file("hf://a/b/c", data_home=tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a safetensors file"),
        (b"\xff" * 100, "is not a safetensors file"),
        ((2).to_bytes(8, "little") + b"{}", "is not a safetensors file"),
        ((4).to_bytes(8, "little") + b"null", "is not a safetensors file"),
        ((9).to_bytes(8, "little") + b'{"a": []}', "is not a safetensors file"),
    ],
)
def test_check_safetensors_refuses(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        locations.check_safetensors(tmp_path / "model.safetensors")


def test_check_safetensors_accepts_the_golden_files() -> None:
    for name in ("pi05_lerobot", "pi0_pytorch"):
        locations.check_safetensors(LEROBOT.parent / name / "model.safetensors")
