"""What comes in: one guarded reader for each kind of raw file, and one report of what was not taken as it stands."""
