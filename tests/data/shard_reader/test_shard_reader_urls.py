import pytest

from potstill.data.file_datasets import is_shards
from potstill.data.shard_reader import MAX_SHARDS, expand_shards, open_filesystem, read_byte_range
from potstill.errors import DataError, UsageError


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("a.tar", ["a.tar"]),
        ("a-{0..2}.tar", ["a-0.tar", "a-1.tar", "a-2.tar"]),
        ("a-{008..010}.tar", ["a-008.tar", "a-009.tar", "a-010.tar"]),
        ("a-{9..11}.tar", ["a-9.tar", "a-10.tar", "a-11.tar"]),
        ("{x,y}-{0..1}.tar", ["x-0.tar", "x-1.tar", "y-0.tar", "y-1.tar"]),
        ("s3://b/{a,b}.tar", ["s3://b/a.tar", "s3://b/b.tar"]),
    ],
)
def test_braces_stand_for_many(source, found):
    assert expand_shards(source) == found


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("a-{5..2}.tar", r"\{5\.\.2\} is neither a range such as \{000\.\.146\}"),
        ("a-{x}.tar", r"\{x\} is neither"),
        (f"a-{{0..{MAX_SHARDS}}}.tar", "is neither a range"),
        ("{0..999}/{0..999}.tar", r"stands for 1,000,000 shards; 100,000 are the most"),
        ("{a,a}.tar", "names a shard twice"),
        ("a.tar.gz", "a compressed tar file cannot be read image by image"),
        ("a.tgz", "compressed"),
        ("https://me:secret@host/a.tar", "must carry no user or password"),
    ],
)
def test_what_is_wrong_is_said(source, said):
    with pytest.raises(UsageError, match=said) as caught:
        expand_shards(source)
    assert "secret" not in str(caught.value)


def test_folders_and_names_are_no_shards():
    assert not any(is_shards(name) for name in ("digits", "photos", "images.csv", "tar", "a.tar/b"))


def test_a_protocol_that_cannot_be_read_names_its_package():
    with pytest.raises(UsageError, match=r"nosuch:// cannot be read here"):
        open_filesystem("nosuch://bucket/a.tar")
    try:
        import s3fs  # noqa: F401
    except ImportError:
        with pytest.raises(UsageError, match="pip install s3fs"):
            open_filesystem("s3://bucket/a.tar")


def test_a_range_that_is_cut_off_is_an_error(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"0123456789")
    assert read_byte_range(str(tmp_path / "a.tar"), 2, 3) == b"234"
    with pytest.raises(DataError, match="2 of 5 bytes at byte 8; the shard has changed or is cut off"):
        read_byte_range(str(tmp_path / "a.tar"), 8, 5)
    with pytest.raises(DataError, match=r"gone\.tar: cannot be read at byte 0"):
        read_byte_range(str(tmp_path / "gone.tar"), 0, 5)
