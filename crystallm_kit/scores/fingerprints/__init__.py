"""Crystals as points that can be compared: CrystalNN's and Magpie's numbers, as CDVAE takes them."""
