"""The sparsity pass."""

from onnxcompress.passes.sparse.options import Importance, Scope, SparseOptions, Store
from onnxcompress.passes.sparse.sparse_pass import SparsePass

__all__ = ["Importance", "Scope", "SparseOptions", "SparsePass", "Store"]
