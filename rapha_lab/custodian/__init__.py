"""The custodians' own tools: they run at the hospital before a dataset is served, and show records to nobody else."""
