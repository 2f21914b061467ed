"""How much text a tokenizer is trained on."""

import random
import string

from hvdlm.text.distinct import until_full


def words(count: int, *, seed: int, of: str = string.ascii_lowercase) -> list[str]:
    choose = random.Random(seed)
    return ["".join(choose.choices(of, k=choose.randrange(4, 9))) for _ in range(count)]


def test_words_that_come_again_take_no_room() -> None:
    text = " ".join(words(2000, seed=0))
    assert len([*until_full([text] * 50, 40_000)]) == 50


def test_different_words_do_and_the_estimate_is_near() -> None:
    texts = [" ".join(words(1000, seed=seed)) for seed in range(100)]
    taken = [*until_full(iter(texts), 200_000)]
    assert taken == texts[: len(taken)]
    held = len("".join({word for text in taken for word in text.split()}))
    assert 150_000 < held < 250_000


def test_a_script_without_spaces_has_long_words() -> None:
    chars = "".join(chr(0x4E00 + i) for i in range(3000))
    texts = ["。".join(words(100, seed=seed, of=chars)) for seed in range(100)]
    taken = [*until_full(texts, 50_000)]
    assert 20 < len(taken) < 40


def test_the_first_text_is_always_there() -> None:
    assert [*until_full([" ".join(words(5000, seed=1)), "more"], 10)] == [" ".join(words(5000, seed=1))]
    assert [*until_full([], 10)] == []
