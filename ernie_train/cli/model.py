"""Open a trained model; the verbs export and import."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from rich.console import Console

from ernie_train.core import devices
from ernie_train.core.config import parse_config
from ernie_train.core.errors import UserError
from ernie_train.data import DataSource, Tokenizer, load_tokenizer
from ernie_train.generate.engines import Engine, ask_engine
from ernie_train.io.run_dir import RECEIPT, read_result
from ernie_train.model import Ernie4_5_MoeForCausalLM
from ernie_train.rl.reward import find_score
from ernie_train.run.export import (
    Extras,
    WeightFormat,
    export,
    export_adapter,
    require_change,
)
from ernie_train.run.finalize import EVALUATION
from ernie_train.run.import_model import RECEIPT as IMPORT_RECEIPT
from ernie_train.run.import_model import import_model
from ernie_train.run.quantize import QuantizeConfig, Quantizer
from ernie_train.run.recipe import recorded_recipe
from ernie_train.run.render import model_card, receipt_line
from ernie_train.weights.hf import check_dtype, load_pretrained
from ernie_train.weights.model_directory import find_model
from ernie_train.weights.upcycle import Upcycling


def open_model(
    path: Path, *, device: str = "auto", exact: bool = False
) -> tuple[Ernie4_5_MoeForCausalLM, Tokenizer]:
    """Load model and tokenizer of a Hugging Face directory, a checkpoint or a run directory.

    Weights are of the type that training has on the device: on a GPU bfloat16, for memory and fast
    kernels. With `exact` they are float32 there too, to be written again.
    """
    place = find_model(path)
    tokenizer = load_tokenizer(place.tokenizer)
    device = devices.select_device(device)
    dtype = "float32" if exact else devices.compute_dtype(device)
    return load_pretrained(place.weights, dtype, verified=True), tokenizer


def best_checkpoint(path: Path) -> Path:
    """Return the checkpoint of a run, or of a stage's directory, with the best `best_metric`."""
    return find_model(path, best=True).weights


@contextmanager
def engine_at(
    url: str | None,
    model: Ernie4_5_MoeForCausalLM,
    tokenizer: Tokenizer,
    stop_requested: Callable[[], bool],
) -> Iterator[Engine | None]:
    """Yield an engine that samples with the server at `url`; None without one.

    Raises `EngineError` unless the server has the weights of `model`.
    """
    if url is None:
        yield None
        return
    with closing(ask_engine(url, tokenizer, stop_requested)) as engine:
        engine.load_weights(model, 1)
        yield engine


def export_model(
    path: Path,
    out: Path,
    dtype: str,
    max_shard_size: str,
    referee: str | None,
    console: Console,
    *,
    quantize: QuantizeConfig | None = None,
    calibration: str | None = None,
) -> None:
    """Export the model at `path` to `out` and print the outcome of the comparison.

    With `quantize` its weights are quantized, by gptq on the rows of `calibration` or else on those
    of the run's last stage of pretrain or sft.
    """
    check_dtype(dtype)  # before a large model is loaded
    recipe = recorded_recipe(path)
    weights = find_model(path).weights
    require_change(weights, dtype)
    # In float32 a model of 21B does not fit a GPU; only GPTQ computes enough to need one.
    device = "auto" if quantize is not None else "cpu"
    model, tokenizer = open_model(path, device=device, exact=True)
    card = f"# {path.resolve().name}\n\nExported with ernie_train.\n"
    if recipe is not None:
        card = model_card(recipe, read_result(path / EVALUATION))
    quantizer = None
    if quantize is not None:
        if calibration is not None:
            quantizer = Quantizer(quantize, [DataSource(path=calibration)], Path.cwd())
        else:
            stages = recipe.stages if recipe is not None else []
            quantizer = Quantizer.on_rows_of(stages, quantize, Path.cwd())
    console.print(f"writing {out}, then reading it back and comparing logits", highlight=False)
    receipt = export(
        model,
        tokenizer,
        out,
        extras=Extras(card, find_score(weights)),
        weight_format=WeightFormat(dtype, max_shard_size, quantizer),
        referee=referee,
    )
    console.print(receipt_line(out, receipt, RECEIPT), highlight=False)


def quantize_config(
    to: str | None, calibration: str | None, **settings: str | int | None
) -> QuantizeConfig | None:
    """Return the settings that the options of `export` name; None without --quantize.

    Raises:
        UserError: options of quantization without --quantize, or those of rows for rtn.
        ConfigError: an impossible value.
    """
    given = {key: value for key, value in settings.items() if value is not None}
    if to is None:
        if given or calibration is not None:
            raise UserError(
                "--quantize-method, --group-size, --calibration and --calibration-tokens belong to "
                "--quantize int8 or int4"
            )
        return None
    found = parse_config(QuantizeConfig, {"to": to, **given}, "--quantize")
    if found.method == "rtn" and (calibration is not None or "calibration_tokens" in given):
        option = "--calibration-tokens" if calibration is None else "--calibration"
        raise UserError(f"{option}: rtn looks at no rows; leave it out, or take gptq")
    return found


def export_adapter_of(path: Path, out: Path, console: Console) -> None:
    """Write the adapter of the LoRA stage that made the model at `path`, and say how to load it."""
    settings = export_adapter(find_model(path).weights, out)
    console.print(
        f"{out}: an adapter of rank {settings['r']} for {settings['base_model_name_or_path']}; "
        f"PEFT loads it: PeftModel.from_pretrained(base, {str(out)!r})",
        highlight=False,
    )


def import_source(
    path: Path,
    out: Path,
    console: Console,
    *,
    upcycling: Upcycling | None,
    dtype: str | None,
    max_shard_size: str,
    referee: str | None,
) -> None:
    """Import the model at `path` to `out` and print the outcome of the comparison."""
    devices.select_device("auto")
    console.print(f"converting {path}, then comparing the logits of both", highlight=False)
    receipt = import_model(
        path, out, upcycling=upcycling, dtype=dtype, max_shard_size=max_shard_size, referee=referee
    )
    console.print(receipt_line(out, receipt, IMPORT_RECEIPT, "imported"), highlight=False)
