"""The applications that the servers under measurement serve; imported in their workers, so nothing heavy here."""
