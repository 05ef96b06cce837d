"""Evidence from several starts: what a single one mistakes, and what does not change where one is enough."""

from __future__ import annotations

import torch

from gpmlp.gp import evidence
from gpmlp.gp.likelihood import NOISE_PRIORS, SIGNAL_PRIOR, Hyperparameters

COLUMNS = 20


def statistics(seed: int, signal: float, noise: float, n: int = 6) -> dict[str, evidence.SufficientStatistics]:
    """Few data of weak columns."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, COLUMNS, generator=generator, dtype=torch.float64) * torch.logspace(0, -3, COLUMNS).double()
    weights = signal * torch.randn(COLUMNS, generator=generator, dtype=torch.float64)
    labels = rows @ weights + noise * torch.randn(n, generator=generator, dtype=torch.float64)
    return {"forces": evidence.SufficientStatistics.from_factor(torch.cat([rows, labels[:, None]], dim=1), n)}


def hyperparameters() -> Hyperparameters:
    """One noise and one signal, as they are by default."""
    return Hyperparameters({"forces": NOISE_PRIORS["forces"]}, [SIGNAL_PRIOR])


def learned(data, restarts: int) -> tuple[float, float]:
    """Negative log evidence and noise."""
    parameters, blocks = hyperparameters(), torch.zeros(COLUMNS, dtype=torch.long)
    if restarts:
        evidence.restart_optimisation(data, parameters, blocks, restarts, seed=0)
    found = evidence.maximise_evidence(data, parameters, blocks)
    return found.negative_log_evidence, parameters.noise()["forces"]


def test_one_start_takes_noise_for_signal():
    """Six labels that are all noise: from the default start the columns explain them, and there is a better optimum."""
    data = statistics(seed=0, signal=0.01, noise=2.0)
    (once, little), (again, much) = learned(data, 0), learned(data, 3)
    assert again < once - 1.0
    assert little < 0.3 < 1.0 < much < 4.0  # 2 is true


def test_where_one_start_is_enough_nothing_changes():
    data = statistics(seed=1, signal=300.0, noise=2.0)
    assert abs(learned(data, 3)[0] - learned(data, 0)[0]) < 1e-5


def test_the_fixed_point_counts_the_priors():
    """Both ways of learning report the same quantity: at a converged optimum they agree."""
    data, blocks = statistics(seed=2, signal=300.0, noise=0.5, n=200), torch.zeros(COLUMNS, dtype=torch.long)
    parameters = hyperparameters()
    smooth = evidence.maximise_evidence(data, parameters, blocks).negative_log_evidence
    fixed = evidence.iterate_fixed_point(data, parameters, blocks, n_probes=512).negative_log_evidence
    assert abs(fixed - smooth) < 0.05


def test_settled_noises_do_not_depend_on_the_last_digits_of_the_data():
    """Rounding of the sums, relative 1e-15 here, moves what is learned by no more than it must; and the optimum is one of slope zero."""
    data, blocks = statistics(seed=2, signal=300.0, noise=0.5, n=200), torch.zeros(COLUMNS, dtype=torch.long)
    shaken = {
        k: evidence.SufficientStatistics(s.gram, s.projection, s.square * (1 + 1e-15), s.count) for k, s in data.items()
    }

    def found(some, start: float, settle: bool) -> tuple[float, float]:
        parameters = hyperparameters()
        parameters.set("forces", torch.tensor([start], dtype=torch.float64))
        evidence.maximise_evidence(some, parameters, blocks, settle=settle)
        return parameters.noise()["forces"], float(parameters.signal()[0])

    for one, other in zip(found(data, -1.0, True), found(shaken, 0.5, True), strict=True):
        assert abs(one / other - 1) < 1e-9
    assert max(abs(a / b - 1) for a, b in zip(found(data, -1.0, False), found(shaken, 0.5, False), strict=True)) > 1e-9


def test_settling_leaves_what_is_at_a_bound():
    """Labels without any noise: it ends at its lower bound, and the signal is settled beside it."""
    data, blocks = statistics(seed=3, signal=0.3, noise=0.0, n=200), torch.zeros(COLUMNS, dtype=torch.long)
    parameters = hyperparameters()
    result = evidence.maximise_evidence(data, parameters, blocks, settle=True)
    assert [at.name for at in result.at_bound] == ["forces"]
    _, slopes = evidence.negative_log_posterior(data, parameters, blocks)
    assert abs(slopes["signal"].item()) < 1e-3 < slopes["forces"].item()  # and its noise would be less if it could
