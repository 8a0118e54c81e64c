"""Where clips and captions come from: every kind of source gives the same sorted list of records."""
