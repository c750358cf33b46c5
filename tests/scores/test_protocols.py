"""Every number's protocol has a text."""

import dataclasses

import pytest

from crystallm_kit.errors import UnknownName
from crystallm_kit.scores.checks import CHECKS
from crystallm_kit.scores.protocols import (
    PUBLISHED,
    limits_text,
    metric_text,
    protocol_of,
    protocol_text,
)
from crystallm_kit.scores.set_columns import columns_of
from crystallm_kit.scores.statistics import genmetrics_validity, lemat_statistics
from crystallm_kit.scores.thresholds import PROTOCOLS


def test_every_row_of_limits_belongs_to_a_protocol():
    assert {row for protocol in PUBLISHED.values() for row in protocol.validity} == set(PROTOCOLS)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_text_tells_demands_frozen_tables_and_source(name):
    text, protocol = protocol_text(name), PUBLISHED[name]
    for part in (protocol.demands, protocol.frozen, protocol.source):
        assert part in text
    assert text.count("Limits:") == len(protocol.validity)


def test_limits_follow_the_table():
    """A limit that is changed in thresholds.py is told as changed."""
    assert limits_text(PROTOCOLS["cdvae"]) == "different sites at least 0.5 A apart; cell of at least 0.1 A^3"
    changed = dataclasses.replace(PROTOCOLS["cdvae"], pair_distance_angstrom=0.7, self_images=True)
    assert "0.7 A apart" in limits_text(changed)
    assert "images of the same atom included" in limits_text(changed)


def test_every_check_and_statistic_has_a_line():
    one = columns_of(
        cell_formulas=["Na4 Cl4", "Fe2"],
        spacegroup_numbers=[225, 229],
        volume_per_atom_angstrom3=[22.4, 11.8],
        density_g_cm3=[2.16, 7.87],
    )
    names = [*CHECKS, *(s.name for s in lemat_statistics(one, one) + genmetrics_validity(one, one))]
    assert [name for name in names if not metric_text(name)] == []
    assert metric_text("kit.hit_rate.formula")
    assert metric_text("diffcsp.match_rate@20").startswith("share of targets")


def test_an_unknown_protocol_is_refused_with_the_nearest():
    with pytest.raises(UnknownName, match="did you mean 'lemat'"):
        protocol_of("lematt.valid")
