"""Import checkpoints of the architectures' original projects."""
