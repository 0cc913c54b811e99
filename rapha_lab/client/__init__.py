"""What runs on the researcher's machine: trusted with their key and the roots they verify against."""
