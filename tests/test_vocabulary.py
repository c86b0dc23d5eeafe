"""Tests of course_lib.vocabulary: pieces that save tokens, rows that start where the old were."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from course_lib import models, training, vocabulary
from course_lib.batching import Example, encode_text
from course_lib.runtime import CourseError, data_folder

ESSAYS = (data_folder() / "chinese_prose.txt").read_text(encoding="utf-8").strip().split("\n\n")
PIECES = ["茶馆", "我们", "喜欢"]


@pytest.fixture
def tokenizer(smollm2):
    return smollm2.tokenizer


def test_tokens_per_character_by_hand(tokenizer):
    assert (
        vocabulary.tokens_per_character(["茶"], tokenizer) == len(encode_text("茶", tokenizer)) > 1
    )
    assert vocabulary.tokens_per_character([" the house", " the"], tokenizer) == 3 / 14


def test_the_pieces_are_in_the_text_new_and_the_same_every_time(tokenizer):
    pieces = vocabulary.learn_pieces(ESSAYS, tokenizer, 300)
    assert pieces == vocabulary.learn_pieces(ESSAYS, tokenizer, 300)
    assert len(set(pieces)) == 300
    text = "".join(ESSAYS)
    assert all(piece in text and len(encode_text(piece, tokenizer)) > 1 for piece in pieces)
    assert any(len(piece) > 1 for piece in pieces)


def test_the_best_piece_saves_the_most_tokens(tokenizer):
    assert vocabulary.learn_pieces(["茶馆，茶馆；茶馆！茶馆。门"], tokenizer, 1) == ["茶馆"]
    with pytest.raises(CourseError, match="these texts give 2 new pieces, 3 were asked for"):
        vocabulary.learn_pieces(["茶馆茶馆，门"], tokenizer, 3)


def test_new_pieces_shorten_chinese_and_change_no_english(tokenizer):
    size, extended = (
        len(tokenizer),
        vocabulary.extended_copy(tokenizer, vocabulary.learn_pieces(ESSAYS[:9], tokenizer, 500)),
    )
    for text in (*ESSAYS, "他说，我们喜欢茶馆。We like茶馆 a lot."):
        assert extended.decode(encode_text(text, extended)) == text
    before, after = (
        vocabulary.tokens_per_character(ESSAYS[9:], each) for each in (tokenizer, extended)
    )
    assert after < 0.75 * before, "on essays that the pieces were not learned from"
    english = "The quick brown fox, 3 dogs and <|im_end|>"
    assert encode_text(english, extended) == encode_text(english, tokenizer)
    assert (len(tokenizer), len(extended)) == (size, size + 500), (
        "the given tokenizer stays as it is"
    )


def test_pieces_are_found_inside_a_sentence_and_the_longest_wins(tiny):
    extended = vocabulary.extended_copy(tiny.tokenizer, ["茶馆", "茶", "我们喜欢", "喜欢茶馆"])
    first = len(tiny.tokenizer)
    assert [token for token in encode_text("今天我们喜欢茶馆，茶", extended) if token >= first] == [
        first + 2,
        first,
        first + 1,
    ]


def test_a_new_row_is_the_mean_of_the_rows_it_replaces_and_the_old_stay(tiny):
    old, first = tiny.model.get_input_embeddings().weight.clone(), len(tiny.tokenizer)
    replaced = [encode_text(piece, tiny.tokenizer) for piece in PIECES]
    vocabulary.add_pieces(tiny, PIECES)
    new = tiny.model.get_input_embeddings().weight
    assert torch.equal(new[:first], old)
    for row, (piece, ids) in enumerate(zip(PIECES, replaced, strict=True), start=first):
        torch.testing.assert_close(new[row], old[ids].mean(0))
        assert row in encode_text(piece, tiny.tokenizer)
    assert tiny.model.get_output_embeddings().weight is new, "tied matrices stay tied"
    assert tiny.model.config.vocab_size == first + 3


def test_a_head_of_its_own_gets_its_own_means_and_spare_rows_are_used_first(tiny):
    torch.manual_seed(0)
    size = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    model = LlamaForCausalLM(LlamaConfig(vocab_size=1538, tie_word_embeddings=False, **size))
    base = models.Loaded(model, tiny.tokenizer, "random", "random weights")
    heads = model.get_output_embeddings().weight.clone()
    ids = encode_text(PIECES[2], tiny.tokenizer)
    vocabulary.add_pieces(base, PIECES)
    assert (
        model.get_input_embeddings().weight.shape
        == model.get_output_embeddings().weight.shape
        == (1539, 16)
    )
    torch.testing.assert_close(model.get_output_embeddings().weight[1538], heads[ids].mean(0))
    model.model.norm.weight.requires_grad_(False)
    before = [name for name, weight in model.named_parameters() if weight.requires_grad]
    with vocabulary.only_new_rows(model, first=1536):
        inside = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert inside == ["model.embed_tokens.weight", "lm_head.weight"]
    assert [name for name, weight in model.named_parameters() if weight.requires_grad] == before


def test_training_moves_the_new_rows_and_nothing_else(tiny, machine):
    first = len(tiny.tokenizer)
    vocabulary.add_pieces(tiny, PIECES)
    before = {name: weight.clone() for name, weight in tiny.model.named_parameters()}
    ids = encode_text("我们喜欢茶馆我们喜欢", tiny.tokenizer)
    settings = {"steps": 4, "batch_size": 2, "learning_rate": 1e-2, "progress": False}
    with vocabulary.only_new_rows(tiny.model, first):
        training.finetune(tiny, [Example(ids, ids)] * 2, machine, **settings)
    for name, weight in tiny.model.named_parameters():
        if name == "model.embed_tokens.weight":
            assert torch.equal(weight[:first], before[name][:first])
            assert (weight[first:] != before[name][first:]).any(1).all()
        else:
            assert torch.equal(weight, before[name]), name
    training.finetune(tiny, [Example(ids, ids)] * 2, machine, **settings)
    assert not torch.equal(
        tiny.model.model.embed_tokens.weight[:first], before["model.embed_tokens.weight"][:first]
    ), "no hook stays"


def test_a_piece_that_is_one_token_already_is_refused(tiny):
    vocabulary.add_pieces(tiny, PIECES)
    with pytest.raises(
        CourseError, match="' the' is one token already|'茶馆' is one token already"
    ):
        vocabulary.add_pieces(tiny, ["茶馆"])


@pytest.mark.parametrize(
    ("pieces", "said"),
    [
        (["茶馆", "我们", "茶馆"], "'茶馆' stands twice among the pieces"),
        (["茶馆", ""], "'' is one token already"),
    ],
)
def test_nothing_changes_before_pieces_are_refused(tiny, pieces, said):
    size, rows = len(tiny.tokenizer), len(tiny.model.get_input_embeddings().weight)
    with pytest.raises(CourseError, match=said):
        vocabulary.add_pieces(tiny, pieces)
    assert (len(tiny.tokenizer), len(tiny.model.get_input_embeddings().weight)) == (size, rows)


def test_pieces_cannot_be_added_a_second_time(tiny):
    vocabulary.add_pieces(tiny, PIECES)
    before = tiny.model.get_input_embeddings().weight.clone()
    with pytest.raises(CourseError, match="is one token already"):
        vocabulary.add_pieces(tiny, PIECES)
    assert torch.equal(tiny.model.get_input_embeddings().weight, before)
