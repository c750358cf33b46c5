"""The limits of every validity protocol, one row a name.

A number measured under a name is comparable with what was published under it, as far as `covers` says.

Not here: the checks themselves (validity.py).
Sources: CDVAE, Xie et al., arXiv:2110.06197; DiffCSP, Jiao et al., arXiv:2309.04475; Crystal-text-LLM, Gruver
et al., arXiv:2402.04379; CrystaLLM, Antunes et al., Nat. Commun. 15, 10570 (2024); MatterGen, Zeni et al.,
Nature 639, 624 (2025); LeMat-GenBench, arXiv:2512.04562.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Protocol:
    """What one protocol demands of a structure beyond what was asked for. A limit at its default is off.

    Attributes:
        name: Stable; printed beside every number.
        covers: Which published checks these are, and what is left out.
        pair_distance_angstrom: No two different sites nearer.
        radius_scale, radius_offset_angstrom: No two sites nearer than scale * (offset + r_i + r_j).
        self_images: The same limits hold for a site and its own images.
        volume_angstrom3: Least cell volume.
        lengths_angstrom, angles_degree: Ranges of the cell's parameters, ends included.
        density_g_cm3, sites_per_angstrom3: Ranges, ends included.
        charge: The SMACT rule (charge.py) has to hold.
        max_combinations: More choices of oxidation states than this fail; see charge.py.
        bond_score: Least share of CrystalNN bonds of plausible length; see `bond_score`.
    """

    name: str
    covers: str
    pair_distance_angstrom: float = 0.0
    radius_scale: float = 0.0
    radius_offset_angstrom: float = 0.0
    self_images: bool = False
    volume_angstrom3: float = 0.0
    lengths_angstrom: tuple[float, float] = (0.0, math.inf)
    angles_degree: tuple[float, float] = (0.0, 180.0)
    density_g_cm3: tuple[float, float] = (0.0, math.inf)
    sites_per_angstrom3: tuple[float, float] = (0.0, math.inf)
    charge: bool = True
    max_combinations: float = math.inf
    bond_score: float = 0.0


# The limits of "kit" on cell, distances and density pass 38,034 of 38,034 real crystals: mp_train 17,738,
# mp_val 1,000, mp_test 3,559, wbm_train 9,918, Perov-5 and Carbon-24 validation 3,787 and 2,032. The nearest
# pair, in WBM, stands at 1.013 of its limit (Materials Project: 1.108), densities at 0.15 to 22.0 g/cm3. Its
# charge check passes 91.7 % of mp_val and 90.1 % of mp_train: SMACT's rule allows no mixed valence.
PROTOCOLS: dict[str, Protocol] = {
    p.name: p
    for p in (
        Protocol("kit", "the kit's own: LeMat's distances with self-images, plausible density, SMACT charge",
                 0.5, 0.5, 0.7, True, 0.1, (0.0, 1000.0), (0.0, 180.0), (0.01, 25.0), (1e-5, 0.5)),
        Protocol("cdvae", "structure_valid and comp_valid, no cap on combinations; not the fingerprint test",
                 0.5, volume_angstrom3=0.1),
        Protocol("diffcsp", "as cdvae; more than 1e7 combinations fail", 0.5, volume_angstrom3=0.1,
                 max_combinations=1e7),
        Protocol("crystal_text_llm", "as cdvae; not the fingerprint test", 0.5, volume_angstrom3=0.1),
        Protocol("mattergen", "as cdvae, meant for the relaxed structure", 0.5, volume_angstrom3=0.1),
        Protocol("crystallm_csp", "csp_valid: sensible, structure_valid, comp_valid; no fingerprint",
                 0.5, volume_angstrom3=0.1, lengths_angstrom=(0.5, 1000.0), angles_degree=(10.0, 170.0),
                 max_combinations=1e7),
        Protocol("crystallm", "valid: bond score 1 and the stated space group; not the two checks of the "
                 "CIF's formula lines against its sites, which are about the text", charge=False,
                 bond_score=1.0),
        Protocol("crystallm_pi_xrd", "structure_valid_xrd (no edge over 40 angstrom) and comp_valid",
                 0.5, volume_angstrom3=0.1, lengths_angstrom=(0.0, 40.0), max_combinations=1e7),
        Protocol("lemat_geometry", "distance and plausible; not charge_neutral, so not lemat.valid",
                 0.0, 0.5, 0.7, False, 1.0, (1.0, 100.0), (0.0, 180.0), (0.01, 25.0), (1e-5, 0.5),
                 charge=False),
    )
}  # fmt: skip
