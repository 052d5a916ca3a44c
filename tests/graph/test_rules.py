"""Every operator is decided on, and ONNX's own operator tests keep the law."""

from __future__ import annotations

from collections import defaultdict
from functools import cache

import numpy as np
import onnx
import pytest
from onnx.backend.test.case.test_case import TestCase

from onnxcompress.errors import ModelError
from onnxcompress.graph import labels
from onnxcompress.graph.rules import ADDED, CONTRIB, FROZEN, FROZEN_ELSEWHERE, RULES
from tests.graph import law
from tests.graph.operators import as_network, operator_cases

WALKED = {"If"}
FEEDS = {"zero": np.array(0.25, np.float32)}


_SCHEMAS = onnx.defs.get_all_schemas_with_history()


def default_operators() -> set[str]:
    return {s.name for s in _SCHEMAS if s.domain == ""}


def test_every_operator_of_the_default_domain_is_decided_on() -> None:
    undecided = default_operators() - RULES.keys() - FROZEN.keys() - WALKED
    assert not undecided


@pytest.mark.parametrize("domain", sorted({s.domain for s in _SCHEMAS} - {""}))
def test_every_operator_of_other_domains_of_onnx_is_decided_on(domain: str) -> None:
    operators = {s.name for s in _SCHEMAS if s.domain == domain}
    assert operators == FROZEN_ELSEWHERE[domain].keys()


def test_operators_of_onnxruntime_exist_and_are_decided_on_once() -> None:
    """Nobody lists all of its operators, but a wrong name would be a rule that is never met."""
    get = pytest.importorskip("onnxruntime.capi.onnxruntime_pybind11_state")
    schemas = get.get_all_operator_schema()
    own = {s.name for s in schemas if s.domain == "com.microsoft"}
    assert not (CONTRIB.keys() | FROZEN_ELSEWHERE["com.microsoft"].keys()) - own
    assert not CONTRIB.keys() & FROZEN_ELSEWHERE["com.microsoft"].keys()
    assert not ADDED.keys() & default_operators()
    assert not ADDED.keys() - {s.name for s in schemas if s.domain == ""}


def test_no_operator_is_decided_on_twice() -> None:
    assert not RULES.keys() & FROZEN.keys()
    assert not WALKED & (RULES.keys() | FROZEN.keys())


def test_no_rule_is_for_an_operator_that_does_not_exist() -> None:
    assert not (RULES.keys() | FROZEN.keys()) - default_operators()


@pytest.mark.parametrize(
    "reason",
    sorted({r for table in (FROZEN, *FROZEN_ELSEWHERE.values()) for r in table.values()}),
)
def test_reasons_read_as_clauses(reason: str) -> None:
    """They follow "meets X, which"."""
    assert reason[0].islower()
    assert not reason.endswith(".")


@cache
def cases() -> dict[str, list[TestCase]]:
    """At most three cases of every operator with a rule: the most elaborate ones."""
    found: defaultdict[str, list[TestCase]] = defaultdict(list)
    for case in operator_cases():
        assert case.model is not None
        found[case.model.graph.node[0].op_type].append(case)
    for group in found.values():
        group.sort(key=lambda c: c.model.graph.ByteSize() if c.model else 0)
    return {op: group[-3:] for op, group in found.items()}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("op", sorted(RULES))
def test_operators_keep_the_law_on_every_axis(op: str) -> None:
    ran = 0
    for case in cases().get(op, ()):
        model = as_network(case)
        if model is None or _elements(case) > 5000:
            continue
        try:
            before = law.outputs(model, FEEDS)
        except ModelError:
            continue  # a form of the operator that onnxruntime does not have
        law.prepared(model)
        assert law.error(before, law.outputs(model, FEEDS)) < 1e-6, case.name
        coupling = labels.analyse(model)
        removed = law.removal(coupling, 0.5, seed=ran)
        assert law.law_error(model, coupling, removed, FEEDS) < 1e-5, case.name
        ran += 1
    if not ran:
        pytest.skip("ONNX has no case of it that onnxruntime runs on numpy's types")


def _elements(case: TestCase) -> int:
    assert case.data_sets is not None
    return max((np.asarray(a).size for a in case.data_sets[0][0]), default=0)
