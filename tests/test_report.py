"""The uncertainty report: built from synthetic data of every kind, whole and with parts missing."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from report_data import built, crystal, pair, synthetic

from gpmlp.core import units
from gpmlp.core.errors import UserError
from gpmlp.report import figures as plots
from gpmlp.report.model import figures, numbers, worst
from gpmlp.report.model.data import CAUSES, LabelledComponents, ReportData
from gpmlp.report.model.page import labelling_answer, write_model_page
from gpmlp.report.style import format_percent
from gpmlp.uncertainty.scores import score_errors

KEYS = (  # of report.json
    "How wrong is it?",
    "Does it know?",
    "Where is it blind?",
    "Why?",
    "What to label next?",
    "Are the data right?",
    "How was the model made?",
)
TITLES = (
    "How large are the errors?",
    "Are the error bars calibrated?",
    "Where does the model extrapolate?",
    "What causes the uncertainty?",
    "Which structures to label next?",
    "Are the labels consistent?",
    "How was the model fitted?",
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    return *built(synthetic(), folder), folder


def test_the_page_answers_the_questions_in_order(whole):
    page, numbers_, parser, _ = whole
    words = "".join(parser.text)
    places = [page.index(f">{title}</h2>") for title in TITLES]
    assert places == sorted(places)
    assert tuple(numbers_["answers"]) == KEYS
    for answer in numbers_["answers"].values():
        assert answer in words and "nan" not in answer and answer.endswith(".")
    assert 'class="missing"' not in page


def test_nothing_is_loaded_from_outside(whole):
    page = whole[0]
    citations = page.index("What to cite")
    assert "http://" not in page and "https://" not in page[:citations]
    assert page.count("https://") == 1  # the text of the citation


def test_figures_are_beside_the_page(whole):
    page, _, _, folder = whole
    names = {path.stem for path in (folder / "figures").iterdir()}
    wanted = {
        "parity_energies",
        "parity_forces",
        "parity_stresses",
        "reliability",
        "novelty_std",
        "evidence",
        "dimer_1",
    }
    assert wanted <= names
    for name in names:
        assert (folder / "figures" / f"{name}.svg").read_bytes().startswith(b"<?xml")
        assert (folder / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert len(page) < 3e6


def test_building_twice_gives_the_same_bytes(tmp_path):
    data = bare(synthetic(3))
    first, second = built(data, tmp_path / "a")[0], built(data, tmp_path / "b")[0]
    assert first == second


def test_errors_of_the_json_are_those_of_the_data(whole):
    data, table = synthetic(), whole[1]["errors"]["overall"]
    error = 1e3 * (data.force_predicted - data.force_reference)
    assert table["force_mae_meV_per_A"] == pytest.approx(np.abs(error).mean())
    assert table["force_rmse_meV_per_A"] == pytest.approx(np.sqrt((error**2).mean()))
    energy = 1e3 * (data.energy_predicted - data.energy_reference) / data.n_atoms
    assert table["energy_mae_meV_per_atom"] == pytest.approx(np.abs(energy).mean())
    stress = np.abs(data.stress_predicted - data.stress_reference) / units.GPA
    # nine components, as `gpmlp evaluate` has them
    assert table["stress_mae_GPa"] == pytest.approx((stress[:, :3].sum() + 2 * stress[:, 3:].sum()) / (9 * len(stress)))


def test_gaussian_and_conformal_intervals_are_told_apart(whole):
    page, record, _, _ = whole
    data = synthetic()
    scaled = np.abs(data.force_predicted - data.force_reference) / data.force_std
    gaussian = record["coverage"]["gaussian"]["forces"]
    # 0.9945 and 1.6449 standard deviations
    assert gaussian["coverage_68"] == pytest.approx((scaled <= 0.99446).mean(), abs=2 / scaled.size)
    assert gaussian["coverage_90"] == pytest.approx((scaled <= 1.64485).mean(), abs=2 / scaled.size)
    assert record["coverage"]["conformal"] == {
        "forces": {f"coverage_{p}": s for p, s in ((50, 0.52), (68, 0.71), (90, 0.91), (95, 0.96))}
    }
    answer = record["answers"]["Does it know?"]
    assert f"{format_percent(gaussian['coverage_68'])} of force errors lie within one standard deviation" in answer
    assert f"conformal 90\u202f% intervals, which `gpmlp evaluate` counts, hold {format_percent(0.91)}" in answer
    assert "forces, Gaussian interval" in page and "forces, conformal interval" in page


def test_rank_correlations_say_of_what(whole):
    data, record = synthetic(), whole[1]
    assert record["rank_correlation"]["forces"] == {"spearman_of_atoms": 0.58}
    counted = numbers.rank_correlations(dataclasses.replace(data, scores={}), numbers.labelled_views(data))
    assert counted["forces"] == {"spearman_of_atoms": numbers.rank_correlation(data.atom_std, data.atom_error)}
    of_components = record["error_against_std"]["forces"]["spearman_of_components"]
    assert of_components != pytest.approx(counted["forces"]["spearman_of_atoms"], abs=0.01)
    assert "rank correlation 0.58 over atoms" in record["answers"]["Does it know?"]
    assert "0.580 <small>of atoms</small>" in whole[0]


def test_training_data_are_no_test(whole, tmp_path, monkeypatch):
    monkeypatch.setattr("gpmlp.report.model.figures.draw_picture", only_paint)
    said = "These are the data the model was trained on"
    page, record, _ = built(dataclasses.replace(synthetic(3), trained_on=True), tmp_path)
    assert record["answers"]["How wrong is it?"].startswith(said)
    assert "Not to be judged here: the model was trained on these data" in " ".join(
        map(str, record["answers"].values())
    )
    assert said not in whole[0]
    # nor does the head of the page judge them
    assert "within 1.64 σ" in whole[0] and "within 1.64 σ" not in page and "data it was trained on" in page
    _, record, _ = built(dataclasses.replace(synthetic(3), held_out=2), tmp_path)
    assert record["answers"]["How wrong is it?"].startswith(
        "Of these structures 2 of 3 are among those that the error bars"
    )


def test_errors_that_symmetry_makes_zero_leave_the_axis_to_others():
    data = synthetic(6)
    exact = (data.structure < 3)[:, None]
    predicted = np.where(exact, data.force_reference + 1e-13, data.force_predicted)
    view = numbers.labelled_views(dataclasses.replace(data, force_predicted=predicted))["forces"]
    largest = np.abs(view.error).max()
    plot = figures.error_std_plot(view)
    assert 1e-6 * largest < plot.y.low < 0.1 * largest
    assert len(plot.px) == (np.abs(view.error) >= numbers.SMALLEST * largest).sum() < 0.6 * len(view.error)


def test_kinds_left_out_are_counted():
    rows = [
        {"structure": t, "config_type": t, "largest_novelty": 2.0, "score": 3.0, "largest_force_std_meV_per_A": 1.0}
        for t in "aaabbccdefg"
    ]
    assert "of the kinds a (3), b (2), c (2) and others (4);" in labelling_answer(rows)
    assert "of the kinds a (3), b (2) and c (2);" in labelling_answer(rows[:7])


def test_strings_of_the_data_are_escaped(tmp_path):
    evil = '</script><img src="http://x"> & \'"<b>'
    data = synthetic(6)
    model = data.model | {
        "warnings": [evil],
        "recipe": {evil: [evil]},
        "provenance": {"files": {evil: {"name": evil, "sha256": evil}}},
    }
    scores = {"forces": {evil: 1.0, "coverage_68": None, "miscalibration_area": float("nan")}}
    data = dataclasses.replace(
        data, title=evil, model_name=evil, data_name=evil, names=(evil,) * 6, config_type=(evil + "$x",) * 6, model=model,
        dimers=({"pair": evil + "$", "r": [1, 2], "energy": [0, 1], "std": None, "shortest": None},), citations=(evil,),
        stress_reference=None, rivals={evil: {evil: 1.0}}, scores=scores,
    )  # fmt: skip
    page, record, parser = built(data, tmp_path)
    assert evil not in page
    assert record["title"] == evil
    assert evil in "".join(parser.text)


def bare(data: ReportData) -> ReportData:
    """The same predictions without anything optional."""
    required = [
        f.name
        for f in dataclasses.fields(data)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    return ReportData(**{name: getattr(data, name) for name in required})


def no_labels(data: ReportData) -> ReportData:
    nothing = {
        k: np.full_like(getattr(data, k), np.nan) for k in ("energy_reference", "force_reference", "stress_reference")
    }
    return dataclasses.replace(data, **nothing)


def odd_novelty(data: ReportData) -> ReportData:
    novelty = data.novelty.copy()
    novelty[:3], novelty[3:6] = np.inf, np.nan
    return dataclasses.replace(data, novelty=novelty)


DEGENERATE = {
    "bare": lambda: bare(synthetic(6)),
    "no labels": lambda: no_labels(synthetic(6)),
    "no labels, nothing else": lambda: no_labels_bare(),
    "one structure": lambda: dataclasses.replace(synthetic(1), dimers=(), model={}),
    "one species": lambda: dataclasses.replace(synthetic(6), species=np.full(48, 14)),
    "infinite and unknown novelty": lambda: odd_novelty(synthetic(6)),
    "all unseen": lambda: dataclasses.replace(synthetic(6), novelty=np.full(48, np.inf)),
    "zero and NaN std": lambda: dataclasses.replace(synthetic(6), force_std=np.where(np.arange(144).reshape(48, 3) % 2, 0, np.nan)),
    "exact": lambda: dataclasses.replace(exact(synthetic(6)), stress_reference=None, dimers=(), model={}),
    "no cells": lambda: dataclasses.replace(synthetic(6), cells=None, periodic=None, config_type=()),
    "only some labels": lambda: some_labels(synthetic(12)),
    "nothing at all": lambda: ReportData(
        "t", "m", "d", (), np.zeros(0, int), np.zeros(0), np.zeros(0), np.zeros(0, int), np.zeros(0, int), np.zeros(0, int),
        np.zeros((0, 3)), np.zeros((0, 3)),
    ),
}  # fmt: skip


def exact(data: ReportData) -> ReportData:
    return dataclasses.replace(data, force_predicted=data.force_reference, energy_predicted=data.energy_reference)


def no_labels_bare() -> ReportData:
    return dataclasses.replace(bare(no_labels(synthetic(3))))


def some_labels(data: ReportData) -> ReportData:
    forces, energies = data.force_reference.copy(), data.energy_reference.copy()
    forces[data.structure % 2 == 0] = np.nan
    energies[::3] = np.nan
    return dataclasses.replace(data, force_reference=forces, energy_reference=energies, stress_reference=None)


def only_paint(paint, alt, *args, **_):
    """In place of draw_picture: the marks are made, the slow laying out of text is left."""
    from matplotlib.figure import Figure

    paint(Figure().add_subplot(), *args)
    return plots.Picture(b"<svg/>", b"", alt, 1.0)


@pytest.mark.parametrize("name", DEGENERATE)
@pytest.mark.filterwarnings("error", "ignore::ResourceWarning")  # of what other tests left to the collector
def test_missing_parts_are_explained(name, tmp_path, monkeypatch):
    if name != "one structure":
        monkeypatch.setattr("gpmlp.report.model.figures.draw_picture", only_paint)
    page, record, _ = built(DEGENERATE[name](), tmp_path)
    assert all(f">{title}</h2>" in page for title in TITLES)
    assert not {"nan", "None", "inf"} & set("".join(record["answers"].values()).replace(".", " ").split())
    if name == "bare":
        assert page.count('class="missing"') >= 6


def test_wrong_shapes_are_refused():
    data = synthetic(3)
    with pytest.raises(UserError, match=r"`force_std` must have shape \(24, 3\); got \(24,\)"):
        dataclasses.replace(data, force_std=np.zeros(24))
    with pytest.raises(UserError, match="`config_type` must hold 3 labels; got 1"):
        dataclasses.replace(data, config_type=("a",))
    with pytest.raises(UserError, match="`structure` must hold indices of structures, 0 to 2"):
        dataclasses.replace(data, structure=data.structure + 1)


def normal_view(n: int = 40000) -> LabelledComponents:
    rng = np.random.default_rng(3)
    std = rng.lognormal(0, 0.6, n)
    rows = np.arange(n)
    return LabelledComponents("forces", np.zeros(n), std * rng.standard_normal(n), std, rows, rows, rows % 3)


def test_calibrated_errors_are_found_calibrated():
    view = normal_view()
    # the standard error of a share of 40000 is below 0.0025; four of them
    shares = list(numbers.level_coverage(view).values())
    np.testing.assert_allclose(shares, [0.5, 0.68, 0.9, 0.95], atol=0.01)
    curve = numbers.reliability_numbers(view)
    assert curve["area"] < 0.01
    bins = numbers.std_bins(view)
    np.testing.assert_allclose(bins["rmse"], bins["std"], rtol=0.1)  # 2000 in each bin: relative error 1/sqrt(4000)


@pytest.mark.parametrize(
    ("shares", "verdict", "way"),
    [
        ((0.70, 0.92), "Yes", ""),
        ((0.68, 0.80), "Roughly", "too small"),
        ((0.40, 0.60), "No", "too small"),
        ((0.95, 0.99), "On the cautious side", "too large"),
        ((0.85, 0.75), "No", "too small for large errors, too large for small ones"),
    ],
)
def test_both_intervals_are_judged(shares, verdict, way):
    found = numbers.calibration_verdict(dict(zip(("coverage_68", "coverage_90"), shares, strict=True)))
    assert found == (verdict, way)


def test_sparsification_ends_between_nothing_and_the_oracle():
    curve = numbers.sparsification_numbers(normal_view())
    assert 0 < curve["share_of_oracle"] < 1
    assert all(a >= b for a, b in zip(curve["rmse"], curve["oracle"], strict=True))


def test_thinning_keeps_the_worst():
    plot = figures.parity_plot(normal_view())
    kept = plot.thinned_points()
    assert len(kept) == plots.THINNED == len(set(kept))
    assert np.isin(np.argsort(-plot.worst)[: plots.THINNED // 2], kept).all()


def test_neighbours_are_those_of_the_crystal():
    positions, cell, species = crystal(np.random.default_rng(0), 1, 0.0)
    data = dataclasses.replace(
        synthetic(1), positions=positions, cells=cell[None], species=species, cutoff=2.0, periodic=np.ones((1, 3), bool)
    )
    vectors, kinds = worst.neighbour_vectors(data, 0)
    assert len(vectors) == 5  # itself and four of the other element, a sqrt(3)/4 away
    assert set(kinds[1:]) == {6}
    np.testing.assert_allclose(np.linalg.norm(vectors[1:], axis=1), 4.36 * np.sqrt(3) / 4)
    alone = dataclasses.replace(data, periodic=np.zeros((1, 3), bool))
    assert len(worst.neighbour_vectors(alone, 0)[0]) == 2  # the corner atom keeps one


def test_flags_say_why():
    data = synthetic(12)
    listed = worst.worst_environments(data)
    assert set(listed) == {"by_error_over_std", "by_std"}
    ratios = [row["error_over_std"] for row in listed["by_error_over_std"]]
    assert ratios == sorted(ratios, reverse=True)
    assert any("outside the trust region" in row["why"] for row in listed["by_std"])
    for row in listed["by_std"]:
        assert ("novel" in row["signs"]) == (row["novelty"] > 1)
        assert ("overconfident" in row["signs"]) == (row["error_over_std"] > worst.OVERCONFIDENT)
        assert row["cause_share"] == max(share[row["row"]] for share in data.shares.values())
    owners = [row["structure"] for row in listed["by_std"]]
    assert max(owners.count(name) for name in owners) <= worst.PER_STRUCTURE


def test_budget_adds_up_to_the_variance():
    data = synthetic(6)
    shares = numbers.variance_budget(data)["overall"]
    assert tuple(shares) == CAUSES
    assert sum(shares.values()) == pytest.approx(1e6 * np.mean(data.force_std**2))


def test_atoms_outside_the_trust_region_are_counted():
    data = synthetic(12)
    region = numbers.trust_region(data)
    assert region["n_outside"] == (data.novelty > 1).sum() > 0
    error = 1e3 * (data.force_predicted - data.force_reference)[data.novelty > 1]
    assert region["rmse_outside_meV_per_A"] == pytest.approx(np.sqrt((error**2).mean()))


def test_structures_to_label_are_diverse():
    rows = worst.label_next(synthetic(60))
    assert len(rows) == 15
    assert rows[0]["config_type"] == "high pressure"
    assert len({row["config_type"] for row in rows}) >= 4


def test_a_dimer_curve_stays_legible_under_a_huge_error_bar():
    from matplotlib.figure import Figure

    curve = pair("Si-Si", 2.1)
    inside = curve["energy"][curve["r"] >= 2.1]
    for std, told in ((309.0, True), (0.5, False)):
        axes = Figure().add_subplot()
        figures.paint_dimer(axes, curve | {"std": np.full(90, std)})
        low, high = axes.get_ylim()
        assert low < inside.min() and high > inside.max()
        assert high - low <= 3.01 * np.ptp(inside)
        assert any("up to 309 eV" in text.get_text() for text in axes.texts) == told


def test_a_group_of_tiny_errors_does_not_stretch_the_axis():
    from matplotlib.figure import Figure

    rng = np.random.default_rng(0)
    groups = {
        "liquid": np.abs(rng.normal(0, 60, 900)),
        "a name longer than there is room for beside": np.full(90, 0.005),
    }
    axes = Figure().add_subplot()
    figures.paint_boxes(axes, groups, "forces", None)
    low, high = axes.get_xlim()
    assert high / low < 1e4 and high > groups["liquid"].max()
    assert any("median 0.005" in text.get_text() for text in axes.texts)
    assert [line.get_marker() for line in axes.lines].count("<") == 1
    assert not axes.get_yticks().size  # names stand above the bars, so that long ones leave the axis its width


def test_one_element_is_not_shown_twice(tmp_path, monkeypatch):
    monkeypatch.setattr("gpmlp.report.model.figures.draw_picture", only_paint)
    page = built(synthetic(6), tmp_path)[0]
    assert "Forces by element." in page
    page = built(dataclasses.replace(synthetic(6), species=np.full(48, 14)), tmp_path)[0]
    assert "Forces by element." not in page and "Forces by config_type." in page


def test_a_sample_is_called_one(tmp_path, monkeypatch):
    monkeypatch.setattr("gpmlp.report.model.figures.draw_picture", only_paint)
    data = synthetic(3)
    sample = {"how": "posterior", "seed": 6, "of": 2, "calibrated": True, "index": 1}
    model = data.model | {"provenance": data.model["provenance"] | {"sample": sample}}
    words = "not the mean but a sample: how posterior, seed 6, of 2, calibrated True, index 1"
    assert words in built(dataclasses.replace(data, model=model), tmp_path)[0]


def test_ranks_of_equal_errors_are_those_of_evaluate():
    """Ties by average rank, as `uncertainty.scores` has them: by order, two arrays of equal numbers would correlate perfectly."""
    rng = np.random.default_rng(5)
    std, error = np.round(rng.random(200), 1), np.round(rng.random(200), 1)
    expected = score_errors(torch.from_numpy(error), torch.from_numpy(std)).spearman
    assert numbers.rank_correlation(std, error) == pytest.approx(expected, abs=1e-12)
    assert np.isnan(numbers.rank_correlation(np.ones(200), np.ones(200)))


def test_a_page_of_the_former_name_is_replaced(tmp_path, monkeypatch):
    """The page was called report.html before; one that is not a report stays."""
    monkeypatch.setattr("gpmlp.report.model.figures.draw_picture", only_paint)
    (tmp_path / "report.html").write_text(
        "<footer>Made by gpmlp. Every number on this page is in report.json.</footer>"
    )
    assert write_model_page(synthetic(3), tmp_path) == tmp_path / "index.html"
    assert not (tmp_path / "report.html").exists()
    (tmp_path / "report.html").write_text("mine")
    write_model_page(synthetic(3), tmp_path)
    assert (tmp_path / "report.html").read_text() == "mine"
