"""Energies above the hull, and what the papers call stable."""
