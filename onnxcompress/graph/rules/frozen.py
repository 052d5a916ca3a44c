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
_EMBEDDED = "adds embeddings and normalizes over them"
_PACKED = "holds its weight in a packed form: prune before quantizing"
_LAYOUT = "was written by an optimizer for one machine: prune the model it was made from"
_SEARCH = "runs a whole search for words"
_ML = "belongs to classical machine learning, whose parameters are no channels"
_TRAINING = "belongs to training"
_LOSS = "is a training loss over all classes"

FROZEN: Mapping[str, str] = {
    "AffineGrid": _GENERATED,
    "Bernoulli": "draws random numbers, whose sequence depends on the shape",
    "BitCast": "may change the number of elements of the last axis",
    "BlackmanWindow": _GENERATED,
    "CenterCropPad": _PLACED,
    "Col2Im": "merges channels with kernel positions",
    "Compress": _DATA_SIZED,
    "ConcatFromSequence": _SEQUENCE,
    "Constant": _GENERATED,
    "ConvInteger": _QUANTIZED,
    "DFT": _WINDOW,
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
    "TfIdfVectorizer": _TEXT,
    "Unique": _DATA_SIZED,
}

# Domain to operator to reason.
FROZEN_ELSEWHERE: Mapping[str, Mapping[str, str]] = {
    "ai.onnx.ml": dict.fromkeys(
        (
            "ArrayFeatureExtractor",
            "Binarizer",
            "CastMap",
            "CategoryMapper",
            "DictVectorizer",
            "FeatureVectorizer",
            "Imputer",
            "LabelEncoder",
            "LinearClassifier",
            "LinearRegressor",
            "Normalizer",
            "OneHotEncoder",
            "SVMClassifier",
            "SVMRegressor",
            "Scaler",
            "TreeEnsemble",
            "TreeEnsembleClassifier",
            "TreeEnsembleRegressor",
            "ZipMap",
        ),
        _ML,
    ),
    "ai.onnx.preview": {"FlexAttention": _FUSED},
    "ai.onnx.preview.training": dict.fromkeys(
        ("Adagrad", "Adam", "Gradient", "Momentum"), _TRAINING
    ),
    "com.microsoft": {
        **dict.fromkeys(
            (
                "ConvTransposeWithDynamicPads",
                "DynamicQuantizeLSTM",
                "DynamicQuantizeMatMul",
                "MatMulInteger16",
                "MatMulIntegerToFloat",
                "MulInteger",
                "QAttention",
                "QEmbedLayerNormalization",
                "QGemm",
                "QLinearAdd",
                "QLinearAveragePool",
                "QLinearConcat",
                "QLinearConv",
                "QLinearGlobalAveragePool",
                "QLinearLeakyRelu",
                "QLinearMul",
                "QLinearReduceMean",
                "QLinearSigmoid",
                "QLinearSoftmax",
                "QLinearWhere",
                "ReduceSumInteger",
            ),
            _QUANTIZED,
        ),
        **dict.fromkeys(
            ("GatherBlockQuantized", "MatMulBnb4", "MatMulFpQ4", "MatMulNBits", "QMoE"), _PACKED
        ),
        **dict.fromkeys(
            (
                "DecoderAttention",
                "DecoderMaskedMultiHeadAttention",
                "DecoderMaskedSelfAttention",
                "GatedRelativePositionBias",
                "LinearAttention",
                "LongformerAttention",
                "MoE",
                "PackedAttention",
                "PackedMultiHeadAttention",
                "PagedAttention",
                "RelativePositionBias",
                "SparseAttention",
            ),
            _FUSED,
        ),
        **dict.fromkeys(("NhwcConv", "NhwcFusedConv", "NhwcMaxPool"), _LAYOUT),
        **dict.fromkeys(("BeamSearch", "GreedySearch", "Sampling", "WhisperBeamSearch"), _SEARCH),
        "BiasSoftmax": "mixes all channels of its axis",
        "BiasSplitGelu": "reads two halves of one axis",
        "EmbedLayerNormalization": _EMBEDDED,
        "SkipGroupNorm": _FUSED,
    },
}
