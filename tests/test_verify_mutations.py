"""`helix.verify` finds what is wrong, and where it is; and what is right passes, whatever its shape."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutations import MUTATIONS
from ranks import on_ranks

import helix.certify.decoding  # noqa: F401  the ranks share the import
from helix import Grid
from helix.certify.cases import PRECISIONS, Case, Subject, subject_of
from helix.certify.run import Plan, certify, plan_of
from helix.comm.mesh import Mesh
from helix.partition.options import AttentionOptions
from helix.partition.schedules import legal_schedules
from helix.partition.shape import TransformerShape

SHAPE = TransformerShape(1, 24, heads=8, kv_heads=4, head_dim=8, mlp_hidden=24, vocab=50, qk_norm=True)
SUBJECT = subject_of(SHAPE, Grid(2, 2))


def _mutated() -> list[list[str]]:
    """With each mutation in turn, what the first failure of each of its cases says."""
    mesh, found = Mesh(SUBJECT.grid), []
    for mutation in MUTATIONS:
        with mutation.patch():
            certificate = certify(_plan(mutation.residual, mutation.cases), mesh)
        found.append([next(row.failures(), "") for row in certificate.rows])
    return found


def _plan(residual: str, cases: Iterable[Case]) -> Plan:
    return Plan(replace(SUBJECT, options=AttentionOptions(residual=residual)), tuple(cases), 0, ())


def _right() -> list[str]:
    """Without any, what fails of the same cases."""
    plans: dict[str, dict[Case, None]] = {}
    for mutation in MUTATIONS:
        plans.setdefault(mutation.residual, {}).update(dict.fromkeys(mutation.cases))
    mesh = Mesh(SUBJECT.grid)
    return [said for residual, cases in plans.items() for said in certify(_plan(residual, cases), mesh).failures]


def _both() -> tuple[list[list[str]], list[str]]:
    """The right ones come last: a patch that stayed would show."""
    return _mutated(), _right()


def test_every_mutation_is_found_and_named() -> None:
    mutated, right = on_ranks(4, _both, timeout_s=60)[0]
    missed = []
    for mutation, cases in zip(MUTATIONS, mutated, strict=True):
        for case, said in zip(mutation.cases, cases, strict=True):
            if not re.match(rf"rank {mutation.rank}, {re.escape(case.name)}: .*({mutation.said})", said):
                missed.append(f"{mutation.name}, {case.name}: {said or 'passed'}")
    assert not missed, "\n".join(missed)
    assert right == []


@st.composite
def plans(draw: st.DrawFn, grid: Grid) -> Plan:
    """Any attention that the grid divides, and one legal schedule of it in fp32 and in another precision."""
    rope, kv_heads = draw(st.booleans()), grid.n * draw(st.integers(1, 3))
    shape = TransformerShape(
        1,
        draw(st.sampled_from((24, 96))),
        kv_heads * draw(st.integers(1, 3)),
        kv_heads,
        grid.m * draw(st.sampled_from((1, 2, 8))) * (2 if rope else 1),
        24,
        vocab=50,
        rope=rope,
        qk_norm=draw(st.booleans()),
        causal=draw(st.booleans()),
    )
    options = AttentionOptions(residual=draw(st.sampled_from(("sharded", "replicated"))))
    subject = replace(
        subject_of(shape, grid, options, whole=draw(st.sampled_from((True, False, False)))),
        batch=draw(st.sampled_from((1, 2, grid.m + 1))),
        length=draw(st.sampled_from((1, 2, 5, 17))),
    )
    legal = legal_schedules(shape.layout, grid, subject.batch, subject.length)
    precisions = ("fp32", draw(st.sampled_from(("fp64", "bf16", "fp16"))))
    return plan_of(subject, draw(st.sampled_from(legal)), precisions, "fp32", draw(st.integers(0, 99)))


def _failures(drawn: Sequence[Plan]) -> list[str]:
    meshes = {plan.subject.grid: Mesh(plan.subject.grid) for plan in drawn}
    return [
        f"{said} in {plan.subject}" for plan in drawn for said in certify(plan, meshes[plan.subject.grid]).failures
    ]


@pytest.mark.parametrize(
    "grids", [(Grid(2, 2), Grid(4, 1), Grid(1, 4)), (Grid(3, 1), Grid(1, 3))], ids=("four ranks", "three ranks")
)
def test_what_is_right_passes_whatever_its_shape(grids: tuple[Grid, ...]) -> None:
    each = st.sampled_from(grids).flatmap(plans)

    @settings(max_examples=1, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)
    @given(st.lists(each, min_size=5, max_size=5))
    def passes(drawn: list[Plan]) -> None:
        for failures in on_ranks(grids[0].ranks, _failures, drawn, timeout_s=60):
            assert not failures, "\n".join(failures)

    passes()


def test_the_mutations_cover_every_schedule_precision_and_phase() -> None:
    cases: set[Case] = {case for mutation in MUTATIONS for case in mutation.cases}
    assert {case.schedule for case in cases} == {"batch", "heads", "rows", "gather", "score", "perslice"}
    assert {case.precision for case in cases} == set(PRECISIONS)
    assert {case.what for case in cases} == {"layer", "model", "decode"}
    assert {case.decode for case in cases} == {None, "batch", "heads", "kvseq"}
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS) >= 14


def test_a_subject_keeps_what_the_partition_is_about() -> None:
    papers = TransformerShape(16, 4096, 32, 32, 128, 16384)
    subject: Subject = subject_of(papers, Grid(4, 4))
    kept = subject.shape
    assert (kept.heads, kept.kv_heads, kept.head_dim) == (32, 32, 128)
    assert kept.parameters() <= 8_000_000
    assert "layers 16 -> 2" in subject.cut
    assert subject_of(SHAPE, Grid(2, 2)).cut == ()
