"""Real, openly published patients to try the laboratory on."""
