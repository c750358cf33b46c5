"""The protocols that numbers are printed under: what each one demands, where it is from, what is frozen.

    protocol_text("cdvae")              title, what it demands, limits, tables, source: for a report
    metric_text("cdvae.cov_recall")     what one number is: "share of reference crystals with ..."

A number's name begins with its protocol's. Limits of validity are told from the rows of thresholds.PROTOCOLS
(the only place where they stand), checks from checks.CHECKS.

Not here: the limits (thresholds.py), the numbers themselves (the other modules of this room).
Sources: with each protocol.
"""

import math
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase

from crystallm_kit.errors import UnknownName
from crystallm_kit.scores.checks import CHECKS
from crystallm_kit.scores.thresholds import PROTOCOLS, Protocol


@dataclass(frozen=True)
class PublishedProtocol:
    """One protocol, for people.

    Attributes:
        name: What its numbers' names begin with.
        title: Its system, or benchmark.
        demands: What it takes for valid, and how it counts.
        source: Paper and code.
        frozen: Versions and tables that its numbers here stand for.
        validity: Rows of thresholds.PROTOCOLS whose limits it has.
    """

    name: str
    title: str
    demands: str
    source: str
    frozen: str
    validity: tuple[str, ...] = ()


_SMACT = "SMACT 2.2.1's oxidation states, electronegativities and metals"
_FINGERPRINT = "matminer 0.9's CrystalNN 'ops' and scaled magpie fingerprints"

PUBLISHED: dict[str, PublishedProtocol] = {
    p.name: p
    for p in (
        PublishedProtocol(
            "kit", "crystallm_kit",
            "LeMat's distances and densities with the images of the same atom, SMACT's charge rule. First "
            "seen kept; shares are of everything requested, failures included. Stricter variants of the "
            "peers' numbers stand here, beside theirs.",
            "this package", f"{_SMACT}; pymatgen 2026.10's atomic radii; StructureMatcher 0.2 / 0.3 / 5",
            ("kit",),
        ),
        PublishedProtocol(
            "cdvae", "CDVAE",
            "Structure: volume and nearest distance of different sites; composition: SMACT's rule, no cap on "
            "combinations; valid with a fingerprint of every site. Coverage and Wasserstein distances from "
            "the test set; precision is of all generated.",
            "Xie et al., arXiv:2110.06197; github.com/txie-93/cdvae", f"{_SMACT}; {_FINGERPRINT}", ("cdvae",),
        ),
        PublishedProtocol(
            "diffcsp", "DiffCSP",
            "As cdvae, but more than 1e7 combinations of oxidation states fail. A candidate, and at n = 1 "
            "the truth too, has to be valid to match (0.3 / 0.5 / 10).",
            "Jiao et al., arXiv:2309.04475; github.com/jiaor17/DiffCSP", f"{_SMACT}; {_FINGERPRINT}",
            ("diffcsp",),
        ),
        PublishedProtocol(
            "crystal_text_llm", "Crystal-text-LLM",
            "Validity as cdvae, of the samples that could be parsed; novelty and diversity by fingerprints; "
            "metastable after relaxation below 0.1 eV/atom, failures dropped.",
            "Gruver et al., arXiv:2402.04379; github.com/facebookresearch/crystal-text-llm",
            f"{_SMACT}; {_FINGERPRINT}", ("crystal_text_llm",),
        ),
        PublishedProtocol(
            "crystallm", "CrystaLLM",
            "Two validities: of the text (formulas, multiplicities, bond lengths, stated space group) and of "
            "structure prediction (sensible cell, structure, composition; no fingerprint). Copies are looked "
            "for within equal cell formulas only.",
            "Antunes et al., Nat. Commun. 15, 10570 (2024); github.com/lantunes/CrystaLLM",
            f"{_SMACT} (its own pin, 2.5.5, differs in Ir and Zr); CrystalNN and radii of pymatgen 2026.10",
            ("crystallm", "crystallm_csp"),
        ),
        PublishedProtocol(
            "crystallm_pi", "CrystaLLM-pi",
            "As crystallm, with the geometry's composition against the formula, no edge over 40 A, and a "
            "bond score of 0 where no bond is counted. Of valid crystals with one bonding-graph hash (BAWL) "
            "that of the lowest hull distance, else volume, is kept; of these the novel are counted.",
            "github.com/C-Bone-UCL/CrystaLLM-pi",
            f"{_SMACT} (its own pin, 3.0.1, passes 8,273 of DiffCSP's 10,000, not 8,325); hashes of "
            "material-hasher",
            ("crystallm", "crystallm_pi_xrd"),
        ),
        PublishedProtocol(
            "mattergen", "MatterGen",
            "Stable at or below 0.1 eV/atom after relaxation, unique and novel as independent masks, "
            "validity not required; shares are of the scored structures, stable and S.U.N. of these and "
            "failed jobs. Its default matcher also mixes elements that could alloy, this one does not.",
            "Zeni et al., Nature 639, 624 (2025); github.com/microsoft/mattergen",
            f"{_SMACT}; hull and potential: those of the run", ("mattergen",),
        ),
        PublishedProtocol(
            "lemat", "LeMat-GenBench",
            "Charge by metallicity, bond valences or oxidation states; distances by radii; plausible "
            "density, cell and symmetry. All later numbers are of the valid ones. M.S.U.N. is above 0, so "
            "without S.U.N.",
            "arXiv:2512.04562; github.com/LeMaterial/lemat-genbench",
            "lemat_tables.json (SMACT 4.0.2's metallicity, pymatgen 2026.10's states, LeMat-Bulk's states as "
            "far as they are known); spglib at 0.01 A; StructureMatcher 0.1 / 0.3 / 5",
            ("lemat_geometry",),
        ),
        PublishedProtocol(
            "genmetrics", "matbench-genmetrics",
            "Distances of distributions, and shares of matches; no crystal is judged. Coverage can exceed 1: "
            "repeats raise it. Matches are by its matcher (0.3 / 0.5 / 10) or, its default, by fingerprints "
            "(0.4, and 10 on unscaled compositions): names with \"fingerprint_\".",
            "Baird et al., github.com/sparks-baird/matbench-genmetrics",
            "modified Pettifor numbers of element-coder 0.0.8; spglib at 0.01 A",
        ),
        PublishedProtocol(
            "csp", "Structure prediction",
            "A target counts as found if one of its first n candidates matches it (0.3 / 0.5 / 10, the "
            "prediction first); the RMSE is over matched targets, divided by (V/N)^(1/3).",
            "Jiao et al., arXiv:2309.04475", "pymatgen 2026.10's StructureMatcher",
        ),
    )
}  # fmt: skip

# Name, or pattern of names, without a check's own -> what the number is. The first that fits is taken.
_METRICS: dict[str, str] = {
    "kit.comp_valid_compounds": "kit.comp_valid among what is neither one element nor an alloy",
    "kit.readable": "samples that could be read as a crystal",
    "kit.valid": "valid, and as asked where something was asked",
    "kit.as_asked": "composition, number of sites and symmetry as asked",
    "kit.hit_rate.*": "samples that meet this condition, of those asked for it",
    "kit.*_of_requested": "the peer's number with everything requested as its denominator",
    "kit.unique": "valid, and no copy of an earlier valid one",
    "kit.novel": "valid, and not in the reference",
    "kit.unique_novel": "valid, no copy, and not in the reference",
    "*.metre*": "share of truths that some candidate matches, over all polymorphs of a composition",
    "*.crmse*": "RMSE with a fixed distance for targets that are not matched",
    "*.match_rate*": "share of targets that one of the first n candidates matches",
    "*.rmse*": "mean smallest RMS distance of the matched targets, divided by (V/N)^(1/3)",
    "*.cov_recall": "share of reference crystals with a generated one within both fingerprint cut-offs",
    "*.cov_precision": "share of generated crystals with a reference one within both fingerprint cut-offs",
    "*.amsd_*": "mean nearest distance between structure fingerprints",
    "*.amcd_*": "mean nearest distance between composition fingerprints",
    "*.wdist_density": "Wasserstein distance of densities from the reference, valid samples only",
    "*.wdist_num_elems": "Wasserstein distance of numbers of elements from the reference, valid samples only",
    "*.wdist_prop": "Wasserstein distance of energies by the peer's own network",
    "cdvae.opt_sr*": "share of starts whose best optimized property is below a percentile",
    "*.comp_div": "mean distance between composition fingerprints of valid samples",
    "*.struct_div": "mean distance between structure fingerprints of valid samples",
    "crystal_text_llm.novelty": "nearest training crystal farther than 0.1 (structure) or 2 (composition)",
    "*.bond_score": "mean share of bonds of plausible length",
    "*.comp_novel": "reduced formula not in the reference",
    "crystallm_pi.unique": "valid, and the one that is kept of its bonding-graph hash",
    "crystallm_pi.novel": "of the unique ones, those without a match in the reference",
    "lemat.unique": "valid ones without an equivalent later one",
    "lemat.jsd_*": "Jensen-Shannon distance (natural logarithm) of this distribution from the reference's",
    "lemat.jsd": "mean of the four Jensen-Shannon distances",
    "lemat.mmd_*": "squared maximum mean discrepancy from the reference, Gaussian kernel of width 1",
    "lemat.mmd": "mean of the three discrepancies",
    "lemat.frechet_*": "Frechet distance of a potential's embeddings from the reference's",
    "lemat.diversity_*_coverage": "how many of all known occur",
    "lemat.diversity_physical": "mean entropy of binned density, edges and packing, over log2 of the samples",
    "lemat.diversity_*": "effective number: exp of Shannon's entropy",
    "lemat.hhi_*": "supply concentration of the elements, 0 to 10",
    "genmetrics.validity*": "1 - distance from the reference over a dummy's: symmetry, elements, their mean",
    "genmetrics.*coverage": "generated crystals that match a test crystal, over the test crystals",
    "genmetrics.*novelty": "1 - share of generated crystals that match a training crystal",
    "genmetrics.*uniqueness": "1 - duplicate pairs over all pairs",
    "mattergen.novel_systems": "distinct unseen chemical systems over structures",
    "mattergen.*precision": "share of structures that are in the reference",
    "mattergen.*recall": "share of the reference that is among the structures",
    "*hull_distance_error": "mean absolute error of the hull distance on known crystals",
    "*formation_energy_error": "mean absolute error of the formation energy on known crystals",
    "*.hull_distance": "mean energy above the hull",
    "*.e_hull": "mean energy above the hull",
    "*.relaxed": "samples whose relaxation converged",
    "*.rmsd": "mean displacement from the relaxed structure",
    "*.relax_rmse": "mean Cartesian difference from the relaxed structure",
    "*.sun_*": "of S.U.N., what needs a second look (single elements, sparse hulls)",
    "*.msun_*": "of M.S.U.N., what needs a second look (single elements, sparse hulls)",
    "*.msun": "metastable, unique and novel",
    "*.sun": "stable, unique and novel",
    "*.metastable": "at most 0.1 eV/atom above the hull",
    "*.stable": "at or below the protocol's stability threshold",
    "*unique_novel": "unique and novel",
    "*unique": "without an equivalent earlier one",
    "*novel": "without a match in the reference",
}

_LIMITS: dict[str, str] = {
    "pair_distance_angstrom": "different sites at least {} A apart",
    "volume_angstrom3": "cell of at least {} A^3",
    "lengths_angstrom": "edges of {} A",
    "angles_degree": "angles of {} degrees",
    "density_g_cm3": "density of {} g/cm3",
    "sites_per_angstrom3": "{} sites per A^3",
    "max_combinations": "at most {} combinations of oxidation states",
    "bond_score": "bond score at least {}",
}


def protocol_of(name: str) -> PublishedProtocol:
    """Return the protocol of a number, or the one of that name. Raises UnknownName with the nearest known."""
    protocol = name.partition(".")[0]
    if protocol not in PUBLISHED:
        raise UnknownName.among("protocol", protocol, PUBLISHED)
    return PUBLISHED[protocol]


def protocol_text(name: str) -> str:
    """Return one paragraph: what a protocol demands, its limits, what is frozen, its source."""
    protocol = protocol_of(name)
    limits = [limits_text(PROTOCOLS[row]) for row in protocol.validity]
    parts = [protocol.demands, *(f"Limits: {text}." for text in limits if text)]
    return " ".join([*parts, f"Frozen: {protocol.frozen}.", f"Source: {protocol.source}."])


def limits_text(limits: Protocol) -> str:
    """Return the limits of one row of thresholds.PROTOCOLS as words; those that are off are left out."""
    defaults = Protocol("", "")
    told = []
    for field in fields(Protocol):
        value = getattr(limits, field.name)
        if field.name in _LIMITS and value != getattr(defaults, field.name):
            told.append(_LIMITS[field.name].format(_amount(value)))
    if limits.radius_scale:
        distance = f"{limits.radius_scale:g} ({limits.radius_offset_angstrom:g} A + both radii)"
        told.append(f"sites at least {distance} apart")
    if limits.self_images:
        told.append("images of the same atom included")
    return "; ".join(told)


def metric_text(name: str) -> str:
    """Return what a number is, in a line; "" where its name is in no table.

    Raises:
        UnknownName: If its protocol is in no table.
    """
    protocol_of(name)
    if name in CHECKS:
        return CHECKS[name]
    return next((text for pattern, text in _METRICS.items() if fnmatchcase(name, pattern)), "")


def _amount(value: float | tuple[float, float]) -> str:
    if not isinstance(value, tuple):
        return f"{value:g}"
    low, high = value
    return f"{low:g} and more" if math.isinf(high) else f"{low:g} to {high:g}"
