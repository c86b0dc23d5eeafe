"""Tests of course_lib.sealing."""

import json

import pytest

from course_lib import sealing


@pytest.fixture
def sealed(tmp_path):
    final = tmp_path / "model"
    partial = sealing.partial_folder(final)
    (partial / "weights.bin").write_bytes(b"0123456789")
    (partial / "sub").mkdir()
    (partial / "sub" / "config.json").write_text("{}")
    sealing.publish(partial, final, {"source": "here"})
    return final


def test_what_was_published_is_whole_and_keeps_its_facts(sealed):
    assert sealing.check(sealed) == {"source": "here"}
    assert not list(sealed.parent.glob(f"{sealing.PARTIAL}*"))


def truncate(folder):
    (folder / "weights.bin").write_bytes(b"01234")


def flip_a_bit(folder):
    (folder / "weights.bin").write_bytes(b"0123456788")


def empty(folder):
    (folder / "weights.bin").write_bytes(b"")


def remove(folder):
    (folder / "sub" / "config.json").unlink()


def add(folder):
    (folder / "pickle.bin").write_bytes(b"x")


def unseal(folder):
    (folder / sealing.SEAL).unlink()


def break_the_seal(folder):
    (folder / sealing.SEAL).write_text("{")


def replace_the_seal(folder):
    (folder / sealing.SEAL).write_text(json.dumps([1]))


@pytest.mark.parametrize(
    "damage",
    [truncate, flip_a_bit, empty, remove, add, unseal, break_the_seal, replace_the_seal],
    ids=lambda damage: damage.__name__,
)
def test_every_damage_is_named(sealed, damage):
    damage(sealed)
    with pytest.raises(sealing.DamagedError, match="model"):
        sealing.check(sealed)


def test_a_half_written_folder_is_not_there(tmp_path):
    partial = sealing.partial_folder(tmp_path / "model")
    (partial / "weights.bin").write_bytes(b"half")
    assert not (tmp_path / "model").exists()
    assert not list(sealing.partial_folder(tmp_path / "model").iterdir()), (
        "the next attempt starts from an empty folder"
    )


def test_publishing_replaces_what_was_there(sealed):
    partial = sealing.partial_folder(sealed)
    (partial / "weights.bin").write_bytes(b"new")
    sealing.publish(partial, sealed, {})
    assert (sealed / "weights.bin").read_bytes() == b"new"
    assert sealing.check(sealed) == {}


def test_every_damaged_byte_of_the_seal_itself_is_seen(tmp_path):
    (tmp_path / "weights.bin").write_bytes(b"0123456789")
    sealing.seal(tmp_path, [tmp_path / "weights.bin"], {"loss": 1.25, "steps": [1, 2]})
    assert sealing.check(tmp_path) == {"loss": 1.25, "steps": [1, 2]}
    seal = tmp_path / sealing.SEAL
    whole = seal.read_bytes()
    for place in range(len(whole) - 1):
        if whole[place : place + 1].isspace():
            continue  # layout carries no meaning
        seal.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(sealing.DamagedError):
            sealing.check(tmp_path)


def test_only_named_and_hidden_files_may_lie_beside_the_sealed_ones(tmp_path):
    (tmp_path / "weights.bin").write_bytes(b"0123456789")
    sealing.seal(tmp_path, [tmp_path / "weights.bin"], {})
    (tmp_path / "README.md").write_text("a card")
    (tmp_path / ".DS_Store").write_text("")
    assert sealing.check(tmp_path, others=["README.md"]) == {}
    with pytest.raises(sealing.DamagedError, match=r"README.md is not in the seal"):
        sealing.check(tmp_path)
