"""Where stores lie: addresses, services, and what these say."""

import os

import pytest

from sae_jax.store import Folder
from sae_jax.store import folder as folders


@pytest.mark.parametrize(
    "url, message",
    [
        ("ftp://host/a", "not at ftp:"),
        ("s3://", "give s3://BUCKET/FOLDER"),
        ("gs://bucket/../a", "give gs://BUCKET/FOLDER"),
    ],
)
def test_addresses_that_are_no_folder(url, message):
    with pytest.raises(ValueError, match=message):
        Folder(url)


def test_a_path_may_go_up(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    Folder("../there").write("file", b"text")
    assert Folder(tmp_path / "here" / ".." / "there").read("file") == b"text"
    assert (tmp_path / "there" / "file").read_bytes() == b"text"


@pytest.mark.parametrize(
    "text, expected, message",
    [
        ("x [http_response_code='403'] [", PermissionError, "the credentials"),
        ("PERMISSION_DENIED: no", PermissionError, "the credentials"),
        ("UNAUTHENTICATED: no", PermissionError, "the credentials"),
        (
            "ExpiredToken: no [http_response_body='<Code>ExpiredToken</Code>'] "
            "[http_response_code='400']",
            PermissionError,
            "the credentials",
        ),
        ('NOT_FOUND: "run403/x" [http_response_code=\'404\']', ValueError, "run403"),
        ('DATA_LOSS: "UNAVAILABLE/PERMISSION_DENIED/x"', ValueError, "DATA_LOSS"),
        ("HTTP 404 with body: NoSuchBucket", FileNotFoundError, "no such bucket"),
        ("CURL error Could not connect", OSError, "cannot be reached"),
        ("UNAVAILABLE: 503", OSError, "cannot be reached"),
        ("DATA_LOSS: 1", ValueError, "DATA_LOSS: 1"),
    ],
)
def test_what_a_service_says_is_told_plainly(text, expected, message):
    bucket = Folder("gs://bucket/a")
    with pytest.raises(expected, match=message) as error:
        folders.raise_plainly(bucket, ValueError(text))
    assert type(error.value) is expected or expected is OSError
    assert expected is ValueError or str(bucket) in str(error.value)
    if expected is not ValueError:  # told once
        with pytest.raises(expected) as again:
            folders.raise_plainly(bucket, error.value)
        assert again.value is error.value


def test_a_disk_that_denies_is_told_plainly():
    text = "PERMISSION_DENIED: Failed to open: \"/a/b\" [os_error_code='13']"
    with pytest.raises(PermissionError, match="/a: access denied .*get the right"):
        folders.raise_plainly(Folder("/a"), ValueError(text))


def test_files_are_read_some_ahead_and_come_in_turn(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "_READS_AHEAD", 3)
    folder, n_begun, n_taken = Folder(tmp_path), 0, 0
    names = [f"{i}" for i in range(10)]
    for name in names[1:]:
        folder.write(name, name)
    read = folder._files.read

    class Files:
        def read(self, name):
            nonlocal n_begun
            n_begun += 1
            return read(name)

    folder._files = Files()
    for data in folder.read_each(names):
        assert data == (f"{n_taken}".encode() if n_taken else None)
        n_taken += 1
        assert n_begun == min(10, n_taken + 3)
    assert n_taken == 10
    assert list(Folder(tmp_path / "nowhere").read_each(["a", "b"])) == [None, None]


@pytest.mark.parametrize(
    "variables, expected",
    [
        ({}, {}),
        ({"AWS_REGION": "a", "AWS_DEFAULT_REGION": "b"}, {"aws_region": "a"}),
        ({"AWS_DEFAULT_REGION": "b"}, {"aws_region": "b"}),
        (
            {"AWS_ENDPOINT_URL_S3": "http://a/", "AWS_ENDPOINT_URL": "http://b"},
            {"endpoint": "http://a", "aws_region": "us-east-1"},
        ),
        (
            {"AWS_ENDPOINT_URL": "http://b", "AWS_REGION": "a"},
            {"endpoint": "http://b", "aws_region": "a"},
        ),
        (
            {"AWS_ACCESS_KEY_ID": "key"},
            {"aws_credentials": {"type": "environment"}},
        ),
    ],
)
def test_the_usual_variables_count(variables, expected):
    assert folders._configure_s3(variables) == expected


def test_a_server_that_says_nothing_is_not_waited_for(monkeypatch):
    names = [f"TENSORSTORE_CURL_LOW_SPEED_{s}" for s in ("TIME_SECONDS", "LIMIT_BYTES")]
    for name in names:
        monkeypatch.setenv(name, "7")
    Folder("s3://bucket/a")
    assert [os.environ[name] for name in names] == ["7", "7"]  # as it was asked for
    for name in names:
        monkeypatch.delenv(name)
    Folder("s3://bucket/a")
    assert [os.environ[name] for name in names] == ["30", "1"]
