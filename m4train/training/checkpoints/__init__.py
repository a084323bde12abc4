"""`save` writes and reads a checkpoint, `saver` alongside training, `find` chooses the one to go on from, `weights` reads one by name."""
