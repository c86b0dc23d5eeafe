"""Tests of course_lib.explorables that need no browser; slides/test_explorables.mjs opens them in
one.
"""

import json
import math
import re

import pytest
import torch

from course_lib import explorables, qlora

TOKENS = ["Hi", " </script>", ":", "yes", "<EOS>"]
SURPRISE, LABELS = [3.0, 2.5, 2.0, 1.0], [-100, -100, -100, 5, 2]


@pytest.fixture(scope="module")
def figure():
    return explorables.loss_of_an_example(TOKENS, SURPRISE, LABELS)


def test_the_loss_of_each_choice_is_the_mean_of_what_counts(figure):
    assert [state["value"] for state in figure.data["python"]] == [1.5, 2.0, 2.125]
    assert figure.data["counts"] == [False, False, True, True]


def test_an_output_needs_nothing_but_itself_and_shows_a_picture_without_scripts(figure):
    output = figure._repr_html_()
    assert re.match(
        r'<div><img alt="[^"]{30,}" src="data:image/png;base64,[\w+/=]+"></div>\n', output
    )
    assert not re.search(r'src="(?!data:)|https?://|import |fetch\(', output)
    assert len(output) < 60_000


def test_text_of_tokens_cannot_end_the_script(figure):
    output = figure._repr_html_()
    assert output.count("</script>") == 1
    data = re.search(r"^const data = (.*);$", output, re.M)[1]
    assert json.loads(data.replace("<\\/", "</"))["tokens"] == TOKENS


def test_an_answer_without_eos_has_a_loss_as_well():
    figure = explorables.loss_of_an_example(["a", "b"], [0.5], [-100, 7])
    both, answer, _ = (state["value"] for state in figure.data["python"])
    assert both == 0.5
    assert math.isfinite(answer)


def test_a_page_of_its_own_holds_the_figure(figure):
    page = explorables.page(figure._repr_html_())
    assert page.startswith("<!doctype html>")
    assert figure._repr_html_() in page


LAYERS = [f"model.layers.{block}.{name}_proj" for block in (0, 1) for name in ("q", "down")]


def test_the_race_has_the_ranks_of_every_step_and_their_sums():
    figure = explorables.race_of_ranks(LAYERS, [[4, 4, 4, 4], [4, 4, 3, 2], [0, 4, 1, 3]])
    assert figure.data["matrices"] == ["q", "down"]
    assert figure.data["history"] == [[[4, 4], [4, 4]], [[4, 3], [4, 2]], [[0, 1], [4, 3]]]
    assert [state["value"] for state in figure.data["python"]] == [16, 13, 8]


def test_the_race_of_a_real_run_stays_small():
    names = [f"layers.{block}.{name}_proj" for block in range(4) for name in "abcdefg"]
    figure = explorables.race_of_ranks(names, [[8] * 28] * 151)
    assert len(figure._repr_html_()) < 60_000


def block(**formats):
    generator = torch.Generator().manual_seed(0)
    return explorables.block_of_weights(torch.randn(64, generator=generator), 20, formats)


def test_the_error_of_the_others_is_that_of_the_package():
    figure = block(NF4=qlora.nf4_levels(), INT4=qlora.even_levels())
    weights = torch.tensor(figure.data["weights"])
    others = torch.arange(64) != 20
    for levels, state in zip(
        (qlora.nf4_levels(), qlora.nf4_levels(), qlora.even_levels()),
        figure.data["python"],
        strict=True,
    ):
        size = 2 ** state["inputs"]["block size"]
        weights[20] = state["inputs"]["outlier"]
        codes, absmax = qlora.quantize_blockwise(weights, levels, size)
        wrong = qlora.dequantize_blockwise(codes, absmax, levels, size) - weights
        error = wrong[others].norm() / weights[others].norm()
        assert state["value"] == pytest.approx(error.item(), rel=1e-5)


def test_an_outlier_spoils_its_block():
    small, large, small_blocks = (
        state["value"] for state in block(NF4=qlora.nf4_levels()).data["python"]
    )
    assert small < small_blocks < large


def test_the_block_stays_small():
    figure = block(NF4=qlora.nf4_levels(), FP4=qlora.fp4_levels(), INT4=qlora.even_levels())
    assert len(figure._repr_html_()) < 60_000
