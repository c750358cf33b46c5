"""A scoring run: sample sets in, a row for every sample, the scores of every protocol, a report."""
