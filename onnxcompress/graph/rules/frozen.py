"""Operators whose channels are left alone on purpose, with the reason."""

from __future__ import annotations

from collections.abc import Mapping

_QUANTIZED = "computes in integers: prune before quantizing"
_SEQUENCE = "works on sequences, whose tensors are not followed"
_DATA_SIZED = "has a result whose shape depends on the data"
_GENERATED = "makes new values that carry no channels of a weight"
_TEXT = "works on text"
_WINDOW = "transforms a signal, in which every sample counts"
_PLACED = "reads or writes at computed places"
_LOOP = "runs a body whose tensors keep their shapes from step to step"
_FUSED = "fuses several axes in one operator that has no rule yet"
_LOSS = "is a training loss over all classes"

FROZEN: Mapping[str, str] = {
    "AffineGrid": _GENERATED,
    "Attention": _FUSED,
    "Bernoulli": "draws random numbers, whose sequence depends on the shape",
    "BitCast": "may change the number of elements of the last axis",
    "BlackmanWindow": _GENERATED,
    "CausalConvWithState": _FUSED,
    "CenterCropPad": _PLACED,
    "Col2Im": "merges channels with kernel positions",
    "Compress": _DATA_SIZED,
    "ConcatFromSequence": _SEQUENCE,
    "Constant": _GENERATED,
    "ConvInteger": _QUANTIZED,
    "DFT": _WINDOW,
    "DeformConv": _FUSED,
    "Det": "is a determinant, which every entry of the matrix changes",
    "DynamicQuantizeLinear": "takes its scale from the largest value of all channels",
    "EyeLike": _GENERATED,
    "GatherElements": _PLACED,
    "GatherND": _PLACED,
    "HammingWindow": _GENERATED,
    "HannWindow": _GENERATED,
    "ImageDecoder": _GENERATED,
    "LinearAttention": _FUSED,
    "Loop": _LOOP,
    "MatMulInteger": _QUANTIZED,
    "MaxUnpool": "writes at numbered places that count all channels",
    "MelWeightMatrix": _GENERATED,
    "Multinomial": "draws from a distribution over all classes",
    "NegativeLogLikelihoodLoss": _LOSS,
    "NonMaxSuppression": _DATA_SIZED,
    "NonZero": _DATA_SIZED,
    "OneHot": "makes classes of numbers: positions are data",
    "Optional": _SEQUENCE,
    "OptionalGetElement": _SEQUENCE,
    "OptionalHasElement": _SEQUENCE,
    "QLinearConv": _QUANTIZED,
    "QLinearMatMul": _QUANTIZED,
    "RandomNormal": _GENERATED,
    "RandomNormalLike": "draws random numbers, whose sequence depends on the shape",
    "RandomUniform": _GENERATED,
    "RandomUniformLike": "draws random numbers, whose sequence depends on the shape",
    "Range": _GENERATED,
    "RegexFullMatch": _TEXT,
    "RotaryEmbedding": _FUSED,
    "STFT": _WINDOW,
    "Scan": _LOOP,
    "Scatter": _PLACED,
    "ScatterElements": _PLACED,
    "ScatterND": _PLACED,
    "SequenceAt": _SEQUENCE,
    "SequenceConstruct": _SEQUENCE,
    "SequenceEmpty": _SEQUENCE,
    "SequenceErase": _SEQUENCE,
    "SequenceInsert": _SEQUENCE,
    "SequenceLength": _SEQUENCE,
    "SequenceMap": _SEQUENCE,
    "Size": "counts all elements",
    "SoftmaxCrossEntropyLoss": _LOSS,
    "SplitToSequence": _SEQUENCE,
    "StringConcat": _TEXT,
    "StringNormalizer": _TEXT,
    "StringSplit": _TEXT,
    "SwiGLU": _FUSED,
    "TensorScatter": _PLACED,
    "TfIdfVectorizer": _TEXT,
    "Unique": _DATA_SIZED,
}
