"""Plans of runs: memory, time and disk, computed before a run is started."""
