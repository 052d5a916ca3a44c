"""What the clock decides of a static quantization: the placement, and that it is not slower."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import onnx_ir as ir

from onnxcompress.context import PassContext
from onnxcompress.passes.quant.budget import Budget
from onnxcompress.passes.quant.build import Builder
from onnxcompress.passes.quant.clock import run_times
from onnxcompress.passes.quant.cores import Arena, Verdict, thread_counts
from onnxcompress.passes.quant.judge import Judge
from onnxcompress.passes.quant.ledger import Ledger
from onnxcompress.passes.quant.memory import placement_key, recall, remember
from onnxcompress.passes.quant.mixed import Mixed, Mixer
from onnxcompress.passes.quant.options import Activations, Objective, QuantOptions
from onnxcompress.passes.quant.regions import repair
from onnxcompress.passes.quant.samples import samples_for
from onnxcompress.passes.quant.search import Candidate, chosen_by, default_candidate, search
from onnxcompress.passes.quant.static import NOT_FASTER
from onnxcompress.runtime import Array, SessionSettings, open_session
from onnxcompress.targets import detect_target

_LOSES = 0.98
"""Below this speed against float the integer model is not shipped (objective=latency)."""

_GAINS = 1.02
"""Below this speed against float the report says that integers bring no speed-up."""

_SURE = 1.2
"""Above this speed in one pair of sessions it takes no more of them to know: where their memory
lies changes the speed of each by up to a tenth."""

_REPAIRS = 3
"""How often parts of a result that is slower than float are put back to float."""

_PLACEMENT_SHARE = 0.6
"""Most of the time for searching that placements may take; the rest is for what comes after."""

_PLACEMENT_SAMPLES = 16
_PLACEMENT_MACS = 2e10
"""Samples on which the outputs of placements are compared with float, and the work that may be."""

_FINAL_SECONDS = 1.5
"""Time to compare the result with float."""


class ByClock:
    """Times versions of one model.

    Args:
        builder: Makes models.
        mixer: Calibrates them anew; None while placements are looked for.
        options: How to quantize.
        ctx: The job; times are taken on its samples as they are.
        statistics: The job with what statistics leave out cut off.
        base: The float model.
        budget: The time for searching.
        ledger: Takes what is to be reported.
    """

    def __init__(
        self,
        builder: Builder,
        mixer: Mixer,
        options: QuantOptions,
        ctx: PassContext,
        statistics: PassContext,
        base: ir.Model,
        budget: Budget,
        ledger: Ledger,
    ) -> None:
        self._builder = builder
        self._mixer = mixer
        self._options = options
        self._ctx = ctx
        self._statistics = statistics
        self._float = base
        self._budget = budget
        self._ledger = ledger
        self._said: list[str] = []

    def runs_here(self) -> bool:
        """Whether onnxruntime on this machine's CPU shows what the target would do."""
        return self._ctx.session.providers == ("CPUExecutionProvider",) and self._ctx.target.on_cpu

    def placed(self, allowed: frozenset[str]) -> frozenset[str]:
        """The fastest placement; all of ``allowed`` where the clock has no say."""
        wide = self._options.activations is Activations.INT16
        if self._options.objective is Objective.SIZE or wide:
            return chosen_by(self._builder.network, allowed, Candidate(pools=True))
        candidate = default_candidate(self._builder.network, allowed)
        same_machine = self._ctx.target == detect_target()
        if not (self.runs_here() and same_machine) or self._ctx.calibration is None:
            self._ledger.notes.append(
                f"The placement was not timed: the target {self._ctx.target.name} is not the "
                "CPU of this machine."
            )
        elif self._options.search_seconds > 0:
            candidate = self._fastest(allowed, self._ctx.calibration.first())
        chosen = chosen_by(self._builder.network, allowed, candidate)
        self._ledger.figures["placement"] = str(candidate)
        self._reject(allowed - chosen)
        return chosen

    def _fastest(self, allowed: frozenset[str], feeds: Mapping[str, Array]) -> Candidate:
        """The fastest placement, timed here or remembered from a search for the same model."""
        key = placement_key(self._builder.model, allowed, feeds, self._ctx.target, self._options)
        known = recall(key) if self._options.cache else None
        if known is not None:
            self._ledger.notes.append(
                f"The placement was found before, on this kind of machine: {known.timed} were "
                f"timed in {known.seconds:.1f} s then (quant.cache=false searches again)."
            )
            self._ledger.figures |= {"placements_timed": 0, "search_seconds": 0.0}
            return known.candidate
        assert self._statistics.calibration is not None  # noqa: S101 - there are feeds
        draft = self._builder.draft(allowed)
        count = samples_for(_PLACEMENT_SAMPLES, _PLACEMENT_MACS, self._builder.macs)
        judge = Judge(self._float, self._statistics.calibration, count=count)
        with self._budget.spend(_PLACEMENT_SHARE) as seconds:
            found = search(
                self._builder.network,
                allowed,
                lambda chosen: self._builder.part_of(draft, chosen),
                judge.rate,
                feeds,
                seconds=seconds,
                progress=self._ctx.progress,
            )
        if self._options.cache and not remember(key, found):
            self._ctx.progress.log("the placement found could not be cached")
        self._ledger.figures |= {
            "placements_timed": found.timed,
            "search_seconds": round(found.seconds, 1),
        }
        return found.candidate

    def _reject(self, names: frozenset[str]) -> None:
        """Say that nodes stay in float by what was timed."""
        network, why = self._builder.network, "in float the model does better by clock and accuracy"
        self._ledger.reject(network, names, why)

    def _timed(self) -> bool:
        """Whether a result that is slower than float is not wanted, and the clock can tell."""
        return (
            self._options.objective is Objective.LATENCY
            and self._options.activations is Activations.INT8
            and self.runs_here()
            and self._ctx.target == detect_target()
            and self._ctx.calibration is not None
        )

    def not_slower(self, mixed: Mixed) -> Mixed | None:
        """Time the result against float; parts that are slower go back to float."""
        if not self._timed():
            return mixed
        slow = self._slow(mixed)
        for _ in range(_REPAIRS):
            if slow is None:
                break
            fewer = self._without_slow_parts(mixed, slow)
            if fewer is None:
                break
            mixed, slow = fewer, self._slow(fewer)
        self._ledger.notes += self._said
        return mixed if slow is None else None

    def _slow(self, mixed: Mixed) -> int | None:
        """The number of threads with which the result is slower than float; None if with none."""
        counts = thread_counts(self._ctx.session.threads)
        if not self._options.search_seconds:
            counts = counts[:1]
        self._said.clear()
        for count in counts:
            if count == 1:
                ratio = self._speed_ratio(mixed)
                slower = ratio < _LOSES
            else:
                verdict = self._with_threads(mixed, count)
                ratio, slower = verdict.speed.ratio, verdict.slower
            if count == counts[0]:
                self._ledger.figures["speed_ratio"] = round(ratio, 3)
                if _LOSES <= ratio < _GAINS:
                    with_threads = "one thread" if count == 1 else f"{count} threads"
                    self._said.append(
                        f"{NOT_FASTER} ({ratio:.2f}x the speed of float with {with_threads})."
                    )
            if slower:
                return count
        return None

    def _with_threads(self, mixed: Mixed, threads: int) -> Verdict:
        """How fast the result is beside float on several threads."""
        verdict = self._heard(mixed, threads)
        self._ledger.figures |= verdict.figures
        self._said += verdict.notes
        return verdict

    def _speed_ratio(self, mixed: Mixed) -> float:
        """Time of float over time of the result, one thread, one sample."""
        assert self._ctx.calibration is not None  # noqa: S101 - _timed() looked
        settings = SessionSettings(threads=1)
        quantized = self._builder.model_of(mixed.built)
        sessions = [open_session(self._float, settings), open_session(quantized, settings)]
        feeds = self._ctx.calibration.first()
        times = run_times(sessions, feeds, seconds=_FINAL_SECONDS, clear=1.0)
        ratio = times[0] / times[1]
        return ratio if ratio > _SURE else self._heard(mixed, 1).speed.ratio

    def _heard(self, mixed: Mixed, threads: int) -> Verdict:
        """The verdict of many sessions."""
        assert self._ctx.calibration is not None  # noqa: S101 - _timed() looked
        result = self._builder.model_of(mixed.built)
        verdict = Arena(threads, _LOSES).hear(
            partial(open_session, self._float),
            partial(open_session, result),
            self._ctx.calibration.first(),
        )
        self._ctx.progress.log(str(verdict))
        return verdict

    def _without_slow_parts(self, mixed: Mixed, threads: int) -> Mixed | None:
        """The result with parts in float that are slow on so many threads; None if all are."""
        assert self._ctx.calibration is not None  # noqa: S101 - _timed() looked
        with self._budget.spend() as seconds:
            found = repair(
                self._builder.network,
                mixed.chosen,
                lambda chosen: self._builder.part_of(mixed.built, chosen),
                self._ctx.calibration.first(),
                seconds=seconds,
                progress=self._ctx.progress,
                threads=threads,
            )
        if "search_seconds" in self._ledger.figures:
            self._ledger.figures["search_seconds"] = round(self._budget.spent, 1)
        timed = int(self._ledger.figures.get("regions_timed", 0))
        self._ledger.figures["regions_timed"] = timed + found.timed
        fewer = self._mixer.rebuilt(mixed, found.chosen)
        if fewer is None:
            return None
        self._reject(mixed.chosen - found.chosen)
        return fewer
