"""Import checkpoints in the formats in which the architectures' original projects publish them."""
