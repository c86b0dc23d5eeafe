"""Tests of course_lib.experiments."""

from dataclasses import replace

import pytest

from course_lib import evaluation, experiments, models, world
from course_lib.alpaca import DataError, Record
from course_lib.experiments import Method, Outcome, adapted, compare, last_blocks, summary, world_experiment
from course_lib.runtime import CourseError

UNTOUCHED, FULL = Method("untouched", None), Method("full fine-tuning", 1e-3)


@pytest.fixture(scope="module")
def plurals():
    return world_experiment(
        world.read_world("train", ["plural"]), world.read_world("test", ["plural", "kind"]), steps=4, batch_size=4
    )


@pytest.fixture(scope="module")
def outcomes(plurals, machine):
    return compare([UNTOUCHED, FULL, Method("LoRA r=2", 1e-2, adapted(rank=2))], plurals, machine, seeds=(0, 1), progress=False)


def test_every_method_runs_with_every_seed_and_the_untouched_base_once(outcomes):
    assert [(outcome.method, outcome.seed) for outcome in outcomes] == [
        ("untouched", 0),
        ("full fine-tuning", 0),
        ("full fine-tuning", 1),
        ("LoRA r=2", 0),
        ("LoRA r=2", 1),
    ]


def test_trained_weights_are_counted(outcomes):
    linears = 4 * (4 * (128 + 128) + 3 * (128 + 384))  # d_in + d_out of the seven linear layers in each of four blocks
    assert {outcome.method: outcome.trained for outcome in outcomes} == {
        "untouched": 0,
        "full fine-tuning": 1_049_728,
        "LoRA r=2": 2 * linears,
    }


def test_seeds_differ_and_are_repeatable(outcomes, plurals, machine):
    assert outcomes[1].scores != outcomes[2].scores
    again = compare([FULL], plurals, machine, seeds=(1,), progress=False)
    assert again[0].scores == outcomes[2].scores


def test_training_pays_and_starts_from_a_fresh_base_each_time(outcomes, plurals, machine):
    untouched = outcomes[0].scores["response loss"]
    assert all(outcome.scores["response loss"] < untouched for outcome in outcomes[1:])
    assert compare([UNTOUCHED], plurals, machine, progress=False)[0].scores == outcomes[0].scores


def test_a_prompt_can_be_trained_on(plurals, machine):
    masked, unmasked = compare([FULL, Method("all tokens", 1e-3, mask_prompt=False)], plurals, machine, seeds=(0,), progress=False)
    assert masked.scores != unmasked.scores
    assert masked.trained == unmasked.trained


def test_hard_tasks_are_left_out_of_one_measure(monkeypatch):
    test = world.read_world("test", ["reverse", "plural"])
    exact = [record.extra["task"] == "plural" for record in test]
    monkeypatch.setattr(evaluation, "score_answers", lambda base, records: evaluation.AnswerScore(0.5, exact))
    assert world_experiment(test=test).score(None) == {"response loss": 0.5, "exact match": 0.5, "not hard": 1.0}
    assert "not hard" not in world_experiment(test=world.read_world("test", ["reverse"])).score(None)


def test_a_summary_shows_mean_and_spread_in_percent_and_nats():
    runs = [
        Outcome("A", seed, 10, {"response loss": loss, "exact match": rate}, 3.0, 2 * 10**9)
        for seed, loss, rate in ((0, 0.5, 0.8), (1, 0.7, 0.6))
    ]
    assert summary([Outcome("base", 0, 0, {"response loss": 2.0, "exact match": 0.0}, 0.0, 0), *runs]) == [
        {
            "method": "base",
            "trained": "0",
            "response loss": "2.000",
            "exact match": "0.0",
            "seconds": "",
            "peak GB": "",
            "seeds": 1,
        },
        {
            "method": "A",
            "trained": "10",
            "response loss": "0.600 ± 0.141",
            "exact match": "70.0 ± 14.1",
            "seconds": "3.0 ± 0.0",
            "peak GB": "2.00",
            "seeds": 2,
        },
    ]


def test_outcomes_survive_the_file(tmp_path, outcomes):
    experiments.write_outcomes(outcomes, tmp_path / "outcomes.json")
    kept = experiments.read_outcomes(tmp_path / "outcomes.json")
    assert [replace(run, scores={}, seconds=0) for run in kept] == [replace(run, scores={}, seconds=0) for run in outcomes]
    assert summary(kept)[0]["exact match"] == summary(outcomes)[0]["exact match"]


@pytest.mark.parametrize("content", [None, "", "{}", '[{"method": "A"}]', '["A"]'])
def test_a_file_without_outcomes_is_named(tmp_path, content):
    path = tmp_path / "outcomes.json"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=r"outcomes.json holds no outcomes of experiments: restore it"):
        experiments.read_outcomes(path)


def test_mistakes_are_named_before_the_first_run(plurals, machine):
    for methods, seeds in (([FULL, FULL], (0,)), ([], (0,)), ([FULL], ()), ([FULL], (0, 0))):
        with pytest.raises(CourseError, match="found methods .* and seeds .*, expected at least one of each, all different"):
            compare(methods, plurals, machine, seeds=seeds)


def test_a_run_that_fails_is_named(plurals, machine):
    with pytest.raises(CourseError, match="LoRA, seed 1: learning_rate=-1 must be a number above 0"):
        compare([Method("LoRA", -1)], plurals, machine, seeds=(1,), progress=False)
    with pytest.raises(
        CourseError, match="full fine-tuning, seed 0: a training record was refused: record 1: .* tokens, at most 256"
    ):
        compare([FULL], replace(plurals, train=[Record("Repeat.", "fox " * 300), *plurals.train]), machine, progress=False)


def test_a_base_that_cannot_be_had_is_named(plurals, machine, monkeypatch):
    tiny = models.load("tiny", machine)
    monkeypatch.setattr(models, "load", lambda *arguments, **options: tiny)
    with pytest.raises(CourseError, match="this comparison needs smollm2-135m, found tiny"):
        compare([FULL], replace(plurals, base="smollm2-135m"), machine)


def test_the_task_of_the_week_is_day_ones_recipe():
    task = experiments.week_experiment()
    assert (task.base, len(task.train), task.steps, task.batch_size) == ("smollm2-135m", 440, 32, 4)


def test_a_measured_effect_is_read_by_its_name(tmp_path, monkeypatch):
    outcomes = experiments.read_effect("prompt_masking")
    assert {outcome.seed for outcome in outcomes} == {0, 1, 2}
    assert all("exact match" in outcome.scores for outcome in outcomes)
    with pytest.raises(CourseError, match="effect 'warp' was not measured, expected one of formats, "):
        experiments.read_effect("warp")
    monkeypatch.setattr(experiments, "data_folder", lambda: tmp_path)
    with pytest.raises(DataError, match="holds no measured effects"):
        experiments.read_effect("prompt_masking")


def test_the_last_blocks_train_and_nothing_else(tiny):
    last_blocks(1)(tiny)
    trained = {name for name, weight in tiny.model.named_parameters() if weight.requires_grad}
    assert trained == {name for name, _ in tiny.model.named_parameters() if name.startswith("model.layers.3.")}


@pytest.mark.parametrize("count", [0, -1, 5, 1.0, None])
def test_a_number_of_blocks_that_cannot_be_is_refused_and_nothing_is_frozen(count, tiny):
    with pytest.raises(CourseError, match=r"count=.* must be a whole number in 1..4, the blocks of tiny"):
        last_blocks(count)(tiny)
    assert all(weight.requires_grad for weight in tiny.model.parameters())


def test_runs_without_retention_are_named():
    with pytest.raises(CourseError, match="full has the scores response loss, expected response loss and retention"):
        experiments.learned_and_kept([Outcome("full", 0, 8, {"response loss": 0.2}, 1.0, 1)])
