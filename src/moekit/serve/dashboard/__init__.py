"""`moekit dashboard`: live pages of runs on this machine, read from what they write and nothing else."""
