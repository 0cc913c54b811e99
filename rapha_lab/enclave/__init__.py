"""What runs at the hospital around the curator: keys, processes, sandbox, attestation, gateway."""
