import random

import pytest

from hvdlm.text import pieces, utf8

PIECES = [
    b"a",
    "é".encode(),
    "中".encode(),
    "👩".encode(),
    b"\x80",
    b"\xff",
    b"\xe4\xb8",
    b"\xf0\x9f\x91",
    b"\xc3",
    b"\n",
]


@pytest.mark.parametrize("part_bytes", [4, 5, 6, 7, 1 << 20])
def test_parts_join_to_what_bytes_are_as_a_whole(part_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(utf8, "PART_BYTES", part_bytes)
    rng = random.Random(part_bytes)
    for count in range(2000):
        raw = b"".join(rng.choices(PIECES[: 4 if count % 2 else None], k=rng.randrange(20)))
        assert "".join(utf8.decoded(raw, "replace")) == raw.decode("utf-8", "replace")
        try:
            whole, start = raw.decode(), -1
        except UnicodeDecodeError as error:
            whole, start = "", error.start
        try:
            assert "".join(utf8.decoded(memoryview(raw))) == whole
        except UnicodeDecodeError as error:
            assert error.start == start


def test_utf8_is_cut_like_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE_CHARS", 10)
    rng = random.Random(0)
    for part_bytes in (4, 9, 30):
        monkeypatch.setattr(utf8, "PART_BYTES", part_bytes)
        for _ in range(1000):
            text = "".join(rng.choices("abc中👩  \n", k=rng.randrange(60)))
            assert [*pieces.cut_utf8(text.encode())] == [*pieces.cut(text)]
