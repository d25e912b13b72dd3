"""The key is a digest of all that decides the answers; one changed bit of the file is found."""

import hashlib
import json
import random

import pytest

from potstill.distillation.teacher_cache.record_format import CacheManifest, RecordFormat, canonical_json
from potstill.errors import ArtifactError, UsageError
from potstill.io import read_checksummed_json, write_checksummed_json

IDENTITY = {"teacher": {"weights": "ab", "mean": [0.5, 0.25]}, "classes": ["cat", "dög"], "views": {"seed": 1}}


def manifest(identity=IDENTITY, record=None, samples=10, facts=None):
    return CacheManifest(
        identity, record or RecordFormat("float16", 2), samples, {"teacher": "vgg16"} if facts is None else facts
    )


def written(folder, **options):
    made = manifest(**options)
    path = folder / made.key
    made.write(path)
    return path


def test_canonical_json_is_the_one_that_anybody_would_write():
    assert canonical_json({"b": [1, 2.5], "a": "ö\udcff"}) == '{"a":"\\u00f6\\udcff","b":[1,2.5]}'
    for odd in ({"a": float("nan")}, {"a": {1, 2}}, {"a": object()}):
        with pytest.raises(UsageError, match="must be JSON values"):
            canonical_json(odd)


def test_the_key_is_the_digest_of_what_stands_in_the_file(tmp_path):
    path = written(tmp_path)
    value = json.loads((path / "manifest.json").read_text())
    content = {name: value[name] for name in ("format", "identity", "samples", "record")}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    assert path.name == hashlib.sha256(text.encode()).hexdigest()[:16] == value["key"]
    assert value["record"] == {"kind": "float16", "classes": 2, "embedding": 0, "nbytes": 4, "byte_order": "little"}
    found = CacheManifest.read(path)
    assert (found.identity, found.record, found.samples) == (IDENTITY, RecordFormat("float16", 2), 10)
    assert found.facts == {"teacher": "vgg16"}


@pytest.mark.parametrize(
    "other",
    [
        {"identity": IDENTITY | {"teacher": {"weights": "ac", "mean": [0.5, 0.25]}}},
        {"identity": IDENTITY | {"classes": ["dög", "cat"]}},
        {"identity": IDENTITY | {"views": {"seed": 2}}},
        {"identity": IDENTITY | {"teacher": {"weights": "ab", "mean": [0.5, 0.2500000001]}}},
        {"record": RecordFormat("float32", 2)},
        {"record": RecordFormat("float16", 3)},
        {"record": RecordFormat("float16", 2, 8)},
        {"samples": 11},
    ],
)
def test_any_other_identity_has_another_key(other):
    assert manifest(**other).key != manifest().key


def test_neither_facts_nor_the_order_of_names_is_part_of_the_key():
    swapped = dict(reversed(IDENTITY.items()))
    assert manifest(identity=swapped, facts={"x": 1}).key == manifest().key
    assert manifest(identity=json.loads(json.dumps(IDENTITY))).key == manifest().key


def test_each_of_400_changed_bits_is_found(tmp_path):
    path = written(tmp_path, facts={"recipe": "name: x\nstore:\n  views: 8\n", "share": 1e-05, "é": "\n"})
    file = path / "manifest.json"
    whole = file.read_bytes()
    chance, found = random.Random(0), 0
    for _ in range(400):
        at, bit = chance.randrange(len(whole)), chance.randrange(8)
        file.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << bit)]) + whole[at + 1 :])
        with pytest.raises(ArtifactError, match=r"manifest\.json"):
            CacheManifest.read(path)
        found += 1
    assert found == 400
    for cut in range(len(whole)):
        file.write_bytes(whole[:cut])
        with pytest.raises(ArtifactError, match="potstill cache rm"):
            CacheManifest.read(path)
    file.write_bytes(whole)
    assert CacheManifest.read(path).samples == 10


@pytest.mark.parametrize("text", ["", "[]", "3", '{"format": 1}', "[" * 100_000, '{"format": 2, "identity": NaN}'])
def test_what_is_no_manifest_is_refused(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ArtifactError, match="is damaged"):
        CacheManifest.read(tmp_path)


def test_another_format_is_named(tmp_path):
    write_checksummed_json(tmp_path / "manifest.json", {"format": 4, "whatever": []})
    with pytest.raises(ArtifactError, match=r"format 4, and this version of potstill reads 3.*potstill cache rm"):
        CacheManifest.read(tmp_path)


def test_nothing_is_parsed_before_it_is_compared(tmp_path, monkeypatch):
    path = written(tmp_path)
    file = path / "manifest.json"
    file.write_bytes(file.read_bytes().replace(b"vgg16", b"vgg19"))
    monkeypatch.setattr(json, "loads", lambda *_: pytest.fail("parsed"))
    with pytest.raises(ArtifactError, match=r"manifest\.json is damaged: its SHA-256.*potstill cache rm"):
        CacheManifest.read(path)


@pytest.mark.parametrize(
    "change", [{"samples": 0}, {"samples": "10"}, {"record": {}}, {"identity": 3}, {"facts": None}]
)
def test_a_manifest_that_was_made_up_to_fit_is_refused(tmp_path, change):
    path = written(tmp_path)
    write_checksummed_json(path / "manifest.json", read_checksummed_json(path / "manifest.json") | change)
    with pytest.raises(ArtifactError, match=r"is damaged"):
        CacheManifest.read(path)


def test_a_manifest_in_another_stores_folder_is_refused(tmp_path):
    path = written(tmp_path)
    path.rename(tmp_path / "0123456789abcdef")
    with pytest.raises(ArtifactError, match="is damaged"):
        CacheManifest.read(tmp_path / "0123456789abcdef")


def test_no_manifest(tmp_path):
    with pytest.raises(ArtifactError, match="cannot read"):
        CacheManifest.read(tmp_path)
