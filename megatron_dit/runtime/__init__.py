"""What every package may use: text for terminals, files."""
