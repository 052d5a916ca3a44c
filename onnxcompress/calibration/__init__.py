"""Samples, and what a model's tensors look like over them.

:mod:`~onnxcompress.calibration.sources` opens data, :mod:`~onnxcompress.calibration.statistics`
says what can be measured, :func:`~onnxcompress.calibration.collector.collect` measures it.
"""
