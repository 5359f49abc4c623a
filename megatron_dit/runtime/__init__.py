"""What every package may use: text for terminals, locks, signals, standard output, the launchers' environment."""
