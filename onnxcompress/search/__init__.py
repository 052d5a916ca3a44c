"""Search over versions of one model: what each is worth, and the cheapest that is good enough.

:mod:`.reference` holds what the original makes of some samples, :mod:`.goals` what a version must
keep of it, :mod:`.parallel` measures versions in several processes, :mod:`.sensitivity` is the
table of what each node costs, and :mod:`.greedy` finds the cheapest choice that keeps the goals.
Nothing here knows how a version is made.
"""
