"""Files: structures and labels (ase_atoms, labels), model files (archive), recipes, provenance; all are written atomically."""
