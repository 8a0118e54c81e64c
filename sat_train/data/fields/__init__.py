"""Values of a sample besides clip and caption (`data.fields`): one file for each sort of kind."""
