"""Weight sharing: equal weights stored once, and weights as indices into codebooks."""

from onnxcompress.passes.share.options import Assign, Codebook, Merge, Packing, ShareOptions
from onnxcompress.passes.share.share_pass import SharePass

__all__ = ["Assign", "Codebook", "Merge", "Packing", "ShareOptions", "SharePass"]
