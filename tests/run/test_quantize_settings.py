"""Mistakes of `export.quantize` are told by `check`, before anything is trained."""

from __future__ import annotations

import pytest

from ernie_train.cli.model import quantize_config
from ernie_train.core.errors import ConfigError, DataError, UserError
from ernie_train.data import DataSource, load_tokenizer
from ernie_train.model import Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM
from ernie_train.run.check import check_fit
from ernie_train.run.quantize import QuantizeConfig, Quantizer
from ernie_train.run.recipe import load_recipe
from tests.workspace import make_workspace, write_rows


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("quantize")
    make_workspace(root)
    return root


def check(root, quantize: str) -> None:
    recipe = load_recipe(root / "recipe.yaml", [f"export.quantize={quantize}"])
    check_fit(recipe, recipe.model.build(), load_tokenizer(root / "tokenizer"))


@pytest.mark.parametrize(
    ("quantize", "told"),
    [
        ("{to: int8, group_size: 64}", "export.quantize: group_size belongs to int4"),
        ("{to: int4, group_size: 48}", "export.quantize: int4: groups of 48 do not divide the 32"),
        ("{to: int4}", "export.quantize: int4: groups of 128 or 32 do not divide"),
        ("{to: int8, method: rtn, calibration_tokens: 4}", "rtn looks at no rows"),
    ],
)
def test_check_tells_what_the_export_would_refuse(root, quantize, told):
    with pytest.raises(ConfigError, match=told):
        check(root, quantize)


def test_check_lets_pass_what_the_export_takes(root):
    for quantize in ("{to: int8}", "{to: int4, group_size: 16}", "{to: int8, method: rtn}"):
        check(root, quantize)


def test_options_of_rows_are_refused_for_rtn():
    for tokens in (5, 16384):
        with pytest.raises(UserError, match="rtn looks at no rows"):
            quantize_config("int8", None, method="rtn", calibration_tokens=tokens)


def documents(root, quantizer: Quantizer) -> list[list[int]]:
    config = Ernie4_5_MoeConfig.preset("tiny", vocab_size=384, num_hidden_layers=1)
    model = Ernie4_5_MoeForCausalLM(config, initialize=False)
    return quantizer._documents(model, load_tokenizer(root / "tokenizer"))


def test_calibration_reads_rows_as_the_stage_does(root):
    with (root / "bad.jsonl").open("w") as stream:
        stream.write((root / "test.jsonl").read_text() + "{broken\n" * 2)
    overrides = ["stages.sft.data=[{path: bad.jsonl}]"]
    config = QuantizeConfig(to="int8", calibration_tokens=50)
    for share, fails in ((0.01, True), (0.5, False)):
        given = [*overrides, f"stages.sft.max_bad_fraction={share}"]
        stages = load_recipe(root / "recipe.yaml", given).stages
        quantizer = Quantizer.on_rows_of(stages, config, root)
        if fails:
            with pytest.raises(DataError, match="max_bad_fraction"):
                documents(root, quantizer)
        else:
            assert sum(map(len, documents(root, quantizer))) == 50


def test_calibration_draws_by_the_weights_of_sources(root):
    for name, word in (("a", "alpha"), ("b", "beta")):
        texts = [{"text": f"{word} {i}"} for i in range(40)]
        write_rows(root / f"{name}.jsonl", texts)
    tokenizer = load_tokenizer(root / "tokenizer")
    sources = [DataSource(path="a.jsonl", weight=0.1), DataSource(path="b.jsonl")]
    config = QuantizeConfig(to="int8", calibration_tokens=100_000)
    drawn = [tokenizer.decode(ids) for ids in documents(root, Quantizer(config, sources, root))]
    assert [sum(word in text for text in drawn) for word in ("alpha", "beta")] == [4, 40]


def test_sources_of_no_weight_are_refused_not_rounded(root):
    write_rows(root / "a.jsonl", [{"text": "alpha"}] * 4)
    config = QuantizeConfig(to="int8")
    with pytest.raises(DataError, match="the weights are so small that an epoch holds none"):
        documents(root, Quantizer(config, [DataSource(path="a.jsonl", weight=0.1)], root))
