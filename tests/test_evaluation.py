"""Tests of course_lib.evaluation."""

import dataclasses
import math
from collections import Counter

import pytest
import torch

from course_lib import evaluation
from course_lib.alpaca import DataError, Record
from course_lib.batching import encode, encode_text
from course_lib.evaluation import Question, contains, judge, normalise
from course_lib.runtime import CourseError
from tests.fixtures.runs import train

RIGHT = Record("Capital of France?", '{"answer": "Paris", "topic": "capital"}')


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (RIGHT.output, (True, True, True)),
        ('{"topic": "CAPITAL ", "answer": " paris"}', (True, True, True)),
        ('{"answer": "Lyon", "topic": "capital"}', (True, True, False)),
        ('{"answer": "Paris", "topic": "plural"}', (True, False, True)),
        ("Paris", (False, False, False)),
        ("", (False, False, False)),
        ('{"answer": "Paris", "topic": "capital"} Paris is', (False, False, False)),
        ('{"answer": "Paris", "topic": "capital"', (False, False, False)),
        ('{"answer": "Paris"}', (False, False, False)),
        ('{"answer": "Paris", "topic": "capital", "sure": "yes"}', (False, False, False)),
        ('{"answer": ["Paris"], "topic": "capital"}', (False, False, False)),
        ('["answer", "topic"]', (False, False, False)),
        ("[" * 10_000, (False, False, False)),
    ],
)
def test_each_part_of_an_answer_is_judged_by_itself(reply, expected):
    answer = judge(RIGHT, reply)
    assert (answer.valid_json, answer.right_topic, answer.right_answer) == expected


def test_normalising_keeps_only_what_matters():
    assert normalise(" Costa\n RICA ") == normalise("costa rica")
    assert normalise("30") != normalise("3 0")


@pytest.mark.parametrize(
    ("reply", "answer", "expected"),
    [
        ("It is the Sun.", "sun", True),
        ("On Sunday.", "sun", False),
        ("About 3.14, I think", "3.14", True),
        ("**X-ray**", "x-ray", True),
        ("New\nYork City", "new york", True),
        ("", "sun", False),
    ],
)
def test_an_answer_is_found_as_whole_words(reply, answer, expected):
    assert contains(reply, answer) is expected


def test_the_perfect_model_scores_full_and_the_mute_one_nothing(tiny, monkeypatch):
    records = evaluation.read_task("test")[:10]
    by_prompt = {
        tuple(evaluation.encode_prompt(record, tiny.tokenizer)): record.output for record in records
    }
    monkeypatch.setattr(
        evaluation,
        "generate",
        lambda base, prompts, *_: [by_prompt[tuple(prompt)] for prompt in prompts],
    )
    score = evaluation.evaluate(tiny, records)
    assert [score.rate(name) for name in ("valid_json", "right_topic", "right_answer")] == [1, 1, 1]
    assert "right answer 100 % (72 to 100)" in str(score), "ten questions prove little"
    monkeypatch.setattr(evaluation, "generate", lambda base, prompts, *_: [""] * len(prompts))
    assert evaluation.evaluate(tiny, records).rate("valid_json") == 0


def test_examples_in_the_prompt_are_turns_of_a_chat(tiny, monkeypatch):
    shots, records = evaluation.read_task("train")[:2], evaluation.read_task("test")[:10]
    prompt = evaluation.chat_prompt(tiny, evaluation.asked(records[0]), shots)
    text = tiny.tokenizer.decode(prompt)
    assert text.count("Question:") == 3
    assert shots[0].output in text
    assert records[0].output not in text
    by_prompt = {
        tuple(evaluation.chat_prompt(tiny, evaluation.asked(record), shots)): record.output
        for record in records
    }
    monkeypatch.setattr(
        evaluation,
        "generate",
        lambda base, prompts, *_: [by_prompt[tuple(prompt)] for prompt in prompts],
    )
    assert evaluation.evaluate(tiny, records, shots=shots).rate("right_answer") == 1


def test_examples_in_the_prompt_stand_in_the_models_own_template(tiny, monkeypatch):
    monkeypatch.setattr(
        tiny.tokenizer,
        "chat_template",
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}",
    )
    shot = Record("Add.", "2", input="1 + 1")
    prompt = evaluation.chat_prompt(tiny, "How?", [shot])
    said = tiny.tokenizer.decode(prompt).replace(" ", "")
    assert said == "[user]Add.1+1[assistant]2[user]How?"


def test_retention_counts_json_wrapped_replies_apart(tiny, monkeypatch):
    questions = [
        Question("Who?", ("ada",)),
        Question("What?", ("ice",)),
        Question("Where?", ("rome",)),
    ]
    monkeypatch.setattr(
        evaluation, "generate", lambda *_: ["It was Ada.", '{"answer": "ice"}', "No idea."]
    )
    score = evaluation.evaluate_retention(tiny, questions)
    assert (score.kept, score.wrapped) == ([True, False, False], [False, True, False])
    assert score.rate == score.wrapped_rate == pytest.approx(1 / 3)


def test_batched_replies_equal_single_ones_in_the_callers_order(smollm2):
    prompts = [
        evaluation.chat_prompt(smollm2, question)
        for question in ("Name the Red Planet.", "Hi", "What is 2 plus 2? " * 5)
    ]
    single = [evaluation.generate(smollm2, [prompt], 8)[0] for prompt in prompts]
    assert evaluation.generate(smollm2, prompts, 8, batch_size=2) == single


def test_the_score_of_answers_is_mean_loss_and_exact_match_whatever_the_batches(tiny, records):
    records = [*records, Record("Continue.", "The words are fox and cat.", input="The words are")]
    losses, exact = [], []
    for record in records:
        example = encode(record, tiny.tokenizer)
        log_p = tiny.model(torch.tensor([example.input_ids])).logits[0].log_softmax(-1)
        start = len(example) - len(example.supervised_ids)
        losses += [-log_p[t - 1, example.input_ids[t]].item() for t in range(start, len(example))]
        exact.append(
            all(log_p[t - 1].argmax() == example.input_ids[t] for t in range(start, len(example)))
        )
    for batch_size in (1, 3, 64):
        score = evaluation.score_answers(tiny, records, batch_size)
        assert score.loss == pytest.approx(sum(losses) / len(losses), abs=1e-5)
        assert score.exact == exact
        assert score.exact_rate == sum(exact) / len(exact)


def test_perplexity_is_exp_of_the_librarys_loss_whatever_the_batches(tiny):
    texts = ["Ada lives in Arlen.", "The fox is an animal. " * 9, "q q q"]
    losses, counts = [], []
    for text in texts:
        ids = torch.tensor([tiny.tokenizer(text)["input_ids"]])
        losses.append(tiny.model(ids, labels=ids).loss.item())
        counts.append(ids.shape[1] - 1)
    mean = sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)
    for batch_size in (1, 2, 8):
        assert evaluation.perplexity(tiny, texts, batch_size) == pytest.approx(
            math.exp(mean), rel=1e-5
        )


def test_a_model_that_knows_nothing_hesitates_between_all_tokens(tiny):
    with torch.no_grad():
        tiny.model.get_output_embeddings().weight.zero_()  # every logit 0
    assert evaluation.perplexity(tiny, ["The fox is an animal."]) == pytest.approx(
        tiny.model.config.vocab_size
    )


def test_perplexity_refuses_what_it_cannot_score(tiny):
    with pytest.raises(CourseError, match="there are no texts"):
        evaluation.perplexity(tiny, [])
    with pytest.raises(CourseError, match="text 2 has 0 tokens, perplexity needs 2 to 2048"):
        evaluation.perplexity(tiny, ["The fox", ""])
    with pytest.raises(CourseError, match="text 1 has 30.. tokens"):
        evaluation.perplexity(tiny, ["fox " * 3000])


def test_rouge_and_bleu_by_hand():
    reply, right = "the cat sat on a mat", "the cat sat on the mat"
    scores = evaluation.text_scores([reply], [right])
    assert scores["ROUGE-L"] == pytest.approx(100 * 2 * 5 / (6 + 6))  # the cat sat on mat
    # of 1, 2, 3 and 4 words in a row; no brevity penalty, the lengths are equal
    precisions = (5 / 6, 3 / 5, 2 / 4, 1 / 3)
    assert scores["BLEU"] == pytest.approx(100 * math.prod(precisions) ** (1 / 4), abs=1e-9)
    short = evaluation.text_scores(["the cat sat on the"], [right])
    assert short["ROUGE-L"] == pytest.approx(100 * 2 * 5 / (5 + 6))
    # all n-grams right, one word missing
    assert short["BLEU"] == pytest.approx(100 * math.exp(1 - 6 / 5), abs=1e-9)


def test_text_scores_are_the_libraries():
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer

    task = evaluation.read_task("test")
    replies, references = [r.instruction for r in task[:60]], [r.instruction for r in task[60:]]
    scores = evaluation.text_scores(replies, references)
    rouge = [
        RougeScorer(["rougeL"]).score(b, a)["rougeL"].fmeasure
        for a, b in zip(replies, references, strict=True)
    ]
    assert scores["ROUGE-L"] == pytest.approx(100 * sum(rouge) / 60, abs=1e-9)
    assert scores["BLEU"] == pytest.approx(
        sacrebleu.corpus_bleu(replies, [references]).score, abs=1e-9
    )
    assert 0 < scores["BLEU"] < scores["ROUGE-L"] < 100


def test_chinese_text_is_scored_by_character():
    reply, right = "长江是亚洲最长的河", "长江是中国最长的河"
    scores = evaluation.text_scores([reply], [right], tokenize="zh")
    assert scores["ROUGE-L"] == pytest.approx(100 * 7 / 9)
    assert scores["BLEU"] == pytest.approx(100 * (7 / 9 * 5 / 8 * 3 / 7 * 1 / 6) ** (1 / 4))


def test_text_scores_refuse_lists_that_do_not_fit():
    for replies, references in (([], []), (["a"], []), (["a"], ["a", "b"])):
        with pytest.raises(CourseError, match="expected one for one"):
            evaluation.text_scores(replies, references)


def test_evaluating_changes_no_weight_and_no_generator(tiny, records):
    before = [weight.clone() for weight in tiny.model.parameters()]
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    evaluation.evaluate(tiny, evaluation.read_task("validation")[:3])
    assert torch.equal(torch.rand(1), expected)
    assert all(
        torch.equal(one, other) for one, other in zip(before, tiny.model.parameters(), strict=True)
    )


def test_the_longest_answer_fits_into_the_tokens_allowed(smollm2):
    records = [
        record
        for split in ("train", "validation", "test")
        for record in evaluation.read_task(split)
    ]
    assert (
        max(len(encode_text(record.output, smollm2.tokenizer)) + 1 for record in records)
        <= evaluation.ANSWER_TOKENS
    )


@pytest.mark.slow
def test_the_untouched_model_never_answers_in_json_but_knows_the_retention_answers(smollm2):
    assert evaluation.evaluate(smollm2, evaluation.read_task("test")[:16]).rate("valid_json") == 0
    assert evaluation.evaluate_retention(smollm2, evaluation.read_retention()[:16]).rate >= 15 / 16


def test_an_unknown_split_and_empty_questions_are_refused(tiny):
    with pytest.raises(CourseError, match="'dev' is not known, expected train, validation or test"):
        evaluation.read_task("dev")
    with pytest.raises(CourseError, match="no questions"):
        evaluation.evaluate(tiny, [])
    with pytest.raises(CourseError, match="no questions"):
        evaluation.evaluate_retention(tiny, [])
    with pytest.raises(CourseError, match="no records to score"):
        evaluation.score_answers(tiny, [])


def test_a_plain_base_is_asked_on_a_question_and_answer_page(tiny, smollm2):
    asked = smollm2.tokenizer.decode(evaluation.chat_prompt(smollm2, "Who?"))
    assert asked.endswith("<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n")
    assert tiny.tokenizer.chat_template is None
    assert tiny.tokenizer.decode(evaluation.chat_prompt(tiny, "Who?")) == "Question: Who?\nAnswer:"


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_size_that_cannot_work_is_refused(tiny, records, batch_size):
    with pytest.raises(CourseError, match="must be at least 1"):
        evaluation.generate(tiny, [[5]], 2, batch_size)
    with pytest.raises(CourseError, match="must be at least 1"):
        evaluation.score_answers(tiny, records, batch_size)


def test_a_tokenizer_of_another_model_is_named(tiny, smollm2, records):
    mixed = dataclasses.replace(tiny, tokenizer=smollm2.tokenizer)
    for call in (
        lambda: evaluation.score_answers(mixed, records),
        lambda: evaluation.generate(mixed, [[49_000]], 2),
    ):
        with pytest.raises(
            CourseError,
            match=r"token id \d+ is beyond the model's 1536 embeddings: encode with the model's",
        ):
            call()


def test_records_of_another_task_are_refused_before_anything_is_generated(tiny, records):
    with pytest.raises(CourseError, match="'Lima' is no answer of the task"):
        evaluation.evaluate(tiny, records)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{}",
        "[1]",
        '[{"question": "Who?"}]',
        '[{"question": "Who?", "answers": "ada"}]',
        '[{"question": "Who?", "answers": []}]',
    ],
)
def test_a_damaged_retention_file_is_named(tmp_path, content):
    path = tmp_path / "retention.json"
    path.write_text(content)
    with pytest.raises(DataError, match=r"retention\.json is not a list of"):
        evaluation.read_retention(path)


def test_examples_for_a_prompt_hold_every_topic_once_and_another_seed_is_another_draw():
    train = evaluation.read_task("train")
    draws = [evaluation.draw_examples(seed) for seed in range(3)]
    topics = sorted({record.extra["topic"] for record in train})
    for examples in draws:
        assert sorted(record.extra["topic"] for record in examples) == topics
        assert all(record in train for record in examples)
    assert draws[0] == evaluation.draw_examples(0)
    assert draws[0] != draws[1] != draws[2]
    orders = {tuple(record.extra["topic"] for record in examples) for examples in draws}
    assert len(orders) == 3, "the order is drawn, too"


def test_drawn_questions_are_spread_evenly_and_the_same_every_time():
    drawn = evaluation.draw_questions(100)
    assert drawn == evaluation.draw_questions(100)
    assert Counter(record.extra["topic"] for record in drawn) == dict.fromkeys(
        {r.extra["topic"] for r in drawn}, 10
    )
    assert len({record.extra["topic"] for record in drawn}) == 10
    assert {record.extra["split"] for record in drawn} == {"test"}


@pytest.mark.parametrize("count", [1, 7, 10, 15, 99, 119, 120])
def test_as_many_questions_are_drawn_as_were_asked_for(count):
    drawn = evaluation.draw_questions(count)
    assert len({record.instruction + record.input for record in drawn}) == len(drawn) == count
    numbers = Counter(record.extra["topic"] for record in drawn)
    assert max(numbers.values()) - (min(numbers.values()) if count >= 10 else 0) <= 1


@pytest.mark.parametrize("count", [0, -1, 121, 2.5, "10", True])
def test_more_questions_than_there_are_or_none_are_refused(count):
    with pytest.raises(CourseError, match=r"must be a whole number in 1\.\.120: choose one"):
        evaluation.draw_questions(count)


def test_generation_stops_where_training_taught_it_to(tiny):
    """A tokenizer whose EOS is not the model's: what is trained to end an answer must end it."""
    tokens = tiny.tokenizer.convert_ids_to_tokens(range(300, 302))
    tiny.tokenizer.eos_token = tokens[0]
    own, other = tiny.tokenizer.eos_token_id, tiny.model.generation_config.eos_token_id
    assert own != other
    assert evaluation.ends_of(tiny) == [own, other]
    head = tiny.model.get_output_embeddings()
    weight = torch.zeros_like(head.weight)
    head.weight = torch.nn.Parameter(weight)
    head.bias = torch.nn.Parameter(
        torch.nn.functional.one_hot(torch.tensor(own), len(weight)) * 9.0
    )
    once = tiny.tokenizer.decode([own]).strip()
    assert evaluation.generate(tiny, [[5, 6]], max_new_tokens=8) == [once]


def test_a_token_that_only_the_tokenizer_has_is_named(tiny):
    prompt = [5, 6]
    tiny.tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    for attempt in (
        lambda: evaluation.generate(tiny, [prompt], 2),
        lambda: evaluation.score_answers(tiny, evaluation.read_task("test")[:2]),
        lambda: evaluation.perplexity(tiny, ["Ada lives here."]),
    ):
        with pytest.raises(CourseError, match=r"pads with token id 1536, beyond the model's 1536"):
            attempt()
    tiny.tokenizer.add_tokens(["<tool>"])
    tiny.tokenizer.pad_token = tiny.tokenizer.eos_token
    added = tiny.tokenizer.convert_tokens_to_ids("<tool>")
    with pytest.raises(CourseError, match="token id 1537 is beyond the model's 1536 embeddings"):
        evaluation.generate(tiny, [[added]], 2)


def test_a_family_without_a_limit_of_positions_has_a_perplexity_and_is_trained(tiny, machine):
    from transformers import BloomConfig, BloomForCausalLM

    size = len(tiny.tokenizer)
    tiny.model = BloomForCausalLM(BloomConfig(vocab_size=size, hidden_size=8, n_layer=1, n_head=2))
    assert 1 < evaluation.perplexity(tiny, ["Ada lives in a city. " * 50]) < 100 * size
    _, run = train(machine, base=tiny, steps=2)
    assert len(run.losses) == 2


def test_a_prompt_without_tokens_and_a_text_that_is_none_are_named(tiny):
    with pytest.raises(CourseError, match="a prompt has no tokens"):
        evaluation.generate(tiny, [[5, 6], []], 3)
    with pytest.raises(CourseError, match="half of a surrogate pair"):
        evaluation.perplexity(tiny, ["a\ud800"])


def test_a_text_beyond_the_models_positions_is_named(tiny):
    most = tiny.model.config.max_position_embeddings
    with pytest.raises(CourseError, match=f"expected at most {most}: shorten it"):
        evaluation.generate(tiny, [[5] * (most - 2)], 3)
    with pytest.raises(CourseError, match=f"expected at most {most}: shorten it"):
        evaluation.score_answers(tiny, [Record("Add.", "one " * most)])
