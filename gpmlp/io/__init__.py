"""Files in and out: structures and labels (atoms), model files (archive), recipes; everything written is written atomically."""
