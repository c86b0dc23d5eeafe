"""Tests of course_lib.experiments."""

from dataclasses import replace

import pytest

from course_lib import evaluation, experiments, models, world
from course_lib.alpaca import DataError, Record
from course_lib.experiments import (
    Measure,
    Method,
    Outcome,
    Sweep,
    adapted,
    compare,
    last_blocks,
    summary,
    world_experiment,
)
from course_lib.runtime import CourseError

UNTOUCHED, FULL = Method("untouched", None), Method("full fine-tuning", 1e-3)


@pytest.fixture(scope="module")
def plurals():
    return world_experiment(
        world.read_world("train", ["plural"]),
        world.read_world("test", ["plural", "kind"]),
        steps=4,
        batch_size=4,
    )


@pytest.fixture(scope="module")
def sweep(plurals, machine):
    methods = [UNTOUCHED, FULL, Method("LoRA", 1e-2, {"rank": 2}, adapted(rank=2))]
    return compare(methods, plurals, machine, seeds=(0, 1), progress=False)


@pytest.fixture(scope="module")
def outcomes(sweep):
    return sweep.outcomes


def test_every_method_runs_with_every_seed_and_the_untouched_base_once(outcomes):
    assert [(outcome.method, outcome.seed) for outcome in outcomes] == [
        ("untouched", 0),
        ("full fine-tuning", 0),
        ("full fine-tuning", 1),
        ("LoRA", 0),
        ("LoRA", 1),
    ]


def test_trained_weights_are_counted(outcomes):
    # d_in + d_out of the seven linear layers in each of four blocks
    linears = 4 * (4 * (128 + 128) + 3 * (128 + 384))
    assert {outcome.method: outcome.trained for outcome in outcomes} == {
        "untouched": 0,
        "full fine-tuning": 1_049_728,
        "LoRA": 2 * linears,
    }


def test_seeds_differ_and_are_repeatable(outcomes, plurals, machine):
    assert outcomes[1].scores != outcomes[2].scores
    again = compare([FULL], plurals, machine, seeds=(1,), progress=False)
    assert again.outcomes[0].scores == outcomes[2].scores


def test_training_pays_and_starts_from_a_fresh_base_each_time(outcomes, plurals, machine):
    untouched = outcomes[0].scores["response loss"]
    assert all(outcome.scores["response loss"] < untouched for outcome in outcomes[1:])
    assert (
        compare([UNTOUCHED], plurals, machine, progress=False).outcomes[0].scores
        == outcomes[0].scores
    )


def test_a_prompt_can_be_trained_on(plurals, machine):
    methods = [FULL, Method("all tokens", 1e-3, mask_prompt=False)]
    masked, unmasked = compare(methods, plurals, machine, seeds=(0,), progress=False).outcomes
    assert masked.scores != unmasked.scores
    assert masked.trained == unmasked.trained


def test_hard_tasks_are_left_out_of_one_measure(monkeypatch):
    test = world.read_world("test", ["reverse", "plural"])
    exact = [record.extra["task"] == "plural" for record in test]
    monkeypatch.setattr(
        evaluation, "score_answers", lambda base, records: evaluation.AnswerScore(0.5, exact)
    )
    assert world_experiment(test=test).score(None) == {
        "response loss": 0.5,
        "exact match": 50,
        "not hard": 100,
    }
    assert "not hard" not in world_experiment(test=world.read_world("test", ["reverse"])).measures


MEASURES = {
    "response loss": Measure("nats"),
    "exact match": Measure("percent", 50),
    "perplexity": Measure("perplexity"),
}
RUNS = [
    Outcome("base", {}, 0, 0, {"response loss": 2.0, "exact match": 0.0, "perplexity": 8.0}),
    *(
        Outcome(
            "A",
            {"rank": 2, "rate": 0.5},
            seed,
            10,
            dict(zip(MEASURES, scores, strict=True)),
            3.0,
            2 * 10**9,
        )
        for seed, scores in enumerate(((0.5, 80.0, 3.0), (0.7, 60.0, 4.0)))
    ),
]
TRIAL = Sweep(RUNS, MEASURES, "A trial.", "python data/recipes/trial.py trial")


def test_a_summary_shows_each_measure_in_its_unit_with_spread_and_interval():
    base, method = summary(TRIAL)
    assert base == {
        "method": "base",
        "trained": "0",
        "response loss (nats)": "2.000",
        "exact match (percent)": "0.0 [0, 7]",
        "perplexity (perplexity)": "8.00",
        "seeds": 1,
    }
    assert method["method"] == "A, rank 2, rate 0.5"
    assert method["exact match (percent)"] == "70.0 ± 14.1 [56, 81]"
    assert method["perplexity (perplexity)"] == "3.50 ± 0.71", "no percentage of anything"
    rows = summary(TRIAL, "response loss", "time", "peak memory")
    assert [row["time (seconds)"] for row in rows] == ["", "3.0 ± 0.0"]
    assert rows[1]["peak memory (GB)"] == "2.00 ± 0.00"


def test_outcomes_are_chosen_by_method_and_settings():
    assert TRIAL.where("A").outcomes == TRIAL.where(rank=2).outcomes == RUNS[1:]
    assert TRIAL.where("A", rank=3).outcomes == TRIAL.where("B").outcomes == []
    assert TRIAL.where("A").mean("exact match") == 70
    other = Sweep(RUNS[:1], {"response loss": Measure("nats")})
    assert (TRIAL + other).measures == other.measures, "what both have"
    assert len((TRIAL + other).outcomes) == 4


@pytest.fixture
def measured(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "data_folder", lambda: tmp_path)
    (tmp_path / "measured").mkdir()
    return tmp_path / "measured"


def test_a_sweep_survives_the_file(measured, sweep):
    for name, kept in (("trial", TRIAL), ("run", replace(sweep, about="A run.", recipe="none"))):
        experiments.write(kept, name)
        assert summary(experiments.read(name)) == summary(kept)
    assert experiments.read("trial") == TRIAL
    with pytest.raises(
        CourseError, match="sweep 'warp' was not measured, expected one of run, trial"
    ):
        experiments.read("warp")


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{}",
        "[]",
        '{"measures": {}, "outcomes": []}',
        '{"measures": {"a": 1}, "outcomes": ["A"]}',
    ],
)
def test_a_file_without_outcomes_is_named(measured, content):
    (measured / "week.json").write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=r"week.json .*: restore it"):
        experiments.read("week")


def test_mistakes_are_named_before_the_first_run(plurals, machine):
    for methods, seeds in (([FULL, FULL], (0,)), ([], (0,)), ([FULL], ()), ([FULL], (0, 0))):
        with pytest.raises(
            CourseError,
            match="found methods .* and seeds .*, expected at least one of each, all different",
        ):
            compare(methods, plurals, machine, seeds=seeds)


def test_a_run_that_fails_is_named(plurals, machine):
    with pytest.raises(
        CourseError,
        match="LoRA, learning rate -1, seed 1: learning_rate=-1 must be a number above 0",
    ):
        compare([Method("LoRA", -1)], plurals, machine, seeds=(1,), progress=False)
    with pytest.raises(
        CourseError,
        match="full fine-tuning, learning rate 0.001, seed 0: a training record was refused: "
        "record 1: .* tokens, at most 256",
    ):
        compare(
            [FULL],
            replace(plurals, train=[Record("Repeat.", "fox " * 300), *plurals.train]),
            machine,
            progress=False,
        )


def test_a_base_that_cannot_be_had_is_named(plurals, machine, monkeypatch):
    tiny = models.load("tiny", machine)
    monkeypatch.setattr(models, "load", lambda *arguments, **options: tiny)
    with pytest.raises(CourseError, match="this comparison needs smollm2-135m, found tiny"):
        compare([FULL], replace(plurals, base="smollm2-135m"), machine)


def test_the_task_of_the_week_is_day_ones_recipe():
    task = experiments.week_experiment()
    assert (task.base, len(task.train), task.steps, task.batch_size) == ("smollm2-135m", 440, 32, 4)


def test_the_last_blocks_train_and_nothing_else(tiny):
    last_blocks(1)(tiny)
    trained = {name for name, weight in tiny.model.named_parameters() if weight.requires_grad}
    assert trained == {
        name for name, _ in tiny.model.named_parameters() if name.startswith("model.layers.3.")
    }


@pytest.mark.parametrize("count", [0, -1, 5, 1.0, None])
def test_a_number_of_blocks_that_cannot_be_is_refused_and_nothing_is_frozen(count, tiny):
    with pytest.raises(
        CourseError, match=r"count=.* must be a whole number in 1..4, the blocks of tiny"
    ):
        last_blocks(count)(tiny)
    assert all(weight.requires_grad for weight in tiny.model.parameters())


def test_rates_with_fewer_seeds_are_refused_since_chance_decides_there():
    runs = [
        experiments.Outcome("LoRA", {"learning rate": rate}, seed, 8, {"exact match": 50.0})
        for rate, seed in ((0.1, 0), (0.1, 1), (0.2, 0))
    ]
    sweep = experiments.Sweep(runs, {"exact match": experiments.Measure("percent")})
    with pytest.raises(CourseError, match="LoRA, learning rate 0.2 has 1 seeds, another rate 2"):
        experiments.at_best_rates(sweep, "exact match")
