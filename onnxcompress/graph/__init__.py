"""The graph of a model: constants, names, costs, and which channels can be removed together.

The way to structured pruning is ``canonical.canonicalize`` -> ``labels.analyse`` ->
``surgery.remove``; ``surgery.mask`` is what removing means, ``macs.MacsModel`` what it saves.
Nothing here knows passes, files or reports.
"""
