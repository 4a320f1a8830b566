"""Publication: content, manifest and hash; what a crash, a full disk or a flipped byte leaves, and how it is told."""

import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import small_disk

from kdrl_core.errors import DamagedArtifactError, ForeignFileError, KdrlError, RunError, StorageError
from kdrl_core.ledger import (
    ConstantFiles,
    Listing,
    is_current,
    is_published,
    manifest_of,
    publish_directory,
    publish_file,
    replace_file,
    require_writable,
    sweep_temporaries,
    verify_published,
)
from kdrl_core.ledger.manifest import manifest_path, read_manifest

CONTENT = b"the content of an artifact\n" * 8
needs_permissions = pytest.mark.skipif(os.geteuid() == 0, reason="root writes to read-only folders")


def write_content(path: Path) -> None:
    path.write_bytes(CONTENT)


def fill_model(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(CONTENT)
    (folder / "nested").mkdir()
    (folder / "nested" / "config.json").write_text("{}")


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def everything_below(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_whoever_reads_the_manifest_can_read_the_files(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(CONTENT)
        (folder / "model.safetensors").chmod(0o600)  # as safetensors does
        (folder / "run.sh").write_text("")
        (folder / "run.sh").chmod(0o744)

    publish_directory(tmp_path / "made", write)
    readable = (tmp_path / "made" / "manifest.json").stat().st_mode & 0o444
    assert (tmp_path / "made" / "model.safetensors").stat().st_mode & 0o777 == 0o600 | readable
    assert (tmp_path / "made" / "run.sh").stat().st_mode & 0o777 == 0o744 | readable


def test_published_file_has_its_content_and_a_manifest_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "a" / "rollouts.parquet"
    manifest = publish_file(path, write_content, inputs={"pool": "abc"}, metadata={"seconds": 1.5})
    assert path.read_bytes() == CONTENT
    assert everything_below(tmp_path) == ["a", "a/_rollouts.manifest.json", "a/rollouts.parquet"]
    assert json.loads((tmp_path / "a" / "_rollouts.manifest.json").read_text())["sha256"] == sha256(CONTENT)
    assert (manifest.artifact, manifest.size, manifest.sha256) == ("rollouts.parquet", len(CONTENT), sha256(CONTENT))
    assert (manifest.inputs, manifest.metadata) == ({"pool": "abc"}, {"seconds": 1.5})
    assert manifest.created_at
    assert verify_published(path) == manifest_of(path) == manifest


def test_published_directory_lists_every_file(tmp_path: Path) -> None:
    path = tmp_path / "checkpoints" / "step-000001"
    manifest = publish_directory(path, fill_model, inputs={"u": "1"})
    assert everything_below(path) == ["manifest.json", "model.safetensors", "nested", "nested/config.json"]
    assert everything_below(path.parent)[0] == "step-000001"
    assert manifest.files == {
        "model.safetensors": {"size": len(CONTENT), "sha256": sha256(CONTENT)},
        "nested/config.json": {"size": 2, "sha256": sha256(b"{}")},
    }
    # The directory's hash is over the sorted lines "sha256 size path".
    lines = f"{sha256(CONTENT)} {len(CONTENT)} model.safetensors\n{sha256(b'{}')} 2 nested/config.json\n"
    assert (manifest.size, manifest.sha256) == (len(CONTENT) + 2, sha256(lines.encode()))
    assert verify_published(path) == manifest


def test_equal_content_has_equal_hashes_whatever_the_order_of_writing(tmp_path: Path) -> None:
    def other_order(folder: Path) -> None:
        (folder / "nested").mkdir()
        (folder / "nested" / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(CONTENT)

    one, two = publish_directory(tmp_path / "one", fill_model), publish_directory(tmp_path / "two", other_order)
    assert one.sha256 == two.sha256


def half_file(path: Path) -> None:
    path.write_bytes(CONTENT[:10])
    raise RuntimeError("killed here")


def half_directory(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(CONTENT[:10])
    raise RuntimeError("killed here")


def interrupted(path: Path) -> None:
    path.write_bytes(CONTENT[:10])
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("publish", "write", "error"),
    [
        (publish_file, half_file, RuntimeError),
        (publish_directory, half_directory, RuntimeError),
        (publish_file, interrupted, KeyboardInterrupt),
    ],
)
def test_an_error_while_writing_leaves_nothing(
    publish: Callable[..., object], write: Callable[[Path], None], error: type[BaseException], tmp_path: Path
) -> None:
    with pytest.raises(error):
        publish(tmp_path / "artifact.parquet", write)
    assert everything_below(tmp_path) == []
    assert not is_published(tmp_path / "artifact.parquet")


def test_an_error_while_writing_keeps_what_was_published_before(tmp_path: Path) -> None:
    path = tmp_path / "model"
    publish_directory(path, fill_model, inputs={"a": "1"})
    with pytest.raises(RuntimeError):
        publish_directory(path, half_directory, inputs={"a": "2"})
    assert verify_published(path).inputs == {"a": "1"}
    assert everything_below(tmp_path)[0] == "model"


def test_a_file_without_manifest_is_not_published(tmp_path: Path) -> None:
    path = tmp_path / "rollouts.parquet"
    write_content(path)  # as a crash between the two renames leaves it
    assert not is_published(path)
    assert not is_current(path, {})
    with pytest.raises(RunError, match=r"is not published: it has no manifest _rollouts\.manifest\.json"):
        verify_published(path)
    publish_file(path, write_content)
    verify_published(path)


def test_a_manifest_without_its_file_is_not_published(tmp_path: Path) -> None:
    path = tmp_path / "rollouts.parquet"
    publish_file(path, write_content)
    path.unlink()
    assert not is_published(path)
    with pytest.raises(DamagedArtifactError, match="was published but is missing"):
        verify_published(path)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


DAMAGES: list[Callable[[Path], None]] = [flip, truncate, empty, Path.unlink]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named(damage: Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / "rollouts.parquet"
    publish_file(path, write_content)
    damage(path)
    with pytest.raises(DamagedArtifactError) as caught:
        verify_published(path)
    assert str(path) in str(caught.value)
    assert "restore it from a backup; kdrl resume makes again the files that the run needs" in str(caught.value)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["model.safetensors", "nested/config.json"])
def test_a_damaged_file_of_a_directory_is_named(damage: Callable[[Path], None], name: str, tmp_path: Path) -> None:
    path = tmp_path / "model"
    publish_directory(path, fill_model)
    damage(path / name)
    assert is_published(path)
    with pytest.raises(DamagedArtifactError) as caught:
        verify_published(path)
    assert str(path / name) in str(caught.value)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", '{"artifact": "a"}', '{"artifact": "a", "size": 1, "sha256": "x", "surplus": 1}', "\x00"],
)
@pytest.mark.parametrize("publish", [publish_file, publish_directory])
def test_an_unreadable_manifest_is_damage(publish: Callable[..., object], content: str, tmp_path: Path) -> None:
    path = tmp_path / "artifact"
    publish(path, fill_model if publish is publish_directory else write_content)
    where = path / "manifest.json" if path.is_dir() else tmp_path / "_artifact.manifest.json"
    where.write_text(content)
    with pytest.raises(DamagedArtifactError, match=r"manifest .* cannot be read") as caught:
        verify_published(path)
    assert str(where) in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new"), [('"size"', '"sizd"'), ("nested/config.json", "nested/confih.json"), ('"files"', '"filet"')]
)
def test_a_flipped_byte_in_a_directory_manifest_is_damage(old: str, new: str, tmp_path: Path) -> None:
    path = tmp_path / "model"
    publish_directory(path, fill_model)
    where = path / "manifest.json"
    where.write_text(where.read_text().replace(old, new))
    with pytest.raises(DamagedArtifactError):
        verify_published(path)


def test_a_file_dropped_from_a_directory_manifest_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "model"
    publish_directory(path, fill_model)
    manifest = manifest_of(path)
    assert manifest.files is not None
    files = {name: fact for name, fact in manifest.files.items() if name != "model.safetensors"}
    (path / "manifest.json").write_bytes(replace(manifest, files=files).to_bytes())
    with pytest.raises(DamagedArtifactError, match="not that of the files it lists"):
        verify_published(path)


@pytest.mark.parametrize("publish", [publish_file, publish_directory])
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("artifact", "x"),
        ("size", 1),
        ("sha256", "0" * 64),
        ("inputs", {}),
        ("metadata", {}),
        ("created_at", ""),
        ("kdrl_version", "9"),
    ],
)
def test_a_manifest_with_another_value_in_any_field_is_damage(
    publish: Callable[..., object], field: str, value: object, tmp_path: Path
) -> None:
    path = tmp_path / "artifact"
    fill = fill_model if publish is publish_directory else write_content
    publish(path, fill, inputs={"a": "1"}, metadata={"m": 1.5})
    where = path / "manifest.json" if path.is_dir() else tmp_path / "_artifact.manifest.json"
    values = json.loads(where.read_text())
    where.write_text(json.dumps({**values, field: value}))
    with pytest.raises(DamagedArtifactError, match="it was altered: its checksum is not that of its content"):
        manifest_of(path)
    where.write_text(json.dumps({name: values[name] for name in values if name != "manifest_sha256"}))
    with pytest.raises(DamagedArtifactError, match="it has no 'manifest_sha256'"):
        manifest_of(path)


@settings(max_examples=50)
@given(
    st.dictionaries(st.text(), st.one_of(st.floats(), st.integers(), st.text(), st.lists(st.floats()), st.none())),
    st.dictionaries(st.integers(), st.floats()),
)
def test_manifests_are_read_as_they_were_written(metadata: dict[str, object], numbered: dict[int, float]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.parquet"
        published = publish_file(path, write_content, metadata={**metadata, "numbered": numbered})
        assert repr(manifest_of(path)) == repr(published)  # NaN is not itself
        assert read_manifest(manifest_path(path)).to_bytes() == manifest_path(path).read_bytes()


def test_an_artifact_of_a_run_is_told_in_another_place(tmp_path: Path) -> None:
    root = tmp_path / "runs" / "r"
    root.mkdir(parents=True)
    (root / "recipe.yaml").touch()
    file, folder = root / "data" / "pool.parquet", root / "checkpoints" / "stage1" / "step-000001"
    publish_file(file, write_content)
    publish_directory(folder, fill_model)
    assert (manifest_of(file).artifact, manifest_of(folder).artifact) == (
        "data/pool.parquet",
        "checkpoints/stage1/step-000001",
    )
    other = file.with_name("other.parquet")
    shutil.copy(file, other)
    shutil.copy(manifest_path(file), manifest_path(other))
    moved = folder.rename(folder.with_name("step-000002"))
    with pytest.raises(ForeignFileError, match=r"other\.parquet belongs elsewhere: it was published as data/pool"):
        verify_published(other)
    with pytest.raises(ForeignFileError, match=r"step-000002 belongs elsewhere: it was published as checkpoints/.*1;"):
        verify_published(moved)
    shutil.copytree(moved, tmp_path / "models" / "mine")  # outside of runs a folder may be called as one likes
    verify_published(tmp_path / "models" / "mine")
    shutil.copytree(tmp_path / "runs" / "r", tmp_path / "runs" / "renamed")  # so may a run
    verify_published(tmp_path / "runs" / "renamed" / "data" / "pool.parquet")


def test_current_means_published_from_the_same_inputs(tmp_path: Path) -> None:
    path = tmp_path / "model"
    assert not is_current(path, {})
    publish_directory(path, fill_model, inputs={"a": "1"})
    assert is_current(path, {"a": "1"})
    assert not is_current(path, {"a": "2"})
    assert not is_current(path, {})
    assert not is_current(path, {"a": "1", "b": "1"})


def test_a_directory_from_the_same_inputs_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "model"
    first = publish_directory(path, fill_model, inputs={"a": "1"})

    def never(folder: Path) -> None:
        raise AssertionError("written again")

    assert publish_directory(path, never, inputs={"a": "1"}) == first


def test_constant_files_are_made_once_and_published_as_if_they_were_read(tmp_path: Path) -> None:
    saved: list[Path] = []

    def save(folder: Path) -> None:
        saved.append(folder)
        fill_model(folder)

    constant = ConstantFiles(save)
    one, two = (publish_directory(tmp_path / name, constant.write) for name in ("one", "two"))
    plain = publish_directory(tmp_path / "plain", fill_model)
    assert len(saved) == 1
    assert (one.files, one.sha256, one.size) == (two.files, two.sha256, two.size)
    assert (two.files, two.sha256, two.size) == (plain.files, plain.sha256, plain.size)
    assert everything_below(tmp_path / "one") == everything_below(tmp_path / "plain")
    assert verify_published(tmp_path / "two") == two


def test_what_a_writer_knows_of_a_file_holds_only_for_its_size(tmp_path: Path) -> None:
    def write(folder: Path) -> Listing:
        known = ConstantFiles(fill_model).write(folder)
        (folder / "model.safetensors").write_bytes(CONTENT + b"more")
        return known

    publish_directory(tmp_path / "model", write)
    assert verify_published(tmp_path / "model").size == len(CONTENT + b"more{}")


def test_a_directory_from_other_inputs_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "model"
    publish_directory(path, fill_model, inputs={"a": "1"})
    publish_directory(path, lambda folder: write_content(folder / "other.bin"), inputs={"a": "2"})
    assert everything_below(tmp_path) == ["model", "model/manifest.json", "model/other.bin"]
    assert verify_published(path).inputs == {"a": "2"}


def test_a_crash_while_replacing_never_leaves_half_a_published_directory(tmp_path: Path) -> None:
    """SIGKILL before each rename and each removal in turn: afterwards the directory is whole, old or new, or absent."""
    script = textwrap.dedent(
        """
        import os, shutil, signal, sys
        from pathlib import Path
        from kdrl_core.ledger import publish_directory
        path, deadline = Path(sys.argv[1]), int(sys.argv[2])
        count = 0
        def counted(name, original):
            def call(*args, **kwargs):
                global count
                if count == deadline:
                    os.kill(os.getpid(), signal.SIGKILL)
                count += 1
                return original(*args, **kwargs)
            return call
        def fill(content):
            def write(folder):
                for name in ("a.bin", "b.bin"):
                    (folder / name).write_bytes(content)
            return write
        publish_directory(path, fill(b"old"), inputs={"v": "old"})
        for name in ("rename", "unlink", "rmdir"):
            setattr(os, name, counted(name, getattr(os, name)))
        publish_directory(path, fill(b"new"), inputs={"v": "new"})
        """
    )
    states = []
    for deadline in range(20):
        folder = tmp_path / str(deadline)
        path = folder / "model"
        done = subprocess.run([sys.executable, "-c", script, str(path), str(deadline)], capture_output=True, timeout=60)
        assert done.returncode in (0, -signal.SIGKILL), done.stderr.decode()
        states.append(verify_published(path).inputs["v"] if is_published(path) else "absent")
        sweep_temporaries(folder)
        assert [p.name for p in folder.iterdir()] == ([] if states[-1] == "absent" else ["model"])
        if done.returncode == 0:
            break
    assert states[0] == "old"
    assert states[-1] == "new"
    assert len(states) > 3


def test_replace_file_is_atomic_and_leaves_no_sibling(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "manifest.json"
    replace_file(path, b"one")
    replace_file(path, b"two")
    assert path.read_bytes() == b"two"
    assert everything_below(tmp_path) == ["deep", "deep/manifest.json"]


def test_sweeping_removes_temporaries_only(tmp_path: Path) -> None:
    publish_directory(tmp_path / "step" / "model", fill_model)
    publish_file(tmp_path / "step" / "rollouts.parquet", write_content)
    kept = everything_below(tmp_path)
    (tmp_path / "step" / ".tmp-rollouts.parquet-1-abcd").write_bytes(CONTENT)
    (tmp_path / ".tmp-model-1-abcd").mkdir()
    (tmp_path / ".tmp-model-1-abcd" / ".tmp-inner-1-abcd").write_bytes(CONTENT)
    assert sweep_temporaries(tmp_path) >= 2
    assert everything_below(tmp_path) == kept
    assert sweep_temporaries(tmp_path) == 0
    assert sweep_temporaries(tmp_path / "no such folder") == 0


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 2 MiB."""
    with small_disk(tmp_path / "disk", mib=2) as folder:
        yield folder


def write_too_much(path: Path) -> None:
    with path.open("wb") as file:
        for _ in range(64):
            file.write(b"x" * 2**16)


def write_too_much_parquet(path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"x": [os.urandom(2**16) for _ in range(64)]}), path)


def write_too_much_safetensors(path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    save_file({"x": torch.rand(2**20)}, path)


def write_too_much_torch(path: Path) -> None:
    import torch

    torch.save({"x": torch.rand(2**20)}, path)


@pytest.mark.parametrize(
    "write", [write_too_much, write_too_much_parquet, write_too_much_safetensors, write_too_much_torch]
)
def test_a_full_disk_is_told_and_leaves_nothing(write: Callable[[Path], None], disk: Path) -> None:
    path = disk / "run" / "rollouts.parquet"
    publish_file(path, write_content)
    with pytest.raises(StorageError, match="no disk space; free some") as caught:
        publish_file(path.with_name("teacher.parquet"), write)
    assert "teacher.parquet" in str(caught.value)
    with pytest.raises(StorageError, match="no disk space; free some"):
        publish_directory(path.with_name("model"), lambda folder: write(folder / "weights"))
    assert everything_below(disk) == ["run", "run/_rollouts.manifest.json", "run/rollouts.parquet"]
    verify_published(path)


def test_a_full_disk_is_told_by_replace_file(disk: Path) -> None:
    replace_file(disk / "metrics", b"old")
    with pytest.raises(StorageError, match="no disk space"):
        replace_file(disk / "metrics", b"x" * 2**22)
    assert (disk / "metrics").read_bytes() == b"old"
    assert everything_below(disk) == ["metrics"]


def test_too_little_space_is_told_before_work_begins(disk: Path) -> None:
    with pytest.raises(StorageError, match=r"has [012] MiB left, at least 64 are needed; .* KDRL_ARTIFACTS"):
        require_writable(disk / "runs", free_mb=64)
    require_writable(disk / "runs", free_mb=1)


def test_a_limit_on_file_size_is_told_like_a_full_disk(tmp_path: Path) -> None:
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, before[1]))
    try:
        with pytest.raises(StorageError, match="no disk space"):
            publish_file(tmp_path / "rollouts.parquet", write_too_much)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert everything_below(tmp_path) == []


@needs_permissions
def test_a_read_only_folder_is_told(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(StorageError, match="cannot be written; change its permissions or set KDRL_ARTIFACTS"):
            publish_file(tmp_path / "rollouts.parquet", write_content)
        with pytest.raises(StorageError, match="cannot be written"):
            require_writable(tmp_path / "runs", free_mb=1)
    finally:
        tmp_path.chmod(0o700)


def test_a_read_only_disk_is_told(disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with pytest.raises(StorageError, match="cannot be written; change its permissions or set KDRL_ARTIFACTS"):
        require_writable(disk / "runs", free_mb=1)


def test_a_file_where_a_folder_is_needed_is_told(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("in the way")
    with pytest.raises(StorageError, match="something else stands in its place"):
        require_writable(tmp_path / "runs", free_mb=1)
    with pytest.raises(StorageError, match="something else stands in its place"):
        publish_file(tmp_path / "runs" / "rollouts.parquet", write_content)


def test_a_writers_own_error_is_not_dressed_up(tmp_path: Path) -> None:
    def fail(path: Path) -> None:
        raise FileNotFoundError(2, "no such file", "input.json")

    with pytest.raises(FileNotFoundError, match=r"input\.json"):
        publish_file(tmp_path / "a.parquet", fail)


def test_storage_errors_are_kdrl_errors_and_os_errors() -> None:
    assert issubclass(StorageError, KdrlError)
    assert issubclass(StorageError, OSError)


def test_a_file_that_was_not_published_is_named_and_left(tmp_path: Path) -> None:
    path = tmp_path / "student"
    publish_directory(path, fill_model)
    (path / ".DS_Store").write_text("")
    verify_published(path)
    (path / "adapter_config.json").write_text("{}")
    for use in (lambda: verify_published(path), lambda: publish_directory(path, fill_model)):
        with pytest.raises(ForeignFileError, match=r"student holds adapter_config\.json, which was not published"):
            use()
    assert (path / "adapter_config.json").is_file()


def test_a_manifest_that_leads_elsewhere_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "model"
    publish_directory(path, fill_model)
    (tmp_path / "secret").write_text("x")
    where = path / "manifest.json"
    for name in ("../secret", str(tmp_path / "secret")):
        manifest = read_manifest(where)
        files = {**(manifest.files or {}), name: {"size": 1, "sha256": "0"}}
        (tmp_path / "manifest").write_bytes(replace(manifest, files=files).to_bytes())
        with pytest.raises(DamagedArtifactError, match="which is not below it"):
            read_manifest(tmp_path / "manifest")


def test_links_are_swept_not_what_they_lead_to(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("x")
    run = tmp_path / "run"
    publish_file(run / "a.parquet", write_content)
    for name in (".tmp-a.parquet-1-abcd", ".damaged-a.parquet"):
        (run / name).symlink_to(outside)
    assert sweep_temporaries(run) == 2
    assert everything_below(run) == ["_a.manifest.json", "a.parquet"]
    assert (outside / "kept").read_text() == "x"
