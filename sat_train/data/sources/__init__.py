"""Sources of clips and captions; every kind gives the same sorted list of records."""
