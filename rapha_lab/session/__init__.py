"""What a cell runs in, at the site's sandbox and in rehearsals: trusted with nothing."""
