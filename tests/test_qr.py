"""The triangular factor after updates against dense algebra: RᵀR = I + AᵀA, Rᵀc = Aᵀy, and the Cholesky factors of K_uu."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gpmlp.gp import qr
from gpmlp.gp.inducing import extend_cholesky, restrict_cholesky
from gpmlp.gp.qr import DowndateError, PosteriorFactor, RowFactor

EXACT = 1e-12  # relative: some hundred operations of the size of the condition (below 100) times 1e-16


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense(rows: Tensor) -> tuple[Tensor, Tensor]:
    """I + AᵀA and Aᵀy."""
    a, y = rows[:, :-1], rows[:, -1]
    return torch.eye(a.shape[1], dtype=a.dtype) + a.T @ a, a.T @ y


def check(factor: PosteriorFactor, rows: Tensor, tolerance: float = EXACT) -> None:
    """That the factor is upper triangular and stands for these rows."""
    r, c = factor.upper[:, :-1], factor.upper[:, -1]
    precision, right = dense(rows)
    assert torch.equal(r, r.triu())
    assert (r.T @ r - precision).abs().max() <= tolerance * precision.abs().max()
    assert (r.T @ c - right).abs().max() <= tolerance * max(1.0, float(right.abs().max()))
    solved = torch.linalg.solve(precision, right)
    torch.testing.assert_close(factor.mean, solved, rtol=0, atol=10 * tolerance * max(1.0, float(solved.abs().max())))


def hard_rows(n: int, columns: int, condition: float, seed: int = 0) -> Tensor:
    """Rows [A | y] whose A has singular values from `condition` down to 1e-2, of like directions, and y = A x + noise of unit size."""
    u = torch.linalg.qr(random(n, columns, seed=seed)).Q
    v = torch.linalg.qr(random(columns, columns, seed=999)).Q
    values = (
        torch.logspace(0, -2 - torch.log10(torch.tensor(condition)).item(), columns, dtype=torch.float64) * condition
    )
    a = (u * values) @ v.T
    return torch.cat([a, a @ random(columns, 1, seed=998) + random(n, 1, seed=seed + 3)], dim=1)


def same_predictions(factor: PosteriorFactor, rows: Tensor, probe: Tensor, tolerance: float = 1e-8) -> None:
    """That means and variances of the rows of `probe` are those of a QR of all rows from scratch."""
    size = rows.shape[1] - 1
    stacked = torch.cat([torch.eye(size, size + 1, dtype=rows.dtype), rows])
    fresh = torch.linalg.qr(stacked, mode="r").R[:size]
    found = []
    for upper in (factor.upper, fresh):
        half = torch.linalg.solve_triangular(upper[:, :-1].T, probe.T, upper=False)
        found.append((half.T @ upper[:, -1], half.square().sum(0)))
    for a, b in zip(*found, strict=True):
        assert (a - b).abs().max() <= tolerance * b.abs().max()


# rows ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n, columns", [(0, 5), (1, 5), (5, 5), (6, 5), (40, 5), (3, 0), (0, 0)])
def test_from_all_rows(n, columns):
    rows = random(n, columns + 1)
    factor = PosteriorFactor.from_rows(rows.split(7) if n else [], columns)
    assert factor.columns == columns and factor.changes == 0 and factor.condition >= 1
    check(factor, rows) if columns else None
    assert factor.upper.shape == (columns, columns + 1)


@pytest.mark.parametrize("k", [1, 2, 31, 200])
@pytest.mark.parametrize("columns", [1, 40, 150])
def test_appended_and_removed(k, columns):
    """More rows and columns than one panel and one slice."""
    rows = random(200 + k, columns + 1, seed=k)
    start = PosteriorFactor.from_rows([rows[:200]], columns)
    more = start.append_rows(rows[200:])
    check(more, rows)
    less = more.remove_rows(rows[200:])
    check(less, rows[:200], 1e-11)
    check(more.remove_rows(rows[:200]), rows[200:], 1e-10)
    assert (more.changes, less.changes) == (1, 2)


def test_nothing_appended_or_removed():
    factor = PosteriorFactor.from_rows([random(9, 5)], 4)
    assert factor.append_rows(random(0, 5)) is factor and factor.remove_rows(random(0, 5)) is factor
    nothing = PosteriorFactor.from_rows([], 0)
    rows = random(3, 1)
    assert nothing.append_rows(rows).upper.shape == nothing.remove_rows(rows).upper.shape == (0, 1)
    assert nothing.measure_drift([rows]).drift == 0 and nothing.mean.shape == (0,)


def test_removing_more_than_there_was():
    factor = PosteriorFactor.from_rows([random(20, 5)], 4)
    with pytest.raises(DowndateError, match="would"):
        factor.remove_rows(10 * random(3, 5, seed=1))


def test_removing_nearly_all_that_was_told():
    """Ten digits of a column's precision came with these rows: what a downdate leaves of it has lost them."""
    rows = random(20, 5)
    sure = 1e5 * random(8, 5, seed=1)
    factor = PosteriorFactor.from_rows([rows], 4).append_rows(sure)
    with pytest.raises(DowndateError, match="of column . of 4 .* would be left"):
        factor.remove_rows(sure)
    check(PosteriorFactor.from_rows([rows], 4), rows)
    less_sure = 1e2 * random(8, 5, seed=1)
    check(
        PosteriorFactor.from_rows([rows], 4).append_rows(less_sure).remove_rows(less_sure), rows, 1e-9
    )  # 1e-16 x (1e2)²


# columns -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("m", [1, 7, 90])
def test_extended(m):
    rows = random(120, 41 + m)
    old, new, y = rows[:, :40], rows[:, 40:-1], rows[:, -1:]
    before = torch.cat([old, y], dim=1)

    def passes():
        return zip(before.split(50), new.split(50), strict=True)

    check(PosteriorFactor.from_rows([before], 40).append_columns(passes), rows)


def test_extended_from_nothing_and_without_rows():
    rows = random(30, 6)
    check(PosteriorFactor.from_rows([rows[:, -1:]], 0).append_columns(lambda: [(rows[:, -1:], rows[:, :-1])]), rows)
    with pytest.raises(ValueError, match="with rows"):
        PosteriorFactor.from_rows([], 3).append_columns(list)


def test_extended_by_columns_that_others_nearly_give():
    """A new column B x + 1e-7 e: its own part is below the prior's 1, and the border is right all the same."""
    rows = random(300, 31)
    twin = rows[:, :4] @ random(4, 3, seed=2) + 1e-7 * random(300, 3, seed=3)
    factor = PosteriorFactor.from_rows([rows], 30).append_columns(lambda: [(rows, twin)])
    check(factor, torch.cat([rows[:, :-1], twin, rows[:, -1:]], dim=1))


def test_turned():
    rows = random(60, 21)
    factor = PosteriorFactor.from_rows([rows], 20)
    order = torch.tensor([0, 1, 2, 9, *range(3, 9), *range(10, 20)])

    def moved(some: Tensor) -> Tensor:
        return torch.cat([some[:, order], some[:, -1:]], dim=1)

    check(factor.rotate_columns(moved, 3), moved(rows))
    check(factor.rotate_columns(moved), moved(rows))
    q = torch.linalg.qr(random(9, 6, seed=4)).Q

    def fewer(some: Tensor) -> Tensor:
        return torch.cat([some[:, :5], some[:, 5:14] @ q, some[:, 14:]], dim=1)

    check(factor.rotate_columns(fewer, 5), fewer(rows))
    check(factor.rotate_columns(lambda some: torch.cat([some[:, 4:5], some[:, -1:]], dim=1)), rows[:, [4, 20]])


# error ---------------------------------------------------------------------------------------------------------------------


def test_the_error_that_is_there_is_measured():
    rows = random(80, 31)
    factor = PosteriorFactor.from_rows(rows.split(30), 30).measure_drift(rows.split(30))
    assert 0 < factor.drift < 1e-13 and factor.initial_drift == factor.drift
    updated = factor.append_rows(rows[:10])
    assert updated.measure_drift([rows, rows[:10]]).drift < 1e-13
    assert updated.measure_drift([rows, rows[:10]]).initial_drift == factor.initial_drift
    signs = 2.0 * torch.randint(0, 2, (30,), generator=torch.Generator().manual_seed(30)).double() - 1.0
    row = factor.upper[7, 7] * torch.linalg.inv(factor.upper[:, :-1])[7]
    for size in (1e-4, 1e-7, 1e-10):
        upper = factor.upper.clone()
        upper[7, 7] *= 1 + size
        # R⁻ᵀ(I + AᵀA)R⁻¹ is then 1 - size (e₇ rᵀ + r e₇ᵀ), r row 7 of R⁻¹ times R₇₇
        change = signs[7] * row
        change[7] += row @ signs
        measured = replace(factor, upper=upper).measure_drift([rows]).drift
        assert measured == pytest.approx(size * float(change.abs().max()), rel=1e-3)
        upper = factor.upper.clone()
        upper[:, -1] *= 1 + size
        assert replace(factor, upper=upper).measure_drift([rows]).drift == pytest.approx(size, rel=1e-2)
    assert updated.measure_drift([rows]).drift > 0.01  # rows forgotten


@pytest.mark.parametrize("condition", [1e4, 1e7, 4e7])
def test_ill_conditioned_rows(condition):
    """Fifty updates of every kind: predictions are those of a QR from scratch; largest for probes that are rows like the others."""
    columns, batches = 40, [hard_rows(60, 60, condition, seed) for seed in range(0, 600, 10)]
    held = batches[:6]

    def now() -> list[Tensor]:
        return [torch.cat([rows[:, :columns], rows[:, -1:]], dim=1) for rows in held]

    factor = PosteriorFactor.from_rows(now(), columns).measure_drift(now())
    true = torch.linalg.cond(factor.upper[:, :-1])
    assert true > 0.1 * condition and factor.condition <= true
    again = 0
    for k in range(50):
        if k % 5 == 3 and columns < 60:
            columns += 2
            fresh = [rows[:, columns - 2 : columns] for rows in held]
            old = [torch.cat([rows[:, : columns - 2], rows[:, -1:]], dim=1) for rows in held]
            factor = factor.append_columns(lambda old=old, fresh=fresh: zip(old, fresh, strict=True))
        elif k % 2 and len(held) > 4:
            gone = now()[k % len(held)]
            held = [rows for i, rows in enumerate(held) if i != k % len(held)]
            try:
                factor = factor.remove_rows(gone)
            except DowndateError:
                factor, again = PosteriorFactor.from_rows(now(), columns), again + 1
        else:
            held = [*held, batches[6 + k]]
            factor = factor.append_rows(now()[-1])
        factor = factor.measure_drift(now())
        if factor.drift > max(1e-9, 10 * factor.initial_drift):  # as Online does
            factor, again = PosteriorFactor.from_rows(now(), columns).measure_drift(now()), again + 1
    probe = now()[-1][:, :-1] + 1e-3 * random(60, columns, seed=5)
    same_predictions(factor, torch.cat(now()), probe)
    assert again == 0 if condition < 1e5 else again < 20


def plain_downdate(upper: Tensor, rows: Tensor, width: int) -> None:
    """The hyperbolic form of qr._downdate that is not mixed: A₂' = C⁻ᵀ(A₂ - PᵀR₂), by the old R₂."""
    r1, r2, a1, a2 = upper[:, :width], upper[:, width:], rows[:, :width], rows[:, width:]
    p = torch.linalg.solve_triangular(r1.T, a1.T, upper=False)
    g = torch.linalg.cholesky(torch.eye(width, dtype=p.dtype) - p @ p.T, upper=True)
    c = torch.linalg.cholesky(torch.eye(len(a1), dtype=p.dtype) - p.T @ p, upper=True)
    left = torch.linalg.solve_triangular(c.T, a2 - p.T @ r2, upper=False)
    r1.copy_(g @ r1)
    r2.copy_(torch.linalg.solve_triangular(g.T, r2 - p @ a2, upper=False))
    a2.copy_(left)


def test_the_mixed_form_is_backward_stable(monkeypatch):
    """Where next to nothing is left of the first column and much of the others, RᵀR = R'ᵀR' + AᵀA to rounding; not by the plain form.

    A₂' of the plain form has an error of the size of R₂ over g, which nothing in R₂' makes up for (Bojanczyk et al., section 3).
    """
    monkeypatch.setattr(qr, "SLICE", 1)
    errors: dict[str, list[float]] = {"mixed": [], "plain": []}
    for seed in range(6):
        kept, gone = 1e6 * random(24, 21, seed=seed), 1e6 * random(1, 21, seed=seed + 100)
        kept[:, 0] = 0
        kept[0, 0] = 3e3
        kept[0, 1:] *= 5
        factor = PosteriorFactor.from_rows([torch.cat([kept, gone])], 20)
        whole, a = (m[:, :-1].T @ m[:, :-1] for m in (factor.upper, gone))
        for name, form in (("mixed", qr._downdate), ("plain", plain_downdate)):
            with monkeypatch.context() as patch:
                patch.setattr(qr, "_downdate", form)
                left = factor.remove_rows(gone).upper[:, :-1]
            errors[name].append(float((left.T @ left + a - whole).abs().max() / whole.abs().max()))
    assert max(errors["mixed"]) < 1e-15 < 5e-15 < sum(errors["plain"]) / 6


# covariances of inducing variables -----------------------------------------------------------------------------------------


def covariance(n: int, seed: int = 0, rank: int = 200) -> Tensor:
    x = random(n, rank, seed=seed)
    return x @ x.T / rank + 1e-3 * torch.eye(n, dtype=torch.float64)


def test_bordered():
    k = covariance(30)
    lower, kept = extend_cholesky(torch.linalg.cholesky(k[:20, :20]), k[:20, 20:], k[20:, 20:])
    assert kept.tolist() == list(range(10))
    torch.testing.assert_close(lower, torch.linalg.cholesky(k), rtol=1e-12, atol=1e-13)


def test_bordered_without_dependent_columns():
    """One that is there already, one twice, one of zeros, and one that is the sum of others; scales of 1e-3 to 1e3."""
    x = random(26, 200)
    x[20] = x[4]
    x[22] = x[21]
    x[23] = 0
    x[24] = x[0] - 2 * x[1]
    scale = torch.logspace(-3, 3, 26, dtype=torch.float64)
    x = x * scale[:, None] / 14
    k = x @ x.T
    lower, kept = extend_cholesky(torch.linalg.cholesky(k[:20, :20]), k[:20, 20:], k[20:, 20:])
    assert len(kept) == 2 and kept[-1] == 5 and int(kept[0]) in (1, 2)
    every = torch.cat([torch.arange(20), 20 + kept])
    torch.testing.assert_close(lower @ lower.T, k[every][:, every], rtol=1e-12, atol=1e-12)
    assert (lower.diagonal() > 0).all()
    none, kept = extend_cholesky(torch.linalg.cholesky(k[:20, :20]), k[:20, 23:25], k[23:25, 23:25])
    assert not len(kept) and none.shape == (20, 20)
    assert len(extend_cholesky(torch.linalg.cholesky(k[:20, :20]), k[:20, 25:], k[25:, 25:], tolerance=2.0)[1]) == 0


def test_shrunk():
    k = covariance(30)
    lower, kept = torch.linalg.cholesky(k), torch.tensor([0, 3, 4, 11, 12, 28])
    shorter, turn = restrict_cholesky(lower, kept)
    torch.testing.assert_close(shorter, torch.linalg.cholesky(k[kept][:, kept]), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(turn.T @ turn, torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-14)
    # whitened columns: K_ou L⁻ᵀ of all, turned, is that of those kept
    rows = random(7, 30, seed=3)
    whitened, expected = (torch.linalg.solve(l, r.T).T for l, r in ((lower, rows), (shorter, rows[:, kept])))
    own = whitened @ lower.T
    torch.testing.assert_close((own @ torch.linalg.inv(lower.T)) @ turn, whitened @ turn)
    torch.testing.assert_close(expected @ shorter.T, rows[:, kept])
    # rows in the span of what was kept say the same
    within = random(7, 6, seed=4) @ k[kept]
    a, b = (torch.linalg.solve(l, r.T).T for l, r in ((lower, within), (shorter, within[:, kept])))
    torch.testing.assert_close(a @ turn, b, rtol=1e-9, atol=1e-10)


def test_nothing_is_changed_in_place():
    rows, more, new = random(50, 21), random(9, 21, seed=1), random(50, 3, seed=2)
    factor = PosteriorFactor.from_rows([rows], 20).append_rows(more)
    frozen = [t.clone() for t in (rows, more, new, factor.upper)]
    (
        factor.append_rows(more[:1]),
        factor.remove_rows(more),
        factor.append_columns(lambda: [(rows, new)]),
        factor.measure_drift([rows]),
    )
    factor.rotate_columns(lambda some: some), factor.rotate_columns(lambda some: some[:, [0, 1, 20]], 2)
    with pytest.raises(DowndateError):
        factor.remove_rows(100 * more)
    k = covariance(30)
    lower, copy = torch.linalg.cholesky(k[:20, :20]), k.clone()
    extend_cholesky(lower, k[:20, 20:], k[20:, 20:]), restrict_cholesky(lower, torch.arange(5))
    assert torch.equal(lower, torch.linalg.cholesky(k[:20, :20])) and torch.equal(copy, k)
    assert all(torch.equal(a, b) for a, b in zip(frozen, (rows, more, new, factor.upper), strict=True))


def test_slices_do_not_matter(monkeypatch):
    rows = random(90, 34)
    factor = PosteriorFactor.from_rows([rows], 33)
    whole = factor.remove_rows(rows[:30]).upper
    monkeypatch.setattr(qr, "SLICE", 7)
    torch.testing.assert_close(factor.remove_rows(rows[:30]).upper, whole, rtol=1e-11, atol=1e-12)


# merged factors -------------------------------------------------------------------------------------------------------------


def folded(rows: Tensor, chunk: int) -> RowFactor:
    factor = RowFactor(rows.shape[1] - 1, 8)
    for part in rows.split(chunk) if len(rows) else []:
        factor.add(part[:, :-1], part[:, -1])
    return factor


def gram(factor: RowFactor) -> Tensor:
    r = factor.factor()
    return r.T @ r


@given(st.lists(st.integers(0, 25), min_size=3, max_size=3), st.integers(1, 6), st.integers(1, 9), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_merging_is_associative_and_that_of_all_rows(sizes, columns, chunk, seed):
    """RᵀR = AᵀA of all rows, however they were divided, counts add up, and what was merged is as it was."""
    rows = random(sum(sizes), columns + 1, seed=seed)
    a, b, c = (folded(part, chunk) for part in rows.split(sizes))
    expected, before = rows.T @ rows, [gram(f) for f in (a, b, c)]
    scale = max(1.0, float(expected.abs().max()))
    for found in (a.merge(b).merge(c), a.merge(b.merge(c))):
        assert found.count == len(rows)
        assert found.factor().shape[0] <= max(columns + 1, 0)
        assert (gram(found) - expected).abs().max() <= 1e-12 * scale
        more = folded(rows, chunk).merge(found)
        more.add(rows[:, :-1], rows[:, -1])
        assert more.count == 3 * len(rows) and (gram(more) - 3 * expected).abs().max() <= 3e-12 * scale
    assert all(torch.equal(gram(f), g) for f, g in zip((a, b, c), before, strict=True))
    assert [f.count for f in (a, b, c)] == sizes


@pytest.mark.parametrize("columns, block", [(11, 4), (12, 4), (11, 1), (11, 20)])
def test_triangles_are_merged_by_blocks_of_columns(monkeypatch, columns, block):
    monkeypatch.setattr(qr, "SLICE", block)
    rows = random(60, columns + 1)
    a, b = folded(rows[:25], 5), folded(rows[25:], 5)
    found, kept = a.merge(b).factor(), (a.factor().clone(), b.factor().clone())
    assert found.shape == (columns + 1, columns + 1) and torch.equal(found, found.triu())
    assert (found.T @ found - rows.T @ rows).abs().max() <= 1e-12 * (rows.T @ rows).abs().max()
    assert torch.equal(a.factor(), kept[0]) and torch.equal(b.factor(), kept[1])


def test_few_rows_stay_as_they_are_when_merged():
    """In their order: leave-one-out of energies needs them."""
    rows = random(7, 11)
    assert torch.equal(folded(rows[:3], 2).merge(folded(rows[3:], 4)).factor(), rows)
