"""8-bit weights and activations for OpenVINO, by nncf (https://github.com/openvinotoolkit/nncf).

Ranges of activations are fixed ahead of time on calibration rows (static quantisation, Jacob et al., 2018,
https://arxiv.org/abs/1712.05877); a bias takes up what rounding shifts on average. In a transformer `smooth_quant`
first moves outliers of a layer's inputs into its weights (Xiao et al., 2023, https://arxiv.org/abs/2211.10438).

    stages:
      - export: openvino
      - quantize: int8
        smooth_quant: 0.5
        calibration: {num_samples: 128}
        max_drop: 0.005
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

from pydantic import Field

from optimize.artifact import Artifact
from optimize.calibration import Calibration, calibration_batches
from optimize.config import Block
from optimize.context import Context
from optimize.errors import StageError
from optimize.export import openvino_graph
from optimize.quantize import budget, openvino_fusion, openvino_graphs
from optimize.quiet import quiet
from optimize.runtimes import openvino as runtime
from optimize.tasks import Inputs

if TYPE_CHECKING:
    import numpy as np
    import openvino
    from numpy.typing import NDArray

    from optimize.runtimes import Runner

VERSION = 1

_MOVES = ("Reshape", "Transpose", "Squeeze", "Unsqueeze")
"""What passes rounded numbers on as they are."""
_RANGES = {"minmax": "MINMAX", "percentile": "MEAN_QUANTILE", "mse": "HISTOGRAM"}


class Config(Block):
    """`quantize: int8`."""

    mode: Literal["static"] = "static"
    """`static`: weights and the ranges of activations ahead of time."""
    calibration: Calibration = Calibration()
    """Rows that the ranges of activations are taken from."""
    calibrate: Literal["minmax", "percentile", "mse"] = "minmax"
    """A range from the rows' numbers: all of them, all but the outermost 0.01 % (the mean over batches), or the range
    that rounds them with the least squared error."""
    smooth_quant: float | None = Field(0.5, ge=0, le=1)
    """Of a transformer: how much of the outliers of a layer's inputs is moved into its weights; null: nothing. On
    MiniLM 0.5 stays nearer to float than 0.95, which is the default of nncf, and than null."""
    per_channel: bool = True
    """A scale for each output channel of a weight instead of one for all."""
    sym_activations: bool = False
    """Codes of activations lie evenly around 0, as those of weights always do; False uses the whole range, which
    costs no time and halves the error on MiniLM."""
    max_drop: float | None = Field(None, ge=0)
    """How much of the task's metric may be lost on the calibration rows, by keeping the most sensitive layers in float;
    null: no layer is kept."""
    ignore: tuple[str, ...] = ()
    """Globs of layer names that stay in float."""


def run(artifact: Artifact, config: Config, context: Context) -> Artifact:
    """Quantise. Raises `StageError` where an `ignore` glob matches nothing, nothing could be quantised, or `max_drop`
    can't be met.
    """
    model = openvino_graph.load(artifact.path)
    ignored = openvino_graphs.matching(openvino_graphs.layers(model), config.ignore)
    biases = _biases(model)
    with quiet():
        batches = calibration_batches(artifact, config.calibration, context)
    context.update(0, 1, "calibrating")
    model = _quantize(model, batches, ignored, config)
    done = [name for name, node in openvino_graphs.layers(model).items() if _is_rounded(node)]
    if not done:
        raise StageError("nothing was quantised", hint="look at `ignore`, and whether the model is quantised already")
    details: dict[str, Any] = {}
    if config.max_drop is not None:

        def quantized_without(kept: Collection[str]) -> Runner:
            return cast("Runner", runtime.serve(_packed(_without(model, kept, biases)), threads=1))

        spent = budget.spend(config.max_drop, done, quantized_without, artifact, context)
        model = _without(model, spent.kept, biases)
        ignored, done = sorted({*ignored, *spent.kept}), [name for name in done if name not in spent.kept]
        details["sensitivity"] = spent.details
    kinds = openvino_graphs.layers(model)
    details |= {
        "mode": config.mode,
        "quantized": dict(sorted(Counter(kinds[name].get_type_name() for name in done).items())),
        "ignored": ignored,
    }
    result = openvino_graphs.finished(_packed(model), artifact, context, details)
    openvino_fusion.advise(
        context.directory, context, [name for name in done if kinds[name].get_type_name() != "Gather"]
    )
    return result


def _quantize(model: openvino.Model, batches: Sequence[Inputs], ignored: list[str], config: Config) -> openvino.Model:
    """The model with `FakeQuantize` nodes and weights that are still in float."""
    takes = [port.get_any_name() for port in model.inputs]
    is_transformer = any(
        node.get_type_name() == "ScaledDotProductAttention"
        or (node.get_type_name() == "MatMul" and openvino_graphs.weight(node.input_value(1)) is None)
        for node in model.get_ops()
    )
    with openvino_graphs.library() as nncf:
        ranges = getattr(nncf.quantization.range_estimator.RangeEstimatorParametersSet, _RANGES[config.calibrate])
        advanced = nncf.AdvancedQuantizationParameters(
            activations_range_estimator_params=ranges,
            weights_quantization_params=nncf.quantization.advanced_parameters.QuantizationParameters(
                per_channel=config.per_channel
            ),
            smooth_quant_alphas=nncf.quantization.advanced_parameters.AdvancedSmoothQuantParameters(
                matmul=-1 if config.smooth_quant is None else config.smooth_quant
            ),
            backend_params={"compress_weights": False},
        )
        quantized: openvino.Model = nncf.quantize(
            model,
            nncf.Dataset([{name: batch[name] for name in takes} for batch in batches]),
            preset=nncf.QuantizationPreset.PERFORMANCE if config.sym_activations else nncf.QuantizationPreset.MIXED,
            subset_size=len(batches),
            model_type=nncf.ModelType.TRANSFORMER if is_transformer else None,
            ignored_scope=nncf.IgnoredScope(names=ignored),
            advanced_parameters=advanced,
        )
    return quantized


def _packed(model: openvino.Model) -> openvino.Model:
    """A copy whose rounded weights are stored as codes."""
    from openvino._offline_transformations import compress_quantize_weights_transformation

    packed: openvino.Model = model.clone()
    compress_quantize_weights_transformation(packed)
    return packed


def _is_rounded(layer: openvino.Node) -> bool:
    return any(_rounding(layer.input_value(port)) is not None for port in (0, 1))


def _rounding(value: openvino.Output) -> openvino.Node | None:
    """Where a value was rounded, perhaps before it was moved."""
    node = value.get_node()
    while node.get_type_name() in _MOVES:
        node = node.input_value(0).get_node()
    return node if node.get_type_name() == "FakeQuantize" else None


def _exact(value: openvino.Output) -> openvino.Output:
    """A value without its rounding."""
    from openvino.utils.node_factory import NodeFactory

    node = value.get_node()
    if node.get_type_name() == "FakeQuantize":
        return node.input_value(0)
    inputs = [_exact(node.input_value(0)), *(node.input_value(port) for port in range(1, node.get_input_size()))]
    moved: openvino.Node = NodeFactory().create(node.get_type_name(), inputs, node.get_attributes())
    return moved.output(0)


def _without(model: openvino.Model, kept: Collection[str], biases: Mapping[str, NDArray[np.float32]]) -> openvino.Model:
    """A copy in which those layers compute in float, with the biases that they had before quantisation."""
    from openvino.op import Constant

    copy: openvino.Model = model.clone()
    known = openvino_graphs.layers(copy)
    for name in kept:
        layer = known[name]
        for port in (0, 1):
            if _rounding(value := layer.input_value(port)) is not None:
                layer.input(port).replace_source_output(_exact(value))
        if name in biases and (bias := _bias(layer)):
            bias.replace_source_output(Constant(biases[name]).output(0))
    return copy


def _biases(model: openvino.Model) -> dict[str, NDArray[np.float32]]:
    """What layers add to their products, by the layers' names."""
    found = {name: _bias(node) for name, node in openvino_graphs.layers(model).items()}
    return {
        name: constant.data.copy()
        for name, bias in found.items()
        if bias and (constant := openvino_graphs.weight(bias.get_source_output()))
    }


def _bias(layer: openvino.Node) -> openvino.Input | None:
    """Where the constant comes in that is added to what a layer computes."""
    readers = list(layer.output(0).get_target_inputs())
    if len(readers) != 1 or (add := readers[0].get_node()).get_type_name() != "Add":
        return None
    other = add.input(1 - readers[0].get_index())
    return other if openvino_graphs.weight(other.get_source_output()) is not None else None
