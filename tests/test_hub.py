"""The hub: what is fetched, what the cache gives, and what is said where neither has it. Nothing leaves the machine."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import httpx2
import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from detrkit import hub
from detrkit.errors import MissingExtraError, ModelError, UsageError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OLDER = "fedcba9876543210fedcba9876543210fedcba98"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, no token, and an address where nobody answers."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    monkeypatch.setenv("NO_PROXY", "*")
    return tmp_path / "cache"


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def put(cache: Path, name: str, *files: str, commit: str = COMMIT, ref: str = "main") -> Path:
    """Lay a model's files into the cache as `huggingface_hub` does."""
    root = cache / f"models--{name.replace('/', '--')}"
    folder = root / "snapshots" / commit
    folder.mkdir(parents=True)
    (root / "refs").mkdir(exist_ok=True)
    (root / "refs" / ref).write_text(commit)
    for file in files:
        (folder / file).write_text("{}")
    return folder


def response(status: int) -> Any:
    return httpx2.Response(status, request=httpx2.Request("GET", "https://huggingface.co/api/models/ants/nest"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("facebook/detr-resnet-50", True),
        ("me/my_model.v2@main", True),
        ("me/model@refs/pr/1", True),
        ("detr-r50", False),
        ("/runs/cells", False),
        ("./cells", False),
        ("../cells/nano", False),
        ("a/b/c", False),
        ("~/cells", False),
        ("me/", False),
    ],
)
def test_names(text: str, expected: bool) -> None:
    assert hub.is_name(text) is expected


@pytest.mark.usefixtures("offline")
def test_offline_the_cache_answers(cache: Path) -> None:
    folder = put(cache, "ants/nest", "config.json", "model.safetensors")
    assert hub.fetch("ants/nest") == folder
    tagged = put(cache, "ants/nest", "config.json", "model.safetensors", commit=OLDER, ref="v1")
    assert hub.fetch("ants/nest@v1") == hub.fetch(f"ants/nest@{OLDER}") == tagged


def test_the_cache_answers_where_the_hub_does_not(cache: Path) -> None:
    folder = put(cache, "ants/nest", "config.json", "pytorch_model.bin")
    assert hub.fetch("ants/nest") == folder


def test_the_cache_answers_where_the_connection_breaks(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = put(cache, "ants/nest", "config.json", "model.safetensors")

    def broken(*args: Any, **options: Any) -> str:
        if options["local_files_only"]:
            return str(folder)
        raise httpx2.ReadError("reset by peer")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", broken)
    assert hub.fetch("ants/nest") == folder


@pytest.mark.usefixtures("offline")
def test_offline_and_not_cached(cache: Path) -> None:
    with pytest.raises(ModelError, match=r"ants/nest: .*not in the cache.*HF_HUB_OFFLINE forbids") as caught:
        hub.fetch("ants/nest")
    assert str(cache) in caught.value.expected
    assert caught.value.remedy.startswith("Unset HF_HUB_OFFLINE to fetch it once, or copy its folder")


def test_neither_cached_nor_reachable(cache: Path) -> None:
    with pytest.raises(ModelError, match=r"ants/nest: .*not in the cache, and the .*cannot be reached; got ") as caught:
        hub.fetch("ants/nest")
    assert caught.value.remedy.startswith("Connect to fetch it once")
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("offline")
def test_a_cached_description_without_weights_is_no_model(cache: Path) -> None:
    put(cache, "ants/nest", "config.json")
    with pytest.raises(ModelError, match=r"no weights.*got config.json.*connect once") as caught:
        hub.fetch("ants/nest")
    assert caught.value.where == "ants/nest"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (errors.RepositoryNotFoundError("404", response=response(404)), r"neither such a path here nor such a model"),
        (errors.GatedRepoError("403", response=response(403)), r"only to those who have asked.*co/ants/nest"),
        (errors.RevisionNotFoundError("404", response=response(404)), r"^ants/nest: .*no such revision.*got 'v9'"),
    ],
)
def test_a_no_of_the_hub_is_told(cache: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str) -> None:
    def refuse(*args: Any, **options: Any) -> str:
        assert not options["local_files_only"], "an older copy is no answer to what the hub denies"
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ModelError, match=message):
        hub.fetch("ants/nest@v9")


@pytest.mark.parametrize("safe", [True, False])
def test_pickles_travel_only_where_there_is_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, safe: bool
) -> None:
    there = ["config.json", "pytorch_model.bin", "README.md", "training.py", *(["model.safetensors"] if safe else [])]
    asked = []

    def download(repository: str, *, revision: Any, allow_patterns: list[str], **options: Any) -> str:
        asked.append((repository, revision))
        (tmp_path / COMMIT).mkdir(exist_ok=True)
        for file in there:
            if any(Path(file).match(pattern) for pattern in allow_patterns):
                (tmp_path / COMMIT / file).touch()
        return str(tmp_path / COMMIT)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    fetched = {file.name for file in hub.fetch("ants/nest@v2").iterdir()}
    assert fetched == {"config.json", "model.safetensors" if safe else "pytorch_model.bin"}
    assert set(asked) == {("ants/nest", "v2")}


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for act in (lambda: hub.fetch("ants/nest"), lambda: hub.upload(tmp_path, "ants/nest")):
        with pytest.raises(MissingExtraError, match=r"pip install 'detrkit\[hub\]'"):
            act()


def test_an_upload_makes_the_repository_and_sends_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[Any] = []
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "secret")
    monkeypatch.setattr(
        huggingface_hub.HfApi, "create_repo", lambda self, name, **options: done.append((name, options))
    )
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", lambda self, **options: done.append(options))
    assert hub.upload(tmp_path, "ants/nest", private=True) == "http://127.0.0.1:9/ants/nest"
    assert done[0] == ("ants/nest", {"private": True, "exist_ok": True})
    assert (done[1]["repo_id"], done[1]["folder_path"]) == ("ants/nest", tmp_path)


@pytest.mark.parametrize("name", ["nest", "a/b/c", "ants/nest@main", "/ants"])
def test_an_upload_needs_a_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=r"no name for a model.*expected organisation/name"):
        hub.upload(tmp_path, name)


def test_an_upload_needs_a_token(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"ants/nest: There is no token.*hf auth login .or set HF_TOKEN."):
        hub.upload(tmp_path, "ants/nest")


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, "does not know the token.*hf auth login"),
        (403, "no right to write to 'ants'.*user name or organisation"),
        (500, "refused the upload; got a line$"),
        (None, "cannot be reached.*--dry-run"),
    ],
)
def test_why_an_upload_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int | None, message: str
) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        if status is None:
            raise httpx2.ConnectError("nobody there")
        raise errors.HfHubHTTPError("a line\nand another", response=response(status))

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "secret")
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refuse)
    with pytest.raises(ModelError, match=message):
        hub.upload(tmp_path, "ants/nest")
