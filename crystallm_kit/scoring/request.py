"""What a scoring run is asked for, and what of that its rows depend on.

    Request((SampleSet("DiffCSP", (Path("DiffCSP_mp_20.pt"),)),), Path("scores"), relax=True)
    .check()  -> UserError: --relax: above which hull? Give --hull FILE, with formation energies

Not here: doing it (run.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crystallm_kit.errors import UnknownName, UserError
from crystallm_kit.scores.coverage import CUTOFFS
from crystallm_kit.scoring.pairing import WAYS
from crystallm_kit.scoring.published import published_table
from crystallm_kit.scoring.sample_sets import SampleSet, content_hash
from crystallm_kit.scoring.summary import check_protocols
from crystallm_kit.structures.sources import check_path

# Protocol -> the table of published results under it.
_PUBLISHED = {"cdvae": "cdvae_panel_mp20", "lemat": "lemat_as_generated"}


@dataclass(frozen=True)
class Request:
    """What a run is asked for; as the command's options.

    Attributes:
        sets: The sample sets.
        out: Folder of the results.
        reference: Files of the set that tells what is new, and to which distributions are compared.
        targets: Files with the true structures of a prediction; `pairing` says how samples pair with them,
            "none" that they are a test set, only to be covered.
        protocols: Names; None: all.
        fingerprints: Whether to make them, for coverage and cdvae.valid; about 0.01 s of a core a crystal.
        relax: Whether to relax the samples and judge their stability, which needs `hull`.
        hull: File of energies that the convex hull is made of.
        potential: That relaxes and judges; a name or "module:factory".
        element_references: File of its elements' energies; None: those that come with the package.
        cutoffs: Of coverage: mp_20, perov_5, carbon_24.
        published: Tables of published results that the report shows beside; None: those that fit.
        workers: Processes; None: one per usable core.
        ray: Address of a Ray cluster in their place; "": none.
        fresh: Remove what a run left in the folder.
    """

    sets: tuple[SampleSet, ...]
    out: Path
    reference: tuple[Path, ...] = ()
    targets: tuple[Path, ...] = ()
    pairing: str = "auto"
    protocols: tuple[str, ...] | None = None
    fingerprints: bool = False
    relax: bool = False
    hull: Path | None = None
    potential: str = "chgnet"
    element_references: Path | None = None
    cutoffs: str = "mp_20"
    published: tuple[str, ...] | None = None
    workers: int | None = None
    ray: str = ""
    fresh: bool = False

    def check(self) -> list[str]:
        """Return the names of the protocols; raise what is wrong with the request before any work is done."""
        protocols = check_protocols(self.protocols)
        for name, value, known in (("pairing", self.pairing, WAYS), ("cutoffs", self.cutoffs, CUTOFFS)):
            if value not in known:
                raise UnknownName.among(name, value, known)
        if self.workers is not None and self.workers < 1:
            raise UserError(f"--workers {self.workers}: 1 or more expected")
        if self.relax and self.hull is None:
            raise UserError("--relax: above which hull? Give --hull FILE, with formation energies")
        if self.hull is not None and not self.relax:
            raise UserError("--hull: the samples have no energies of their own; give --relax too")
        for path in (*self.reference, *self.targets):
            check_path(path)
        for name in self.published or ():
            published_table(name)
        return protocols

    def inputs(self) -> dict[str, Any]:
        """Return what the rows depend on, contents by their hash."""
        return {
            "schema": 1,
            "sets": {
                one.name: {
                    "content": content_hash(one.sources), "requested": one.n_requested, "limit": one.limit,
                }
                for one in self.sets
            },
            "reference": content_hash(self.reference) if self.reference else None,
            "targets": content_hash(self.targets) if self.targets else None,
            "pairing": self.pairing if self.targets else None,
        }  # fmt: skip

    def tables(self, protocols: Sequence[str]) -> list[str]:
        """Return the published tables that are shown beside: without targets, those of de novo generation."""
        if self.published is not None:
            return list(self.published)
        fits = (not self.targets or self.pairing == "none") and self.cutoffs == "mp_20"
        return [name for protocol, name in _PUBLISHED.items() if fits and protocol in protocols]

    def mixes_alloys(self) -> bool:
        """Tell whether MatterGen's matcher was asked for by name, which takes long."""
        return "mattergen" in (self.protocols or ())

    def counts_bonds(self) -> bool:
        """Tell whether a protocol was named that is nothing without bonds, which take long."""
        return bool({"crystallm", "crystallm_pi"} & set(self.protocols or ()))

    def hashes_graphs(self) -> bool:
        """Tell whether CrystaLLM-pi was named, which counts by hashes of bonding graphs."""
        return "crystallm_pi" in (self.protocols or ())
