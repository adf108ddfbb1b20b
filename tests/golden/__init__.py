"""How the golden files are made."""
