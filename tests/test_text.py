"""Documents: what is read, what is left out, and who is held out."""

import os

import pytest

from sae_jax.text import hash_name, is_heldout, read_documents, read_standard_library


def test_folder_is_walked_in_name_order(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "two.txt").write_bytes("zwei \u00e4\r\n\tdrei\n".encode())
    (tmp_path / "c.py").write_text("pass\n")
    (tmp_path / "a.md").write_text("one\n")
    documents = read_documents([str(tmp_path)])
    assert [document.name for document in documents] == ["a.md", "b/two.txt", "c.py"]
    assert documents[1].text == "zwei \u00e4\r\n\tdrei\n"
    assert documents == read_documents([str(tmp_path)])


def test_file_is_named_by_itself_and_paths_are_joined(tmp_path):
    (tmp_path / "z").mkdir()
    (tmp_path / "z" / "a.txt").write_text("folder")
    (tmp_path / "b.txt").write_text("file")
    paths = [str(tmp_path / "b.txt"), str(tmp_path / "z")]
    names = [document.name for document in read_documents(paths)]
    assert names == ["a.txt", "b.txt"]
    assert names == [document.name for document in read_documents(paths[::-1])]


def test_what_is_no_text_is_left_out(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.txt").write_text("not ours")
    root = tmp_path / "root"
    (root / ".git").mkdir(parents=True)
    (root / ".git" / "config").write_text("hidden folder")
    (root / "latin1.txt").write_bytes(b"caf\xe9")
    (root / "nul.txt").write_bytes(b"a\0b")
    (root / "good.txt").write_text("good")
    os.symlink(outside, root / "folder_link")
    os.symlink(outside / "secret.txt", root / "file_link.txt")
    os.symlink(root / "missing", root / "dangling.txt")
    os.mkfifo(root / "pipe")
    assert [document.name for document in read_documents([str(root)])] == ["good.txt"]


def test_a_name_that_is_no_utf8_is_text(tmp_path):
    try:
        (tmp_path / os.fsdecode(b"caf\xe9.txt")).write_text("one")
    except OSError:
        pytest.skip("this file system takes no such name")
    (document,) = read_documents([str(tmp_path)])
    assert document.name == "caf\\xe9.txt"
    hash_name(document.name)
    named = read_documents([os.path.join(tmp_path, os.fsdecode(b"caf\xe9.txt"))])
    assert named == [document]


def test_path_without_text_says_what_it_found(tmp_path):
    with pytest.raises(ValueError, match="found 0 files"):
        read_documents([str(tmp_path)])
    (tmp_path / "weights.bin").write_bytes(b"\xff\0")
    with pytest.raises(ValueError, match="found 1 files.*UTF-8") as error:
        read_documents([str(tmp_path)])
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ValueError, match="empty"):
        read_documents([])


def test_missing_path_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_documents([str(tmp_path / "nowhere")])


def test_standard_library_is_source_without_tests_and_build_records():
    documents = read_standard_library()
    names = [document.name for document in documents]
    assert names == sorted(set(names)) and len(names) > 300
    assert {"ast.py", "json/decoder.py"} <= set(names)
    folders = {folder for name in names for folder in name.split("/")[:-1]}
    assert folders.isdisjoint({"test", "tests", "idle_test", "site-packages"})
    assert not any("_sysconfigdata" in name for name in names)


def test_split_is_the_hash_of_the_name():
    # The first 16 digits that sha256sum prints for the name.
    assert hash_name("ast.py") == 0xb4fa779c3f435060
    names = [f"package/module_{index}.py" for index in range(4000)]
    heldout = [name for name in names if is_heldout(name, 20)]
    assert 140 < len(heldout) < 260
    assert all(is_heldout(name, 5) for name in heldout)
    assert 700 < sum(is_heldout(name, 5) for name in names) < 900
