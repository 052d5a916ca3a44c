"""Placement found by measuring: which nodes to leave in float so that speed and accuracy are best.

An integer kernel is not always the faster one: image stems, narrow depthwise convolutions and the
last layers often are quicker in float, and each change between the two costs a pass over a tensor.
Which is which depends on shapes, kernels and machine, so a few placements are cut out of one
quantized model and timed against the best one so far, interleaved, with one thread.

The clock alone would decide ties by chance, between models that differ by some decibels: what
decides is the score of :mod:`onnxcompress.passes.quant.judge`, in which a decibel is worth a
percent of time. The first layers and the last, which matter most for accuracy, so stay in float
unless integers are clearly faster there. Only what is nearly as fast as the fastest is looked at,
and what is there already stays unless another placement is better beyond the noise of the clock
(:mod:`onnxcompress.passes.quant.race`).

The search goes through one property after another, measures all its alternatives in turns and keeps
the best, so its cost is the number of alternatives, not of combinations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

from onnxcompress.graph.constants import constant_of
from onnxcompress.passes.quant.clock import fine_clock
from onnxcompress.passes.quant.judge import Rated
from onnxcompress.passes.quant.operators import WEIGHT, Kind, attribute
from onnxcompress.passes.quant.placement import Network, make_plan
from onnxcompress.passes.quant.race import Merit, contest
from onnxcompress.progress import Progress
from onnxcompress.runtime import Array, Session, SessionSettings, open_session

_MARGIN = 0.02
"""A change must raise the score by this much: less is not worth a change."""

_CLEAR = 1.1
"""Slower than the fastest by this factor, an alternative needs no look at its outputs: it would
have to be 10 dB nearer to float."""

_SECONDS_EACH = 0.3
"""Most processor time to measure for each alternative."""

_WIDE = 1 << 30


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to choose the nodes that run on integers.

    Attributes:
        prefix: Weighted nodes at the beginning that stay float.
        suffix: Weighted nodes at the end that stay float.
        depthwise: Depthwise convolutions of fewer channels stay float.
        channels: Weighted nodes with fewer inputs or outputs than this stay float.
        joins: Whether Add and Mul run on integers.
        pools: Whether average pools and LeakyRelu run on integers.
    """

    prefix: int = 0
    suffix: int = 0
    depthwise: int = 0
    channels: int = 0
    joins: bool = True
    pools: bool = False

    def __str__(self) -> str:
        words = []
        if self.prefix:
            words.append(f"the first {self.prefix} weighted nodes")
        if self.suffix:
            words.append(f"the last {self.suffix}")
        if self.depthwise >= _WIDE:
            words.append("depthwise convolutions")
        elif self.depthwise:
            words.append(f"depthwise convolutions of fewer than {self.depthwise} channels")
        if self.channels:
            words.append(f"nodes of fewer than {self.channels} channels")
        if not self.joins:
            words.append("Add and Mul")
        if not self.pools:
            words.append("average pools")
        return f"in float: {', '.join(words)}" if words else "all on integers"


@dataclass(frozen=True, slots=True)
class Found:
    """What the search ended with.

    Attributes:
        candidate: The best placement.
        timed: Placements timed.
        seconds: Processor time spent.
    """

    candidate: Candidate
    timed: int
    seconds: float


def default_candidate(network: Network, allowed: frozenset[str]) -> Candidate:
    """What is taken where nothing is timed: all on integers, average pools in float."""
    pools = any(
        n.name in allowed and n.op_type not in {"Add", "Mul", "Concat"}
        for n in network.of_kind(Kind.JOINING)
    )
    return Candidate(pools=not pools)


def first_candidate(network: Network, allowed: frozenset[str]) -> Candidate:
    """What the search starts from: the default, with the first weighted node in float.

    The input's channels have no layer before them to share a range by, and everything behind sees
    their rounding. So integers there must gain more speed than an equally good placement would.
    """
    several = sum(n.name in allowed for n in network.of_kind(Kind.WEIGHTED)) > 1
    return replace(default_candidate(network, allowed), prefix=int(several))


def chosen_by(network: Network, allowed: frozenset[str], candidate: Candidate) -> frozenset[str]:
    """Names of the nodes of ``allowed`` that ``candidate`` puts on integers."""
    weighted = [n for n in network.of_kind(Kind.WEIGHTED) if n.name in allowed]
    stop = len(weighted) - candidate.suffix
    kept = {n.name or "" for n in weighted[candidate.prefix : max(stop, 0)] if _wide(n, candidate)}
    for node in network.of_kind(Kind.JOINING):
        if node.name not in allowed:
            continue
        if node.op_type in {"Add", "Mul"}:
            wanted = candidate.joins
        else:
            wanted = node.op_type == "Concat" or candidate.pools
        if wanted:
            kept.add(node.name or "")
    return frozenset(kept)


def _wide(node: ir.Node, candidate: Candidate) -> bool:
    inputs, outputs, depthwise = _width(node)
    if depthwise:
        return outputs >= candidate.depthwise
    return min(inputs, outputs) >= candidate.channels


def _width(node: ir.Node) -> tuple[int, int, bool]:
    """Input and output channels of a weighted node, and whether it is a depthwise convolution."""
    weight = constant_of(node.inputs[WEIGHT])
    shape = (0, 0) if weight is None else weight.shape
    groups = int(attribute(node, "group", 1)) if node.op_type.startswith("Conv") else 1
    if node.op_type == "Conv":
        return shape[1] * groups, shape[0], groups > 1 and shape[1] == 1
    return shape[0], shape[1] * groups, False


Variants = list[Candidate]
"""Alternatives to the best candidate."""

Rate = Callable[[ir.Model, Session], Rated]
"""Measures the outputs of a model, opened already, beside those of float."""


def alternatives(
    network: Network, allowed: frozenset[str]
) -> Iterator[Callable[[Candidate], Variants]]:
    """The properties to search, each as a function from the best candidate to its alternatives."""
    weighted = [n for n in network.of_kind(Kind.WEIGHTED) if n.name in allowed]
    widths = [_width(n) for n in weighted]
    depthwise = [outputs for _, outputs, is_depthwise in widths if is_depthwise]
    ordinary = [min(i, o) for i, o, is_depthwise in widths if not is_depthwise]
    joining = {n.op_type for n in network.of_kind(Kind.JOINING) if n.name in allowed}

    def stems(best: Candidate) -> Variants:
        longest = min(2, len(weighted) - 1)
        return [replace(best, prefix=k) for k in range(longest + 1) if k != best.prefix]

    def longer_stems(best: Candidate) -> Variants:
        if best.prefix < 2:
            return []
        longest = min(4, len(weighted) - 1)
        return [replace(best, prefix=k) for k in range(3, longest + 1)]

    def depths(best: Candidate) -> Variants:
        steps = [s for s in (64, 128, 256) if min(depthwise) < s <= max(depthwise)]
        return [replace(best, depthwise=s) for s in (*steps, _WIDE)]

    def channels(best: Candidate) -> Variants:
        steps = [s for s in (16, 32, 64) if min(ordinary) < s <= max(ordinary)]
        return [replace(best, channels=s) for s in steps]

    def tails(best: Candidate) -> Variants:
        longest = min(2, len(weighted) - 1 - best.prefix)
        return [replace(best, suffix=k) for k in range(1, longest + 1)]

    if depthwise:
        yield depths
    if len(weighted) > 1:
        yield stems
        yield longer_stems
    if {"Add", "Mul"} & joining:
        yield lambda best: [replace(best, joins=False)]
    if joining - {"Add", "Mul", "Concat"}:
        yield lambda best: [replace(best, pools=True)]
    if ordinary:
        yield channels
    if len(weighted) > 1:
        yield tails


def search(
    network: Network,
    allowed: frozenset[str],
    build: Callable[[frozenset[str]], ir.Model],
    rate: Rate,
    feeds: Mapping[str, Array],
    *,
    seconds: float,
    progress: Progress,
) -> Found:
    """Find the candidate with the best score.

    Args:
        network: The float model.
        allowed: Nodes that may run on integers.
        build: Makes the model that runs the given nodes on integers.
        rate: Measures its fidelity and size.
        feeds: One sample.
        seconds: No further placement is built or timed after this processor time.
        progress: Where to report progress.
    """
    clock = fine_clock()  # on a busy machine the search must not end sooner
    started = clock()
    settings = SessionSettings(threads=1)
    best = first_candidate(network, allowed)
    choice = chosen_by(network, allowed, best)
    leader = _Rival(best, build(choice), settings)
    seen = {make_plan(network, choice).nodes}
    timed = 0
    properties = list(alternatives(network, allowed))
    with progress.task("timing placements", total=len(properties)) as task:
        for variants in properties:
            rivals = [leader]
            for candidate in variants(leader.candidate):
                choice = chosen_by(network, allowed, candidate)
                nodes = make_plan(network, choice).nodes
                if nodes in seen or not nodes or clock() - started > seconds:
                    continue
                seen.add(nodes)
                rivals.append(_Rival(candidate, build(choice), settings))
            if len(rivals) > 1:
                timed += len(rivals) - 1
                left = max(seconds - (clock() - started), 0.0)
                leader = _best(rivals, rate, feeds, left, progress)
            task.advance()
    return Found(leader.candidate, timed, clock() - started)


def _best(
    rivals: Sequence[_Rival],
    rate: Rate,
    feeds: Mapping[str, Array],
    seconds: float,
    progress: Progress,
) -> _Rival:
    """The rival with the best score; the first one unless another clearly gains."""
    found = contest(
        lambda place: rivals[place].open(),
        len(rivals),
        feeds,
        lambda place, session: rivals[place].merit(rate, session),
        clear=_CLEAR,
        margin=_MARGIN,
        seconds=min(_SECONDS_EACH * len(rivals), seconds),
    )
    for place, (rival, run_time) in enumerate(zip(rivals, found.seconds, strict=True)):
        score = found.scores.get(place)
        gain = "" if score is None else f", gains {score.value:+.3f} ± {score.error:.3f}"
        progress.log(
            f"{run_time * 1e3:.3f} ms{rival.fidelity}{gain} {rival.candidate}"
            f"{', taken' if place == found.winner else ''}"
        )
    return rivals[found.winner]


class _Rival:
    """A candidate, ready to be timed."""

    def __init__(self, candidate: Candidate, model: ir.Model, settings: SessionSettings) -> None:
        self.candidate = candidate
        self._model = model
        self._settings = settings
        self._rated: Rated | None = None

    @property
    def fidelity(self) -> str:
        """What is known of its outputs, for the log."""
        return "" if self._rated is None else f", {self._rated.sqnr_db:.1f} dB"

    def open(self) -> Session:
        """A new session of it."""
        return open_session(self._model, self._settings)

    def merit(self, rate: Rate, session: Session) -> Merit:
        """What counts besides its speed; its outputs are looked at once."""
        if self._rated is None:
            self._rated = rate(self._model, session)
        return Merit(self._rated.merit, self._rated.sqnr_db)
