"""pymatgen's StructureMatcher, compiled: the same decisions, the same distances."""
