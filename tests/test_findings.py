"""The text of findings."""

from __future__ import annotations

import warnings

import pytest

from gpmlp.core.findings import Finding, FindingWarning, warn_of


def test_frames_message_and_advice_are_one_text():
    frames = tuple(f"in.xyz frame {i}" for i in range(5))
    text = str(Finding("kind", "warning", "two energies.", frames, {"difference_eV": 2.0}, "Remove one."))
    assert text == "in.xyz frame 0, in.xyz frame 1, in.xyz frame 2 and 2 more: two energies. Remove one."


@pytest.mark.parametrize(
    ("message", "text"), [("no near frames.", "No near frames."), ("in.xyz: no energies.", "in.xyz: no energies.")]
)
def test_a_sentence_without_frames_begins_with_a_capital_but_not_a_file(message, text):
    assert str(Finding("kind", "note", message)) == text


def test_a_warning_carries_its_finding():
    finding = Finding("kind", "note", "no near frames.")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        warn_of(finding)
    assert seen[0].category is FindingWarning and seen[0].message.finding is finding
    assert Finding.from_dict(finding.as_dict()) == finding
