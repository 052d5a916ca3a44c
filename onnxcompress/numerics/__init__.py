"""Pure numpy: quantization, rounding, least squares and importance. Nothing here knows ONNX."""
