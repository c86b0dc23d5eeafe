"""Tests of course_lib.text: words of many scripts, and texts that say nothing."""

import json
from pathlib import Path

import pytest

from course_lib import evaluation, text

REPLIES = Path(__file__).parents[2] / "shared" / "inputs" / "replies_not_latin.json"


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("The cat's 2 hats.", ["the", "cat", "s", "2", "hats"]),
        ("Большой, красный дом", ["большой", "красный", "дом"]),
        ("안녕하세요 세계!", ["안녕하세요", "세계"]),
        ("मैं हिन्दी", ["मैं", "हिन्दी"]),  # vowel signs are no letters to str.isalnum
        ("สวัสดี", ["ส", "วั", "ส", "ดี"]),
        ("東京タワー5", ["東", "京", "タ", "ワ", "ー", "5"]),
        ("مرحبا، عالم", ["مرحبا", "عالم"]),
        ("e\u0301te\u0301", ["\xe9t\xe9"]),  # an accent as a letter of its own
        ("STRASSE Straße", ["strasse", "strasse"]),
        ("👍 👎", ["👍", "👎"]),
        ("...", []),
    ],
)
def test_words_of_every_script_are_told_apart(said, expected):
    assert text.words(said) == expected


@pytest.mark.parametrize(
    ("reply", "reference", "equal"),
    [
        ("большой красный дом", "большой красный дом", True),
        ("Ответ: 42", "Я не знаю, 42", False),
        ("안녕하세요 세계", "안녕하세요 세계", True),
        ("こんにちは世界", "さようなら世界", False),
        ("สวัสดีชาวโลก", "สวัสดีชาวโลก", True),
        ("नमस्ते दुनिया", "नमस्ते संसार", False),
        ("👍", "👎", False),
    ],
)
def test_rouge_is_full_for_equal_replies_of_any_script_and_below_for_others(
    reply, reference, equal
):
    score = evaluation.text_scores([reply], [reference])["ROUGE-L"]
    assert (score == 100) is equal


def test_an_accent_is_a_difference():
    assert evaluation.text_scores(["été"], ["ôté"])["ROUGE-L"] == 0


@pytest.mark.skipif(not REPLIES.is_file(), reason="needs ../shared/inputs, not in the repository")
def test_the_replies_that_failed_get_the_right_score():
    for row in json.loads(REPLIES.read_text(encoding="utf-8")):
        score = evaluation.text_scores([row["reply"]], [row["reference"]])["ROUGE-L"]
        assert score < 100 if row["expected"] == "below 100" else score == row["expected"], row


@pytest.mark.parametrize(
    ("reply", "part", "expected"),
    [
        ("答案是太阳。", "太阳", True),
        ("Это Москва, столица", "москва", True),
        ("Московский", "москва", False),
        ("cafe\u0301 noir", "caf\xe9", True),
        ("cafe", "caf\xe9", False),
    ],
)
def test_an_answer_is_found_as_words_of_its_script(reply, part, expected):
    assert text.contains(reply, part) is expected


def test_what_nobody_can_see_is_blank():
    for unseen in (
        "",
        " \t\r\n",
        "\u200b\u2060\ufeff",
        "\xa0\u3000",
        "\u3164",
        "\u2800",
        "\0",
        "\ufe0f",
    ):
        assert text.is_blank(unseen), repr(unseen)
    for seen in (".", "\u0301", "\ue000", "👍", "\U0001fadf"):
        assert not text.is_blank(seen), repr(seen)


def test_markers_for_nothing_are_known_in_brackets_and_cases():
    for marker in (
        "<noinput>",
        "<NoInput>",
        "No input.",
        "[no_input]",
        "N/A",
        "None",
        "none.",
        "无",
    ):
        assert text.means_nothing(marker), marker
    for said in ("", "0", "No", "None of these", "Na", "nothing new", "-", "nono"):
        assert not text.means_nothing(said), said


@pytest.mark.parametrize(
    ("reply", "answer", "found"),
    [
        ("It is 5.", "-5", False),
        ("It is -5.", "-5", True),
        ("You want C.", "C++", False),
        ("You want C++.", "C++", True),
        ("It costs 5.", "$5", False),
        ("It costs $5.", "5", True),
        ("no idea", "!", False),
        ("anything", "", False),
    ],
)
def test_signs_belong_to_the_answer(reply, answer, found):
    assert text.contains(reply, answer) is found


@pytest.mark.parametrize(
    ("sentence", "ends"),
    [
        ("Write a poem.", True),
        ("“Write a poem.”", True),
        ("Write a poem about", False),
        ("बारिश पर एक कविता लिखो।", True),
        ("اكتب قصيدة عن المطر؟", True),
        ("«Напиши стихотворение.»", True),
        ("Γράψε για τη βροχή;", True),
        ("เขียนบทกวีเกี่ยวกับฝน", True),
        ("写一首诗。", True),
        ("写一首诗", False),
    ],
)
def test_sentences_end_in_every_script(sentence, ends):
    assert text.ends_a_sentence(sentence) is ends
