"""Tests of data/tiny_llama, the trained model that ships with the course, and of the recipe that
made it.
"""

import re
import shutil
import sys
import time

import corpus
import pytest
import torch
import train_tiny_llama as recipe

from course_lib import evaluation, experiments, models, sealing, world
from course_lib.batching import encode_prompt
from course_lib.runtime import CourseError, data_folder

FOLDER = data_folder() / "tiny_llama"
OTHERS = ("README.md",)
FACTS = sealing.check(FOLDER, OTHERS)
CARD = (FOLDER / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def refused(monkeypatch):
    """What the recipe says when it refuses these command-line arguments."""

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["train_tiny_llama.py", *arguments])
        with pytest.raises(SystemExit) as stop:
            recipe.main()
        return str(stop.value.code)

    return run


def test_the_card_gives_the_command_the_checksum_and_the_numbers_of_the_committed_weights():
    assert FACTS["command"] in CARD
    assert sealing.sha256(FOLDER / "model.safetensors") in CARD
    assert f"{FACTS['parameters']:,}" in CARD
    assert f"{FACTS['tokens']:,}" in CARD
    assert f"validation loss {FACTS['validation loss']:.2f}" in CARD
    assert FACTS["seconds"] <= 20 * 60


def test_the_committed_weights_have_the_validation_loss_of_the_card(tiny):
    loss = recipe.validation_loss(tiny.model, tiny.tokenizer)
    assert loss == pytest.approx(FACTS["validation loss"], abs=0.005)
    assert FACTS["curve"][-1][1] == pytest.approx(loss, abs=0.005)


def test_it_is_a_llama_of_a_million_parameters_in_a_few_megabytes(tiny):
    assert type(tiny.model).__name__ == "LlamaForCausalLM"
    assert tiny.model.num_parameters() == FACTS["parameters"] == 1_049_728
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 6e6


def test_it_loads_in_a_second(machine):
    models.load("tiny", machine)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        models.load("tiny", machine)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 1


def test_the_tokenizer_is_lossless_and_sees_a_word_alike_everywhere(tiny):
    for text in ("fox wolf\ncat\n", "  two\n\n   three ", "12 + 30 = 42\n7", "狐狸 café\t\r\n", ""):
        assert tiny.tokenizer.decode(tiny.tokenizer(text)["input_ids"]) == text
    (alone,) = tiny.tokenizer("fox")["input_ids"]
    for text in ("a fox", "cat\nfox", "\nfox", "# cat\n\nfox"):
        assert tiny.tokenizer(text)["input_ids"][-1] == alone
    for word in [person.name for person in world.people()] + list(world.KIND_OF_NOUN):
        assert len(tiny.tokenizer(word)["input_ids"]) == 1
    assert len(tiny.tokenizer("2026")["input_ids"]) == 5  # the space, and every digit by itself


def test_it_answers_plain_questions_but_not_in_alpacas_format(tiny):
    """The base knows the facts and does not know the instruction format: that is what fine-tuning
    is there to teach.
    """
    person = world.people()[0]
    prompts = [
        f"Question: where does {person.name} live?\nAnswer:",
        "Q: what is the plural of fox?\nA:",
        "Task: past\nText: run\nSolution:",
    ]
    replies = evaluation.generate(
        tiny, [tiny.tokenizer(prompt)["input_ids"] for prompt in prompts], 4
    )
    assert [reply.split("\n")[0] for reply in replies] == [person.city, "foxes", "ran"]
    assert evaluation.score_answers(tiny, world.read_world("test")).exact_rate < 0.05


def test_exact_match_by_one_forward_pass_is_that_of_generated_replies(tiny, machine):
    from course_lib.batching import encode_records
    from course_lib.training import finetune

    train, test = world.read_world("train"), world.read_world("test")[:60]
    finetune(
        tiny,
        encode_records(train, tiny.tokenizer, 128).examples,
        machine,
        steps=25,
        batch_size=16,
        learning_rate=1e-3,
        progress=False,
    )
    replies = evaluation.generate(
        tiny, [encode_prompt(record, tiny.tokenizer) for record in test], 16
    )
    generated = [reply == record.output for record, reply in zip(test, replies, strict=True)]
    assert evaluation.score_answers(tiny, test).exact == generated
    assert 0 < sum(generated) < len(test)


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """A copy of the model that `models` takes for the course's own."""
    shutil.copytree(FOLDER, tmp_path / "tiny_llama")
    monkeypatch.setattr(models, "data_folder", lambda: tmp_path)
    return tmp_path / "tiny_llama"


@pytest.mark.parametrize(
    "name", ["model.safetensors", "tokenizer.json", "config.json", "SEAL.json"]
)
@pytest.mark.parametrize("damage", ["missing", "cut", "changed"])
def test_a_damaged_model_is_named_with_the_way_to_restore_it(copy, machine, name, damage):
    content = (copy / name).read_bytes()
    (copy / name).unlink()
    if damage == "cut":
        (copy / name).write_bytes(content[: len(content) // 2])
    if damage == "changed":
        middle = len(content) // 2
        (copy / name).write_bytes(
            content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        )
    with pytest.raises(CourseError) as error:
        models.load("tiny", machine)
    assert re.fullmatch(
        r"tiny_llama.*: restore it with `git checkout data/tiny_llama`, "
        r"or install the course again",
        str(error.value),
    )


def test_a_tokenizer_of_another_model_is_refused(copy, machine, smollm2):
    smollm2.tokenizer.save_pretrained(copy)
    with pytest.raises(
        CourseError,
        match=r"tiny_llama/(tokenizer|chat_template)[^:]*: restore it with `git checkout",
    ):
        models.load("tiny", machine)


def test_hidden_files_may_lie_beside_the_model_but_nothing_that_transformers_would_read(
    copy, machine
):
    (copy / ".DS_Store").write_bytes(b"\0")
    assert models.load("tiny", machine).name == "tiny"
    (copy / "adapter_config.json").write_text('{"base_model_name_or_path": "elsewhere"}')
    with pytest.raises(
        CourseError, match="tiny_llama/adapter_config.json is not in the seal: restore it"
    ):
        models.load("tiny", machine)


def test_the_recipe_makes_the_committed_tokenizer(tiny):
    assert (
        recipe.train_tokenizer(FACTS["seed"]).backend_tokenizer.to_str()
        == tiny.tokenizer.backend_tokenizer.to_str()
    )


def test_the_recipe_gives_the_same_model_twice_and_keeps_what_it_did_not_make(tiny, tmp_path):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "README.md").write_text("mine", encoding="utf-8")
        recipe.save(
            recipe.train(tiny.tokenizer, seed=0, steps=2), tmp_path / name, {"made": "twice"}
        )
        assert (tmp_path / name / "README.md").read_text(encoding="utf-8") == "mine"
        assert sealing.check(tmp_path / name, OTHERS) == {"made": "twice"}
    assert sealing.sha256(tmp_path / "first" / "model.safetensors") == sealing.sha256(
        tmp_path / "second" / "model.safetensors"
    )


def test_a_corpus_seed_that_changes_the_tokenizer_does_not_replace_the_model(refused, tmp_path):
    folder = tmp_path / "tiny_llama"
    shutil.copytree(FOLDER, folder)
    assert refused("--seed", "1", "--steps", "1", "--output", str(folder)) == (
        "the corpus of seed 1 gives another tokenizer than tiny_llama has, and adapters trained on "
        "that would no longer fit: "
        "write elsewhere with --output, or remove tiny_llama/tokenizer.json to replace the model"
    )
    assert sealing.check(folder, OTHERS) == FACTS


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--steps", "0"), "found --steps 0 --seed 0, expected at least 1 step"),
        (("--seed", "-1"), "found --steps 2400 --seed -1, expected"),
        (("--seed", str(corpus.VALIDATION_SEED)), "a seed from 0 on that is not the validation's"),
        (
            ("--steps", "1"),
            "other settings than the defaults would replace the model of the course: write "
            "elsewhere with --output",
        ),
        (("--steps", "1", "--output", str(FOLDER / "README.md" / "below")), "Not a directory"),
    ],
)
def test_the_recipe_refuses_in_one_line_what_cannot_work_or_would_do_harm(
    refused, arguments, message
):
    said = refused(*arguments)
    assert message in said
    assert "\n" not in said
    assert sealing.check(FOLDER, OTHERS) == FACTS


def test_the_recipes_optimizer_makes_matrices_orthogonal():
    torch.manual_seed(0)
    for shape in ((12, 40), (40, 12), (16, 16)):
        update = recipe.orthogonal(torch.randn(shape))
        assert update.shape == shape
        assert ((torch.linalg.svdvals(update) > 0.3) & (torch.linalg.svdvals(update) < 1.3)).all()


def test_packed_rows_hold_every_document_in_order_and_end_each(tiny):
    documents = [f"fox {number}" for number in range(200)]
    rows = list(recipe.pack(iter(documents), tiny.tokenizer))
    assert {len(row) for row in rows} == {recipe.COLUMNS}
    text = tiny.tokenizer.decode([token for row in rows for token in row])
    assert [part.strip() for part in text.split("<|endoftext|>")][:100] == documents[:100]


def test_full_fine_tuning_reaches_what_the_course_relies_on():
    """As measured by data/recipes/measure_tiny.py: a fresh run takes too long for a test."""
    sweep = experiments.read("tiny_fine_tuning")
    (untouched,) = sweep.where("untouched").outcomes
    trained = sweep.where("full fine-tuning").outcomes
    assert untouched.scores["exact match"] < 5
    assert len(trained) == 3
    assert all(run.scores["exact match"] >= 70 and run.scores["not hard"] >= 90 for run in trained)
