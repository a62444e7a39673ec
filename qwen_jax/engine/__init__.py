"""What runs requests: everything that holds state lives here."""
