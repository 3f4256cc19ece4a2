"""Small files: written whole or not at all, and damage that is named."""

import os
from pathlib import Path

import pytest
import torch

from deepeq.files import new_folder, read_tensors, sha256_of, write_atomically, write_tensors


def test_text_is_written_in_utf_8_and_alone_in_its_folder(tmp_path: Path):
    path = tmp_path / "a.json"
    write_atomically(path, "first")
    write_atomically(path, "caf\u00e9\n")
    assert path.read_bytes() == "caf\u00e9\n".encode()
    assert list(tmp_path.iterdir()) == [path]


def test_text_that_cannot_be_encoded_leaves_the_earlier_file(tmp_path: Path):
    path = tmp_path / "a.json"
    write_atomically(path, "first")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "\ud800")
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


def test_checksum_of_a_file(tmp_path: Path):
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_of(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_new_folder_appears_when_it_is_whole(tmp_path: Path):
    path = tmp_path / "inside" / "folder"
    with new_folder(path) as temporary:
        (temporary / "a").write_text("a")
        assert not path.exists()
        assert temporary.name.startswith(".")
    assert [file.name for file in path.iterdir()] == ["a"]
    assert list(path.parent.iterdir()) == [path]


def test_new_folder_of_a_block_that_fails_is_deleted(tmp_path: Path):
    def fail() -> None:
        with new_folder(tmp_path / "folder") as temporary:
            (temporary / "a").write_text("a")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_first_of_two_new_folders_stays(tmp_path: Path):
    path = tmp_path / "folder"
    with new_folder(path) as slow:
        (slow / "a").write_text("slow")
        with new_folder(path) as fast:
            (fast / "a").write_text("fast")
    assert (path / "a").read_text() == "fast"
    assert list(tmp_path.iterdir()) == [path]


def test_file_in_the_way_of_a_new_folder_is_an_error(tmp_path: Path):
    (tmp_path / "folder").write_text("in the way")
    with pytest.raises(OSError, match="folder"), new_folder(tmp_path / "folder"):
        pass


TENSORS = {"a": torch.arange(6, dtype=torch.int32), "b": torch.randn(2, 3).bfloat16(), "c": torch.tensor(1.5)}


@pytest.mark.parametrize("verify", [True, False])
def test_tensors_are_read_as_they_were_written(tmp_path: Path, verify: bool):
    path = tmp_path / "a.safetensors"
    write_tensors(path, TENSORS, {"format": "pt"})
    tensors, metadata = read_tensors(path, verify=verify)
    assert metadata == {"format": "pt"}
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)
    tensors["a"].fill_(7)  # a private copy
    assert torch.equal(read_tensors(path)[0]["a"], TENSORS["a"])
    assert list(tmp_path.iterdir()) == [path]


def test_file_of_tensors_has_the_permissions_of_any_file(tmp_path: Path):
    write_tensors(tmp_path / "a.safetensors", TENSORS, {})
    (tmp_path / "b").touch()
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_changed_tensor_or_metadata_is_found(tmp_path: Path):
    path = tmp_path / "a.safetensors"
    write_tensors(path, TENSORS, {"format": "pt", "note": "one"})
    whole = path.read_bytes()
    for damaged in (whole[:-1] + bytes([whole[-1] ^ 1]), whole.replace(b"one", b"two")):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"a\.safetensors is damaged or was not written by deepeq \(its checksum"):
            read_tensors(path)


@pytest.mark.parametrize("change", [-1, 4])
@pytest.mark.parametrize("verify", [True, False])
def test_file_of_another_size_is_found_without_its_checksum(tmp_path: Path, change: int, verify: bool):
    path = tmp_path / "a.safetensors"
    write_tensors(path, TENSORS, {})
    os.truncate(path, path.stat().st_size + change)
    with pytest.raises(ValueError, match=r"a\.safetensors is damaged or was not written by deepeq"):
        read_tensors(path, verify=verify)


def test_failed_write_leaves_the_earlier_file(tmp_path: Path):
    path = tmp_path / "a.safetensors"
    write_tensors(path, TENSORS, {})
    shared = torch.zeros(4)
    with pytest.raises(RuntimeError, match="share memory"):
        write_tensors(path, {"x": shared, "y": shared}, {})
    assert read_tensors(path)[0].keys() == TENSORS.keys()
    assert list(tmp_path.iterdir()) == [path]
